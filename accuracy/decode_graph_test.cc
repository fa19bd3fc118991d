// Kernels of a decoding step against float64, and the graph they make against Model::Forward.
#include "fixtures/decode_graph.h"

#include <ATen/ATen.h>

#include <array>
#include <cmath>

#include "accuracy/golden.h"
#include "fixtures/machine/gpu_memory.h"
#include "fixtures/machine/out_of_memory.h"
#include "kernels/error.h"
#include "kernels/device/step.h"
#include "kernels/host/step.h"
#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

double RelativeError(const at::Tensor& ours, const at::Tensor& theirs) {
  const at::Tensor exact = theirs.to(at::kDouble);
  return ((ours.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
}

double Roundoff(at::ScalarType type) { return type == at::kHalf ? 0x1p-11 : 0x1p-8; }

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
ModelConfig Gpt2() { return Config({"gpt2", 512, 8, 8, 64, 1024}); }
ModelConfig WindowedMistral() {
  ModelConfig config = Config({"mistral-7b-v0.1", 512, 8, 2, 128, 1024});
  for (LayerConfig& layer : config.layers) layer.sliding_window = 24;
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
  says(refused(Gemma3(), [](ModelConfig& c) { c.names.post_mlp_norm.clear(); }), "MLP alone");
  says(refused(Gemma3(), [](ModelConfig& c) { c.norm = NormKind::kLayerNorm; }), "LayerNorm behind attention");
  says(refused(Gemma4(), [](ModelConfig& c) { c.per_layer_input_size = 520; }), "more than 512 elements");
  says(refused(Gemma4(), [](ModelConfig& c) { c.per_layer_vocab_size = 999; }), "no inputs of layers");
  const Model model(Config({"mistral-7b", 128, 4, 2, 64, 128}),
                    Weights::Random(1, at::kHalf, at::kCPU));
  says(RefusalOf(model, "int4-hqq@policy=hf"), "policy hf");
  says(RefusalOf(model, "int4-hqq@residual=0"), "residual");
  says(RefusalOf(model, "int4-hqq-kivi"), "no fused attention for keys int4-hqq-kivi");
}

// ---- kernels

// float32 sums of `in` products, each step of relative error 2^-24: errors of random sign add up to
// the square root of `in` of them. Rounding the result to 16 bits is at most a unit roundoff.
// Of weights [out, in].
void ExpectProductsEqualFloat64(const std::vector<std::pair<int64_t, int64_t>>& weights) {
  const c10::InferenceMode guard;
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    for (const auto& [out, in] : weights) {
      const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA);
      const at::Tensor weight = at::randn({out, in}, options) / std::sqrt(static_cast<double>(in));
      for (const int64_t rows : {1, 2, 3, 8}) {
        SCOPED_TRACE(StrCat("weight ", out, " x ", in, ", ", rows, " rows, ", type));
        const at::Tensor x = at::randn({rows, in}, options);
        const at::Tensor exact = at::matmul(x.to(at::kDouble), weight.to(at::kDouble).t());
        ProductArgs args;
        args.dtype = DTypeOf(type), args.rows = rows, args.in = in, args.out = out;
        args.weight = weight.data_ptr(), args.x = x.data_ptr();
        at::Tensor stored = at::full({rows, out}, NAN, options);
        args.stored = stored.data_ptr();
        // Of a block: x, the smallest ring of weights, sums.
        const int64_t room = CurrentDevice().block_shared - (16 * 4 << 10) - (8 << 10);
        ASSERT_TRUE(ProductFits(args) || 2 * rows * in > room) << "x fits into shared memory";
        if (ProductFits(args)) {
          Product(args, nullptr);
          EXPECT_LT(RelativeError(stored, exact), Roundoff(type));
        }
        args.end = ProductEnd::kPartial;
        ASSERT_TRUE(ProductFits(args) || 2 * rows * in > 4 * room) << "a quarter of x fits into shared memory";
        if (!ProductFits(args)) continue;
        const at::Tensor partial =
            at::full({ProductSplits(args), rows, out}, NAN, options.dtype(at::kFloat));
        args.partial = partial.data_ptr<float>();
        Product(args, nullptr);
        EXPECT_LT(RelativeError(partial.sum(0), exact),
                  0x1p-24 * std::sqrt(static_cast<double>(in)));
      }
    }
  }
}

