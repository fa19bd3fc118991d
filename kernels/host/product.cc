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

// out[r * out_stride + o] += sum over n of the inputs of weight[o, i] x[r, i], for kOuts rows of the weight and kRows of x.
template <int kOuts, int kRows, typename W>
KVQ_AVX2 void Block(const W* weight, int64_t in, int64_t n, const float* x, float* out, int64_t out_stride) {
  // Sums enough that none waits for the one before.
  constexpr int kChains = kOuts * kRows >= 8 ? 1 : 8 / (kOuts * kRows);
  Floats sum[kOuts][kRows][kChains];
  for (int o = 0; o < kOuts; ++o) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kChains; ++c) sum[o][r][c] = Zeros();
    }
  }
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes) {
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
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      const Floats row = Load(x + r * in + i);
      for (int o = 0; o < kOuts; ++o) sum[o][r][0] = Fma(LoadWeights(weight + o * in + i), row, sum[o][r][0]);
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOuts; ++o) {
    alignas(16) float totals[4];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      for (int c = 1; c < kChains; ++c) sum[o][r][0] = Add(sum[o][r][0], sum[o][r][c]);
      if constexpr (kRows != 4) totals[r] = Sum(sum[o][r][0]);
    }
    if constexpr (kRows == 4) _mm_store_ps(totals, Sums(Folded(sum[o][0][0]), Folded(sum[o][1][0]), Folded(sum[o][2][0]), Folded(sum[o][3][0])));
    for (int r = 0; r < kRows; ++r) {
      for (int64_t j = i; j < n; ++j) totals[r] = std::fma(ToFloat(weight[o * in + j]), x[r * in + j], totals[r]);
      out[r * out_stride + o] += totals[r];
    }
  }
}

// ---- one row

// Two vectors of numbers; of bfloat16 its even ones and its odd ones.
KVQ_AVX2_INLINE void LoadTwo(const float* p, Floats (&w)[2]) { w[0] = Load(p), w[1] = Load(p + kLanes); }
KVQ_AVX2_INLINE void LoadTwo(const Half* p, Floats (&w)[2]) { w[0] = LoadHalf(&p->bits), w[1] = LoadHalf(&p[kLanes].bits); }
KVQ_AVX2_INLINE void LoadTwo(const BFloat16* p, Floats (&w)[2]) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  w[0] = EvenOf(both), w[1] = OddOf(both);
}

// The sum over a row of the weight, times x in LoadTwo's order. Rows are read one behind the other: side by side each is a stream of its
// own, which memory is slower with (ci/baselines/smollm2-135m-cpu-avx2).
template <typename W>
KVQ_AVX2 float Dot(const W* weight, const float* x, int64_t in) {
  Floats sum[4] = {Zeros(), Zeros(), Zeros(), Zeros()}, w[2];
  int64_t i = 0;
  for (; i + 2 * kPairLanes <= in; i += 2 * kPairLanes) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * kPairLanes;
      if (k * kPairLanes * sizeof(W) % 64 == 0) __builtin_prefetch(weight + at + kAhead / sizeof(W), 0, 2);  // a line
      LoadTwo(weight + at, w);
      sum[2 * k] = Fma(w[0], Load(x + at), sum[2 * k]), sum[2 * k + 1] = Fma(w[1], Load(x + at + kLanes), sum[2 * k + 1]);
    }
  }
  for (; i + kPairLanes <= in; i += kPairLanes) {
    LoadTwo(weight + i, w);
    sum[0] = Fma(w[0], Load(x + i), sum[0]), sum[1] = Fma(w[1], Load(x + i + kLanes), sum[1]);
  }
  float total = Sum(Add(Add(sum[0], sum[1]), Add(sum[2], sum[3])));
  for (; i < in; ++i) total = std::fma(ToFloat(weight[i]), x[i], total);
  return total;
}

// ---- a few rows

