// The kernels of experts.h.
//
// The stream of weights is that of product.cuh: tiles of eight rows, units of 64 columns in a ring of shared memory a warp,
// eight rows of x as one operand of the tensor cores. What is other:
//
// - Which weights these are, the logits say. Every block of the first product chooses for itself, which costs less than one more
//   kernel: a key of 32 bits for each logit, unique and in their order. The first block hands the choice to the second product.
// - An expert is read once for all tokens that chose it: the block's list has each once, and a product has all rows of x; what
//   comes out for rows that did not choose it, nobody takes.
// - Rows of x come from the L2 cache into registers, two units ahead: there may be more of them than shared memory holds, and
//   beside a stream of weights that cache takes its time.
// - Of the second product a block has all experts' columns of its eight rows, one expert behind the other, cut among its warps.
//   So their weighted sum is a sum like any other, and eight experts of 768 columns fill a ring as one matrix does.
#pragma once

#include "kernels/device/experts.h"
#include "kernels/device/product.cuh"

namespace kvq::step {

inline constexpr int kExpertRows = 8;  // of x, that share a read
inline constexpr int kMostChosen = kExpertRows * kMostPerToken;

// What a block knows of its rows' experts, in shared memory, and what the first product's hands to the second's.
struct ChosenExperts {
  int count;
  int expert[kMostChosen];                // each once
  float share[kMostChosen][kExpertRows];  // 0 of a row that did not choose it
  int place[kMostChosen][kExpertRows];    // of the row in `gated`, [rows, per_token]; -1
};
struct ExpertsPlan {
  int warps = 0, stages = 0, blocks_per_sm = 1;
  int64_t shared_bytes = 0;
};
#ifdef __CUDACC__

// A logit's place among its row's: larger for a larger one, and of equal ones for a smaller number; NaN above all.
__device__ __forceinline__ uint32_t KeyOf(uint32_t bits, bool nan, int expert) {
  const uint32_t order = nan ? 0xFFFFu : bits & 0x8000u ? 0xFFFFu & ~bits : bits | 0x8000u;
  return order << 16 | (0xFFFFu - static_cast<uint32_t>(expert));
}

// By all threads of a block: of rows `first` and on. A warp a row: its keys are in registers, and the largest is taken as often as
// experts are wanted.
template <bool kBFloat16>
__device__ void Choose(const ExpertsArgs& a, int64_t first, int rows, ChosenExperts& to) {
  constexpr int kHeld = kMostExperts / 32;
  __shared__ int experts_of[kExpertRows][kMostPerToken];
  __shared__ float shares_of[kExpertRows][kMostPerToken];
  __shared__ uint32_t seen[kHeld];  // by any row
  const int experts = static_cast<int>(a.experts), per_token = static_cast<int>(a.per_token);
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (rows > 1) {
    if (threadIdx.x < kHeld) seen[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < rows * per_token * kExpertRows; i += blockDim.x) {
      to.share[i / kExpertRows][i % kExpertRows] = 0;
      to.place[i / kExpertRows][i % kExpertRows] = -1;
    }
  }
  const auto value = [](uint32_t key) {
    const uint32_t order = key >> 16;
    return At<kBFloat16>((order & 0x8000u ? order : ~order) & (order & 0x8000u ? 0x7FFFu : 0xFFFFu), 0);
  };
  for (int row = threadIdx.x / 32; row < rows; row += warps) {
    const uint16_t* logits = static_cast<const uint16_t*>(a.logits) + (first + row) * experts;
    uint32_t keys[kHeld], top = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int e = lane + 32 * i;
      keys[i] = e < experts ? __ldcg(logits + e) : 0;  // all on their way at once
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int e = lane + 32 * i;
      float x = At<kBFloat16>(keys[i], 0);
      if (a.logit_bias != nullptr && e < experts) {
        keys[i] = Pack<kBFloat16>(x + At<kBFloat16>(__ldcg(static_cast<const uint16_t*>(a.logit_bias) + e), 0), 0) & 0xFFFFu;
        x = At<kBFloat16>(keys[i], 0);
      }
      keys[i] = e < experts ? KeyOf(x == 0.0f ? 0u : keys[i], x != x, e) : 0;  // -0 is 0
      top = max(top, keys[i]);
    }
    const float largest = value(__reduce_max_sync(~0u, top));
    float sum = 0;
    if (!a.normalized) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) sum += keys[i] != 0 ? expf(value(keys[i]) - largest) : 0.0f;
    }
    uint32_t own = 0;  // of rank `lane`
    for (int rank = 0; rank < per_token; ++rank) {
      top = 0;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (32 * i < experts) top = max(top, keys[i]);
      }
      const uint32_t best = __reduce_max_sync(~0u, top);
      if (lane == rank) own = best;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (32 * i < experts && keys[i] == best) keys[i] = 0;
      }
    }
    const float weight = lane < per_token ? expf(value(own) - largest) : 0.0f;
    sum = WarpSum(a.normalized ? weight : sum);
    if (lane >= per_token) continue;
    const int expert = static_cast<int>(0xFFFFu - (own & 0xFFFFu));
    if (rows > 1) {
      experts_of[row][lane] = expert, shares_of[row][lane] = weight / sum;
    } else {
      to.expert[lane] = expert;
      for (int i = 0; i < kExpertRows; ++i) to.share[lane][i] = 0, to.place[lane][i] = -1;
      to.share[lane][0] = weight / sum, to.place[lane][0] = static_cast<int>(first) * per_token + lane;
      if (lane == 0) to.count = per_token;
    }
  }
  __syncthreads();
  if (rows == 1) return;
  const int row = threadIdx.x / per_token, rank = threadIdx.x % per_token;  // rows * per_token <= kMostChosen <= threads
  const bool works = row < rows;
  const int expert = works ? experts_of[row][rank] : 0;
  if (works) atomicOr(&seen[expert / 32], 1u << expert % 32);
  __syncthreads();
  int before = 0, count = 0;
  for (int i = 0; i < kHeld; ++i) {
    if (i == expert / 32) before = count + __popc(seen[i] & ((1u << expert % 32) - 1));
    count += __popc(seen[i]);
  }
  if (works) {
    to.expert[before] = expert;
    to.share[before][row] = shares_of[row][rank];
    to.place[before][row] = static_cast<int>(first + row) * per_token + rank;
  }
  if (threadIdx.x == 0) to.count = count;
  __syncthreads();
}

