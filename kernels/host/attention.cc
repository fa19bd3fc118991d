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
  const float* sums;   // of the second, [heads, groups and room behind them]
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

// Codes that are numbers, in CodeOrder, times CodeWeights.
template <int kBits, int kWidth, bool kOne>
struct CodeReader {
  static constexpr bool kCodes = true, kOneGroup = kOne;
  static constexpr int kVectors = 32 / kBits * kWidth / 8;
  const Codes& c;
  int64_t first;
  const Meta& meta;
  const uint32_t* rows = c.rows + first * c.words;

  KVQ_AVX2_INLINE __m256i Read(int64_t t, int64_t i) const { return LoadWords<kWidth>(rows + t * c.words + i * kWidth); }
  KVQ_AVX2_INLINE static Floats Number(__m256i codes, int v) {
    return WeighedNumbersOf<kBits>(codes, FieldOf(kBits, kWidth, v) * kBits);
  }
  static constexpr float Weight(int v) { return host::Weight(kBits, FieldOf(kBits, kWidth, v) * kBits); }
  KVQ_AVX2_INLINE void Fetch(int64_t t) const { host::Fetch(c, first + t); }
};

// Rows of numbers, some vectors at a time; of bfloat16 in the order EvenThenOdd.
template <DType kType, int kVectors_>
struct RowReader {
  using T = std::conditional_t<kType == DType::kFloat32, float, uint16_t>;
  static constexpr bool kCodes = false, kOneGroup = false;
  static constexpr int kVectors = kVectors_;
  const T* rows;
  int64_t stride, fetched;  // elements from token to token; those of a token that are not in a cache yet

  KVQ_AVX2_INLINE const T* Read(int64_t t, int64_t i) const { return rows + t * stride + i * kVectors * kLanes; }
  KVQ_AVX2_INLINE static Floats Number(const T* from, int v) {
    if constexpr (kType == DType::kFloat32) return Load(from + v * kLanes);
    else if constexpr (kType == DType::kFloat16) return LoadHalf(from + v * kLanes);
    else {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + v / 2 * kPairLanes));
      return v % 2 == 0 ? EvenOf(both) : OddOf(both);
    }
  }
  static constexpr float Weight(int) { return 1; }
  KVQ_AVX2_INLINE void Fetch(int64_t t) const {
    constexpr int64_t kSize = sizeof(T);
    for (int64_t i = 0; i < fetched; i += 64 / kSize) __builtin_prefetch(rows + t * stride + i + kAhead / kSize, 0, 2);
  }
};

