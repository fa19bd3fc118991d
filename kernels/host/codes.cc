#include "kernels/host/codes.h"

#include <algorithm>
#include <cmath>

#include "kernels/code_row.h"
#include "kernels/small_float.h"

namespace kvq::host {
namespace {

// Words of a row that are read together.
int64_t Width(int low_bits, int64_t dim) { return dim * low_bits / 32 % 8 == 0 ? 8 : 4; }

#if KVQ_HAS_AVX2
KVQ_AVX2_INLINE __m256i Bits(uint32_t lane) { return _mm256_set1_epi32(static_cast<int32_t>(lane)); }

// ---- what codes are: eight numbers, of codes whose lowest bit is bit `shift` of their lanes, with anything beside them

template <int kBits>
struct Number {
  static constexpr bool kNormed = false;
  explicit Number(const Codes&) {}
  KVQ_AVX2_INLINE Floats Of(__m256i codes, int shift) const {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(codes, shift), Bits((1u << kBits) - 1)));
  }
};

template <int kBits, bool kNormed_>
struct Entry {
  static constexpr bool kNormed = kNormed_;  // a token's are divided by their norm
  Floats low, high;
  KVQ_AVX2_INLINE explicit Entry(const Codes& c) : low(Load(c.table)), high(Load(c.table + 8)) {}
  KVQ_AVX2_INLINE Floats Of(__m256i codes, int shift) const {
    const __m256i at = _mm256_srli_epi32(codes, shift);  // of which the lowest three bits count
    if constexpr (kBits == 3) return _mm256_permutevar8x32_ps(low, at);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - shift)));
  }
};

// As SmallFloat::Value.
template <typename Float>
struct Small;
template <int kExponentBits, int kMantissaBits, int kLargest, uint32_t kLargestCode, uint32_t kNan>
struct Small<SmallFloat<kExponentBits, kMantissaBits, kLargest, kLargestCode, kNan>> {
  using Float = SmallFloat<kExponentBits, kMantissaBits, kLargest, kLargestCode, kNan>;
  static constexpr bool kNormed = false;
  explicit Small(const Codes&) {}
  KVQ_AVX2_INLINE Floats Of(__m256i codes, int shift) const {
    constexpr uint32_t kRebias = uint32_t{127 - Float::kBias} << 23, kSmallestNormal = uint32_t{128 - Float::kBias} << 23;
    const __m256i top = _mm256_slli_epi32(codes, 24 - shift);
    const __m256i rest = _mm256_and_si256(_mm256_srli_epi32(top, 24 - Float::kDropped), Bits(0x7Fu << Float::kDropped));
    const __m256i broken = _mm256_cmpgt_epi32(rest, Bits(kLargestCode << Float::kDropped));
    // Subnormal numbers, as if they were normal ones below the smallest, are twice too near to it: moving them away makes them right and
    // all others larger. (There it is a multiplication, which takes some twenty cycles where a number is subnormal.)
    const Floats normal = _mm256_castsi256_ps(_mm256_add_epi32(rest, Bits(kRebias)));
    const Floats magnitudes = _mm256_min_ps(normal, Fma(normal, Set(2), Set(-BitsFloat(kSmallestNormal))));
    const __m256i signs = _mm256_or_si256(_mm256_and_si256(top, Bits(0x80000000)), broken);
    return _mm256_or_ps(magnitudes, _mm256_castsi256_ps(signs));
  }
};

// ---- codes whose odd bits lie elsewhere, as bytes

// Of kWidth words: in each byte of a lane the one that has the odd bits of the word's codes there.
template <int kLow, int kWidth>
KVQ_AVX2_INLINE __m256i LoadOdd(const uint8_t* from) {
  const auto* at = reinterpret_cast<const __m128i*>(from);
  __m256i lanes;
  if constexpr (kLow == 4 && kWidth == 8) lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at));
  else if constexpr (kLow == 4) lanes = _mm256_broadcastsi128_si256(_mm_cvtepu8_epi32(_mm_loadu_si32(at)));
  else if constexpr (kWidth == 8) lanes = _mm256_cvtepu16_epi32(_mm_loadu_si128(at));
  else lanes = _mm256_broadcastsi128_si256(_mm_cvtepu16_epi32(_mm_loadl_epi64(at)));
  constexpr int kFirst = kLow == 4 ? 0 : 0x01010000, kSecond = kLow == 4 ? 0 : kWidth == 8 ? kFirst : 0x01010101;
  constexpr int kNext = 0x04040404;
  return _mm256_shuffle_epi8(lanes, _mm256_setr_epi32(kFirst, kFirst + kNext, kFirst + 2 * kNext, kFirst + 3 * kNext, kSecond,
                                                      kSecond + kNext, kSecond + 2 * kNext, kSecond + 3 * kNext));
}

