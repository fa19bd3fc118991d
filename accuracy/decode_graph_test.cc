// The graph of a decoding step, and what a CPU does instead, against Model::Forward.
#include "fixtures/decode_graph.h"

#include <ATen/ATen.h>

#include <cmath>

#include "accuracy/families.h"
#include "accuracy/golden.h"
#include "accuracy/relative_error.h"
#include "fixtures/machine/gpu_memory.h"
#include "fixtures/machine/out_of_memory.h"
#include "kernels/error.h"
#include "kernels/host/step.h"
#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

// A published family cut down to a few layers: what differs between families stays.
struct Cut {
  const char* shape;
  int64_t hidden, heads, kv_heads, head_dim, intermediate;
};

ModelConfig Config(const Cut& cut) {
  ModelConfig config = ParseModelConfig(FindPublishedShape(cut.shape)->config, cut.shape);
  config.hidden_size = cut.hidden, config.num_heads = cut.heads, config.vocab_size = 1000;
  config.layers.resize(3);
  for (LayerConfig& layer : config.layers) {
    layer.num_kv_heads = cut.kv_heads, layer.head_dim = cut.head_dim,
    layer.intermediate_size = cut.intermediate;
    layer.attention_scale = 1 / std::sqrt(static_cast<double>(cut.head_dim));
  }
  return config;
}

// Gemma 3 and 4, small: windows that hide most of what the tests feed, both kinds of layers; of Gemma 4 also
// layers that read another's keys and values, with MLPs twice as wide, and a cap that bends the logits.
ModelConfig Gemma3() {
  return ParseModelConfig(R"({
    "model_type": "gemma3_text", "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 24,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "vocab_size": 1000, "max_position_embeddings": 1024})",
                          "gemma3");
}
ModelConfig Gemma4() {
  return ParseModelConfig(R"({
    "model_type": "gemma4_text", "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
                    "full_attention"],
    "sliding_window": 24, "num_kv_shared_layers": 2, "use_double_wide_mlp": true,
    "hidden_size_per_layer_input": 64,
    "vocab_size": 1000, "vocab_size_per_layer_input": 1000, "final_logit_softcapping": 2.0,
    "max_position_embeddings": 1024})",
                          "gemma4");
}
// Gemma 2, small: caps that bend scores and logits.
ModelConfig Gemma2() {
  return ParseModelConfig(R"({
    "model_type": "gemma2", "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256, "query_pre_attn_scalar": 64,
    "sliding_window": 24, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
    "vocab_size": 1000, "max_position_embeddings": 1024})",
                          "gemma2");
}
// Three quarters of a head's channels turn, in products that end in the cache and, with a hidden size of their own, behind them.
ModelConfig Phi4() { return Config({"phi-4-mini", 512, 8, 2, 128, 1024}); }
ModelConfig OddPhi4() { return Config({"phi-4-mini", 264, 4, 2, 128, 520}); }
// Experts of sizes that have a kernel of their own, and in another layer one MLP.
ModelConfig Qwen3Moe() {
  return ParseModelConfig(R"({
    "model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_experts": 40, "num_experts_per_tok": 6,
    "norm_topk_prob": true, "mlp_only_layers": [1], "vocab_size": 1000, "max_position_embeddings": 1024})",
                          "qwen3_moe");
}
// The same, with biases, gates with a limit and, in attention, logits without a value.
ModelConfig GptOss() {
  return ParseModelConfig(R"({
    "model_type": "gpt_oss", "hidden_size": 512, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": 40, "num_experts_per_tok": 4, "sliding_window": 24,
    "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
      "original_max_position_embeddings": 128},
    "vocab_size": 1000, "max_position_embeddings": 1024})",
                          "gpt_oss");
}
ModelConfig Gpt2() { return Config({"gpt2", 512, 8, 8, 64, 1024}); }
ModelConfig WindowedMistral() {
  ModelConfig config = Config({"mistral-7b-v0.1", 512, 8, 2, 128, 1024});
  for (LayerConfig& layer : config.layers) layer.sliding_window = 24;
  return config;
}

// For a CPU, where no shape has a kernel of its own and products took most of these tests' time.
ModelConfig Narrow(ModelConfig config) {
  config.hidden_size = 128;
  for (LayerConfig& layer : config.layers) layer.intermediate_size /= 4;
  return config;
}

// Random weights, but norms that are not all alike and scalars that are not one: what is mixed up shows.
Model Varied(const ModelConfig& config, uint64_t seed, at::ScalarType type, at::Device device = at::kCUDA) {
  Model model(config, Weights::Random(seed, type, device));
  double turn = 0;
  const auto vary = [&](const NormWeights& norm) {
    if (!norm.weight.defined()) return;
    const at::Tensor at = at::arange(norm.weight.numel(), norm.weight.options());
    norm.weight.mul_((at + ++turn).cos() * 0.25 + 1);
  };
  for (size_t i = 0; i < model.layers().size(); ++i) {
    DecoderLayer& layer = const_cast<DecoderLayer&>(model.layers()[i]);
    vary(layer.q_norm), vary(layer.k_norm);
    vary(layer.input_norm), vary(layer.post_attention_norm), vary(layer.mlp_norm), vary(layer.post_mlp_norm);
    vary(layer.post_per_layer_norm);
    if (layer.sink_logits.defined()) layer.sink_logits.copy_(at::arange(config.num_heads, layer.sink_logits.options()).add(static_cast<double>(i)).cos() * 3);
    const LayerConfig& shape = config.layers[i];
    if (config.value_norm && shape.kv_layer == static_cast<int64_t>(i)) {  // values that their norm changes
      const int64_t values = shape.num_kv_heads * shape.head_dim;
      layer.qkv.weight.narrow(0, layer.qkv.weight.size(0) - values, values).mul_(2);
    }
    if (config.layer_scalar) layer.scalar = 0.875 - 0.125 * static_cast<double>(i % 3);
  }
  vary(model.norm()), vary(model.per_layer_norm());
  return model;
}