TEST(StepGpu, ProductsEqualFloat64) {
  KVQ_NEEDS_CUDA();
  ExpectProductsEqualFloat64(
      {{8, 64}, {200, 576}, {6144, 4096}, {4096, 14336}, {4608, 3584}, {3584, 18944}, {152064, 3584}});
}

// What fits under a sanitizer.
TEST(StepGpu, ProductsOfAFewShapes) {
  KVQ_NEEDS_CUDA();
  ExpectProductsEqualFloat64({{8, 64}, {200, 576}, {2048, 4096}});
}

TEST(StepGpu, NormsAddWhatTheySay) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    for (const int64_t size : {28, 64, 4096, 8192, 16384}) {
      SCOPED_TRACE(StrCat("size ", size, ", ", type));
      const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA);
      const at::Tensor x = at::randn({5, size}, options), bias = at::randn({size}, options),
                       out = at::full_like(x, NAN);
      const at::Tensor partial = at::randn({3, 5, size}, options.dtype(at::kFloat));
      const at::Tensor weight = at::rand({size}, options.dtype(at::kFloat)) + 0.5;
      const at::Tensor sum =
          (x.to(at::kFloat) + (partial[0] + partial[1] + partial[2] + bias).to(type)).to(type);
      AddNorm({.dtype = DTypeOf(type),
               .rows = 5,
               .size = size,
               .x = x.data_ptr(),
               .partial = partial.data_ptr<float>(),
               .splits = 3,
               .bias = bias.data_ptr(),
               .sum = x.data_ptr(),
               .weight = weight.data_ptr<float>(),
               .eps = 1e-5f,
               .out = out.data_ptr()},
              nullptr);
      EXPECT_TRUE(x.equal(sum));
      const at::Tensor exact = sum.to(at::kDouble);
      EXPECT_LT(
          RelativeError(out, exact * at::rsqrt(exact.square().mean(-1, true) + 1e-5) * weight),
          Roundoff(type));
    }
  }
}

// x + norm(delta), times a scale, rounded three times by at most a unit roundoff; the norm of what that left once.
TEST(StepGpu, NormsBehindAProductComeFirst) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    for (const int64_t size : {28, 64, 2560, 5376, 16384}) {
      for (const bool split : {false, true}) {
        SCOPED_TRACE(StrCat("size ", size, split ? ", of splits" : "", ", ", type));
        const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA);
        const at::TensorOptions floats = options.dtype(at::kFloat);
        const at::Tensor x = at::randn({5, size}, options), bias = at::randn({size}, options);
        const at::Tensor partial = at::randn({3, 5, size}, floats), whole = at::randn({5, size}, options);
        const at::Tensor first = at::rand({size}, floats) + 0.5, second = at::rand({size}, floats) + 0.5;
        const at::Tensor product = split ? partial[0] + partial[1] + partial[2] : whole.to(at::kFloat);
        const at::Tensor delta = (product + bias).to(type);
        const at::Tensor sum = at::full_like(x, NAN), out = at::full_like(x, NAN);
        const auto scaled = [](const at::Tensor& t) {
          const at::Tensor exact = t.to(at::kDouble);
          return exact * at::rsqrt(exact.square().mean(-1, true) + 1e-5);
        };
        AddNormedArgs args;
        args.next = {.dtype = DTypeOf(type),
                     .rows = 5,
                     .size = size,
                     .x = x.data_ptr(),
                     .delta = split ? nullptr : whole.data_ptr(),
                     .partial = split ? partial.data_ptr<float>() : nullptr,
                     .splits = split ? 3 : 0,
                     .bias = bias.data_ptr(),
                     .sum = sum.data_ptr(),
                     .weight = second.data_ptr<float>(),
                     .eps = 1e-5f,
                     .out = out.data_ptr()};
        args.delta_weight = first.data_ptr<float>(), args.scale = 0.75f;
        AddNormed(args, nullptr);
        EXPECT_LT(RelativeError(sum, (x.to(at::kDouble) + scaled(delta) * first) * 0.75), 3 * Roundoff(type));
        EXPECT_LT(RelativeError(out, scaled(sum) * second), Roundoff(type));
        // In place, and without a norm that follows, the sum is the same bits.
        out.fill_(NAN);
        args.next.sum = x.data_ptr(), args.next.weight = nullptr;
        AddNormed(args, nullptr);
        EXPECT_TRUE(x.equal(sum));
        EXPECT_TRUE(out.isnan().all().item<bool>());
      }
    }
  }
}

