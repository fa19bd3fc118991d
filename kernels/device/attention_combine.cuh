// The end of decode attention (attention.cuh, attention_any.cuh): the warps of a block add up what they have, then the blocks of a
// KV head, by slots in device memory or within a cluster.
#pragma once

#include "kernels/device/attention.h"
#include "kernels/vector_math.h"
#ifdef __CUDACC__
#include "kernels/device/attention_tiles.cuh"
#endif

namespace kvq::decode_attention {

inline constexpr int kMostSplits = 128, kMostCluster = 8;
inline constexpr uint32_t kBrokenBits = 0x80808080;  // of a codec's Broken

// Where the kernel keeps what blocks tell each other, per KV head of a sequence ("pair"): a counter of blocks
// that have finished, where one of them combines; then per slot and query head m and the sum l of 2^(logit - m); then sums of 2^(logit - m) v.
// A slot is what a block leaves. Until then, and again when it has been taken, it is zero, all of its bits: no number that is
// left is that (Leave), so each says itself whether it has come, and to wait for one takes no more than to read it.
struct Workspace {
  int* counters;
  void* sums;      // float2 [pair, slot, head]
  float* outputs;  // [pair, slot, head, head_dim]
  int64_t bytes;
};
KVQ_HD inline Workspace LayOut(void* base, int64_t pairs, int64_t slots, int64_t heads,
                                            int64_t head_dim) {
  const auto up = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  const int64_t counters = up(pairs * 4), sums = up(pairs * slots * heads * 8);
  char* at = static_cast<char*>(base);
  return {reinterpret_cast<int*>(at), at + counters, reinterpret_cast<float*>(at + counters + sums),
          counters + sums + pairs * slots * heads * head_dim * 4};
}

#ifdef __CUDACC__

// What a block leaves: in its slot, or, of a cluster, in its shared memory. Worked out when it is wanted: before, its instructions would
// come ahead of what has to begin early.
struct Slot {
  float2* sums;
  float* outputs;
};
template <class C>
__device__ __forceinline__ Slot SlotOf(const DecodeAttentionArgs& args, int splits, int ratio, std::byte* shared) {
  if constexpr (C::kCluster > 1) return {reinterpret_cast<float2*>(shared + C::kBlockSumsAt), reinterpret_cast<float*>(shared)};
  const Workspace workspace = LayOut(args.workspace, gridDim.x / splits, splits, ratio, C::kDim);
  const int64_t heads = static_cast<int64_t>(ptx::BlockNumber()) * ratio;  // before the block's
  return {static_cast<float2*>(workspace.sums) + heads, workspace.outputs + heads * C::kDim};
}

// Into a slot.
__device__ __forceinline__ float NotZero(float x) { return __float_as_uint(x) == 0 ? -0.0f : x; }
__device__ __forceinline__ void Leave(float4* to, const float4& x) { ptx::StoreSeen(to, {NotZero(x.x), NotZero(x.y), NotZero(x.z), NotZero(x.w)}); }
__device__ __forceinline__ void Leave(float2* to, const float2& x) { ptx::StoreSeen(to, {NotZero(x.x), NotZero(x.y)}); }
// The smallest of some numbers' bits: 0 where one has not come.
__device__ __forceinline__ uint32_t LeastBits(const float2& x) { return min(__float_as_uint(x.x), __float_as_uint(x.y)); }
__device__ __forceinline__ uint32_t LeastBits(const float4& x) {
  return min(LeastBits(make_float2(x.x, x.y)), LeastBits(make_float2(x.z, x.w)));
}

// A warp's sums of dense tokens in shared memory, [head, channel].
template <class C>
__device__ __forceinline__ float* ShelfOf(std::byte* shared, int warp) {
  return reinterpret_cast<float*>(shared + C::kShelfAt) + warp * C::kHeads * C::kDim;
}
template <class C, typename Put>
__device__ __forceinline__ void ForDenseSums(const Partial<C>& dense, int ht, int i, int g, const Put& put) {
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) put(step / 4 * 64 + 8 * g + step % 4 * 2 + half, dense.o[ht][step][2 * half + i]);
  }
}
template <class C>
__device__ __forceinline__ void Shelve(const Partial<C>& dense, float* shelf, int g, int t) {
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ForDenseSums<C>(dense, ht, i, g, [&](int channel, float x) { shelf[(8 * ht + 2 * t + i) * C::kDim + channel] = x; });
    }
  }
  __syncwarp();
}

