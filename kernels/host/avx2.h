// Vectors of eight float32 numbers on processors with AVX2, FMA and F16C (2013), chosen when the program runs. Sums are fused
// multiply-adds: equal on all machines within their rounding. What is bound by memory gains nothing from AVX-512: on a Zen 4
// product and attention were no faster with it.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define KVQ_HAS_AVX2 1
#include <immintrin.h>
#define KVQ_AVX2 __attribute__((target("avx2,fma,f16c")))
#define KVQ_AVX2_INLINE KVQ_AVX2 inline __attribute__((always_inline))
#else
#define KVQ_HAS_AVX2 0
#endif

namespace kvq::host {

inline constexpr char kWantsAvx2[] = "it needs a processor with AVX2, FMA and F16C";

// Whether this processor has what the functions here want.
inline bool HasAvx2() {
#if KVQ_HAS_AVX2
  static const bool has =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has;
#else
  return false;
#endif
}

#if KVQ_HAS_AVX2
using Floats = __m256;
inline constexpr int kLanes = 8;
KVQ_AVX2_INLINE Floats Zeros() { return _mm256_setzero_ps(); }
KVQ_AVX2_INLINE Floats Set(float x) { return _mm256_set1_ps(x); }
KVQ_AVX2_INLINE Floats Load(const float* p) { return _mm256_loadu_ps(p); }
KVQ_AVX2_INLINE void Store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
KVQ_AVX2_INLINE Floats LoadHalf(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KVQ_AVX2_INLINE Floats LoadBFloat16(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
KVQ_AVX2_INLINE Floats Fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
KVQ_AVX2_INLINE Floats Multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
KVQ_AVX2_INLINE Floats Add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
KVQ_AVX2_INLINE float Sum(Floats x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
// The sums of four vectors, in order.
KVQ_AVX2_INLINE __m128 Sums(Floats a, Floats b, Floats c, Floats d) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}
#endif  // KVQ_HAS_AVX2

}  // namespace kvq::host
