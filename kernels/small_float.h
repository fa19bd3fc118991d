// Floats of 8 and 4 bits as codes, the same on host and device: to the nearest, ties to even, what is too large to the
// largest.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include "kernels/groups.h"
#endif
#include "kernels/vector_math.h"

namespace kvq {

// A sign, exponent and mantissa bits, subnormals; kLargest is the largest number and kLargestCode its code. Codes above
// it are not numbers: kNan is written for a NaN, infinity and all NaNs of a format are read as one.
template <int kExponentBits, int kMantissaBits, int kLargest, uint32_t kLargestCode, uint32_t kNan>
struct SmallFloat {
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1, kSignShift = kExponentBits + kMantissaBits;
  static constexpr int kDropped = 23 - kMantissaBits;  // bits of a float32's mantissa

  // The code of |x|, of E2M1 alone: its numbers stand 1/2, 1, 2 apart up to 2, 4, 6, so that the nearest one is the least of three;
  // each sum leaves its number's index in the last bits, and rounds ties to where they are even.
  KVQ_HD static uint32_t Index(float x) {
    static_assert(kExponentBits == 2 && kMantissaBits == 1);
    constexpr float kWhole = 12582912;  // 1.5 2^23
#ifdef __CUDA_ARCH__
    const float eighth = __saturatef(fabsf(x) * 0.125f);  // 0 where x is NaN
    const float halves = fmaf(eighth, 16, kWhole), ones = fmaf(eighth, 8, kWhole + 2), twos = fmaf(eighth, 4, kWhole + 4);
#else
    const float magnitude = BitsFloat(FloatBits(x) & 0x7FFFFFFF);
    const float halves = magnitude * 2 + kWhole, ones = magnitude + (kWhole + 2), twos = magnitude * 0.5f + (kWhole + 4);
#endif
    return FloatBits(Smaller(Smaller(halves, ones), Smaller(twos, kWhole + 7))) - FloatBits(kWhole);
  }
#ifdef __CUDACC__
  // Of two float16 without a sign, in a word; both are that much too large.
  static constexpr uint32_t kIndexTooLarge = 0x6600;  // 1.5 2^10
  __device__ __forceinline__ static uint32_t IndexOfTwo(uint32_t magnitudes) {
    const uint32_t halves = MultiplyAddTwo(magnitudes, 0x40004000, 0x66006600), ones = AddTwo<DType::kFloat16>(magnitudes, 0x66026602);
    const uint32_t twos = MultiplyAddTwo(magnitudes, 0x38003800, 0x66046604);
    const auto smaller = SmallerOfTwo<DType::kFloat16>;
    return smaller(smaller(smaller(halves, ones), twos), 0x66076607);
  }
#endif
  KVQ_HD static uint32_t Code(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    if constexpr (kSignShift == 7) {
      uint16_t two;  // the hardware's, where there is one: the same
      if constexpr (kMantissaBits == 3) {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(0.0f), "f"(x));
      } else {
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(two) : "f"(0.0f), "f"(x));
      }
      return two;
    }
#endif
    if constexpr (kSignShift == 3) {
      const uint32_t code = Index(x) + (FloatBits(x) >> 31 << 3);
#ifdef __CUDA_ARCH__
      return code;  // a NaN that was computed has no sign
#else
      return x == x ? code : kNan;
#endif
    }
    constexpr uint32_t kSmallestNormal = uint32_t{128 - kBias} << 23, kRebias = uint32_t{127 - kBias} << 23;
    // Its last bit is the smallest number.
    constexpr auto kAlign = static_cast<float>(1 << (24 - kBias - kMantissaBits));
    const float magnitude = Smaller(BitsFloat(FloatBits(x) & 0x7FFFFFFF), kLargest);
    const uint32_t bits = FloatBits(magnitude);
    // A sum aligns and rounds what is subnormal.
    const uint32_t subnormal = FloatBits(magnitude + kAlign) - FloatBits(kAlign);
    const uint32_t normal = (bits - kRebias + ((1u << (kDropped - 1)) - 1) + (bits >> kDropped & 1)) >> kDropped;
    const uint32_t code = (bits < kSmallestNormal ? subnormal : normal) | FloatBits(x) >> 31 << kSignShift;
    return x == x ? code : kNan;
  }
  KVQ_HD static float Value(uint32_t code) {
    constexpr uint32_t kSign = 1u << kSignShift;
    const uint32_t rest = code & (kSign - 1);
    // Taken for a float32's bits, then its exponent is rebased by a multiplication, which also makes subnormals right.
    const float magnitude = BitsFloat(rest << kDropped) * BitsFloat((254u - kBias) << 23);
    const float value = BitsFloat(FloatBits(magnitude) | (code & kSign) << (31 - kSignShift));
    return rest <= kLargestCode ? value : BitsFloat(0x7FC00000);
  }
};

using E4M3 = SmallFloat<4, 3, 448, 0x7E, 0x7F>;
using E5M2 = SmallFloat<5, 2, 57344, 0x7B, 0x7F>;
using E2M1 = SmallFloat<2, 1, 6, 7, 0>;  // 0, 0.5, 1, 1.5, 2, 3, 4, 6; has no NaN

// A power of two as its exponent plus 127, of which 255 is NaN (E8M0): 2^-127 ... 2^127.
KVQ_HD inline float PowerOfTwo(uint32_t e8m0) {
  // 2^-127 is subnormal.
  const float power = BitsFloat(e8m0 == 0 ? 1u << 22 : e8m0 << 23);
  return e8m0 == 255 ? BitsFloat(0x7FC00000) : power;
}

// x, or one NaN for all, as CPU and GPU make different ones: for a float32 that is stored.
KVQ_HD inline float OneNan(float x) { return x == x ? x : BitsFloat(0x7FC00000); }

}  // namespace kvq
