// The kernels of experts.h.
//
// The stream of weights is like that of product.cuh: tiles of eight rows, a ring in shared memory a warp, eight rows of x as one
// operand of the tensor cores. But matrices are small, so that what happens once a tile weighs, and so do instructions: a warp
// that wants 500 ns for a kilobyte is late however early that came. Therefore:
//
// - A block is some groups of warps. A group works on a tile, its warps side by side on pieces of the columns, and a sum over them
//   ends the tile. There are as many groups as make the last round full.
// - A stage of a ring is 8 rows x 128 columns, two units of 64, whose addresses are one register and constants.
// - Which weights these are, the logits say. Every block of the first product chooses for itself, which costs less than one more
//   kernel: a key of 32 bits for each logit, unique and in their order. It waits for the logits with nothing else to do: so on the way
//   from there to the first copy of one row no whole number is divided (Quotient), warps reduce all but a few candidates, and shares
//   are left to the second product. One leaves the keys that it has chosen to that, whose blocks then ask for weights as soon as they
//   find a place, when the first ones of the first product have ended.
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
  uint32_t best[kExpertRows][kMostPerToken];  // keys (KeyOf), the largest first
  int count;
  int expert[kMostChosen];                // each once
  float share[kMostChosen][kExpertRows];  // 0 of a row that did not choose it
  int place[kMostChosen][kExpertRows];    // of the row in `gated`, [rows, per_token]; -1
};
// Bytes of a stage, with its part of so many rows of x behind the weights: an odd number of 16s a row, so that eight of them are in
// different banks.
inline constexpr int kExpertPitch = kDeep * kUnit * 2 + 16;
KVQ_HD constexpr int ExpertStageBytes(int rows) { return (kStageBytes + rows * kExpertPitch + 127) / 128 * 128; }

// Of a row's experts a warp finds the largest of 32, whose largest are the row's: so many of these, and room for them and for a
// row's keys, of 32 bits.
KVQ_HD constexpr int Candidates(int experts, int per_token) { return ((experts + 31) / 32 * per_token + 3) / 4 * 4; }
KVQ_HD constexpr int64_t ChoiceBytes(int rows, int experts, int per_token) {
  return 4 * static_cast<int64_t>(rows) * (Candidates(experts, per_token) + (experts + 31) / 32 * 32);
}

#ifdef __CUDACC__

// The warps of a group wait for each other; of groups of more than one there are at most four.
__device__ __forceinline__ void SyncGroup(int group, int warps) {
  if (warps == 1) {
    __syncwarp();
  } else {
    ptx::SyncThreads(1 + group, 32 * warps);
  }
}

// A logit's place among its row's, above 0: larger for a larger one, and of equal ones for a smaller number; NaN above all.
__device__ __forceinline__ uint32_t KeyOf(uint32_t bits, bool nan, int expert) {
  const uint32_t order = nan ? 0xFFFFu : bits & 0x8000u ? 0xFFFFu & ~bits : bits | 0x8000u;
  return order << 16 | (0xFFFEu - static_cast<uint32_t>(expert));
}
__device__ __forceinline__ int ExpertOf(uint32_t key) { return static_cast<int>(0xFFFEu - (key & 0xFFFFu)); }
template <bool kBFloat16>
__device__ __forceinline__ float LogitOf(uint32_t key) {
  const uint32_t order = key >> 16;
  return At<kBFloat16>((order & 0x8000u ? order : ~order) & (order & 0x8000u ? 0x7FFFu : 0xFFFFu), 0);
}
// The bits of a sum of a logit and its bias, in 16 bits; -0 is 0.
template <bool kBFloat16>
__device__ __forceinline__ uint32_t WithBias(uint32_t bits, uint32_t bias) {
  const float sum = At<kBFloat16>(bits, 0) + At<kBFloat16>(bias, 0);
  return sum == 0.0f ? 0u : Pack<kBFloat16>(sum, 0) & 0xFFFFu;
}

