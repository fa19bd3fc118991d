// What schemes of codes in groups share, on the CPU and on the GPU: places in views, rows in and out, the range of a group,
// loops over all of it. A scheme whose groups depend on nothing but their own numbers wants plain.h, which is built on this.
#pragma once

#include <cstdint>
#include <type_traits>
#ifndef __CUDACC__
#include <algorithm>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>
#endif

#ifndef __CUDACC__
#include "kernels/deal.h"
#endif
#include "kernels/half.h"
#include "kernels/vector_math.h"
#include "kernels/views.h"
#ifdef __CUDACC__
#include "kernels/device/ptx.cuh"
#else
#include "kernels/error.h"
#include "kernels/scheme.h"
#endif

namespace kvq {

// ---- shared by CPU and GPU

template <int kBits>
inline constexpr float kMaxCode = (1 << kBits) - 1;

// clamp(round(v), 0, m), half to even. Clamping first gives the same and keeps v in range. NaN becomes 0.
KVQ_HD inline float RoundCode(float v, float m) {
  return RoundToEven(Smaller(Larger(v, 0), m));
}

// Place of an element in DenseView::data.
KVQ_HD inline int64_t Offset(const DenseView& x, int64_t b, int64_t h, int64_t t, int64_t d) {
  return b * x.batch_stride + h * x.head_stride + t * x.token_stride + d;
}

// The codes of one token, in plane 0.
template <int kBits>
KVQ_HD inline uint8_t* CodeRow(const KvView& view, int64_t b, int64_t h, int64_t token) {
  return reinterpret_cast<uint8_t*>(view.planes[0] + (b * view.heads + h) * view.plane_stride[0]) +
         token * view.head_dim * kBits / 8;
}

// A plane's numbers of one token, `per_token` of type T: one for each group, say.
template <typename T = uint16_t>
KVQ_HD inline T* MetadataRow(const KvView& view, int plane, int64_t per_token, int64_t b, int64_t h, int64_t token) {
  return reinterpret_cast<T*>(view.planes[plane] + (b * view.heads + h) * view.plane_stride[plane]) + token * per_token;
}

// Row `index` of head_dim elements, counted over sequence, head, token.
struct Row {
  int64_t b, h, t;
  KVQ_HD Row(const DenseView& x, int64_t index)
      : b(index / x.tokens / x.heads), h(index / x.tokens % x.heads), t(index % x.tokens) {}
};

KVQ_HD inline int64_t RowsOf(const DenseView& x) { return x.batch * x.heads * x.tokens; }

// n / divisor and what is left, for n < 2^31, by a multiplication: a GPU divides in some twenty instructions.
// Granlund & Montgomery, "Division by invariant integers using multiplication" (1994): with 2^shift >= divisor and
// the factor ceil(2^(31 + shift) / divisor), the product's error stays below 1 / divisor.
struct Divisor {
  uint32_t divisor, factor, shift;
  struct Result {
    uint32_t quotient, rest;
  };
  KVQ_HD explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)), factor(0), shift(0) {
    while (uint64_t{1} << shift < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
  }
  KVQ_HD Result Of(uint32_t n) const {
    const auto quotient = static_cast<uint32_t>((uint64_t{n} * factor) >> 31 >> shift);
    return {quotient, n - quotient * divisor};
  }
};

#ifndef __CUDACC__
// ---- the host

// Calls work with the group size as a constant.
template <typename Work>
void WithGroup(int64_t group, const Work& work) {
  switch (group) {
    case 32: return work(std::integral_constant<int, 32>());
    case 64: return work(std::integral_constant<int, 64>());
    case 128: return work(std::integral_constant<int, 128>());
    default: throw std::logic_error(StrCat("no kernel has groups of ", group));
  }
}

// Calls work with the type and the group size as constants.
template <typename Work>
void WithTypeAndGroup(DType dtype, int64_t group, const Work& work) {
  WithGroup(group, [&](auto n) {
    switch (dtype) {
      case DType::kFloat32: return work(std::integral_constant<DType, DType::kFloat32>(), n);
      case DType::kFloat16: return work(std::integral_constant<DType, DType::kFloat16>(), n);
      case DType::kBFloat16: return work(std::integral_constant<DType, DType::kBFloat16>(), n);
    }
  });
}

// What WithGroup knows.
inline constexpr int64_t kThreeGroups[] = {32, 64, 128};

// "32, 64 or 128"
inline std::string GroupsText(std::span<const int64_t> groups) {
  std::string text;
  for (size_t i = 0; i < groups.size(); ++i) text += StrCat(i == 0 ? "" : i + 1 < groups.size() ? ", " : " or ", groups[i]);
  return text;
}

// Throws InputError, naming the package or scheme, where a token's channels cannot be cut into such groups.
inline void CheckGroups(const char* package, std::span<const int64_t> groups, int64_t head_dim, int64_t group) {
  if (std::find(groups.begin(), groups.end(), group) == groups.end()) {
    throw InputError(package, " groups have ", GroupsText(groups), " elements, not ", group);
  }
  if (head_dim % group != 0) {
    throw InputError(package, " wants a head_dim that is a multiple of the group size ", group, ", not ",
                     head_dim);
  }
}

