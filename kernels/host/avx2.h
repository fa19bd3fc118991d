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

inline constexpr int kLanes = 8, kPairLanes = 2 * kLanes;
inline constexpr int64_t kAhead = 4096;  // bytes, of codes half: what is fetched before its use; a core alone stops at each page

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
// Half as many sums.
KVQ_AVX2_INLINE __m128 Folded(Floats x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); }
KVQ_AVX2_INLINE float Sum(Floats x) {
  __m128 half = Folded(x);
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
// The sums of four, in order.
KVQ_AVX2_INLINE __m128 Sums(__m128 a, __m128 b, __m128 c, __m128 d) {
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}

// Sixteen bfloat16 as two vectors, the even ones and the odd ones: three instructions, where two vectors of neighbours take four, which
// a processor whose vector registers are made of halves (Zen 1) splits further.
KVQ_AVX2_INLINE Floats EvenOf(__m256i both) { return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)); }
KVQ_AVX2_INLINE Floats OddOf(__m256i both) {
  return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
#endif  // KVQ_HAS_AVX2

// What is multiplied with EvenOf and OddOf sixteen numbers, in their order, as far as there are sixteen; and back.
inline void EvenThenOdd(int64_t n, float* x) {
  for (int64_t i = 0; i + kPairLanes <= n; i += kPairLanes, x += kPairLanes) {
    float odd[kLanes];
    for (int k = 0; k < kLanes; ++k) odd[k] = x[2 * k + 1];
    for (int k = 0; k < kLanes; ++k) x[k] = x[2 * k];
    for (int k = 0; k < kLanes; ++k) x[kLanes + k] = odd[k];
  }
}
inline void AsTheyWere(int64_t n, float* x) {
  for (int64_t i = 0; i + kPairLanes <= n; i += kPairLanes, x += kPairLanes) {
    float pairs[kPairLanes];
    for (int k = 0; k < kLanes; ++k) pairs[2 * k] = x[k], pairs[2 * k + 1] = x[kLanes + k];
    for (int k = 0; k < kPairLanes; ++k) x[k] = pairs[k];
  }
}

}  // namespace kvq::host