std::string RefusalOf(const Model& model, const std::string& spec) {
  KvCache cache = model.NewCache(ParseSpec(spec), 1, 64);
  try {
    DecodeGraph graph(model, cache);
  } catch (const InputError& error) {
    return error.what();
  }
  return "no refusal";
}

TEST(DecodeGraph, SaysWhatItRefuses) {
  const c10::InferenceMode guard;
  const auto golden = [](const char* name, const std::string& spec = "none",
                         at::ScalarType type = at::kHalf) {
    return RefusalOf(*LoadModel(GoldenPath(std::string("models/") + name), type, at::kCPU), spec);
  };
  const auto says = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  says(golden("gpt2-inverse"), "a head_dim that is no multiple of 4");
  const auto refused = [&](ModelConfig config, const auto& change) {
    change(config);
    return RefusalOf(Model(config, Weights::Random(1, at::kHalf, at::kCPU)), "none");
  };
  const ModelConfig llama = Config({"llama-3.1-8b", 64, 2, 1, 64, 64});
  says(refused(llama, [](ModelConfig& c) { c.hidden_size = 2052; }), "hidden size");
  says(refused(llama, [](ModelConfig& c) { c.layers[1].head_dim = 520; }), "a head_dim");
  says(refused(llama, [](ModelConfig& c) { c.ropes.resize(3); }), "more than two kinds of rotation");
  says(refused(llama, [](ModelConfig& c) { c.layer_scalar = true; }), "scalars of layers without norms");
  for (bool ModelConfig::*bias : {&ModelConfig::o_bias, &ModelConfig::mlp_bias}) {
    ModelConfig biased = llama;
    biased.*bias = true;
    says(refused(biased, [](ModelConfig& c) { c.residual_scale = 0.5; }), "a factor of what layers add to the state");
  }
  says(refused(Gemma3(), [](ModelConfig& c) { c.residual_scale = 0.5; }), "a factor of what layers add to the state");
  says(refused(Gemma4(), [](ModelConfig& c) { c.logit_divisor = 2; }), "a divisor of logits that are capped");
  says(refused(llama, [](ModelConfig& c) { c.names.input_norm.clear(); }), "without a norm before or behind it");
  says(refused(llama, [](ModelConfig& c) { c.names.mlp_norm.clear(); }), "without a norm before or behind it");
  const auto across = [](ModelConfig& c) { c.norm_across_heads = true, c.names.q_norm = c.names.k_norm = "n"; };
  says(refused(llama, [&](ModelConfig& c) { across(c), c.qkv_bias = true; }), "biases under a norm over all heads");
  says(refused(llama, [&](ModelConfig& c) {
         across(c);
         for (LayerConfig& layer : c.layers) layer.head_dim = 12, layer.num_kv_heads = 1;
       }), "a norm over all heads with channels");
  says(refused(llama, [](ModelConfig& c) { c.ropes[0] = {.rotated_share = 0.1}; }), "heads of which channels turn whose number");
  const auto mix = [](ModelConfig& c, int64_t experts, int64_t per_token) {
    c.layers[2].experts = experts, c.layers[2].experts_per_token = per_token, c.layers[2].intermediate_size = 8;
  };
  says(refused(llama, [&](ModelConfig& c) { mix(c, 513, 1); }), "more than 512 experts");
  says(refused(llama, [&](ModelConfig& c) { mix(c, 20, 17); }), "16 a token");
  says(refused(llama, [&](ModelConfig& c) { mix(c, 4, 2), c.residual_scale = 0.5; }), "experts beside");
  says(refused(Gemma3(), [](ModelConfig& c) { c.names.post_mlp_norm.clear(); }), "MLP alone");
  says(refused(Gemma3(), [](ModelConfig& c) { c.norm = NormKind::kLayerNorm; }), "LayerNorm behind attention");
  says(refused(Gemma4(), [](ModelConfig& c) { c.per_layer_input_size = 520; }), "more than 512 elements");
  says(refused(Gemma4(), [](ModelConfig& c) { c.per_layer_vocab_size = 999; }), "no inputs of layers");
  const Model model(Config({"mistral-7b", 128, 4, 2, 64, 128}),
                    Weights::Random(1, at::kHalf, at::kCPU));
  says(RefusalOf(model, "int4-hqq@policy=hf"), "policy hf");
}