// Throws InputError, naming the scheme, for a head_dim that is none of those it takes.
inline void CheckHeadDims(const char* scheme, std::span<const int64_t> head_dims, int64_t head_dim) {
  if (std::find(head_dims.begin(), head_dims.end(), head_dim) != head_dims.end()) return;
  throw InputError(scheme, " takes a head_dim of ", GroupsText(head_dims), ", not ", head_dim);
}

// Throws InputError where codes of a row do not fill the words that code_row.h wants.
inline void CheckRun(int bits, int64_t head_dim) {
  if (head_dim * bits % 128 == 0) return;
  throw InputError("codes of ", bits, " bits come in runs of ", 128 / bits, " channels: head_dim ", head_dim,
                   " is no multiple of that");
}

// Whether every eighth channel of every token of x is aligned to 16 bytes.
inline bool IsWide(const DenseView& x) {
  return (x.batch_stride | x.head_stride | x.token_stride) % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// ---- CPU

// Runs body(i) for all i, on all threads where `parallel`.
template <typename Body>
void ForEach(bool parallel, int64_t n, const Body& body) {
  constexpr int64_t kPieces = 64;
  const int64_t piece = parallel ? (n + kPieces - 1) / kPieces : n;
  if (piece == 0) return;
  Deal((n + piece - 1) / piece, [&](int64_t p) {
    for (int64_t i = p * piece; i < std::min(n, (p + 1) * piece); ++i) body(i);
  });
}

// Whether there are enough numbers for threads to share: their start and end take as long as some thousands of them.
inline bool AreMany(const DenseView& x) { return RowsOf(x) * x.head_dim > 4096; }

// n numbers, on the stack where they are few.
template <typename T>
class FewNumbers {
 public:
  explicit FewNumbers(int64_t n) : many_(n > kFew ? n : 0) {}
  T* data() { return many_.empty() ? few_ : many_.data(); }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  static constexpr int64_t kFew = 512;
  alignas(64) T few_[kFew];
  std::vector<T> many_;
};

// HostCodec::lines of fp16 scales in plane 1 and zeros in plane 2.
template <Zero kZero>
KVQ_VECTOR void HalfLines(const CodecParams& params, const KvView& in, int64_t b, int64_t h, int64_t first, int64_t tokens, float* scales,
                          float* shifts) {
  const int64_t groups = in.head_dim / GroupOf(params, in.head_dim);
  const uint16_t *scale = MetadataRow(in, 1, groups, b, h, first), *zero = MetadataRow(in, 2, groups, b, h, first);
  for (int64_t i = 0; i < tokens * groups; ++i) {
    scales[i] = HalfToFloat(scale[i]);
    shifts[i] = -HalfToFloat(zero[i]) * (kZero == Zero::kOfCodes ? scales[i] : 1);
  }
}

// n elements from `offset` on as float32, and back in the array's type.
KVQ_VECTOR inline void LoadRow(const void* data, DType dtype, int64_t offset, int64_t n, float* row) {
  if (dtype == DType::kFloat32) {
    for (int64_t i = 0; i < n; ++i) row[i] = static_cast<const float*>(data)[offset + i];
  } else if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) {
      row[i] = BFloat16ToFloat(static_cast<const uint16_t*>(data)[offset + i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) row[i] = HalfToFloat(static_cast<const uint16_t*>(data)[offset + i]);
  }
}

KVQ_VECTOR inline void StoreRow(const float* row, int64_t n, DType dtype, int64_t offset, void* data) {
  if (dtype == DType::kFloat32) {
    for (int64_t i = 0; i < n; ++i) static_cast<float*>(data)[offset + i] = row[i];
  } else if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) {
      static_cast<uint16_t*>(data)[offset + i] = FloatToBFloat16(row[i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(data)[offset + i] = FloatToHalf(row[i]);
  }
}

// Sum over the halving tree that a warp's shuffles follow: x[i] += x[i + n/2], ... Destroys x.
template <int n>
inline float TreeSum(float* x) {
  for (int stride = n / 2; stride > 0; stride /= 2) {
    for (int i = 0; i < stride; ++i) x[i] += x[i + stride];
  }
  return x[0];
}

#endif  // __CUDACC__

// Smallest and largest of a group, and NaN (else 0) where one of it is NaN or infinite, which the
// comparisons would lose.
struct GroupRange {
  float low, high, poison;
};

#ifndef __CUDACC__

template <int n>
KVQ_VECTOR GroupRange RangeOf(const float* x) {
  float low[n], high[n], poison[n];
  for (int i = 0; i < n; ++i) {
    low[i] = high[i] = x[i];
    poison[i] = x[i] * 0;
  }
  for (int stride = n / 2; stride > 0; stride /= 2) {
    for (int i = 0; i < stride; ++i) {
      low[i] = low[i + stride] < low[i] ? low[i + stride] : low[i];
      high[i] = high[i + stride] > high[i] ? high[i + stride] : high[i];
    }
  }
  return {low[0], high[0], TreeSum<n>(poison)};
}

#else
// ---- the GPU

// Two numbers in a word, the first in its low half: as FloatToHalf and FloatToBFloat16 round them, but one of the
// hardware's for NaN.
template <DType kType>
__device__ __forceinline__ uint32_t PackTwo(float low, float high) {
  uint32_t packed;
  if constexpr (kType == DType::kFloat16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <DType kType>
__device__ __forceinline__ void UnpackTwo(uint32_t packed, float& low, float& high) {
  if constexpr (kType == DType::kBFloat16) {
    low = BitsFloat(packed << 16), high = BitsFloat(packed & 0xFFFF0000);
    return;
  }
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(low), "=f"(high)
      : "r"(packed));
}

// Sums, smaller and larger ones of two numbers at a time, each rounded to their type; NaN where one is.
template <DType kType>
__device__ __forceinline__ uint32_t AddTwo(uint32_t a, uint32_t b) {
  uint32_t sum;
  if constexpr (kType == DType::kFloat16) {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80), "r"(b));  // a 1 + b
  }
  return sum;
}
template <DType kType>
__device__ __forceinline__ uint32_t SmallerOfTwo(uint32_t a, uint32_t b) {
  uint32_t smaller;
  if constexpr (kType == DType::kFloat16) {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
  } else {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
  }
  return smaller;
}
template <DType kType>
__device__ __forceinline__ uint32_t LargerOfTwo(uint32_t a, uint32_t b) {
  uint32_t larger;
  if constexpr (kType == DType::kFloat16) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  }
  return larger;
}

