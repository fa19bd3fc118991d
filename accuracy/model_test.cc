// The runtime against transformers: tiny random models, and SmolLM2 where it was fetched.
#include <ATen/ATen.h>

#include <filesystem>
#include <map>
#include <set>

#include "accuracy/families.h"
#include "accuracy/golden.h"
#include "accuracy/relative_error.h"
#include "fixtures/dataset.h"
#include "fixtures/model.h"
#include "fixtures/tokenizer/tokenizer.h"
#include "kernels/error.h"

namespace kvq {
namespace {

std::unique_ptr<Model> Tiny(const std::string& name, at::Device device = kCpu, at::ScalarType type = at::kFloat) {
  return LoadModel(GoldenPath("models/" + name), type, device);
}

KvCache Cache(const Model& model, int64_t batch = 1, const std::string& spec = "none") {
  return KvCache(ParseSpec(spec), model.cache_shape(batch), 128, model.dtype(), model.device());
}

// What accuracy/families/ says of the family of a tiny model.
const nlohmann::json& SaysOf(const std::string& name) {
  for (const Family& family : Families()) {
    if (family.says["cases"].contains(name)) return family.says;
  }
  throw std::logic_error("no tiny model is called " + name);
}

// Which experts the tokens [at, at + n) of a run go through.
using RoutingOf = std::function<Routing(int64_t at, int64_t n)>;

// Logits of all positions, fed in calls of `chunk` tokens.
at::Tensor AllLogits(const Model& model, const at::Tensor& ids, const std::string& backend, int64_t chunk, const RoutingOf& routing = {}) {
  KvCache cache = Cache(model, ids.size(0));
  std::vector<at::Tensor> parts;
  for (int64_t at = 0; at < ids.size(1); at += chunk) {
    const int64_t n = std::min(chunk, ids.size(1) - at);
    parts.push_back(model.Logits(model.Forward(ids.narrow(1, at, n), cache, FindBackend(backend), {}, {}, {}, routing ? routing(at, n) : Routing())));
  }
  return at::cat(parts, 1).cpu();
}

// The experts of a run over `tokens` tokens of a batch, where the largest shares are all that chooses them, and others that follow.
struct Experts {
  const ModelConfig& config;
  int64_t batch, tokens;
  std::map<int64_t, at::Tensor> chosen = {};  // of each layer, [batch, tokens, experts_per_token]