// Hands the choice to the second product's kernel, which may begin when all blocks have let it; and takes it there.
__device__ __forceinline__ void HandOver(const ChosenExperts& from, int most, ChosenExperts* to) {
  for (int i = threadIdx.x; i < most * kExpertRows; i += blockDim.x) {
    const int n = i / kExpertRows, row = i % kExpertRows;
    if (n >= from.count) break;
    to->share[n][row] = from.share[n][row], to->place[n][row] = from.place[n][row];
    if (row == 0) to->expert[n] = from.expert[n];
  }
  if (threadIdx.x == 0) to->count = from.count;
  __threadfence();
  __syncthreads();
}
__device__ __forceinline__ void TakeOver(const ChosenExperts* from, int most, ChosenExperts& to) {
  for (int i = threadIdx.x; i < most * kExpertRows; i += blockDim.x) {  // all at once, also what is behind the last
    const int n = i / kExpertRows, row = i % kExpertRows;
    const float share = __ldcg(&from->share[n][row]);
    const int place = __ldcg(&from->place[n][row]), expert = __ldcg(&from->expert[n]);
    to.share[n][row] = share, to.place[n][row] = place;
    if (row == 0) to.expert[n] = expert;
  }
  if (threadIdx.x == 0) to.count = __ldcg(&from->count);
  __syncthreads();
}

// What was chosen, by one block.
__device__ __forceinline__ void Report(const ExpertsArgs& a, const ChosenExperts& of, int rows) {
  for (int i = threadIdx.x; i < of.count * rows; i += blockDim.x) {
    const int place = of.place[i / rows][i % rows];
    if (place >= 0) a.chosen[place] = of.expert[i / rows];
  }
  if (threadIdx.x == 0) atomicAdd(a.reads, static_cast<unsigned long long>(of.count));
}