// A lane's codes number `set`, `set` + 8 / kLow, ...
template <int kLow, int kOdd, int kWidth>
KVQ_AVX2_INLINE __m256i WithOdd(__m256i words, const __m256i (&odd)[kOdd], int set) {
  // Where the odd bits of set 0 are. A word's high half, in lanes of its own, has the last half of them.
  constexpr int kFirst = kLow == 4 ? 0x40100401 : 0x10011001;
  constexpr int kSecond = kWidth == 8 ? kFirst : kLow == 4 ? 0x4010 : 0x1001;
  const __m256i mask = _mm256_slli_epi32(_mm256_setr_epi32(kFirst, kFirst, kFirst, kFirst, kSecond, kSecond, kSecond, kSecond), set);
  __m256i bytes = _mm256_and_si256(_mm256_srli_epi32(words, set * kLow), Bits(0x01010101u * ((1u << kLow) - 1)));
#pragma GCC unroll 4
  for (int bit = 0; bit < kOdd; ++bit) {
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(odd[bit], mask), mask);
    bytes = _mm256_or_si256(bytes, _mm256_and_si256(is_set, Bits(0x01010101u << (kLow + bit))));
  }
  return bytes;
}

// ---- rows

// Of numbers of a token's groups those of vectors v and v + 1 of read i. There are some behind them.
KVQ_AVX2_INLINE Floats Places(const Codes& c, const float* groups, int64_t i, int v) {
  const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c.places.data() + i * kLanes));
  groups += c.steps[v / 2];
  return c.groups <= kLanes ? _mm256_permutevar8x32_ps(Load(groups), places) : _mm256_i32gather_ps(groups, places, 4);
}
KVQ_AVX2_INLINE void Fetch(const Codes& c, int64_t t) {
  const char* row = reinterpret_cast<const char*>(c.rows + t * c.words) + kAhead / 2;
  __builtin_prefetch(row, 0, 2);
  for (int64_t at = 64; at < c.words * 4; at += 64) __builtin_prefetch(row + at, 0, 2);
}

template <typename Element, int kLow, int kOdd, int kWidth>
KVQ_AVX2 void WidenRows(const Codes& c, int64_t first, int64_t n, const Meta& meta, float* to) {
  constexpr int kVectors = 32 / kLow * kWidth / 8, kSets = kOdd > 0 ? 8 / kLow : 1, kOddBytes = kWidth * 4 / kLow;
  const Element element(c);
  const int64_t reads = c.words / kWidth, words_of_token = c.words, groups = c.groups, dim = c.dim;
  const bool alike = c.steps[kVectors / 2 - 1] == 0;  // all vectors' scales of a read are
  for (int64_t t = 0; t < n; ++t) {
    const uint32_t* row = c.rows + (first + t) * words_of_token;
    const uint8_t* odd_row = c.odd + (first + t) * kOdd * dim / 8;
    const float *scales = meta.scales + t * groups, *shifts = meta.shifts + t * groups;
    float* const begin = to;
    Floats squares = Zeros();
    Fetch(c, first + t);
    for (int64_t i = 0; i < reads; ++i) {
      __m256i sets[kSets] = {LoadWords<kWidth>(row + i * kWidth)};
      if constexpr (kOdd > 0) {
        __m256i odd[kOdd];
        for (int bit = 0; bit < kOdd; ++bit) odd[bit] = LoadOdd<kLow, kWidth>(odd_row + bit * dim / 8 + i * kOddBytes);
        const __m256i words = sets[0];
#pragma GCC unroll 4
        for (int set = 0; set < kSets; ++set) sets[set] = WithOdd<kLow, kOdd, kWidth>(words, odd, set);
      }
      Floats scale, shift;
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v, to += kLanes) {
        if (!Element::kNormed && v % 2 == 0 && (v == 0 || !alike)) scale = Places(c, scales, i, v), shift = Places(c, shifts, i, v);
        const int field = FieldOf(kLow, kWidth, v);
        const Floats numbers = kOdd > 0 ? element.Of(sets[field % kSets], field / kSets * 8) : element.Of(sets[0], field * kLow);
        if constexpr (Element::kNormed) squares = Fma(numbers, numbers, squares);
        Store(to, Element::kNormed ? numbers : Fma(numbers, scale, shift));
      }
    }
    if constexpr (Element::kNormed) {
      const Floats scale = Set(*scales / std::sqrt(Sum(squares)));
      for (int64_t d = 0; d < dim; d += kLanes) Store(begin + d, Multiply(Load(begin + d), scale));
    }
  }
}
template <typename Element, int kLow, int kOdd>
auto RowsOf(int64_t width) {
  return width == 8 ? WidenRows<Element, kLow, kOdd, 8> : WidenRows<Element, kLow, kOdd, 4>;
}
#endif  // KVQ_HAS_AVX2

}  // namespace

bool ReadsCodes(const Codec& codec) { return codec.host.lines != nullptr; }