  static bool AreChosenByShares(const ModelConfig& config) {
    const auto mixes = [](const LayerConfig& layer) { return layer.experts > 0; };
    return config.names.router_bias.empty() && config.expert_groups == 0 && std::any_of(config.layers.begin(), config.layers.end(), mixes);
  }
  RoutingOf Leads() {
    return [this](int64_t, int64_t) -> Routing {
      return [this](int64_t layer, const at::Tensor& shares) {
        const at::Tensor those = std::get<1>(shares.topk(config.layers[static_cast<size_t>(layer)].experts_per_token, -1));
        chosen[layer] = those.view({batch, tokens, -1}).cpu();
        return those;
      };
    };
  }
  RoutingOf Follows() const {
    return [this](int64_t at, int64_t n) -> Routing {
      return [this, at, n](int64_t layer, const at::Tensor& shares) {
        return chosen.at(layer).narrow(1, at, n).reshape({batch * n, -1}).contiguous().to(shares.device());
      };
    };
  }
};

// Every architecture, in several shapes each, by backend.
class ArchitectureParity : public testing::TestWithParam<std::tuple<std::string, const char*>> {};

// Whole, in chunks, and token by token. float32 sums of some hundred terms differ by about 1e-6; two to six
// layers in a row were seen to stay below 4e-6.
TEST_P(ArchitectureParity, LogitsCachesAndGreedyTokensEqualTransformers) {
  const c10::InferenceMode guard;
  const auto [name, backend] = GetParam();
  const std::unique_ptr<Model> model = Tiny(name);
  const nlohmann::json& golden = GoldenModels().at(name);
  const std::vector<int32_t> ids = golden["ids"];
  for (const int64_t chunk : {40, 13, 8, 1}) {
    const at::Tensor logits = AllLogits(*model, IdTensor(ids, 1, kCpu), backend, chunk);
    for (size_t i = 0; i < golden["positions"].size(); ++i) {
      const at::Tensor theirs = at::tensor(golden["logits"][i].get<std::vector<float>>());
      const at::Tensor ours = logits[0][golden["positions"][i].get<int64_t>()].narrow(0, 0, theirs.size(0));
      EXPECT_LT(RelativeError(ours, theirs), 1e-5) << "chunk " << chunk << " position " << golden["positions"][i];
    }
  }
  KvCache cache = Cache(*model);
  std::vector<std::vector<at::Tensor>> keys(cache.shape().layers.size()), values(keys.size());
  at::Tensor hidden = Feed(*model, IdTensor(ids, 1, kCpu), cache, FindBackend(backend), 16, 0,
                           [&](const LayerView& view) {
                             keys[view.cached_layer].push_back(view.keys.clone());
                             values[view.cached_layer].push_back(view.values.clone());
                           });
  ASSERT_EQ(golden["cache"].size(), keys.size());
  for (size_t layer = 0; layer < keys.size(); ++layer) {
    if (model->config().latent.rank > 0) {  // transformers caches what latents stand for
      auto [of_heads, values_of_heads] = model->Expand(static_cast<int64_t>(layer), at::cat(keys[layer], 2), at::cat(values[layer], 2));
      if (SaysOf(name).value("cached_pairs", "") == "neighbours") {
        const int64_t turning = model->config().latent.rotary_dim, plain = of_heads.size(3) - turning;
        const at::Tensor turned = of_heads.narrow(3, plain, turning).unflatten(3, {2, turning / 2}).transpose(3, 4).flatten(3);
        of_heads = at::cat({of_heads.narrow(3, 0, plain), turned}, 3);
      }
      keys[layer] = {of_heads}, values[layer] = {values_of_heads};
    }
    const auto every_13th = [](const std::vector<at::Tensor>& parts) {
      const at::Tensor all = at::cat(parts, 2).flatten();
      return all.index_select(0, at::arange(0, all.numel(), 13, at::kLong));
    };
    const auto theirs = [&](const char* side) {
      return at::tensor(golden["cache"][layer][side].get<std::vector<float>>());
    };
    EXPECT_LT(RelativeError(every_13th(keys[layer]), theirs("keys")), 1e-5) << "layer " << layer;
    EXPECT_LT(RelativeError(every_13th(values[layer]), theirs("values")), 1e-5) << "layer " << layer;
  }
  for (const int64_t expected : golden["greedy"].get<std::vector<int64_t>>()) {
    const at::Tensor token = model->Logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1);
    ASSERT_EQ(token.item<int64_t>(), expected);
    hidden = model->Forward(token, cache, FindBackend(backend));
  }
}
INSTANTIATE_TEST_SUITE_P(Shapes, ArchitectureParity,
                         testing::Combine(testing::ValuesIn(GoldenModelNames()), testing::Values("eager", "sdpa")),
                         [](const auto& info) {
                           std::string name = std::get<0>(info.param) + "_" + std::get<1>(info.param);
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(Architectures, EachHasParityShapes) {
  std::set<std::string> compared, rows;
  for (const std::string& name : GoldenModelNames()) compared.insert(LoadModelConfig(GoldenPath("models/" + name)).model_type);
  for (const Architecture& architecture : Architectures()) rows.insert(architecture.model_type);
  EXPECT_EQ(rows, compared);
  for (const char* of_the_study : {"mistral", "llama", "qwen2", "qwen3", "gemma3_text", "gemma4", "gpt2"}) {
    EXPECT_TRUE(rows.contains(of_the_study)) << of_the_study;
  }
}

// The comparison above would see each of these left out or mixed up, wherever a tiny model has it: ten times its tolerance
// and more. What a family says of itself, its tiny models have.
TEST(Architectures, EveryPartOfAConfigShowsInLogits) {
  const c10::InferenceMode guard;
  using Mutation = std::pair<const char*, void (*)(ModelConfig&)>;
  const std::vector<Mutation> mutations = {
      {"no cap on scores", [](ModelConfig& c) { c.score_softcap = 0; }},
      {"no cap on logits", [](ModelConfig& c) { c.logit_softcap = 0; }},
      {"no factor of what layers add", [](ModelConfig& c) { c.residual_scale = 1; }},
      {"no divisor of logits", [](ModelConfig& c) { c.logit_divisor = 1; }},
      {"no factor of embeddings", [](ModelConfig& c) { c.embedding_scale = 1; }},
      {"no offset of norms", [](ModelConfig& c) { c.norm_offset = 0; }},
      {"no norm of values", [](ModelConfig& c) { c.value_norm = false; }},
      {"no scalars of layers", [](ModelConfig& c) { c.layer_scalar = false; }},
      {"no norm behind attention", [](ModelConfig& c) { c.names.post_attention_norm.clear(); }},
      {"no norm behind the MLP", [](ModelConfig& c) { c.names.post_mlp_norm.clear(); }},
      {"no norm before attention", [](ModelConfig& c) { c.names.input_norm.clear(); }},
      {"no norm before the MLP", [](ModelConfig& c) { c.names.mlp_norm.clear(); }},
      {"no norm of queries", [](ModelConfig& c) { if (!c.norm_across_heads) c.names.q_norm.clear(); }},
      {"no norm of latents", [](ModelConfig& c) { if (c.latent.rank > 0) c.names.k_norm.clear(); }},
      {"another epsilon of the norms of latents", [](ModelConfig& c) { c.latent.norm_eps = c.norm_eps; }},
      {"pairs half a head apart", [](ModelConfig& c) {
         for (RopeConfig& rope : c.ropes) rope.interleaved = false;
       }},
      {"no biases of qkv", [](ModelConfig& c) { c.qkv_bias = false; }},
      {"no bias of o", [](ModelConfig& c) { c.o_bias = false; }},
      {"no biases of the MLP", [](ModelConfig& c) { c.mlp_bias = false; }},
      {"the other activation",
       [](ModelConfig& c) { c.activation = c.activation == Activation::kSilu ? Activation::kGeluTanh : Activation::kSilu; }},
      {"no logits without a value", [](ModelConfig& c) { c.names.sink_logits.clear(); }},
      {"gates behind each other", [](ModelConfig& c) { c.interleaved_gates = false; }},
      {"no biases of experts", [](ModelConfig& c) { c.expert_bias = false; }},
      {"no shared experts", [](ModelConfig& c) {
         for (LayerConfig& layer : c.layers) layer.shared_size = 0;
       }},
      {"shares behind experts", [](ModelConfig& c) { c.scales_input = false; }},
      {"no gates of the shared experts", [](ModelConfig& c) { c.names.shared_gate.clear(); }},
      {"shares by a softmax", [](ModelConfig& c) { c.sigmoid_routing = false; }},
      {"shares of experts as they are not", [](ModelConfig& c) {
         c.normalized_routing = !c.normalized_routing;
       }},
      {"no bias of the choice of experts", [](ModelConfig& c) { c.names.router_bias.clear(); }},
      {"experts of all groups", [](ModelConfig& c) { c.expert_groups = 0; }},
      {"no factor of the shares", [](ModelConfig& c) { c.routed_scale = 1; }},
      {"an expert less", [](ModelConfig& c) {
         for (LayerConfig& layer : c.layers) layer.experts_per_token -= layer.experts_per_token > 1;
       }},
      {"another scale of scores", [](ModelConfig& c) {
         for (LayerConfig& layer : c.layers) layer.attention_scale *= 1.01;
       }},
      {"no windows", [](ModelConfig& c) {
         for (LayerConfig& layer : c.layers) layer.sliding_window = 0;
       }},
      {"windows of a token more", [](ModelConfig& c) {
         for (LayerConfig& layer : c.layers) layer.sliding_window += layer.sliding_window > 0;
       }},
      {"no chunks", [](ModelConfig& c) {
         for (LayerConfig& layer : c.layers) layer.attention_chunk = 0;
       }},
      {"chunks of a token more", [](ModelConfig& c) {
         for (LayerConfig& layer : c.layers) layer.attention_chunk += layer.attention_chunk > 0;
       }},
      {"heads of any length", [](ModelConfig& c) {
         for (LayerConfig& layer : c.layers) layer.unit_heads = false;
       }},
      {"queries of one size", [](ModelConfig& c) { c.query_growth = 0; }},
      {"positions in every layer", [](ModelConfig& c) {
         for (LayerConfig& layer : c.layers) layer.rope = layer.rope == LayerConfig::kNoRope ? 0 : layer.rope;
       }},
      {"no positions in the first layer that has some", [](ModelConfig& c) {
         for (LayerConfig& layer : c.layers) {
           if (c.ropes.empty() || layer.rope == LayerConfig::kNoRope) continue;
           layer.rope = LayerConfig::kNoRope;
           return;
         }
       }},
      {"whole heads turn", [](ModelConfig& c) {
         for (RopeConfig& rope : c.ropes) {
           if (rope.rotated_share < 1) rope.rotated_share = 1, rope.type = "default";
         }
       }},
      {"plain frequencies", [](ModelConfig& c) {
         for (RopeConfig& rope : c.ropes) rope.type = "default";
       }},
      {"frequencies between whole pairs", [](ModelConfig& c) {
         for (RopeConfig& rope : c.ropes) rope.truncate = !rope.truncate;
       }},
      {"the other list of factors", [](ModelConfig& c) {
         for (RopeConfig& rope : c.ropes) std::swap(rope.short_factors, rope.long_factors);
       }},
      {"no factor of cos and sin", [](ModelConfig& c) {
         for (RopeConfig& rope : c.ropes) rope.attention_factor = 1;
       }}};
  std::map<std::string, std::set<std::string>> seen;
  for (const auto& [name, golden] : GoldenModels()) {
    const std::string dir = GoldenPath("models/" + name);
    const at::Tensor ids = IdTensor(golden["ids"], 1, kCpu);
    const ModelConfig config = LoadModelConfig(dir);
    const auto logits = [&](const ModelConfig& of) {
      return AllLogits(Model(of, Weights::Open(dir, at::kFloat, kCpu)), ids, "eager", 40);
    };
    const at::Tensor right = logits(config);
    for (const auto& [what, mutate] : mutations) {
      ModelConfig mutated = config;
      mutate(mutated);
      const at::Tensor wrong = logits(mutated);
      if (wrong.equal(right)) continue;  // this model has no such thing
      EXPECT_GT(RelativeError(wrong, right), 1e-4) << name << ": " << what;
      seen[what].insert(name);
    }
  }
  for (const Family& family : Families()) {
    for (const std::string what : family.says["mutations"]) {
      bool has = false;
      for (const auto& [name, golden] : family.golden["cases"].items()) has = has || seen[what].contains(name);
      EXPECT_TRUE(has) << family.name << ": " << what;
    }
  }
}

// With a quantized cache a layer that reads another one's keys and values must still see that layer's, not what
// was decoded in between. At 8 bits the logits stay near.
TEST(Model, LayersThatShareACacheReadItThroughEncodedBlocks) {
  const c10::InferenceMode guard;
  const std::vector<int32_t> ids = GoldenModels().at("gemma4-shared")["ids"];
  ModelConfig config = LoadModelConfig(GoldenPath("models/gemma4-shared"));
  for (LayerConfig& layer : config.layers) layer.head_dim = 64;  // a group
  const Model model(config, Weights::Random(1, at::kFloat, kCpu));
  const auto logits = [&](const std::string& spec) {
    KvCache cache(ParseSpec(spec), model.cache_shape(1), 64, at::kFloat, kCpu);
    Feed(model, IdTensor(ids, 1, kCpu).narrow(1, 0, 39), cache, FindBackend("eager"), 8);
    return model.Logits(model.Forward(IdTensor(ids, 1, kCpu).narrow(1, 39, 1), cache, FindBackend("eager")));
  };
  const at::Tensor exact = logits("none");
  // nmse of 8 bits is some 3e-5, 6e-3 of the norm, in six layers.
  EXPECT_LT(RelativeError(logits("int8-hqq@residual=8"), exact), 0.05);
  EXPECT_GT(RelativeError(logits("int2-hqq@residual=8"), exact), 0.05) << "nothing is encoded at all";
}

// From the input of any layer on, in a cache that knows none of the layers before: what the whole model gives, to the bit.
TEST(Model, BeginsBehindTheFirstLayer) {
  const c10::InferenceMode guard;
  const Backend& backend = FindBackend("eager");
  for (const auto& [name, golden] : GoldenModels()) {
    SCOPED_TRACE(name);
    const std::unique_ptr<Model> model = Tiny(name);
    if (!model->Branches()) continue;
    const at::Tensor ids = IdTensor(golden["ids"], 1, kCpu);
    const std::vector<at::Tensor> calls = {ids.narrow(1, 0, 25), ids.narrow(1, 25, 14), ids.narrow(1, 39, 1)};
    std::vector<std::vector<at::Tensor>> inputs(calls.size());
    std::vector<at::Tensor> right;
    KvCache whole = Cache(*model);
    for (size_t call = 0; call < calls.size(); ++call) {
      right.push_back(model->Forward(calls[call], whole, backend, {}, [&](int64_t, const at::Tensor& state) { inputs[call].push_back(state.clone()); }));
    }
    for (int64_t layer = 0; layer < static_cast<int64_t>(model->layers().size()); ++layer) {
      KvCache cache = Cache(*model);
      for (size_t call = 0; call < calls.size(); ++call) {
        const LayerInput from = {layer, inputs[call][static_cast<size_t>(layer)]};
        EXPECT_TRUE(model->Forward(calls[call], cache, backend, {}, {}, from).equal(right[call])) << "layer " << layer << ", call " << call;
      }
      EXPECT_EQ(cache.length(), ids.size(1)) << "layer " << layer;
    }
  }
}

// What layers of linear attention keep has one size, by formula that of the tensors; Save brings it back, Clear forgets it. The
// layers with a cache can be quantized beside them.
TEST(Model, LinearAttentionKeepsAStateOfOneSize) {
  const c10::InferenceMode guard;
  ModelConfig config = LoadModelConfig(GoldenPath("models/qwen3next-mixed"));
  for (LayerConfig& layer : config.layers) layer.head_dim = 64;  // a group
  const Model model(config, Weights::Random(1, at::kFloat, kCpu));
  const at::Tensor ids = IdTensor(GoldenModels().at("qwen3next-mixed")["ids"], 2, kCpu);
  const Backend& backend = FindBackend("eager");
  KvCache cache = Cache(model, 2);
  const auto feed = [&](KvCache& into, int64_t at, int64_t n) { return model.Logits(model.Forward(ids.narrow(1, at, n), into, backend)); };
  EXPECT_EQ(cache.shape().count(), 1);
  EXPECT_EQ(cache.StateBytes(), 0);
  feed(cache, 0, 20);
  EXPECT_EQ(cache.StateBytes(), model.StateBytes(2));
  const auto back = cache.Save();
  const at::Tensor once = feed(cache, 20, 5), next = feed(cache, 25, 5);
  EXPECT_EQ(cache.StateBytes(), model.StateBytes(2));
  back();
  EXPECT_TRUE(feed(cache, 20, 5).equal(once));
  cache.Clear();
  EXPECT_EQ(cache.StateBytes(), 0);
  feed(cache, 0, 20);
  EXPECT_TRUE(feed(cache, 20, 5).equal(once));
  EXPECT_TRUE(feed(cache, 25, 5).equal(next));
  const auto quantized = [&](const std::string& spec) {
    KvCache encoded = Cache(model, 2, spec);
    for (int64_t at = 0; at < 39; at += 13) feed(encoded, at, 13);
    return feed(encoded, 39, 1);
  };
  const at::Tensor exact = quantized("none");
  EXPECT_LT(RelativeError(quantized("int8-hqq@residual=8"), exact), 0.05);
  EXPECT_GT(RelativeError(quantized("int2-hqq@residual=8"), exact), 1e-3) << "nothing is encoded at all";
}

TEST(Model, RandomWeightsAreTheSameForASeedAndStayFinite) {
  const c10::InferenceMode guard;
  for (const PublishedShape& shape : PublishedShapes()) {
    SCOPED_TRACE(shape.name);
    ModelConfig config = ParseModelConfig(shape.config, shape.name);
    // The published frame with everything that costs cut down.
    config.vocab_size = config.per_layer_vocab_size = 100;
    if (config.latent.rank > 0) config.num_heads = 4, config.layers.resize(8);
    config.hidden_size = config.num_heads * 8;
    for (LayerConfig& layer : config.layers) {
      layer.head_dim = 8, layer.intermediate_size = 64;
      layer.experts = std::min<int64_t>(layer.experts, 16), layer.shared_size = std::min<int64_t>(layer.shared_size, 32);
    }
    if (config.latent.rank > 0) {
      config.latent = {.rank = 16, .query_rank = config.latent.query_rank > 0 ? 16 : 0, .plain_dim = 8, .rotary_dim = 8, .value_dim = 8};
    }
    if (config.linear.kernel > 0) config.linear = {.key_heads = 2, .value_heads = 4, .key_dim = 8, .value_dim = 8, .kernel = config.linear.kernel};
    for (RopeConfig& rope : config.ropes) {  // a list has a number a pair
      if (rope.type == "longrope") rope.short_factors.resize(3), rope.long_factors.resize(3);
    }
    config.max_position_embeddings = 256;
    const auto logits = [&](uint64_t seed) {
      const Model model(config, Weights::Random(seed, at::kFloat, kCpu));
      KvCache cache(ParseSpec("none"), model.cache_shape(1), 256, at::kFloat, kCpu);
      return model.Logits(model.Forward(at::arange(0, 200, at::kLong).remainder(100).unsqueeze(0), cache,
                                        FindBackend("sdpa")));
    };
    const at::Tensor once = logits(3);
    EXPECT_TRUE(once.equal(logits(3)));
    EXPECT_FALSE(once.equal(logits(4)));
    // Far below fp16's 65504 after all layers.
    EXPECT_LT(once.abs().max().item<float>(), 1000);
    EXPECT_GT(once.std().item<float>(), 0.01);
  }
}

TEST(Model, SequencesOfABatchDoNotSeeEachOther) {
  const c10::InferenceMode guard;
  const std::unique_ptr<Model> model = Tiny("llama-gqa3");
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
  const at::Tensor ids = IdTensor(GoldenModels().at("llama-gqa3")["ids"].get<std::vector<int32_t>>(), 1, kCpu);
  const at::Tensor exact = AllLogits(*Tiny("llama-gqa3"), ids, "sdpa", 40);
  EXPECT_LT(RelativeError(AllLogits(*Tiny("llama-gqa3", kCpu, at::kBFloat16), ids, "sdpa", 40), exact), 0.04);
}

// Of logits in fp16, which keeps 11 bits, all of them together. A rounding may tip the router of a mixture, transformers' own, too:
// two of the tiny models' experts are often as near to each other as that. Where shares choose the experts, the run in fp16 goes
// through those of the one in float32; elsewhere, since later tokens see a tip as well (glm4moelite-groups: from the first token
// on), the nearest tenth of tokens is looked at.
void ExpectHalfIsNear(const Model& half, const Model& exact, const at::Tensor& ids, const char* backend) {
  const ModelConfig& config = exact.config();
  Experts experts{config, ids.size(0), ids.size(1)};
  const bool follows = Experts::AreChosenByShares(config);
  const at::Tensor right = AllLogits(exact, ids, backend, static_cast<int64_t>(ids.size(1)), follows ? experts.Leads() : RoutingOf());
  const at::Tensor ours = AllLogits(half, ids.to(half.device()), backend, 13, follows ? experts.Follows() : RoutingOf());
  const auto mixes = [](const LayerConfig& layer) { return layer.experts > 0; };
  if (follows || std::none_of(config.layers.begin(), config.layers.end(), mixes)) {
    EXPECT_LT(RelativeError(ours, right), 0.01);
    return;
  }
  const at::Tensor of = right.to(at::kDouble), error = (ours.to(at::kDouble) - of).norm(2, -1) / of.norm(2, -1);
  EXPECT_LT(at::quantile(error.flatten(), 0.1).item<double>(), 0.02) << "all together " << RelativeError(ours, right);
}
TEST(Model, HalfPrecisionStaysNearFloat32) {
  const c10::InferenceMode guard;
  for (const auto& [name, golden] : GoldenModels()) {
    SCOPED_TRACE(name);
    ExpectHalfIsNear(*Tiny(name, kCpu, at::kHalf), *Tiny(name), IdTensor(golden["ids"].get<std::vector<int32_t>>(), 2, kCpu), "sdpa");
  }
}

// Every tensor of the files once, in float32; of embeddings that are no head a step reads one row only, and of experts those
// that its tokens go through, each once.
TEST(Model, CountsItsWeightsOnce) {
  const c10::InferenceMode guard;
  for (const std::string& name : GoldenModelNames()) {
    SCOPED_TRACE(name);
    const std::unique_ptr<Model> model = Tiny(name);
    const ModelConfig& config = model->config();
    int64_t counted = 0, all = 0, of_experts = 0;
    const Safetensors files = Safetensors::Open(GoldenPath("models/" + name));
    for (const auto& [tensor, entry] : files.entries()) {
      if (tensor.ends_with("layer_scalar") || tensor.ends_with("e_score_correction_bias")) continue;
      // Of bfloat16; of MXFP4, whose scales are no elements, two a byte.
      const int64_t elements = entry.dtype == "BF16" ? entry.nbytes / 2 : tensor.ends_with("_blocks") ? entry.nbytes * 2 : 0;
      const bool table = tensor.ends_with("embed_tokens.weight") || tensor.ends_with("wte.weight");
      const bool read_by_row = tensor.ends_with("embed_tokens_per_layer.weight") || tensor.ends_with("wpe.weight") ||
                               (table && !config.tie_word_embeddings);
      const bool expert = tensor.find(".experts.") != std::string::npos;
      all += elements, of_experts += expert ? elements : 0;
      if (!read_by_row && !expert) counted += elements;
    }
    EXPECT_EQ(model->WeightBytes(), counted * 4);
    EXPECT_EQ(model->Parameters(), all);
    EXPECT_EQ(model->ExpertBytesRead(), 0);
    const LayerConfig& last = config.layers.back();
    if (last.experts == 0) {
      EXPECT_EQ(of_experts, 0);
      continue;
    }
    // A token alone reads as many as it goes through; the same tokens in every sequence no more; many tokens all.
    const int64_t experts = last.experts * std::count_if(config.layers.begin(), config.layers.end(), [](const LayerConfig& layer) { return layer.experts > 0; });
    const int64_t expert_bytes = of_experts / experts * 4, of_a_token = experts / last.experts * last.experts_per_token;
    const auto read = [&](const at::Tensor& ids) {
      KvCache cache = Cache(*model, ids.size(0));
      const int64_t before = model->ExpertBytesRead();
      model->Forward(ids, cache, FindBackend("sdpa"));
      EXPECT_EQ(model->ExpertBytesRead(kCpu), model->ExpertBytesRead());
      return (model->ExpertBytesRead() - before) / expert_bytes;
    };
    EXPECT_EQ(read(IdTensor({7}, 1, kCpu)), of_a_token);
    EXPECT_EQ(read(IdTensor({7}, 3, kCpu)), of_a_token);
    const int64_t many = read(IdTensor(GoldenModels().at(name)["ids"].get<std::vector<int32_t>>(), 1, kCpu));
    EXPECT_GT(many, of_a_token);
    EXPECT_LE(many, experts);
    // Operations of one token: of all experts, too, only those that it goes through.
    EXPECT_LT(model->TokenFlops(false), 2.0 * static_cast<double>(counted + of_a_token * of_experts / experts));
    EXPECT_GT(model->TokenFlops(true), 2.0 * static_cast<double>(of_a_token * of_experts / experts));
  }
}

// The published shapes have as many parameters as transformers' models of the same config.json.
TEST(Model, PublishedShapesHaveTheirParameters) {
  std::map<std::string, int64_t> theirs;
  for (const Family& family : Families()) {
    for (const auto& [name, parameters] : family.golden["parameters"].items()) theirs[name] = parameters;
  }
  for (const PublishedShape& shape : PublishedShapes()) {
    ASSERT_TRUE(theirs.contains(shape.name)) << shape.name << ": run make_golden_models.py";
    const Model model(ParseModelConfig(shape.config, shape.name), Weights::Random(1, at::kHalf, at::kMeta));
    EXPECT_EQ(model.Parameters(), theirs[shape.name]) << shape.name;
  }
  EXPECT_EQ(theirs.size(), PublishedShapes().size());
}

TEST(Model, RefusesWhatItCannotRun) {
  namespace fs = std::filesystem;
  const fs::path dir = fs::path(testing::TempDir()) / "kvq_model";
  const auto with = [&](const std::string& from, const std::string& to, const std::string& model = "llama-mha") {
    fs::remove_all(dir);
    fs::copy(GoldenPath("models/" + model), dir);
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
  EXPECT_NE(with("\"model_type\": \"llama\"", "\"model_type\": \"rwkv\"").find("'rwkv' is not supported; supported: " + Architectures().front().model_type + ", "),
            std::string::npos);
  EXPECT_NE(with("\"intermediate_size\": 40", "\"intermediate_size\": 48").find("config.json asks for [48"),
            std::string::npos);
  EXPECT_NE(with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3").find("model.layers.2"), std::string::npos);
  EXPECT_NE(with("\"attention_bias\": false", "\"attention_bias\": true").find("q_proj.bias is missing"),
            std::string::npos);
  EXPECT_NE(with("\"silu\"", "\"gelu\"").find("hidden_act"), std::string::npos);
  EXPECT_NE(with("\"intermediate_size\": 32", "\"intermediate_size\": 64", "gptoss-mxfp4")
                .find("gate_up_proj_blocks has shape [5, 64, 2, 16], config.json asks for [5, 128, 2, 16]"), std::string::npos);
  EXPECT_NE(with("\"mxfp4\"", "\"fp8\"", "gptoss-mxfp4").find("'quant_method' is \"fp8\", supported is only \"mxfp4\""),
            std::string::npos);
  EXPECT_THROW(FindBackend("flashier"), InputError);
  EXPECT_THROW(ParseDType("--dtype", "int8"), InputError);
  EXPECT_THROW(ParseDevices("tpu"), InputError);
}

TEST(Model, KnowsTheTypeOfItsCache) {
  const auto of = [](const std::string& name) {
    const std::string dir = GoldenPath("models/" + name);
    return CacheTypeOf(LoadModelConfig(dir), dir);
  };
  EXPECT_EQ(of("llama-study"), at::kHalf);    // config.json says it
  EXPECT_EQ(of("llama-mha"), at::kBFloat16);  // it does not; the tensors are float32
  ModelConfig config = FindModel("mistral-7b").config();
  EXPECT_EQ(CacheTypeOf(config, ""), at::kHalf) << "a shape that names none";
  for (const auto& [name, type] : {std::pair("float32", at::kBFloat16), std::pair("bfloat16", at::kBFloat16),
                                   std::pair("float16", at::kHalf)}) {
    config.dtype = name;
    EXPECT_EQ(CacheTypeOf(config, ""), type) << name;
    EXPECT_EQ(CacheTypeOf(config, GoldenPath("models/llama-mha")), type) << name << " before what the tensors are";
  }
  config.dtype.clear();
  EXPECT_EQ(CacheTypeOf(config, GoldenPath("models/llama-study")), at::kHalf) << "the tensors'";
}

TEST(ModelGpu, LogitsEqualTheCpus) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  for (const auto& [name, golden] : GoldenModels()) {
    SCOPED_TRACE(name);
    const std::vector<int32_t> ids = golden["ids"];
    for (const char* backend : {"eager", "sdpa"}) {
      const std::unique_ptr<Model> exact = Tiny(name);
      const at::Tensor cpu = AllLogits(*exact, IdTensor(ids, 2, kCpu), backend, 40);
      const std::unique_ptr<Model> gpu = Tiny(name, at::kCUDA);
      for (const int64_t chunk : {40, 13, 1}) {
        EXPECT_LT(RelativeError(AllLogits(*gpu, IdTensor(ids, 2, at::kCUDA), backend, chunk), cpu), 1e-4);
      }
      ExpectHalfIsNear(*Tiny(name, at::kCUDA, at::kHalf), *exact, IdTensor(ids, 2, kCpu), backend);
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
