// What the kernels of a step and of its products share: 16-bit numbers, and what happens to
// single elements.
#pragma once

#include "kernels/device/step.h"

namespace kvq::step {

// n / of, for n below 2^20, by ptx::Reciprocal(of), which is off by 2^-23 at most: a division of whole numbers takes some hundred
// cycles, which weighs where a block has few thousands.
KVQ_HD inline int Quotient(int n, float reciprocal) { return static_cast<int>((static_cast<float>(n) + 0.5f) * reciprocal); }

}  // namespace kvq::step

#ifdef __CUDACC__
#include "kernels/device/ptx.cuh"

namespace kvq::step {

// ---- 16-bit numbers

template <bool kBFloat16>
__device__ __forceinline__ float At(uint32_t word, int index) {
  return kBFloat16 ? ptx::BFloat16At(word, index) : ptx::HalfAt(word, index);
}
template <bool kBFloat16>
__device__ __forceinline__ uint32_t Pack(float first, float second) {
  return kBFloat16 ? ptx::PackBFloat16(first, second) : ptx::PackHalf(first, second);
}
template <bool kBFloat16>
__device__ __forceinline__ float Round(float x) {
  return At<kBFloat16>(Pack<kBFloat16>(x, 0), 0);
}

// kWide elements from `index` on, as one access where kWide is 8 (16 bytes).
template <bool kBFloat16, int kWide>
__device__ __forceinline__ void Load(const void* from, int64_t index, float (&x)[kWide]) {
  const uint16_t* at = static_cast<const uint16_t*>(from) + index;
  if constexpr (kWide == 8) {
    const uint4 words = __ldcg(reinterpret_cast<const uint4*>(at));
    const uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = At<kBFloat16>(each[i / 2], i % 2);
  } else {
    static_assert(kWide == 1);
    x[0] = At<kBFloat16>(__ldcg(at), 0);
  }
}
template <bool kBFloat16, int kWide>
__device__ __forceinline__ void Store(void* to, int64_t index, const float (&x)[kWide]) {
  uint16_t* at = static_cast<uint16_t*>(to) + index;
  if constexpr (kWide == 8) {
    *reinterpret_cast<uint4*>(at) = {Pack<kBFloat16>(x[0], x[1]), Pack<kBFloat16>(x[2], x[3]),
                                     Pack<kBFloat16>(x[4], x[5]), Pack<kBFloat16>(x[6], x[7])};
  } else {
    *at = static_cast<uint16_t>(Pack<kBFloat16>(x[0], 0));
  }
}
template <int kWide>
__device__ __forceinline__ void LoadFloats(const float* from, int64_t index, float (&x)[kWide]) {
  if constexpr (kWide == 8) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 four = __ldcg(reinterpret_cast<const float4*>(from + index + i));
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  } else {
    x[0] = __ldcg(from + index);
  }
}

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lane);
  return x;
}

// Elements `at` and on of row `row` of x + delta, or of x where there is no delta, or of delta alone, rounded.
template <bool kBFloat16, bool kDeltaAlone = false, int kWide>
__device__ __forceinline__ void LoadSum(const AddNormArgs& a, int64_t row, int64_t at,
                                        float (&x)[kWide]) {
  const int64_t index = row * a.size + at;
  if constexpr (!kDeltaAlone) {
    Load<kBFloat16>(a.x, index, x);
    if (a.delta == nullptr && a.partial == nullptr) return;
  }
  float delta[kWide];
  if (a.partial == nullptr) {
    Load<kBFloat16>(a.delta, index, delta);
  } else {
    float more[kMaxSplits][kWide];
#pragma unroll
    for (int split = 0; split < kMaxSplits; ++split) {  // all on their way at once
      if (split >= a.splits) break;
      LoadFloats(a.partial, split * a.rows * a.size + index, more[split]);
    }
#pragma unroll
    for (int k = 0; k < kWide; ++k) delta[k] = more[0][k];
#pragma unroll
    for (int split = 1; split < kMaxSplits; ++split) {
      if (split >= a.splits) break;
#pragma unroll
      for (int k = 0; k < kWide; ++k) delta[k] += more[split][k];
    }
  }
  if (a.bias != nullptr) {
    float bias[kWide];
    Load<kBFloat16>(a.bias, at, bias);
#pragma unroll
    for (int k = 0; k < kWide; ++k) delta[k] += bias[k];
  }
#pragma unroll
  for (int k = 0; k < kWide; ++k) {
    delta[k] = Round<kBFloat16>(delta[k]);
    x[k] = kDeltaAlone ? delta[k] : Round<kBFloat16>(x[k] + delta[k]);
  }
}

