// Caches of latents (MLA): what they store, its bytes by hand, what specs mean there, and attention in both its ways.
#include <ATen/ATen.h>

#include "accuracy/command.h"
#include "accuracy/families.h"
#include "accuracy/golden.h"
#include "accuracy/relative_error.h"
#include "accuracy/tiny_model.h"
#include "fixtures/cache/codec_tensors.h"
#include "fixtures/model.h"
#include "kernels/error.h"

namespace kvq {
namespace {

CacheShape ShapeOf(const char* name) { return CacheShapeOf(ParseModelConfig(FindPublishedShape(name)->config, name), 1); }

std::string Refusal(const std::string& spec, const CacheShape& shape) {
  try {
    CheckSpec(ParseSpec(spec), shape);
  } catch (const InputError& error) {
    return error.what();
  }
  return "no refusal";
}

TEST(Latents, BytesAreWhatOneMultiplies) {
  const auto of_token = [](const char* name, const char* spec, int64_t tokens) {
    return KvBytes(ParseSpec(spec), ShapeOf(name), tokens, at::kHalf);
  };
  // 512 channels of a latent and 64 of a rotary key in two bytes, 27 and 61 layers.
  EXPECT_EQ(of_token("deepseek-v2-lite", "none", 1), 31104);
  EXPECT_EQ(of_token("deepseek-v3", "none", 1), 70272);
  // "equal to GQA with only 2.25 groups" (arXiv:2405.04434, section 2.1.4): 2 x 2.25 heads of 128 channels.
  EXPECT_EQ(ShapeOf("deepseek-v3").TokenElements(), 61 * 2 * 9 * 128 / 4);
  // ggml's blocks of 32: 34 bytes. Of the latent alone, and, as llama.cpp stores both in one row, of 18 blocks.
  EXPECT_EQ(of_token("deepseek-v3", "q8_0@residual=0", 1000), int64_t{1000} * 61 * (512 / 32 * 34 + 64 * 2));
  EXPECT_EQ(of_token("deepseek-v3", "q8_0+q8_0@residual=0", 1000), int64_t{1000} * 61 * 18 * 34);
  EXPECT_EQ(of_token("deepseek-v3", "llamacpp-q8_0-mla", 1000), int64_t{1000} * 61 * 18 * 34);
  // vLLM's fp8: a byte a channel, 576 a token and layer.
  EXPECT_EQ(of_token("deepseek-v3", "vllm-fp8-mla", 1000), int64_t{1000} * 61 * 576);
  // Groups of 64 with scale and zero in 16 bit: 36 bytes each; of 4096 tokens the newest 128 stay as they are.
  EXPECT_EQ(of_token("deepseek-v2-lite", "int4-hqq", 4096), 27 * (3968 * (8 * 36 + 128) + 128 * 1152));
  EXPECT_DOUBLE_EQ(EncodedBits(ParseSpec("int4-hqq"), ShapeOf("deepseek-v3")).value(), 4.5);
  EXPECT_DOUBLE_EQ(EncodedShare(ParseSpec("int4-hqq@residual=0"), ShapeOf("deepseek-v3"), 100), 512.0 / 576);
}

TEST(Latents, TensorsHaveTheBytesOfTheFormula) {
  const CacheShape shape{2, {{1, 512, 64}, {1, 512, 64}}};
  for (const char* text : {"none", "int4-hqq", "int4-hqq+int8-hqq@residual=32@sinks=4", "q8_0@residual=0", "none+q8_0@residual=0",
                           "int2-hqq-kivi@dense=0+1", "int4-hqq@rotate=hadamard"}) {
    const Spec spec = ParseSpec(text);
    const KvCache cache(spec, shape, 300, at::kBFloat16, kCpu);
    EXPECT_EQ(cache.AllocatedBytes(), KvBytesReserved(spec, shape, 300, at::kBFloat16)) << text;
  }
}

// The latent goes through keys' codec; the rotary key stays as it is unless a plus says otherwise.
TEST(Latents, StoresWhatTheSpecSaysOfEachPart) {
  const c10::InferenceMode guard;
  const CacheShape shape{1, {{1, 128, 64}}};
  at::manual_seed(5);
  const at::Tensor latent = at::randn({1, 1, 40, 128}), rotary_key = at::randn({1, 1, 40, 64});
  const auto decoded = [](const Codec& codec, const at::Tensor& x) {
    const CodecParams params{.group_size = codec.default_group};
    const EncodedTensors encoded = AllocateEncoded(codec, params, 1, 1, x.size(3), x.size(2), 1, kCpu);
    EncodeTensor(codec, params, x, 0, encoded);
    at::Tensor out = at::empty_like(x);
    DecodeTensor(codec, params, encoded, 0, out);
    return out;
  };
  const Scheme &int4 = FindScheme("int4-hqq"), &int8 = FindScheme("int8-hqq");
  const auto read = [&](const char* spec) {
    KvCache cache(ParseSpec(spec), shape, 40, at::kFloat, kCpu);
    const auto [first, second] = cache.Update(0, latent, rotary_key);
    return std::pair(first.clone(), second.clone());
  };
  const at::Tensor latent4 = decoded(int4.keys, latent);
  EXPECT_FALSE(latent4.equal(latent));
  EXPECT_TRUE(read("int4-hqq@residual=0").first.equal(latent4));
  EXPECT_TRUE(read("int4-hqq@residual=0").second.equal(rotary_key));
  EXPECT_TRUE(read("int4-hqq+int8-hqq@residual=0").first.equal(latent4));
  EXPECT_TRUE(read("int4-hqq+int8-hqq@residual=0").second.equal(decoded(int8.values, rotary_key)));
  EXPECT_TRUE(read("none+int4-hqq@residual=0").first.equal(latent));
  EXPECT_TRUE(read("int4-hqq+none@residual=0").first.equal(latent4));
}

TEST(Latents, RefusesWhatMeansNothingOfThem) {
  const CacheShape latents{1, {{1, 512, 64}}}, odd{1, {{1, 96, 48}}};
  EXPECT_EQ(Refusal("int4-hqq", latents), "no refusal");
  EXPECT_EQ(Refusal("int4-hqq@policy=hf", latents),
            "spec 'int4-hqq@policy=hf': policy hf is of keys and values, and this model's cache keeps latents; leave out @policy");
  EXPECT_NE(Refusal("kivi-4@policy=kivi", latents).find("policy kivi is of keys and values"), std::string::npos);
  EXPECT_NE(Refusal("int4-hqq", odd).find("of the latent: "), std::string::npos) << Refusal("int4-hqq", odd);
  EXPECT_NE(Refusal("none+int4-hqq", odd).find("of the rotary key: "), std::string::npos) << Refusal("none+int4-hqq", odd);
  EXPECT_EQ(Refusal("int4-hqq@policy=hf", CacheShape::Uniform(2, 1, 2, 64)), "no refusal");
  // Presets are of what an engine stores of the one or the other.
  EXPECT_NE(Refusal("vllm-fp8", latents).find("stores of keys and values, and this model's cache keeps latents"), std::string::npos);
  EXPECT_NE(Refusal("vllm-fp8-mla", CacheShape::Uniform(2, 1, 2, 64)).find("stores of latents"), std::string::npos);
  for (const char* preset : {"vllm-fp8-mla", "llamacpp-q8_0-mla", "llamacpp-q4_0-mla@sinks=4"}) EXPECT_EQ(Refusal(preset, latents), "no refusal");
}

// Few queries read latents as they are, many have them expanded: the same, of codes, too, and in every split of the tokens that
// ends where blocks do.
TEST(Latents, BothWaysOfAttentionReadTheSameCodes) {
  const c10::InferenceMode guard;
  const std::unique_ptr<Model> model = LoadModel(GoldenPath("models/deepseekv3-halves"), at::kFloat, kCpu);
  const at::Tensor ids = IdTensor(GoldenModels().at("deepseekv3-halves")["ids"].get<std::vector<int32_t>>(), 1, kCpu);
  const auto logits = [&](const std::string& spec, int64_t chunk, const char* backend) {
    KvCache cache(ParseSpec(spec), model->cache_shape(1), 64, at::kFloat, kCpu);
    return model->Logits(Feed(*model, ids, cache, FindBackend(backend), chunk));
  };
  const at::Tensor exact = logits("none", 40, "eager");
  for (const char* backend : {"eager", "sdpa"}) {
    const at::Tensor expanded = logits("int4-hqq@residual=20", 20, backend).narrow(1, 19, 1);
    EXPECT_GT(RelativeError(expanded, exact.narrow(1, 39, 1)), 1e-3) << "nothing is encoded at all";
    for (const int64_t chunk : {1, 4, 10}) {
      const at::Tensor absorbed = logits("int4-hqq@residual=20", chunk, backend);
      EXPECT_LT(RelativeError(absorbed.narrow(1, chunk - 1, 1), expanded), 1e-5) << backend << " " << chunk;
    }
  }
}

// ---- the command

class KvqbenchLatents : public TinyModel {
 protected:
  void SetUp() override {
    TinyModel::SetUp();
    for (const char* name : {"config.json", "model.safetensors"}) {
      std::filesystem::copy(StrCat(GoldenPath("models/deepseekv3-halves/"), name), dir_ / "tiny" / name,
                            std::filesystem::copy_options::overwrite_existing);
    }
  }
};

TEST_F(KvqbenchLatents, AreMeasuredAsOtherCachesAre) {
  const std::string file = (dir_ / "out.json").string();
  const Outcome outcome = Execute(Tiny() + " --schemes=none,int4-hqq@residual=16 --backends=sdpa --contexts=64 --windows=2 --runs=1 --max-runs=1 "
                                  "--decode-tokens=4 --dtype=float32 --kv-dtype=bfloat16 --benchmark_filter='^(kv_size|error|quantize|distribution|perplexity|"
                                  "sensitivity|drift|prefill|decode|memory)' --benchmark_out=" + file);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  std::ifstream in(file);
  std::map<std::string, nlohmann::json> runs;
  const nlohmann::json found = nlohmann::json::parse(in);
  for (const nlohmann::json& run : found["benchmarks"]) {
    const std::string name = run["name"];
    EXPECT_TRUE(!run.value("error_occurred", false) || name.find("/none/") != std::string::npos ||
                std::string(KVQ_BUILD_TYPE) != "Release") << name << ": " << run.value("error_message", "");
    runs[name] = run;
  }
  const auto run = [&](const std::string& measurement, const std::string& spec) {
    return runs.at(measurement + "/tiny/sdpa/" + spec + "/ctx:64/batch:1");
  };
  const std::string int4 = "int4-hqq@residual=16";
  // Three layers of 64 + 8 channels, of two bytes; 48 tokens in codes, 36 bytes a group of 64.
  EXPECT_EQ(run("kv_size", "none")["kv_bytes"], 3 * 64 * 72 * 2);
  EXPECT_EQ(run("kv_size", int4)["kv_bytes"], 3 * (48 * (36 + 16) + 16 * 144));
  EXPECT_EQ(run("kv_size", int4)["encoded_bits_per_element"], 4.5);
  EXPECT_GT(run("error", int4)["nmse_k"].get<double>(), 1e-3);
  EXPECT_EQ(run("error", int4)["nmse_v"], 0);
  EXPECT_GT(run("perplexity", int4)["kld_nats"].get<double>(), 1e-6);
  EXPECT_GT(run("sensitivity", int4)["attention_nmse_k_mean"].get<double>(), 1e-6);
  EXPECT_FALSE(run("sensitivity", int4).contains("kld_nats_v_mean")) << "rotary keys are not encoded";
}

TEST_F(KvqbenchLatents, RefuseAPolicyOfKeysAndValuesInOneLine) {
  ExpectRefused(Execute(Tiny() + " --schemes=int4-hqq@policy=hf --contexts=64 --dtype=float32"), {"policy hf", "latents"});
}

}  // namespace
}  // namespace kvq