// Logits of kTokens tokens from t on for some queries, up to sums over four lanes; behind n - 1 that one again. `sums` of the queries'
// numbers, [heads, Lanes(groups)].
template <int kHeads, int kTokens, typename R>
KVQ_AVX2_INLINE void Dots(const R& r, const float* queries, const float* sums, int64_t t, int64_t n, int64_t dim,
                          __m128 (&lanes)[kHeads][kMostTokens]) {
  constexpr bool kScales = R::kCodes && !R::kOneGroup;  // each vector has its own
  Floats sum[kTokens][kHeads];
  int64_t token[kTokens];
#pragma GCC unroll 4
  for (int k = 0; k < kTokens; ++k) {
    token[k] = std::min(t + k, n - 1);
    for (int h = 0; h < kHeads; ++h) sum[k][h] = Zeros();
    if constexpr (kScales) {  // what lies behind a token's groups is of the next, times 0
      for (int64_t g = 0; g < r.c.groups; g += kLanes) {
        const Floats shift = Load(r.meta.shifts + token[k] * r.c.groups + g);
        for (int h = 0; h < kHeads; ++h) sum[k][h] = Fma(shift, Load(sums + h * Lanes(r.c.groups) + g), sum[k][h]);
      }
    }
    r.Fetch(token[k]);
  }
  [[maybe_unused]] Floats scale[kTokens];
  const float* q = queries;
#pragma GCC unroll 2
  for (int64_t i = 0; i < dim / (R::kVectors * kLanes); ++i) {
    decltype(r.Read(0, 0)) stored[kTokens];
#pragma GCC unroll 4
    for (int k = 0; k < kTokens; ++k) stored[k] = r.Read(token[k], i);
#pragma GCC unroll 16
    for (int v = 0; v < R::kVectors; ++v, q += kLanes) {
      Floats numbers[kTokens];
#pragma GCC unroll 4
      for (int k = 0; k < kTokens; ++k) {
        numbers[k] = R::Number(stored[k], v);
        if constexpr (kScales) {
          if (v == 0 || (v % 2 == 0 && r.c.steps[v / 2] != r.c.steps[v / 2 - 1])) {
            scale[k] = Places(r.c, r.meta.scales + token[k] * r.c.groups, i, v);
          }
          numbers[k] = Multiply(numbers[k], scale[k]);
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const Floats of = Load(q + h * dim);
#pragma GCC unroll 4
        for (int k = 0; k < kTokens; ++k) sum[k][h] = Fma(numbers[k], of, sum[k][h]);
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kTokens; ++k) {
    for (int h = 0; h < kHeads; ++h) lanes[h][t + k] = Folded(sum[k][h]);
  }
}

// x[h][t]: logits of n tokens for some queries.
template <int kHeads, typename R>
KVQ_AVX2 void ReadDots(const R& r, const float* queries, const float* sums, int64_t n, int64_t dim, Logits* x) {
  constexpr int kTokens = kHeads == 3 ? 2 : 4;  // side by side: a query is loaded once for them, and no sum waits long for the one before
  __m128 lanes[kHeads][kMostTokens];
  for (int64_t t = 0; t < n; t += kTokens) {
    if (t % 8 == 0) FetchAhead(/*lines=*/16);
    Dots<kHeads, kTokens>(r, queries, sums, t, n, dim, lanes);
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int64_t t = 0; t < n; t += 4) {
      const __m128* of = lanes[h] + t;
      _mm_storeu_ps(x[h] + t, Sums(of[0], of[1], of[2], of[3]));
    }
    if constexpr (R::kCodes && R::kOneGroup) {
      for (int64_t t = 0; t < n; t += kLanes) {
        const Floats shifts = Multiply(Load(r.meta.shifts + t), Set(sums[h * kLanes]));
        Store(x[h] + t, Fma(Load(x[h] + t), Load(r.meta.scales + t), shifts));
      }
    }
  }
}

// out[h] += sum over tokens of x[h][t] times the values of t. Behind n, x is zero to the end of a vector.
template <int kHeads, typename R>
KVQ_AVX2 void ReadWeighted(const R& r, const Logits* x, int64_t n, int64_t dim, float* out) {
  alignas(32) Logits scaled[kHeads];
  alignas(32) float shift[kHeads][kTileFloats / 64];  // of a group: what all its channels get
  if constexpr (R::kCodes && R::kOneGroup) {
    for (int h = 0; h < kHeads; ++h) {
      Floats sum = Zeros();
      for (int64_t t = 0; t < n; t += kLanes) {
        const Floats weights = Load(x[h] + t);
        sum = Fma(weights, Load(r.meta.shifts + t), sum);
        Store(scaled[h] + t, Multiply(weights, Load(r.meta.scales + t)));
      }
      shift[h][0] = Sum(sum);
    }
  } else if constexpr (R::kCodes) {
    for (int64_t g = 0; g < r.c.groups; g += kLanes) {  // some lanes may be of no group
      Floats sum[kHeads];
      for (int h = 0; h < kHeads; ++h) sum[h] = Zeros();
      for (int64_t t = 0; t < n; ++t) {
        const Floats shifts = Load(r.meta.shifts + t * r.c.groups + g);
        for (int h = 0; h < kHeads; ++h) sum[h] = Fma(Set(x[h][t]), shifts, sum[h]);
      }
      for (int h = 0; h < kHeads; ++h) Store(shift[h] + g, sum[h]);
    }
  }
  const Logits* weights = R::kOneGroup ? scaled : x;
  // Vectors side by side: a weight is loaded once for them, and the sums of three heads are in registers, with the weights and, of codes,
  // what a number is made from.
  constexpr int kStep = std::min(R::kVectors, R::kCodes && kHeads == 3 ? 2 : 4);
  for (int64_t t = 0; t < n; ++t) r.Fetch(t);
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
        const auto stored = r.Read(t, i);
        Floats weight[kHeads];
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) weight[h] = Set(weights[h][t]);
#pragma GCC unroll 4
        for (int v = 0; v < kStep; ++v) {
          Floats number = R::Number(stored, first + v);
          if constexpr (R::kCodes && !R::kOneGroup) number = Multiply(number, Places(r.c, r.meta.scales + t * r.c.groups, i, first + v));
#pragma GCC unroll 4
          for (int h = 0; h < kHeads; ++h) sum[h][v] = Fma(weight[h], number, sum[h][v]);
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
        for (int v = 0; v < kStep; ++v) {
          Floats added = Zeros();
          if constexpr (R::kCodes) added = R::kOneGroup ? Set(shift[h][0]) : Places(r.c, shift[h], i, first + v);
          added = Add(added, Load(out + h * dim + v * kLanes));
          Store(out + h * dim + v * kLanes, Fma(sum[h][v], Set(1 / R::Weight(first + v)), added));
        }
      }
    }
  }
}

