// Products of a decoding step: a weight times up to eight rows. Its limit is the weight's bytes,
// each read once, over memory bandwidth.
//
// A block works on tiles of eight rows of the weight, its warps side by side on pieces of the
// columns. Sums over the warps end some tiles together: so warps seldom wait for each other, and each
// finishes a tile. A tile's rows are two times four neighbours, `apart` rows from each other: so what
// belongs together, a gate and its factor or the two channels of a rotated pair, is in one tile and
// one lane's hands.
//
// Each warp has a ring of units, 8 rows x 64 columns, in shared memory, filled by its own cp.async
// of 128 bytes a row: blocks fill the multiprocessors' shared memory with weights that are on their
// way. The weights depend on no predecessor, so the ring is filled before the wait: 25 MB on an
// H200, 5 us of its memory's time, which is what the end of one product, the wait and the norm of
// the next one's input take.
//
// In the product the rows of x are `a` (m16n8k16) and the weight is `b`. Both come as 8 x 8 matrices, four
// at once, which are 32 columns. `a` has room for two times eight rows and there are eight of x: rows 0 to 7
// are x's columns 0 to 15 of these, rows 8 to 15 its columns 16 to 31, so that what was loaded is an operand
// as it is. Of the two instructions one's first rows count and the other's last.
#pragma once

#include "kernels/device/step.cuh"
#include "kernels/vector_math.h"

namespace kvq::step {

inline constexpr int kTileRows = 8, kUnit = 64;  // columns
inline constexpr int kUnitBytes = kTileRows * kUnit * 2;
inline constexpr int kDeep = 2;  // units of a stage
inline constexpr int kStageBytes = kDeep * kUnitBytes;
inline constexpr int kMostNormHeld = 2;  // eights of a normalized row that a thread keeps: at most 4096 elements

// How a block finds the rows of a tile, and what it keeps in shared memory: [rings | x | sums].
struct ProductPlan {
  int warps = 0, stages = 0;  // 0: these shapes cannot run
  int blocks_per_sm = 1;
  int tiles = 0, splits = 1;
  int held = 1;  // tiles that end together, up to kMostHeld
  int apart = 4;
  // Whether few stages are on their way at a time before the predecessor has ended: enough for the memory's rate, and what it and this
  // block read then does not queue behind them.
  bool paced = false;
  // Of heads: tiles of one, of which the first so many have pairs that turn, the others the rest (HeadsArgs::First).
  int of_head = 1, turned = 0;
  int64_t x_bytes = 0, shared_bytes = 0;
};
// Bytes of two tiles' sums in float32: those of plan.held tiles are finished while the next ones come. Two times that many are kept.
KVQ_HD constexpr int64_t SumBytes(int warps, int64_t rows) { return 2 * warps * rows * kTileRows * 4; }
inline constexpr int kMostHeld = 8;  // each is finished by a warp of its own

#ifdef __CUDACC__

// ---- a unit in shared memory: rows of 128 bytes, whose granules of 16 bytes are swapped by the row, so that eight rows' are
// in different banks. Lane l copies granule l % 8 of rows l / 8 and, OtherRow, l / 8 + 4, and says where row l % 8 of matrix l / 8
// is, one of the first four; those of the last four are 64 bytes off, up or down.

__device__ __forceinline__ int CopyPlace(int lane) { return lane / 8 * 128 + ((lane % 8) ^ (lane / 8)) * 16; }
__device__ __forceinline__ ptx::Shared OtherRow(ptx::Shared place) { return (place ^ 64) + kUnitBytes / 2; }
__device__ __forceinline__ int ReadPlace(int lane) { return lane % 8 * 128 + ((lane / 8) ^ (lane % 8)) * 16; }

// Elements 8 i to 8 i + 7 of a row of x: [32 columns, row, 32 of them], swapped likewise.
__device__ __forceinline__ int PlaceOf(int i, int row, int rows) {
  return (i / 4 * rows + row) * 4 + (i % 4 ^ row / 2 % 4);
}
// Which of four matrices of x the lane says the place of: the second and third change places (MultiplyUnit).
__device__ __forceinline__ int MatrixOfX(int lane) { return lane / 16 + lane / 8 % 2 * 2; }

// Adds to four parts of a sum. `weight`: the place that the lane says; load_x(chunk, words): four matrices of x, of 32 columns.
template <bool kBFloat16, typename LoadX>
__device__ __forceinline__ void MultiplyUnit(ptx::Shared weight, const LoadX& load_x, float (&sum)[4][4]) {
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    uint32_t w[4], of_x[4];
    ptx::LoadMatrices(weight ^ chunk * 64, w);
    load_x(chunk, of_x);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float (&to)[4] = sum[2 * chunk + k];
      if constexpr (kBFloat16) {
        ptx::MmaBFloat16(to, of_x[0], of_x[1], of_x[2], of_x[3], w[2 * k], w[2 * k + 1]);
      } else {
        ptx::MmaHalf(to, of_x[0], of_x[1], of_x[2], of_x[3], w[2 * k], w[2 * k + 1]);
      }
    }
  }
}
// A stage, or, unless all are whole (kWhole), `units` of it where it ends a row, from `from` on, the lane's place of the first; its other
// row is `apart` bytes from there.
template <bool kWhole>
__device__ __forceinline__ void CopyStage(ptx::Shared place, const std::byte* from, int64_t apart, int units,
                                          ptx::CachePolicy policy) {
#pragma unroll
  for (int i = 0; i < kDeep; ++i) {
    if (!kWhole && i >= units) break;
    ptx::CopyAsync(place + i * kUnitBytes, from + i * kUnit * 2, policy);
    ptx::CopyAsync(OtherRow(place) + i * kUnitBytes, from + apart + i * kUnit * 2, policy);
  }
}

