// The runtime against transformers: tiny random models, and SmolLM2 where it was fetched.
#include <ATen/ATen.h>

#include <filesystem>

#include "accuracy/golden.h"
#include "fixtures/dataset.h"
#include "fixtures/model.h"
#include "fixtures/tokenizer.h"
#include "kernels/error.h"

namespace kvq {
namespace {

const at::Device kCpu(at::kCPU);

std::unique_ptr<Model> Tiny(const std::string& name, at::Device device = kCpu, at::ScalarType type = at::kFloat) {
  return LoadModel(GoldenPath("llama-" + name), type, device);
}

KvCache Cache(const Model& model, int64_t batch = 1, const std::string& spec = "none") {
  return KvCache(ParseSpec(spec), model.cache_shape(batch), 128, model.dtype(), model.device());
}

// Logits of all positions, fed in calls of `chunk` tokens.
at::Tensor AllLogits(const Model& model, const at::Tensor& ids, const std::string& backend, int64_t chunk) {
  KvCache cache = Cache(model, ids.size(0));
  std::vector<at::Tensor> parts;
  for (int64_t at = 0; at < ids.size(1); at += chunk) {
    const int64_t n = std::min(chunk, ids.size(1) - at);
    parts.push_back(model.Logits(model.Forward(ids.narrow(1, at, n), cache, FindBackend(backend))));
  }
  return at::cat(parts, 1).cpu();
}

double RelativeError(const at::Tensor& ours, const at::Tensor& theirs) {
  return ((ours - theirs).norm() / theirs.norm()).item<double>();
}

class LlamaParity : public testing::TestWithParam<std::tuple<const char*, const char*>> {};

// Whole, in chunks, and token by token. float32 sums of some hundred terms differ by about 1e-6.
TEST_P(LlamaParity, LogitsAndGreedyTokensEqualTransformers) {
  const c10::InferenceMode guard;
  const auto [name, backend] = GetParam();
  const std::unique_ptr<Model> model = Tiny(name);
  const auto golden = Golden("llama.json")[name];
  const std::vector<int32_t> ids = golden["ids"];
  for (const int64_t chunk : {40, 13, 8, 1}) {
    const at::Tensor logits = AllLogits(*model, IdTensor(ids, 1, kCpu), backend, chunk);
    for (size_t i = 0; i < golden["positions"].size(); ++i) {
      const at::Tensor theirs = at::tensor(golden["logits"][i].get<std::vector<float>>());
      EXPECT_LT(RelativeError(logits[0][golden["positions"][i].get<int64_t>()], theirs), 1e-5) << "chunk " << chunk;
    }
  }
  KvCache cache = Cache(*model);
  at::Tensor hidden = Feed(*model, IdTensor(ids, 1, kCpu), cache, FindBackend(backend), 16);
  for (const int64_t expected : golden["greedy"].get<std::vector<int64_t>>()) {
    const at::Tensor token = model->Logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1);
    ASSERT_EQ(token.item<int64_t>(), expected);
    hidden = model->Forward(token, cache, FindBackend(backend));
  }
}
INSTANTIATE_TEST_SUITE_P(Shapes, LlamaParity,
                         testing::Combine(testing::Values("gqa3", "mha", "gqa7"), testing::Values("eager", "sdpa")));

TEST(Model, SequencesOfABatchDoNotSeeEachOther) {
  const c10::InferenceMode guard;
  const std::unique_ptr<Model> model = Tiny("gqa3");
  const at::Tensor a = IdTensor({3, 1, 4, 1, 5, 9, 2, 6}, 1, kCpu), b = IdTensor({2, 7, 1, 8, 2, 8, 1, 8}, 1, kCpu);
  for (const char* backend : {"eager", "sdpa"}) {
    const at::Tensor both = AllLogits(*model, at::cat({a, b}, 0), backend, 3);
    EXPECT_LT(RelativeError(both.narrow(0, 0, 1), AllLogits(*model, a, backend, 3)), 1e-6);
    EXPECT_LT(RelativeError(both.narrow(0, 1, 1), AllLogits(*model, b, backend, 3)), 1e-6);
  }
}

// bfloat16 keeps 8 bits: each of some twenty roundings in a row adds up to 2^-9 of the value.
TEST(Model, SixteenBitTypesStayNearFloat32) {
  const c10::InferenceMode guard;
  const at::Tensor ids = IdTensor(Golden("llama.json")["gqa3"]["ids"], 1, kCpu);
  const at::Tensor exact = AllLogits(*Tiny("gqa3"), ids, "sdpa", 40);
  EXPECT_LT(RelativeError(AllLogits(*Tiny("gqa3", kCpu, at::kBFloat16), ids, "sdpa", 40), exact), 0.04);
}

TEST(Model, CountsItsWeightsOnce) {
  const std::unique_ptr<Model> model = Tiny("gqa3");  // tied: the head is the embedding
  int64_t bytes = 0;
  const Safetensors files = Safetensors::Open(GoldenPath("llama-gqa3"));
  for (const auto& [name, entry] : files.entries()) bytes += entry.nbytes;
  EXPECT_EQ(model->WeightBytes(), bytes);
}

TEST(Model, RefusesWhatItCannotRun) {
  namespace fs = std::filesystem;
  const fs::path dir = fs::path(testing::TempDir()) / "kvq_model";
  const auto with = [&](const std::string& from, const std::string& to) {
    fs::remove_all(dir);
    fs::copy(GoldenPath("llama-mha"), dir);
    std::ifstream in(dir / "config.json");
    std::string text((std::istreambuf_iterator<char>(in)), {});
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    if (at == std::string::npos) return std::string("the text to replace is not there");
    std::ofstream(dir / "config.json") << text.replace(at, from.size(), to);
    try {
      LoadModel(dir.string(), at::kFloat, kCpu);
    } catch (const InputError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_NE(with("\"model_type\": \"llama\"", "\"model_type\": \"rwkv\"").find("'rwkv' is not supported; supported: llama"),
            std::string::npos);
  EXPECT_NE(with("\"intermediate_size\": 40", "\"intermediate_size\": 48").find("config.json asks for [48"),
            std::string::npos);
  EXPECT_NE(with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3").find("model.layers.2"), std::string::npos);
  EXPECT_NE(with("\"attention_bias\": false", "\"attention_bias\": true").find("attention_bias"), std::string::npos);
  EXPECT_NE(with("\"silu\"", "\"gelu\"").find("hidden_act"), std::string::npos);
  EXPECT_THROW(FindBackend("flashier"), InputError);
  EXPECT_THROW(ParseDType("int8"), InputError);
  EXPECT_THROW(ParseDevice("tpu"), InputError);
}

TEST(ModelGpu, LogitsEqualTheCpus) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  for (const char* name : {"gqa3", "mha", "gqa7"}) {
    const std::vector<int32_t> ids = Golden("llama.json")[name]["ids"];
    for (const char* backend : {"eager", "sdpa"}) {
      const at::Tensor cpu = AllLogits(*Tiny(name), IdTensor(ids, 2, kCpu), backend, 40);
      const std::unique_ptr<Model> gpu = Tiny(name, at::kCUDA);
      for (const int64_t chunk : {40, 13, 1}) {
        EXPECT_LT(RelativeError(AllLogits(*gpu, IdTensor(ids, 2, at::kCUDA), backend, chunk), cpu), 1e-4);
      }
      // fp16 keeps 11 bits; see SixteenBitTypesStayNearFloat32.
      EXPECT_LT(RelativeError(AllLogits(*Tiny(name, at::kCUDA, at::kHalf), IdTensor(ids, 2, at::kCUDA), backend, 13), cpu),
                0.01);
    }
  }
}

// ---- SmolLM2, where it was fetched

TEST(SmolLm2Parity, NllOfRealTextEqualsTransformers) {
  const std::string dir = CacheDir() + "/models/smollm2-135m";
  if (!std::filesystem::exists(dir)) GTEST_SKIP() << dir << " is not there; run datasets/fetch smollm2-135m";
  const c10::InferenceMode guard;
  const auto golden = Golden("smollm2.json");
  const std::vector<int32_t> ids = golden["ids"];
  const std::vector<int32_t> ours =
      Tokenizer::Load(dir).Encode(LoadCorpus("pride-and-prejudice", "").text.substr(0, 4000), false);
  ASSERT_GE(ours.size(), ids.size());
  EXPECT_TRUE(std::equal(ids.begin(), ids.end(), ours.begin()));
  const std::unique_ptr<Model> model = LoadModel(dir, at::kFloat, kCpu);
  KvCache cache(ParseSpec("none"), model->cache_shape(1), 256, at::kFloat, kCpu);
  const at::Tensor log =
      at::log_softmax(model->Logits(model->Forward(IdTensor(ids, 1, kCpu), cache, FindBackend("sdpa"))), -1)[0];
  for (size_t i = 0; i + 1 < ids.size(); ++i) {
    // 30 layers in float32, 1e-6 each, on logits up to 30.
    EXPECT_NEAR(-log[static_cast<int64_t>(i)][ids[i + 1]].item<double>(), golden["nll"][i].get<double>(), 1e-3) << i;
  }
}

}  // namespace
}  // namespace kvq