// What a CPU does instead of a graph, of every tiny model: transformers' own tokens, or a refusal, as accuracy/families/ says.
TEST(DecodeGraph, RunsOrRefusesEveryFamily) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  std::map<std::string, int> runs;
  for (const Family& family : Families()) {
    for (const auto& [name, golden] : family.golden["cases"].items()) {
      SCOPED_TRACE(name);
      const nlohmann::json& says = family.says["cases"][name];
      const std::string expected = family.says["cases"][says.value("wraps", name)]["graph"];
      const std::unique_ptr<Model> model = LoadModel(GoldenPath("models/" + name), at::kFloat, at::kCPU);
      const std::string refusal = RefusalOf(*model, "none");
      if (!expected.empty()) {
        EXPECT_NE(refusal.find(expected), std::string::npos) << refusal;
        continue;
      }
      ASSERT_EQ(refusal, "no refusal");
      KvCache cache = model->NewCache(ParseSpec("none"), 1, 128);
      DecodeGraph graph(*model, cache);
      const at::Tensor hidden = Feed(*model, IdTensor(golden["ids"], 1, at::kCPU), cache, FindBackend("sdpa"), 40);
      const std::vector<int64_t> greedy = golden["greedy"];
      const at::Tensor first = model->Logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1);
      const at::Tensor picked = graph.Run(first, static_cast<int64_t>(greedy.size()) - 1);
      EXPECT_TRUE(at::cat({first, picked}, 1).equal(at::tensor(greedy, at::kLong).unsqueeze(0)));
      ++runs[family.name];
    }
  }
  EXPECT_GE(runs.size(), 5u) << "nearly all were refused";
}

TEST(DecodeGraphGpu, SaysWhichPoliciesItRefuses) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  const Model model(Config({"mistral-7b", 128, 4, 2, 64, 128}), Weights::Random(1, at::kHalf, at::kCUDA));
  for (const auto& [spec, why] : {std::pair("int4-hqq@policy=kivi", "where their scheme is a plain one"),
                                  std::pair("kivi-2@policy=kivi@rotate=hadamard", "what a plain scheme encodes as it comes"),
                                  std::pair("q4_0@residual=128+0@rotate=hadamard", "what a plain scheme encodes as it comes"),
                                  std::pair("exl3-4@residual=128+0", "as many keys are encoded as values"),
                                  std::pair("turboquant-k4+q4_0@residual=128+0", "as many keys are encoded as values"),
                                  std::pair("int4-hqq@rotate=hadamard", "what a plain scheme encodes as it comes"),
                                  std::pair("q4_0@rotate=hadamard", "what a plain scheme encodes as it comes"),
                                  std::pair("q4_0@residual=0@rotate=hadamard@sinks=4", "no sinks"),
                                  std::pair("exl3-4", "residual=0 and no sinks"),
                                  std::pair("exl3-4@residual=0@rotate=signs", "turn a token once"),
                                  std::pair("turboquant-v4+turboquant-k4@residual=0", "no fused attention"),
                                  std::pair("kvarn-4", "no fused attention")}) {
    EXPECT_NE(RefusalOf(model, spec).find(why), std::string::npos) << RefusalOf(model, spec);
  }
  EXPECT_EQ(RefusalOf(model, "int4-hqq@residual=0"), "no refusal");
}

TEST(DecodeGraph, RefusesAWindowOfWhichItWouldReadBlocks) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  const Model model(WindowedMistral(), Weights::Random(1, at::kFloat, at::kCPU));
  for (const char* spec : {"int4-hqq@residual=32", "int4-hqq@residual=32+0", "none+int4-hqq@residual=32", "int8-hqq@residual=0@sinks=4", "int4-hqq@policy=kivi@residual=8"}) {
    EXPECT_EQ(RefusalOf(model, spec), "no refusal");
    EXPECT_NE(RefusalOf(model, StrCat(spec, "@window-cache=window")).find("stored one by one, residual=0 and no sinks"), std::string::npos) << spec;
  }
  for (const char* spec : {"none", "int8-hqq@residual=0", "int4-hqq@residual=32@layers=0-2:none"}) {
    EXPECT_EQ(RefusalOf(model, StrCat(spec, "@window-cache=window")), "no refusal");
  }
}

struct Case {
  ModelConfig config;
  std::string spec;
  int64_t batch;
  at::ScalarType type;
  std::optional<at::ScalarType> kv_type = {};  // of the cache, where it is another

  std::string text() const {
    return StrCat(config.model_type, " ", config.hidden_size, " ", spec, " batch ", batch, " ", type, " in ", kv_type.value_or(type));
  }
};

