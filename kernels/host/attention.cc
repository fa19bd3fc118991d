#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/error.h"
#include "kernels/groups.h"
#include "kernels/host/codes.h"
#include "kernels/host/step.h"

namespace kvq::host {
namespace {

constexpr float kLog2E = 1.44269504f;
using Logits = float[kMostTokens + 8];  // of a tile's tokens, with room for whole vectors

// n numbers and room behind them for whole vectors.
constexpr int64_t Lanes(int64_t n) { return (n + 7) / 8 * 8; }
constexpr int64_t SumsOf(int64_t groups) { return kLanes + Lanes(groups); }

// Codes of any kind, which their codec decodes: a block at a time, for those of one head or, where groups span heads, of all.
struct Block {
  const Codec* codec = nullptr;
  CodecParams params;
  KvView view;
  int64_t tokens = 0;  // that are decoded at once
  int64_t at = -1;     // the first of those that `floats` holds, [view.heads, tokens, head_dim]
  std::vector<float> floats;

  // n tokens from `first` on of a head, all of one block.
  const float* Tokens(int64_t head, int64_t first) {
    const int64_t dim = view.head_dim, begin = first / tokens * tokens;
    if (at != begin) {
      const int64_t n = std::min(tokens, view.capacity - begin);
      const DenseView out{.data = floats.data(), .batch = 1, .heads = view.heads, .tokens = n, .head_dim = dim,
                          .batch_stride = view.heads * tokens * dim, .head_stride = tokens * dim, .token_stride = dim};
      (codec->host.decode_turned != nullptr ? codec->host.decode_turned : codec->decode)(params, view, begin, out);
      at = begin;
    }
    return floats.data() + (head * tokens + first - begin) * dim;
  }
};

// Where a run of tokens of one side is: rows of numbers, or codes.
struct Source {
  const void* rows = nullptr;
  DType dtype = DType::kFloat16;
  int64_t stride = 0, first = 0;  // elements from token to token; the first token's number
  int64_t ring = 0;               // above 0: token t is in row t % ring
  const Codes* codes = nullptr;
  Block* block = nullptr;
  int64_t head = 0;  // of the block
  bool encoded() const { return codes != nullptr || block != nullptr; }
  // Whether tokens are read as they are stored, dense ones in the order EvenThenOdd where `pairs`.
  bool direct(bool pairs) const {
    if (encoded()) return codes != nullptr && codes->direct();
    return ring == 0 && pairs == (dtype == DType::kBFloat16);
  }
  // Numbers of a tile: with those of the other side half a first cache, of codes some 4 KB as they are stored.
  int64_t tile(bool pairs) const { return direct(pairs) && encoded() ? std::min<int64_t>(32768 / codes->bits, kMostCodes) : kTileFloats; }
};
struct Segment {
  int64_t begin, end;
  Source sides[2];
};

// All that attention of one KV head of one sequence wants, and what it has so far.
struct Head {
  int64_t dim, heads;  // query heads
  bool pairs;          // whether dense tokens are in the order EvenThenOdd, as queries and output are then
  const float *queries, *coded_queries;  // times scale and log2 e, [heads, dim]; the second rotated, in the keys' order of codes, over their weights
  const float* sums;   // of the second: [heads, SumsOf(groups)], eight lanes of what biases of codes make of them, negative, then of each group
  float softcap;       // 0: none
  float *m, *l;        // of each query head: the largest logit, the sum of exponentials
  float* by_order[2];  // the output, [heads, dim], of dense values and of encoded ones, which are rotated and may have an order
  std::vector<Segment> segments = {};
  const Segment& SegmentAt(int64_t token) const {
    return *std::find_if(segments.begin(), segments.end(), [&](const Segment& s) { return token < s.end; });
  }
};

#if KVQ_HAS_AVX2
// ---- tokens that are read as they are stored, or from a tile, some vectors of eight numbers from each load

constexpr int kMostHeads = 3;  // query heads whose sums are in registers

// Codes that are numbers, in CodeOrder, times CodeWeights, plus a bias. All vectors of a token have the same scales.
template <int kBits, int kWidth, bool kOne>
struct CodeReader {
  static constexpr bool kCodes = true, kOneGroup = kOne;
  static constexpr int kVectors = 32 / kBits * kWidth / 8;
  const Codes& c;
  int64_t first;
  const Meta& meta;

