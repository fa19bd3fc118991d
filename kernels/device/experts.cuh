// The kernels of experts.h.
//
// The stream of weights is like that of product.cuh: tiles of eight rows, a ring in shared memory a warp, eight rows of x as one
// operand of the tensor cores. But matrices are small, so that what happens once a tile weighs, and so do instructions: a warp
// that wants 500 ns for a kilobyte is late however early that came. Therefore:
//
// - A block is some groups of warps. A group works on a tile, its warps side by side on pieces of the columns, and a sum over them
//   ends the tile. There are as many groups as make the last round full.
// - A stage of a ring is 8 rows x 128 columns, two units of 64, whose addresses are one register and constants.
// - Which weights these are, the logits say. Every block chooses for itself, which costs less than one more kernel: a key of 32
//   bits for each logit, unique and in their order. Blocks of the second product do while the first one works.
// - An expert is read once for all tokens that chose it: the block's list has each once, and a product has all rows of x; what
//   comes out for rows that did not choose it, nobody takes.
// - Rows of x come through the ring, too, a stage's columns beside its weights: there may be more of them than shared memory
//   holds, and beside a stream of weights the L2 cache takes its time.
// - Of the second product a group has all experts' columns of its eight rows, one expert behind the other, cut among its warps.
//   So their weighted sum is a sum like any other, and eight experts of 768 columns fill a ring as one matrix does.
#pragma once

#include "kernels/device/experts.h"
#include "kernels/device/product.cuh"

namespace kvq::step {

inline constexpr int kExpertRows = 8;  // of x, that share a read
inline constexpr int kMostChosen = kExpertRows * kMostPerToken;

// What a block knows of its rows' experts, in shared memory.
struct ChosenExperts {
  int count;
  int expert[kMostChosen];                // each once
  float share[kMostChosen][kExpertRows];  // 0 of a row that did not choose it
  int place[kMostChosen][kExpertRows];    // of the row in `gated`, [rows, per_token]; -1
};
inline constexpr int kDeep = 2;  // units of a stage
inline constexpr int kStageBytes = kDeep * kUnitBytes;
// Of a block: groups of warps, warps in all, and the stages of each one's ring.
struct BlockShape {
  int groups = 0, warps = 0, stages = 0;
};
// Bytes of a stage, with its part of so many rows of x behind the weights: an odd number of 64s a row, so that two of them are in
// different banks.
inline constexpr int kExpertPitch = kDeep * kUnit * 2 + 64;
KVQ_HD constexpr int ExpertStageBytes(int rows) { return (kStageBytes + rows * kExpertPitch + 127) / 128 * 128; }
// Of a row of keys, of 32 bits (Choose).
KVQ_HD constexpr int KeyPitch(int64_t experts) { return static_cast<int>((experts + 3) / 4 * 4); }

#ifdef __CUDACC__

// ---- a stage: lane l copies granule l % 8 (of 16 bytes) of rows l / 8 and l / 8 + 4 of a unit. Granules of odd rows swap
// halves, so that lanes (g, t) read without bank conflicts.

__device__ __forceinline__ int SwapOf(int row) { return (row & 1) << 2; }
__device__ __forceinline__ int CopyPlace(int lane) { return lane / 8 * 128 + ((lane % 8) ^ SwapOf(lane / 8)) * 16; }
__device__ __forceinline__ int ReadPlace(int lane) { return lane / 4 * 128 + ((lane % 4) ^ SwapOf(lane / 4)) * 16; }

// `units` of them from `from` on, the lane's place of the first; its other row is `apart` bytes from there.
__device__ __forceinline__ void CopyStage(ptx::Shared place, const std::byte* from, int64_t apart, int units) {
  const std::byte* other = from + apart;
  if (units == kDeep) {
#pragma unroll
    for (int i = 0; i < kDeep; ++i) {
      ptx::CopyAsync(place + i * kUnitBytes, from + i * kUnit * 2);
      ptx::CopyAsync(place + i * kUnitBytes + kUnitBytes / 2, other + i * kUnit * 2);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < units; ++i) {
      ptx::CopyAsync(place + i * kUnitBytes, from + i * kUnit * 2);
      ptx::CopyAsync(place + i * kUnitBytes + kUnitBytes / 2, other + i * kUnit * 2);
    }
  }
}

// Adds to four parts of a sum. `weight`: the lane's place in the stage; `x`: in the row of x, at the stage's first column.
template <bool kBFloat16>
__device__ __forceinline__ void MultiplyUnit(ptx::Shared weight, ptx::Shared x, float (&sum)[4][4]) {
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    uint32_t w[4], of_x[4];
    ptx::LoadShared(weight ^ chunk * 64, w);
    ptx::LoadShared(x + chunk * 64, of_x);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float (&to)[4] = sum[2 * chunk + k];
      if constexpr (kBFloat16) {
        ptx::MmaBFloat16(to, of_x[2 * k], 0, of_x[2 * k + 1], 0, w[2 * k], w[2 * k + 1]);
      } else {
        ptx::MmaHalf(to, of_x[2 * k], 0, of_x[2 * k + 1], 0, w[2 * k], w[2 * k + 1]);
      }
    }
  }
}
template <bool kBFloat16>
__device__ __forceinline__ void MultiplyStage(ptx::Shared weight, ptx::Shared x, int units, float (&sum)[4][4]) {
  if (units == kDeep) {
#pragma unroll
    for (int i = 0; i < kDeep; ++i) MultiplyUnit<kBFloat16>(weight + i * kUnitBytes, x + i * kUnit * 2, sum);
  } else {
#pragma unroll 1
    for (int i = 0; i < units; ++i) MultiplyUnit<kBFloat16>(weight + i * kUnitBytes, x + i * kUnit * 2, sum);
  }
}
// Lane (g, t) has row g of x times rows 2 t and 2 t + 1 of the tile.
__device__ __forceinline__ float2 SumOf(const float (&sum)[4][4]) {
  return make_float2((sum[0][0] + sum[1][0]) + (sum[2][0] + sum[3][0]), (sum[0][1] + sum[1][1]) + (sum[2][1] + sum[3][1]));
}

