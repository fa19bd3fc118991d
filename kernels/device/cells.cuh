// How many of some thresholds a number is not below, asked by all lanes of a warp together: two shuffles instead of a search.
#pragma once

#include <cstdint>
#ifndef __CUDACC__
#include <cmath>
#endif

#include "kernels/vector_math.h"

namespace kvq {

// The line cut into 32 cells, one for each lane, none with more than one threshold: a number is compared with its cell's alone.
struct Cells {
  static constexpr float kNone = 1e30f;
  float slope = 0, threshold[32] = {};  // or kNone
  uint32_t below[32] = {};              // thresholds of the cells before
  bool apart = true;                    // no two are in a cell

  template <int n>
  constexpr Cells(float slope, const float (&thresholds)[n]) : slope(slope) {
    for (float& none : threshold) none = kNone;
    for (const float one : thresholds) {
      // A double holds both sums and products, so that they are rounded once, to a float, as fma does.
      const auto along = static_cast<float>(static_cast<double>(one) * slope + 0.5);
      const auto cell = static_cast<int>(static_cast<float>(static_cast<double>(along) * 31 + 8388608) - 8388608);
      apart = apart && threshold[cell] == kNone;
      threshold[cell] = one;
      for (int after = cell + 1; after < 32; ++after) ++below[after];
    }
  }

  // 31 (slope y + 1/2) to the nearest, the sum limited to [0, 1], which it should be for all thresholds; a larger y has no lower one,
  // as rounding keeps order. In the last five bits. 0 where y is NaN.
  KVQ_HD static int Of(float y, float slope) {
    const float sum = fmaf(y, slope, 0.5f);
#ifdef __CUDA_ARCH__
    const float along = __saturatef(sum);
#else
    const float along = Smaller(Larger(sum, 0), 1);
#endif
    return static_cast<int>(FloatBits(fmaf(along, 31, 8388608)));
  }
};

#ifdef __CUDACC__
// A lane's own.
struct LaneCells {
  float slope, threshold;
  uint32_t below;

  __device__ static LaneCells Of(const Cells& cells) {
    return {cells.slope, cells.threshold[threadIdx.x % 32], cells.below[threadIdx.x % 32]};
  }
  // How many, of eight numbers at once so that no shuffle is waited for: of number 2 i + side in the four bits from 16 side + 4 i on.
  __device__ __forceinline__ uint32_t Eight(const float (&y)[8]) const {
    int cell[8];
    float own[8];
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) cell[i] = Cells::Of(y[i], slope);
#pragma unroll
    for (int i = 0; i < 8; ++i) own[i] = __shfl_sync(~0u, threshold, cell[i]);
#pragma unroll
    for (int i = 0; i < 8; ++i) word += __shfl_sync(~0u, below << (16 * (i % 2) + 4 * (i / 2)), cell[i]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      asm("{.reg .pred p; setp.ge.f32 p, %1, %2; @p add.u32 %0, %0, %3;}"
          : "+r"(word)
          : "f"(y[i]), "f"(own[i]), "r"(1u << (16 * (i % 2) + 4 * (i / 2))));
    }
    return word;
  }
};
#endif

}  // namespace kvq
