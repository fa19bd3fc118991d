// Kernels of a decoding step against float64, and the graph they make against Model::Forward.
#include "fixtures/decode_graph.h"

#include <ATen/ATen.h>

#include <cmath>

#include "accuracy/golden.h"
#include "fixtures/machine/gpu_memory.h"
#include "fixtures/machine/out_of_memory.h"
#include "kernels/error.h"
#include "kernels/device/step.h"

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

std::string RefusalOf(const Model& model, const std::string& spec) {
  KvCache cache(ParseSpec(spec), model.cache_shape(1), 64, model.dtype(), model.device());
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
  says(golden("mistral-window"), "sliding windows");
  says(golden("gpt2"), "LayerNorm");
  says(golden("gemma3-dim256"), "norms behind attention");
  says(golden("gemma4-shared"), "inputs of every layer");
  says(golden("llama-mha", "none", at::kFloat), "float16 and bfloat16");
  says(golden("llama-mha"), "needs a GPU");
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
        ASSERT_TRUE(ProductFits(args) || rows * in > 100000) << "x fits into shared memory";
        if (ProductFits(args)) {
          Product(args, nullptr);
          EXPECT_LT(RelativeError(stored, exact), Roundoff(type));
        }
        args.end = ProductEnd::kPartial;
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

// ---- the graph

struct Case {
  Cut cut;
  std::string spec;
  int64_t batch;
  at::ScalarType type;
};

std::vector<Case> Cases() {
  const Cut mistral{"mistral-7b", 512, 8, 2, 128, 1024}, qwen2{"qwen2-7b", 448, 7, 1, 64, 640};
  const Cut qwen3{"qwen3-8b", 256, 4, 1, 128, 320}, llama{"llama-3.1-8b", 256, 4, 4, 64, 512};
  const Cut odd{"llama-3.1-8b", 264, 4, 2, 64, 520};  // no own product: hidden is no multiple of 64
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
  return cases;
}

at::Tensor Prompt(int64_t batch, int64_t n) {
  return at::remainder(at::arange(batch * n, at::kLong) * 7919 + 13, 1000)
      .view({batch, n})
      .to(at::kCUDA);
}

// After the same prefill, so from the same bits, one step and then one eager step on what it left.
// Both paths round some twelve tensors a layer in the same places, after sums in another order:
// independent errors of at most a unit roundoff each, in both. A step that closes a block reads
// codes that came from the same bits, too.
TEST(DecodeGraphGpu, StepsEqualForward) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  const Backend& backend = FindBackend("sdpa");
  for (const Case& c : Cases()) {
    const Model model(Config(c.cut), Weights::Random(7, c.type, at::kCUDA));
    const double tolerance = Roundoff(c.type) * std::sqrt(2 * 12.0 * 3);
    KvCache plain(ParseSpec(c.spec), model.cache_shape(c.batch), 200, c.type, at::kCUDA);
    KvCache cache(ParseSpec(c.spec), model.cache_shape(c.batch), 200, c.type, at::kCUDA);
    DecodeGraph graph(model, cache);
    for (const int64_t length : {1, 3, 4, 5, 32, 33, 36, 37, 100, 164}) {
      SCOPED_TRACE(StrCat(c.cut.shape, " ", c.cut.hidden, " ", c.spec, " batch ", c.batch, " ",
                          c.type, " after ", length, ": ", graph.kernels()));
      plain.Clear(), cache.Clear();
      Feed(model, Prompt(c.batch, length), plain, backend, 64);
      Feed(model, Prompt(c.batch, length), cache, backend, 64);
      const at::Tensor first = Prompt(c.batch, 1);
      const at::Tensor logits = model.Logits(model.Forward(first, plain, backend)).select(1, 0);
      const at::Tensor token = graph.Run(first, 1);
      EXPECT_LT(RelativeError(graph.logits(), logits), tolerance);
      EXPECT_TRUE(token.equal(graph.logits().argmax(-1, /*keepdim=*/true)));
      EXPECT_EQ(cache.length(), length + 1);
      const at::Tensor after = model.Logits(model.Forward(token, plain, backend));
      EXPECT_LT(RelativeError(model.Logits(model.Forward(token, cache, backend)), after),
                tolerance);
    }
  }
}

// Many steps at once are the same bits as one at a time, and blocks are encoded as the codec
// encodes them.
TEST(DecodeGraphGpu, RunsOnAndEncodesFullBlocks) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  for (const Case& c : Cases()) {
    SCOPED_TRACE(StrCat(c.cut.shape, " ", c.spec, " batch ", c.batch));
    const Spec spec = ParseSpec(c.spec);
    const Model model(Config(c.cut), Weights::Random(7, c.type, at::kCUDA));
    KvCache cache(spec, model.cache_shape(c.batch), 200, c.type, at::kCUDA);
    DecodeGraph graph(model, cache);
    const auto prefill = [&] {
      cache.Clear();
      Feed(model, Prompt(c.batch, 40), cache, FindBackend("sdpa"), 40);
    };
    prefill();
    const at::Tensor at_once = graph.Run(Prompt(c.batch, 1), 100);
    prefill();
    at::Tensor token = Prompt(c.batch, 1);
    const int64_t last = 2;  // layer
    for (int64_t i = 0; i < 100; ++i) {
      const int64_t before = EncodedTokens(spec, cache.length());
      const SideStorage keys = cache.storage(last).first;
      const at::Tensor residual = keys.residual.defined() ? keys.residual.clone() : at::Tensor();
      token = graph.Run(token, 1);
      ASSERT_TRUE(token.equal(at_once.narrow(1, i, 1))) << "step " << i;
      if (keys.encoded == nullptr || EncodedTokens(spec, cache.length()) == before) continue;
      EncodedTensors fresh =
          AllocateEncoded(*keys.codec, keys.params, c.batch, c.cut.kv_heads, c.cut.head_dim,
                          keys.encoded->tokens, keys.encoded->block_tokens, at::kCUDA);
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
      const double error = 6 * Roundoff(model.dtype()) *
                           std::sqrt(24.0 * static_cast<double>(model.layers().size())) *
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
}

}  // namespace
}  // namespace kvq
