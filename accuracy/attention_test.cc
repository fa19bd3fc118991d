// Attention backends against each other: float32 on a CPU is the reference.
#include "fixtures/attention.h"

#include <array>
#include <cmath>
#include <limits>

#include "accuracy/golden.h"
#include "kernels/error.h"

namespace kvq {
namespace {

// A cap on scores, by its formula in float64, and that each backend says who computed it.
TEST(Attention, EveryBackendCapsScores) {
  const c10::InferenceMode guard;
  at::manual_seed(3);
  constexpr double kScale = 0.25, kCap = 1.5;
  for (const auto& [n, length, window] : std::vector<std::array<int64_t, 3>>{{1, 90, 0}, {37, 37, 0}, {37, 90, 16}, {130, 200, 0}}) {
    const at::Tensor queries = at::randn({2, 4, n, 64}), keys = at::randn({2, 2, length, 64}), values = at::randn({2, 2, length, 64});
    const auto wide = [](const at::Tensor& x) { return x.to(at::kDouble).repeat_interleave(2, 1); };
    at::Tensor scores = at::tanh(at::matmul(queries.to(at::kDouble), wide(keys).transpose(2, 3)) * kScale / kCap) * kCap;
    const at::Tensor of = at::arange(n).unsqueeze(1) + (length - n), seen = at::arange(length).unsqueeze(0);
    at::Tensor hidden = seen > of;
    if (window > 0) hidden = hidden | (seen <= of - window);
    scores = scores.masked_fill(hidden, -std::numeric_limits<double>::infinity());
    const at::Tensor reference = at::matmul(at::softmax(scores, -1), wide(values));
    for (const char* name : {"eager", "sdpa", "fused", "sage"}) {
      SCOPED_TRACE(StrCat(name, " ", n, " of ", length, " window ", window));
      const Backend& backend = FindBackend(name);
      const at::Tensor ours = backend.attend(queries, keys, values, {kScale, window, kCap}).to(at::kDouble);
      // Sums of at most 200 terms in float32.
      EXPECT_LT(((ours - reference).norm() / reference.norm()).item<double>(), 1e-5);
      EXPECT_EQ(RanText(backend, StrCat(name, " on decoded tokens")),
                backend.ran != nullptr ? "eager (a cap on scores) on decoded tokens" : "eager on decoded tokens");
      EXPECT_EQ(RanText(backend, "sdpa"), "sdpa") << "asked again";
      backend.attend(queries, keys, values, {kScale, window, kCap});
      EXPECT_EQ(RanText(backend, "fused_decode_16bit, own products"), "fused_decode_16bit, own products") << "what a graph ran";
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