// `x`: the place that the lane says, those of the next 32 columns are `apart` bytes behind.
template <bool kBFloat16, bool kWhole>
__device__ __forceinline__ void MultiplyStage(ptx::Shared weight, ptx::Shared x, int apart, int units, float (&sum)[4][4]) {
#pragma unroll
  for (int i = 0; i < kDeep; ++i) {
    const auto load_x = [&](int chunk, uint32_t (&words)[4]) { ptx::LoadMatrices(x + (2 * i + chunk) * apart, words); };
    if (kWhole || i < units) MultiplyUnit<kBFloat16>(weight + i * kUnitBytes, load_x, sum);
  }
}
// The matrices of a whole stage's x, in registers.
using StageOfX = uint32_t[kDeep][2][4];
template <bool kBFloat16>
__device__ __forceinline__ void MultiplyStage(ptx::Shared weight, const StageOfX& x, float (&sum)[4][4]) {
#pragma unroll
  for (int i = 0; i < kDeep; ++i) {
    const auto load_x = [&](int chunk, uint32_t (&words)[4]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) words[k] = x[i][chunk][k];
    };
    MultiplyUnit<kBFloat16>(weight + i * kUnitBytes, load_x, sum);
  }
}
// Lane (g, t) has row g of x times rows 2 t and 2 t + 1 of the tile.
__device__ __forceinline__ float2 SumOf(const float (&sum)[4][4]) {
  return make_float2((sum[0][0] + sum[1][2]) + (sum[2][0] + sum[3][2]), (sum[0][1] + sum[1][3]) + (sum[2][1] + sum[3][3]));
}

