// Codes of one head as attention on the host reads them (HostCodec): as they lie (kernels/code_row.h), times their groups' scales.
// Codes that are whole numbers in words become numbers in registers, again for each use; of others (odd bits, tables, small floats, vectors
// of a token that have different scales) some tokens at a time become float32 in a first cache.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/host/avx2.h"
#include "kernels/scheme.h"

namespace kvq::host {

inline constexpr int64_t kTileFloats = 2048, kMostTokens = 64;  // of a tile's keys: with the values half a first cache
inline constexpr int64_t kMostCodes = 8192;                     // where they are codes that are read as they are stored

// One head's codes, and how their words become channels.
struct Codes {
  int bits = 0, low_bits = 0, group = 0;  // of a code, and of it in words; channels of a group
  int64_t dim = 0, words = 0, width = 0, groups = 0;  // of a token; of a vector
  const uint32_t* rows = nullptr;
  const uint8_t* odd = nullptr;  // bits above those in words
  HostCodec host;
  CodecParams params;
  KvView view;  // that begins at this head
  std::vector<int32_t> places;  // of each lane of words that are read together: the group of its first field
  int32_t steps[8] = {};        // and by how many groups two vectors' fields are further on
  bool alike = false;           // all reads' places are those of the first, and there are no steps
  float table[16] = {};         // what a code is, where that is an entry

  // Those of the KV head that is so many behind this one.
  Codes Behind(int64_t pairs) const;
  // Whether they are numbers themselves, whole in their words, and all vectors of a token have the same scales.
  bool direct() const { return bits == low_bits && host.element == Element::kNumber && alike; }
};

// Whether a codec's codes can be read as they lie; others their codec decodes, a block at a time.
bool ReadsCodes(const Codec& codec);

// Those of the first KV head of the first sequence, where ReadsCodes.
Codes CodesOf(const Codec& codec, const CodecParams& params, const KvView& view);

// The number of vector v's code in its lane's word: there are 32 / bits of eight words, 16 / bits of four.
constexpr int FieldOf(int bits, int width, int v) { return width == 8 ? v / 2 + v % 2 * (16 / bits) : v; }
// Codes become numbers by a conversion, or as the highest bits of a mantissa: half of them each, as on a processor whose vector registers
// are made of halves (Zen 1) no multiply-add begins while a conversion does.
constexpr bool InMantissa(int v) { return v % 2 == 1; }
// What is added to those. (Of codes that are spread evenly their sums then have some three times the rounding error.)
constexpr float Bias(int bits, int v) { return InMantissa(v) ? static_cast<float>(1 << bits) : 0; }
// What vector v's come times. Powers of two: nothing is rounded.
constexpr float Weight(int bits, int width, int v) { return InMantissa(v) ? 1 : static_cast<float>(1u << FieldOf(bits, width, v) * bits); }

// The weight of each number of a row of codes that are direct.
std::vector<float> CodeWeights(const Codec& codec, int64_t dim);

// Channel of each number of a row of codes that is read: of some words all fields, of each both sides, of each word.
std::vector<int32_t> CodeOrder(const Codec& codec, int64_t dim);

#if KVQ_HAS_AVX2
// Scales of a tile's groups, and what is added to element times scale; zero behind them. Groups have 16 channels or more.
struct Meta {
  alignas(64) float scales[kMostCodes / 16 + 16], shifts[kMostCodes / 16 + 16];
};
void LoadMeta(const Codes& codes, int64_t first, int64_t n, Meta& meta);

// n tokens from `first` on as float32, in CodeOrder, where codes are not direct().
void Widen(const Codes& codes, int64_t first, int64_t n, const Meta& meta, float* to);

// kWidth words, eight or four of them, as lanes. Of four the low halves are in the first four lanes and the high halves in the others.
template <int kWidth>
KVQ_AVX2_INLINE __m256i LoadWords(const uint32_t* from) {
  if constexpr (kWidth == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 16, 16, 16, 16));
}
// Vector v's codes as numbers, times Weight, plus Bias.
template <int kBits, int kWidth>
KVQ_AVX2_INLINE Floats WeighedNumbersOf(__m256i codes, int v) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const int shift = FieldOf(kBits, kWidth, v) * kBits, down = shift + kBits - 23;
  if (!InMantissa(v)) return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(static_cast<int>(kMask << shift))));
  const __m256i moved = down > 0 ? _mm256_srli_epi32(codes, down) : _mm256_slli_epi32(codes, -down);
  const __m256i mantissa = _mm256_and_si256(moved, _mm256_set1_epi32(static_cast<int>(kMask << (23 - kBits))));
  return _mm256_or_ps(_mm256_castsi256_ps(mantissa), Set(static_cast<float>(1 << kBits)));
}
#endif  // KVQ_HAS_AVX2

}  // namespace kvq::host