// Products, and products with a sum that is rounded once, of two float16 at a time.
__device__ __forceinline__ uint32_t MultiplyTwo(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ __forceinline__ uint32_t MultiplyAddTwo(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
// x / d of two float16 at a time, `inverse` 1 / d to the nearest: rounded once (as in plain.h, ReciprocalQuotients) where what is left of
// x has room, nearly so where it has not. QuotientsGpu in scheme_test.cc says that of those whose codes are made with it.
__device__ __forceinline__ uint32_t DivideTwo(uint32_t x, uint32_t minus_d, uint32_t inverse) {
  const uint32_t near = MultiplyTwo(x, inverse);
  return MultiplyAddTwo(MultiplyAddTwo(minus_d, near, x), inverse, near);
}
// Whole numbers of 16 bits without a sign, the smaller ones.
__device__ __forceinline__ uint32_t SmallerWholeOfTwo(uint32_t a, uint32_t b) {
  uint32_t smaller;
#if __CUDA_ARCH__ >= 900
  asm("min.u16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
#else
  const uint32_t low = (a & 0xFFFF) < (b & 0xFFFF) ? a : b, high = a < b ? a : b;
  smaller = (low & 0xFFFF) | (high & 0xFFFF0000);
#endif
  return smaller;
}

// The token that `first_token` is counted from, as it stands once the kernels before have ended.
__device__ __forceinline__ int64_t TokenBase(const KvView& view) {
  return view.token_base == nullptr ? 0 : __ldcg(view.token_base);
}

// Eight neighbouring elements, `wide`: 16 bytes at a time.
template <DType kType>
__device__ __forceinline__ void LoadEight(const DenseView& x, int64_t offset, bool wide, float (&values)[8]) {
  if (!wide || kType == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = LoadElement(x.data, kType, offset + i);
    return;
  }
  const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x.data) + offset);
  UnpackTwo<kType>(words.x, values[0], values[1]);
  UnpackTwo<kType>(words.y, values[2], values[3]);
  UnpackTwo<kType>(words.z, values[4], values[5]);
  UnpackTwo<kType>(words.w, values[6], values[7]);
}
// As they are stored, 16 bits each.
__device__ __forceinline__ void LoadEightWords(const DenseView& x, int64_t offset, bool wide, uint32_t (&words)[4]) {
  const uint16_t* at = static_cast<const uint16_t*>(x.data) + offset;
  if (wide) {
    const uint4 all = *reinterpret_cast<const uint4*>(at);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = at[2 * i] | uint32_t{at[2 * i + 1]} << 16;
}
template <DType kType>
__device__ __forceinline__ void StoreEight(const DenseView& x, int64_t offset, bool wide, const float (&values)[8]) {
  bool numbers = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) numbers &= values[i] == values[i];
  if (!wide || !numbers || kType == DType::kFloat32) {  // StoreElement stores one NaN for all
#pragma unroll
    for (int i = 0; i < 8; ++i) StoreElement(x.data, kType, offset + i, values[i]);
    return;
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(x.data) + offset) = {
      PackTwo<kType>(values[0], values[1]), PackTwo<kType>(values[2], values[3]),
      PackTwo<kType>(values[4], values[5]), PackTwo<kType>(values[6], values[7])};
}

// A code in the low bits of 2^23, as a float, is 2^23 + code.
constexpr float kCodeBias = 8388608;
__device__ __forceinline__ float CodeToFloat(uint32_t word, int shift, int bits) {
  return BitsFloat((word >> shift & ((1u << bits) - 1)) | 0x4B000000) - kCodeBias;
}

#endif  // __CUDACC__

}  // namespace kvq
