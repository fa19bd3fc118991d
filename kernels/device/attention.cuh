// Fused decode attention: one query a sequence over sinks, encoded tokens and residual, in one launch that reads
// codes as they are stored (kernels/code_row.h). What it takes: kernels/device/attention.h.
//
// Limit: the bytes of the cache, each read once, over memory bandwidth. How it gets there:
//
// - A scale never touches an element. With codes c, scale s and zero z of a token's group, a logit is the sum over
//   groups of s (sum q c - z sum q): s and z meet one number a group and head. An output is the sum over tokens
//   of (p s) c, less the sum of p s z, one number a group: s and z meet the probability p.
// - A code becomes an operand by one `and`: a field of up to 8 bits at the bottom of 10 is a subnormal float16,
//   field * 2^-24, which tensor cores multiply in full; a field `o` bits higher has 2^o times that, which q
//   (keys) or the finished output (values) takes back, exactly. No offset is ever added or subtracted.
// - Queries become float16 times a power of two that puts the largest of a head into [2^14, 2^15): exact for
//   float16, and for bfloat16 (8 bits) whatever its range, except below 2^-28 of that largest, where the
//   error is 2^-39 of it: far below the rounding of the float32 sum.
// - p s is float16, relative to a running reference 2^m, kept such that the largest p s so far is in
//   (2^0, 2^15): m moves only when that overflows, seldom, and not at every tile. What is below 2^-24 is
//   lost: for a million such tokens 2^-12 of the sum. Sums are float32.
// - Warps share nothing while they stream: each has a ring of tiles in shared memory, filled by its own cp.async,
//   16 bytes a lane, in a swizzle that keeps its reads free of bank conflicts.
// - The tokens of a KV head are split among blocks by the lengths in device memory, in a grid sized by the
//   capacity alone, so that a captured graph serves every step; the last block to finish combines.
//
// The query heads of a KV head are rows of one product, eight (kHeadTiles = 1) or sixteen: they share every load.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/device/attention.h"
#include "kernels/device/attention_tiles.cuh"
#include "kernels/groups.h"

#ifdef __CUDACC__
namespace kvq::decode_attention {

// Where the kernel keeps what blocks tell each other, per KV head of a sequence ("pair"): a counter of blocks
// that have finished; then per slot and query head m and the sum l of 2^(logit - m); then sums of 2^(logit - m) v.
// A slot is what a block leaves.
struct Workspace {
  int* counters;
  float2* sums;   // [pair, slot, head]
  float* outputs; // [pair, slot, head, head_dim]
  int64_t bytes;
};
__host__ __device__ inline Workspace LayOut(void* base, int64_t pairs, int64_t slots, int64_t heads,
                                            int64_t head_dim) {
  const auto up = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  const int64_t counters = up(pairs * 4), sums = up(pairs * slots * heads * 8);
  char* at = static_cast<char*>(base);
  return {reinterpret_cast<int*>(at), reinterpret_cast<float2*>(at + counters),
          reinterpret_cast<float*>(at + counters + sums),
          counters + sums + pairs * slots * heads * head_dim * 4};
}

// Sixteen tokens of sinks or residual, straight from device memory: what lane 4 g + t of a warp needs of them.
template <class C>
struct DenseTokens {
  uint4 keys[2][C::kDim / 32], values[4][C::kDim / 64];  // as AttendDense wants them
  int valid;