// Rows `first_row` and on of x, eight at most.
template <bool kBFloat16, int kWarps, int kStages, bool kDown>
__global__ void __launch_bounds__(kWarps * 32, kStages > 4 ? 2 : 1)
    ExpertsKernel(const __grid_constant__ ExpertsArgs a, int64_t first_row) {
  extern __shared__ __align__(128) std::byte shared[];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int rows = static_cast<int>(min(a.rows - first_row, static_cast<int64_t>(kExpertRows)));
  const int size = static_cast<int>(a.size), in = static_cast<int>(kDown ? a.size : a.hidden);
  const ptx::Shared ring = ptx::SharedAddress(shared) + warp * kStages * kUnitBytes;
  float* sums = reinterpret_cast<float*>(shared + kWarps * kStages * kUnitBytes);
  __shared__ ChosenExperts chosen;
  const int most = rows * static_cast<int>(a.per_token);
  ChosenExperts* handed = static_cast<ChosenExperts*>(a.choice) + first_row / kExpertRows;

  // The kernel behind the first product is the second, which is not to begin before the choice is there.
  if constexpr (kDown) {
    LaunchDependents();
    TakeOver(handed, most, chosen);
  } else {
    WaitForPredecessors();
    Choose<kBFloat16>(a, first_row, rows, chosen);
  }

  // Tiles: of the first product [expert, 4 rows of the gate and 4 of the factor], of the second [8 rows], of all experts.
  // Units of a tile: of a row's 64s of columns, or, second, [expert, 64 columns]. This warp has those from begin to end.
  const int of_expert = kDown ? 1 : size / 4, tiles = kDown ? static_cast<int>(a.hidden) / kTileRows : chosen.count * of_expert;
  const int columns = in / kUnit, units = kDown ? chosen.count * columns : columns;
  const int begin = units * warp / kWarps, end = units * (warp + 1) / kWarps;
  const int64_t apart_bytes = static_cast<int64_t>(kDown ? 4 : size) * in * 2;

  const auto swizzle = [](int row) { return (row & 1) << 2; };
  const ptx::Shared copy_place = lane / 8 * 128 + ((lane % 8) ^ swizzle(lane / 8)) * 16;
  const ptx::Shared read_place = ring + g * 128 + (t ^ swizzle(g)) * 16;
  int next_tile = blockIdx.x, next_unit = begin, next_column = 0, next_stage = 0;
  const std::byte* next = nullptr;
  const auto aim = [&] {  // at next_unit of next_tile
    if (next_tile >= tiles || begin == end) return;
    const int i = kDown ? next_unit / columns : next_tile / of_expert;
    next_column = kDown ? next_unit - i * columns : next_unit;
    const int64_t row = kDown ? chosen.expert[i] * a.hidden + next_tile * kTileRows
                              : static_cast<int64_t>(chosen.expert[i]) * 2 * size + next_tile % of_expert * 4;
    next = static_cast<const std::byte*>(kDown ? a.down : a.up) + ((row + lane / 8) * in + next_column * kUnit) * 2 + lane % 8 * 16;
  };
  const auto fetch = [&] {  // an empty group behind the last unit
    if (next_tile < tiles && begin < end) {
      const ptx::Shared place = ring + next_stage * kUnitBytes + copy_place;
      ptx::CopyAsync(place, next);
      ptx::CopyAsync(place + kUnitBytes / 2, next + apart_bytes);
      next += kUnit * 2;
      ++next_unit, ++next_column;
      if (next_unit == end) {
        next_unit = begin;
        next_tile += gridDim.x;
        aim();
      } else if (kDown && next_column == columns) {
        aim();
      }
    }
    next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
    ptx::CopyCommit();
  };
  aim();
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch();
  if constexpr (kDown) {
    WaitForPredecessors();
  } else {
    if (blockIdx.x == 0) {
      HandOver(chosen, most, handed);
      Report(a, chosen, rows);
    }
    LaunchDependents();
  }

  // Of the lane's row of x: columns 8 t and on of both 32s of a unit. Rows that are none, or did not choose the expert, read
  // another's.
  const auto x_of = [&](int unit, uint4 (&x)[2]) {
    while (unit >= end) unit -= end - begin;  // of the next tile, which has the same
    const uint16_t* from;
    if constexpr (kDown) {
      const int i = unit / columns, place = chosen.place[i][g];
      from = static_cast<const uint16_t*>(a.gated) + static_cast<int64_t>(max(place, 0)) * size + (unit - i * columns) * kUnit;
    } else {
      from = static_cast<const uint16_t*>(a.x) + (first_row + min(g, rows - 1)) * in + unit * kUnit;
    }
    x[0] = __ldcg(reinterpret_cast<const uint4*>(from) + t);
    x[1] = __ldcg(reinterpret_cast<const uint4*>(from) + 4 + t);
  };

  uint4 x[2][2];
  if (begin < end) x_of(begin, x[0]), x_of(begin + 1, x[1]);
  int stage = 0, turn = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
    float sum[2][4] = {}, total[2] = {0, 0};
    int left = kDown ? columns - begin % columns : 0;  // units until the expert's last
#pragma unroll 1
    for (int unit = begin; unit < end; ++unit) {
      ptx::CopyWait<kStages - 2>();
      __syncwarp();
      fetch();  // into the stage that all lanes have left
      const uint4 now[2] = {x[0][0], x[0][1]};
      x[0][0] = x[1][0], x[0][1] = x[1][1];
      x_of(unit + 2, x[1]);
      const ptx::Shared at = read_place + stage * kUnitBytes;
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        uint32_t weight[4];
        ptx::LoadShared(at ^ chunk * 64, weight);
        const uint32_t of_x[4] = {now[chunk].x, now[chunk].y, now[chunk].z, now[chunk].w};
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          if constexpr (kBFloat16) {
            ptx::MmaBFloat16(sum[chunk], of_x[k], 0, of_x[k + 1], 0, weight[k], weight[k + 1]);
          } else {
            ptx::MmaHalf(sum[chunk], of_x[k], 0, of_x[k + 1], 0, weight[k], weight[k + 1]);
          }
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
      if constexpr (kDown) {
        if (--left != 0 && unit + 1 != end) continue;
        const int i = unit / columns;
        if (chosen.place[i][g] >= 0) {
          const float share = chosen.share[i][g];
          total[0] = fmaf(share, sum[0][0] + sum[1][0], total[0]);
          total[1] = fmaf(share, sum[0][1] + sum[1][1], total[1]);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[0][k] = sum[1][k] = 0;
        left = columns;
      }
    }
    if constexpr (!kDown) total[0] = sum[0][0] + sum[1][0], total[1] = sum[0][1] + sum[1][1];
    // Lane (g, t) has row g of x times rows 2 t and 2 t + 1 of the tile.
    float* tile_sums = sums + turn % 2 * kWarps * kExpertRows * kTileRows;
    if (g < rows) {
      *reinterpret_cast<float2*>(tile_sums + (warp * rows + g) * kTileRows + 2 * t) = make_float2(total[0], total[1]);
    }
    __syncthreads();  // and the sums of the tile before last are free
    // One warp finishes the tile while the others go on: lane (g, t) row g of x, rows t and t + 4 of the tile.
    if (warp != turn % kWarps || g >= rows) continue;
    float first = 0, second = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      first += tile_sums[(w * rows + g) * kTileRows + t];
      second += tile_sums[(w * rows + g) * kTileRows + t + 4];
    }
    if constexpr (kDown) {
      for (int i = 0; a.down_bias != nullptr && i < chosen.count; ++i) {
        if (chosen.place[i][g] < 0) continue;
        const uint16_t* bias = static_cast<const uint16_t*>(a.down_bias) + chosen.expert[i] * a.hidden + tile * kTileRows + t;
        first = fmaf(chosen.share[i][g], At<kBFloat16>(__ldcg(bias), 0), first);
        second = fmaf(chosen.share[i][g], At<kBFloat16>(__ldcg(bias + 4), 0), second);
      }
      float* out = a.partial + (first_row + g) * a.hidden + tile * kTileRows + t;
      out[0] = first, out[4] = second;
    } else {
      const int place = chosen.place[tile / of_expert][g];
      if (place < 0) continue;
      if (a.up_bias != nullptr) {
        const uint16_t* bias = static_cast<const uint16_t*>(a.up_bias) + chosen.expert[tile / of_expert] * 2LL * size + tile % of_expert * 4 + t;
        first += At<kBFloat16>(__ldcg(bias), 0), second += At<kBFloat16>(__ldcg(bias + size), 0);
      }
      first = Round<kBFloat16>(first), second = Round<kBFloat16>(second);
      static_cast<uint16_t*>(a.gated)[static_cast<int64_t>(place) * size + tile % of_expert * 4 + t] =
          static_cast<uint16_t>(Pack<kBFloat16>(Gated<kBFloat16>(a.activation, first, second), 0));
    }
  }
}