// Adds up the block's warps, with one reference for each head, into a slot of the workspace; or of a cluster, into the block's
// own shared memory: the first warp's rows and sums behind all warps'. `dense` is what a warp has of dense tokens beside those of
// codes, where `has_dense`.
template <class C>
__device__ void Merge(const Partial<C>& partial, int warp, bool has_dense, const Partial<C>& dense, int ratio, std::byte* shared,
                      const Slot& slot) {
  constexpr bool kCodes = !C::V::kDense;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* outputs = reinterpret_cast<float*>(shared);  // [warp, head, kHeadStride]
  float2* sums = reinterpret_cast<float2*>(shared + C::kSumsAt);  // [warp, head]
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
      if constexpr (C::K::kMayBreak || C::V::kMayBreak) {
        if (__any_sync(~0u, (partial.broken & kBrokenBits) != 0)) l = BitsFloat(0x7FC00000);
      }
      if (g == 0) sums[warp * C::kHeads + head] = {m, l};
      constexpr bool kZeros = kCodes && !C::V::kCentred;
      float zero[C::V::kGroups];
#pragma unroll
      for (int group = 0; kZeros && group < C::V::kGroups; ++group) zero[group] = over_rows(partial.zero[ht][i][group]);
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x = partial.o[ht][step][2 * half + i];
          int channel = step / 4 * 64 + 8 * g + step % 4 * 2 + half;
          if constexpr (kCodes) {
            const float shift = 1 << C::V::FieldShift(2 * (step % C::V::kWordSteps) + half);
            if constexpr (kZeros) x = fmaf(x, C::V::kUnit / shift, -zero[step * 16 / C::V::kGroup]);
            else x *= C::V::kUnit / shift;
            channel = 16 * step + 8 * half + g;
          }
          if (head < ratio) of_head[channel] = x * factor;
        }
      }
      if (!kCodes || !has_dense) continue;
      __syncwarp();  // dense tokens have other channels in a lane
      const auto add = [&](int channel, float of_dense) {
        if (head < ratio) of_head[channel] = fmaf(of_dense, dense_factor, of_head[channel]);
      };
      if constexpr (C::kShelf) {
        const float* shelf = ShelfOf<C>(shared, warp) + head * C::kDim;
        for (int channel = g; channel < C::kDim; channel += 8) add(channel, shelf[channel]);
      } else {
        ForDenseSums<C>(dense, ht, i, g, add);
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
    auto* const to = reinterpret_cast<float4*>(slot.outputs + head * (C::kCluster > 1 ? C::kHeadStride : C::kDim) + channel);
    if constexpr (C::kCluster > 1) {
      *to = sum;
      if (channel == 0) slot.sums[head] = {m, l};
    } else {
      Leave(to, sum);
      if (channel == 0) Leave(slot.sums + head, {m, l});
    }
  }
  __syncthreads();  // before the memory is used again
}