// The keys of what rows `first` and on have chosen, by all threads of a block that meet behind it. `room`: ChoiceBytes, free then.
template <bool kBFloat16>
__device__ __forceinline__ void Rank(const ExpertsArgs& a, int64_t first, int rows, uint32_t* room, ChosenExperts& to) {
  const int experts = static_cast<int>(a.experts), per_token = static_cast<int>(a.per_token);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, threads = blockDim.x;
  const int chunks = (experts + 31) / 32, candidates = Candidates(experts, per_token);
  const float of_chunks = ptx::Reciprocal(static_cast<float>(chunks)), of_candidates = ptx::Reciprocal(static_cast<float>(candidates));
  uint32_t* keys = room + rows * candidates;
#pragma unroll 1
  for (int task = warp; task < rows * chunks; task += warps) {
    const int row = Quotient(task, of_chunks), expert = (task - row * chunks) * 32 + lane;
    uint32_t key = 0;  // below all others
    if (expert < experts) {
      const uint32_t logit = __ldcg(static_cast<const uint16_t*>(a.logits) + (first + row) * experts + expert);
      const uint32_t bias = a.logit_bias == nullptr ? 0u : __ldcg(static_cast<const uint16_t*>(a.logit_bias) + expert);
      const uint32_t bits = WithBias<kBFloat16>(logit, bias);
      const float x = At<kBFloat16>(bits, 0);
      key = KeyOf(bits, x != x, expert);
    }
    keys[task * 32 + lane] = key;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * candidates; i += threads) room[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int task = warp; task < rows * chunks; task += warps) {
    const uint32_t key = keys[task * 32 + lane];
    uint32_t last = 0xFFFFFFFFu, own = 0;
#pragma unroll 1
    for (int rank = 0; rank < per_token; ++rank) {
      last = __reduce_max_sync(0xFFFFFFFFu, key < last ? key : 0u);
      if (lane == rank) own = last;
    }
    const int row = Quotient(task, of_chunks);
    if (lane < per_token) room[row * candidates + (task - row * chunks) * per_token + lane] = own;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * candidates; i += threads) {
    const int row = Quotient(i, of_candidates);
    const uint32_t key = room[i];
    const uint4* others = reinterpret_cast<const uint4*>(room + row * candidates);
    int above = 0, more = 0;
#pragma unroll 4
    for (int k = 0; k < candidates / 4; ++k) {
      const uint4 four = others[k];
      above += (four.x > key) + (four.y > key), more += (four.z > key) + (four.w > key);
    }
    if (const int rank = above + more; key != 0 && rank < per_token) to.best[row][rank] = key;
  }
}

// Which experts a row has chosen, from the keys of the first threads, a rank each: as all of a block know it behind a barrier.
__device__ __forceinline__ void ListRow(const ExpertsArgs& a, int64_t row, uint32_t key, ChosenExperts& to) {
  const int rank = threadIdx.x, per_token = static_cast<int>(a.per_token);
  if (rank < per_token) {
    to.best[0][rank] = key, to.expert[rank] = ExpertOf(key);
    to.place[rank][0] = static_cast<int>(row) * per_token + rank;
    if (rank == 0) to.count = per_token;
  }
  __syncthreads();
}
// The same of several rows, from their keys in `to`, where all threads have met.
__device__ __forceinline__ void ListRows(const ExpertsArgs& a, int64_t first, int rows, ChosenExperts& to) {
  __shared__ uint32_t seen[kMostExperts / 32];  // by any row
  const int per_token = static_cast<int>(a.per_token), threads = blockDim.x;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * per_token * kExpertRows; i += threads) {
    const int rank = i / kExpertRows, row = i % kExpertRows;
    to.share[rank][row] = 0, to.place[rank][row] = -1;
  }
  if (threadIdx.x < kMostExperts / 32) seen[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * per_token; i += threads) {
    const int row = i / per_token, expert = ExpertOf(to.best[row][i - row * per_token]);
    atomicOr(&seen[expert / 32], 1u << expert % 32);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * per_token; i += threads) {  // each once, by number
    const int row = i / per_token, rank = i - row * per_token, expert = ExpertOf(to.best[row][rank]);
    int place = __popc(seen[expert / 32] & ((1u << expert % 32) - 1));
#pragma unroll 1
    for (int j = 0; j < expert / 32; ++j) place += __popc(seen[j]);
    to.expert[place] = expert, to.place[place][row] = static_cast<int>(first + row) * per_token + rank;
  }
  if (threadIdx.x == 0) {
    int count = 0;
#pragma unroll 1
    for (int i = 0; i < kMostExperts / 32; ++i) count += __popc(seen[i]);
    to.count = count;
  }
  __syncthreads();
}