// The sum over a block's threads; `sums` has room for one a warp, and no other use. kWarps: how many these are, where it is known.
template <int kWarps = 0>
__device__ __forceinline__ float BlockSum(float x, float* sums) {
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  if constexpr (kWarps > 0) {
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) x += sums[warp];
  } else {
    for (int warp = 0; warp < blockDim.x / 32; ++warp) x += sums[warp];
  }
  return x;
}

// 1 / rms of a row from the squares that the threads of a block have added up; `sums` has room for
// one a warp.
template <int kWarps = 0>
__device__ __forceinline__ float InverseRms(float squares, int64_t size, float eps, float* sums) {
  const float of_size = ptx::Reciprocal(static_cast<float>(size));
  return rsqrtf(BlockSum<kWarps>(squares, sums) * of_size + eps);
}

// ---- single elements of heads and gates

// Where the newest token's keys or values of a head go.
__device__ __forceinline__ uint16_t* Destination(const NewToken& to, int row, int head) {
  const SequenceLength* length = to.lengths + row;
  const int residual = to.dense ? __ldcg(&length->encoded) : __ldcg(&length->residual);
  const bool tail = residual > 0;
  const DenseView& view = tail ? to.tail : to.sinks;
  const int token = (tail ? residual : __ldcg(&length->sinks)) - 1;
  return static_cast<uint16_t*>(view.data) + row * view.batch_stride + head * view.head_stride +
         token * view.token_stride;
}
// `head` counts queries, keys and values.
__device__ __forceinline__ uint16_t* Destination(const AppendArgs& a, int row, int head) {
  const int heads = static_cast<int>(a.of.heads), kv_heads = static_cast<int>(a.of.kv_heads);
  if (head < heads) {
    return static_cast<uint16_t*>(a.queries) + (row * a.of.heads + head) * a.of.head_dim;
  }
  if (head < heads + kv_heads) return Destination(a.keys, row, head - heads);
  return Destination(a.values, row, head - heads - kv_heads);
}

// The cosine and sine that the channels of pair i are turned by at the row's position, and (x1, x2) turned by them.
__device__ __forceinline__ float2 AngleOf(const HeadsArgs& a, int row, int i) {
  const int64_t at = (a.positions == 1 ? 0 : row % static_cast<int>(a.positions)) * a.pairs() + i;
  return make_float2(__ldcg(a.cos + at), __ldcg(a.sin + at));
}
__device__ __forceinline__ float2 Turn(float2 angle, float x1, float x2) {
  return make_float2(x1 * angle.x - x2 * angle.y, x2 * angle.x + x1 * angle.y);
}

// A head of up to 128 kSteps channels, to be normed and turned by a warp: each lane has two neighbouring pairs a step. What does not come
// from the predecessor is read when this is made: before its end where a whole step waits for that.
template <bool kBFloat16, int kSteps>
struct HeadOfWarp {
  bool has_norm, has_bias, has[kSteps], turns[kSteps];
  int first[kSteps], second[kSteps];  // channels: the first of each pair, of two neighbouring pairs; HeadsArgs::First and Apart
  const float *cos[kSteps], *sin[kSteps];
  float2 weight[kSteps][2] = {};  // [step, half]
  uint32_t bias[kSteps][2] = {};
  float2 cosines[kSteps] = {}, sines[kSteps] = {};
  uint32_t words[kSteps][2] = {};