  int64_t groups() const { return kOneGroup ? 1 : c.groups; }
  KVQ_AVX2_INLINE const float* Scales(int64_t t) const { return meta.scales + t * groups(); }
  KVQ_AVX2_INLINE const float* Shifts(int64_t t) const { return meta.shifts + t * groups(); }
  // What each lane has of a token's groups, of which there are some behind them.
  KVQ_AVX2_INLINE Floats InLanes(const float* groups) const {
    return _mm256_permutevar8x32_ps(Load(groups), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c.places.data())));
  }
  KVQ_AVX2_INLINE const uint32_t* Row(int64_t t) const { return c.rows + (first + t) * c.words; }
  KVQ_AVX2_INLINE static __m256i Read(const uint32_t* row, int64_t i) { return LoadWords<kWidth>(row + i * kWidth); }
  KVQ_AVX2_INLINE static Floats Number(__m256i codes, int v) {
    return WeighedNumbersOf<kBits, kWidth>(codes, v);
  }
  static constexpr float Weight(int v) { return host::Weight(kBits, kWidth, v); }
  static constexpr float Bias(int v) { return host::Bias(kBits, v); }
  KVQ_AVX2_INLINE static void Fetch(const uint32_t* row, int64_t i) {
    if (i * kWidth % 16 == 0) __builtin_prefetch(row + i * kWidth + kAhead / 2 / sizeof(uint32_t), 0, 2);
  }
};

// Rows of numbers, some vectors at a time; of bfloat16 in the order EvenThenOdd.
template <DType kType, int kVectors_>
struct RowReader {
  using T = std::conditional_t<kType == DType::kFloat32, float, uint16_t>;
  static constexpr bool kCodes = false, kOneGroup = false;
  static constexpr int kVectors = kVectors_;
  const T* rows;
  int64_t stride;  // elements from token to token

  KVQ_AVX2_INLINE const T* Row(int64_t t) const { return rows + t * stride; }
  KVQ_AVX2_INLINE static const T* Read(const T* row, int64_t i) { return row + i * kVectors * kLanes; }
  KVQ_AVX2_INLINE static Floats Number(const T* from, int v) {
    if constexpr (kType == DType::kFloat32) return Load(from + v * kLanes);
    else if constexpr (kType == DType::kFloat16) return LoadHalf(from + v * kLanes);
    else {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + v / 2 * kPairLanes));
      return v % 2 == 0 ? EvenOf(both) : OddOf(both);
    }
  }
  static constexpr float Weight(int) { return 1; }
  static constexpr float Bias(int) { return 0; }
  KVQ_AVX2_INLINE static void Fetch(const T* row, int64_t i) {
    constexpr int64_t kEach = 64 / sizeof(T);  // of what is read at once
#pragma GCC unroll 2
    for (int64_t at = 0; at < kVectors * kLanes; at += kEach) __builtin_prefetch(Read(row, i) + at + kAhead / sizeof(T), 0, 2);
  }
};

// Logits of kTokens tokens from t on for some queries, up to sums over four lanes; behind n - 1 that one again.
template <int kHeads, int kTokens, typename R>
KVQ_AVX2_INLINE void Dots(const R& r, const float* queries, const float* sums, int64_t t, int64_t n, int64_t dim,
                          __m128 (&lanes)[kHeads][kMostTokens + kTokens]) {
  Floats sum[kTokens][kHeads];
  decltype(r.Row(0)) row[kTokens];
#pragma GCC unroll 4
  for (int k = 0; k < kTokens; ++k) {
    row[k] = r.Row(std::min(t + k, n - 1));
    for (int h = 0; h < kHeads; ++h) {
      if constexpr (R::kCodes) sum[k][h] = Load(sums + h * SumsOf(r.groups()));
      else sum[k][h] = Zeros();
    }
  }
  const float* q = queries;
#pragma GCC unroll 1
  for (int64_t i = 0; i < dim / (R::kVectors * kLanes); ++i) {
#pragma GCC unroll 4
    for (int k = 0; k < kTokens; ++k) R::Fetch(row[k], i);
#pragma GCC unroll 16
    for (int v = 0; v < R::kVectors; ++v, q += kLanes) {
      Floats of[kHeads];
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) of[h] = Load(q + h * dim);
#pragma GCC unroll 4
      for (int k = 0; k < kTokens; ++k) {
        const Floats numbers = R::Number(R::Read(row[k], i), v);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) sum[k][h] = Fma(numbers, of[h], sum[k][h]);
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kTokens; ++k) {
    if constexpr (R::kCodes && !R::kOneGroup) {
      const int64_t token = std::min(t + k, n - 1);
      const Floats scale = r.InLanes(r.Scales(token)), shift = Load(r.Shifts(token));  // what lies behind a token's groups comes times 0
      for (int h = 0; h < kHeads; ++h) sum[k][h] = Fma(sum[k][h], scale, Multiply(shift, Load(sums + h * SumsOf(r.groups()) + kLanes)));
    }
    for (int h = 0; h < kHeads; ++h) lanes[h][t + k] = Folded(sum[k][h]);
  }
}