// ---- a tile

// The largest of n logits; NaN where one is not finite. What is behind them, up to a whole vector, becomes the lowest number.
KVQ_AVX2 float Largest(float* x, int64_t n) {
  for (int64_t t = n; t % kLanes != 0; ++t) x[t] = std::numeric_limits<float>::lowest();
  Floats top = Load(x), poison = Zeros();
  for (int64_t t = 0; t < n; t += kLanes) {
    const Floats own = Load(x + t);
    top = _mm256_max_ps(own, top);
    poison = Fma(own, Zeros(), poison);
  }
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half))) + Sum(poison);
}

// x[t] = 2^(x[t] - m); returns their sum. Behind n they become 0, up to a whole vector.
KVQ_AVX2 float Exponentials(float* x, int64_t n, float m) {
  Floats sum = Zeros();
  for (int64_t t = 0; t < n; t += kLanes) {  // Exp2, but that sums are fused
    const Floats y = Add(Load(x + t), Set(-m)), least = Set(-125);
    const Floats bounded = _mm256_max_ps(least, y);  // NaN stays
    const Floats whole = _mm256_round_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats f = Multiply(Add(bounded, Multiply(whole, Set(-1))), Set(0.69314718f));
    Floats e = Fma(f, Set(0.00019841270f), Set(0.0013888889f));
    for (const float c : {0.0083333338f, 0.041666668f, 0.16666667f, 0.5f, 1.0f, 1.0f}) e = Fma(f, e, Set(c));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    e = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(e), power));
    e = _mm256_andnot_ps(_mm256_cmp_ps(y, least, _CMP_LT_OQ), e);
    Store(x + t, e);
    sum = Add(sum, e);
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
  c.groups == 1 ? work(CodeReader<kBits, kWidth, true>{c, tile.first, tile.meta})
                : work(CodeReader<kBits, kWidth, false>{c, tile.first, tile.meta});
}
template <DType kType, typename Work>
KVQ_AVX2 void WithRows(const void* rows, int64_t stride, int64_t fetched, int64_t dim, const Work& work) {
  const auto* from = static_cast<const typename RowReader<kType, 2>::T*>(rows);
  dim % (4 * kLanes) == 0 ? work(RowReader<kType, 4>{from, stride, fetched}) : work(RowReader<kType, 2>{from, stride, fetched});
}
template <typename Work>
KVQ_AVX2 void WithReader(const Tile& tile, int64_t dim, const Work& work) {
  const Source& source = *tile.source;
  if (tile.floats != nullptr) {
    WithRows<DType::kFloat32>(tile.floats, dim, 0, dim, work);
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
      case DType::kFloat32: WithRows<DType::kFloat32>(rows, source.stride, dim, dim, work); break;
      case DType::kFloat16: WithRows<DType::kFloat16>(rows, source.stride, dim, dim, work); break;
      case DType::kBFloat16: WithRows<DType::kBFloat16>(rows, source.stride, dim, dim, work);
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
  const int64_t groups = keys.source->codes != nullptr ? Lanes(keys.source->codes->groups) : 0;
  for (int64_t head = 0, count; head < of.heads; head += count) {
    const int64_t left = of.heads - head;
    count = left == 4 ? 2 : std::min<int64_t>(left, kMostHeads);
    const float* q = queries + head * dim;
    WithReader(keys, dim, [&](const auto& reader) KVQ_AVX2 {
      WithHeads(count, [&](auto some) KVQ_AVX2 { ReadDots<some>(reader, q, of.sums + head * groups, n, dim, x); });
    });
    for (int64_t h = 0; h < count; ++h) {
      float &m = of.m[head + h], &l = of.l[head + h];
      if (of.softcap > 0) Cap(x[h], n, of.softcap);
      const float top = Largest(x[h], n);
      if (!(top <= m)) {
        const float factor = m - top > -125 ? Exp2(m - top) : 0;
        m = top, l *= factor;
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
    if (source.codes->direct()) return;
    Widen(*source.codes, tile.first, n, tile.meta, to);
    tile.floats = to;
  } else if (source.ring > 0 || pairs != (source.dtype == DType::kBFloat16)) {
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
  const int64_t dim = all[0].dim, tile = std::min<int64_t>(kTileFloats / dim, kMostTokens);
  alignas(64) float keys[kTileFloats], values[kTileFloats];
  Tile tiles[2];
  for (int64_t at = begin; at < end;) {
    const Segment& segment = all[0].SegmentAt(at);
    const int64_t from = at - segment.begin;
    int64_t n = std::min({tile, end - at, segment.end - at});
    for (const Source& side : segment.sides) {
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
  const std::vector<float> key_weights = CodeWeights(keys, dim);

  const bool pairs = tokens == DType::kBFloat16;

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
    const int64_t group = GroupOf(args.key_params, dim), groups = ReadsCodes(keys) ? Lanes(dim / group) : 0;
    std::vector<float> query_sums(static_cast<size_t>(together * heads * groups));
    std::vector<float> in_order(static_cast<size_t>(together) * 2 * values_of);
    LoadRow(args.queries, args.dtype, first_pair * heads * dim, together * heads * dim, queries.data());
    for (float& q : queries) q *= args.scale * kLog2E;
    for (int64_t head = 0; coded_keys && head < together * heads; ++head) {
      std::vector<float> rotated(queries.begin() + head * dim, queries.begin() + (head + 1) * dim);
      Rotate(rules.key_rotation, dim, rotated.data());
      Rotate(TurnOfCodes(keys, dim), dim, rotated.data());
      for (int64_t g = 0; groups > 0 && g < dim / group; ++g) {
        float& sum = query_sums[static_cast<size_t>(head * groups + g)];
        for (int64_t i = g * group; i < (g + 1) * group; ++i) sum += rotated[static_cast<size_t>(i)];
      }
      for (int64_t i = 0; i < dim; ++i) {
        const auto at = static_cast<size_t>(i);
        coded[static_cast<size_t>(head * dim + i)] = rotated[key_order.empty() ? at : static_cast<size_t>(key_order[at])] / (key_weights.empty() ? 1 : key_weights[at]);
      }
    }
    if (pairs) EvenThenOdd(together * heads * dim, queries.data());
    const std::pair<const Codec*, const KvView*> sides[2] = {{&keys, &args.keys}, {&values, &args.values}};
    const CodecParams params[2] = {args.key_params, args.value_params};
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
          own = CodesOf(*codec, params[side], *view, pair);
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
                    .sums = query_sums.data() + i * heads * groups,
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