TEST(StepGpu, NormsWithAShiftAreLayerNorms) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    for (const int64_t size : {28, 64, 768, 8192, 16384}) {
      SCOPED_TRACE(StrCat("size ", size, ", ", type));
      const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA), floats = options.dtype(at::kFloat);
      const at::Tensor x = at::randn({5, size}, options) + 3, bias = at::randn({size}, options);
      const at::Tensor partial = at::randn({2, 5, size}, floats), out = at::full_like(x, NAN);
      const at::Tensor weight = at::rand({size}, floats) + 0.5, shift = at::randn({size}, floats);
      const at::Tensor sum = (x.to(at::kFloat) + (partial[0] + partial[1] + bias).to(type)).to(type);
      AddNorm({.dtype = DTypeOf(type),
               .rows = 5,
               .size = size,
               .x = x.data_ptr(),
               .partial = partial.data_ptr<float>(),
               .splits = 2,
               .bias = bias.data_ptr(),
               .sum = x.data_ptr(),
               .weight = weight.data_ptr<float>(),
               .eps = 1e-5f,
               .out = out.data_ptr(),
               .shift = shift.data_ptr<float>()},
              nullptr);
      EXPECT_TRUE(x.equal(sum));
      const at::Tensor centred = sum.to(at::kDouble) - sum.to(at::kDouble).mean(-1, true);
      EXPECT_LT(RelativeError(out, centred * at::rsqrt(centred.square().mean(-1, true) + 1e-5) * weight + shift),
                Roundoff(type));
    }
  }
}

// A norm and a rotation, each rounded once. `kv_heads` is 0 where a layer has queries alone.
TEST(StepGpu, HeadsOfAFewShapes) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  constexpr int64_t kRows = 3, kHeads = 4, kCapacity = 6, kToken = 4;
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    for (const int64_t dim : {8, 64, 256, 260, 512}) {
      for (const int64_t kv_heads : {2, 0}) {
        for (const int norms : {0, 2, 3}) {  // of queries and keys, of values
          SCOPED_TRACE(StrCat("head_dim ", dim, ", ", kv_heads, " kv heads, ", norms, " norms, ", type));
          const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA);
          const at::TensorOptions floats = options.dtype(at::kFloat);
          const at::Tensor qkv = at::randn({kRows, kHeads + 2 * kv_heads, dim}, options);
          const at::Tensor weights = at::rand({3, dim}, floats) + 0.5, angle = at::randn({dim / 2}, floats);
          const at::Tensor cos = angle.cos(), sin = angle.sin();
          const at::Tensor queries = at::full({kRows, kHeads, dim}, NAN, options);
          const at::Tensor keys = at::full({kRows, kv_heads, kCapacity, dim}, NAN, options), values = keys.clone();
          const at::Tensor lengths = at::tensor({0, int{kToken + 1}, 0}, at::kInt).repeat({kRows, 1}).to(at::kCUDA);
          const auto to = [&](const at::Tensor& tokens) {
            return NewToken{.sinks = {},
                            .tail = ViewOf(tokens),
                            .dense = true,
                            .lengths = static_cast<const SequenceLength*>(lengths.data_ptr())};
          };
          const auto weight = [&](int of) { return of < norms ? weights[of].data_ptr<float>() : nullptr; };
          AppendArgs args;
          args.of = {.dtype = DTypeOf(type),
                     .rows = kRows,
                     .heads = kHeads,
                     .kv_heads = kv_heads,
                     .head_dim = dim,
                     .q_norm = weight(0),
                     .k_norm = weight(1),
                     .eps = 1e-5f,
                     .cos = cos.data_ptr<float>(),
                     .sin = sin.data_ptr<float>(),
                     .positions = 1,
                     .v_norm = weight(2)};
          args.queries = queries.data_ptr(), args.keys = to(keys), args.values = to(values);
          AppendHeads(args, qkv.data_ptr(), nullptr);
          const auto expect = [&](const at::Tensor& ours, int64_t first, int of, bool turns) {
            at::Tensor exact = qkv.narrow(1, first, ours.size(1)).to(at::kDouble);
            if (of < norms) exact = exact * at::rsqrt(exact.square().mean(-1, true) + 1e-5) * weights[of];
            if (turns) {
              const at::Tensor x1 = exact.narrow(2, 0, dim / 2), x2 = exact.narrow(2, dim / 2, dim / 2);
              exact = at::cat({x1 * cos - x2 * sin, x2 * cos + x1 * sin}, 2);
            }
            EXPECT_LT(RelativeError(ours, exact), 2 * Roundoff(type)) << "first head " << first;
          };
          expect(queries, 0, 0, true);
          if (kv_heads == 0) continue;
          expect(keys.select(2, kToken), kHeads, 1, true);
          expect(values.select(2, kToken), kHeads + kv_heads, 2, false);
          EXPECT_EQ(keys.isnan().sum().item<int64_t>(), keys.numel() / kCapacity * (kCapacity - 1));
          EXPECT_EQ(values.isnan().sum().item<int64_t>(), values.numel() / kCapacity * (kCapacity - 1));
        }
      }
    }
  }
}