// sums [rows, out_stride] = x W^T for `outs` rows of the weight, which are read from memory once: what follows finds them in
// the cache, and of x some inputs of all rows in a first one.
template <typename W>
KVQ_AVX2 void Rows(const W* weight, int64_t outs, int64_t in, const float* x, int64_t rows, float* sums,
                   int64_t out_stride) {
  constexpr int64_t kHeld = 6144;  // numbers of x
  std::fill(sums, sums + rows * out_stride, 0.0f);
  const int64_t parts = (rows * in + kHeld - 1) / kHeld, step = (in / parts + kLanes) / kLanes * kLanes;
  for (int64_t i = 0; i < in; i += step) {
    const int64_t n = std::min(step, in - i);
    for (int64_t o = 0; o < outs;) {
      const W* at = weight + o * in + i;
      const int64_t side_by_side = std::min<int64_t>(outs - o, 3);
      for (int64_t r = 0; r < rows;) {
        const float* from = x + r * in + i;
        float* to = sums + r * out_stride + o;
        const bool four = r + 4 <= rows;
        switch (side_by_side) {
          case 3: four ? Block<3, 4>(at, in, n, from, to, out_stride) : Block<3, 1>(at, in, n, from, to, out_stride); break;
          case 2: four ? Block<2, 4>(at, in, n, from, to, out_stride) : Block<2, 1>(at, in, n, from, to, out_stride); break;
          default: four ? Block<1, 4>(at, in, n, from, to, out_stride) : Block<1, 1>(at, in, n, from, to, out_stride);
        }
        r += four ? 4 : 1;
      }
      o += side_by_side;
    }
  }
}

// ---- many rows: bound by arithmetic

// A tile of sums in registers, and what is taken at a time: rows of x, of outputs, of inputs. A panel, [kPanelInputs, kTileOuts]
// of the weight, stays in a first cache, all of a group's panels and sums in a second.
constexpr int kTileRows = 4, kTileOuts = 3 * kLanes, kPanels = 4, kGroupOuts = kPanels * kTileOuts;
constexpr int64_t kPanelInputs = 192, kManyRows = 240;

// to[i, o] = from[o, i] of eight by eight, rows of `to` kTileOuts apart. A row and the one four behind it lie in a vector's halves:
// nothing crosses them, which takes a Zen 1 eight steps.
KVQ_AVX2_INLINE void Turn(const float* from, int64_t in, float* to) {
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4, from += 4, to += 4 * kTileOuts) {
    Floats r[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) r[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + k * in)), _mm_loadu_ps(from + (k + 4) * in), 1);
    const Floats a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
    const Floats c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
    Store(to, _mm256_shuffle_ps(a, c, 0x44)), Store(to + kTileOuts, _mm256_shuffle_ps(a, c, 0xEE));
    Store(to + 2 * kTileOuts, _mm256_shuffle_ps(b, d, 0x44)), Store(to + 3 * kTileOuts, _mm256_shuffle_ps(b, d, 0xEE));
  }
}
KVQ_AVX2_INLINE void StoreFloats(const Half*, __m128i column, float* to) { Store(to, _mm256_cvtph_ps(column)); }
KVQ_AVX2_INLINE void StoreFloats(const BFloat16*, __m128i column, float* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(_mm_setzero_si128(), column));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4), _mm_unpackhi_epi16(_mm_setzero_si128(), column));
}
// What has 16 bits is widened when it is turned: half the vectors until then.
template <typename W>
KVQ_AVX2_INLINE void Turn(const W* from, int64_t in, float* to) {
  __m128i r[8], a[8], b[8];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) r[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k * in));
#pragma GCC unroll 4
  for (int k = 0; k < 8; k += 2) a[k] = _mm_unpacklo_epi16(r[k], r[k + 1]), a[k + 1] = _mm_unpackhi_epi16(r[k], r[k + 1]);