// x[h][t]: logits of n tokens for some queries. `sums`: Head::sums.
template <int kHeads, typename R>
KVQ_AVX2 void ReadDots(const R& r, const float* queries, const float* sums, int64_t n, int64_t dim, Logits* x) {
  constexpr int kTokens = kHeads == 3 ? 3 : 4;  // side by side: a query is loaded once for them, and no sum waits long for the one before
  __m128 lanes[kHeads][kMostTokens + kTokens];
  for (int64_t t = 0; t < n; t += kTokens) {
    if (t % (4 * kTokens) == 0) FetchAhead(/*lines=*/8 * kTokens);
    Dots<kHeads, kTokens>(r, queries, sums, t, n, dim, lanes);
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int64_t t = 0; t < n; t += 4) {
      const __m128* of = lanes[h] + t;
      _mm_storeu_ps(x[h] + t, Sums(of[0], of[1], of[2], of[3]));
    }
    if constexpr (R::kCodes && R::kOneGroup) {
      for (int64_t t = 0; t < n; t += kLanes) {
        const Floats shifts = Multiply(Load(r.Shifts(t)), Set(sums[h * SumsOf(1) + kLanes]));
        Store(x[h] + t, Fma(Load(x[h] + t), Load(r.Scales(t)), shifts));
      }
    }
  }
}

// out[h] += sum over tokens of x[h][t] times the values of t. Behind n, x is zero to the end of a vector.
template <int kHeads, typename R>
KVQ_AVX2 void ReadWeighted(const R& r, const Logits* x, int64_t n, int64_t dim, float* out) {
  // Of codes weights times scales, which lanes may have their own of, and what their shifts, and biases, make of them.
  constexpr bool kScales = R::kCodes && !R::kOneGroup;
  alignas(32) Logits scaled[kHeads];
  [[maybe_unused]] Floats in_lanes[kScales ? kMostTokens : 1][kHeads], added[2][kHeads];
  if constexpr (R::kCodes) {
    Floats shifts[kHeads], biases[kHeads];
    for (int h = 0; h < kHeads; ++h) shifts[h] = biases[h] = Zeros();
    for (int64_t t = 0; t < n; t += kScales ? 1 : kLanes) {
      const Floats scale = kScales ? r.InLanes(r.Scales(t)) : Load(r.Scales(t)), shift = Load(r.Shifts(t));  // some lanes may be of no group
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const Floats weight = kScales ? Set(x[h][t]) : Load(x[h] + t), both = Multiply(weight, scale);
        shifts[h] = Fma(weight, shift, shifts[h]), biases[h] = Add(biases[h], both);
        if constexpr (kScales) in_lanes[t][h] = both;
        else Store(scaled[h] + t, both);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      if constexpr (kScales) {
        alignas(32) float of_groups[kLanes];
        Store(of_groups, shifts[h]);
        added[0][h] = r.InLanes(of_groups);
      } else {
        added[0][h] = Set(Sum(shifts[h])), biases[h] = Set(Sum(biases[h]));
      }
      added[1][h] = Fma(biases[h], Set(-R::Bias(1)), added[0][h]);
    }
  }
  const Logits* weights = R::kOneGroup ? scaled : x;
  // Vectors side by side: a weight is loaded once for them, and the sums of three heads are in registers, with the weights and, of codes,
  // what a number is made from.
  constexpr int kStep = std::min(R::kVectors, 4);
  for (int64_t i = 0; i < dim / (R::kVectors * kLanes); ++i) {
#pragma GCC unroll 4
    for (int first = 0; first < R::kVectors; first += kStep, out += kStep * kLanes) {
      Floats sum[kHeads][kStep];
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
        for (int v = 0; v < kStep; ++v) sum[h][v] = Zeros();
      }
      for (int64_t t = 0; t < n; ++t) {
        const auto row = r.Row(t);
        const auto stored = R::Read(row, i);
        if (first == 0) R::Fetch(row, i);
        Floats weight[kHeads];
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) {
          if constexpr (kScales) weight[h] = in_lanes[t][h];
          else weight[h] = Set(weights[h][t]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kStep; ++v) {
          const Floats number = R::Number(stored, first + v);
#pragma GCC unroll 4
          for (int h = 0; h < kHeads; ++h) sum[h][v] = Fma(weight[h], number, sum[h][v]);
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
        for (int v = 0; v < kStep; ++v) {
          Floats more = Load(out + h * dim + v * kLanes);
          if constexpr (R::kCodes) more = Add(more, added[R::Bias(first + v) != 0][h]);
          Store(out + h * dim + v * kLanes, Fma(sum[h][v], Set(1 / R::Weight(first + v)), more));
        }
      }
    }
  }
}