// The activation and its product with a factor are rounded once each. Behind a product, its sum is before, which
// either activation stretches by at most 1.13, and whose norm is less than twice that of what they leave of it.
TEST(StepGpu, ActivationsOfAFewShapes) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    const std::vector<std::array<int64_t, 3>> shapes = {{1, 256, 320}, {3, 64, 128}, {2, 28, 64}};
    for (const auto& [rows, size, in] : shapes) {
      for (const Gate activation : {Gate::kSilu, Gate::kGeluTanh}) {
        for (const bool with_bias : {false, true}) {
          for (const bool with_factor : {false, true}) {
            SCOPED_TRACE(StrCat(rows, " x ", size, with_bias ? ", bias" : "", with_factor ? ", factor" : "", ", ",
                                type));
            const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA);
            const at::Tensor gate = at::randn({rows, size}, options), bias = at::randn({size}, options);
            const at::Tensor factor = at::randn({rows, size}, options), out = at::full_like(gate, NAN);
            const auto exact = [&](const at::Tensor& x) {
              const at::Tensor active =
                  activation == Gate::kSilu ? at::silu(x.to(at::kDouble)) : at::gelu(x.to(at::kDouble), "tanh");
              return with_factor ? active * factor : active;
            };
            GateArgs args = {.dtype = DTypeOf(type),
                             .rows = rows,
                             .size = size,
                             .activation = activation,
                             .bias = with_bias ? bias.data_ptr() : nullptr,
                             .out = out.data_ptr(),
                             .factor = with_factor ? factor.data_ptr() : nullptr};
            Activate(args, gate.data_ptr(), nullptr);
            EXPECT_LT(RelativeError(out, exact(with_bias ? gate + bias : gate)), 2 * Roundoff(type));
            const at::Tensor x = at::randn({rows, in}, options);
            const at::Tensor weight = at::randn({size, in}, options) / std::sqrt(static_cast<double>(in));
            ProductArgs product;
            product.dtype = DTypeOf(type), product.rows = rows, product.in = in, product.out = size;
            product.weight = weight.data_ptr(), product.x = x.data_ptr();
            product.end = ProductEnd::kActivate, product.gate = args;
            ASSERT_EQ(ProductFits(product), size % 8 == 0);
            if (size % 8 != 0) continue;
            out.fill_(NAN);
            Product(product, nullptr);
            at::Tensor sum = at::matmul(x.to(at::kDouble), weight.to(at::kDouble).t());
            if (with_bias) sum = sum + bias;
            EXPECT_LT(RelativeError(out, exact(sum)), (2 + 2 * 1.13) * Roundoff(type));
          }
        }
      }
    }
  }
}