#pragma GCC unroll 2
  for (int k = 0; k < 8; k += 4) {
    b[k] = _mm_unpacklo_epi32(a[k], a[k + 2]), b[k + 1] = _mm_unpackhi_epi32(a[k], a[k + 2]);
    b[k + 2] = _mm_unpacklo_epi32(a[k + 1], a[k + 3]), b[k + 3] = _mm_unpackhi_epi32(a[k + 1], a[k + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k, to += 2 * kTileOuts) {
    StoreFloats(from, _mm_unpacklo_epi64(b[k], b[k + 4]), to), StoreFloats(from, _mm_unpackhi_epi64(b[k], b[k + 4]), to + kTileOuts);
  }
}

// panel[i, o] = weight[o, i] for n inputs and `outs` outputs, zero for those up to kTileOuts.
template <typename W>
KVQ_AVX2 void Pack(const W* weight, int64_t in, int64_t outs, int64_t n, float* panel) {
  for (int first = 0; first < kTileOuts; first += kLanes) {
    const int64_t rows = std::clamp<int64_t>(outs - first, 0, kLanes);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t inputs = std::min<int64_t>(n - i, kLanes);
      const W* from = weight + first * in + i;
      float* to = panel + i * kTileOuts + first;
      if (rows == kLanes && inputs == kLanes) {
        Turn(from, in, to);
        continue;
      }
      W some[kLanes * kLanes] = {};
      float turned[kLanes * kTileOuts];
      for (int64_t k = 0; k < rows; ++k) std::copy_n(from + k * in, inputs, some + k * kLanes);
      Turn(some, kLanes, turned);
      for (int64_t j = 0; j < inputs; ++j) Store(to + j * kTileOuts, Load(turned + j * kTileOuts));
    }
  }
}

