// Kernels of a decoding step against float64.
#include <ATen/ATen.h>

#include <array>
#include <cmath>

#include "accuracy/golden.h"
#include "accuracy/mixture.h"
#include "accuracy/relative_error.h"
#include "fixtures/cache/codec_tensors.h"
#include "kernels/device/step.cuh"
#include "kernels/runtime/captured_graph.h"
#include "kernels/runtime/launch.h"
#include "kernels/scheme.h"

namespace kvq {
namespace {

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

// Around every multiple, by reciprocals that are off by as much as a card's may be.
TEST(Step, QuotientsAreThoseOfWholeNumbers) {
  for (int of = 1; of <= 6000; of = of < 300 ? of + 1 : of + 61) {
    const float exact = 1.0f / static_cast<float>(of), below = std::nextafter(exact, 0.0f), above = std::nextafter(exact, 2.0f);
    for (const float reciprocal : {std::nextafter(below, 0.0f), below, exact, above, std::nextafter(above, 2.0f)}) {
      for (int multiple = 0; multiple < 1 << 20; multiple += of) {
        for (const int n : {multiple - 1, multiple, multiple + of / 2}) {
          if (n < 0 || n >= 1 << 20) continue;
          ASSERT_EQ(step::Quotient(n, reciprocal), n / of) << n << " / " << of;
        }
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
  ExpectProductsEqualFloat64({{8, 64}, {200, 576}, {2048, 4096}, {5120, 2048}});
}

// Of sizes whose x is kept in registers, and of others. Rounded are what is multiplied and what comes out.
TEST(StepGpu, ProductsNormWhatTheyReadOfAFewShapes) {  // under a sanitizer
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(24);
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    for (const auto& [out, in] : std::vector<std::pair<int64_t, int64_t>>{{5120, 2048}, {128, 2048}, {2048, 4096}, {24, 192}}) {
      SCOPED_TRACE(StrCat("weight ", out, " x ", in, ", ", type));
      const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA), floats = options.dtype(at::kFloat);
      const at::Tensor weight = at::randn({out, in}, options) / std::sqrt(static_cast<double>(in)), x = at::randn({1, in}, options);
      const at::Tensor partial = at::randn({2, 1, in}, floats), of_norm = at::rand({in}, floats) + 0.5;
      const at::Tensor sum = at::full_like(x, NAN), normed = at::full_like(x, NAN), stored = at::full({1, out}, NAN, options);
      ProductArgs args;
      args.dtype = DTypeOf(type), args.rows = 1, args.in = in, args.out = out;
      args.weight = weight.data_ptr(), args.stored = stored.data_ptr();
      args.normalizes = args.writes_normed = true;
      args.norm = {.dtype = DTypeOf(type), .rows = 1, .size = in, .x = x.data_ptr(), .partial = partial.data_ptr<float>(), .splits = 2,
                   .sum = sum.data_ptr(), .weight = of_norm.data_ptr<float>(), .eps = 1e-5f, .out = normed.data_ptr()};
      ASSERT_TRUE(ProductFits(args));
      Product(args, nullptr);
      EXPECT_TRUE(sum.equal(x + (partial[0] + partial[1]).to(type)));
      const at::Tensor exact = sum.to(at::kDouble);
      const at::Tensor exact_normed = exact * at::rsqrt(exact.square().mean(-1, true) + 1e-5) * of_norm;
      EXPECT_LT(RelativeError(normed, exact_normed), Roundoff(type));
      EXPECT_LT(RelativeError(stored, at::matmul(exact_normed, weight.to(at::kDouble).t())), 2 * Roundoff(type));
    }
  }
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
          const int64_t turned = norms == 2 || dim == 8 ? dim : dim / 4 / 4 * 4;  // of the others a part
          SCOPED_TRACE(StrCat("head_dim ", dim, ", ", turned, " turned, ", kv_heads, " kv heads, ", norms, " norms, ", type));
          const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA);
          const at::TensorOptions floats = options.dtype(at::kFloat);
          const at::Tensor qkv = at::randn({kRows, kHeads + 2 * kv_heads, dim}, options);
          const at::Tensor weights = at::rand({3, dim}, floats) + 0.5, angle = at::randn({turned / 2}, floats);
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
                     .v_norm = weight(2),
                     .turned = turned};
          args.queries = queries.data_ptr(), args.keys = to(keys), args.values = to(values);
          AppendHeads(args, qkv.data_ptr(), nullptr);
          const auto expect = [&](const at::Tensor& ours, int64_t first, int of, bool turns) {
            at::Tensor exact = qkv.narrow(1, first, ours.size(1)).to(at::kDouble);
            if (of < norms) exact = exact * at::rsqrt(exact.square().mean(-1, true) + 1e-5) * weights[of];
            if (turns) {
              const at::Tensor x1 = exact.narrow(2, 0, turned / 2), x2 = exact.narrow(2, turned / 2, turned / 2);
              exact = at::cat({x1 * cos - x2 * sin, x2 * cos + x1 * sin, exact.narrow(2, turned, dim - turned)}, 2);
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
      for (const Gate activation : {Gate::kSilu, Gate::kGeluTanh, Gate::kClamped}) {
        for (const bool with_bias : {false, true}) {
          for (const bool with_factor : {false, true}) {
            SCOPED_TRACE(StrCat(rows, " x ", size, with_bias ? ", bias" : "", with_factor ? ", factor" : "", ", ",
                                type));
            const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA);
            const double wide = activation == Gate::kClamped ? 4 : 1;  // some reach its limits
            const at::Tensor gate = at::randn({rows, size}, options) * wide, bias = at::randn({size}, options);
            const at::Tensor factor = at::randn({rows, size}, options) * wide, out = at::full_like(gate, NAN);
            const auto exact = [&](const at::Tensor& x16) {
              const at::Tensor x = x16.to(at::kDouble), limited = x.clamp_max(7);
              const at::Tensor active = activation == Gate::kSilu      ? at::silu(x)
                                        : activation == Gate::kClamped ? limited * at::sigmoid(limited * 1.702)
                                                                       : at::gelu(x, "tanh");
              if (!with_factor) return active;
              return active * (activation == Gate::kClamped ? factor.to(at::kDouble).clamp(-7, 7) + 1 : factor);
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

// Rounded are both halves of the first product, the activation and its product with a factor. What the first do is up to 1.13
// times as much behind the activation, and in the norm less than twice that of what is left.
void ExpectMixture(const Mixture& mixture, const char* what) {
  const at::ScalarType type = mixture.x.scalar_type();
  SCOPED_TRACE(StrCat(what, ": ", mixture.rows, " rows of ", mixture.hidden, ", ", mixture.per_token, " of ", mixture.experts,
                      " experts of ", mixture.size, ", ", type));
  ASSERT_TRUE(ExpertsFit(mixture.args()));
  const auto run = [&] { ExpertsUp(mixture.args(), nullptr), ExpertsDown(mixture.args(), nullptr); };
  run();
  EXPECT_LT(RelativeError(mixture.partial, mixture.Exact()), (2 + 4 * 1.13) * Roundoff(type));
  EXPECT_TRUE(std::get<0>(mixture.chosen.to(at::kLong).sort(-1)).equal(std::get<0>(mixture.Chosen().sort(-1))));
  const at::Tensor first = mixture.partial.clone();
  mixture.partial.fill_(NAN), mixture.gated.fill_(NAN);
  run();
  EXPECT_TRUE(mixture.partial.equal(first)) << "the same bits again";
  const bool each_once = mixture.rows <= 8 && mixture.hidden % 64 == 0 && mixture.size % 64 == 0;
  const int64_t distinct = std::get<0>(at::_unique(mixture.Chosen())).numel();
  if (each_once || mixture.rows == 1) {
    EXPECT_EQ(mixture.reads.item<int64_t>(), 2 * distinct);
  }
}
TEST(StepGpu, ExpertsOfAFewShapes) {  // under a sanitizer
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(17);
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA);
    for (const bool normalized : {false, true}) {
      for (const int64_t rows : {1, 2, 3, 8, 9, 11}) {
        ExpectMixture(Mixture(rows, 128, 64, 16, 3, normalized, options), "units of one tile");
        ExpectMixture(Mixture(rows, 512, 192, 40, 6, normalized, options), "several");
        ExpectMixture(Mixture(rows, 36, 20, 5, 2, normalized, options), "odd sizes");
        ExpectMixture(Mixture(rows, 64, 128, 1, 1, normalized, options), "one expert");
        ExpectMixture(Mixture(rows, 512, 192, 40, 6, normalized, options).WithBiases(), "biases");
        ExpectMixture(Mixture(rows, 36, 20, 5, 2, normalized, options).WithBiases(), "odd sizes, biases");
      }
    }
    // Equal logits: the first ones; NaN: no more experts than were asked for.
    Mixture equal(4, 128, 64, 70, 5, true, options);
    equal.logits.zero_();
    equal.logits[1].narrow(0, 30, 40).fill_(-0.0), equal.logits[2].copy_(equal.logits[2] + 1), equal.logits[3].narrow(0, 50, 3).fill_(2);
    ExpectMixture(equal, "equal logits");
    for (const int64_t experts : {70, 131, 140}) {  // one row of few experts is chosen for in another way than others
      Mixture row(1, 128, 64, experts, 5, true, options);
      row.logits.zero_(), row.logits[0].narrow(0, 30, 40).fill_(-0.0), row.logits[0].narrow(0, 60, 3).fill_(2);
      ExpectMixture(row, "equal logits");
    }
    for (const int64_t rows : {1, 2}) {
      Mixture broken(rows, 128, 64, 70, 5, false, options);
      broken.logits.fill_(NAN);
      ExpertsUp(broken.args(), nullptr), ExpertsDown(broken.args(), nullptr);
      EXPECT_TRUE(broken.partial.isnan().all().item<bool>());
      EXPECT_EQ(broken.reads.item<int64_t>(), 5);
    }
  }
}
// Qwen3-30B-A3B's, gpt-oss's and Mixtral's.
TEST(StepGpu, ExpertsOfPublishedShapes) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(18);
  const at::TensorOptions options = at::TensorOptions(at::kBFloat16).device(at::kCUDA);
  for (const int64_t rows : {1, 2, 8}) {
    ExpectMixture(Mixture(rows, 2048, 768, 128, 8, true, options), "qwen3-30b-a3b");
    ExpectMixture(Mixture(rows, 2880, 2880, 32, 4, true, options).WithBiases(), "gpt-oss-20b");
    ExpectMixture(Mixture(rows, 4096, 14336, 8, 2, true, options), "mixtral-8x7b");
  }
}

// Where a step of Qwen3-30B-A3B's shape spends its time: microseconds a layer of each kernel alone and of chains of them, in a
// graph over layers that no cache holds. Measures; it cannot fail.
TEST(StepGpu, DISABLED_TimesOfQwen3Moe) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  constexpr int64_t kLayers = 16, kHidden = 2048, kHeads = 32, kKvHeads = 4, kDim = 128, kTokens = 4096;
  const at::TensorOptions options = at::TensorOptions(at::kHalf).device(at::kCUDA), floats = options.dtype(at::kFloat);
  const auto weight = [&](int64_t out, int64_t in) { return at::randn({out, in}, options) / std::sqrt(static_cast<double>(in)); };
  const Codec& codec = FindScheme("none").keys;
  struct Weights {
    at::Tensor qkv, o, router, keys, values;
    Mixture mixture;
  };
  std::vector<Weights> layers;
  for (int64_t i = 0; i < kLayers; ++i) {
    layers.push_back({weight((kHeads + 2 * kKvHeads) * kDim, kHidden), weight(kHidden, kHeads * kDim), weight(128, kHidden),
                      at::randn({1, kKvHeads, kTokens + 64, kDim}, options), at::randn({1, kKvHeads, kTokens + 64, kDim}, options),
                      Mixture(1, kHidden, 768, 128, 8, true, options)});
  }
  const at::Tensor x = at::randn({1, kHidden}, options), sum = at::empty_like(x), normed = at::empty_like(x);
  const at::Tensor partial = at::zeros({4, kHidden}, floats), ones = at::ones({kHidden}, floats);
  const at::Tensor qkv = at::zeros({(kHeads + 2 * kKvHeads) * kDim}, options), queries = at::zeros({kHeads * kDim}, options), attended = at::zeros_like(queries);
  const at::Tensor lengths = at::tensor({0, int{kTokens}, 0}, at::kInt).to(at::kCUDA), cos = at::ones({kDim / 2}, floats), sin = at::zeros_like(cos);
  const auto product = [&](const at::Tensor& w, const at::Tensor& from, ProductEnd end) {
    ProductArgs args;
    args.dtype = DType::kFloat16, args.rows = 1, args.out = w.size(0), args.in = w.size(1), args.weight = w.data_ptr();
    args.x = from.data_ptr(), args.end = end, args.partial = partial.data_ptr<float>();
    if (end == ProductEnd::kPartial) return args;
    args.normalizes = true;
    args.norm = {.dtype = DType::kFloat16, .rows = 1, .size = kHidden, .x = x.data_ptr(), .partial = partial.data_ptr<float>(), .splits = 1,
                 .sum = sum.data_ptr(), .weight = ones.data_ptr<float>(), .eps = 1e-6f, .out = normed.data_ptr()};
    return args;
  };
  const auto token = [&](const at::Tensor& tokens) {
    return NewToken{.sinks = {}, .tail = ViewOf(tokens), .dense = true, .lengths = static_cast<const SequenceLength*>(lengths.data_ptr())};
  };
  const HeadsArgs heads = {.dtype = DType::kFloat16, .rows = 1, .heads = kHeads, .kv_heads = kKvHeads, .head_dim = kDim, .q_norm = ones.data_ptr<float>(),
                           .k_norm = ones.data_ptr<float>(), .eps = 1e-6f, .cos = cos.data_ptr<float>(), .sin = sin.data_ptr<float>()};
  at::Tensor workspace;
  const auto run = [&](const std::string& kernel, const Weights& layer, void* stream) {
    if (kernel == "qkv") {
      ProductArgs args = product(layer.qkv, x, ProductEnd::kStore);
      args.stored = qkv.data_ptr();
      Product(args, stream);
    } else if (kernel == "heads") {
      AppendArgs args;
      args.of = heads, args.queries = queries.data_ptr(), args.keys = token(layer.keys), args.values = token(layer.values);
      AppendHeads(args, qkv.data_ptr(), stream);
    } else if (kernel == "attention" || kernel == "heads+attention") {
      DecodeAttentionArgs args;
      if (kernel != "attention") args.made_of = qkv.data_ptr(), args.heads = heads;
      args.query_heads = kHeads, args.queries = queries.data_ptr(), args.out = attended.data_ptr();
      args.scale = 0.088f, args.early = true, args.lengths = static_cast<const SequenceLength*>(lengths.data_ptr());
      for (const auto& [view, tokens] : {std::pair(&args.keys, &layer.keys), std::pair(&args.values, &layer.values)}) {
        view->batch = 1, view->heads = kKvHeads, view->head_dim = kDim, view->capacity = tokens->size(2);
        view->planes[0] = static_cast<std::byte*>(tokens->data_ptr()), view->plane_stride[0] = tokens->stride(1) * 2;
      }
      args.residual_keys = ViewOf(layer.keys), args.residual_values = ViewOf(layer.values);
      if (!workspace.defined()) workspace = at::zeros({DecodeAttentionWorkspace(codec, codec, args)}, options.dtype(at::kByte));
      args.workspace = workspace.data_ptr();
      DecodeAttention(codec, codec, args, stream);
    } else if (kernel == "o") {
      Product(product(layer.o, attended, ProductEnd::kPartial), stream);
    } else if (kernel == "router") {
      ProductArgs args = product(layer.router, x, ProductEnd::kStore);
      args.stored = layer.mixture.logits.data_ptr(), args.writes_normed = true;
      Product(args, stream);
    } else {
      ExpertsArgs args = layer.mixture.args();
      args.x = normed.data_ptr(), args.partial = partial.data_ptr<float>();
      kernel == "up" ? ExpertsUp(args, stream) : ExpertsDown(args, stream);
    }
  };
  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin), "event"), Check(cudaEventCreate(&end), "event");
  const auto time = [&](const std::vector<std::string>& kernels) {
    const auto work = [&] {
      for (const Weights& layer : layers) {
        for (const std::string& kernel : kernels) run(kernel, layer, stream);
      }
    };
    CapturedGraph graph;
    Check(cudaDeviceSynchronize(), "before");
    graph.Rehearse(work);
    Check(cudaStreamSynchronize(stream), "rehearsal");
    graph.Capture(stream, work);
    std::vector<float> all;
    for (int i = 0; i < 21; ++i) {
      Check(cudaEventRecord(begin, stream), "event");
      graph.Launch();
      Check(cudaEventRecord(end, stream), "event"), Check(cudaEventSynchronize(end), "event");
      float ms = 0;
      Check(cudaEventElapsedTime(&ms, begin, end), "event");
      all.push_back(ms);
    }
    std::ranges::sort(all);
    double bytes = 0;
    std::string text;
    for (const std::string& kernel : kernels) {
      const Weights& layer = layers[0];
      text += (text.empty() ? "" : " ") + kernel;
      bytes += kernel == "qkv" ? layer.qkv.nbytes() : kernel == "o" ? layer.o.nbytes() : kernel == "router" ? layer.router.nbytes()
               : kernel == "up" ? layer.mixture.up.nbytes() / 16 : kernel == "down" ? layer.mixture.down.nbytes() / 16
               : kernel.ends_with("attention") ? 4 * kKvHeads * kDim * kTokens : 0;
    }
    const double us = all[10] * 1e3 / kLayers;
    printf("%-44s %7.2f us a layer, %6.1f MB, %5.2f TB/s\n", text.c_str(), us, bytes / 1e6, bytes / us / 1e6);
  };
  for (const char* kernel : {"qkv", "heads", "attention", "heads+attention", "o", "router", "up", "down"}) time({kernel});
  time({"qkv", "heads"}), time({"qkv", "heads", "attention"}), time({"qkv", "heads", "attention", "o"});
  time({"qkv", "heads+attention"}), time({"qkv", "heads+attention", "o"});
  time({"o", "router"}), time({"router", "up"}), time({"up", "down"}), time({"o", "router", "up"}), time({"o", "router", "up", "down"});
  time({"down", "qkv"}), time({"qkv", "heads", "attention", "o", "router", "up", "down"});
  time({"qkv", "heads+attention", "o", "router", "up", "down"});
  Check(cudaEventDestroy(begin), "event"), Check(cudaEventDestroy(end), "event"), Check(cudaStreamDestroy(stream), "stream");
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

}  // namespace
}  // namespace kvq