// Embeddings with learned positions, inputs of layers, capped logits.
TEST(StepGpu, BeginningsAndEndsOfAFewShapes) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  constexpr int64_t kBatch = 3, kVocabulary = 1003, kHidden = 100, kPosition = 7;
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA), floats = options.dtype(at::kFloat);
    const at::TensorOptions longs = options.dtype(at::kLong), ints = options.dtype(at::kInt);
    const at::Tensor tokens = at::tensor({5, 1002, 77}, at::kLong).to(at::kCUDA), asked = tokens.clone();
    const at::Tensor history = at::zeros({4, kBatch}, longs), best = at::zeros({kBatch}, longs);
    const at::Tensor step = at::zeros({1}, ints), arrived = at::zeros({kBatch}, ints);
    const at::Tensor dense = at::tensor({0, int{kPosition}, 0}, at::kInt).repeat({kBatch, 1}).to(at::kCUDA);
    const at::Tensor append = at::zeros({kBatch, 3}, ints);
    StepState state;
    state.tokens = tokens.data_ptr<int64_t>(), state.history = history.data_ptr<int64_t>();
    state.step = step.data_ptr<int32_t>();
    state.dense = static_cast<SequenceLength*>(dense.data_ptr());
    state.append = static_cast<SequenceLength*>(append.data_ptr());
    state.best = static_cast<unsigned long long*>(best.data_ptr());
    state.arrived = static_cast<uint32_t*>(arrived.data_ptr());

    const at::Tensor embedding = at::randn({kVocabulary, kHidden}, options);
    const at::Tensor learned = at::randn({16, kHidden}, options), x = at::full({kBatch, kHidden}, NAN, options);
    BeginStep({.dtype = DTypeOf(type),
               .state = state,
               .batch = kBatch,
               .hidden = kHidden,
               .residual_length = 32,
               .embedding = embedding.data_ptr(),
               .x = x.data_ptr(),
               .ropes = {},
               .positions = learned.data_ptr()},
              nullptr);
    EXPECT_TRUE(x.equal(embedding.index_select(0, asked) + learned[kPosition])) << type;

    // Five roundings of at most a unit roundoff, of tensors that are no larger than the last.
    for (const int64_t size : {6, 256, 512}) {
      constexpr int64_t kLayers = 5;
      const at::Tensor table = at::randn({kVocabulary, kLayers, size}, options) / 10;
      const at::Tensor weight = at::rand({size}, floats) + 0.5;
      const at::Tensor projected = at::randn({kBatch, kLayers, size}, options);
      const at::Tensor out = at::full({kLayers, kBatch, size}, NAN, options);
      LayerInputs({.dtype = DTypeOf(type),
                   .tokens = tokens.data_ptr<int64_t>(),
                   .batch = kBatch,
                   .layers = kLayers,
                   .size = size,
                   .embedding = table.data_ptr(),
                   .projected = projected.data_ptr(),
                   .weight = weight.data_ptr<float>(),
                   .eps = 1e-5f,
                   .scale = 16,
                   .divisor = 10,
                   .out = out.data_ptr()},
                  nullptr);
      const at::Tensor state_part = projected.to(at::kDouble) / 10;
      const at::Tensor exact = (state_part * at::rsqrt(state_part.square().mean(-1, true) + 1e-5) * weight +
                                table.index_select(0, asked).to(at::kDouble) * 16) *
                               M_SQRT1_2;
      EXPECT_LT(RelativeError(out, exact.transpose(0, 1)), 5 * Roundoff(type)) << "size " << size << " " << type;
    }

    // In float32, where 16 bits would put several of the largest logits together.
    const at::Tensor logits = at::randn({kBatch, kVocabulary}, options) * 20;
    const at::Tensor capped = at::full({kBatch, kVocabulary}, NAN, floats);
    PickTokens({.dtype = DTypeOf(type),
                .state = state,
                .batch = kBatch,
                .vocabulary = kVocabulary,
                .logits = logits.data_ptr(),
                .cap = 30,
                .capped = capped.data_ptr<float>()},
               nullptr);
    EXPECT_LT(RelativeError(capped, at::tanh(logits.to(at::kDouble) / 30) * 30), 1e-6);
    EXPECT_TRUE(tokens.equal(capped.argmax(-1))) << type;
    EXPECT_TRUE(history[0].equal(tokens)) << type;
  }
}

