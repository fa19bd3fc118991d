// How fused attention (attention.cuh) reads what a scheme has stored. A codec is a struct of constants and of one function
// that makes operands for m16n8k16 products from a word of codes; a row of the scheme table names it (Codec::device).
// Device code alone.
//
// What attention asks of a codec:
//   kDense      tokens as they are, in 16 bits; then nothing below is there
//   kBits       of a code; rows lie as code_row.h says
//   kGroup      channels, of one token, that share a scale and a zero point
//   kZero       what a zero point is taken from, see Zero
//   kPlanes     planes of metadata behind the codes: fp16 numbers, one a group
//   kUnit       what an unpacked operand has too little, as a factor
//   FieldShift  log2 of what a field has too much besides
//   Unpack      a word's fields as pairs of float16: neighbouring channels
// A scale meets one number a group and head, never an element (attention.cuh says how), so that all there is to a new kind
// of code is its Unpack.
#pragma once

#include "kernels/device/ptx.cuh"
#include "kernels/views.h"

namespace kvq {

struct Dense16 {
  static constexpr bool kDense = true;
  static constexpr int kBits = 16, kGroup = 0, kPlanes = 0;
};

// Codes of 8, 4 or 2 bits in groups along channels. A field at the bottom of a float16 is the subnormal number
// field * 2^-24, which tensor cores multiply in full.
template <int kBits_, int kGroup_, Zero kZero_>
struct AffineCodes {
  static constexpr bool kDense = false;
  static constexpr int kBits = kBits_, kGroup = kGroup_, kPlanes = 2;  // scales, zeros
  static constexpr Zero kZero = kZero_;
  static constexpr float kUnit = 16777216.0f;  // 2^24

  __device__ static constexpr int FieldShift(int field) {
    return kBits == 8 ? 0 : kBits == 4 ? field % 2 * 4 : field < 5 ? 2 * field : 2 * (field - 5);
  }

  // All fields of a word as pairs of float16, times 2^(FieldShift - 24).
  __device__ __forceinline__ static void Unpack(uint32_t word, uint32_t (&pairs)[16 / kBits]) {
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
  }
};

}  // namespace kvq