// sums [kRows, kGroupOuts at a row] += x [kRows, n] times a panel.
template <int kRows>
KVQ_AVX2 void AddTile(const float* x, int64_t in, const float* panel, int64_t n, float* sums) {
  constexpr int kVectors = kTileOuts / kLanes;
  Floats sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Load(sums + r * kGroupOuts + v * kLanes);
  }
  for (int64_t i = 0; i < n; ++i) {
    Floats of[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) of[v] = Load(panel + i * kTileOuts + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Floats factor = Set(x[r * in + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Fma(factor, of[v], sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Store(sums + r * kGroupOuts + v * kLanes, sum[r][v]);
  }
}

// sums [rows, kGroupOuts] = x W^T for at most kGroupOuts outputs and kManyRows rows; behind them `more` rows of the weight are next.
template <typename W>
KVQ_AVX2 void Group(const W* weight, int64_t outs, int64_t more, int64_t in, const float* x, int64_t rows, float* panels, float* sums) {
  std::fill(sums, sums + rows * kGroupOuts, 0.0f);
  const int64_t used = (outs + kTileOuts - 1) / kTileOuts;
  for (int64_t i = 0; i < in; i += kPanelInputs) {
    const int64_t n = std::min(kPanelInputs, in - i);
    for (int64_t p = 0; p < used; ++p) {
      Pack(weight + p * kTileOuts * in + i, in, outs - p * kTileOuts, n, panels + p * kPanelInputs * kTileOuts);
    }
    // What is packed next comes into the second cache meanwhile: of each row a few lines, which no processor foresees.
    const bool last = i + n == in;
    const W* next = last ? weight + outs * in : weight + i + n;
    const int64_t wide = std::min(kPanelInputs, last ? in : in - i - n), to_fetch = last ? more : outs;
    const int64_t at_once = (outs * kTileRows + rows - 1) / rows;
    int64_t r = 0, fetched = 0;
    for (; r + kTileRows <= rows; r += kTileRows) {
      for (const int64_t end = std::min(fetched + at_once, to_fetch); fetched < end; ++fetched, next += in) {
        for (int64_t k = 0; k < wide; k += 64 / sizeof(W)) __builtin_prefetch(next + k, 0, 2);
      }
      for (int64_t p = 0; p < used; ++p) {
        AddTile<kTileRows>(x + r * in + i, in, panels + p * kPanelInputs * kTileOuts, n, sums + r * kGroupOuts + p * kTileOuts);
      }
    }
    for (; r < rows; ++r) {
      for (int64_t p = 0; p < used; ++p) {
        AddTile<1>(x + r * in + i, in, panels + p * kPanelInputs * kTileOuts, n, sums + r * kGroupOuts + p * kTileOuts);
      }
    }
  }
}
#endif

// Rows of the weight are dealt in pieces small enough that a thread which is held up costs little more than its share, large enough to be
// worth fetching.
constexpr int64_t kMostOuts = 48, kBytes = 48 << 10;
int64_t PieceOf(const ProductArgs& a) {
  return a.rows > 1 ? kMostOuts : std::clamp<int64_t>(kBytes / (a.in * SizeOf(a.dtype)), 4, kMostOuts);  // several read x again
}

}  // namespace

Ahead AheadOf(const ProductArgs& a) {
  const int64_t row = a.in * SizeOf(a.dtype);
  return {static_cast<const std::byte*>(a.weight), PieceOf(a) * row, a.out * row};
}

void Product(const ProductArgs& a) {
  // From here on a row takes longer than the weight it is multiplied with.
  constexpr int64_t kFew = 16;
  static thread_local std::vector<float> floats;
  floats.resize(static_cast<size_t>(a.rows * a.in));
  LoadRow(a.x, a.dtype, 0, a.rows * a.in, floats.data());
  if (a.rows == 1 && a.dtype == DType::kBFloat16) EvenThenOdd(a.in, floats.data());
  const float* x = floats.data();
  const auto with_weight = [&](const auto& work) {
    switch (a.dtype) {
      case DType::kFloat32: return work(static_cast<const float*>(a.weight));
      case DType::kFloat16: return work(static_cast<const Half*>(a.weight));
      case DType::kBFloat16: return work(static_cast<const BFloat16*>(a.weight));
    }
  };
#if KVQ_HAS_AVX2
  if (a.rows > kFew) {
    const int64_t groups = (a.out + kGroupOuts - 1) / kGroupOuts, parts = (a.rows + kManyRows - 1) / kManyRows;
    Deal(groups * parts, [&](int64_t piece) {
      static thread_local std::vector<float> panels(kPanels * kPanelInputs * kTileOuts), sums(kManyRows * kGroupOuts);
      const int64_t first = piece / parts * kGroupOuts, outs = std::min<int64_t>(kGroupOuts, a.out - first);
      const int64_t row = piece % parts * kManyRows, rows = std::min(kManyRows, a.rows - row);
      const int64_t more = row + rows == a.rows ? std::min<int64_t>(kGroupOuts, a.out - first - outs) : 0;  // else the same come again
      with_weight([&](const auto* weight) {
        Group(weight + first * a.in, outs, more, a.in, x + row * a.in, rows, panels.data(), sums.data());
      });
      for (int64_t r = 0; r < rows; ++r) StoreRow(&sums[r * kGroupOuts], outs, a.dtype, (row + r) * a.out + first, a.stored);
    });
    return;
  }
  const int64_t of_piece = PieceOf(a);
  Deal((a.out + of_piece - 1) / of_piece, [&](int64_t i) {
    float sums[kFew * kMostOuts];
    const int64_t first = i * of_piece, outs = std::min(of_piece, a.out - first);
    with_weight([&](const auto* weight) {
      weight += first * a.in;
      if (a.rows > 1) return Rows(weight, outs, a.in, x, a.rows, sums, kMostOuts);
      for (int64_t o = 0; o < outs; ++o) sums[o] = Dot(weight + o * a.in, x, a.in);
    });
    for (int64_t r = 0; r < a.rows; ++r) StoreRow(&sums[r * kMostOuts], outs, a.dtype, r * a.out + first, a.stored);
  });
#else
  (void)x, (void)with_weight;
#endif
}

}  // namespace kvq::host