// ---- a tile

constexpr int kSide = 4;  // vectors whose exponentials are worked out side by side: each is a chain of some twelve instructions
constexpr int64_t Sides(int64_t n) { return (n + kSide * kLanes - 1) / (kSide * kLanes) * (kSide * kLanes); }

// Whether one of n logits is above m, which then is the largest, or NaN, which shows in Exponentials' sum. What is behind them, up to
// Sides(n), becomes the lowest number.
KVQ_AVX2 bool Raises(float* x, int64_t n, float& m) {
  for (int64_t t = n; t < Sides(n); ++t) x[t] = std::numeric_limits<float>::lowest();
  Floats top = Load(x);
  for (int64_t t = kLanes; t < n; t += kLanes) top = _mm256_max_ps(Load(x + t), top);
  if (_mm256_movemask_ps(_mm256_cmp_ps(top, Set(m), _CMP_NLE_UQ)) == 0) return false;
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  m = std::max(m, _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half))));
  return true;
}

// x[t] = 2^(x[t] - m) with a relative error below 2e-7, 0 below 2^-125, for all Sides(n); returns their sum, NaN where one was not finite.
KVQ_AVX2 float Exponentials(float* x, int64_t n, float m) {
  constexpr float kWhole = 0x1.8p23f;  // added to a number makes it whole, in its lowest bits
  Floats sum = Zeros();
  for (int64_t t = 0; t < n; t += kSide * kLanes, x += kSide * kLanes) {
    Floats whole[kSide], f[kSide], e[kSide], below[kSide];
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) {
      const Floats logit = Load(x + i * kLanes), y = Add(logit, Set(-m));
      sum = Fma(logit, Zeros(), sum);
      whole[i] = Add(y, Set(kWhole)), f[i] = _mm256_sub_ps(y, Add(whole[i], Set(-kWhole)));
      below[i] = _mm256_cmp_ps(y, Set(-125), _CMP_LT_OQ);
      e[i] = Set(1.53458124e-4f);  // the polynomial of degree 6 that is nearest to 2^f in [-1/2, 1/2]: 7.6e-8 with its roundings
    }
#pragma GCC unroll 6
    for (const float c : {1.33999309e-3f, 9.61848907e-3f, 5.55032864e-2f, 0.240226462f, 0.693147182f, 1.0f}) {
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) e[i] = Fma(f[i], e[i], Set(c));
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) {
      const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(whole[i]), 23);
      e[i] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(e[i]), power));
      e[i] = _mm256_andnot_ps(below[i], e[i]);
      Store(x + i * kLanes, e[i]);
      sum = Add(sum, e[i]);
    }
  }
  return Sum(sum);
}

// x[t] = cap tanh(x[t] / cap), both in base 2.
KVQ_AVX2 void Cap(float* x, int64_t n, float cap) {
  const float top = cap * kLog2E;
  for (int64_t t = 0; t < n; ++t) x[t] = top - 2 * top / (1 + Exp2(std::clamp(x[t] * (2 / cap), -125.0f, 125.0f)));
}

// What n tokens of a side are read by: as they are stored, or float32 numbers made of them.
struct Tile {
  const Source* source;
  const float* floats;
  int64_t first;  // of the tokens
  Meta meta;
};

