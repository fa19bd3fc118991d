// Decode attention for shapes that have no tiles (attention.cuh): any head_dim that is a multiple of 8 up to 512, and any
// number of query heads a KV head. A warp takes one token after the other: each lane multiplies its channels of the key
// with those of the queries, a sum over lanes makes the logit, and the lane adds its channels of the value. Codes are
// decoded in registers, one number at a time, as the scheme defines them; sums are float32.
//
// A lane's channels are those of the words it reads, so that codes come as they are stored (code_row.h): word lane,
// lane + 32, ... of a row, or 16 bytes of a dense one. Dense tokens beside codes are read in the codes' order.
//
// What blocks leave, and how it is combined, is attention_combine.cuh's: a block works for kHeads query heads, which count
// as a pair of their own.
#pragma once

#include "kernels/device/attention.cuh"

#ifdef __CUDACC__
namespace kvq::decode_attention {

template <class K_, class V_, int kDim_, int kHeads_>
struct AnyConfig {
  static constexpr int kDim = kDim_, kHeads = kHeads_, kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kUnroll = kDim <= 256 ? 4 : 2;  // tokens that a warp has in flight
  using K = Row<K_, kDim>;
  using V = Row<V_, kDim>;
  static constexpr bool kOneDense = K::kDense != V::kDense;
  static constexpr bool kTurnsValues = false;  // for Combine
  static_assert(!K::kNormed && K::kTokens == 1, "rows of keys that are normed, and groups of tokens, have tiles");
};

// A lane's share of a row: kLoads words of codes, or kLoads times four of a dense row, each some pairs of neighbouring
// channels.
template <class R, int kDim>
struct Share {
  static constexpr int kUnits = R::kDense ? kDim / 8 : kDim * R::kBits / 32;  // loads of a whole row
  static constexpr int kLoads = (kUnits + 31) / 32, kPairs = R::kDense ? 4 : 16 / R::kBits;
  static constexpr int kRun = R::kDense ? 8 : 128 / R::kBits;  // channels that a load's lie among
  static constexpr int kLoadGroups = R::kDense ? 1 : std::max(kRun / std::max(R::kGroup, 1), 1);

  __device__ __forceinline__ static bool There(int load, int lane) { return kUnits % 32 == 0 || lane + 32 * load < kUnits; }
  // Channel of the first of a pair.
  __device__ __forceinline__ static int Channel(int load, int pair, int lane) {
    const int unit = lane + 32 * load;
    if constexpr (R::kDense) return unit * 8 + 2 * pair;
    constexpr int kWords = std::max(kUnits / 4, 1);  // of a chunk
    return unit % kWords * kRun + 8 * pair + 2 * (unit / kWords);
  }
};

// Pairs of a dense row, in the order of R's shares.
template <class R, int kDim>
struct DensePairs {
  using S = Share<R, kDim>;
  uint32_t words[S::kLoads][S::kPairs];

  __device__ __forceinline__ void Load(const uint16_t* row, int lane) {
#pragma unroll
    for (int load = 0; load < S::kLoads; ++load) {
#pragma unroll
      for (int pair = 0; pair < S::kPairs; ++pair) words[load][pair] = 0;
      if (!S::There(load, lane)) continue;
      if constexpr (R::kDense) {
        const uint4 all = __ldcg(reinterpret_cast<const uint4*>(row + S::Channel(load, 0, lane)));
        words[load][0] = all.x, words[load][1] = all.y, words[load][2] = all.z, words[load][3] = all.w;
      } else {
#pragma unroll
        for (int pair = 0; pair < S::kPairs; ++pair) {
          words[load][pair] = __ldcg(reinterpret_cast<const uint32_t*>(row + S::Channel(load, pair, lane)));
        }
      }
    }
  }
  template <bool kBFloat16>
  __device__ __forceinline__ float2 Pair(int load, int pair) const {
    const uint32_t word = words[load][pair];
    return kBFloat16 ? float2{ptx::BFloat16At(word, 0), ptx::BFloat16At(word, 1)}
                     : float2{ptx::HalfAt(word, 0), ptx::HalfAt(word, 1)};
  }
};

// Pairs of an encoded row.
template <class R, int kDim>
struct CodePairs {
  using S = Share<R, kDim>;
  uint32_t words[S::kLoads];
  OddWords<R::kOdd> odd[S::kLoads];
  GroupScale scales[S::kLoads][S::kLoadGroups];