// So many heads of a pair from `first_head` on: the sum over all slots, as they come, divided by the sum of weights. Here latency is all
// there is: what is read is asked for at once; and each instruction stands once, as those that come late for the first time are late by
// more than what they do.
template <class C>
__device__ void Combine(const DecodeAttentionArgs& args, int pair, int slots, int ratio, int first_head, int heads, std::byte* shared,
                        float2* sums, float* outputs) {
  constexpr int kFours = C::kDim / 4, kBatch = 5, kSums = (kMostSplits + 31) / 32;
  float* weights = reinterpret_cast<float*>(shared);  // [head, slot]
  float4* turned = reinterpret_cast<float4*>(shared + (heads * slots * 4 + 15) / 16 * 16);  // [head, channel], where outputs are turned back
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Four channels of a head are a column. Where there are lanes to spare, 2^spare of them share the slots of one.
  const int columns = heads * kFours, of_slot = ratio * kFours, before = first_head * kFours;
  int spare = 0;
#pragma unroll 1
  while (spare < 4 && columns << (spare + 1) <= C::kThreads) ++spare;
  const int across = 32 >> spare, part = lane >> (5 - spare);
  bool weighed = false;
#pragma unroll 1
  for (int first = 0; first < columns; first += C::kThreads >> spare) {
    const int column = first + warp * across + (lane & (across - 1));
    float4 sum = {0, 0, 0, 0};
#pragma unroll 1
    for (int start = part; start - part < slots; start += kBatch << spare) {
      float4* const from = reinterpret_cast<float4*>(outputs) + start * of_slot + before + column;
      const auto has = [&](int i) { return column < columns && start + (i << spare) < slots; };
      float4 x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[i].x = x[i].y = x[i].z = x[i].w = has(i) ? 0.0f : 1.0f;
      // A warp a head, a lane a slot; and all of x meanwhile.
      int head = weighed ? heads : warp;
#pragma unroll 1
      do {
        float2 of[kSums];
        float2* const from_sums = sums + lane * ratio + first_head + head;
        const auto has_slot = [&](int i) { return head < heads && lane + 32 * i < slots; };
#pragma unroll
        for (int i = 0; i < kSums; ++i) of[i] = has_slot(i) ? float2{0, 0} : float2{kNoReference, -0.0f};
        uint32_t least;
#pragma unroll 1
        do {
          least = ~0u;
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const uint32_t of_x = LeastBits(x[i]);
            ptx::LoadSeen(from + (i << spare) * of_slot, of_x == 0, x[i]);
            least = min(least, of_x);
          }
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            const uint32_t of_sum = LeastBits(of[i]);
            ptx::LoadSeen(from_sums + 32 * i * ratio, of_sum == 0, of[i]);
            least = min(least, of_sum);
          }
        } while (least == 0);
        if (head >= heads) break;
        float m = kNoReference, l = 0;
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          if (has_slot(i)) ptx::StoreSeen(from_sums + 32 * i * ratio, float2{0, 0});
          m = fmaxf(m, of[i].x);
        }
#pragma unroll 1
        for (int i = 16; i > 0; i /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          of[i].x = ptx::Exp2(of[i].x - m);
          l = fmaf(of[i].x, of[i].y, l);
        }
#pragma unroll 1
        for (int i = 16; i > 0; i /= 2) l += __shfl_xor_sync(~0u, l, i);
        if (args.sink_logits != nullptr) {
          const int of_all = pair * ratio + first_head + head;  // of all sequences' query heads
          l += ptx::Exp2(__ldcg(args.sink_logits + of_all % static_cast<int>(args.query_heads)) * kLog2E - m);
        }
        const float scale = l == 0 ? 0 : ptx::Reciprocal(l);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          if (has_slot(i)) weights[head * slots + lane + 32 * i] = of[i].x * scale;
        }
      } while ((head += C::kWarps) < heads);
      if (!weighed) __syncthreads();
      weighed = true;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (!has(i)) continue;
        ptx::StoreSeen(from + (i << spare) * of_slot, float4{0, 0, 0, 0});
        const float weight = weights[column / kFours * slots + start + (i << spare)];
        sum.x = fmaf(weight, x[i].x, sum.x), sum.y = fmaf(weight, x[i].y, sum.y);
        sum.z = fmaf(weight, x[i].z, sum.z), sum.w = fmaf(weight, x[i].w, sum.w);
      }
    }
#pragma unroll 1
    for (int i = 16; i >= across; i /= 2) {
      sum.x += __shfl_xor_sync(~0u, sum.x, i), sum.y += __shfl_xor_sync(~0u, sum.y, i);
      sum.z += __shfl_xor_sync(~0u, sum.z, i), sum.w += __shfl_xor_sync(~0u, sum.w, i);
    }
    if (column >= columns || part > 0) continue;
    if constexpr (C::kTurnsValues) {
      turned[column] = sum;
    } else {
      const bool half = args.dtype == DType::kFloat16;
      const uint2 packed = {half ? ptx::PackHalf(sum.x, sum.y) : ptx::PackBFloat16(sum.x, sum.y),
                            half ? ptx::PackHalf(sum.z, sum.w) : ptx::PackBFloat16(sum.z, sum.w)};
      static_cast<uint2*>(args.out)[static_cast<int64_t>(pair) * of_slot + before + column] = packed;
    }
  }
  if constexpr (C::kTurnsValues) {
    __syncthreads();
    for (int head = warp; head < heads; head += C::kWarps) {
      float* row = reinterpret_cast<float*>(turned) + head * C::kDim;
      TurnBack(args.value_turn, row, C::kDim, lane);
      for (int i = lane; i < C::kDim / 2; i += 32) {
        static_cast<uint32_t*>(args.out)[(static_cast<int64_t>(pair) * ratio + first_head + head) * (C::kDim / 2) + i] =
            args.dtype == DType::kFloat16 ? ptx::PackHalf(row[2 * i], row[2 * i + 1]) : ptx::PackBFloat16(row[2 * i], row[2 * i + 1]);
      }
    }
  }
}

// By every block when it has left its slot: the first `combiners` of a pair share its heads, so that all blocks have to run at once; or, of
// one, the last that comes has them all.
template <class C>
__device__ __forceinline__ void CombineSlots(const DecodeAttentionArgs& args, int splits, int combiners, int ratio, std::byte* shared) {
  // Worked out anew, as no registers are to spare before.
  const int block = ptx::BlockNumber(), pair = block / splits;
  int number = block - pair * splits;  // of the pair's blocks
  const Workspace workspace = LayOut(args.workspace, gridDim.x / splits, splits, ratio, C::kDim);
  if (combiners == 1) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      last = ptx::AddInOrder(&workspace.counters[pair], 1) == splits - 1;
      if (last) workspace.counters[pair] = 0;
    }
    __syncthreads();
    if (!last) return;
    number = 0;
  } else if (number >= combiners) {
    return;
  }
  const int each = (ratio + combiners - 1) / combiners, first_head = number * each;
  const int64_t slots = static_cast<int64_t>(pair) * splits * ratio;
  Combine<C>(args, pair, splits, ratio, first_head, min(each, ratio - first_head), shared,
             static_cast<float2*>(workspace.sums) + slots, workspace.outputs + slots * C::kDim);
}