// ---- the graph

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
                           "int2-hqq@residual=32", "int4-hqq@residual=32@layers=0-0:none"}) {
    cases.push_back({mistral, spec, 1, at::kHalf});
    cases.push_back({qwen2, spec, 2, at::kBFloat16});
    cases.push_back({qwen3, spec, 3, at::kHalf});
    cases.push_back({llama, spec, 8, at::kHalf});
    cases.push_back({odd, spec, 2, at::kHalf});
    cases.push_back({mistral, spec, 9, at::kBFloat16});  // more than own products take
  }
  for (const ModelConfig& config : {Gemma3(), Gemma4(), Gpt2(), WindowedMistral()}) {
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
                                            Gemma3(), Gemma4(), Config({"gpt2", 128, 2, 2, 64, 256}), WindowedMistral()};
  for (const ModelConfig& config : configs) {
    cases.push_back({config, "none", 3, at::kFloat});
    cases.push_back({config, "int4-hqq@residual=32@sinks=4", 2, at::kBFloat16});
  }
  const ModelConfig mistral = Config({"mistral-7b", 128, 4, 2, 128, 96});
  for (const char* spec : {"int8-hqq", "int2-hqq", "int4-quanto", "int2-quanto", "none+int4-hqq", "int8-hqq+none",
                           "int4-hqq+int2-quanto", "int4-hqq@group=32", "int4-hqq@layers=0-0:none"}) {
    cases.push_back({mistral, std::string(spec) + "@residual=32", 1, at::kFloat});
  }
  cases.push_back({mistral, "none", 1, at::kHalf});
  for (const char* spec : {"none", "int4-hqq@residual=32@sinks=4", "int8-hqq+none@residual=32"}) {
    cases.push_back({mistral, spec, 2, at::kFloat, at::kBFloat16});
    cases.push_back({mistral, spec, 2, at::kBFloat16, at::kHalf});
  }
  return cases;
}

// After the same prefill, so from the same bits, one step and then one eager step on what it left.
// A step that closes a block reads codes that came from the same bits, too.
void ExpectStepsEqualForward(const std::vector<Case>& cases, const std::vector<int64_t>& lengths, at::Device device) {
  const c10::InferenceMode guard;
  const Backend& backend = FindBackend("sdpa");
  for (const Case& c : cases) {
    const Model model = Varied(c.config, 7, c.type, device);
    const double tolerance = GraphTolerance(c.config, c.type);
    KvCache plain(ParseSpec(c.spec), model.cache_shape(c.batch), 200, c.kv_type.value_or(c.type), device, c.type);
    KvCache cache(ParseSpec(c.spec), model.cache_shape(c.batch), 200, c.kv_type.value_or(c.type), device, c.type);
    DecodeGraph graph(model, cache);
    for (const int64_t length : lengths) {
      SCOPED_TRACE(StrCat(c.text(), " after ", length, ": ", graph.kernels()));
      plain.Clear(), cache.Clear();
      Feed(model, Prompt(c.batch, length, device), plain, backend, 64);
      Feed(model, Prompt(c.batch, length, device), cache, backend, 64);
      const at::Tensor first = Prompt(c.batch, 1, device);
      const at::Tensor logits = model.Logits(model.Forward(first, plain, backend)).select(1, 0);
      const at::Tensor token = graph.Run(first, 1);
      EXPECT_LT(RelativeError(graph.logits(), logits), tolerance);
      EXPECT_TRUE(token.equal(graph.logits().argmax(-1, /*keepdim=*/true)));
      EXPECT_EQ(cache.length(), length + 1);
      const at::Tensor after = model.Logits(model.Forward(token, plain, backend));
      EXPECT_LT(RelativeError(model.Logits(model.Forward(token, cache, backend)), after), tolerance);
    }
  }
}

TEST(DecodeGraphGpu, StepsEqualForward) {
  KVQ_NEEDS_CUDA();
  ExpectStepsEqualForward(Cases(), {1, 3, 4, 5, 32, 33, 36, 37, 100, 164}, at::kCUDA);
}
TEST(DecodeGraph, StepsOnACpuEqualForward) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  ExpectStepsEqualForward(HostCases(), {1, 36, 70}, at::kCPU);
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
      if (keys.encoded == nullptr || EncodedTokens(spec, cache.length()) == before) continue;
      EncodedTensors fresh =
          AllocateEncoded(*keys.codec, keys.params, c.batch, shape.kv_heads, shape.head_dim,
                          keys.encoded->tokens, keys.encoded->block_tokens, device);
      EncodeTensor(*keys.codec, keys.params, residual, before, fresh);
      for (size_t plane = 0; plane < fresh.planes.size(); ++plane) {
        const int64_t bytes = fresh.planes[plane].size(1) / keys.encoded->tokens;  // a token
        const auto block = [&](const at::Tensor& x) {
          return x.narrow(1, before * bytes, spec.residual_length * bytes);
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
                           GraphTolerance(model.config(), model.dtype()) *
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
  for (const ModelConfig& config : {Gemma3(), Gemma4(), Gpt2(), WindowedMistral()}) {
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