Codes CodesOf(const Codec& codec, const CodecParams& params, const KvView& view) {
  Codes c;
  c.dim = view.head_dim, c.bits = codec.bits, c.low_bits = LowBits(c.bits), c.group = static_cast<int>(GroupOf(params, c.dim));
  c.words = c.dim * c.low_bits / 32, c.width = Width(c.low_bits, c.dim), c.groups = c.dim / c.group;
  c.host = codec.host, c.params = params, c.view = view;
  for (uint32_t code = 0; code < 1u << std::min(c.bits, 4); ++code) {
    c.table[code] = c.host.entry != nullptr ? c.host.entry(static_cast<int>(code), static_cast<int>(c.dim)) : E2M1::Value(code);
  }
  const int64_t run = 128 / c.low_bits;  // channels of a word
  for (int64_t lane = 0; lane < c.words / c.width * 8; ++lane) {
    const int64_t w = lane / 8 * c.width + lane % c.width;
    c.places.push_back(static_cast<int32_t>(w % (c.words / 4) * run / c.group));
  }
  for (int pair_of_vectors = 0; pair_of_vectors < 8; ++pair_of_vectors) {
    c.steps[pair_of_vectors] = static_cast<int32_t>(pair_of_vectors * (c.width == 8 ? 8 : 16) % run / c.group);
  }
  c.alike = c.steps[128 / c.low_bits * c.width / 64 - 1] == 0;
  for (size_t lane = 0; lane < c.places.size(); ++lane) c.alike &= c.places[lane] == c.places[lane % 8];
  return c.Behind(0);
}

Codes Codes::Behind(int64_t pairs) const {
  Codes c = *this;
  for (int p = 0; p < kMaxPlanes; ++p) {
    if (view.planes[p] != nullptr) c.view.planes[p] += pairs * view.plane_stride[p];
  }
  c.rows = reinterpret_cast<const uint32_t*>(c.view.planes[0]);
  if (bits > low_bits) c.odd = reinterpret_cast<const uint8_t*>(c.view.planes[1]);
  return c;
}

std::vector<int32_t> CodeOrder(const Codec& codec, int64_t dim) {
  std::vector<int32_t> order;
  if (!ReadsCodes(codec)) return order;
  const int bits = LowBits(codec.bits);
  const int64_t words = dim * bits / 32, chunk_words = words / 4, run = 128 / bits, width = Width(bits, dim);
  for (int64_t first = 0; first < words; first += width) {
    for (int64_t i = 0; i < 32 / bits; ++i) {
      for (int64_t w = first; w < first + width; ++w) {
        order.push_back(static_cast<int32_t>(w % chunk_words * run + i / 2 * 8 + w / chunk_words * 2 + i % 2));
      }
    }
  }
  return order;
}

std::vector<float> CodeWeights(const Codec& codec, int64_t dim) {
  std::vector<float> weights;
  const int width = static_cast<int>(Width(codec.bits, dim)), vectors = 32 / codec.bits * width / 8;
  for (int64_t i = 0; i < dim; ++i) {
    weights.push_back(Weight(codec.bits, width, static_cast<int>(i / 8 % vectors)));
  }
  return weights;
}

#if KVQ_HAS_AVX2
KVQ_AVX2 void LoadMeta(const Codes& c, int64_t first, int64_t n, Meta& meta) {
  c.host.lines(c.params, c.view, 0, 0, first, n, meta.scales, meta.shifts);
  const int64_t all = n * c.groups;
  Store(meta.scales + all, Zeros()), Store(meta.shifts + all, Zeros());
}

KVQ_AVX2 void Widen(const Codes& c, int64_t first, int64_t n, const Meta& meta, float* to) {
  using Rows = void (*)(const Codes&, int64_t, int64_t, const Meta&, float*);
  const Rows rows = [&]() -> Rows {
    switch (c.host.element) {
      case Element::kE4M3: return RowsOf<Small<E4M3>, 8, 0>(c.width);
      case Element::kE5M2: return RowsOf<Small<E5M2>, 8, 0>(c.width);
      default: break;
    }
    if (c.host.element != Element::kNumber) {
      if (c.host.normed) return c.bits == 4 ? RowsOf<Entry<4, true>, 4, 0>(c.width) : RowsOf<Entry<3, true>, 2, 1>(c.width);
      return c.bits == 4 ? RowsOf<Entry<4, false>, 4, 0>(c.width) : RowsOf<Entry<3, false>, 2, 1>(c.width);
    }
    switch (c.bits) {
      case 7: return RowsOf<Number<7>, 4, 3>(c.width);
      case 6: return RowsOf<Number<6>, 4, 2>(c.width);
      case 5: return RowsOf<Number<5>, 4, 1>(c.width);
      case 3: return RowsOf<Number<3>, 2, 1>(c.width);
      case 8: return RowsOf<Number<8>, 8, 0>(c.width);
      case 4: return RowsOf<Number<4>, 4, 0>(c.width);
      default: return RowsOf<Number<2>, 2, 0>(c.width);
    }
  }();
  rows(c, first, n, meta, to);
}
#endif  // KVQ_HAS_AVX2

}  // namespace kvq::host