// The warps of a group wait for each other; of groups of more than one there are at most four.
__device__ __forceinline__ void SyncGroup(int group, int warps) {
  if (warps == 1) {
    __syncwarp();
  } else {
    ptx::SyncThreads(1 + group, 32 * warps);
  }
}

// A logit's place among its row's: larger for a larger one, and of equal ones for a smaller number; NaN above all.
__device__ __forceinline__ uint32_t KeyOf(uint32_t bits, bool nan, int expert) {
  const uint32_t order = nan ? 0xFFFFu : bits & 0x8000u ? 0xFFFFu & ~bits : bits | 0x8000u;
  return order << 16 | (0xFFFFu - static_cast<uint32_t>(expert));
}

// By all threads of a block, of rows `first` and on. A logit's rank is the number of larger keys, which a thread counts; `keys`
// [rows, KeyPitch(experts)] is room that is free afterwards.
template <bool kBFloat16>
__device__ void Choose(const ExpertsArgs& a, int64_t first, int rows, uint32_t* keys, ChosenExperts& to) {
  __shared__ uint32_t best[kExpertRows][kMostPerToken];
  __shared__ float shares[kExpertRows][kMostPerToken];
  __shared__ uint32_t seen[kMostExperts / 32];  // by any row
  const int experts = static_cast<int>(a.experts), per_token = static_cast<int>(a.per_token), pitch = KeyPitch(experts);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, threads = blockDim.x;
  const auto value = [](uint32_t key) {
    const uint32_t order = key >> 16;
    return At<kBFloat16>((order & 0x8000u ? order : ~order) & (order & 0x8000u ? 0x7FFFu : 0xFFFFu), 0);
  };
  for (int i = threadIdx.x; i < rows * pitch; i += threads) {
    const int row = i / pitch, expert = i - row * pitch;
    uint32_t key = 0;  // below all others
    if (expert < experts) {
      uint32_t bits = __ldcg(static_cast<const uint16_t*>(a.logits) + (first + row) * experts + expert);
      float x = At<kBFloat16>(bits, 0);
      if (a.logit_bias != nullptr) {
        bits = Pack<kBFloat16>(x + At<kBFloat16>(__ldcg(static_cast<const uint16_t*>(a.logit_bias) + expert), 0), 0) & 0xFFFFu;
        x = At<kBFloat16>(bits, 0);
      }
      key = KeyOf(x == 0.0f ? 0u : bits, x != x, expert);  // -0 is 0
    }
    keys[i] = key;
  }
  for (int i = threadIdx.x; i < kMostExperts / 32; i += threads) seen[i] = 0;
  if (rows > 1) {
    for (int i = threadIdx.x; i < rows * per_token * kExpertRows; i += threads) {
      to.share[i / kExpertRows][i % kExpertRows] = 0;
      to.place[i / kExpertRows][i % kExpertRows] = -1;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * experts; i += threads) {
    const int row = i / experts, expert = i - row * experts;
    const uint32_t key = keys[row * pitch + expert];
    const uint4* others = reinterpret_cast<const uint4*>(keys + row * pitch);
    int rank = 0;
#pragma unroll 8
    for (int k = 0; k < pitch / 4; ++k) {
      const uint4 four = others[k];
      rank += (four.x > key) + (four.y > key) + (four.z > key) + (four.w > key);
    }
    if (rank >= per_token) continue;
    best[row][rank] = key;
    atomicOr(&seen[expert / 32], 1u << expert % 32);
  }
  __syncthreads();
  for (int row = warp; row < rows; row += threads / 32) {
    const float largest = value(best[row][0]);
    const float weight = lane < per_token ? expf(value(best[row][lane]) - largest) : 0.0f;
    float sum = weight;
    if (!a.normalized) {
      sum = 0;
      for (int e = lane; e < experts; e += 32) sum += expf(value(keys[row * pitch + e]) - largest);
    }
    sum = WarpSum(sum);
    if (lane < per_token) shares[row][lane] = weight / sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * per_token; i += threads) {
    const int row = i / per_token, rank = i - row * per_token;
    const int expert = static_cast<int>(0xFFFFu - (best[row][rank] & 0xFFFFu));
    int place = rank;
    if (rows > 1) {  // each once, by number
      place = __popc(seen[expert / 32] & ((1u << expert % 32) - 1));
      for (int j = 0; j < expert / 32; ++j) place += __popc(seen[j]);
    } else {
      for (int j = 1; j < kExpertRows; ++j) to.share[place][j] = 0, to.place[place][j] = -1;
    }
    to.expert[place] = expert;
    to.share[place][row] = shares[row][rank];
    to.place[place][row] = static_cast<int>(first + row) * per_token + rank;
  }
  if (threadIdx.x == 0) {
    to.count = 0;
    for (const uint32_t word : seen) to.count += __popc(word);
  }
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
template <bool kBFloat16, int kStages, bool kDown>
__global__ void __maxnreg__(112) ExpertsKernel(const __grid_constant__ ExpertsArgs a, int64_t first_row, int groups) {
  extern __shared__ __align__(128) std::byte shared[];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int rows = static_cast<int>(min(a.rows - first_row, static_cast<int64_t>(kExpertRows)));
  const int size = static_cast<int>(a.size), in = static_cast<int>(kDown ? a.size : a.hidden);
  const int stage_bytes = ExpertStageBytes(rows);
  const ptx::Shared ring = ptx::SharedAddress(shared) + warp * kStages * stage_bytes, ring_end = ring + kStages * stage_bytes;
  float* sums = reinterpret_cast<float*>(shared + warps * kStages * stage_bytes);
  __shared__ ChosenExperts chosen;

  // The kernel behind the first product is the second, which is not to begin before the logits are there.
  if constexpr (!kDown) WaitForPredecessors();
  LaunchDependents();
  Choose<kBFloat16>(a, first_row, rows, reinterpret_cast<uint32_t*>(shared), chosen);

  // Tiles: of the first product [expert, 4 rows of the gate and 4 of the factor], of the second [8 rows], of all experts.
  // Stages of a tile: of a row's columns, or, second, [expert, columns]. This warp has those from begin to end.
  const int of_expert = kDown ? 1 : size / 4, tiles = kDown ? static_cast<int>(a.hidden) / kTileRows : chosen.count * of_expert;
  const int columns = in / kUnit, of_row = (columns + kDeep - 1) / kDeep;  // units and stages of a row
  const int members = warps / groups, group = warp / members, member = warp % members;
  const int stages = kDown ? chosen.count * of_row : of_row, begin = stages * member / members, end = stages * (member + 1) / members;
  const int first_tile = blockIdx.x + gridDim.x * group, tile_step = gridDim.x * groups;
  const int64_t apart_bytes = static_cast<int64_t>(kDown ? 4 : size) * in * 2;
  const int first_expert = kDown ? begin / of_row : 0, first_unit = (begin - first_expert * of_row) * kDeep;

  // Where a warp is in its tile, where it copies and where it multiplies.
  struct Place {
    int left, expert, unit;  // stages left; expert (second product) and unit of the next one
    ptx::Shared stage;
  };
  const Place at_first = {end - begin, first_expert, first_unit, ring};
  // Goes on; whether the expert's row, or the warp's part of it, has ended.
  const auto go_on = [&](Place& at) {
    at.stage = at.stage + stage_bytes == ring_end ? ring : at.stage + stage_bytes;
    at.unit += kDeep;
    const bool next = at.unit >= columns;
    if (next) at.unit = 0, ++at.expert;
    if (--at.left > 0) return next;
    at.left = end - begin, at.expert = first_expert, at.unit = first_unit;
    return true;
  };
  // Lanes have granules of 16 bytes of a row of x, and every second row. A row that did not choose the expert takes what another one has there.
  const auto copy_x = [&](const Place& to) {
    constexpr int kGranules = kDeep * kUnit / 8;
    const int granule = lane % kGranules;
    if (begin == end || to.unit * 8 + granule >= columns * 8) return;
    for (int row = lane / kGranules; row < rows; row += 32 / kGranules) {
      const int64_t from = kDown ? max(chosen.place[to.expert][row], 0) : first_row + row;
      ptx::CopyAsync(to.stage + kStageBytes + row * kExpertPitch + granule * 16,
                     static_cast<const uint16_t*>(kDown ? a.gated : a.x) + from * in + to.unit * kUnit + granule * 8);
    }
  };
  Place to = at_first;
  int next_tile = begin < end ? first_tile : tiles;
  const std::byte* next = nullptr;
  const auto aim = [&] {
    if (next_tile >= tiles) return;
    const int i = kDown ? to.expert : next_tile / of_expert;
    const int64_t row = kDown ? chosen.expert[i] * a.hidden + next_tile * kTileRows
                              : static_cast<int64_t>(chosen.expert[i]) * 2 * size + (next_tile - i * of_expert) * 4;
    next = static_cast<const std::byte*>(kDown ? a.down : a.up) + ((row + lane / 8) * in + to.unit * kUnit) * 2 + lane % 8 * 16;
  };
  const auto fetch = [&] {  // nothing behind the last stage
    if (next_tile >= tiles) return;
    CopyStage(to.stage + CopyPlace(lane), next, apart_bytes, min(kDeep, columns - to.unit));
    next += kDeep * kUnit * 2;
    const bool ends_tile = to.left == 1;
    if (!go_on(to)) return;
    if (ends_tile) next_tile += tile_step;
    aim();
  };
  const auto fetch_all = [&] {
    if (next_tile < tiles) copy_x(to);
    fetch();
    ptx::CopyCommit();
  };
  aim();
  if constexpr (kDown) {
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) fetch();
    WaitForPredecessors();
    Place again = at_first;  // all tiles have the same columns
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      copy_x(again);
      ptx::CopyCommit();
      go_on(again);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) fetch_all();
    if (blockIdx.x == gridDim.x - 1) Report(a, chosen, rows);
  }

  // Lanes of rows that do not exist read the last one; nobody takes what comes out for them.
  const int x_place = kStageBytes + min(g, rows - 1) * kExpertPitch + t * 16;
  Place at = at_first;
  int turn = 0;
#pragma unroll 1
  for (int tile = first_tile; tile < tiles; tile += tile_step, ++turn) {
    float sum[4][4] = {}, total[2] = {0, 0};
#pragma unroll 1
    for (int i = begin; i < end; ++i) {
      ptx::CopyWait<kStages - 2>();
      __syncwarp();
      fetch_all();  // into the stage that all lanes have left
      MultiplyStage<kBFloat16>(at.stage + ReadPlace(lane), at.stage + x_place, min(kDeep, columns - at.unit), sum);
      const int expert = at.expert;
      if (!go_on(at) || !kDown) continue;
      if (chosen.place[expert][g] >= 0) {
        const float share = chosen.share[expert][g];
        const float2 all = SumOf(sum);
        total[0] = fmaf(share, all.x, total[0]), total[1] = fmaf(share, all.y, total[1]);
      }
#pragma unroll
      for (int k = 0; k < 16; ++k) sum[k / 4][k % 4] = 0;
    }
    if constexpr (!kDown) total[0] = SumOf(sum).x, total[1] = SumOf(sum).y;
    float* tile_sums = sums + (turn % 2 * warps + group * members) * rows * kTileRows;
    if (g < rows) {
      *reinterpret_cast<float2*>(tile_sums + (member * rows + g) * kTileRows + 2 * t) = make_float2(total[0], total[1]);
    }
    SyncGroup(group, members);  // and the sums of the tile before last are free
    // One warp finishes the tile while the others go on: lane (g, t) row g of x, rows t and t + 4 of the tile.
    if (member != turn % members || g >= rows) continue;
    float first = 0, second = 0;
    for (int w = 0; w < members; ++w) {
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
      const int expert = tile / of_expert, place = chosen.place[expert][g];
      if (place < 0) continue;
      if (a.up_bias != nullptr) {
        const uint16_t* bias = static_cast<const uint16_t*>(a.up_bias) + chosen.expert[expert] * 2LL * size + (tile - expert * of_expert) * 4 + t;
        first += At<kBFloat16>(__ldcg(bias), 0), second += At<kBFloat16>(__ldcg(bias + size), 0);
      }
      first = Round<kBFloat16>(first), second = Round<kBFloat16>(second);
      static_cast<uint16_t*>(a.gated)[static_cast<int64_t>(place) * size + (tile - expert * of_expert) * 4 + t] =
          static_cast<uint16_t>(Pack<kBFloat16>(Gated<kBFloat16>(a.activation, first, second), 0));
    }
  }
}

// The same for any sizes and rows: a row of x a blockIdx.y, a warp an element of what comes out.
template <bool kBFloat16, bool kDown>
__global__ void __launch_bounds__(256) AnyExpertsKernel(const __grid_constant__ ExpertsArgs a) {
  __shared__ ChosenExperts chosen;
  __shared__ __align__(16) uint32_t keys[kMostExperts];
  if constexpr (!kDown) WaitForPredecessors();
  LaunchDependents();
  const int64_t row = blockIdx.y;
  Choose<kBFloat16>(a, row, 1, keys, chosen);
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
