// Codes of one head as attention on the host reads them (HostCodec): as they lie (kernels/code_row.h), times their groups' scales.
// Codes that are whole numbers in words become numbers in registers, again for each use; of others (odd bits, tables, small floats)
// some tokens at a time become float32 in a first cache.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/host/avx2.h"
#include "kernels/scheme.h"

namespace kvq::host {

inline constexpr int64_t kTileFloats = 2048, kMostTokens = 64;  // of a tile's keys: with the values half a first cache

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
  float table[16] = {};         // what a code is, where that is an entry

  // Whether they are numbers themselves, whole in their words.
  bool direct() const { return bits == low_bits && host.element == Element::kNumber; }
};

// Whether a codec's codes can be read as they lie; others their codec decodes, a block at a time.
bool ReadsCodes(const Codec& codec);

// Those of a KV head of a sequence, `pair`, where ReadsCodes.
Codes CodesOf(const Codec& codec, const CodecParams& params, const KvView& view, int64_t pair);

// The number of vector v's code in its lane's word: there are 32 / bits of eight words, 16 / bits of four.
constexpr int FieldOf(int bits, int width, int v) { return width == 8 ? v / 2 + v % 2 * (16 / bits) : v; }
// Of codes that are read as numbers, whose lowest bit is bit `shift` of a lane: what they come times. Powers of two: nothing is rounded.
constexpr float Weight(int bits, int shift) { return shift + bits == 32 ? 1.0f : static_cast<float>(1u << shift); }

// The weight of each number of a row of codes that is read; empty where all are 1.
std::vector<float> CodeWeights(const Codec& codec, int64_t dim);

// Channel of each number of a row of codes that is read: of some words all fields, of each both sides, of each word.
std::vector<int32_t> CodeOrder(const Codec& codec, int64_t dim);

#if KVQ_HAS_AVX2
// Scales of a tile's groups, and what is added to element times scale; zero behind them. Groups have 16 channels or more.
struct Meta {
  alignas(64) float scales[kTileFloats / 16 + 16], shifts[kTileFloats / 16 + 16];
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
// Codes that are numbers, of which the lowest bit is bit `shift` of their lanes, times Weight(kBits, shift): where they are is where they
// stay, but for the highest, which would be a sign.
template <int kBits>
KVQ_AVX2_INLINE Floats WeighedNumbersOf(__m256i codes, int shift) {
  if (shift + kBits == 32) return _mm256_cvtepi32_ps(_mm256_srli_epi32(codes, shift));
  return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(((1 << kBits) - 1) << shift)));
}
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
#endif  // KVQ_HAS_AVX2

}  // namespace kvq::host
