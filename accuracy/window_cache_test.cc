// Layers with a sliding window that keep it alone (@window-cache=window), against caches of all tokens: what attention reads, to the
// bit; which tokens are kept, and in how many bytes; logits of the families that have windows; the command.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "accuracy/families.h"
#include "accuracy/golden.h"
#include "accuracy/tiny_model.h"
#include "benchmarks/capacity.h"
#include "fixtures/cache/kv_cache.h"
#include "fixtures/dataset.h"
#include "fixtures/model.h"
#include "kernels/error.h"

namespace kvq {
namespace {

using nlohmann::json;

// Every policy, tokens that are encoded alone and in blocks, residuals and sinks longer and shorter than windows.
const std::vector<std::string> kSpecs = {
    "none", "int4-hqq@residual=4@sinks=3", "int2-hqq@residual=0", "int2-hqq@residual=0@sinks=3", "int4-hqq@residual=8+0",
    "int4-hqq@residual=0+4@sinks=3", "int2-hqq-kivi+int4-hqq@residual=8+2", "none+int4-hqq@residual=4+0", "int4-hqq@residual=32+0",
    "int4-hqq@residual=4@prefill=raw", "int4-hqq@policy=kivi@residual=4", "int2-hqq-kivi+int4-hqq@policy=kivi@residual=8+4",
    "int4-hqq@policy=kivi@residual=1", "int4-hqq@policy=kivi@residual=32", "none+int4-hqq@policy=kivi@residual=4",
    "int4-hqq@residual=1", "kivi-2@residual=32", "q8_0+q4_0@residual=0@rotate=hadamard", "int4-hqq@residual=4@rotate=signs+none@dense=1+0",
    "int4-hqq@residual=4@layers=2-2:none"};

CacheShape Shape(int64_t window) {
  return {2, {{.kv_heads = 2, .head_dim = 64, .window = window}, {.kv_heads = 2, .head_dim = 64}, {.kv_heads = 1, .head_dim = 64, .window = window}}};
}

at::Tensor Random(int64_t layer, int64_t tokens, uint64_t seed) {
  at::manual_seed(seed + static_cast<uint64_t>(layer));
  return at::randn({2, Shape(0).layers[static_cast<size_t>(layer)].kv_heads, tokens, 64});
}

std::string Windowed(const std::string& spec) { return spec + "@window-cache=window"; }

// Of what a cache of all tokens hands to attention, what queries of the last n tokens see; where the layer has a window.
void ExpectSeen(const at::Tensor& all, const at::Tensor& kept, int64_t n, int64_t window) {
  const int64_t seen = window > 0 ? std::min(all.size(2), n + window - 1) : all.size(2);
  ASSERT_EQ(kept.size(2), seen);
  ASSERT_EQ(kept.scalar_type(), all.scalar_type());
  EXPECT_TRUE(kept.equal(all.narrow(2, all.size(2) - seen, seen)));
}

TEST(WindowCache, ReadsWhatACacheOfAllTokensDoes) {
  const c10::InferenceMode guard;
  constexpr int64_t kTokens = 71;
  const std::vector<std::vector<int64_t>> calls = {{71}, std::vector<int64_t>(71, 1), {30, 1, 1, 1, 38}, {3, 17, 9, 9, 2, 31}};
  std::vector<std::pair<at::Tensor, at::Tensor>> numbers;
  for (int64_t layer = 0; layer < 3; ++layer) numbers.emplace_back(Random(layer, kTokens, 1), Random(layer, kTokens, 7));
  for (const std::string& spec : kSpecs) {
    for (const auto& [stored, read] : {std::pair(at::kFloat, at::kFloat), std::pair(at::kBFloat16, at::kFloat)}) {
      for (size_t c = 0; c < calls.size(); ++c) {
        const auto feed = [&](KvCache& cache, const std::function<void(int64_t layer, int64_t n, const at::Tensor& keys, const at::Tensor& values)>& see) {
          int64_t at = 0;
          for (const int64_t n : calls[c]) {
            for (int64_t layer = 0; layer < 3; ++layer) {
              const auto& of_layer = numbers[static_cast<size_t>(layer)];
              const auto seen = cache.Update(layer, of_layer.first.narrow(2, at, n), of_layer.second.narrow(2, at, n));
              see(layer, n, seen.first, seen.second);
            }
            at += n;
          }
        };
        // Of a cache of all tokens windows change nothing: it is filled once for all of them.
        KvCache all(ParseSpec(spec), Shape(0), kTokens, stored, kCpu, read);
        std::vector<std::pair<at::Tensor, at::Tensor>> of_all;
        feed(all, [&](int64_t, int64_t, const at::Tensor& keys, const at::Tensor& values) { of_all.emplace_back(keys.clone(), values.clone()); });
        for (const int64_t window : {1, 2, 7, 8, 16, 40, 71, 100}) {
          SCOPED_TRACE(StrCat(spec, ", window ", window, ", stored in ", stored, ", calls ", c));
          const CacheShape shape = Shape(window);
          KvCache kept(ParseSpec(Windowed(spec)), shape, kTokens, stored, kCpu, read);
          size_t i = 0;
          feed(kept, [&](int64_t layer, int64_t n, const at::Tensor& keys, const at::Tensor& values) {
            const auto& [all_keys, all_values] = of_all[i++];
            ExpectSeen(all_keys, keys, n, shape.layers[static_cast<size_t>(layer)].window);
            ExpectSeen(all_values, values, n, shape.layers[static_cast<size_t>(layer)].window);
          });
          if (HasFailure()) return;
        }
      }
    }
  }
}

// Which of `length` tokens one side keeps, token by token, as the rule says: those that are encoded together while one of them is among the
// newest `window`; sinks, and a residual that has begun, whole.
std::pair<int64_t, int64_t> Kept(const Spec& spec, const SideRule& rule, const Codec& codec, int64_t window, int64_t length) {
  if (codec.encode == nullptr) return {0, std::min(length, window)};
  const int64_t encoded = EncodedTokens(spec, rule, length), sinks = std::min(length, spec.sink_tokens);
  const int64_t block = BlockTokens(spec, rule, codec);
  const auto in_sight = [&](int64_t token) { return token >= length - window; };
  int64_t codes = 0, dense = in_sight(sinks - 1) ? sinks : 0;
  for (int64_t i = 0; i < encoded; ++i) codes += in_sight(sinks + i / block * block + block - 1) || in_sight(sinks - 1);
  const bool by_one = spec.policy == Policy::kKivi && rule.values;
  for (int64_t token = sinks + encoded; token < length; ++token) dense += !by_one || in_sight(token);
  return {codes, dense};
}

TEST(WindowCache, BytesAreThoseOfTheTokensThatAreKept) {
  for (const std::string& text : kSpecs) {
    const Spec spec = ParseSpec(Windowed(text));
    for (const int64_t window : {1, 2, 7, 8, 16, 40}) {
      const CacheShape shape = Shape(window);
      for (int64_t length = 1; length < 120; length += length < 50 ? 1 : 7) {
        SCOPED_TRACE(StrCat(spec.text, ", window ", window, ", ", length, " tokens"));
        int64_t by_hand = 0;
        for (const int64_t layer : {0, 2}) {
          const SchemePair pair = spec.At(layer, 3);
          const int64_t heads = shape.layers[static_cast<size_t>(layer)].kv_heads;
          for (const auto& [codec, rule] : {std::pair(&pair.keys->keys, &spec.keys), std::pair(&pair.values->values, &spec.values)}) {
            const auto [codes, dense] = Kept(spec, *rule, *codec, window, length);
            by_hand += dense * 2 * heads * 64 * 2;
            if (codes > 0) by_hand += EncodedBytes(*codec, spec.Params(*codec), 2, heads, 64, codes);
          }
          EXPECT_LE(KvLayerBytes(spec, shape, static_cast<size_t>(layer), length, at::kHalf),
                    KvLayerBytes(ParseSpec(text), shape, static_cast<size_t>(layer), length, at::kHalf));
        }
        EXPECT_EQ(KvBytes(spec, shape, length, at::kHalf), by_hand + KvLayerBytes(ParseSpec(text), shape, 1, length, at::kHalf));
        const KvCache cache(spec, shape, length, at::kHalf, kCpu, at::kFloat);
        EXPECT_EQ(cache.AllocatedBytes(), KvBytesReserved(spec, shape, length, at::kHalf));
        EXPECT_GE(cache.AllocatedBytes(), KvBytes(spec, shape, length, at::kHalf));
        EXPECT_EQ(CacheTensorBytes(spec, shape, length, at::kHalf, at::kFloat), cache.AllocatedBytes() + cache.ScratchBytes());
        if (HasFailure()) return;
      }
    }
  }
}

// google/gemma-3-1b-it's config.json: every sixth of 26 layers sees all, the others 512 tokens; one KV head of 256 channels.
TEST(WindowCache, Gemma3sBytesAreWhatOneMultiplies) {
  const ModelConfig config = ParseModelConfig(R"({"model_type": "gemma3_text", "attention_bias": false, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144})",
                                              "gemma-3-1b");
  const CacheShape shape = CacheShapeOf(config, 1);
  ASSERT_EQ(shape.count(), 26);
  for (int64_t layer = 0; layer < 26; ++layer) {
    const bool all = layer == 5 || layer == 11 || layer == 17 || layer == 23;
    EXPECT_EQ(shape.layers[static_cast<size_t>(layer)].window, all ? 0 : 512) << layer;
  }
  const auto bytes = [&](const char* spec, int64_t tokens) { return KvBytes(ParseSpec(spec), shape, tokens, at::kHalf); };
  const int64_t dense = 2 * 256 * 2, q8_0 = 2 * 256 / 32 * 34, int4 = 2 * (128 + 256 / 64 * 4);  // of a token and layer, keys and values
  EXPECT_EQ(bytes("none", 32768), 26 * 32768 * dense);
  EXPECT_EQ(bytes("none@window-cache=full", 32768), 26 * 32768 * dense);
  EXPECT_EQ(bytes("none@window-cache=window", 32768), (4 * 32768 + 22 * 512) * dense);
  EXPECT_EQ(bytes("none@window-cache=window", 512), 26 * 512 * dense);
  EXPECT_EQ(bytes("none@window-cache=window", 300), 26 * 300 * dense);
  EXPECT_EQ(bytes("llamacpp-q8_0@window-cache=window", 32768), (4 * 32768 + 22 * 512) * q8_0);
  // Blocks of 128 and the newest 128: of a window that begins with a block 384 tokens are encoded; 64 tokens on it shows a half of its oldest
  // block, which stays whole.
  EXPECT_EQ(bytes("int4-hqq@window-cache=window", 32768), 4 * (32640 * int4 + 128 * dense) + 22 * (384 * int4 + 128 * dense));
  EXPECT_EQ(bytes("int4-hqq@window-cache=window", 32832), 4 * (32768 * int4 + 64 * dense) + 22 * (512 * int4 + 64 * dense));
  // Of layers that share keys and values: what the one of them sees that sees most.
  ModelConfig shared = config;
  shared.layers[7].kv_layer = 6, shared.layers[8].kv_layer = 6, shared.layers[8].sliding_window = 0;
  EXPECT_EQ(CacheShapeOf(shared, 1).layers[6].window, 0);
  shared.layers[8].sliding_window = 600;
  EXPECT_EQ(CacheShapeOf(shared, 1).layers[6].window, 600);
}

// Logits of the families' tiny models that have windows, on heads of 64 channels, which schemes can encode.
TEST(WindowCache, LogitsAreThoseOfACacheOfAllTokens) {
  const c10::InferenceMode guard;
  std::set<std::string> families;
  size_t turn = 0;
  for (const Family& family : Families()) {
    for (const auto& [name, says] : family.says["cases"].items()) {
      ModelConfig config = LoadModelConfig(GoldenPath("models/" + name));
      for (LayerConfig& layer : config.layers) layer.head_dim = 64;
      for (RopeConfig& rope : config.ropes) {  // a list has a number a pair that turns
        const auto pairs = static_cast<size_t>(rope.TurnedChannels(64) / 2);
        if (rope.type == "longrope") rope.short_factors.resize(pairs, 1), rope.long_factors.resize(pairs, 1);
      }
      const CacheShape shape = CacheShapeOf(config, 1);
      if (std::all_of(shape.layers.begin(), shape.layers.end(), [](const KvShape& of) { return of.window == 0 || of.window > 40; })) continue;
      families.insert(family.name);
      const Model model(config, Weights::Random(1, at::kFloat, kCpu));
      const at::Tensor ids = at::remainder(at::arange(60, at::kLong) * 7919 + 13, 61).view({1, 60});
      for (const std::string full : {"none", "llamacpp-q8_0", "llamacpp-q4_0", "vllm-fp8", "none+q4_0@residual=0", "int4-hqq@residual=8",
                                     "int2-hqq-kivi@residual=16@sinks=2", "kivi-2@policy=kivi@residual=32",
                                     "turboquant-k4+turboquant-v4@residual=0@prefill=raw"}) {
        ++turn;
        for (const char* backend : {"eager", "sdpa"}) {
          for (const int64_t chunk : {60, 11, 1}) {
            // Token after token, which takes longest, by one of them or neither in turn: both are handed the same keys and values.
            if (chunk == 1 && turn % 4 != (backend == std::string("eager") ? 0u : 2u)) continue;
            const auto logits = [&](const std::string& text) {
              KvCache cache(ParseSpec(text), shape, 60, at::kBFloat16, kCpu, at::kFloat);
              std::vector<at::Tensor> parts;
              for (int64_t at = 0; at < 60; at += chunk) {
                const int64_t n = std::min<int64_t>(chunk, 60 - at);
                parts.push_back(model.Logits(model.Forward(ids.narrow(1, at, n), cache, FindBackend(backend))));
              }
              return at::cat(parts, 1);
            };
            EXPECT_TRUE(logits(full).equal(logits(Windowed(full)))) << name << " " << full << " " << backend << " in calls of " << chunk;
          }
        }
      }
    }
  }
  EXPECT_GE(families.size(), 9u) << "families have tiny models whose windows hide something of 40 tokens";
}

// Back behind tokens that have pushed others out, again and again.
TEST(WindowCache, GoesBackToWhereItWas) {
  const c10::InferenceMode guard;
  constexpr int64_t kTokens = 71;
  for (const std::string& spec : kSpecs) {
    for (const int64_t window : {2, 8, 16}) {
      for (const int64_t saved : {0, 5, 33}) {
        SCOPED_TRACE(StrCat(spec, ", window ", window, ", saved at ", saved));
        const CacheShape shape = Shape(window);
        KvCache cache(ParseSpec(Windowed(spec)), shape, kTokens, at::kFloat, kCpu), straight(ParseSpec(Windowed(spec)), shape, kTokens, at::kFloat, kCpu);
        const auto feed = [&](KvCache& to, uint64_t seed, int64_t n) {
          std::vector<at::Tensor> read;
          const int64_t from = to.length();
          for (int64_t layer = 0; layer < 3; ++layer) {
            const auto both = to.Update(layer, Random(layer, kTokens, seed).narrow(2, from, n), Random(layer, kTokens, seed + 7).narrow(2, from, n));
            read.push_back(both.first.clone()), read.push_back(both.second.clone());
          }
          return read;
        };
        if (saved > 0) feed(cache, 1, saved), feed(straight, 1, saved);
        const std::function<void()> back = cache.Save();
        for (const int64_t n : {1, 38, 10}) {
          feed(cache, 100, n);
          back();
        }
        for (const int64_t n : {4, 1, 9}) {
          const auto a = feed(cache, 1, n), b = feed(straight, 1, n);
          for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(a[i].equal(b[i])) << i;
        }
        if (HasFailure()) return;
      }
    }
  }
}

// ---- the command, on the tiny Llama as a Mistral of a window of 16 tokens

class WindowCacheCommand : public TinyModel {
 protected:
  void SetUp() override {
    TinyModel::SetUp();
    WidenHeads(dir_ / "tiny");
    json config = json::parse(std::ifstream(dir_ / "tiny" / "config.json"));
    config["model_type"] = "mistral", config["sliding_window"] = 16;
    config.erase("attention_bias"), config.erase("mlp_bias"), config.erase("architectures"), config.erase("pretraining_tp");
    std::ofstream(dir_ / "tiny" / "config.json") << config;
    layers_ = config["num_hidden_layers"], heads_ = config["num_key_value_heads"];
  }
  std::string Flags(const std::string& schemes, const std::string& filter) {
    return StrCat(Tiny(), " --contexts=64 --windows=2 --dtype=float32 --decode-tokens=4 --runs=1 --max-runs=1 --schemes=", schemes,
                  " --kv-dtype=bfloat16 '--benchmark_filter=^(", filter, ")/' --benchmark_out=", (dir_ / "out.json").string());
  }
  json Cells() {
    json cells;
    const json file = json::parse(std::ifstream(dir_ / "out.json"));
    for (const json& run : file["benchmarks"]) cells[run["name"]] = run;
    return cells;
  }
  static const json& Of(const json& cells, const std::string& measurement, const std::string& spec) {
    for (const auto& [name, run] : cells.items()) {
      if (name.starts_with(measurement + "/") && name.find("/" + spec + "/") != std::string::npos) return run;
    }
    throw std::runtime_error(StrCat("no ", measurement, " of ", spec, " in ", cells.dump()));
  }
  int64_t layers_ = 0, heads_ = 0;
};

TEST_F(WindowCacheCommand, ResultsAreOfTheirOwnNameAndResume) {
  const std::string measurements = "kv_size|perplexity|decode";
  const Outcome first = Execute(Flags("none,int4-hqq@residual=8", measurements));
  ASSERT_EQ(first.code, 0) << first.err;
  const json before = Cells();
  const Outcome second = Execute(Flags("none,none@window-cache=window,int4-hqq@residual=8,int4-hqq@residual=8@window-cache=window", measurements));
  ASSERT_EQ(second.code, 0) << second.err;
  EXPECT_NE(second.err.find("has 6 of 12 benchmarks"), std::string::npos) << second.err;
  const json after = Cells();
  ASSERT_EQ(after.size(), 12u);
  for (const auto& [name, run] : before.items()) EXPECT_EQ(after.at(name), run) << name;
  const int64_t token = layers_ * 2 * heads_ * 64 * 2;
  EXPECT_EQ(Of(after, "kv_size", "none")["kv_bytes"], 64 * token);
  EXPECT_EQ(Of(after, "kv_size", "none")["kv_bytes_window_cache"], 16 * token);
  EXPECT_EQ(Of(after, "kv_size", "none@window-cache=window")["kv_bytes"], 16 * token);
  EXPECT_FALSE(Of(after, "kv_size", "none@window-cache=window").contains("kv_bytes_window_cache"));
  EXPECT_EQ(Of(after, "kv_size", "none@window-cache=window")["kv_bytes_allocated"], 16 * token);
  EXPECT_EQ(Of(after, "kv_size", "none@window-cache=window")["bits_per_element"], 4);
  // Of 16 tokens in sight 8 are encoded, as codes of 4.5 bits.
  EXPECT_EQ(Of(after, "kv_size", "int4-hqq@residual=8@window-cache=window")["kv_bytes"], token / 16 * (8 * 16 + 8 * 4.5));
  for (const char* spec : {"none", "int4-hqq@residual=8"}) {
    for (const char* counter : {"ppl", "kld_nats", "top1_agreement"}) {
      EXPECT_EQ(Of(after, "perplexity", Windowed(spec))[counter], Of(after, "perplexity", spec)[counter]) << spec << " " << counter;
    }
    EXPECT_EQ(Of(after, "decode", Windowed(spec))["bytes_per_token"], Of(after, "decode", spec)["bytes_per_token"]) << "as many are read";
  }
}

TEST_F(WindowCacheCommand, RefusesWhatItIsNot) {
  ExpectRefused(Execute(Flags("none@window-cache=ring", "kv_size")), {"none@window-cache=ring", "window-cache is full or window, not 'ring'"});
  ExpectRefused(Execute(Flags("none@window-cache", "kv_size")), {"@key=value"});
  ExpectRefused(Execute(Flags("int4-hqq@policy=hf@window-cache=window", "kv_size")), {"policy hf", "leave out @window-cache=window"});
  ExpectRefused(Execute(Flags("none@window-cache=full@window-cache=window", "kv_size")), {"@window-cache is given twice"});
}

}  // namespace
}  // namespace kvq