// The same of one row of up to kFewExperts, whole words of them, in which one warp chooses.
inline constexpr int kFewExperts = 128;
__device__ __forceinline__ bool IsOneOfFew(const ExpertsArgs& a, int rows) { return rows == 1 && a.experts <= kFewExperts && a.experts % 2 == 0; }
template <bool kBFloat16>
__device__ __forceinline__ void ChooseOfFew(const ExpertsArgs& a, int64_t row, ChosenExperts& to) {
  constexpr int kWords = kFewExperts / 64;  // a lane
  const int experts = static_cast<int>(a.experts), lane = threadIdx.x % 32;
  const uint32_t* logits = reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(a.logits) + row * experts);
  uint32_t own = 0;
  if (threadIdx.x < 32) {
    uint32_t words[kWords], biases[kWords], keys[2 * kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int word = lane + 32 * i;
      const bool has = 2 * word < experts;
      words[i] = has ? __ldcg(logits + word) : 0;
      biases[i] = has && a.logit_bias != nullptr ? __ldcg(static_cast<const uint32_t*>(a.logit_bias) + word) : 0;
    }
#pragma unroll
    for (int k = 0; k < 2 * kWords; ++k) {
      const int expert = 2 * (lane + 32 * (k / 2)) + k % 2;
      const uint32_t bits = WithBias<kBFloat16>(words[k / 2] >> 16 * (k % 2) & 0xFFFFu, biases[k / 2] >> 16 * (k % 2) & 0xFFFFu);
      const float x = At<kBFloat16>(bits, 0);
      keys[k] = expert < experts ? KeyOf(bits, x != x, expert) : 0;  // 0 is below all others
    }
#pragma unroll 1
    for (int rank = 0; rank < static_cast<int>(a.per_token); ++rank) {
      uint32_t best = keys[0];
#pragma unroll
      for (int k = 1; k < 2 * kWords; ++k) best = max(best, keys[k]);
      best = __reduce_max_sync(0xFFFFFFFFu, best);
      if (lane == rank) own = best;
#pragma unroll
      for (int k = 0; k < 2 * kWords; ++k) keys[k] = keys[k] == best ? 0 : keys[k];
    }
  }
  ListRow(a, row, own, to);
}

template <bool kBFloat16>
__device__ __forceinline__ void Choose(const ExpertsArgs& a, int64_t first, int rows, uint32_t* room, ChosenExperts& to) {
  if (IsOneOfFew(a, rows)) return ChooseOfFew<kBFloat16>(a, first, to);
  Rank<kBFloat16>(a, first, rows, room, to);
  __syncthreads();
  if (rows == 1) return ListRow(a, first, threadIdx.x < a.per_token ? to.best[0][threadIdx.x] : 0, to);
  ListRows(a, first, rows, to);
}

// What was chosen, by so many threads of one block.
__device__ __forceinline__ void Report(const ExpertsArgs& a, const ChosenExperts& of, int rows, int thread, int threads) {
#pragma unroll 1
  for (int i = thread; i < of.count * rows; i += threads) {
    const int place = of.place[i / rows][i % rows];
    if (place >= 0) a.chosen[place] = of.expert[i / rows];
  }
  if (thread == 0) atomicAdd(a.reads, static_cast<unsigned long long>(of.count));
}

// What another block has chosen, which it has left behind a fence, and let this kernel begin: so it is there, though no wait says so.
__device__ __forceinline__ void TakeChoice(const ExpertsArgs& a, int64_t first, int rows, ChosenExperts& to) {
  const int per_token = static_cast<int>(a.per_token);
  if (rows == 1) {
    const int rank = threadIdx.x;
    return ListRow(a, first, rank < per_token ? __ldcg(a.ranked + first * per_token + rank) : 0, to);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * per_token; i += blockDim.x) {
    to.best[i / per_token][i % per_token] = __ldcg(a.ranked + first * per_token + i);
  }
  __syncthreads();
  ListRows(a, first, rows, to);
}
// By a warp of the block whose choice it is, and the kernel behind this one may begin. Before it asks for weights: the fence would wait
// for them.
__device__ __forceinline__ void LeaveChoice(const ExpertsArgs& a, int64_t first, int rows, const ChosenExperts& of) {
  const int per_token = static_cast<int>(a.per_token), lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i = lane; i < rows * per_token; i += 32) {
    a.ranked[first * per_token + i] = of.best[i / per_token][i % per_token];
  }
  __threadfence();
  __syncwarp();
  LaunchDependents();
  Report(a, of, rows, lane, 32);
}