// Calls work(reader).
template <int kBits, int kWidth, typename Work>
KVQ_AVX2 void WithCodes(const Tile& tile, const Work& work) {
  const Codes& c = *tile.source->codes;
  if constexpr (kWidth == 8) {
    if (c.groups > 1) return work(CodeReader<kBits, kWidth, false>{c, tile.first, tile.meta});
  }
  work(CodeReader<kBits, kWidth, true>{c, tile.first, tile.meta});  // of four words at once vectors are alike in a single group alone
}
template <DType kType, typename Work>
KVQ_AVX2 void WithRows(const void* rows, int64_t stride, int64_t dim, const Work& work) {
  const auto* from = static_cast<const typename RowReader<kType, 2>::T*>(rows);
  dim % (4 * kLanes) == 0 ? work(RowReader<kType, 4>{from, stride}) : work(RowReader<kType, 2>{from, stride});
}
template <typename Work>
KVQ_AVX2 void WithReader(const Tile& tile, int64_t dim, const Work& work) {
  const Source& source = *tile.source;
  if (tile.floats != nullptr) {
    WithRows<DType::kFloat32>(tile.floats, dim, dim, work);
  } else if (const Codes* c = source.codes; c != nullptr) {
    switch (c->bits * 16 + c->width) {
      case 8 * 16 + 8: WithCodes<8, 8>(tile, work); break;
      case 8 * 16 + 4: WithCodes<8, 4>(tile, work); break;
      case 4 * 16 + 8: WithCodes<4, 8>(tile, work); break;
      case 4 * 16 + 4: WithCodes<4, 4>(tile, work); break;
      case 2 * 16 + 8: WithCodes<2, 8>(tile, work); break;
      default: WithCodes<2, 4>(tile, work);
    }
  } else {
    const auto* rows = static_cast<const std::byte*>(source.rows) + tile.first * source.stride * SizeOf(source.dtype);
    switch (source.dtype) {
      case DType::kFloat32: WithRows<DType::kFloat32>(rows, source.stride, dim, work); break;
      case DType::kFloat16: WithRows<DType::kFloat16>(rows, source.stride, dim, work); break;
      case DType::kBFloat16: WithRows<DType::kBFloat16>(rows, source.stride, dim, work);
    }
  }
}
// work(count) with some query heads' number as a constant.
template <typename Work>
KVQ_AVX2 void WithHeads(int64_t count, const Work& work) {
  if (count == 3) return work(std::integral_constant<int, 3>());
  count == 2 ? work(std::integral_constant<int, 2>()) : work(std::integral_constant<int, 1>());
}

// n tokens of keys and values for all query heads of a KV head.
KVQ_AVX2 void AttendTile(const Head& of, const Tile& keys, const Tile& values, int64_t n) {
  alignas(64) Logits x[kMostHeads];
  const int64_t dim = of.dim;
  const float* queries = keys.source->encoded() ? of.coded_queries : of.queries;
  const int64_t sums_of = keys.source->codes != nullptr ? SumsOf(keys.source->codes->groups) : 0;
  for (int64_t head = 0, count; head < of.heads; head += count) {
    const int64_t left = of.heads - head;
    count = left == 4 ? 2 : std::min<int64_t>(left, kMostHeads);
    const float* q = queries + head * dim;
    WithReader(keys, dim, [&](const auto& reader) KVQ_AVX2 {
      WithHeads(count, [&](auto some) KVQ_AVX2 { ReadDots<some>(reader, q, of.sums + head * sums_of, n, dim, x); });
    });
    for (int64_t h = 0; h < count; ++h) {
      float &m = of.m[head + h], &l = of.l[head + h];
      if (of.softcap > 0) Cap(x[h], n, of.softcap);
      if (const float before = m; Raises(x[h], n, m)) {
        const float factor = before - m > -125 ? Exp2(before - m) : 0;
        l *= factor;
        for (float* out : of.by_order) {
          for (int64_t i = 0; i < dim; ++i) out[(head + h) * dim + i] *= factor;
        }
      }
      l += Exponentials(x[h], n, m);
    }
    float* out = of.by_order[values.source->encoded()] + head * dim;
    WithReader(values, dim, [&](const auto& reader) KVQ_AVX2 {
      WithHeads(count, [&](auto some) KVQ_AVX2 { ReadWeighted<some>(reader, x, n, dim, out); });
    });
  }
}

// n tokens of one side from token `at` of its segment on; those that no reader knows as they are stored go to `to`. `pairs`: dense
// ones in the order EvenThenOdd.
KVQ_AVX2 void Take(const Source& source, int64_t at, int64_t n, int64_t dim, bool pairs, float* to, Tile& tile) {
  tile.source = &source, tile.first = source.first + at, tile.floats = nullptr;
  if (source.block != nullptr) {
    tile.floats = source.block->Tokens(source.head, tile.first);
  } else if (source.codes != nullptr) {
    LoadMeta(*source.codes, tile.first, n, tile.meta);
    if (source.direct(pairs)) return;
    Widen(*source.codes, tile.first, n, tile.meta, to);
    tile.floats = to;
  } else if (!source.direct(pairs)) {
    tile.floats = to;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t row = source.ring > 0 ? (tile.first + t) % source.ring : tile.first + t;
      LoadRow(source.rows, source.dtype, row * source.stride, dim, to + t * dim);
      if (pairs) EvenThenOdd(dim, to + t * dim);
    }
  }
}

