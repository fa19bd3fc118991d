#include "kernels/host/step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/groups.h"
#include "kernels/host/avx2.h"

namespace kvq::host {

namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
inline float ToFloat(float x) { return x; }
inline float ToFloat(Half x) { return HalfToFloat(x.bits); }
inline float ToFloat(BFloat16 x) { return BFloat16ToFloat(x.bits); }

#if KVQ_HAS_AVX2
KVQ_AVX2_INLINE Floats LoadWeights(const float* p) { return Load(p); }
KVQ_AVX2_INLINE Floats LoadWeights(const Half* p) { return LoadHalf(&p->bits); }
KVQ_AVX2_INLINE Floats LoadWeights(const BFloat16* p) { return LoadBFloat16(&p->bits); }

// out[r * out_stride + o] = sum over i of weight[o, i] x[r, i], for kOuts rows of the weight and kRows of x.
template <int kOuts, int kRows, typename W>
KVQ_AVX2 void Block(const W* weight, int64_t in, const float* x, float* out, int64_t out_stride) {
  // Sums enough that none waits for the one before.
  constexpr int kChains = kOuts * kRows >= 8 ? 1 : 8 / (kOuts * kRows);
  Floats sum[kOuts][kRows][kChains];
  for (int o = 0; o < kOuts; ++o) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kChains; ++c) sum[o][r][c] = Zeros();
    }
  }
  int64_t i = 0;
  for (; i + kChains * kLanes <= in; i += kChains * kLanes) {
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      Floats w[kOuts];
#pragma GCC unroll 8
      for (int o = 0; o < kOuts; ++o) w[o] = LoadWeights(weight + o * in + i + c * kLanes);
      if (c * kLanes * sizeof(W) % 64 == 0) {
        for (int o = 0; o < kOuts; ++o) __builtin_prefetch(weight + (o + 2 * kOuts) * in + i + c * kLanes, 0, 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Floats row = Load(x + r * in + i + c * kLanes);
#pragma GCC unroll 8
        for (int o = 0; o < kOuts; ++o) sum[o][r][c] = Fma(w[o], row, sum[o][r][c]);
      }
    }
  }
  for (; i + kLanes <= in; i += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      const Floats row = Load(x + r * in + i);
      for (int o = 0; o < kOuts; ++o) sum[o][r][0] = Fma(LoadWeights(weight + o * in + i), row, sum[o][r][0]);
    }
  }
  for (int o = 0; o < kOuts; ++o) {
    for (int r = 0; r < kRows; ++r) {
      Floats all = sum[o][r][0];
      for (int c = 1; c < kChains; ++c) all = Add(all, sum[o][r][c]);
      float total = Sum(all);
      for (int64_t j = i; j < in; ++j) total = std::fma(ToFloat(weight[o * in + j]), x[r * in + j], total);
      out[r * out_stride + o] = total;
    }
  }
}

// `outs` rows of the weight times all rows of x. Weights are read from memory once: what follows finds them in the cache.
template <typename W>
KVQ_AVX2 void Rows(const W* weight, int64_t outs, int64_t in, const float* x, int64_t rows, float* out,
                     int64_t out_stride) {
  for (int64_t o = 0; o < outs;) {
    const W* at = weight + o * in;
    if (rows == 1 && o + 8 <= outs) {
      Block<8, 1>(at, in, x, out + o, out_stride);
      o += 8;
      continue;
    }
    const bool two = o + 2 <= outs;
    for (int64_t r = 0; r < rows;) {
      const float* from = x + r * in;
      float* to = out + r * out_stride + o;
      if (r + 4 <= rows) {
        two ? Block<2, 4>(at, in, from, to, out_stride) : Block<1, 4>(at, in, from, to, out_stride);
        r += 4;
      } else {
        two ? Block<2, 1>(at, in, from, to, out_stride) : Block<1, 1>(at, in, from, to, out_stride);
        r += 1;
      }
    }
    o += two ? 2 : 1;
  }
}
#endif

}  // namespace

void Product(const ProductArgs& a) {
  // Small enough that a thread which is held up costs little more than its share, large enough to be worth fetching.
  constexpr int64_t kOuts = 32;
  static thread_local std::vector<float> floats;
  floats.resize(static_cast<size_t>(a.rows * a.in));
  LoadRow(a.x, a.dtype, 0, a.rows * a.in, floats.data());
  const float* x = floats.data();
#pragma omp parallel
  {
    std::vector<float> sums(static_cast<size_t>(a.rows * kOuts));
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < a.out; first += kOuts) {
      const int64_t outs = std::min(kOuts, a.out - first);
      const auto with = [&](const auto* weight) {
#if KVQ_HAS_AVX2
        Rows(weight + first * a.in, outs, a.in, x, a.rows, sums.data(), kOuts);
#else
        (void)weight, (void)outs, (void)x;
#endif
      };
      switch (a.dtype) {
        case DType::kFloat32: with(static_cast<const float*>(a.weight)); break;
        case DType::kFloat16: with(static_cast<const Half*>(a.weight)); break;
        case DType::kBFloat16: with(static_cast<const BFloat16*>(a.weight)); break;
      }
      for (int64_t r = 0; r < a.rows; ++r) StoreRow(&sums[r * kOuts], outs, a.dtype, r * a.out + first, a.stored);
    }
  }
}

}  // namespace kvq::host