// And their shares, which the second product alone needs. Who reads them waits for all threads before.
template <bool kBFloat16>
__device__ __forceinline__ void Share(const ExpertsArgs& a, int64_t first, int rows, ChosenExperts& to) {
  const int experts = static_cast<int>(a.experts), per_token = static_cast<int>(a.per_token);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll 1
  for (int row = warp; row < rows; row += warps) {
    const uint32_t key = to.best[row][min(lane, per_token - 1)];
    const float largest = LogitOf<kBFloat16>(to.best[row][0]), weight = expf(LogitOf<kBFloat16>(key) - largest);
    float sum = lane < per_token ? weight : 0.0f;
    if (!a.normalized) {
      sum = 0;
#pragma unroll 1
      for (int e = lane; e < experts; e += 32) {
        const uint32_t bits = __ldcg(static_cast<const uint16_t*>(a.logits) + (first + row) * experts + e);
        const uint32_t bias = a.logit_bias == nullptr ? 0u : __ldcg(static_cast<const uint16_t*>(a.logit_bias) + e);
        sum += expf(At<kBFloat16>(WithBias<kBFloat16>(bits, bias), 0) - largest);
      }
    }
    sum = WarpSum(sum);
#pragma unroll 1
    for (int i = 0; lane < per_token && i < to.count; ++i) {
      if (to.expert[i] == ExpertOf(key)) to.share[i][row] = weight / sum;
    }
  }
}

// A warp's way through one of the two products: the tiles of its group, of each the stages from begin to end.
// Tiles: of the first product [expert, 4 rows of the gate and 4 of the factor], of the second [8 rows], of all experts. Stages of
// a tile: of a row's columns, or, second, [expert, columns].
template <bool kDown, bool kWhole>
struct Way {
  struct Place {
    int left, expert, unit;  // stages left of the tile; expert (second product) and unit of the next one
  };
  int in, columns, of_row;  // columns: units of a row; of_row: stages
  int members, member, group, first_tile, tile_step;
  ptx::CachePolicy policy = ptx::ReadOnce();  // of weights
  float in_expert, in_row;  // 1 / tiles of an expert, 1 / of_row
  // What is known behind the choice.
  int tiles, next_tile;  // next_tile: that is copied
  Place first, to;       // at a tile's begin; where it copies
  const std::byte *next, *next_x;  // next_x: of the first row of x that the lane copies

