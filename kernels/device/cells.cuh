// How many of some thresholds a number is not below, where the number is known but for a little: the count, or that it cannot be said.
// One shuffle instead of a search, where all lanes of a warp ask together.
#pragma once

#include <cstdint>
#ifndef __CUDACC__
#include <cmath>
#endif

#include "kernels/vector_math.h"

namespace kvq {

// The line cut into steps, and those into 32 cells, one for each lane, none with more than one threshold. To the step of a number is
// added what carries into the upper half from its cell's threshold on, and there what the cells before have; what is left in the lower
// half says how far behind the threshold it is.
struct Cells {
  static constexpr int kCellSteps = 1 << 15, kSteps = 32 * kCellSteps - 1;
  // So near to a threshold, in steps, nothing is said: each of the two is rounded to a step, by half of one, so that a number is on its
  // side of a threshold where it is known but for kUnsure steps: what is sure is a step more from it, less the two halves.
  static constexpr int kUnsure = 5;
  static constexpr float kMiddle = 0.5f + 1.0f / 64;  // so that 0, where most numbers are, is no cell's end

  float slope = 0;
  uint32_t carry[32] = {};
  bool apart = true;  // no two are in a cell, nor one near its end

  template <int n>
  constexpr Cells(float slope, const float (&thresholds)[n]) : slope(slope) {
    int below[33] = {}, threshold[32] = {};
    for (const float one : thresholds) {
      const int step = static_cast<int>((static_cast<double>(one) * slope + kMiddle) * kSteps + 0.5), cell = step / kCellSteps;
      apart = apart && threshold[cell] == 0 && step % kCellSteps > kUnsure && step % kCellSteps < kCellSteps - kUnsure;
      threshold[cell] = step;
      for (int after = cell + 1; after < 33; ++after) ++below[after];
    }
    for (int cell = 0; cell < 32; ++cell) {
      const int up = threshold[cell] != 0 ? 0x10000 + kUnsure - threshold[cell] : kCellSteps / 2 - cell * kCellSteps;
      carry[cell] = (static_cast<uint32_t>(below[cell]) << 16) + static_cast<uint32_t>(up) - 0x4B000000;
    }
  }

  // The step of slope y + kMiddle, the sum limited to [0, 1], which it should be for all thresholds; `scale` is the slope, and what y has too
  // little. 2^23 larger, as a float's bits. That of 0 where y is NaN.
  KVQ_HD static uint32_t StepOf(float y, float scale) {
    const float sum = fmaf(y, scale, kMiddle);
#ifdef __CUDA_ARCH__
    const float along = __saturatef(sum);
#else
    const float along = Smaller(Larger(sum, 0), 1);
#endif
    return FloatBits(fmaf(along, kSteps, 8388608));
  }
  KVQ_HD static int CellOf(uint32_t step) { return static_cast<int>(step / kCellSteps); }  // in the last five bits

  // Of a step and its cell's carry: the count in the upper half; and in the lower half whether that may be wrong.
  KVQ_HD static bool IsUnsure(uint32_t sum) { return (sum & 0xFFFF) <= 2 * kUnsure; }
};

}  // namespace kvq
