// float16 and bfloat16 as bits, the same on host and device: round to nearest, ties to even.
#pragma once

#include <cstdint>

#include "kernels/views.h"
#include "kernels/vector_math.h"

namespace kvq {

KVQ_HD inline float BFloat16ToFloat(uint16_t h) { return BitsFloat(uint32_t{h} << 16); }

KVQ_HD inline uint16_t FloatToBFloat16(float x) {
  const uint32_t bits = FloatBits(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7FC0);
}

// On a CPU the exponent is rebased by a multiplication, which also makes subnormals right.
KVQ_HD inline float HalfToFloat(uint16_t h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, rest = h & 0x7FFFu;
  const float magnitude = BitsFloat(rest << 13) * BitsFloat(0x77800000);  // * 2^112
  // What was infinity or NaN keeps the full exponent.
  return BitsFloat(FloatBits(magnitude) | sign | (rest >= 0x7C00 ? 0x7F800000u : 0u));
#endif
}

// One NaN for all, as CPU and GPU make different ones.
KVQ_HD inline uint16_t FloatToHalf(float x) {
#ifdef __CUDA_ARCH__
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return x == x ? half : uint16_t{0x7E00};
#else
  const uint32_t bits = FloatBits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude >= 0x47800000) {  // 65536 and more, infinity, NaN
    half = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: the addition aligns and rounds
    half = FloatBits(BitsFloat(magnitude) + 0.5f) - FloatBits(0.5f);
  } else {
    half = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(magnitude > 0x7F800000 ? half : half | sign);
#endif
}

// Element `index` of an array of a run-time type.
KVQ_HD inline float LoadElement(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16: return HalfToFloat(static_cast<const uint16_t*>(data)[index]);
    case DType::kBFloat16: return BFloat16ToFloat(static_cast<const uint16_t*>(data)[index]);
    default: return static_cast<const float*>(data)[index];
  }
}
KVQ_HD inline void StoreElement(void* data, DType dtype, int64_t index, float x) {
  switch (dtype) {
    case DType::kFloat16: static_cast<uint16_t*>(data)[index] = FloatToHalf(x); break;
    case DType::kBFloat16: static_cast<uint16_t*>(data)[index] = FloatToBFloat16(x); break;
    default: static_cast<float*>(data)[index] = x;
  }
}

}  // namespace kvq