  __device__ __forceinline__ Way(const ExpertsArgs& a, int groups) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    in = static_cast<int>(kDown ? a.size : a.hidden), columns = in / kUnit, of_row = (columns + kDeep - 1) / kDeep;
    in_expert = ptx::Reciprocal(static_cast<float>(a.size / 4)), in_row = ptx::Reciprocal(static_cast<float>(of_row));
    members = Quotient(warps, ptx::Reciprocal(static_cast<float>(groups)));
    group = Quotient(warp, ptx::Reciprocal(static_cast<float>(members))), member = warp - group * members;
    first_tile = blockIdx.x + gridDim.x * group, tile_step = gridDim.x * groups;
  }
  __device__ __forceinline__ void Start(const ExpertsArgs& a, const ChosenExperts& chosen, int64_t first_row, int rows) {
    tiles = static_cast<int>(kDown ? a.hidden / kTileRows : chosen.count * (a.size / 4)), next_tile = first_tile;
    const int stages = kDown ? chosen.count * of_row : of_row;
    const float part = ptx::Reciprocal(static_cast<float>(members));
    const int begin = Quotient(stages * member, part);
    first.left = Quotient(stages * (member + 1), part) - begin;
    first.expert = kDown ? Quotient(begin, in_row) : 0;
    first.unit = (begin - first.expert * of_row) * kDeep, to = first;
    Aim(a, chosen, first_row, rows);
  }
  // Goes on; whether the expert's row, or the warp's part of it, has ended.
  __device__ __forceinline__ bool GoOn(Place& at) const {
    at.unit += kDeep;
    const bool next_expert = at.unit >= columns;
    if (next_expert) at.unit = 0, ++at.expert;
    if (--at.left > 0) return next_expert;
    at = first;
    return true;
  }
  __device__ __forceinline__ bool copies() const { return next_tile < tiles; }
  __device__ __forceinline__ int ExpertOfTile(int tile) const { return kDown ? 0 : Quotient(tile, in_expert); }
  // Lanes have granules of 16 bytes of a row of x, and every second row. A row that did not choose the expert takes what another
  // one has there.
  static constexpr int kGranules = kDeep * kUnit / 8;
  __device__ __forceinline__ const std::byte* OfX(const ExpertsArgs& a, const ChosenExperts& chosen, int64_t first_row, int row,
                                                  const Place& at) const {
    const int64_t from = kDown ? max(chosen.place[at.expert][row], 0) : first_row + row;
    return static_cast<const std::byte*>(kDown ? a.gated : a.x) + (from * in + at.unit * kUnit) * 2 + threadIdx.x % kGranules * 16;
  }
  __device__ __forceinline__ bool HasX(const Place& at) const { return at.unit * 8 + static_cast<int>(threadIdx.x) % kGranules < columns * 8; }
  __device__ __forceinline__ void Aim(const ExpertsArgs& a, const ChosenExperts& chosen, int64_t first_row, int rows) {
    if (!copies()) return;
    const int lane = threadIdx.x % 32, size = static_cast<int>(a.size), i = kDown ? to.expert : ExpertOfTile(next_tile);
    const int64_t row = kDown ? static_cast<int64_t>(chosen.expert[i]) * a.hidden + next_tile * kTileRows
                              : static_cast<int64_t>(chosen.expert[i]) * (2 * size) + (next_tile * 4 - i * size);
    next = static_cast<const std::byte*>(kDown ? a.down : a.up) + ((row + lane / 8) * in + to.unit * kUnit) * 2 + lane % 8 * 16;
    next_x = OfX(a, chosen, first_row, min(lane / kGranules, rows - 1), to);
  }
  // The next stage, its weights and, where they are there, rows of x; nothing behind the last.
  __device__ __forceinline__ void Copy(const ExpertsArgs& a, const ChosenExperts& chosen, int64_t first_row, int rows, bool with_x,
                                       ptx::Shared stage) {
    if (!copies()) return;
    const int lane = threadIdx.x % 32;
    CopyStage<kWhole>(stage + CopyPlace(lane), next, (kDown ? 4 : a.size) * in * 2, columns - to.unit, policy);
    if (with_x && HasX(to)) {
      const ptx::Shared place = stage + kStageBytes + lane % kGranules * 16;
      int row = lane / kGranules;
      if (row < rows) ptx::CopyAsync(place + row * kExpertPitch, next_x);
#pragma unroll 1
      for (row += 32 / kGranules; row < rows; row += 32 / kGranules) {
        ptx::CopyAsync(place + row * kExpertPitch, OfX(a, chosen, first_row, row, to));
      }
    }
    next += kDeep * kUnit * 2, next_x += kDeep * kUnit * 2;
    const bool ends_tile = to.left == 1;
    if (!GoOn(to)) return;
    if (ends_tile) next_tile += tile_step;
    Aim(a, chosen, first_row, rows);
  }
  // Rows of x of `count` stages from a tile's first one on, in `ring` from `stage` on.
  __device__ __forceinline__ void CopyFirstX(const ExpertsArgs& a, const ChosenExperts& chosen, int64_t first_row, int rows, int count,
                                             ptx::Shared stage, int stage_bytes, ptx::Shared ring_end, int ring_bytes) const {
    const int lane = threadIdx.x % 32, begin = first.expert * of_row + first.unit / kDeep;
    const float of_rows = ptx::Reciprocal(static_cast<float>(rows)), of_tile = ptx::Reciprocal(static_cast<float>(first.left));
#pragma unroll 1
    for (int task = lane / kGranules; task < count * rows; task += 32 / kGranules) {
      const int i = Quotient(task, of_rows), row = task - i * rows;
      const int number = begin + i - Quotient(i, of_tile) * first.left;  // all tiles have the same columns
      const int expert = Quotient(number, in_row), unit = (number - expert * of_row) * kDeep;
      const Place at = {0, expert, unit};
      ptx::Shared place = stage + i * stage_bytes;
      if (place >= ring_end) place -= ring_bytes;
      if (HasX(at)) ptx::CopyAsync(place + kStageBytes + row * kExpertPitch + lane % kGranules * 16, OfX(a, chosen, first_row, row, at));
    }
    ptx::CopyCommit();
  }
};

