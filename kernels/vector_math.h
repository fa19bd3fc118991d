// Arithmetic for loops that the compiler vectorizes, the same bits on every CPU and on the GPU: plain
// multiplications and additions, and fma where it says so, which a CPU from before 2013 does slowly.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KVQ_HD __host__ __device__
// Of a loop over numbers of a type Numbers: over shared memory several loads at a time; all of it where they are registers, and that
// alone.
#define KVQ_UNROLL _Pragma("unroll ::kvq::kUnrolled<Numbers>")
#define KVQ_UNROLL_OWN _Pragma("unroll (::kvq::kUnrolled<Numbers> > 8 ? ::kvq::kUnrolled<Numbers> : 1)")
#else
#define KVQ_HD
#define KVQ_UNROLL
#define KVQ_UNROLL_OWN
#endif

// One compilation per instruction set, picked when the program starts; the results are the same.
#if !defined(__CUDACC__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define KVQ_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KVQ_VECTOR
#endif

namespace kvq {

#ifdef __CUDACC__
template <typename Numbers>
inline constexpr int kUnrolled = 8;
template <typename Numbers>
inline constexpr int kUnrolled<Numbers&> = kUnrolled<Numbers>;
#endif

KVQ_HD inline uint32_t FloatBits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
KVQ_HD inline float BitsFloat(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The larger and the smaller of x and a bound that is a number; the bound where x is NaN. One instruction, on a GPU
// only under its own name.
KVQ_HD inline float Larger(float x, float bound) {
#ifdef __CUDA_ARCH__
  return fmaxf(x, bound);
#else
  return x > bound ? x : bound;
#endif
}
KVQ_HD inline float Smaller(float x, float bound) {
#ifdef __CUDA_ARCH__
  return fminf(x, bound);
#else
  return x < bound ? x : bound;
#endif
}

#ifdef __CUDACC__
// The larger and the smaller one, NaN where one is.
__device__ inline float LargerOrNan(float x, float y) {
#ifdef __CUDA_ARCH__
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
#else
  return x != x || x > y ? x : y;
#endif
}
__device__ inline float SmallerOrNan(float x, float y) {
#ifdef __CUDA_ARCH__
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(x), "f"(y));
  return smaller;
#else
  return x != x || x < y ? x : y;
#endif
}
#endif

// Nearest whole number, half to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
KVQ_HD inline float RoundToEven(float x) { return (x + 12582912.0f) - 12582912.0f; }

// 2^n e^f for whole n in [-125, 127] and |f| <= ln 2 / 2: Taylor to f^7, truncation below 6e-9.
KVQ_HD inline float ScaledExp(float n, float f) {
  const float e = 1 + f * (1 + f * (0.5f + f * (0.16666667f + f * (0.041666668f + f * (0.0083333338f +
                  f * (0.0013888889f + f * 0.00019841270f))))));
  return BitsFloat(FloatBits(e) + (static_cast<uint32_t>(static_cast<int32_t>(n)) << 23));
}

// 2^y for y in [-125, 127]; relative error below 2e-7.
KVQ_HD inline float Exp2(float y) {
  const float n = RoundToEven(y);
  return ScaledExp(n, (y - n) * 0.69314718f);
}

// e^x for x <= 88; 0 below -86. Relative error below 2e-7: n ln 2 is taken off in two parts.
KVQ_HD inline float Exp(float x) {
  const float clamped = x > -86.0f ? x : -86.0f;
  const float n = RoundToEven(clamped * 1.44269504f);
  const float e = ScaledExp(n, (clamped - n * 0.693359375f) + n * 2.12194440e-4f);
  return x >= -86.0f ? e : 0.0f;
}

}  // namespace kvq
