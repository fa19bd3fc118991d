// What device code uses of C++'s standard library, for NVRTC, which has none: this stands for <cstdint>, <algorithm> and
// the other headers named in compiler.cc. Elsewhere the real ones are included.
#ifndef KVQ_STANDARD_H_
#define KVQ_STANDARD_H_

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long uintptr_t;
static_assert(sizeof(int64_t) == 8 && sizeof(void*) == 8);

namespace std {

using ::size_t;
enum class byte : unsigned char {};

template <typename T, T v>
struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  constexpr operator T() const { return v; }
  constexpr T operator()() const { return v; }
};
template <bool v>
using bool_constant = integral_constant<bool, v>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <typename T>
constexpr const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}
template <typename T>
constexpr const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}

__device__ inline float fabs(float x) { return ::fabsf(x); }

}  // namespace std

#define INFINITY __int_as_float(0x7f800000)

#endif  // KVQ_STANDARD_H_