// What comes of a sum: lane (g, t) has row g of x times rows t and t + 4 of the tile.
template <bool kBFloat16, bool kDown, bool kWhole>
__device__ __forceinline__ void EndTile(const ExpertsArgs& a, const ChosenExperts& chosen, const Way<kDown, kWhole>& way, int64_t first_row, int tile,
                                        float first, float second) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if constexpr (kDown) {
#pragma unroll 1
    for (int i = 0; a.down_bias != nullptr && i < chosen.count; ++i) {
      if (chosen.place[i][g] < 0) continue;
      const uint16_t* bias = static_cast<const uint16_t*>(a.down_bias) + chosen.expert[i] * a.hidden + tile * kTileRows + t;
      first = fmaf(chosen.share[i][g], At<kBFloat16>(__ldcg(bias), 0), first);
      second = fmaf(chosen.share[i][g], At<kBFloat16>(__ldcg(bias + 4), 0), second);
    }
    float* out = a.partial + (first_row + g) * a.hidden + tile * kTileRows + t;
    out[0] = first, out[4] = second;
  } else {
    const int expert = way.ExpertOfTile(tile), row = tile * 4 - expert * static_cast<int>(a.size) + t, place = chosen.place[expert][g];
    if (place < 0) return;
    if (a.up_bias != nullptr) {
      const uint16_t* bias = static_cast<const uint16_t*>(a.up_bias) + chosen.expert[expert] * 2 * a.size + row;
      first += At<kBFloat16>(__ldcg(bias), 0), second += At<kBFloat16>(__ldcg(bias + a.size), 0);
    }
    first = Round<kBFloat16>(first), second = Round<kBFloat16>(second);
    static_cast<uint16_t*>(a.gated)[place * a.size + row] =
        static_cast<uint16_t>(Pack<kBFloat16>(Gated<kBFloat16>(a.activation, first, second), 0));
  }
}