  __device__ __forceinline__ static int Units(const SequenceLength& length) {
    return (length.sinks + 15) / 16 + (length.residual + 15) / 16;
  }
  __device__ __forceinline__ void Load(const DecodeAttentionArgs& args, int pair, const SequenceLength& length, int unit,
                                       int g, int t) {
    const int b = pair / static_cast<int>(args.keys.heads), h = pair % static_cast<int>(args.keys.heads);
    const int sink_units = (length.sinks + 15) / 16;
    const bool sinks = unit < sink_units;
    const DenseView& key_view = sinks ? args.sink_keys : args.residual_keys;
    const DenseView& value_view = sinks ? args.sink_values : args.residual_values;
    const int first = (sinks ? unit : unit - sink_units) * 16;
    valid = (sinks ? length.sinks : length.residual) - first;
    // Past the last token, that one again: its weight will be 0.
    const int last = min(valid, 16) - 1;
    const auto row = [&](const DenseView& view, int token) {
      return reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(view.data) +
                                            Offset(view, b, h, first + min(token, last), 0));
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4* granules = row(key_view, g + 8 * i) + t;
#pragma unroll
      for (int j = 0; j < C::kDim / 32; ++j) keys[i][j] = __ldcg(granules + 4 * j);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4* granules = row(value_view, 2 * t + i % 2 + i / 2 * 8) + g;
#pragma unroll
      for (int j = 0; j < C::kDim / 64; ++j) values[i][j] = __ldcg(granules + 8 * j);
    }
  }
  template <bool kBFloat16>
  __device__ __forceinline__ void Attend(int g, const Queries<C>& q, Partial<C>& partial) const {
    AttendDense<C, kBFloat16>(
        valid, g, q, partial, [&](int i, int j) { return keys[i][j]; },
        [&](int i, int j) { return values[i % 2 + i / 8 * 2][j]; });
  }
};

// ---- the ring of tiles of one warp, whose lanes copy every 32nd granule

template <class C>
struct Ring {
  static constexpr int kRowCopies = (C::kTile * C::kGranules + 31) / 32;  // a lane, of keys or values
  static constexpr int kMetaGranules = C::kDense ? 1 : C::kTile * C::kMeta / 16;      // of one plane
  static constexpr int kMetaCopies = C::kDense ? 0 : (4 * kMetaGranules + 31) / 32;  // a lane, of all four

  static constexpr int kTokensOfGranule = C::kDense ? 1 : 16 / C::kMeta;  // of meta

  ptx::Shared tiles;         // [kStages, kTileBytes]
  ptx::Shared lane_place;    // of the lane's first granule in a tile's rows
  const std::byte* keys;     // the lane's first granule of the tile that is fetched next
  const std::byte* values;
  const std::byte* meta[kMetaCopies > 0 ? kMetaCopies : 1];
  int first;   // of the warp's tiles
  int next;    // that tile
  int end;     // behind the block's last tile
  int tokens;  // encoded ones of this sequence