// Tokens [begin, end) of some heads, tile by tile, so that a block which spans them is decoded once.
KVQ_AVX2 void Attend(std::vector<Head>& all, int64_t begin, int64_t end) {
  const int64_t dim = all[0].dim;
  alignas(64) float keys[kTileFloats], values[kTileFloats];
  Tile tiles[2];
  for (int64_t at = begin; at < end;) {
    const Segment& segment = all[0].SegmentAt(at);
    const int64_t from = at - segment.begin;
    int64_t n = std::min({kMostTokens, end - at, segment.end - at});
    for (const Source& side : segment.sides) {
      n = std::min(n, side.tile(all[0].pairs) / dim);
      if (side.block != nullptr) n = std::min(n, side.block->tokens - (side.first + from) % side.block->tokens);
    }
    for (Head& of : all) {
      const Segment& own = of.SegmentAt(at);
      Take(own.sides[0], from, n, dim, of.pairs, keys, tiles[0]), Take(own.sides[1], from, n, dim, of.pairs, values, tiles[1]);
      AttendTile(of, tiles[0], tiles[1], n);
    }
    at += n;
  }
}
#endif  // KVQ_HAS_AVX2

// How its scheme turned tokens that are read without being turned back.
Rotation TurnOfCodes(const Codec& codec, int64_t dim) {
  const bool left = codec.host.lines != nullptr || codec.host.decode_turned != nullptr;
  return codec.turned && left ? Rotation{Rotation::kHadamard, TurnOf(codec, {}, dim).block} : Rotation{};
}

// The sum of n numbers, a multiple of eight.
float SumOf(const float* x, int64_t n) {
  float lanes[kLanes] = {}, sum = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += x[i + k];
  }
  for (const float lane : lanes) sum += lane;
  return sum;
}

Source SourceOf(const DenseView& view, int64_t b, int64_t h, int64_t first) {
  const int64_t offset = Offset(view, b, h, 0, 0) * SizeOf(view.dtype);
  return {.rows = static_cast<const std::byte*>(view.data) + offset, .dtype = view.dtype, .stride = view.token_stride,
          .first = first};
}

std::string Label(const Codec& codec) {
  if (codec.planes == nullptr) return "dense";
  return ReadsCodes(codec) && codec.device.label != nullptr ? codec.device.label : StrCat("int", codec.bits, "_tiles");
}

}  // namespace

bool HasDecodeAttention(const Codec&, const Codec&) { return HasAvx2(); }

std::string DecodeAttentionName(const Codec& keys, const Codec& values) {
  const std::string k = Label(keys), v = Label(values);
  return StrCat("host_decode_", k, k == v ? "" : "+" + v, " (avx2)");
}