// Rows `first_row` and on of x, eight at most.
template <bool kBFloat16, int kStages, bool kWhole, bool kDown>
__global__ void __maxnreg__(112) ExpertsKernel(const __grid_constant__ ExpertsArgs a, int64_t first_row, int groups) {
  extern __shared__ __align__(128) std::byte shared[];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int rows = static_cast<int>(min(a.rows - first_row, static_cast<int64_t>(kExpertRows)));
  const int stage_bytes = ExpertStageBytes(rows);
  const ptx::Shared ring = ptx::SharedAddress(shared) + warp * kStages * stage_bytes, ring_end = ring + kStages * stage_bytes;
  float* sums = reinterpret_cast<float*>(shared + warps * kStages * stage_bytes);
  __shared__ ChosenExperts chosen;

  Way<kDown, kWhole> way(a, groups);
  // The kernel behind the first product is the second, which is not to begin before one block has left its choice: the first of those with
  // fewest tiles. The last ones find room only when the router's blocks have left.
  const int blocks = static_cast<int>(gridDim.x), late = blocks - static_cast<int>(a.experts) / kTileRows;
  const bool leaves_choice = !kDown && static_cast<int>(blockIdx.x) == static_cast<int>(a.per_token * (a.size / 4)) % blocks;
  if constexpr (kDown) {
    LaunchDependents();
    TakeChoice(a, first_row, rows, chosen);
    way.Start(a, chosen, first_row, rows);
  } else {
    // Once on whatever is there, before it counts, where there is time: its instructions have come then.
#pragma unroll 1
    for (int pass = static_cast<int>(blockIdx.x) < late ? 0 : 1; pass < 2; ++pass) {
      if (pass == 1) {
        WaitForPredecessors();
        if (!leaves_choice) LaunchDependents();
      }
      Choose<kBFloat16>(a, first_row, rows, reinterpret_cast<uint32_t*>(shared), chosen);
      if (pass == 1 && leaves_choice && warp == warps - 1) LeaveChoice(a, first_row, rows, chosen);
      way.Start(a, chosen, first_row, rows);
      if (pass == 0) __syncthreads();
    }
  }

  // Lanes of rows that do not exist read the last one; nobody takes what comes out for them.
  const int x_place = kStageBytes + min(lane % 8, rows - 1) * kExpertPitch + MatrixOfX(lane) * 16;
  ptx::Shared copied = ring, read = ring;  // the next stage of each
  const auto behind = [&](ptx::Shared stage) { return stage + stage_bytes == ring_end ? ring : stage + stage_bytes; };
  auto at = way.first;
  int tile = way.first_tile, turn = 0;
  float sum[4][4] = {}, total[2] = {0, 0};
  // The ring is filled first, by the second product with weights alone: its x is not there yet.
#pragma unroll 1
  for (int step = 1 - kStages; step <= 0 || tile < way.tiles; ++step) {
    if (step >= 0) {
      if (step == 0) {
        if constexpr (kDown) {
          Share<kBFloat16>(a, first_row, rows, chosen);
          __syncthreads();
        }
        if (tile >= way.tiles) break;
      }
      if (kDown && step == 0) {
        WaitForPredecessors();
        way.CopyFirstX(a, chosen, first_row, rows, kStages - 1, read, stage_bytes, ring_end, kStages * stage_bytes);
#pragma unroll
        for (int i = 0; i < kStages - 2; ++i) ptx::CopyCommit();
      }
      ptx::CopyWait<kStages - 2>();
      __syncwarp();
    }
    way.Copy(a, chosen, first_row, rows, !kDown || step >= 0, copied);  // into the stage that all lanes have left
    copied = behind(copied);
    ptx::CopyCommit();
    if (step < 0) continue;
    MultiplyStage<kBFloat16, kWhole>(read + ReadPlace(lane), read + x_place, kUnit, way.columns - at.unit, sum);
    read = behind(read);
    const int expert = at.expert;
    const bool ends_tile = at.left == 1;
    if (!way.GoOn(at)) continue;
    const float2 all = SumOf(sum);
#pragma unroll
    for (int k = 0; k < 16; ++k) sum[k / 4][k % 4] = 0;
    if constexpr (kDown) {
      if (const float share = chosen.share[expert][g]; chosen.place[expert][g] >= 0) {
        total[0] = fmaf(share, all.x, total[0]), total[1] = fmaf(share, all.y, total[1]);
      }
      if (!ends_tile) continue;
    } else {
      total[0] = all.x, total[1] = all.y;
    }
    float* tile_sums = sums + (turn % 2 * warps + way.group * way.members) * rows * kTileRows;
    if (g < rows) {
      *reinterpret_cast<float2*>(tile_sums + (way.member * rows + g) * kTileRows + 2 * t) = make_float2(total[0], total[1]);
    }
    SyncGroup(way.group, way.members);  // and the sums of the tile before last are free
    // One warp finishes the tile while the others go on.
    if (way.member == turn % way.members && g < rows) {
      float first = 0, second = 0;
#pragma unroll 4
      for (int w = 0; w < way.members; ++w) {
        first += tile_sums[(w * rows + g) * kTileRows + t];
        second += tile_sums[(w * rows + g) * kTileRows + t + 4];
      }
      EndTile<kBFloat16, kDown, kWhole>(a, chosen, way, first_row, tile, first, second);
    }
    total[0] = total[1] = 0;
    tile += way.tile_step, ++turn;
  }
}

// The same for any sizes and rows: a row of x a blockIdx.y, a warp an element of what comes out.
template <bool kBFloat16, bool kDown>
__global__ void __launch_bounds__(256) AnyExpertsKernel(const __grid_constant__ ExpertsArgs a) {
  __shared__ ChosenExperts chosen;
  __shared__ __align__(16) uint32_t room[ChoiceBytes(1, kMostExperts, kMostPerToken) / 4];
  if constexpr (!kDown) WaitForPredecessors();
  LaunchDependents();
  const int64_t row = blockIdx.y;
  Choose<kBFloat16>(a, row, 1, room, chosen);
  if constexpr (kDown) {
    Share<kBFloat16>(a, row, 1, chosen);
    __syncthreads();
  }
  if (!kDown && blockIdx.x == 0) Report(a, chosen, 1, threadIdx.x, blockDim.x);
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
