// How the codes of one token lie in its row of head_dim * bits / 8 bytes, so that the rows of a few tokens, as
// they are, hold the operands of the tensor cores' m16n8k16 products (kernels/device/ptx.cuh), whichever way round:
// channels times tokens for the keys, tokens times channels for the values.
//
// Sixteen channels c = 16 i + r are step i of a product, and r = 8 half + 2 chunk + side names a code's place in
// it. The row is four chunks; a chunk is head_dim * bits / 128 words of 32 bits; word w has the codes of steps
// i = w S ... w S + S - 1, S = 8 / bits. The low 16 bits have side 0, the high ones side 1, and in each the
// code of step i and half h is field 2 (i - w S) + h, `bits` wide, the first in the low bits.
//
// So word & mask is a pair of neighbouring channels' codes, as 16-bit numbers.
// int4, head_dim 128: byte 0 has channels 0 (low bits) and 8, byte 1 channels 16 and 24, byte 2 channels 1 and 9.
//
// Codes of 5, 6, 7 and of 3 bits: their low 4 or 2 bits lie so; each of the odd ones above has a row of its own, of head_dim / 8
// bytes, the lowest first, where each word of the first row has as many bits as codes, one byte or two, in the words' order:
// bit b is that of the code in bits b kBits, b kBits + 1, ... of the word.
#pragma once

#include <cstdint>

#include "kernels/vector_math.h"

namespace kvq {

// Channels that one word of each chunk covers: a row has a whole number of them.
template <int kBits>
inline constexpr int kRunChannels = 128 / kBits;

// Of codes of so many bits: those that lie in words.
KVQ_HD constexpr int LowBits(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }
template <int kBits>
inline constexpr int kLowBits = LowBits(kBits);

// Where a channel's code lies in its row: the word, and its lowest bit in it; and the way back. A chunk has `chunk_words`.
struct WordPlace {
  uint32_t word, shift;
};
template <int kBits>
KVQ_HD inline WordPlace PlaceOf(uint32_t channel, uint32_t chunk_words) {
  const uint32_t w = channel / kRunChannels<kBits>, field = channel % kRunChannels<kBits> / 8;
  return {channel % 8 / 2 * chunk_words + w, channel % 2 * 16 + field * kBits};
}
template <int kBits>
KVQ_HD inline uint32_t ChannelOf(uint32_t chunk, uint32_t w, uint32_t side, uint32_t field) {
  return w * kRunChannels<kBits> + 8 * field + 2 * chunk + side;
}

// Codes of a row of head_dim channels, to and from one byte a code.
template <int kBits>
KVQ_VECTOR inline void PackRow(const uint8_t* codes, int64_t head_dim, uint8_t* row) {
  constexpr int kFields = 16 / kBits, kRun = kRunChannels<kBits>;
  const int64_t words = head_dim / kRun;
  for (int64_t w = 0; w < words; ++w) {
    uint16_t sides[8];  // [chunk, side]
    for (int i = 0; i < 8; ++i) sides[i] = codes[w * kRun + i];
    for (int field = 1; field < kFields; ++field) {
      for (int i = 0; i < 8; ++i) {
        sides[i] = static_cast<uint16_t>(sides[i] | codes[w * kRun + 8 * field + i] << (field * kBits));
      }
    }
    for (int chunk = 0; chunk < 4; ++chunk) memcpy(row + (chunk * words + w) * 4, sides + 2 * chunk, 4);
  }
}

#ifndef __CUDACC__
template <int kBits, typename T>
KVQ_VECTOR inline void UnpackRow(const uint8_t* row, int64_t head_dim, T* codes) {
  constexpr int kFields = 16 / kBits, kRun = kRunChannels<kBits>;
  constexpr uint16_t kMask = (1 << kBits) - 1;
  using Sides = uint16_t __attribute__((vector_size(16)));
  typedef T Eight __attribute__((vector_size(8 * sizeof(T))));  // which an alias of what depends on T cannot say
  const int64_t words = head_dim / kRun;
  for (int64_t w = 0; w < words; ++w) {
    uint32_t of_chunks[4];
    for (int chunk = 0; chunk < 4; ++chunk) memcpy(of_chunks + chunk, row + (chunk * words + w) * 4, 4);
    Sides sides;
    memcpy(&sides, of_chunks, sizeof sides);
#pragma GCC unroll 8
    for (int field = 0; field < kFields; ++field) {
      const Eight eight = __builtin_convertvector(sides >> (field * kBits) & kMask, Eight);
      memcpy(codes + w * kRun + 8 * field, &eight, sizeof eight);
    }
  }
}
#endif

// The rows of the kOdd odd bits of codes whose low kLow bits lie in words: written from whole codes, and added to the low ones.
template <int kLow, int kOdd>
inline void PackOddBits(const uint8_t* codes, int64_t head_dim, uint8_t* rows) {
  for (int64_t i = 0; i < kOdd * head_dim / 8; ++i) rows[i] = 0;
  for (int64_t c = 0; c < head_dim; ++c) {
    const WordPlace place = PlaceOf<kLow>(static_cast<uint32_t>(c), static_cast<uint32_t>(head_dim * kLow / 128));
    const uint32_t bit = place.word * (32 / kLow) + place.shift / kLow;
    for (int odd = 0; odd < kOdd; ++odd) {
      uint8_t& byte = rows[odd * head_dim / 8 + bit / 8];
      byte = static_cast<uint8_t>(byte | (codes[c] >> (kLow + odd) & 1) << bit % 8);
    }
  }
}
template <int kLow, int kOdd>
inline void AddOddBits(const uint8_t* rows, int64_t head_dim, uint8_t* codes) {
  for (int64_t c = 0; c < head_dim; ++c) {
    const WordPlace place = PlaceOf<kLow>(static_cast<uint32_t>(c), static_cast<uint32_t>(head_dim * kLow / 128));
    const uint32_t bit = place.word * (32 / kLow) + place.shift / kLow;
    for (int odd = 0; odd < kOdd; ++odd) {
      codes[c] = static_cast<uint8_t>(codes[c] | (rows[odd * head_dim / 8 + bit / 8] >> bit % 8 & 1) << (kLow + odd));
    }
  }
}

}  // namespace kvq