std::vector<Case> Cases() {
  const ModelConfig mistral = Config({"mistral-7b", 512, 8, 2, 128, 1024});
  const ModelConfig qwen2 = Config({"qwen2-7b", 448, 7, 1, 64, 640});
  const ModelConfig qwen3 = Config({"qwen3-8b", 256, 4, 1, 128, 320});
  const ModelConfig llama = Config({"llama-3.1-8b", 256, 4, 4, 64, 512});
  const ModelConfig odd = Config({"llama-3.1-8b", 264, 4, 2, 64, 520});  // no own product: hidden is no multiple of 64
  std::vector<Case> cases;
  for (const char* spec : {"none", "int8-hqq@residual=32", "int4-hqq@residual=32@sinks=4",
                           "int2-hqq@residual=32", "int4-hqq@residual=32@layers=0-0:none", "int8-hqq@residual=0",
                           "int8-hqq+none@residual=0@sinks=4@dense=1+0"}) {
    cases.push_back({mistral, spec, 1, at::kHalf});
    cases.push_back({qwen2, spec, 2, at::kBFloat16});
    cases.push_back({qwen3, spec, 3, at::kHalf});
    cases.push_back({llama, spec, 8, at::kHalf});
    cases.push_back({odd, spec, 2, at::kHalf});
    cases.push_back({mistral, spec, 9, at::kBFloat16});  // more than own products take
  }
  for (const char* spec : {"llamacpp-q4_0", "llamacpp-q8_0-q4_0", "llamacpp-iq4_nl-unrotated", "vllm-int4-per-token-head", "vllm-fp8",
                           "vllm-nvfp4", "turboquant-k4+turboquant-v4@residual=0@prefill=raw",
                           "fp8-e4m3+turboquant-v4@residual=0@dense=1+0", "turboquant-k3+turboquant-v3@residual=32",
                           "none+q5_1@residual=0@rotate=hadamard", "q4_0@residual=32@sinks=4", "mlx-4@residual=0@sinks=4",
                           "exl3-4@residual=0", "int2-hadamard@residual=0", "int8-hqq+q4_0@residual=0", "int8-hqq+q4_0@residual=0@rotate=none+hadamard"}) {
    cases.push_back({mistral, spec, 1, at::kHalf});
    cases.push_back({qwen2, spec, 3, at::kBFloat16});
  }
  for (const char* spec : {"llamacpp-q8_0", "vllm-int8-per-token-head"}) {
    cases.push_back({Gemma3(), spec, 2, at::kHalf});
  }
  for (const char* spec : {"q8_0@residual=0", "vllm-int8-per-token-head"}) {  // a head_dim of 512, too, which is not turned
    cases.push_back({Gemma4(), spec, 2, at::kBFloat16});
  }
  for (const ModelConfig& config : {Gemma2(), Gemma3(), Gemma4(), Gpt2(), WindowedMistral(), Phi4(), OddPhi4(), Qwen3Moe(),
                                   GptOss()}) {
    for (const char* spec : {"none", "int4-hqq@residual=32", "int8-hqq+int4-hqq@residual=32"}) {
      cases.push_back({config, spec, 1, at::kHalf});
      cases.push_back({config, spec, 3, at::kBFloat16});
    }
    cases.push_back({config, "int4-hqq@residual=32@sinks=4", 9, at::kHalf});
  }
  return cases;
}

at::Tensor Prompt(int64_t batch, int64_t n, at::Device device = at::kCUDA) {
  return at::remainder(at::arange(batch * n, at::kLong) * 7919 + 13, 1000).view({batch, n}).to(device);
}

// On a CPU there is one code for all shapes and types, and float16 takes libtorch long.
std::vector<Case> HostCases() {
  std::vector<Case> cases;
  const std::vector<ModelConfig> configs = {Config({"qwen2-7b", 192, 3, 1, 64, 200}), Config({"qwen3-8b", 136, 4, 1, 128, 96}),
                                            Narrow(Gemma2()), Narrow(Gemma3()), Narrow(Gemma4()), Config({"gpt2", 128, 2, 2, 64, 256}),
                                            Narrow(WindowedMistral()), OddPhi4(), Narrow(Qwen3Moe()), Narrow(GptOss())};
  for (const ModelConfig& config : configs) {
    cases.push_back({config, "none", 3, at::kFloat});
    cases.push_back({config, "int4-hqq@residual=32@sinks=4", 2, at::kBFloat16});
  }
  const ModelConfig mistral = Config({"mistral-7b", 128, 4, 2, 128, 96});
  for (const char* spec : {"int8-hqq", "int2-hqq", "int4-quanto", "int2-quanto", "none+int4-hqq", "int8-hqq+none",
                           "int4-hqq+int2-quanto", "int4-hqq@group=32", "int4-hqq@layers=0-0:none", "int4-hqq-kivi",
                           "int2-hqq-kivi+int4-hqq", "int8-hqq+int4-hqq-kivi", "none+int4-hqq-kivi"}) {
    cases.push_back({mistral, std::string(spec) + "@residual=32", 1, at::kFloat});
  }
  cases.push_back({mistral, "none", 1, at::kHalf});
  for (const char* spec : {"none", "int4-hqq@residual=32@sinks=4", "int8-hqq+none@residual=32"}) {
    cases.push_back({mistral, spec, 2, at::kFloat, at::kBFloat16});
    cases.push_back({mistral, spec, 2, at::kBFloat16, at::kHalf});
  }
  return cases;
}

// The tiny models that a graph does not refuse, on other weights and in 16 bits.
std::vector<Case> FamilyCases(at::ScalarType type) {
  std::vector<Case> cases;
  for (const Family& family : Families()) {
    for (const auto& [name, says] : family.says["cases"].items()) {
      if (!says.contains("graph") || says["graph"] != "") continue;
      const ModelConfig config = LoadModelConfig(GoldenPath("models/" + name));
      cases.push_back({config, "none", 1, type});
      cases.push_back({config, "none", 3, type});
    }
  }
  return cases;
}

