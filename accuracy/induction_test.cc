// A model of two layers whose weights are written down, not trained: it copies what followed the last match (an
// induction head; Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). It retrieves exactly in
// float, so what a scheme breaks can be laid to the scheme.
//
// The state of a token has its own code (6 channels: 512 codes of so few lie close together), that of the token before
// it, which layer 0 writes, the answer, which layer 1 writes, and a one. Layer 0 asks by position alone: queries and
// keys are constants, turned by RoPE, queries one step further, so that their product is largest one token back. Layer
// 1 asks with the token's code for that of the token before, in channels that hardly turn, and copies the code of what
// it finds.
#include <ATen/ATen.h>

#include <cmath>

#include "accuracy/tiny_model.h"
#include "fixtures/model.h"

namespace kvq {
namespace {

constexpr int64_t kVocab = 512, kHidden = 32, kHead = 64, kCode = 6;
constexpr int64_t kOwn = 0, kBefore = kCode, kAnswer = 2 * kCode, kOne = 3 * kCode;  // channels of the state
constexpr double kTheta = 1e12;
constexpr int64_t kFast = 8;               // pairs of channels that turn, for positions
constexpr int64_t kSlow = 32 - kCode / 2;  // the first pair that hardly turns, for codes

// Codes of one length, no two with a cosine above 0.95: what is not exact mistakes one for the other.
at::Tensor Codes() {
  at::manual_seed(5);
  at::Tensor codes = at::zeros({kVocab, kCode});
  for (int64_t n = 0; n < kVocab;) {
    const at::Tensor code = at::randn({kCode});
    codes[n] = code / code.norm();
    n += n == 0 || codes.narrow(0, 0, n).matmul(codes[n]).max().item<double>() < 0.95;
  }
  return codes * std::sqrt(static_cast<double>(kCode));
}

void WriteInductionModel(const std::filesystem::path& dir) {
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "config.json") << nlohmann::json{
      {"model_type", "llama"},    {"hidden_size", kHidden},   {"num_hidden_layers", 2},
      {"num_attention_heads", 1}, {"num_key_value_heads", 1}, {"head_dim", kHead},
      {"intermediate_size", 8},   {"vocab_size", kVocab},     {"max_position_embeddings", 4096},
      {"rms_norm_eps", 1e-6},     {"rope_theta", kTheta},     {"tie_word_embeddings", false},
      {"hidden_act", "silu"}};
  const at::Tensor codes = Codes();
  const auto zeros = [](int64_t rows, int64_t columns) { return at::zeros({rows, columns}); };
  at::Tensor embedding = zeros(kVocab, kHidden), head = zeros(kVocab, kHidden);
  embedding.narrow(1, kOwn, kCode).copy_(codes);
  embedding.select(1, kOne).fill_(1);
  head.narrow(1, kAnswer, kCode).copy_(codes);
  // RMSNorm divides a state by the root of its mean square, which is the same for all tokens.
  const double rms[] = {std::sqrt((kCode + 1.0) / kHidden), std::sqrt((2 * kCode + 1.0) / kHidden)};
  std::vector<std::pair<std::string, at::Tensor>> tensors = {
      {"model.embed_tokens.weight", embedding}, {"lm_head.weight", head}, {"model.norm.weight", at::ones({kHidden})}};
  for (int64_t layer = 0; layer < 2; ++layer) {
    at::Tensor q = zeros(kHead, kHidden), k = zeros(kHead, kHidden), v = zeros(kHead, kHidden),
               o = zeros(kHidden, kHead);
    const double scale = rms[layer];
    if (layer == 0) {
      constexpr double kSharp = 45;  // a neighbour's score is below the right one's by some 0.57 of it, times 64^-0.5
      for (int64_t f = 0; f < kFast; ++f) {
        const double step = std::pow(kTheta, -2.0 * static_cast<double>(f) / kHead);
        q[f][kOne] = scale * kSharp * std::cos(step);
        q[f + kHead / 2][kOne] = -scale * kSharp * std::sin(step);
        k[f][kOne] = scale * 8;
      }
    } else {
      constexpr double kSharp = 80;
      for (int64_t i = 0; i < kCode; ++i) {
        const int64_t channel = i < kCode / 2 ? kSlow + i : kHead / 2 + kSlow + i - kCode / 2;
        q[channel][kOwn + i] = scale * kSharp;
        k[channel][kBefore + i] = scale;
      }
    }
    for (int64_t i = 0; i < kCode; ++i) {
      v[i][kOwn + i] = scale;
      o[(layer == 0 ? kBefore : kAnswer) + i][i] = 1;
    }
    const std::string at = StrCat("model.layers.", layer, ".");
    tensors.insert(tensors.end(), {{at + "self_attn.q_proj.weight", q},
                                   {at + "self_attn.k_proj.weight", k},
                                   {at + "self_attn.v_proj.weight", v},
                                   {at + "self_attn.o_proj.weight", o},
                                   {at + "mlp.gate_proj.weight", zeros(8, kHidden)},
                                   {at + "mlp.up_proj.weight", zeros(8, kHidden)},
                                   {at + "mlp.down_proj.weight", zeros(kHidden, 8)},
                                   {at + "input_layernorm.weight", at::ones({kHidden})},
                                   {at + "post_attention_layernorm.weight", at::ones({kHidden})}});
  }
  WriteTensors(dir / "model.safetensors", tensors);
}

class Induction : public testing::Test {
 protected:
  static constexpr int64_t kPairs = 200;
  void SetUp() override {
    const std::filesystem::path dir = std::filesystem::path(testing::TempDir()) / TestName();
    WriteInductionModel(dir);
    model_ = LoadModel(dir.string(), at::kFloat, at::kCPU);
  }
  // The share of 200 keys whose values come back from a context of key, value, key, value ..., fed as when decoding.
  // Another token stands first: it has none before it.
  double Retrieved(const std::string& text) {
    const Spec spec = ParseSpec(text);
    at::manual_seed(9);
    const at::Tensor tokens = at::randperm(kVocab).narrow(0, 0, 2 * kPairs + 1);  // each comes once
    KvCache cache = model_->NewCache(spec, 1, 2 * kPairs + 2);
    const Backend& backend = FindBackend("sdpa");
    Feed(*model_, tokens.unsqueeze(0), cache, backend, spec.CallTokens(), spec.sink_tokens + spec.CallTokens());
    const auto restore = cache.Save();
    int64_t right = 0;
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      restore();
      const at::Tensor key = tokens.narrow(0, 2 * pair + 1, 1).unsqueeze(0);
      const at::Tensor logits = model_->Logits(model_->Forward(key, cache, backend));
      right += logits.argmax(-1).item<int64_t>() == tokens[2 * pair + 2].item<int64_t>();
    }
    return static_cast<double>(right) / kPairs;
  }
  std::unique_ptr<Model> model_;
};

TEST_F(Induction, RetrievesExactlyUntilTheBitsRunOut) {
  for (const char* spec :
       {"none", "int8-hqq@residual=32", "q8_0@residual=0", "int4-hqq@residual=32", "int4-quanto@residual=32"}) {
    EXPECT_EQ(Retrieved(spec), 1) << spec;
  }
  // Seen: 0.56 and 0.66. With two bits for one side only, 0.60 (keys) and 0.94 (values): keys carry it.
  EXPECT_LT(Retrieved("int2-hqq@residual=32"), 0.75);
  EXPECT_LT(Retrieved("int2-quanto@residual=32"), 0.8);
  EXPECT_LT(Retrieved("int2-hqq+none@residual=32"), 0.75);
  EXPECT_GT(Retrieved("none+int2-hqq@residual=32"), 0.85);
}

}  // namespace
}  // namespace kvq