  // Of the tiles of all `tokens`, the equal share of a block, and of that every kWarps-th for this warp.
  __device__ __forceinline__ Ring(const DecodeAttentionArgs& args, int pair, int tokens, int split, int splits,
                                  ptx::Shared tiles)
      : tiles(tiles), tokens(tokens) {
    const int all = (tokens + C::kTile - 1) / C::kTile;
    const auto cut = [&](int i) { return static_cast<int>(static_cast<int64_t>(all) * i / splits); };
    first = next = cut(split) + static_cast<int>(threadIdx.x) / 32, end = cut(split + 1);
    const int lane = threadIdx.x % 32, row = lane / C::kGranules;
    lane_place = row * C::kRow + (lane % C::kGranules ^ C::SwizzleOf(row)) * 16;
    const auto at = [&](const KvView& view, int plane, int token_bytes) {
      return view.planes[plane] + pair * view.plane_stride[plane] +
             static_cast<int64_t>(first) * (C::kTile * token_bytes);
    };
    keys = at(args.keys, 0, C::kRow) + lane * 16;
    values = at(args.values, 0, C::kRow) + lane * 16;
#pragma unroll
    for (int i = 0; i < kMetaCopies; ++i) {
      const int n = lane + 32 * i, plane = n / kMetaGranules;
      meta[i] = at(plane < 2 ? args.keys : args.values, 1 + plane % 2, C::kMeta) + n % kMetaGranules * 16;
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void CopyTile(ptx::Shared to) const {
    const int lane = threadIdx.x % 32, left = tokens - next * C::kTile;
    const auto copy = [&](ptx::Shared shared, const std::byte* global, int token) {
      if constexpr (kWhole) {
        ptx::CopyAsync(shared, global);
      } else {
        ptx::CopyAsyncOrZero(shared, global, token < left);
      }
    };
    // The lane's granule i is 32 / kGranules rows on.
#pragma unroll
    for (int i = 0; i < kRowCopies; ++i) {
      if (C::kTile * C::kGranules % 32 != 0 && lane + 32 * i >= C::kTile * C::kGranules) continue;
      const ptx::Shared place = to + (lane_place ^ C::SwizzleOf(32 * i / C::kGranules) * 16) + 512 * i;
      const int token = (lane + 32 * i) / C::kGranules;
      copy(place, keys + 512 * i, token);
      copy(place + C::kTile * C::kRow, values + 512 * i, token);
    }
#pragma unroll
    for (int i = 0; i < kMetaCopies; ++i) {
      const int n = lane + 32 * i;
      if (4 * kMetaGranules % 32 != 0 && n >= 4 * kMetaGranules) continue;
      copy(to + 2 * C::kTile * C::kRow + n * 16, meta[i], n % kMetaGranules * kTokensOfGranule);
    }
  }

  // Begins to copy the next tile; an empty group where there is none.
  __device__ __forceinline__ void Fetch(int stage) {
    if (next < end) {
      if ((next + 1) * C::kTile <= tokens) {
        CopyTile<true>(tiles + stage * C::kTileBytes);
      } else {
        CopyTile<false>(tiles + stage * C::kTileBytes);
      }
      next += C::kWarps;
      keys += C::kWarps * C::kTile * C::kRow;
      values += C::kWarps * C::kTile * C::kRow;
#pragma unroll
      for (int i = 0; i < kMetaCopies; ++i) meta[i] += C::kWarps * C::kTile * C::kMeta;
    }
    ptx::CopyCommit();
  }

  // Begins to copy as many tiles as the ring takes but one.
  __device__ __forceinline__ void Start() {
#pragma unroll
    for (int stage = 0; stage < C::kStages - 1; ++stage) Fetch(stage);
  }

  // Whether what Start copies is all older than the newest token.
  __device__ __forceinline__ bool StartsOld() const {
    return (next + (C::kStages - 2) * C::kWarps + 1) * C::kTile < tokens;
  }

  // After Start: calls attend(tile, tokens in it) for tiles first, first + kWarps, ... below end.
  template <typename Attend>
  __device__ __forceinline__ void Stream(const Attend& attend) {
    ptx::Shared tile = tiles;
    int free = C::kStages - 1;
#pragma unroll 1
    for (int index = first; index < end; index += C::kWarps) {
      ptx::CopyWait<C::kStages - 2>();
      __syncwarp();  // all lanes' copies have arrived, and all lanes are done with the tile before
      Fetch(free);
      attend(tile, min(tokens - index * C::kTile, C::kTile));
      free = free + 1 == C::kStages ? 0 : free + 1;
      tile = tile + C::kTileBytes == tiles + C::kStages * C::kTileBytes ? tiles : tile + C::kTileBytes;
    }
    ptx::CopyWait<0>();
  }
};

// ---- the end: warps of a block, then blocks

// Adds up the block's warps, with one reference for each head, into a slot of the workspace. `dense` is what a warp
// has of dense tokens beside those of codes, where `has_dense`.
template <class C>
__device__ void Merge(const Partial<C>& partial, bool has_dense, const Partial<C>& dense, int ratio, std::byte* shared,
                      float2* slot_sums, float* slot_outputs) {
  constexpr bool kCodes = !C::kDense;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  float* outputs = reinterpret_cast<float*>(shared);  // [warp, head, kHeadStride]
  float2* sums = reinterpret_cast<float2*>(outputs + C::kWarps * C::kHeads * C::kHeadStride);  // [warp, head]
  __syncthreads();  // the rings are done with
  const auto over_rows = [](float x) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
  };
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 8 * ht + 2 * t + i;
      float* of_head = outputs + (warp * C::kHeads + head) * C::kHeadStride;
      float m = partial.m[ht][i], l = over_rows(partial.l[ht][i]), factor = 1, dense_factor = 0;
      if (has_dense) {
        m = fmaxf(m, dense.m[ht][i]);
        factor = ptx::Exp2(partial.m[ht][i] - m), dense_factor = ptx::Exp2(dense.m[ht][i] - m);
        l = fmaf(l, factor, over_rows(dense.l[ht][i]) * dense_factor);
      }
      if (g == 0) sums[warp * C::kHeads + head] = {m, l};
      float zero[C::kGroups];
#pragma unroll
      for (int group = 0; kCodes && group < C::kGroups; ++group) zero[group] = over_rows(partial.zero[ht][i][group]);
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x = partial.o[ht][step][2 * half + i];
          int channel = step / 4 * 64 + 8 * g + step % 4 * 2 + half;
          if constexpr (kCodes) {
            const float shift = 1 << C::FieldShift(2 * (step % C::kWordSteps) + half);
            x = fmaf(x, 16777216.0f / shift, -zero[step * 16 / C::kGroup]);
            channel = 16 * step + 8 * half + g;
          }
          if (head < ratio) of_head[channel] = x * factor;
        }
      }
      if (!kCodes || !has_dense) continue;
      __syncwarp();  // dense tokens have other channels in a lane
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel = step / 4 * 64 + 8 * g + step % 4 * 2 + half;
          if (head < ratio) of_head[channel] = fmaf(dense.o[ht][step][2 * half + i], dense_factor, of_head[channel]);
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ratio * (C::kDim / 4); i += C::kThreads) {
    const int head = i / (C::kDim / 4), channel = i % (C::kDim / 4) * 4;
    float m = kNoReference, l = 0;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) m = fmaxf(m, sums[w * C::kHeads + head].x);
    float4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      const float2 of = sums[w * C::kHeads + head];
      const float factor = ptx::Exp2(of.x - m);
      const float4 x =
          *reinterpret_cast<const float4*>(outputs + (w * C::kHeads + head) * C::kHeadStride + channel);
      l = fmaf(factor, of.y, l);
      sum.x = fmaf(factor, x.x, sum.x), sum.y = fmaf(factor, x.y, sum.y);
      sum.z = fmaf(factor, x.z, sum.z), sum.w = fmaf(factor, x.w, sum.w);
    }
    *reinterpret_cast<float4*>(slot_outputs + head * C::kDim + channel) = sum;
    if (channel == 0) slot_sums[head] = {m, l};
  }
  __syncthreads();  // before the memory is used again
}