// What a CPU's graph knows beside one residual for both sides.
std::vector<Case> PolicyCases() {
  const ModelConfig mistral = Config({"mistral-7b", 128, 4, 2, 128, 96}), qwen2 = Config({"qwen2-7b", 192, 3, 1, 64, 200});
  std::vector<Case> cases;
  for (const char* spec : {"int8-hqq@residual=0", "int8-hqq@residual=0@sinks=4", "none+int8-hqq@residual=0", "int8-hqq@residual=0@dense=1",
                           "int4-hqq+int8-hqq@residual=32+0", "int8-hqq+int4-hqq@residual=0+32@sinks=4", "int4-hqq@residual=32+16@sinks=3",
                           "int4-hqq+none@residual=32+0", "int4-hqq@policy=kivi@residual=32", "int4-hqq+int2-quanto@policy=kivi@residual=32+16",
                           "none+int4-hqq@policy=kivi@residual=32", "int4-hqq@residual=32@rotate=hadamard",
                           "int4-hqq@residual=32@sinks=4@rotate=hadamard+hadamard:64", "int2-hqq@residual=32@rotate=signs",
                           "int8-hqq+none@residual=32@rotate=hadamard", "none+int4-hqq@residual=32@rotate=none+signs:32",
                           "int4-hqq@policy=kivi@residual=32@rotate=hadamard+signs", "int4-hqq@residual=32@prefill=raw"}) {
    cases.push_back({mistral, spec, 1, at::kFloat});
    cases.push_back({qwen2, spec, 2, at::kFloat});
  }
  const ModelConfig gemma3 = Narrow(Gemma3()), gemma4 = Narrow(Gemma4()), windowed = Narrow(WindowedMistral());
  cases.push_back({windowed, "int4-hqq@policy=kivi@residual=32@rotate=hadamard", 2, at::kFloat});
  cases.push_back({gemma4, "int4-hqq@policy=kivi@residual=32", 2, at::kFloat});
  cases.push_back({gemma4, "int8-hqq@residual=0", 2, at::kFloat});
  cases.push_back({mistral, "int4-hqq@policy=kivi@residual=32", 2, at::kFloat, at::kBFloat16});
  for (const char* spec : {"none", "int8-hqq@residual=0", "none+q8_0@residual=0", "q8_0+none@residual=0@rotate=hadamard", "q4_0+int8-hqq@residual=0@dense=1+0"}) {
    for (const ModelConfig& config : {gemma3, gemma4, windowed}) {
      cases.push_back({config, StrCat(spec, "@window-cache=window"), 2, at::kFloat, at::kBFloat16});
    }
  }
  return cases;
}

// What a GPU's does of that.
std::vector<Case> PolicyCasesOnAGpu() {
  const ModelConfig mistral = Config({"mistral-7b", 512, 8, 2, 128, 1024}), qwen2 = Config({"qwen2-7b", 448, 7, 1, 64, 640});
  std::vector<Case> cases;
  for (const char* spec : {"kivi-2@policy=kivi@residual=32", "kivi-4@policy=kivi@residual=64+32", "kivi-2@residual=32",
                           "none+q4_0@policy=kivi@residual=32", "kivi-4+none@policy=kivi@residual=32", "kivi-4+q8_0@residual=32+0@sinks=4",
                           "int4-hqq@residual=32+16@sinks=3", "q8_0+int8-hqq@residual=0+32", "q8_0+int8-hqq@residual=16+32@dense=1+0", "q8_0+none@residual=0+32",
                           "none+int8-hqq@residual=32+0"}) {
    cases.push_back({mistral, spec, 1, at::kHalf});
    cases.push_back({qwen2, spec, 3, at::kBFloat16});
  }
  cases.push_back({WindowedMistral(), "kivi-2@policy=kivi@residual=32", 2, at::kHalf});
  for (const char* spec : {"none", "q8_0@residual=0", "none+q8_0@residual=0", "q8_0+none@residual=0@dense=1+0"}) {
    for (const ModelConfig& config : {Gemma3(), Gemma4(), WindowedMistral()}) {
      cases.push_back({config, StrCat(spec, "@window-cache=window"), 2, at::kHalf});
    }
  }
  cases.push_back({WindowedMistral(), "llamacpp-q4_0@window-cache=window", 1, at::kBFloat16});
  return cases;
}