// kWhole: all stages of all warps have two units: without a branch between these all matrices of a stage are on their way at once.
// kHeldX: stages of a warp's part of a row, all of whose x it keeps in registers; or 0. Shared memory then has a third less to do.
// kNormHeld: eights of a row of x that a thread norms; 0 where there is no norm.
// Partial sums: some of them follow attention, which a product does not know, and beside whose blocks there is room for 64 registers a
// thread (attention.cc).
template <bool kBFloat16, int kWarps, int kStages, bool kWhole, int kHeldX, ProductEnd kEnd, int kNormHeld>
__global__ void __launch_bounds__(kWarps * 32, kWarps == 8 && kEnd == ProductEnd::kPartial ? 4 : kStages > 2 ? 2 : 1)
    ProductKernel(const __grid_constant__ ProductArgs a, const __grid_constant__ ProductPlan plan) {
  extern __shared__ __align__(128) std::byte shared[];
  constexpr int kThreads = kWarps * 32;
  static_assert((kWarps & (kWarps - 1)) == 0 && kMostHeld <= kWarps);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int rows = static_cast<int>(a.rows), in = static_cast<int>(a.in);
  const ptx::Shared ring = ptx::SharedAddress(shared) + warp * kStages * kStageBytes;
  std::byte* x_shared = shared + kWarps * kStages * kStageBytes;
  float* sums = reinterpret_cast<float*>(x_shared + plan.x_bytes);

  // This block's split of the columns, and this warp's part of it, in units.
  const int shift = __ffs(plan.splits) - 1, split = blockIdx.x & (plan.splits - 1), units = in / kUnit;
  const int split_begin = (units * split) >> shift, split_end = (units * (split + 1)) >> shift;
  const int begin = split_begin + (split_end - split_begin) * warp / kWarps;
  const int end = split_begin + (split_end - split_begin) * (warp + 1) / kWarps;
  const int first_tile = static_cast<int>(blockIdx.x) >> shift, tile_step = static_cast<int>(gridDim.x) >> shift;
  const float in_head = ptx::Reciprocal(static_cast<float>(plan.of_head));
  const auto head_of = [&](int tile) { return Quotient(tile, in_head); };
  const auto first_row = [&](int tile) {
    if constexpr (kEnd == ProductEnd::kGate) return tile * 4;
    if constexpr (kEnd != ProductEnd::kAppend) return tile * kTileRows;
    const int head = head_of(tile), i = tile - head * plan.of_head;
    return (head * plan.of_head + tile + (i < plan.turned ? 0 : plan.turned)) * 4;
  };
  const auto apart_of = [&](int tile) {
    if constexpr (kEnd != ProductEnd::kAppend) return plan.apart;
    return 4 * (tile - head_of(tile) * plan.of_head < plan.turned ? plan.turned : plan.of_head - plan.turned);
  };

  // ---- the stream of weights
  const ptx::Shared copy_place = ring + CopyPlace(lane), read_place = ring + ReadPlace(lane);
  int64_t apart_bytes = static_cast<int64_t>(plan.apart) * in * 2;
  int next_tile = first_tile, next_unit = begin, next_stage = 0;
  const std::byte* next = nullptr;
  const ptx::CachePolicy policy = ptx::ReadOnce();
  const auto aim = [&] {
    next = static_cast<const std::byte*>(a.weight) +
           (static_cast<int64_t>(first_row(next_tile) + lane / 8) * in + begin * kUnit) * 2 +
           lane % 8 * 16;
    if constexpr (kEnd == ProductEnd::kAppend) apart_bytes = static_cast<int64_t>(apart_of(next_tile)) * in * 2;
  };
  const auto fetch = [&] {  // an empty group behind the last stage
    if (next_tile < plan.tiles && (kWhole || begin < end)) {
      CopyStage<kWhole>(copy_place + next_stage * kStageBytes, next, apart_bytes, end - next_unit, policy);
      next += kDeep * kUnit * 2;
      if ((next_unit += kDeep) >= end) {
        next_unit = begin;
        next_tile += tile_step;
        aim();
      }
    }
    next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
    ptx::CopyCommit();
  };
  LaunchDependents();
  aim();
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    fetch();
    if (plan.paced) ptx::CopyWait<2>();
  }

  // ---- x
  if constexpr (kNormHeld > 0) {
    float weight[kNormHeld][8], x[kNormHeld][8], squares = 0;
#pragma unroll
    for (int i = 0; i < kNormHeld; ++i) {
      const int at = (threadIdx.x + i * kThreads) * 8;
      if (at < in) LoadFloats(a.norm.weight, at, weight[i]);
    }
    // A block of few tiles is there early: it does this once on whatever is there, so that its instructions have come.
#pragma unroll 1
    for (int pass = kStages == 3 ? 0 : 1; pass < 2; ++pass) {
      if (pass == 1) WaitForPredecessors();
      squares = 0;
#pragma unroll
      for (int i = 0; i < kNormHeld; ++i) {
        const int at = (threadIdx.x + i * kThreads) * 8;
        if (at < in) LoadSum<kBFloat16>(a.norm, 0, at, x[i]);
      }
#pragma unroll
      for (int i = 0; i < kNormHeld; ++i) {
        const int at = (threadIdx.x + i * kThreads) * 8;
        if (at >= in) break;
        const bool added = a.norm.delta != nullptr || a.norm.partial != nullptr;
        if (added && blockIdx.x == 0 && pass == 1) Store<kBFloat16>(a.norm.sum, at, x[i]);
#pragma unroll
        for (int k = 0; k < 8; ++k) squares += x[i][k] * x[i][k];
      }
      const float inverse = InverseRms<kWarps>(squares, in, a.norm.eps, sums);
#pragma unroll
      for (int i = 0; i < kNormHeld; ++i) {
        const int at = (threadIdx.x + i * kThreads) * 8;
        if (at >= in) break;
#pragma unroll
        for (int k = 0; k < 8; ++k) x[i][k] = x[i][k] * inverse * weight[i][k];
        Store<kBFloat16>(x_shared, PlaceOf(at / 8, 0, 1) * 8, x[i]);
        if (a.writes_normed && blockIdx.x == 0 && pass == 1) Store<kBFloat16>(a.norm.out, at, x[i]);
      }
      if (pass == 0) __syncthreads();
    }
  } else {
    WaitForPredecessors();
    const int eights = (split_end - split_begin) * kUnit / 8;
    const ptx::Shared place = ptx::SharedAddress(x_shared);
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const uint16_t* from = static_cast<const uint16_t*>(a.x) + static_cast<int64_t>(row) * in + split_begin * kUnit;
#pragma unroll 1
      for (int i = threadIdx.x; i < eights; i += kThreads) ptx::CopyAsync(place + PlaceOf(i, row, rows) * 16, from + i * 8);
    }
    ptx::CopyCommit();
    ptx::CopyWait<0>();
  }
  __syncthreads();
  // Lanes of rows that do not exist read the last one; nobody reads what comes out for them.
  const ptx::Shared x_place =
      ptx::SharedAddress(x_shared) + (begin - split_begin) * 2 * rows * 64 + PlaceOf(MatrixOfX(lane), min(lane % 8, rows - 1), rows) * 16;

  StageOfX held_x[kHeldX > 0 ? kHeldX : 1];
