// How many of some thresholds a number is not below, where the number is known but for a little: the count, or that it cannot be said.
// One shuffle instead of a search, where all lanes of a warp ask together.
#pragma once

#include <cstdint>
#ifndef __CUDACC__
#include <cmath>
#endif

#include "kernels/vector_math.h"

namespace kvq {

// The line around 0 cut into steps, and those into cells, none with more than one threshold; all thresholds lie in the 32 cells around 0.
// Each of these has a lane, which has what is added to a number's step: what carries into the upper half from the cell's threshold on, and
// there what the cells before have. What is left in the lower half says how far behind the threshold the number is. A number outside goes
// to the lane of a cell that is 32 or 64 cells away, and the count is 16 or 32 too large or too small: limited to what there is, it
// is right.
struct Cells {
  static constexpr int kCellSteps = 1 << 15, kSteps = 32 * kCellSteps;  // of a length 1 / slope
  // So near to a threshold, in steps, nothing is said: each of the two is rounded to a step, by half of one, so that a number is on its
  // side of a threshold where it is known but for kUnsure steps: what is sure is a step more from it, less the two halves.
  static constexpr int kUnsure = 4;
  // Whole numbers around it are a float's last bits. It has room for numbers up to two lengths from 0.
  static constexpr float kWhole = 12582912;  // 1.5 * 2^23
  static constexpr uint32_t kTooLarge = 0x4B40;  // its upper half

  struct Lane {
    float carry, threshold;  // and kWhole; of a cell without one anything
  };
  float slope = 0;
  Lane lanes[32] = {};
  bool apart = true;  // no two are in a cell, nor one near its end

  template <int n>
  constexpr Cells(float slope, const float (&thresholds)[n]) : slope(slope) {
    int below[33] = {}, threshold[32] = {};
    bool has[32] = {};
    for (const float one : thresholds) {
      const double steps = static_cast<double>(one) * slope * kSteps;
      const int step = static_cast<int>(steps + (steps < 0 ? -0.5 : 0.5)), from = step + kSteps / 2 + kCellSteps / 2;  // 0 is in a cell's middle
      const int cell = from / kCellSteps;
      apart = apart && from > 0 && cell < 32 && !has[cell] && from % kCellSteps > kUnsure && from % kCellSteps < kCellSteps - kUnsure;
      if (!apart) return;
      threshold[cell] = step, has[cell] = true, lanes[(cell - 16) & 31].threshold = one;
      for (int after = cell + 1; after < 33; ++after) ++below[after];
    }
    for (int i = 0; i < 32; ++i) {
      const int cell = i - 16, up = has[i] ? 0x10000 + kUnsure - threshold[i] : kCellSteps - cell * kCellSteps;
      lanes[cell & 31].carry = kWhole + static_cast<float>(below[i] * 0x10000 + up);
    }
  }

  // The cell of y, in the last five bits; `scale` is the slope, and what y has too little, times kSteps.
  KVQ_HD static uint32_t CellOf(float y, float scale) { return FloatBits(fmaf(y, scale * (1.0f / kCellSteps), kWhole)); }
  // Of a number and its cell's carry: the count in the upper half, kTooLarge more; and in the lower half whether that may be wrong.
  KVQ_HD static uint32_t SumOf(float y, float scale, float carry) { return FloatBits(fmaf(y, scale, carry)); }
  KVQ_HD static bool IsUnsure(uint32_t sum) { return (sum & 0xFFFF) <= 2 * kUnsure; }
  // So of a number that is known: whether one that is off by kUnsure may have been unsure, or counted otherwise.
  KVQ_HD static bool IsWithinTwice(uint32_t sum) { return (sum + kUnsure & 0xFFFF) <= 4 * kUnsure; }
  // Of a sum, limited to `most`.
  KVQ_HD static int CountOf(uint32_t sum, int most) {
    const int count = static_cast<int>(sum >> 16) - static_cast<int>(kTooLarge);
    return count < 0 ? 0 : count < most ? count : most;
  }
#ifdef __CUDACC__
  // Of two sums, in a word's halves; `minus` is MinusTooLarge().
  __device__ __forceinline__ static uint32_t CountsOf(uint32_t first, uint32_t second, uint32_t minus, uint32_t most) {
#if __CUDA_ARCH__ >= 900
    uint32_t counts = __byte_perm(first, second, 0x7632);
    asm("add.s16x2 %0, %0, %1;" : "+r"(counts) : "r"(minus));
    asm("min.relu.s16x2 %0, %0, %1;" : "+r"(counts) : "r"(most * 0x10001));
    return counts;
#else
    return static_cast<uint32_t>(CountOf(first, static_cast<int>(most)) | CountOf(second, static_cast<int>(most)) << 16);
#endif
  }
  // In a register, which the 0 sees to: the compiler would copy it there for each pair.
  __device__ __forceinline__ static uint32_t MinusTooLarge() { return (0x10000 - kTooLarge) * 0x10001 ^ threadIdx.z; }
#endif
};

}  // namespace kvq