// After the same prefill, so from the same bits, one step and then one eager step on what it left.
// A step that closes a block reads codes that came from the same bits, too.
void ExpectStepsEqualForward(const std::vector<Case>& cases, const std::vector<int64_t>& lengths, at::Device device) {
  const c10::InferenceMode guard;
  const Backend& backend = FindBackend("sdpa");
  for (const Case& c : cases) {
    const Model model = Varied(c.config, 7, c.type, device);
    KvCache plain(ParseSpec(c.spec), model.cache_shape(c.batch), 200, c.kv_type.value_or(c.type), device, c.type);
    KvCache cache(ParseSpec(c.spec), model.cache_shape(c.batch), 200, c.kv_type.value_or(c.type), device, c.type);
    DecodeGraph graph(model, cache);
    const double tolerance = GraphTolerance(c.config, c.type, cache);
    for (const int64_t length : lengths) {
      SCOPED_TRACE(StrCat(c.text(), " after ", length, ": ", graph.kernels()));
      plain.Clear(), cache.Clear();
      const at::Tensor prompt = Prompt(c.batch, length, device).remainder(c.config.vocab_size);
      Feed(model, prompt, plain, backend, 64), Feed(model, prompt, cache, backend, 64);
      const at::Tensor first = Prompt(c.batch, 1, device).remainder(c.config.vocab_size);
      const at::Tensor token = graph.Run(first, 1);
      const at::Tensor logits = model.Logits(model.Forward(first, plain, backend, {}, {}, {}, graph.routing())).select(1, 0);
      EXPECT_LT(RelativeError(graph.logits(), logits), tolerance);
      EXPECT_TRUE(token.equal(graph.logits().argmax(-1, /*keepdim=*/true)));
      EXPECT_EQ(cache.length(), length + 1);
      // The second goes where the first did: a router that a rounding tips is no error.
      std::vector<at::Tensor> ways;
      const Routing leads = [&](int64_t layer, const at::Tensor& shares) {
        ways.push_back(std::get<1>(shares.topk(c.config.layers[static_cast<size_t>(layer)].experts_per_token, -1)));
        return ways.back();
      };
      size_t way = 0;
      const Routing follows = [&](int64_t, const at::Tensor&) { return ways[way++]; };
      const at::Tensor after = model.Logits(model.Forward(token, plain, backend, {}, {}, {}, leads));
      EXPECT_LT(RelativeError(model.Logits(model.Forward(token, cache, backend, {}, {}, {}, follows)), after), tolerance);
    }
  }
}

TEST(DecodeGraphGpu, StepsEqualForward) {
  KVQ_NEEDS_CUDA();
  ExpectStepsEqualForward(Cases(), {1, 3, 4, 5, 32, 33, 36, 37, 100, 164}, at::kCUDA);
}
TEST(DecodeGraphGpu, StepsEqualForwardUnderEveryPolicy) {
  KVQ_NEEDS_CUDA();
  ExpectStepsEqualForward(PolicyCasesOnAGpu(), {1, 15, 31, 32, 33, 36, 64, 70}, at::kCUDA);
}
TEST(DecodeGraphGpu, NewestTokens) {  // under memcheck
  KVQ_NEEDS_CUDA();
  std::vector<Case> cases;
  for (const char* spec : {"llamacpp-q8_0-q4_0", "vllm-int4-per-token-head", "turboquant-k3+turboquant-v4@residual=0",
                           "none+q5_1@residual=0@rotate=hadamard", "kivi-2@policy=kivi@residual=32"}) {
    cases.push_back({Config({"mistral-7b", 128, 4, 2, 64, 128}), spec, 2, at::kHalf});
  }
  ExpectStepsEqualForward(cases, {1, 33}, at::kCUDA);
}
TEST(DecodeGraphGpu, StepsOfEveryFamilyEqualForward) {
  KVQ_NEEDS_CUDA();
  ExpectStepsEqualForward(FamilyCases(at::kHalf), {1, 36, 70}, at::kCUDA);
}
TEST(DecodeGraph, StepsOfEveryFamilyOnACpuEqualForward) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  ExpectStepsEqualForward(FamilyCases(at::kBFloat16), {1, 36, 70}, at::kCPU);
}
TEST(DecodeGraph, StepsOnACpuEqualForward) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  ExpectStepsEqualForward(HostCases(), {1, 36, 70}, at::kCPU);
}

TEST(DecodeGraph, StepsOnACpuEqualForwardUnderEveryPolicy) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  ExpectStepsEqualForward(PolicyCases(), {1, 15, 31, 32, 33, 64, 70}, at::kCPU);
}

void ExpectRunsOn(const std::vector<Case>& cases, at::Device device) {
  const c10::InferenceMode guard;
  for (const Case& c : cases) {
    SCOPED_TRACE(c.text());
    const Spec spec = ParseSpec(c.spec);
    const Model model = Varied(c.config, 7, c.type, device);
    KvCache cache(spec, model.cache_shape(c.batch), 200, c.kv_type.value_or(c.type), device, c.type);
    DecodeGraph graph(model, cache);
    const auto prefill = [&] {
      cache.Clear();
      Feed(model, Prompt(c.batch, 40, device), cache, FindBackend("sdpa"), 40);
    };
    prefill();
    const at::Tensor at_once = graph.Run(Prompt(c.batch, 1, device), 100);
    prefill();
    at::Tensor token = Prompt(c.batch, 1, device);
    const int64_t last = static_cast<int64_t>(cache.shape().layers.size()) - 1;
    const KvShape shape = cache.shape().layers.back();
    for (int64_t i = 0; i < 100; ++i) {
      const int64_t before = EncodedTokens(spec, cache.length());
      const SideStorage keys = cache.storage(last).first;
      const at::Tensor residual = keys.residual.defined() ? keys.residual.clone() : at::Tensor();
      token = graph.Run(token, 1);
      ASSERT_TRUE(token.equal(at_once.narrow(1, i, 1))) << "step " << i;
      if (keys.encoded == nullptr || EncodedTokens(spec, cache.length()) == before || spec.keys.residual_length == 0) continue;
      EncodedTensors fresh =
          AllocateEncoded(*keys.codec, keys.params, c.batch, shape.kv_heads, shape.head_dim,
                          keys.encoded->tokens, keys.encoded->block_tokens, device);
      EncodeTensor(*keys.codec, keys.params, residual, before, fresh);
      for (size_t plane = 0; plane < fresh.planes.size(); ++plane) {
        const int64_t bytes = fresh.planes[plane].size(1) / keys.encoded->tokens;  // a token
        const auto block = [&](const at::Tensor& x) {
          return x.narrow(1, before * bytes, spec.keys.residual_length * bytes);
        };
        EXPECT_TRUE(block(fresh.planes[plane]).equal(block(keys.encoded->planes[plane])))
            << "step " << i;
      }
    }
    EXPECT_EQ(cache.length(), 140);
  }
}