#pragma unroll
  for (int i = 0; i < kHeldX * kDeep * 2; ++i) {
    ptx::LoadMatrices(x_place + i * rows * 64, held_x[i / 2 / kDeep][i / 2 % kDeep][i % 2]);
  }

  int stage = 0, turn = 0, held = 0, place = 0;  // held: tiles that have not ended; place: of two, where their sums are
#pragma unroll 1
  for (int streamed = first_tile; streamed < plan.tiles; streamed += tile_step, ++turn) {
    float sum[4][4] = {};
    const auto next_weights = [&] {
      ptx::CopyWait<kStages - 2>();
      __syncwarp();
      fetch();  // into the stage that all lanes have left
      const ptx::Shared weights = read_place + stage * kStageBytes;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      return weights;
    };
    if constexpr (kHeldX > 0) {
#pragma unroll
      for (int i = 0; i < kHeldX; ++i) MultiplyStage<kBFloat16>(next_weights(), held_x[i], sum);
    } else {
      ptx::Shared x_at = x_place;
#pragma unroll 1
      for (int unit = begin; unit < end; unit += kDeep) {
        MultiplyStage<kBFloat16, kWhole>(next_weights(), x_at, rows * 64, end - unit, sum);
        x_at += 2 * kDeep * rows * 64;
      }
    }
    const int of_tile = kWarps * rows * kTileRows;
    float* held_sums = sums + place * plan.held * of_tile;
    if (g < rows) *reinterpret_cast<float2*>(held_sums + held * of_tile + (warp * rows + g) * kTileRows + 2 * t) = SumOf(sum);
    if (++held < plan.held && streamed + tile_step < plan.tiles) continue;
    __syncthreads();  // and the other place is free
    // Each of so many warps finishes one while the others go on: lane (g, t) row g of x, rows t and t + 4 of the tile.
    const int first_turn = turn + 1 - held, own = (warp - first_turn) & (kWarps - 1);
    const bool finishes = own < held && g < rows;
    place ^= 1, held = 0;
    if (!finishes) continue;
    const int tile = first_tile + (first_turn + own) * tile_step;
    const float* tile_sums = held_sums + own * of_tile;
    float first = 0, second = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      first += tile_sums[(w * rows + g) * kTileRows + t];
      second += tile_sums[(w * rows + g) * kTileRows + t + 4];
    }
    const int row = first_row(tile) + t;
    if constexpr (kEnd == ProductEnd::kPartial) {
      float* out = a.partial + (static_cast<int64_t>(split) * rows + g) * a.out + row;
      out[0] = first, out[plan.apart] = second;
    } else if constexpr (kEnd == ProductEnd::kStore) {
      uint16_t* out = static_cast<uint16_t*>(a.stored) + g * a.out + row;
      out[0] = static_cast<uint16_t>(Pack<kBFloat16>(first, 0));
      out[plan.apart] = static_cast<uint16_t>(Pack<kBFloat16>(second, 0));
    } else {
      const void* biases = kEnd == ProductEnd::kAppend ? a.append.of.bias : a.gate.bias;
      if (biases != nullptr) {
        first += At<kBFloat16>(static_cast<const uint16_t*>(biases)[row], 0);
        second += At<kBFloat16>(static_cast<const uint16_t*>(biases)[row + apart_of(tile)], 0);
      }
      first = Round<kBFloat16>(first), second = Round<kBFloat16>(second);
      if constexpr (kEnd == ProductEnd::kGate) {
        static_cast<uint16_t*>(a.gate.out)[g * a.gate.size + row] = static_cast<uint16_t>(
            Pack<kBFloat16>(Gated<kBFloat16>(a.gate.activation, first, second), 0));
      } else if constexpr (kEnd == ProductEnd::kActivate) {
        const auto finish = [&](int at, float x) {
          const uint16_t* factor = static_cast<const uint16_t*>(a.gate.factor);
          x = factor == nullptr ? Activated(a.gate.activation, x)
                                : Gated<kBFloat16>(a.gate.activation, x, At<kBFloat16>(__ldcg(factor + at), 0));
          static_cast<uint16_t*>(a.gate.out)[at] = static_cast<uint16_t>(Pack<kBFloat16>(x, 0));
        };
        const int at = g * static_cast<int>(a.out) + row;
        finish(at, first), finish(at + plan.apart, second);
      } else {
        const HeadsArgs& of = a.append.of;
        const int head = head_of(tile), i = (tile - head * plan.of_head) * 4 + t;
        if (head < of.heads + of.kv_heads && i < of.pairs()) {
          const float2 turned = Turn(AngleOf(of, g, i), first, second);
          first = turned.x, second = turned.y;
        }
        uint16_t* out = Destination(a.append, g, head) + of.First(i);
        out[0] = static_cast<uint16_t>(Pack<kBFloat16>(first, 0));
        out[of.Apart(i)] = static_cast<uint16_t>(Pack<kBFloat16>(second, 0));
      }
    }
  }
}

#endif  // __CUDACC__

}  // namespace kvq::step
