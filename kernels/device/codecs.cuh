// How fused attention (attention.cuh) reads what a scheme has stored. A codec is a struct of constants and of functions that
// make operands for m16n8k16 products from a word of codes; a row of the scheme table names it (Codec::device). A plain
// scheme's is made from its formula (plain_codes.cuh). Device code alone.
//
// What attention asks of a codec:
//   kDense      tokens as they are, in 16 bits; then of the rest only kBits and zeros are there
//   kBits       of a code in words; rows lie as code_row.h says
//   kOdd        bits that a code has more, in plane 1 (code_row.h), of which a row is kOdd head_dim / 8 bytes
//   kGroup      channels, of one token, that share a scale
//   kTokens     1; or tokens that share what a channel has of metadata (ChannelCodes)
//   kZero       what a zero point is taken from, see Zero
//   kCentred    there are no zero points
//   kSigned     scales may be negative
//   kNormed     a row of elements is divided by the root of its sum of squares; of keys alone
//   kMayBreak   Broken tells from a word's codes whether one stands for NaN (which no operand does), in its bytes' highest bits
//   kPoisons    likewise Poison from a word of plane 1's metadata, whose scales do not
//   kPlanes     planes of metadata behind the codes, and kMetaBytes, what each has of a group
//   kUnit       what an unpacked operand has too little, as a factor
//   FieldShift  log2 of what a field has too much besides
//   Unpack      a word's fields, and their odd bits, as pairs of float16: neighbouring channels
//   Element     what a code is, as float32: Unpack's, with kUnit
//   Scale, ZeroOf  of a group, from the words of a token's metadata, [plane, word]
//   Encode      by a warp, of a token, where the step's own is encoded by attention; with a Room in shared memory
// A value is Scale (Element - ZeroOf), or Scale Element - ZeroOf. A scale meets one number a group and head, never an element
// (attention.cuh says how), so that all there is to a new kind of code is its Unpack.
#pragma once

#include "kernels/device/ptx.cuh"
#include "kernels/views.h"

namespace kvq {

// A word's odd bits, the lowest first: each of the low half's fields from bit 0 on, of the high half's from bit 16 on; other
// bits are anything.
template <int kOdd>
using OddWords = uint32_t[kOdd > 0 ? kOdd : 1];

struct Dense16 {
  static constexpr int kOdd = 0;
  static constexpr bool kDense = true, kCentred = true, kSigned = false, kNormed = false, kMayBreak = false;
  static constexpr bool kPoisons = false;
  static constexpr int kBits = 16, kGroup = 0, kTokens = 1, kPlanes = 0, kMetaBytes = 0;
};

// The bits of a word's fields as whole numbers, with those of the odd bits above them: pairs of float16, times
// 2^(FieldShift - 24). A number below 2^11 at the bottom of a float16 is that many times 2^-24, which tensor cores multiply in
// full.
struct NumberFields {
  template <int kBits>
  __device__ static constexpr int Shift(int field) {
    return kBits == 8 ? 0 : kBits == 4 ? field % 2 * 4 : field < 5 ? 2 * field : 2 * (field - 5);
  }
  template <int kBits, int kOdd>
  __device__ __forceinline__ static void Unpack(uint32_t word, const OddWords<kOdd>& odd, uint32_t (&pairs)[16 / kBits]) {
    if constexpr (kBits == 8) {
      pairs[0] = word & 0x00FF00FF;
      pairs[1] = ptx::PickBytes(word, 0, 0x4341);
    } else if constexpr (kBits == 4) {
      pairs[0] = word & 0x000F000F;
      pairs[1] = word & 0x00F000F0;
      pairs[2] = word >> 8 & 0x000F000F;
      pairs[3] = word >> 8 & 0x00F000F0;
    } else {
#pragma unroll
      for (int field = 0; field < 5; ++field) pairs[field] = word & 0x00030003 << 2 * field;
#pragma unroll
      for (int field = 5; field < 8; ++field) pairs[field] = word >> 10 & 0x00030003 << 2 * (field - 5);
    }
#pragma unroll
    for (int i = 0; i < kOdd; ++i) {
#pragma unroll
      for (int field = 0; field < 16 / kBits; ++field) {
        const int up = Shift<kBits>(field) + kBits + i - field;  // from bit `field` of each half to above the field's others
        const uint32_t bit = odd[i] & 0x00010001u << field;
        pairs[field] |= up >= 0 ? bit << up : bit >> -up;
      }
    }
  }
};

// Codes of 8, 4 or 2 bits in groups along channels, with fp16 scales and zeros.
template <int kBits_, int kGroup_, Zero kZero_>
struct AffineCodes {
  static constexpr int kOdd = 0;
  static constexpr bool kDense = false, kCentred = false, kSigned = false, kNormed = false, kMayBreak = false;
  static constexpr bool kPoisons = false;
  static constexpr int kBits = kBits_, kGroup = kGroup_, kTokens = 1, kPlanes = 2, kMetaBytes = 2;
  static constexpr Zero kZero = kZero_;
  static constexpr float kUnit = 16777216.0f;  // 2^24

  __device__ static constexpr int FieldShift(int field) { return NumberFields::Shift<kBits>(field); }
  __device__ __forceinline__ static void Unpack(uint32_t word, const OddWords<kOdd>& odd, uint32_t (&pairs)[16 / kBits]) {
    NumberFields::Unpack<kBits, kOdd>(word, odd, pairs);
  }
  __device__ __forceinline__ static float Element(uint32_t code) { return static_cast<float>(code); }
  template <int kWords>
  __device__ __forceinline__ static float Scale(const uint32_t (&words)[2][kWords], int group) {
    return ptx::HalfAt(words[0][group / 2], group % 2);
  }
  template <int kWords>
  __device__ __forceinline__ static float ZeroOf(const uint32_t (&words)[2][kWords], int group) {
    return ptx::HalfAt(words[1][group / 2], group % 2);
  }
};

// Codes of 4 or 2 bits of keys whose scales and minima, fp16, are those of a channel over kTokens tokens: planes of kDim numbers
// for each such group. A value is scale code + minimum. Scales and minima meet the query (LogitsOfChannelGroups).
template <int kBits_, int kTokens_, int kDim>
struct ChannelCodes {
  static constexpr int kOdd = 0;
  static constexpr bool kDense = false, kCentred = true, kSigned = false, kNormed = false, kMayBreak = false;
  static constexpr bool kPoisons = false;
  static constexpr int kBits = kBits_, kGroup = kDim, kTokens = kTokens_, kPlanes = 2;
  static constexpr int kMetaBytes = 2 * kDim / kTokens;  // a token's share
  static constexpr float kUnit = 1;  // a tile's own factor has what its fields have too little

  __device__ static constexpr int FieldShift(int) { return 0; }
  __device__ __forceinline__ static void Unpack(uint32_t word, const OddWords<kOdd>& odd, uint32_t (&pairs)[16 / kBits]) {
    NumberFields::Unpack<kBits, kOdd>(word, odd, pairs);
  }
  __device__ __forceinline__ static float Element(uint32_t code) { return static_cast<float>(code); }
};

}  // namespace kvq