TEST(DecodeGraphGpu, RunsOnAndEncodesFullBlocks) {
  KVQ_NEEDS_CUDA();
  ExpectRunsOn(Cases(), at::kCUDA);
}
TEST(DecodeGraph, RunsOnOnACpuAndEncodesFullBlocks) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  ExpectRunsOn(HostCases(), at::kCPU);
}

// A run of many steps leaves the cache as runs of one step each do: tokens, lengths, and what the policy encodes between.
// And step by step the unfused path reads the same from it: its logits stand beside the graph's, on the cache the graph
// left.
void ExpectRunsOnUnderPolicies(const std::vector<Case>& cases, at::Device device) {
  const c10::InferenceMode guard;
  for (const Case& c : cases) {
    SCOPED_TRACE(c.text());
    const Spec spec = ParseSpec(c.spec);
    const Model model = Varied(c.config, 7, c.type, device);
    KvCache cache(spec, model.cache_shape(c.batch), 200, c.kv_type.value_or(c.type), device, c.type);
    DecodeGraph graph(model, cache);
    const auto prefill = [&] {
      cache.Clear();
      Feed(model, Prompt(c.batch, 40, device), cache, FindBackend("sdpa"), 40);
    };
    prefill();
    const at::Tensor at_once = graph.Run(Prompt(c.batch, 1, device), 70);
    EXPECT_EQ(cache.length(), 110);
    prefill();
    at::Tensor token = Prompt(c.batch, 1, device);
    const double tolerance = GraphTolerance(c.config, c.type, cache);
    for (int64_t i = 0; i < 70; ++i) {
      const std::function<void()> back = cache.Save();
      const at::Tensor expected = model.Logits(model.Forward(token, cache, FindBackend("sdpa"))).select(1, 0);
      back();
      token = graph.Run(token, 1);
      ASSERT_LT(RelativeError(graph.logits(), expected), tolerance) << "step " << i;
      ASSERT_TRUE(token.equal(at_once.narrow(1, i, 1))) << "step " << i;
    }
  }
}
TEST(DecodeGraph, RunsOnOnACpuUnderEveryPolicy) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  ExpectRunsOnUnderPolicies(PolicyCases(), at::kCPU);
}
TEST(DecodeGraphGpu, RunsOnUnderEveryPolicy) {
  KVQ_NEEDS_CUDA();
  ExpectRunsOnUnderPolicies(PolicyCasesOnAGpu(), at::kCUDA);
}

// What a flush uses while it encodes must be its own for as long as it is replayed. Whoever fills all the memory that
// the allocator has free, on every stream on which the flush runs, finds his own bytes afterwards; and the codes are
// right.
TEST(DecodeGraphGpu, NobodyElseHasTheScratchOfAFlush) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  const at::Device cuda(at::kCUDA, 0);
  const Spec spec = ParseSpec("int4-hqq@residual=32");
  const Model model(Config({"mistral-7b", 512, 8, 2, 128, 1024}), Weights::Random(7, at::kHalf, cuda));
  KvCache cache(spec, model.cache_shape(2), 200, at::kHalf, cuda);
  DecodeGraph graph(model, cache);
  const auto prefill = [&] {
    cache.Clear();
    Feed(model, Prompt(2, 40), cache, FindBackend("sdpa"), 40);
  };
  prefill();
  const at::Tensor alone = graph.Run(Prompt(2, 1), 100);
  std::vector<at::Tensor> others;
  const auto fill = [&] {
    for (const int64_t kib : {16, 128, 2048, 24576}) {
      for (int i = 0; i < 16; ++i) {
        others.push_back(at::full({kib << 10}, 0x5A, at::TensorOptions(at::kByte).device(cuda)));
      }
    }
  };
  fill();
  Fork fork(cuda, Fork::kMostStreams);
  for (int i = 0; i < Fork::kMostStreams; ++i) fork.Run(i, fill);
  fork.Join();
  {
    const c10::StreamGuard on_graph(GraphStream(cuda));
    fill();
  }
  Synchronize(cuda);
  prefill();
  EXPECT_TRUE(graph.Run(Prompt(2, 1), 100).equal(alone));
  for (const at::Tensor& other : others) {
    ASSERT_TRUE(other.eq(0x5A).all().item<bool>()) << other.numel() << " bytes were overwritten";
  }
}

