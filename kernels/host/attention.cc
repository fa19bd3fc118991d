#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/error.h"
#include "kernels/groups.h"
#include "kernels/host/step.h"

namespace kvq::host {
namespace {

constexpr int64_t kTileFloats = 2048, kMostTokens = 64;  // of a tile's keys: with the values half a first cache
constexpr float kLog2E = 1.44269504f;

// One head's codes, and how their words become channels (kernels/code_row.h).
struct Codes {
  int bits = 0, group = 0;
  Zero zero = Zero::kOfCodes;
  int64_t dim = 0, words = 0, width = 0, groups = 0;  // of a token; of a vector
  const uint32_t* rows = nullptr;
  const uint16_t *scales = nullptr, *zeros = nullptr;
  std::vector<int32_t> places;  // of each word: the group of its first field
};

// Words of a row that are decoded together.
int64_t Width(int bits, int64_t dim) { return dim * bits / 32 % 8 == 0 ? 8 : 4; }

// Channel of each number of a decoded row: of some words all fields, of each both sides, of each word.
std::vector<int32_t> CodeOrder(int bits, int64_t dim) {
  const int64_t words = dim * bits / 32, chunk_words = words / 4, run = 128 / bits, width = Width(bits, dim);
  std::vector<int32_t> order;
  for (int64_t first = 0; first < words; first += width) {
    for (int64_t i = 0; i < 32 / bits; ++i) {
      for (int64_t w = first; w < first + width; ++w) {
        order.push_back(static_cast<int32_t>(w % chunk_words * run + i / 2 * 8 + w / chunk_words * 2 + i % 2));
      }
    }
  }
  return order;
}

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
      codec->decode(params, view, begin, out);
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
  const float *queries, *coded_queries;  // times scale and log2 e, [heads, dim]; the second rotated, in the keys' order of codes
  float *m, *l;        // of each query head: the largest logit, the sum of exponentials
  float* by_order[2];  // the output, [heads, dim], of dense values and of encoded ones, which are rotated and may have an order
  std::vector<Segment> segments = {};
  const Segment& SegmentAt(int64_t token) const {
    return *std::find_if(segments.begin(), segments.end(), [&](const Segment& s) { return token < s.end; });
  }
};

#if KVQ_HAS_AVX2
// Words of codes, and the numbers that they become.
template <int kWords>
struct Words;
template <>
struct Words<4> {
  using Ints = __m128i;
  using Floats = __m128;
  KVQ_AVX2 inline __attribute__((always_inline)) static Ints Load(const uint32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats Set(float x) { return _mm_set1_ps(x); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats Gather(const float* p, const int32_t* at) {
    return _mm_i32gather_ps(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), 4);
  }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats Multiply(Floats a, Floats b) { return _mm_mul_ps(a, b); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats Negated(Floats x) { return _mm_xor_ps(x, _mm_set1_ps(-0.0f)); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats Fma(Floats a, Floats b, Floats c) { return _mm_fmadd_ps(a, b, c); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Ints ShiftRight(Ints x, int n) { return _mm_srli_epi32(x, n); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Ints And(Ints x, int mask) { return _mm_and_si128(x, _mm_set1_epi32(mask)); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats ToFloats(Ints x) { return _mm_cvtepi32_ps(x); }
  KVQ_AVX2 inline __attribute__((always_inline)) static void Store(float* p, Floats x) { _mm_storeu_ps(p, x); }
};
template <>
struct Words<8> {
  using Ints = __m256i;
  using Floats = __m256;
  KVQ_AVX2 inline __attribute__((always_inline)) static Ints Load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats Set(float x) { return _mm256_set1_ps(x); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats Gather(const float* p, const int32_t* at) {
    return _mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), 4);
  }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats Multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats Negated(Floats x) { return _mm256_xor_ps(x, _mm256_set1_ps(-0.0f)); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats Fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Ints ShiftRight(Ints x, int n) { return _mm256_srli_epi32(x, n); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Ints And(Ints x, int mask) { return _mm256_and_si256(x, _mm256_set1_epi32(mask)); }
  KVQ_AVX2 inline __attribute__((always_inline)) static Floats ToFloats(Ints x) { return _mm256_cvtepi32_ps(x); }
  KVQ_AVX2 inline __attribute__((always_inline)) static void Store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
};

// ---- tokens of a tile as float32, one behind the other

KVQ_AVX2 void Widen(const uint16_t* from, DType dtype, int64_t n, float* to) {
  int64_t i = 0;
  if (dtype == DType::kFloat16) {
    for (; i + kLanes <= n; i += kLanes) Store(to + i, LoadHalf(from + i));
  } else {
    for (; i + kLanes <= n; i += kLanes) Store(to + i, LoadBFloat16(from + i));
  }
  for (; i < n; ++i) to[i] = LoadElement(from, dtype, i);
}

// Codes of some tokens in the order of CodeOrder, kWords at a time in a vector; kFields of a word are in one group.
template <int kBits, int kWords, bool kZeroOfCodes, int kFields, bool kOneGroup>
KVQ_AVX2 void DecodeRows(const Codes& c, int64_t first, int64_t n, float* to) {
  using V = Words<kWords>;
  constexpr int kMask = (1 << kBits) - 1, kAllFields = 16 / kBits;
  alignas(64) float meta[2][kTileFloats / 32 + 16];
  const int64_t groups = c.groups, words = c.words;
  Widen(c.scales + first * groups, DType::kFloat16, n * groups, meta[0]);
  Widen(c.zeros + first * groups, DType::kFloat16, n * groups, meta[1]);
  const uint32_t* row = c.rows + first * words;
  const float *scales = meta[0], *zeros = meta[1];
  for (int64_t t = 0; t < n; ++t, row += words, scales += groups, zeros += groups) {
    for (int64_t w = 0; w < words; w += kWords, to += 2 * kAllFields * kWords) {
      const typename V::Ints codes = V::Load(row + w);
#pragma GCC unroll 2
      for (int part = 0; part < kAllFields / kFields; ++part) {
        const int32_t* places = c.places.data() + w;
        const typename V::Floats scale = kOneGroup ? V::Set(*scales) : V::Gather(scales + part, places);
        const typename V::Floats zero = kOneGroup ? V::Set(*zeros) : V::Gather(zeros + part, places);
        // (code - z) s as code s - z s.
        const typename V::Floats shift = V::Negated(kZeroOfCodes ? V::Multiply(zero, scale) : zero);
#pragma GCC unroll 16
        for (int i = part * 2 * kFields; i < (part + 1) * 2 * kFields; ++i) {  // field i / 2, side i % 2
          const typename V::Ints code = V::And(V::ShiftRight(codes, i / 2 * kBits + i % 2 * 16), kMask);
          V::Store(to + i * kWords, V::Fma(V::ToFloats(code), scale, shift));
        }
      }
    }
  }
}
template <int kBits, int kWords, bool kZeroOfCodes>
KVQ_AVX2 void DecodeRows(const Codes& c, int64_t first, int64_t n, float* to) {
  constexpr int kFields = 16 / kBits;
  if (c.groups == 1) return DecodeRows<kBits, kWords, kZeroOfCodes, kFields, true>(c, first, n, to);
  if (c.group >= 8 * kFields) return DecodeRows<kBits, kWords, kZeroOfCodes, kFields, false>(c, first, n, to);
  if constexpr (kBits == 2) DecodeRows<kBits, kWords, kZeroOfCodes, kFields / 2, false>(c, first, n, to);  // of 32
}
template <int kBits, int kWords>
KVQ_AVX2 void DecodeRows(const Codes& c, int64_t first, int64_t n, float* to) {
  c.zero == Zero::kOfCodes ? DecodeRows<kBits, kWords, true>(c, first, n, to)
                           : DecodeRows<kBits, kWords, false>(c, first, n, to);
}
template <int kBits>
KVQ_AVX2 void DecodeRows(const Codes& c, int64_t first, int64_t n, float* to) {
  c.width == 8 ? DecodeRows<kBits, 8>(c, first, n, to) : DecodeRows<kBits, 4>(c, first, n, to);
}
KVQ_AVX2 void DecodeCodes(const Codes& c, int64_t first, int64_t n, float* to) {
  switch (c.bits) {
    case 8: return DecodeRows<8>(c, first, n, to);
    case 4: return DecodeRows<4>(c, first, n, to);
    default: return DecodeRows<2>(c, first, n, to);
  }
}

// ---- a tile

// logits[t] of n tokens for one query; rows of `dim` numbers.
KVQ_AVX2 void Dots(const float* q, const float* keys, int64_t n, int64_t dim, float* logits) {
  int64_t t = 0;
  for (; t + 4 <= n; t += 4) {
    const float* row = keys + t * dim;
    Floats a = Zeros(), b = Zeros(), c = Zeros(), d = Zeros();
    for (int64_t i = 0; i < dim; i += kLanes) {
      const Floats x = Load(q + i);
      a = Fma(x, Load(row + i), a), b = Fma(x, Load(row + dim + i), b);
      c = Fma(x, Load(row + 2 * dim + i), c), d = Fma(x, Load(row + 3 * dim + i), d);
    }
    _mm_storeu_ps(logits + t, Sums(a, b, c, d));
  }
  for (; t < n; ++t) {
    Floats a = Zeros();
    for (int64_t i = 0; i < dim; i += kLanes) a = Fma(Load(q + i), Load(keys + t * dim + i), a);
    logits[t] = Sum(a);
  }
}

// out += sum over tokens of weights[t] values[t].
KVQ_AVX2 void AddWeighted(const float* weights, const float* values, int64_t n, int64_t dim, float* out) {
  constexpr int kHeld = 8;  // vectors of the output in registers
  int64_t i = 0;
  for (; i + kHeld * kLanes <= dim; i += kHeld * kLanes) {
    Floats sum[kHeld];
#pragma GCC unroll 8
    for (int k = 0; k < kHeld; ++k) sum[k] = Load(out + i + k * kLanes);
    for (int64_t t = 0; t < n; ++t) {
      const Floats p = Set(weights[t]);
      const float* row = values + t * dim + i;
#pragma GCC unroll 8
      for (int k = 0; k < kHeld; ++k) sum[k] = Fma(p, Load(row + k * kLanes), sum[k]);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kHeld; ++k) Store(out + i + k * kLanes, sum[k]);
  }
  for (; i < dim; i += 2 * kLanes) {
    const bool two = i + kLanes < dim;
    Floats first = Load(out + i), second = two ? Load(out + i + kLanes) : Zeros();
    for (int64_t t = 0; t < n; ++t) {
      const Floats p = Set(weights[t]);
      first = Fma(p, Load(values + t * dim + i), first);
      if (two) second = Fma(p, Load(values + t * dim + i + kLanes), second);
    }
    Store(out + i, first);
    if (two) Store(out + i + kLanes, second);
  }
}

// The largest of n logits; NaN where one is.
KVQ_AVX2 float Largest(const float* x, int64_t n) {
  float top[kLanes], poison[kLanes] = {};
  for (int k = 0; k < kLanes; ++k) top[k] = x[0];
  int64_t t = 0;
  for (; t + kLanes <= n; t += kLanes) {
    for (int k = 0; k < kLanes; ++k) top[k] = x[t + k] > top[k] ? x[t + k] : top[k], poison[k] += x[t + k] * 0;
  }
  float largest = x[0], not_finite = 0;
  for (int k = 0; k < kLanes; ++k) largest = std::max(largest, top[k]), not_finite += poison[k];
  for (; t < n; ++t) largest = std::max(largest, x[t]), not_finite += x[t] * 0;
  return largest + not_finite;
}

// x[t] = 2^(x[t] - m); returns their sum. `x` has room for whole vectors.
KVQ_AVX2 float Exponentials(float* x, int64_t n, float m) {
  for (int64_t t = n; t % kLanes != 0; ++t) x[t] = -INFINITY;
  float sum[kLanes] = {};
  for (int64_t t = 0; t < n; t += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const float y = x[t + k] - m;
      x[t + k] = y < -125 ? 0 : Exp2(y);
      sum[k] += x[t + k];
    }
  }
  float all = 0;
  for (int k = 0; k < kLanes; ++k) all += sum[k];
  return all;
}

// n tokens of keys and values for all query heads of a KV head. `out` has one order of channels for the values.
KVQ_AVX2 void AttendTile(const float* queries, const float* keys, const float* values, int64_t n, int64_t dim,
                                  int64_t heads, float* m, float* l, float* const (&outs)[2],
                         int into) {
  alignas(64) float x[kMostTokens + kLanes];
  for (int64_t head = 0; head < heads; ++head) {
    Dots(queries + head * dim, keys, n, dim, x);
    const float top = Largest(x, n);
    if (!(top <= m[head])) {
      const float factor = m[head] - top > -125 ? Exp2(m[head] - top) : 0;
      m[head] = top, l[head] *= factor;
      for (float* out : outs) {
        for (int64_t i = 0; i < dim; ++i) out[head * dim + i] *= factor;
      }
    }
    l[head] += Exponentials(x, n, m[head]);
    AddWeighted(x, values, n, dim, outs[into] + head * dim);
  }
}

// n tokens of one side from token `at` of its segment on, as float32: where they are, or in `to`.
KVQ_AVX2 const float* TokensOf(const Source& source, int64_t at, int64_t n, int64_t dim, float* to) {
  if (source.block != nullptr) return source.block->Tokens(source.head, source.first + at);
  if (source.codes != nullptr) {
    DecodeCodes(*source.codes, source.first + at, n, to);
    return to;
  }
  for (int64_t t = 0; t < n; ++t) {
    const int64_t token = source.first + at + t;
    const int64_t offset = (source.ring > 0 ? token % source.ring : token) * source.stride;
    if (source.dtype == DType::kFloat32) {
      memcpy(to + t * dim, static_cast<const float*>(source.rows) + offset, static_cast<size_t>(dim) * 4);
    } else {
      Widen(static_cast<const uint16_t*>(source.rows) + offset, source.dtype, dim, to + t * dim);
    }
  }
  return to;
}

// Tokens [begin, end) of some heads, tile by tile, so that a block which spans them is decoded once.
KVQ_AVX2 void Attend(std::vector<Head>& all, int64_t begin, int64_t end) {
  const int64_t dim = all[0].dim, tile = std::min<int64_t>(kTileFloats / dim, kMostTokens);
  alignas(64) float keys[kTileFloats], values[kTileFloats];
  for (int64_t at = begin; at < end;) {
    const Segment& segment = all[0].SegmentAt(at);
    const int64_t from = at - segment.begin;
    int64_t n = std::min({tile, end - at, segment.end - at});
    for (const Source& side : segment.sides) {
      if (side.block != nullptr) n = std::min(n, side.block->tokens - (side.first + from) % side.block->tokens);
    }
    for (Head& of : all) {
      const Segment& own = of.SegmentAt(at);
      const float* k = TokensOf(own.sides[0], from, n, dim, keys);
      const float* v = TokensOf(own.sides[1], from, n, dim, values);
      AttendTile(own.sides[0].encoded() ? of.coded_queries : of.queries, k, v, n, dim, of.heads, of.m, of.l, of.by_order,
                 own.sides[1].encoded());
    }
    at += n;
  }
}
#endif  // KVQ_HAS_AVX2

// Whether codes of one layout are read as they are; others their codec decodes, a block at a time.
bool IsAffine(const Codec& codec) { return codec.planes != nullptr && codec.affine.has_value(); }

Codes CodesOf(const Codec& codec, const CodecParams& params, const KvView& view, int64_t pair) {
  Codes c;
  c.bits = codec.bits, c.group = static_cast<int>(params.group_size), c.zero = *codec.affine, c.dim = view.head_dim;
  c.words = c.dim * c.bits / 32, c.width = Width(c.bits, c.dim), c.groups = c.dim / params.group_size;
  const auto plane = [&](int p) { return view.planes[p] + pair * view.plane_stride[p]; };
  c.rows = reinterpret_cast<const uint32_t*>(plane(0));
  c.scales = reinterpret_cast<const uint16_t*>(plane(1)), c.zeros = reinterpret_cast<const uint16_t*>(plane(2));
  for (int64_t w = 0; w < c.words; ++w) {
    c.places.push_back(static_cast<int32_t>(w % (c.words / 4) * (128 / c.bits) / params.group_size));
  }
  return c;
}

Source SourceOf(const DenseView& view, int64_t b, int64_t h, int64_t first) {
  const int64_t offset = Offset(view, b, h, 0, 0) * SizeOf(view.dtype);
  return {.rows = static_cast<const std::byte*>(view.data) + offset, .dtype = view.dtype, .stride = view.token_stride,
          .first = first};
}

std::string Label(const Codec& codec) {
  if (codec.planes == nullptr) return "dense";
  return IsAffine(codec) && codec.device.label != nullptr ? codec.device.label : StrCat("int", codec.bits, "_tiles");
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
  const int64_t pairs = args.keys.batch * kv_heads;
  const bool coded_keys = keys.planes != nullptr, coded_values = values.planes != nullptr;
  if (dim % 16 != 0 || dim > kTileFloats / 4) throw InputError("decode attention wants a head_dim that is a multiple of 16 up to 512, not ", dim);
  const std::vector<int32_t> key_order = IsAffine(keys) ? CodeOrder(keys.bits, dim) : std::vector<int32_t>();
  const std::vector<int32_t> value_order = IsAffine(values) ? CodeOrder(values.bits, dim) : std::vector<int32_t>();

  // Pieces of equal work, a few for each thread: one that is held up leaves the rest to others.
  constexpr int64_t kLeast = 64;  // tokens that are worth a piece
  int64_t most = 0;
  for (int64_t b = 0; b < args.keys.batch; ++b) {
    const SequenceLength& length = args.lengths[b];
    most = std::max<int64_t>(most, length.sinks + length.encoded + length.residual);
  }
  if (args.window > 0) most = std::min<int64_t>(most, args.window);
  // A piece has one head, or all of a sequence where groups span them.
  const int64_t together = keys.block_wide || values.block_wide ? kv_heads : 1;
  const int64_t threads = omp_get_max_threads(), rows = pairs / together;
  const int64_t splits = std::clamp<int64_t>(std::min((4 * threads + rows - 1) / rows, most / kLeast), 1, 64);
  std::vector<float> sums(static_cast<size_t>(pairs * splits * 2 * heads)), outs(static_cast<size_t>(pairs * splits * heads * dim));
  const auto sum_of = [&](int64_t pair, int64_t split) { return &sums[static_cast<size_t>((pair * splits + split) * 2 * heads)]; };
  const auto out_of = [&](int64_t pair, int64_t split) { return &outs[static_cast<size_t>((pair * splits + split) * heads * dim)]; };

#pragma omp parallel for schedule(dynamic)
  for (int64_t piece = 0; piece < rows * splits; ++piece) {
    const int64_t first_pair = piece / splits * together, split = piece % splits, b = first_pair / kv_heads;
    const SequenceLength& length = args.lengths[b];
    const auto values_of = static_cast<size_t>(heads * dim);
    std::vector<float> queries(static_cast<size_t>(together) * values_of), coded(coded_keys ? queries.size() : 0);
    std::vector<float> in_order(static_cast<size_t>(together) * 2 * values_of);
    LoadRow(args.queries, args.dtype, first_pair * heads * dim, together * heads * dim, queries.data());
    for (float& q : queries) q *= args.scale * kLog2E;
    for (int64_t head = 0; coded_keys && head < together * heads; ++head) {
      std::vector<float> rotated(queries.begin() + head * dim, queries.begin() + (head + 1) * dim);
      Rotate(rules.key_rotation, dim, rotated.data());
      for (int64_t i = 0; i < dim; ++i) {
        coded[static_cast<size_t>(head * dim + i)] = rotated[static_cast<size_t>(key_order.empty() ? i : key_order[static_cast<size_t>(i)])];
      }
    }
    const std::pair<const Codec*, const KvView*> sides[2] = {{&keys, &args.keys}, {&values, &args.values}};
    const CodecParams params[2] = {args.key_params, args.value_params};
    std::vector<std::array<Codes, 2>> codes(static_cast<size_t>(together));
    Block blocks[2];
    for (int side = 0; side < 2; ++side) {
      const auto& [codec, view] = sides[side];
      if (codec->planes == nullptr || IsAffine(*codec)) continue;
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
    const SequenceLength& of_values = rules.value_lengths != nullptr ? rules.value_lengths[b] : length;
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
        } else if (IsAffine(*codec)) {
          Codes& own = codes[static_cast<size_t>(i)][static_cast<size_t>(side)];
          own = CodesOf(*codec, params[side], *view, pair);
          encoded[side].codes = &own;
        } else {
          encoded[side].block = &blocks[side], encoded[side].head = i;
        }
      }
      Source residual[2] = {SourceOf(args.residual_keys, b, h, one_dense && !coded_keys ? length.encoded : 0),
                            SourceOf(args.residual_values, b, h, one_dense && !coded_values ? length.encoded : 0)};
      if (rules.values_in_ring) residual[1].ring = args.residual_values.tokens, residual[1].first = of_values.encoded;
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
                    .queries = queries.data() + at,
                    .coded_queries = coded.empty() ? nullptr : coded.data() + at,
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
        if (!coded_values) continue;
        for (int64_t d = 0; d < dim; ++d) {
          decoded[static_cast<size_t>(value_order.empty() ? d : value_order[static_cast<size_t>(d)])] = own.by_order[1][head * dim + d];
        }
        Unrotate(rules.value_rotation, dim, decoded.data());
        for (int64_t d = 0; d < dim; ++d) out[head * dim + d] += decoded[static_cast<size_t>(d)];
      }
    }
  }

  std::vector<float> row(static_cast<size_t>(dim));
  for (int64_t pair = 0; pair < pairs; ++pair) {
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
      for (float& x : row) x = l == 0 ? 0 : x / l;
      StoreRow(row.data(), dim, args.dtype, (pair * heads + head) * dim, args.out);
    }
  }
}

}  // namespace kvq::host