// The same for any sizes and rows: a row of x a blockIdx.y, a warp an element of what comes out.
template <bool kBFloat16, bool kDown>
__global__ void __launch_bounds__(256) AnyExpertsKernel(const __grid_constant__ ExpertsArgs a) {
  __shared__ ChosenExperts chosen;
  if constexpr (!kDown) WaitForPredecessors();
  LaunchDependents();
  const int64_t row = blockIdx.y;
  Choose<kBFloat16>(a, row, 1, chosen);
  if (!kDown && blockIdx.x == 0) Report(a, chosen, 1);
  if constexpr (kDown) WaitForPredecessors();
  const int lane = threadIdx.x % 32;
  const int64_t outs = kDown ? a.hidden : chosen.count * a.size;
  const auto dot = [&](const void* weight, int64_t weight_row, const void* x, int64_t x_row, int64_t in) {
    float sum = 0;
    for (int64_t i = lane; i < in; i += 32) {
      const float w = At<kBFloat16>(__ldcg(static_cast<const uint16_t*>(weight) + weight_row * in + i), 0);
      sum = fmaf(w, At<kBFloat16>(__ldcg(static_cast<const uint16_t*>(x) + x_row * in + i), 0), sum);
    }
    return WarpSum(sum);
  };
  const auto bias_of = [](const void* bias, int64_t at) {
    return bias == nullptr ? 0.0f : At<kBFloat16>(__ldcg(static_cast<const uint16_t*>(bias) + at), 0);
  };
  for (int64_t out = blockIdx.x * 8 + threadIdx.x / 32; out < outs; out += gridDim.x * 8) {
    if constexpr (kDown) {
      float total = 0;
      for (int i = 0; i < chosen.count; ++i) {
        const int64_t of = chosen.expert[i] * a.hidden + out;
        total = fmaf(chosen.share[i][0], dot(a.down, of, a.gated, chosen.place[i][0], a.size) + bias_of(a.down_bias, of), total);
      }
      if (lane == 0) a.partial[row * a.hidden + out] = total;
    } else {
      const int64_t i = out / a.size, channel = out % a.size, of_gate = chosen.expert[i] * 2 * a.size + channel;
      const float gate = Round<kBFloat16>(dot(a.up, of_gate, a.x, row, a.hidden) + bias_of(a.up_bias, of_gate));
      const int64_t of_factor = of_gate + a.size;
      const float factor = Round<kBFloat16>(dot(a.up, of_factor, a.x, row, a.hidden) + bias_of(a.up_bias, of_factor));
      const float x[1] = {Gated<kBFloat16>(a.activation, gate, factor)};
      if (lane == 0) Store<kBFloat16>(a.gated, chosen.place[i][0] * a.size + channel, x);
    }
  }
}

#endif  // __CUDACC__

}  // namespace kvq::step