  // `base`: of this KV head, for each plane.
  __device__ __forceinline__ void Load(const KvView& view, int pair, int64_t token, int lane) {
    const auto plane = [&](int p) { return view.planes[p] + pair * view.plane_stride[p]; };
#pragma unroll
    for (int load = 0; load < S::kLoads; ++load) {
      words[load] = 0;
#pragma unroll
      for (int i = 0; i < R::kOdd; ++i) odd[load][i] = 0;
      if (!S::There(load, lane)) continue;
      const int unit = lane + 32 * load;
      words[load] = __ldcg(reinterpret_cast<const uint32_t*>(plane(0) + token * R::kRow) + unit);
#pragma unroll
      for (int i = 0; i < R::kOdd; ++i) {
        const std::byte* bits = plane(1) + token * R::kOddRow + i * (kDim / 8);
        if constexpr (R::kBits == 4) {
          const uint32_t byte = __ldcg(reinterpret_cast<const uint8_t*>(bits) + unit);
          odd[load][i] = byte | byte << 12;
        } else {
          odd[load][i] = ptx::PickBytes(__ldcg(reinterpret_cast<const uint16_t*>(bits) + unit), 0, 0x4140);
        }
      }
      const int group = S::Channel(load, 0, lane) / R::kGroup;
#pragma unroll
      for (int i = 0; i < S::kLoadGroups; ++i) scales[load][i] = LoadGroupScale<R>(view, pair, token, group + i);
    }
  }
  template <bool kBFloat16>
  __device__ __forceinline__ float2 Pair(int load, int pair) const {
    const int i = S::kLoadGroups == 1 ? 0 : 8 * pair / R::kGroup;
    const uint32_t word = words[load] >> (pair * R::kBits);
    const auto decoded = [&](int shift) {
      uint32_t code = word >> shift & ((1u << R::kBits) - 1);
#pragma unroll
      for (int i = 0; i < R::kOdd; ++i) code |= (odd[load][i] >> (pair + shift) & 1) << (R::kBits + i);
      return Decoded<R>(code, scales[load][i]);
    };
    return {decoded(0), decoded(16)};
  }
};

template <class C, bool kBFloat16>
struct AnyPartial {
  using K = typename C::K;
  using V = typename C::V;
  using KeyShare = Share<K, C::kDim>;
  using ValueShare = Share<V, C::kDim>;
  float2 q[C::kHeads][KeyShare::kLoads][KeyShare::kPairs];
  float2 o[C::kHeads][ValueShare::kLoads][ValueShare::kPairs];
  float m[C::kHeads], l[C::kHeads];

  __device__ __forceinline__ AnyPartial(const DecodeAttentionArgs& args, int first_head, int lane) {
#pragma unroll
    for (int head = 0; head < C::kHeads; ++head) {
      m[head] = kNoReference, l[head] = 0;
      DensePairs<K, C::kDim> row;
      row.Load(static_cast<const uint16_t*>(args.queries) + static_cast<int64_t>(first_head + head) * C::kDim, lane);
#pragma unroll
      for (int load = 0; load < KeyShare::kLoads; ++load) {
#pragma unroll
        for (int pair = 0; pair < KeyShare::kPairs; ++pair) {
          const float2 x = row.template Pair<kBFloat16>(load, pair);
          q[head][load][pair] = {x.x * args.scale * kLog2E, x.y * args.scale * kLog2E};
        }
      }
#pragma unroll
      for (int load = 0; load < ValueShare::kLoads; ++load) {
#pragma unroll
        for (int pair = 0; pair < ValueShare::kPairs; ++pair) o[head][load][pair] = {0, 0};
      }
    }
  }

