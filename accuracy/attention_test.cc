// Attention backends against each other: float32 on a CPU is the reference.
#include "fixtures/attention.h"

#include <array>
#include <cmath>
#include <limits>
#include <map>

#include "accuracy/golden.h"
#include "kernels/error.h"

namespace kvq {
namespace {

// By its formula in float64, of two query heads a KV head. A chunk of 0 is none.
at::Tensor Reference(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, const AttentionParams& params,
                     int64_t chunk = 0) {
  const int64_t n = queries.size(2), length = keys.size(2), window = params.sliding_window;
  const auto wide = [](const at::Tensor& x) { return x.to(at::kDouble).repeat_interleave(2, 1); };
  at::Tensor scores = at::matmul(queries.to(at::kDouble), wide(keys).transpose(2, 3)) * params.scale;
  if (params.softcap > 0) scores = at::tanh(scores / params.softcap) * params.softcap;
  const at::Tensor of = at::arange(n).unsqueeze(1) + (length - n), seen = at::arange(length).unsqueeze(0);
  at::Tensor hidden = seen > of;
  if (window > 0) hidden = hidden | (seen <= of - window);
  if (chunk > 0) hidden = hidden | (seen.floor_divide(chunk) < of.floor_divide(chunk));
  const at::Tensor terms = at::exp(scores.masked_fill(hidden, -std::numeric_limits<double>::infinity()));
  at::Tensor sum = terms.sum(-1, /*keepdim=*/true);
  if (params.sink_logits.defined()) sum = sum + at::exp(params.sink_logits.to(at::kDouble)).view({1, -1, 1, 1});
  return at::matmul(terms / sum, wide(values));
}

double ErrorOf(const at::Tensor& ours, const at::Tensor& reference) {
  return ((ours.cpu().to(at::kDouble) - reference).norm() / reference.norm()).item<double>();
}

const std::vector<std::array<int64_t, 3>> kLengthsAndWindows = {{1, 90, 0}, {37, 37, 0}, {37, 37, 16}, {37, 90, 16}, {130, 200, 0}};

// A cap on scores, and that each backend says who computed it.
TEST(Attention, EveryBackendCapsScores) {
  const c10::InferenceMode guard;
  at::manual_seed(3);
  constexpr double kScale = 0.25, kCap = 1.5;
  for (const auto& [n, length, window] : kLengthsAndWindows) {
    const at::Tensor queries = at::randn({2, 4, n, 64}), keys = at::randn({2, 2, length, 64}), values = at::randn({2, 2, length, 64});
    const at::Tensor reference = Reference(queries, keys, values, {kScale, window, kCap});
    for (const char* name : {"eager", "sdpa", "fused", "sage"}) {
      SCOPED_TRACE(StrCat(name, " ", n, " of ", length, " window ", window));
      const Backend& backend = FindBackend(name);
      // Sums of at most 200 terms in float32.
      EXPECT_LT(ErrorOf(backend.attend(queries, keys, values, {kScale, window, kCap}), reference), 1e-5);
      EXPECT_EQ(RanText(backend, StrCat(name, " on decoded tokens")),
                backend.ran != nullptr ? "eager (a cap on scores) on decoded tokens" : "eager on decoded tokens");
      EXPECT_EQ(RanText(backend, "sdpa"), "sdpa") << "asked again";
      backend.attend(queries, keys, values, {kScale, window, kCap});
      EXPECT_EQ(RanText(backend, "fused_decode_16bit, own products"), "fused_decode_16bit, own products") << "what a graph ran";
    }
  }
}

// A term of the softmax that has a logit and no value, small beside the others or most of them, and who computed it. On a GPU in
// 16 bits: the probabilities and the output, rounded before and behind the factor.
TEST(Attention, EveryBackendKnowsALogitWithoutAValue) {
  const c10::InferenceMode guard;
  at::manual_seed(4);
  constexpr double kScale = 0.125;
  const at::Tensor sinks = at::tensor({-3.f, 0.5f, 4.f, 9.f});
  const std::map<std::string, std::string> on_cpu = {
      {"eager", "eager"}, {"sdpa", "sdpa"}, {"fused", "sdpa"}, {"sage", "sdpa (a logit without a value)"}};
  for (const auto& [n, length, window] : kLengthsAndWindows) {
    const at::Tensor queries = at::randn({2, 4, n, 64}), keys = at::randn({2, 2, length, 64}), values = at::randn({2, 2, length, 64});
    const at::Tensor reference = Reference(queries, keys, values, {kScale, window, 0, sinks});
    for (const auto& [name, ran] : on_cpu) {
      SCOPED_TRACE(StrCat(name, " ", n, " of ", length, " window ", window));
      const Backend& backend = FindBackend(name);
      EXPECT_LT(ErrorOf(backend.attend(queries, keys, values, {kScale, window, 0, sinks}), reference), 1e-5);
      if (name != "sage" || (n >= 128 && window == 0)) {
        EXPECT_EQ(RanText(backend, backend.ran != nullptr && name != "sage" ? "sdpa" : name), ran);
      } else {
        RanText(backend, "");
      }
      if (!at::hasCUDA() || name == "eager") continue;  // which rounds scores
      const auto half = [](const at::Tensor& x) { return x.to(at::kCUDA, at::kHalf); };
      const at::Tensor there = backend.attend(half(queries), half(keys), half(values), {kScale, window, 0, sinks.to(at::kCUDA)});
      EXPECT_LT(ErrorOf(there, reference), 4 * 0x1p-11) << "on a GPU";
      RanText(backend, "");
    }
  }
}

// A token sees those of its own chunk, in calls that begin within one, end within another or lie in one.
TEST(Attention, ChunksHideWhatLiesBeforeThem) {
  const c10::InferenceMode guard;
  at::manual_seed(5);
  for (const auto& [n, length, chunk] : std::vector<std::array<int64_t, 3>>{
           {90, 90, 16}, {37, 90, 16}, {1, 90, 16}, {1, 97, 16}, {5, 90, 16}, {37, 90, 100}, {33, 64, 32}}) {
    const at::Tensor queries = at::randn({2, 4, n, 64}), keys = at::randn({2, 2, length, 64}), values = at::randn({2, 2, length, 64});
    for (const char* name : {"eager", "sdpa"}) {
      SCOPED_TRACE(StrCat(name, " ", n, " of ", length, " in chunks of ", chunk));
      const at::Tensor attended = AttendInChunks(FindBackend(name), queries, keys, values, {0.125}, chunk, length);
      EXPECT_LT(ErrorOf(attended, Reference(queries, keys, values, {0.125}, chunk)), 1e-5);
      const auto newest = [&](const at::Tensor& x) { return x.narrow(2, std::max<int64_t>(length - n - chunk + 1, 0), std::min(n + chunk - 1, length)); };
      EXPECT_TRUE(AttendInChunks(FindBackend(name), queries, newest(keys), newest(values), {0.125}, chunk, length).equal(attended));
    }
  }
}

// The last n tokens of `length`, with and without a window, through every path that a backend may
// take. Rounded once each to 16 bits: the probabilities, the output, and where two parts are merged
// theirs. Errors of at most a unit roundoff each that add up in squares.
TEST(AttentionGpu, LastQueriesSeeWhatTheyMay) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  struct Shape {
    int64_t n, length, window, heads, kv_heads, head_dim;
  };
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    const double roundoff = type == at::kHalf ? 0x1p-11 : 0x1p-8;
    for (const Shape& s : std::vector<Shape>{{1, 900, 0, 8, 2, 128},
                                             {37, 37, 0, 8, 2, 128},
                                             {37, 900, 0, 8, 2, 128},
                                             {600, 1300, 0, 8, 2, 128},
                                             {513, 1027, 0, 7, 1, 64},
                                             {512, 1024, 0, 4, 4, 128},
                                             {600, 1300, 200, 8, 2, 128},
                                             {600, 1300, 0, 2, 1, 256},
                                             {37, 900, 64, 8, 2, 64},
                                             {20, 90, 0, 4, 2, 8},
                                             {20, 90, 16, 4, 2, 4}}) {
      SCOPED_TRACE(StrCat(s.n, " of ", s.length, " window ", s.window, " heads ", s.heads, "/",
                          s.kv_heads, " dim ", s.head_dim, " ", type));
      const at::TensorOptions options = at::TensorOptions(type).device(at::kCUDA);
      // Queries as the decoder has them, a part of a larger tensor; keys and values with room
      // behind them.
      const at::Tensor queries = at::randn({2, s.n, s.heads + 3, s.head_dim}, options)
                                     .narrow(2, 0, s.heads)
                                     .transpose(1, 2);
      const at::Tensor keys =
          at::randn({2, s.kv_heads, s.length + 9, s.head_dim}, options).narrow(2, 0, s.length);
      const at::Tensor values =
          at::randn({2, s.kv_heads, s.length + 9, s.head_dim}, options).narrow(2, 0, s.length);
      const AttentionParams params{1 / std::sqrt(static_cast<double>(s.head_dim)), s.window};
      const auto exact = [](const at::Tensor& x) { return x.cpu().to(at::kFloat); };
      const at::Tensor reference =
          FindBackend("eager").attend(exact(queries), exact(keys), exact(values), params);
      for (const char* backend : {"sdpa", "fused"}) {
        const at::Tensor ours = exact(FindBackend(backend).attend(queries, keys, values, params));
        ASSERT_EQ(ours.sizes(), reference.sizes());
        EXPECT_LT(((ours - reference).norm() / reference.norm()).item<double>(),
                  std::sqrt(3.0) * roundoff)
            << backend;
      }
    }
  }
}

}  // namespace
}  // namespace kvq