  // Head `head` of queries, keys and values, in row `row`; `norm`: or null.
  __device__ __forceinline__ HeadOfWarp(const HeadsArgs& of, const float* norm, int row, int head)
      : has_norm(norm != nullptr), has_bias(of.bias != nullptr) {
    const int pairs = of.pairs(), dim = static_cast<int>(of.head_dim);
    const bool value = head >= static_cast<int>(of.heads + of.kv_heads);
    const int position = of.positions == 1 ? 0 : row % static_cast<int>(of.positions);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int i = 2 * (static_cast<int>(threadIdx.x) % 32 + 32 * s);
      has[s] = i < dim / 2, turns[s] = i < pairs && !value;
      first[s] = i < pairs ? i : i + pairs, second[s] = first[s] + (i < pairs ? pairs : dim / 2 - pairs);
      cos[s] = of.cos + position * pairs + i, sin[s] = of.sin + position * pairs + i;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = half == 0 ? first[s] : second[s];
        if (has[s] && has_norm) weight[s][half] = __ldcg(reinterpret_cast<const float2*>(norm + at));
        if (has[s] && has_bias) {
          bias[s][half] = __ldcg(reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(of.bias) + head * dim + at));
        }
      }
    }
  }
  // What lies at `from`.
  __device__ __forceinline__ void Load(const uint16_t* from) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (has[s]) {
        words[s][0] = __ldcg(reinterpret_cast<const uint32_t*>(from + first[s]));
        words[s][1] = __ldcg(reinterpret_cast<const uint32_t*>(from + second[s]));
      }
      if (turns[s]) {
        cosines[s] = __ldcg(reinterpret_cast<const float2*>(cos[s]));
        sines[s] = __ldcg(reinterpret_cast<const float2*>(sin[s]));
      }
    }
  }
  // Calls put(channel, word) for all pairs of neighbours.
  template <typename Put>
  __device__ __forceinline__ void Finish(int64_t head_dim, float eps, const Put& put) {
    float x[kSteps][2][2], squares = 0;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          x[s][half][k] = At<kBFloat16>(words[s][half], k);
          if (has_bias) x[s][half][k] = Round<kBFloat16>(x[s][half][k] + At<kBFloat16>(bias[s][half], k));
          squares += x[s][half][k] * x[s][half][k];  // 0 of channels that are not there
        }
      }
    }
    const float inverse = has_norm ? rsqrtf(WarpSum(squares) * ptx::Reciprocal(static_cast<float>(head_dim)) + eps) : 0.0f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (has_norm) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[s][half][0] = Round<kBFloat16>(x[s][half][0] * inverse * weight[s][half].x);
          x[s][half][1] = Round<kBFloat16>(x[s][half][1] * inverse * weight[s][half].y);
        }
      }
      if (turns[s]) {
        const float2 one = Turn({cosines[s].x, sines[s].x}, x[s][0][0], x[s][1][0]);
        const float2 other = Turn({cosines[s].y, sines[s].y}, x[s][0][1], x[s][1][1]);
        x[s][0][0] = one.x, x[s][1][0] = one.y, x[s][0][1] = other.x, x[s][1][1] = other.y;
      }
      if (!has[s]) continue;
      put(first[s], Pack<kBFloat16>(x[s][0][0], x[s][0][1]));
      put(second[s], Pack<kBFloat16>(x[s][1][0], x[s][1][1]));
    }
  }
};

__device__ __forceinline__ float Activated(Gate activation, float gate) {
  if (activation == Gate::kClamped) gate = gate > 7.0f ? 7.0f : gate;  // NaN stays
  if (activation != Gate::kGeluTanh) return gate / (1.0f + expf(activation == Gate::kClamped ? -1.702f * gate : -gate));
  const float inner = 0.79788456f * (gate + 0.044715f * gate * gate * gate);  // sqrt(2 / pi)
  return 0.5f * gate * (1.0f + tanhf(inner));
}
// Rounds after the activation, as two operations on tensors would.
template <bool kBFloat16>
__device__ __forceinline__ float Gated(Gate activation, float gate, float up) {
  if (activation == Gate::kClamped) up = Round<kBFloat16>((up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up) + 1.0f);
  return Round<kBFloat16>(Activated(activation, gate)) * up;
}

}  // namespace kvq::step
#endif  // __CUDACC__