void DecodeAttention(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args, DType tokens,
                     const CacheRules& rules) {
  const int64_t dim = args.keys.head_dim, kv_heads = args.keys.heads, heads = args.query_heads / kv_heads;
  const int64_t all_heads = args.keys.batch * kv_heads;
  const bool coded_keys = keys.planes != nullptr, coded_values = values.planes != nullptr;
  if (dim % 16 != 0 || dim > kTileFloats / 4) throw InputError("decode attention wants a head_dim that is a multiple of 16 up to 512, not ", dim);
  const std::vector<int32_t> key_order = CodeOrder(keys, dim), value_order = CodeOrder(values, dim);
  std::vector<float> key_weights;
  const bool pairs = tokens == DType::kBFloat16;
  const std::pair<const Codec*, const KvView*> sides[2] = {{&keys, &args.keys}, {&values, &args.values}};
  const CodecParams params[2] = {args.key_params, args.value_params};
  Codes all_codes[2];
  for (int side = 0; side < 2; ++side) {
    if (ReadsCodes(*sides[side].first)) all_codes[side] = CodesOf(*sides[side].first, params[side], *sides[side].second);
  }
  if (ReadsCodes(keys) && all_codes[0].direct()) key_weights = CodeWeights(keys, dim);

  // Pieces of equal work, as many and a few for each thread: one that is held up leaves the rest to others.
  int64_t most = 0;
  for (int64_t b = 0; b < args.keys.batch; ++b) {
    const SequenceLength& length = args.lengths[b];
    most = std::max<int64_t>(most, length.sinks + length.encoded + length.residual);
  }
  if (args.window > 0) most = std::min<int64_t>(most, args.window);
  // A piece has one head, or all of a sequence where groups span them.
  const int64_t together = keys.block_wide || values.block_wide ? kv_heads : 1;
  const int64_t threads = omp_get_max_threads(), rows = all_heads / together;
  const int64_t few = (4 * threads + rows - 1) / rows, even = (few + threads - 1) / threads * threads;
  const int64_t least = rows >= threads ? 512 : 64;  // tokens that are worth a piece: a piece beyond one a thread, or below
  const int64_t splits = std::clamp<int64_t>(std::min(even, most / least), 1, 64);
  std::vector<float> sums(static_cast<size_t>(all_heads * splits * 2 * heads)), outs(static_cast<size_t>(all_heads * splits * heads * dim));
  const auto sum_of = [&](int64_t pair, int64_t split) { return &sums[static_cast<size_t>((pair * splits + split) * 2 * heads)]; };
  const auto out_of = [&](int64_t pair, int64_t split) { return &outs[static_cast<size_t>((pair * splits + split) * heads * dim)]; };

  Deal(rows * splits, [&](int64_t piece) {
    const int64_t first_pair = piece / splits * together, split = piece % splits, b = first_pair / kv_heads;
    const SequenceLength& length = args.lengths[b];
    const auto values_of = static_cast<size_t>(heads * dim);
    std::vector<float> queries(static_cast<size_t>(together) * values_of), coded(coded_keys ? queries.size() : 0);
    const int64_t group = GroupOf(args.key_params, dim), groups = dim / group, sums_of = ReadsCodes(keys) ? SumsOf(groups) : 0;
    std::vector<float> query_sums(static_cast<size_t>(together * heads * sums_of)), row(static_cast<size_t>(dim));
    std::vector<float> in_order(static_cast<size_t>(together) * 2 * values_of);
    LoadRow(args.queries, args.dtype, first_pair * heads * dim, together * heads * dim, queries.data());
    for (float& q : queries) q *= args.scale * kLog2E;
    for (int64_t head = 0; coded_keys && head < together * heads; ++head) {
      float *rotated = row.data(), *to = coded.data() + head * dim, *own_sums = query_sums.data() + head * sums_of;
      std::copy_n(queries.begin() + head * dim, dim, rotated);
      Rotate(rules.key_rotation, dim, rotated);
      Rotate(TurnOfCodes(keys, dim), dim, rotated);
      for (int64_t g = 0; sums_of > 0 && g < groups; ++g) own_sums[kLanes + g] = SumOf(rotated + g * group, group);
      for (int64_t i = 0; i < dim; ++i) to[i] = key_order.empty() ? rotated[i] : rotated[key_order[static_cast<size_t>(i)]];
      if (key_weights.empty()) continue;
      for (int64_t i = 0; i < dim; ++i) to[i] /= key_weights[static_cast<size_t>(i)];
      for (int64_t i = kLanes; i < dim; i += 2 * kLanes) {
        for (int k = 0; k < kLanes; ++k) own_sums[k] -= to[i + k] * Bias(keys.bits, 1);
      }
    }
    if (pairs) EvenThenOdd(together * heads * dim, queries.data());
    std::vector<std::array<Codes, 2>> codes(static_cast<size_t>(together));
    Block blocks[2];
    for (int side = 0; side < 2; ++side) {
      const auto& [codec, view] = sides[side];
      if (codec->planes == nullptr || ReadsCodes(*codec)) continue;
      Block& block = blocks[side];
      block = {.codec = codec, .params = params[side], .view = *view, .tokens = view->block_tokens};
      // Tokens that are encoded one by one come a tile at a time.
      if (block.tokens == 1) block.tokens = std::min<int64_t>(kTileFloats / dim, kMostTokens);
      block.view.batch = 1, block.view.heads = together;
      for (int p = 0; p < kMaxPlanes; ++p) {
        if (view->planes[p] != nullptr) block.view.planes[p] += first_pair * view->plane_stride[p];
      }
      block.floats.resize(static_cast<size_t>(together * block.tokens * dim));
    }
    // A dense side beside an encoded one has its residual behind the tokens that are encoded on the other.
    const bool one_dense = coded_keys != coded_values;
    const SequenceLength& of_values = args.value_lengths != nullptr ? args.value_lengths[b] : length;
    const int64_t first = length.sinks, all = first + length.encoded + length.residual;
    // Where each side's encoded tokens end; between the two ends one side has codes and the other dense tokens.
    const int64_t ends[2] = {first + length.encoded, first + of_values.encoded};
    std::vector<Head> of;
    for (int64_t i = 0; i < together; ++i) {
      const int64_t pair = first_pair + i, h = pair % kv_heads;
      Source encoded[2];
      for (int side = 0; side < 2; ++side) {
        const auto& [codec, view] = sides[side];
        if (codec->planes == nullptr) {
          encoded[side] = {.rows = view->planes[0] + pair * view->plane_stride[0], .dtype = tokens, .stride = dim};
        } else if (ReadsCodes(*codec)) {
          Codes& own = codes[static_cast<size_t>(i)][static_cast<size_t>(side)];
          own = all_codes[side].Behind(pair);
          encoded[side].codes = &own;
        } else {
          encoded[side].block = &blocks[side], encoded[side].head = i;
        }
      }
      Source residual[2] = {SourceOf(args.residual_keys, b, h, one_dense && !coded_keys ? length.encoded : 0),
                            SourceOf(args.residual_values, b, h, one_dense && !coded_values ? length.encoded : 0)};
      if (args.values_in_ring) residual[1].ring = args.residual_values.tokens, residual[1].first = of_values.encoded;
      const auto source_at = [&](int side, int64_t token) {
        Source source = token < ends[side] ? encoded[side] : residual[side];
        source.first += token - (token < ends[side] ? first : ends[side]);
        return source;
      };
      const auto at = static_cast<size_t>(i) * values_of;
      float *sum = sum_of(pair, split), *out = &in_order[2 * at];
      for (int64_t head = 0; head < heads; ++head) sum[head] = -1e30f, sum[heads + head] = 0;
      of.push_back({.dim = dim,
                    .heads = heads,
                    .pairs = pairs,
                    .queries = queries.data() + at,
                    .coded_queries = coded.empty() ? nullptr : coded.data() + at,
                    .sums = query_sums.data() + i * heads * sums_of,
                    .softcap = args.softcap,
                    .m = sum,
                    .l = sum + heads,
                    .by_order = {out, out + heads * dim},
                    .segments = {{0, first, {SourceOf(args.sink_keys, b, h, 0), SourceOf(args.sink_values, b, h, 0)}}}});
      int64_t begin = first;
      for (const int64_t end : {std::min(ends[0], ends[1]), std::max(ends[0], ends[1]), all}) {
        of.back().segments.push_back({begin, end, {source_at(0, begin), source_at(1, begin)}});
        begin = end;
      }
    }
    const int64_t hidden = args.window > 0 ? std::max<int64_t>(all - args.window, 0) : 0;
    // Where blocks begin, so that none is decoded twice.
    const int64_t grain = std::max(blocks[0].tokens, blocks[1].tokens);
    const auto cut = [&](int64_t i) {
      const int64_t at = hidden + (all - hidden) * i / splits;
      return grain == 0 || at <= first || i == 0 || i == splits ? at : std::min(first + (at - first + grain / 2) / grain * grain, all);
    };
#if KVQ_HAS_AVX2
    Attend(of, cut(split), cut(split + 1));
#else
    (void)cut;
#endif
    for (int64_t i = 0; i < together; ++i) {
      const Head& own = of[static_cast<size_t>(i)];
      float* out = out_of(first_pair + i, split);
      std::vector<float> decoded(static_cast<size_t>(dim));
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t d = 0; d < dim; ++d) out[head * dim + d] = own.by_order[0][head * dim + d];
        if (pairs) AsTheyWere(dim, out + head * dim);
        if (!coded_values) continue;
        for (int64_t d = 0; d < dim; ++d) {
          decoded[static_cast<size_t>(value_order.empty() ? d : value_order[static_cast<size_t>(d)])] = own.by_order[1][head * dim + d];
        }
        Unrotate(TurnOfCodes(values, dim), dim, decoded.data());
        Unrotate(rules.value_rotation, dim, decoded.data());
        for (int64_t d = 0; d < dim; ++d) out[head * dim + d] += decoded[static_cast<size_t>(d)];
      }
    }
  });

  std::vector<float> row(static_cast<size_t>(dim));
  for (int64_t pair = 0; pair < all_heads; ++pair) {
    for (int64_t head = 0; head < heads; ++head) {
      float m = -1e30f, l = 0;
      for (int64_t split = 0; split < splits; ++split) m = std::max(m, sum_of(pair, split)[head]);
      std::fill(row.begin(), row.end(), 0.0f);
      for (int64_t split = 0; split < splits; ++split) {
        const float factor = std::exp2(sum_of(pair, split)[head] - m);
        l += factor * sum_of(pair, split)[heads + head];
        const float* out = out_of(pair, split) + head * dim;
        for (int64_t i = 0; i < dim; ++i) row[static_cast<size_t>(i)] += factor * out[i];
      }
      if (args.sink_logits != nullptr) l += std::exp2(args.sink_logits[pair % kv_heads * heads + head] * kLog2E - m);
      for (float& x : row) x = l == 0 ? 0 : x / l;
      StoreRow(row.data(), dim, args.dtype, (pair * heads + head) * dim, args.out);
    }
  }
}

}  // namespace kvq::host