// The same where the blocks of a pair are a cluster: each combines some heads, from what Merge has left in all of them. By threads that
// have met since.
template <class C>
__device__ void CombineInCluster(const DecodeAttentionArgs& args, int pair, int rank, int ratio, int warp, std::byte* shared) {
  constexpr int kFours = C::kDim / 4, kParts = C::kThreads / kFours;  // of a row; threads that share the blocks of one
  constexpr int kFree = C::kHeads * C::kHeadStride * 4;               // behind the first warp's rows
  static_assert(kFree + C::kThreads * 16 + C::kDim * 4 <= C::kSumsAt && C::kCluster <= kMostCluster);
  const float* rows = reinterpret_cast<const float*>(shared);
  const float2* sums = reinterpret_cast<const float2*>(shared + C::kBlockSumsAt);
  float4* shares = reinterpret_cast<float4*>(shared + kFree);
  float* row = reinterpret_cast<float*>(shares + C::kThreads);
  const int lane = threadIdx.x % 32, column = threadIdx.x % kFours, part = threadIdx.x / kFours;
  ptx::ArriveInCluster(/*release=*/warp == 0);
  ptx::WaitForCluster();
  if (rank >= ratio) ptx::ArriveInCluster(/*release=*/false);
#pragma unroll 1
  for (int head = rank; head < ratio; head += C::kCluster) {
    const float2 of = lane < C::kCluster ? *ptx::InBlock(sums + head, lane) : float2{kNoReference, 0};
    float4 x[(C::kCluster + kParts - 1) / kParts];
#pragma unroll
    for (int i = 0; i < sizeof x / sizeof x[0]; ++i) {
      const int block = min(part + i * kParts, C::kCluster - 1);
      x[i] = *reinterpret_cast<const float4*>(ptx::InBlock(rows + head * C::kHeadStride + 4 * column, block));
    }
    float m = of.x;
#pragma unroll
    for (int i = kMostCluster / 2; i > 0; i /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
    const float factor = ptx::Exp2(of.x - m);
    float l = factor * of.y;
#pragma unroll
    for (int i = kMostCluster / 2; i > 0; i /= 2) l += __shfl_xor_sync(~0u, l, i);
    const int64_t of_all = static_cast<int64_t>(pair) * ratio + head;  // of all sequences' query heads
    if (args.sink_logits != nullptr) l += ptx::Exp2(__ldcg(args.sink_logits + of_all % args.query_heads) * kLog2E - m);
    const float weight = l == 0 ? 0 : factor / l;
    float4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < sizeof x / sizeof x[0]; ++i) {
      const int block = part + i * kParts;
      const float of_block = __shfl_sync(~0u, weight, min(block, C::kCluster));  // 0 of lanes without a block
      sum.x = fmaf(of_block, x[i].x, sum.x), sum.y = fmaf(of_block, x[i].y, sum.y);
      sum.z = fmaf(of_block, x[i].z, sum.z), sum.w = fmaf(of_block, x[i].w, sum.w);
    }
    shares[threadIdx.x] = sum;
    __syncthreads();
    if (head + C::kCluster >= ratio) ptx::ArriveInCluster(/*release=*/false);  // all that is read of others has come
    if (part == 0) {
#pragma unroll
      for (int other = 1; other < min(kParts, C::kCluster); ++other) {
        const float4 more = shares[other * kFours + column];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      reinterpret_cast<float4*>(row)[column] = sum;
    }
    __syncthreads();
    if (warp > 0) continue;
    if constexpr (C::kTurnsValues) TurnBack(args.value_turn, row, C::kDim, lane);
    for (int i = lane; i < C::kDim / 2; i += 32) {
      static_cast<uint32_t*>(args.out)[of_all * (C::kDim / 2) + i] =
          args.dtype == DType::kFloat16 ? ptx::PackHalf(row[2 * i], row[2 * i + 1]) : ptx::PackBFloat16(row[2 * i], row[2 * i + 1]);
    }
  }
  ptx::WaitForCluster();  // nobody leaves while others read
}

#endif  // __CUDACC__

}  // namespace kvq::decode_attention