constexpr int kMostSplits = 128;

// The last block of a pair: the sum over all slots, divided by the sum of weights. Everything is read by as many
// loads at a time as registers hold: here latency is all there is.
template <class C>
__device__ void Combine(const DecodeAttentionArgs& args, int pair, int slots, int ratio, std::byte* shared,
                        const float2* sums, const float* outputs) {
  constexpr int kBatch = 18;
  constexpr int kMostSlots = (kMostSplits + 31) / 32 * 32;
  float* weights = reinterpret_cast<float*>(shared);  // [head, slot]
  float4* shares = reinterpret_cast<float4*>(shared + (ratio * slots * 4 + 15) / 16 * 16);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Four channels of a head a thread; where there are threads to spare, they share the slots among them.
  const int columns = ratio * (C::kDim / 4), parts = max(C::kThreads / columns, 1);
  const int part = threadIdx.x / min(columns, C::kThreads);
  for (int first = 0; first < columns; first += C::kThreads) {
    const int column = first + static_cast<int>(threadIdx.x) % min(columns, C::kThreads);
    const bool works = column < columns && part < parts;
    float4 sum = {0, 0, 0, 0};
    for (int start = part; start - part < slots; start += kBatch * parts) {
      float4 x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (works && start + i * parts < slots) {
          x[i] = __ldcg(reinterpret_cast<const float4*>(outputs) + (start + i * parts) * columns + column);
        }
      }
      if (first == 0 && start == part) {
        for (int head = warp; head < ratio; head += C::kWarps) {
          float2 of[kMostSlots / 32];
          float m = kNoReference, l = 0;
#pragma unroll
          for (int i = 0; i < kMostSlots / 32; ++i) {
            const int slot = lane + 32 * i;
            of[i] = slot < slots ? __ldcg(&sums[slot * ratio + head]) : float2{kNoReference, 0};
          }
#pragma unroll
          for (int i = 0; i < kMostSlots / 32; ++i) m = fmaxf(m, of[i].x);
          for (int i = 16; i > 0; i /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
#pragma unroll
          for (int i = 0; i < kMostSlots / 32; ++i) {
            of[i].x = ptx::Exp2(of[i].x - m);
            l = fmaf(of[i].x, of[i].y, l);
          }
          for (int i = 16; i > 0; i /= 2) l += __shfl_xor_sync(~0u, l, i);
          const float scale = l == 0 ? 0 : 1 / l;
#pragma unroll
          for (int i = 0; i < kMostSlots / 32; ++i) {
            if (lane + 32 * i < slots) weights[head * slots + lane + 32 * i] = of[i].x * scale;
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (works && start + i * parts < slots) {
          const float weight = weights[column / (C::kDim / 4) * slots + start + i * parts];
          sum.x = fmaf(weight, x[i].x, sum.x), sum.y = fmaf(weight, x[i].y, sum.y);
          sum.z = fmaf(weight, x[i].z, sum.z), sum.w = fmaf(weight, x[i].w, sum.w);
        }
      }
    }
    if (parts > 1) {
      shares[threadIdx.x] = sum;
      __syncthreads();
      for (int other = 1; part == 0 && other < parts; ++other) {
        const float4 x = shares[other * columns + column];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
    }
    if (works && part == 0) {
      const bool half = args.dtype == DType::kFloat16;
      const uint2 packed = {half ? ptx::PackHalf(sum.x, sum.y) : ptx::PackBFloat16(sum.x, sum.y),
                            half ? ptx::PackHalf(sum.z, sum.w) : ptx::PackBFloat16(sum.z, sum.w)};
      static_cast<uint2*>(args.out)[static_cast<int64_t>(pair) * columns + column] = packed;
    }
  }
}

template <class C>
__global__ void __maxnreg__(C::kRegisters)
    Kernel(const __grid_constant__ DecodeAttentionArgs args, int splits) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ bool last;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int pair = blockIdx.x / splits, split = blockIdx.x % splits;
  const int heads = static_cast<int>(args.keys.heads), ratio = static_cast<int>(args.query_heads) / heads;
  const Workspace workspace = LayOut(args.workspace, args.keys.batch * heads, splits, ratio, C::kDim);
  float2* sums = workspace.sums + (static_cast<int64_t>(pair) * splits + split) * ratio;
  float* outputs = workspace.outputs + (static_cast<int64_t>(pair) * splits + split) * ratio * C::kDim;
  const SequenceLength* lengths = args.lengths + pair / heads;
  const auto ring_of = [&](int tokens) {
    return Ring<C>(args, pair, tokens, split, splits, ptx::SharedAddress(shared) + warp * C::kStages * C::kTileBytes);
  };
  const auto length_now = [&] {
    return SequenceLength{__ldcg(&lengths->sinks), __ldcg(&lengths->encoded), __ldcg(&lengths->residual)};
  };
  LaunchDependents();
  if (!args.early) WaitForPredecessors();
  SequenceLength length = length_now();
  Ring<C> ring = ring_of(length.encoded);
  bool started = !C::kDense || ring.StartsOld();
  if (started) ring.Start();
  if (args.early) WaitForPredecessors();
  Queries<C> q;
  if constexpr (C::kDense) {
    LoadQueriesForDense<C>(args, pair, g, t, q);
  } else {
    LoadQueries<C>(args, pair, g, t, q);
  }
  // The warps' sixteens of dense tokens are dealt to all blocks in turn, the last warps first, which may have a tile
  // less.
  int unit = split + (C::kWarps - 1 - warp) * splits;
  DenseTokens<C> tokens;
  Queries<C> dense_q;
  const auto load_dense = [&] {
    if (unit < DenseTokens<C>::Units(length)) tokens.Load(args, pair, length, unit, g, t);
  };
  load_dense();
  if (const SequenceLength now = length_now();
      now.sinks != length.sinks || now.encoded != length.encoded || now.residual != length.residual) {
    length = now;  // a step began after we looked
    ptx::CopyWait<0>();
    ring = ring_of(length.encoded), started = false;
    load_dense();
  }
  const int units = DenseTokens<C>::Units(length);
  const bool has_dense = unit < units;
  if (has_dense) LoadQueriesForDense<C>(args, pair, g, t, dense_q);
  if (!started) ring.Start();  // all that comes from memory is on its way before any of it is worked on

  if (ring.first - warp < ring.end || split < units) {
    Partial<C> partial, dense;
    while (unit < units) {
      Partial<C>& of = C::kDense ? partial : dense;
      if (args.dtype == DType::kBFloat16) {
        tokens.template Attend<true>(g, dense_q, of);
      } else {
        tokens.template Attend<false>(g, dense_q, of);
      }
      unit += C::kWarps * splits;
      if (unit < units) tokens.Load(args, pair, length, unit, g, t);
    }
    if constexpr (C::kDense) {
      const auto attend = [&](auto bfloat16, ptx::Shared tile, int valid) {
        const ptx::Shared keys = tile + g * C::kRow + (t ^ C::SwizzleOf(g)) * 16;
        const ptx::Shared values = tile + (C::kTile + 2 * t) * C::kRow + (g ^ C::SwizzleOf(2 * t)) * 16;
        const auto load = [](ptx::Shared at) {
          uint32_t words[4];
          ptx::LoadShared(at, words);
          return uint4{words[0], words[1], words[2], words[3]};
        };
        AttendDense<C, decltype(bfloat16)::value>(
            valid, g, q, partial, [&](int i, int j) { return load((keys ^ j % 2 * 64) + j / 2 * 128 + 8 * i * C::kRow); },
            [&](int i, int j) { return load((values ^ C::SwizzleOf(i % 2) * 16) + i * C::kRow + 128 * j); });
      };
      if (args.dtype == DType::kBFloat16) {
        ring.Stream([&](ptx::Shared tile, int valid) { attend(std::true_type(), tile, valid); });
      } else {
        ring.Stream([&](ptx::Shared tile, int valid) { attend(std::false_type(), tile, valid); });
      }
    } else {
      PrepareQueries<C>(args, t, q);
      ring.Stream([&](ptx::Shared tile, int valid) {
        AttendCodes<C>(tile, valid, g, t, q, partial);
      });
    }
    Merge<C>(partial, !C::kDense && has_dense, dense, ratio, shared, sums, outputs);
  } else {  // no tokens: the weight 0, and so outputs that are numbers
    if (threadIdx.x < ratio) sums[threadIdx.x] = {kNoReference, 0};
    for (int i = threadIdx.x; i < ratio * C::kDim; i += C::kThreads) outputs[i] = 0;
  }

  // The block that finishes last for this pair finds all slots written.
  __syncthreads();
  if (threadIdx.x == 0) {
    last = ptx::AddInOrder(&workspace.counters[pair], 1) == splits - 1;
    if (last) workspace.counters[pair] = 0;
  }
  __syncthreads();
  if (last) {
    Combine<C>(args, pair, splits, ratio, shared, sums - split * ratio, outputs - static_cast<int64_t>(split) * ratio * C::kDim);
  }
}

// ---- host

// Blocks for each KV head of a sequence: as few rounds of the whole GPU as possible, and no more than the tokens
// can feed. A round costs what starting, ending and combining take, about 4 us on an H200, besides its bytes.
template <class C>
int Splits(const DecodeAttentionArgs& args) {
  const double multiprocessors = CurrentDevice().multiprocessors;
  const double pairs = static_cast<double>(args.keys.batch * args.keys.heads);
  const int64_t tiles = args.keys.capacity / C::kTile + 1;
  const double round = 4e-6 * 4.6e12 / multiprocessors / C::kTileBytes;  // in tiles at the memory's rate
  const int most = static_cast<int>(std::clamp<int64_t>(tiles / C::kWarps, 1, kMostSplits));
  int best = 1;
  double least = 1e30;
  for (int splits = 1; splits <= most; ++splits) {
    const double rounds = std::ceil(pairs * splits / multiprocessors);
    const double cost = rounds * (static_cast<double>(tiles) / splits + round);
    if (cost < least * 0.999) best = splits, least = cost;
  }
  return best;
}

template <class C>
void Launch(const DecodeAttentionArgs& args, void* stream) {
  static const cudaError_t allowed = cudaFuncSetAttribute(
      Kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  Check(allowed, "shared memory of decode attention");
  const int splits = Splits<C>(args);
  const int64_t blocks = args.keys.batch * args.keys.heads * splits;
  if (blocks == 0) return;
  LaunchEarly("decode attention", Kernel<C>, dim3(static_cast<unsigned>(blocks)), C::kThreads, C::kSharedBytes, stream,
              args, splits);
}

// Calls work(Config<...>()) for the shape, or throws.
template <int kBits, typename Work>
void WithConfig(const DecodeAttentionArgs& args, const Work& work) {
  const KvView& keys = args.keys;
  const auto group = [&](auto dim, auto tiles) {
    if constexpr (kBits == 16) {
      work(Config<16, 0, dim(), tiles()>());
    } else {
      if (args.key_params.group_size != args.value_params.group_size) {
        throw InputError("decode attention wants one group size for keys and values");
      }
      WithGroup(args.key_params.group_size, [&](auto size) {
        if constexpr (size() <= dim()) {
          work(Config<kBits, size(), dim(), tiles()>());
        } else {
          throw InputError("decode attention: a group of ", size(), " in a head_dim of ", dim());
        }
      });
    }
  };
  const auto tiles = [&](auto dim) {
    const int64_t ratio = keys.heads > 0 ? args.query_heads / keys.heads : 1;
    if (ratio < 1 || ratio > 16 || args.query_heads % keys.heads != 0) {
      throw InputError("decode attention wants 1 to 16 query heads a KV head, not ", args.query_heads, " for ",
                       keys.heads);
    }
    if (ratio <= 8) return group(dim, std::integral_constant<int, 1>());
    group(dim, std::integral_constant<int, 2>());
  };
  switch (keys.head_dim) {
    case 64: return tiles(std::integral_constant<int, 64>());
    case 128: return tiles(std::integral_constant<int, 128>());
    case 256: return tiles(std::integral_constant<int, 256>());
    default: throw InputError("decode attention knows a head_dim of 64, 128 and 256, not ", keys.head_dim);
  }
}

template <int kBits>
void CheckArgs(const DecodeAttentionArgs& args) {
  if (args.dtype == DType::kFloat32) throw InputError("decode attention wants float16 or bfloat16");
  const auto aligned = [](const void* p, int64_t bytes) { return (reinterpret_cast<uintptr_t>(p) | bytes) % 16 == 0; };
  bool all = aligned(args.queries, 0) && aligned(args.out, 0) && aligned(args.workspace, 0);
  for (const KvView* view : {&args.keys, &args.values}) {
    for (int p = 0; p < (kBits == 16 ? 1 : 3); ++p) all &= aligned(view->planes[p], view->plane_stride[p]);
  }
  for (const DenseView* view : {&args.sink_keys, &args.sink_values, &args.residual_keys, &args.residual_values}) {
    all &= aligned(view->data, (view->batch_stride | view->head_stride | view->token_stride) * 2);
  }
  if (!all) throw InputError("decode attention wants all rows and planes aligned to 16 bytes");
}

// The row's entry for codes of so many bits; 16: for none.
template <int kBits>
DecodeAttention Make(const char* name) {
  DecodeAttention attention;
  attention.name = name;
  attention.workspace_bytes = [](const DecodeAttentionArgs& args) {
    int64_t bytes = 0;
    WithConfig<kBits>(args, [&](auto config) {
      using C = decltype(config);
      const int64_t pairs = args.keys.batch * args.keys.heads;
      if (pairs > 0) bytes = LayOut(nullptr, pairs, Splits<C>(args), args.query_heads / args.keys.heads, C::kDim).bytes;
    });
    return bytes;
  };
  attention.run = [](const DecodeAttentionArgs& args, void* stream) {
    CheckArgs<kBits>(args);
    WithConfig<kBits>(args, [&](auto config) { Launch<decltype(config)>(args, stream); });
  };
  return attention;
}

}  // namespace kvq::decode_attention
#endif  // __CUDACC__