// Wherever memory runs out while a graph is made, whoever asks next finds all of it, no error of before, and a stream
// that captures nothing.
TEST(DecodeGraphGpu, RunsOutOfMemoryWithoutATrace) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  const at::Device cuda(at::kCUDA, 0);
  // Products by cuBLAS, too, and flushes of some MB: memory is asked for at many places.
  const Spec spec = ParseSpec("int4-hqq@residual=32");
  const Model model(Config({"llama-3.1-8b", 264, 4, 2, 64, 520}), Weights::Random(7, at::kHalf, cuda));
  KvCache cache(spec, model.cache_shape(64), 200, at::kHalf, cuda);
  GiveBackMemory(cuda);
  const int64_t before = ReadGpuMemory(cuda).allocated;
  ResetGpuPeaks(cuda);
  const int64_t reserved = ReadGpuMemory(cuda).peak_reserved;  // at the moment
  struct NoLimit {
    at::Device device;
    ~NoLimit() { LimitGpuMemory(device, INT64_MAX); }
  } no_limit{cuda};
  int failures = 0;
  for (int64_t more = 0;; more += int64_t{2} << 20) {
    ASSERT_LT(more, int64_t{1} << 30);
    LimitGpuMemory(cuda, reserved + more);
    bool made = false;
    try {
      DecodeGraph graph(model, cache);
      made = true;
    } catch (const std::exception& error) {
      ASSERT_TRUE(IsOutOfMemory(error)) << error.what() << ", with " << (more >> 20) << " MiB";
      ++failures;
    }
    GiveBackMemory(cuda);
    ASSERT_EQ(ReadGpuMemory(cuda).allocated, before) << "with " << (more >> 20) << " MiB";
    if (made) break;
  }
  EXPECT_GE(failures, 3);
  LimitGpuMemory(cuda, INT64_MAX);
  DecodeGraph graph(model, cache);
  Feed(model, Prompt(64, 40), cache, FindBackend("sdpa"), 40);
  const at::Tensor tokens = graph.Run(Prompt(64, 1), 40);
  EXPECT_TRUE(tokens.narrow(1, 39, 1).equal(graph.logits().argmax(-1, /*keepdim=*/true)));
}

// Real families from disk; token by token where the two largest logits are further apart than the
// paths can differ.
TEST(DecodeGraphGpu, GreedyTokensEqualForwards) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  const Backend& backend = FindBackend("sdpa");
  const auto compare = [&](const Model& model) {
    KvCache plain(ParseSpec("none"), model.cache_shape(1), 64, model.dtype(), at::kCUDA);
    KvCache cache(ParseSpec("none"), model.cache_shape(1), 64, model.dtype(), at::kCUDA);
    DecodeGraph graph(model, cache);
    const at::Tensor prompt = Prompt(1, 20).remainder(model.config().vocab_size);
    Feed(model, prompt, plain, backend, 20), Feed(model, prompt, cache, backend, 20);
    at::Tensor token = prompt.narrow(1, 0, 1).contiguous();
    for (int i = 0; i < 40; ++i) {
      const at::Tensor logits = model.Logits(model.Forward(token, plain, backend)).select(1, 0);
      const at::Tensor ours = graph.Run(token, 1);
      // A single logit's error is near the norm's error over the number of logits; six times that
      // is never met.
      const double error = 6 *
                           GraphTolerance(model.config(), model.dtype(), cache) *
                           logits.norm().item<double>() /
                           std::sqrt(static_cast<double>(logits.numel()));
      const at::Tensor top = std::get<0>(logits.topk(2)).flatten();
      token = logits.argmax(-1, /*keepdim=*/true);
      if ((top[0] - top[1]).item<double>() > 2 * error) {
        EXPECT_TRUE(ours.equal(token)) << "step " << i;
      }
    }
  };
  compare(*LoadModel(GoldenPath("models/qwen3-bias"), at::kHalf, at::kCUDA));
  compare(Model(Config({"mistral-7b", 512, 8, 2, 128, 1024}),
                Weights::Random(3, at::kHalf, at::kCUDA)));
  for (const ModelConfig& config : {Gemma2(), Gemma3(), Gemma4(), Gpt2(), WindowedMistral(), Phi4()}) {
    compare(Varied(config, 3, at::kHalf));
  }
}

// A model with learned positions ends where Forward would: there is none for the token behind the last.
TEST(DecodeGraphGpu, EndsWithTheLearnedPositions) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  ModelConfig config = Gpt2();
  config.max_position_embeddings = 24;
  const Model model(config, Weights::Random(3, at::kHalf, at::kCUDA));
  KvCache cache(ParseSpec("none"), model.cache_shape(1), 64, at::kHalf, at::kCUDA);
  DecodeGraph graph(model, cache);
  Feed(model, Prompt(1, 20), cache, FindBackend("sdpa"), 20);
  EXPECT_THROW(graph.Run(Prompt(1, 1), 5), c10::Error);
  EXPECT_EQ(cache.length(), 20);
  graph.Run(Prompt(1, 1), 4);
  EXPECT_EQ(cache.length(), 24);
}

}  // namespace
}  // namespace kvq