  // One token, all of whose numbers are in the warp's registers.
  template <class Keys, class Values>
  __device__ __forceinline__ void Attend(const Keys& key, const Values& value, float cap) {
    float x[C::kHeads];
#pragma unroll
    for (int head = 0; head < C::kHeads; ++head) x[head] = 0;
#pragma unroll
    for (int load = 0; load < KeyShare::kLoads; ++load) {
#pragma unroll
      for (int pair = 0; pair < KeyShare::kPairs; ++pair) {
        const float2 k = key.template Pair<kBFloat16>(load, pair);
#pragma unroll
        for (int head = 0; head < C::kHeads; ++head) {
          const float2& of = q[head][load][pair];
          x[head] = fmaf(of.x, k.x, fmaf(of.y, k.y, x[head]));
        }
      }
    }
#pragma unroll
    for (int head = 0; head < C::kHeads; ++head) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) x[head] += __shfl_xor_sync(~0u, x[head], lanes);
      if (cap > 0) x[head] = Capped(x[head], cap);
    }
#pragma unroll
    for (int head = 0; head < C::kHeads; ++head) {
      if (x[head] > m[head]) {  // the same in all lanes
        const float factor = ptx::Exp2(m[head] - x[head]);
        m[head] = x[head], l[head] *= factor;
#pragma unroll
        for (int load = 0; load < ValueShare::kLoads; ++load) {
#pragma unroll
          for (int pair = 0; pair < ValueShare::kPairs; ++pair) {
            o[head][load][pair].x *= factor, o[head][load][pair].y *= factor;
          }
        }
      }
      x[head] = ptx::Exp2(x[head] - m[head]);
      l[head] += x[head];
    }
#pragma unroll
    for (int load = 0; load < ValueShare::kLoads; ++load) {
#pragma unroll
      for (int pair = 0; pair < ValueShare::kPairs; ++pair) {
        const float2 v = value.template Pair<kBFloat16>(load, pair);
#pragma unroll
        for (int head = 0; head < C::kHeads; ++head) {
          float2& of = o[head][load][pair];
          of.x = fmaf(x[head], v.x, of.x), of.y = fmaf(x[head], v.y, of.y);
        }
      }
    }
  }
};

// Every kWarps-th token from `first` to `end`, kUnroll of them at a time.
template <class C, class Keys, class Values, class Partial, typename Load>
__device__ __forceinline__ void AttendRange(int first, int end, float cap, Partial& partial, const Load& load) {
#pragma unroll 1
  for (int at = first; at < end; at += C::kUnroll * C::kWarps) {
    Keys keys[C::kUnroll];
    Values values[C::kUnroll];
#pragma unroll
    for (int i = 0; i < C::kUnroll; ++i) {
      if (at + i * C::kWarps < end) load(at + i * C::kWarps, keys[i], values[i]);
    }
#pragma unroll
    for (int i = 0; i < C::kUnroll; ++i) {
      if (at + i * C::kWarps < end) partial.Attend(keys[i], values[i], cap);
    }
  }
}

