// What schemes of codes in groups share: places in views, rows in and out, packed runs of codes, the range of
// a group, loops over all of it, and the launch of their CUDA twins.
//
// A group has 32, 64 or 128 elements; its codes are packed as one run wherever its elements lie in a row.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/error.h"
#include "kernels/half.h"
#include "kernels/launch.cuh"
#include "kernels/scheme.h"
#include "kernels/vector_math.h"


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

// Calls work with the group size as a constant.
template <typename Work>
void WithGroup(int64_t group, const Work& work) {
  switch (group) {
    case 32: return work(std::integral_constant<int, 32>());
    case 64: return work(std::integral_constant<int, 64>());
    default: return work(std::integral_constant<int, 128>());
  }
}

// Throws InputError, naming the package, where a token's channels cannot be cut into such groups.
inline void CheckGroups(const char* package, int64_t head_dim, int64_t group) {
  if (group != 32 && group != 64 && group != 128) {
    throw InputError(package, " groups have 32, 64 or 128 elements, not ", group);
  }
  if (head_dim % group != 0) {
    throw InputError(package, " wants a head_dim that is a multiple of the group size ", group, ", not ",
                     head_dim);
  }
}

// 64 normal values span 4.7 standard deviations on average: uniform codes of that step have
// nmse step^2 / 12 = (4.7 / m)^2 / 12, with a tenth more for the spread of the range.
inline void SetUniformBudget(Codec& codec) {
  const double step = 4.7 / ((1 << codec.bits) - 1);
  codec.nmse_budget = 1.1 * step * step / 12;
  codec.budget_source = "uniform quantization noise of the mean range of 64 normal values, + 10 %";
}

// ---- CPU

// Runs body(i) for all i, on all threads where `parallel`.
template <typename Body>
void ForEach(bool parallel, int64_t n, const Body& body) {
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t i = 0; i < n; ++i) body(i);
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

// A run of n codes: byte k holds codes k, k + n kBits / 8, ...; the first in the low bits.
template <int kBits, int n>
KVQ_VECTOR void PackRun(const uint8_t* codes, uint8_t* packed) {
  constexpr int kPerByte = 8 / kBits, kBytes = n / kPerByte;
  for (int k = 0; k < kBytes; ++k) packed[k] = codes[k];
  for (int j = 1; j < kPerByte; ++j) {
    for (int k = 0; k < kBytes; ++k) packed[k] |= codes[k + j * kBytes] << (j * kBits);
  }
}

template <int kBits, int n>
KVQ_VECTOR void UnpackRun(const uint8_t* packed, float* codes) {
  constexpr int kPerByte = 8 / kBits, kBytes = n / kPerByte, kMask = (1 << kBits) - 1;
  for (int j = 0; j < kPerByte; ++j) {
    for (int k = 0; k < kBytes; ++k) {
      codes[k + j * kBytes] = static_cast<float>((packed[k] >> (j * kBits)) & kMask);
    }
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

// Smallest and largest of a group, and NaN (else 0) where one of it is NaN or infinite, which the
// comparisons would lose.
struct GroupRange {
  float low, high, poison;
};

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

}  // namespace kvq