template <class C, bool kBFloat16>
__global__ void __launch_bounds__(C::kThreads, 2) AnyKernel(const __grid_constant__ DecodeAttentionArgs args, int splits,
                                                                    int combiners) {
  using K = typename C::K;
  using V = typename C::V;
  __shared__ __align__(16) float outputs[C::kWarps][C::kHeads][C::kDim];
  __shared__ float2 sums[C::kWarps][C::kHeads];
  __shared__ __align__(16) std::byte combine[C::kHeads * kMostSplits * 4];  // for Combine
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int part = blockIdx.x / splits, split = blockIdx.x % splits;  // part: kHeads query heads of a sequence
  const int heads = static_cast<int>(args.keys.heads), parts = static_cast<int>(args.query_heads) / heads / C::kHeads;
  const int pair = part / parts, b = pair / heads, h = pair % heads;
  LaunchDependents();
  WaitForPredecessors();
  const SequenceLength* at = args.lengths + b;
  const SequenceLength length = {__ldcg(&at->sinks), __ldcg(&at->encoded), __ldcg(&at->residual)};
  const int all = length.sinks + length.encoded + length.residual;
  const int hidden = args.window > 0 ? max(all - args.window, 0) : 0;
  const auto cut = [&](int i) { return hidden + static_cast<int>(static_cast<int64_t>(all - hidden) * i / splits); };
  const int begin = cut(split), end = cut(split + 1);

  AnyPartial<C, kBFloat16> partial(args, part * C::kHeads, lane);
  const auto dense_row = [&](const DenseView& view, int token) {
    return static_cast<const uint16_t*>(view.data) + Offset(view, b, h, token, 0);
  };
  // Tokens `from` to `to` of the sequence, as far as they are this block's, this warp's first.
  const auto range = [&](int from, int to, auto attend) {
    const int low = max(begin, from), high = min(end, to);
    if (low < high) attend(low - from + warp, high - from);
  };
  using DenseKeys = DensePairs<K, C::kDim>;
  using DenseValues = DensePairs<V, C::kDim>;
  const auto dense = [&](const DenseView& keys, int keys_behind, const DenseView& values, int values_behind) {
    return [&, keys_behind, values_behind](int first, int to) {
      AttendRange<C, DenseKeys, DenseValues>(first, to, args.softcap, partial, [&](int token, DenseKeys& key, DenseValues& value) {
        key.Load(dense_row(keys, keys_behind + token), lane), value.Load(dense_row(values, values_behind + token), lane);
      });
    };
  };
  range(0, length.sinks, dense(args.sink_keys, 0, args.sink_values, 0));
  range(length.sinks, length.sinks + length.encoded, [&](int first, int to) {
    // A dense side: rows of plane 0.
    const auto plane_row = [&](const KvView& view, int token) {
      return reinterpret_cast<const uint16_t*>(view.planes[0] + pair * view.plane_stride[0]) +
             static_cast<int64_t>(token) * C::kDim;
    };
    using Keys = decltype([] {
      if constexpr (K::kDense) return DenseKeys(); else return CodePairs<K, C::kDim>();
    }());
    using Values = decltype([] {
      if constexpr (V::kDense) return DenseValues(); else return CodePairs<V, C::kDim>();
    }());
    AttendRange<C, Keys, Values>(first, to, args.softcap, partial, [&](int token, Keys& key, Values& value) {
      if constexpr (K::kDense) key.Load(plane_row(args.keys, token), lane);
      else key.Load(args.keys, pair, token, lane);
      if constexpr (V::kDense) value.Load(plane_row(args.values, token), lane);
      else value.Load(args.values, pair, token, lane);
    });
  });
  range(length.sinks + length.encoded, all,
        dense(args.residual_keys, C::kOneDense && K::kDense ? length.encoded : 0, args.residual_values,
              C::kOneDense && V::kDense ? length.encoded : 0));

  // The block's warps, then the blocks.
#pragma unroll
  for (int head = 0; head < C::kHeads; ++head) {
    if (lane == 0) sums[warp][head] = {partial.m[head], partial.l[head]};
    using S = Share<V, C::kDim>;
#pragma unroll
    for (int load = 0; load < S::kLoads; ++load) {
      if (!S::There(load, lane)) continue;
#pragma unroll
      for (int p = 0; p < S::kPairs; ++p) {
        *reinterpret_cast<float2*>(&outputs[warp][head][S::Channel(load, p, lane)]) = partial.o[head][load][p];
      }
    }
  }
  __syncthreads();
  const int64_t pairs = args.keys.batch * heads * parts;
  const Workspace workspace = LayOut(args.workspace, pairs, splits, C::kHeads, C::kDim);
  float2* slot_sums = static_cast<float2*>(workspace.sums) + static_cast<int64_t>(part) * splits * C::kHeads;
  float* slot_outputs = workspace.outputs + static_cast<int64_t>(part) * splits * C::kHeads * C::kDim;
  for (int i = threadIdx.x; i < C::kHeads * (C::kDim / 4); i += C::kThreads) {
    const int head = i / (C::kDim / 4), channel = i % (C::kDim / 4) * 4;
    float m = kNoReference, l = 0;
    float4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) m = fmaxf(m, sums[w][head].x);
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      const float factor = ptx::Exp2(sums[w][head].x - m);
      const float4 x = *reinterpret_cast<const float4*>(&outputs[w][head][channel]);
      l = fmaf(factor, sums[w][head].y, l);
      sum.x = fmaf(factor, x.x, sum.x), sum.y = fmaf(factor, x.y, sum.y);
      sum.z = fmaf(factor, x.z, sum.z), sum.w = fmaf(factor, x.w, sum.w);
    }
    Leave(reinterpret_cast<float4*>(slot_outputs + (split * C::kHeads + head) * C::kDim + channel), sum);
    if (channel == 0) Leave(slot_sums + split * C::kHeads + head, {m, l});
  }
  CombineSlots<C>(args, splits, combiners, C::kHeads, combine);
}

}  // namespace kvq::decode_attention
#endif  // __CUDACC__
