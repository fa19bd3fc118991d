// The kernels of step.h, between a decoder's products and attention.
#pragma once

#include "kernels/device/step.cuh"

namespace kvq::step {

inline constexpr int kNormThreads = 512, kNormHeld = 4;
inline constexpr int kBeginThreads = 256;
inline constexpr int kPickThreads = 256, kPickBlocks = 32;

#ifdef __CUDACC__

// ---- AddNorm

// A thread keeps kHeld accesses of its row. One is the usual case: its registers leave room for a
// block beside a product's.
template <bool kBFloat16, int kWide, int kHeld>
__global__ void __launch_bounds__(kNormThreads, kHeld == 1 ? 2 : 1)
    AddNormKernel(const __grid_constant__ AddNormArgs a) {
  __shared__ float sums[kNormThreads / 32];
  LaunchDependents();
  float weight[kHeld][kWide], x[kHeld][kWide], squares = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at < a.size) LoadFloats(a.weight, at, weight[i]);
  }
  WaitForPredecessors();
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at >= a.size) break;
    LoadSum<kBFloat16>(a, blockIdx.x, at, x[i]);
    if (a.delta != nullptr || a.partial != nullptr)
      Store<kBFloat16>(a.sum, blockIdx.x * a.size + at, x[i]);
#pragma unroll
    for (int k = 0; k < kWide; ++k) squares += x[i][k] * x[i][k];
  }
  const float inverse = InverseRms(squares, a.size, a.eps, sums);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at >= a.size) break;
#pragma unroll
    for (int k = 0; k < kWide; ++k) x[i][k] = x[i][k] * inverse * weight[i][k];
    Store<kBFloat16>(a.out, blockIdx.x * a.size + at, x[i]);
  }
}

// The same with a norm of the delta. Weights are not held in registers before the wait, as above, which two rows
// of them would not leave room for: they are fetched as far as the L2 cache.
template <bool kBFloat16, int kWide, int kHeld>
__global__ void __launch_bounds__(kNormThreads, kHeld == 1 ? 2 : 1)
    AddNormedKernel(const __grid_constant__ AddNormedArgs a) {
  __shared__ float sums[2][kNormThreads / 32];
  const AddNormArgs& next = a.next;
  const int64_t row = blockIdx.x * next.size;
  LaunchDependents();
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at >= next.size) break;
    ptx::Prefetch(a.delta_weight + at);
    if (next.weight != nullptr) ptx::Prefetch(next.weight + at);
  }
  WaitForPredecessors();
  float x[kHeld][kWide], old[kWide], weight[kWide], squares = 0;
  const auto load = [&](int64_t at) {
    LoadFloats(a.delta_weight, at, weight);
    Load<kBFloat16>(next.x, row + at, old);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at >= next.size) break;
    LoadSum<kBFloat16, /*kDeltaAlone=*/true>(next, blockIdx.x, at, x[i]);
    if (kHeld == 1) load(at);  // on their way while the block adds up
#pragma unroll
    for (int k = 0; k < kWide; ++k) squares += x[i][k] * x[i][k];
  }
  const float of_delta = InverseRms(squares, next.size, next.eps, sums[0]);
  squares = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at >= next.size) break;
    if (kHeld > 1) load(at);
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      const float sum = Round<kBFloat16>(old[k] + Round<kBFloat16>(x[i][k] * of_delta * weight[k]));
      x[i][k] = Round<kBFloat16>(sum * a.scale);
      squares += x[i][k] * x[i][k];
    }
    Store<kBFloat16>(next.sum, row + at, x[i]);
    if (kHeld == 1 && next.weight != nullptr) LoadFloats(next.weight, at, weight);
  }
  if (next.weight == nullptr) return;
  const float of_sum = InverseRms(squares, next.size, next.eps, sums[1]);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at >= next.size) break;
    if (kHeld > 1) LoadFloats(next.weight, at, weight);
#pragma unroll
    for (int k = 0; k < kWide; ++k) x[i][k] = x[i][k] * of_sum * weight[k];
    Store<kBFloat16>(next.out, row + at, x[i]);
  }
}

// AddNorm with a shift. The deviation is that of the differences from the mean, which are in registers.
template <bool kBFloat16, int kWide, int kHeld>
__global__ void __launch_bounds__(kNormThreads, kHeld == 1 ? 2 : 1)
    AddLayerNormKernel(const __grid_constant__ AddNormArgs a) {
  __shared__ float sums[2][kNormThreads / 32];
  LaunchDependents();
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at >= a.size) break;
    ptx::Prefetch(a.weight + at), ptx::Prefetch(a.shift + at);
  }
  WaitForPredecessors();
  float x[kHeld][kWide], total = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at >= a.size) break;
    LoadSum<kBFloat16>(a, blockIdx.x, at, x[i]);
    if (a.delta != nullptr || a.partial != nullptr) Store<kBFloat16>(a.sum, blockIdx.x * a.size + at, x[i]);
#pragma unroll
    for (int k = 0; k < kWide; ++k) total += x[i][k];
  }
  const float mean = BlockSum(total, sums[0]) / static_cast<float>(a.size);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at >= a.size) break;
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      x[i][k] -= mean;
      squares += x[i][k] * x[i][k];
    }
  }
  const float inverse = InverseRms(squares, a.size, a.eps, sums[1]);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = static_cast<int64_t>(threadIdx.x + i * blockDim.x) * kWide;
    if (at >= a.size) break;
    float weight[kWide], shift[kWide];
    LoadFloats(a.weight, at, weight), LoadFloats(a.shift, at, shift);
#pragma unroll
    for (int k = 0; k < kWide; ++k) x[i][k] = x[i][k] * inverse * weight[k] + shift[k];
    Store<kBFloat16>(a.out, blockIdx.x * a.size + at, x[i]);
  }
}

// ---- heads

// A warp a head: of up to 128 kSteps channels.
template <bool kBFloat16, bool kAppend, int kSteps, bool kValueNorm>
__global__ void __launch_bounds__(128)
    HeadsKernel(const __grid_constant__ AppendArgs a, uint16_t* qkv) {
  LaunchDependents();
  const HeadsArgs& of = a.of;
  const int heads = static_cast<int>(of.heads), kv_heads = static_cast<int>(of.kv_heads), all = heads + 2 * kv_heads;
  const int worked = kAppend ? all : heads + kv_heads;
  const int task = static_cast<int>(blockIdx.x * 4 + threadIdx.x / 32), row = task / worked, head = task % worked;
  if (row >= of.rows) return;
  uint16_t* from = qkv + (static_cast<int64_t>(row) * all + head) * of.head_dim;
  const float* norm = head < heads              ? of.q_norm
                      : head < heads + kv_heads ? of.k_norm
                      : kValueNorm              ? of.v_norm
                                                : nullptr;
  HeadOfWarp<kBFloat16, kSteps> in_hand(of, norm, row, head);
  WaitForPredecessors();
  in_hand.Load(from);
  uint16_t* to = kAppend ? Destination(a, row, head) : from;
  in_hand.Finish(of.head_dim, of.eps, [&](int channel, uint32_t word) { *reinterpret_cast<uint32_t*>(to + channel) = word; });
}

// ---- the gate

template <bool kBFloat16, int kWide>
__global__ void __launch_bounds__(256)
    GateKernel(const __grid_constant__ GateArgs a, const void* up) {
  LaunchDependents();
  WaitForPredecessors();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * kWide;
  if (at >= a.rows * a.size) return;
  const int64_t row = at / a.size, column = at % a.size;
  float x[2][kWide], bias[kWide];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Load<kBFloat16>(up, (2 * row + half) * a.size + column, x[half]);
    if (a.bias == nullptr) continue;
    Load<kBFloat16>(a.bias, half * a.size + column, bias);
#pragma unroll
    for (int k = 0; k < kWide; ++k) x[half][k] = Round<kBFloat16>(x[half][k] + bias[k]);
  }
#pragma unroll
  for (int k = 0; k < kWide; ++k) x[0][k] = Gated<kBFloat16>(a.activation, x[0][k], x[1][k]);
  Store<kBFloat16>(a.out, at, x[0]);
}

template <bool kBFloat16, int kWide>
__global__ void __launch_bounds__(256)
    ActivateKernel(const __grid_constant__ GateArgs a, const void* gate) {
  LaunchDependents();
  WaitForPredecessors();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * kWide;
  if (at >= a.rows * a.size) return;
  float x[kWide], other[kWide];
  Load<kBFloat16>(gate, at, x);
  if (a.bias != nullptr) {
    Load<kBFloat16>(a.bias, at % a.size, other);
#pragma unroll
    for (int k = 0; k < kWide; ++k) x[k] = Round<kBFloat16>(x[k] + other[k]);
  }
  if (a.factor != nullptr) {
    Load<kBFloat16>(a.factor, at, other);
#pragma unroll
    for (int k = 0; k < kWide; ++k) x[k] = Gated<kBFloat16>(a.activation, x[k], other[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kWide; ++k) x[k] = Activated(a.activation, x[k]);
  }
  Store<kBFloat16>(a.out, at, x);
}

// ---- what every layer mixes in

template <bool kBFloat16>
__global__ void __launch_bounds__(128) LayerInputsKernel(const __grid_constant__ LayerInputsArgs a) {
  LaunchDependents();
  WaitForPredecessors();
  const int layers = static_cast<int>(a.layers), size = static_cast<int>(a.size);
  const int64_t task = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (task >= a.batch * layers) return;
  const int64_t b = task / layers, layer = task % layers;
  const int lane = threadIdx.x % 32;
  const uint16_t* projected = static_cast<const uint16_t*>(a.projected) + task * size;
  const uint16_t* embedding =
      static_cast<const uint16_t*>(a.embedding) + (__ldcg(a.tokens + b) * layers + layer) * size;
  uint16_t* out = static_cast<uint16_t*>(a.out) + (layer * a.batch + b) * size;
  constexpr int kHeld = kMaxLayerInput / 32;
  float x[kHeld], squares = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = lane + 32 * k;
    if (i >= size) break;
    x[k] = Round<kBFloat16>(At<kBFloat16>(__ldcg(projected + i), 0) / a.divisor);
    squares += x[k] * x[k];
  }
  const float inverse = rsqrtf(WarpSum(squares) / static_cast<float>(size) + a.eps);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = lane + 32 * k;
    if (i >= size) break;
    const float normed = Round<kBFloat16>(x[k] * inverse * __ldcg(a.weight + i));
    const float token = Round<kBFloat16>(At<kBFloat16>(__ldcg(embedding + i), 0) * a.scale);
    const float sum[1] = {Round<kBFloat16>(normed + token) * 0.70710678f};  // 1 / sqrt(2)
    Store<kBFloat16>(out, i, sum);
  }
}

// ---- attention in two parts

template <bool kBFloat16>
__global__ void __launch_bounds__(256) MergeKernel(const __grid_constant__ MergeArgs a) {
  LaunchDependents();
  WaitForPredecessors();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t eights = a.head_dim / 8, head = thread / eights % a.heads;
  const int64_t token = thread / eights / a.heads % a.tokens,
                b = thread / eights / a.heads / a.tokens;
  if (b >= a.batch) return;
  const int64_t sum = (b * a.heads + head) * a.tokens + token;
  const int64_t at =
      b * a.batch_stride + token * a.token_stride + head * a.head_stride + thread % eights * 8;
  // The first set's share of the probability; one set may have none at all.
  const float share =
      1.0f / (1.0f + expf(__ldcg(a.second_log_sums + sum) - __ldcg(a.first_log_sums + sum)));
  float first[8], second[8];
  Load<kBFloat16>(a.first, at, first);
  Load<kBFloat16>(a.second, at, second);
#pragma unroll
  for (int k = 0; k < 8; ++k) first[k] = share * first[k] + (1.0f - share) * second[k];
  Store<kBFloat16>(a.first, at, first);
}

// ---- first and last of a step

__global__ void StartKernel(StepState s, int batch, const int64_t* first, SequenceLength dense,
                            SequenceLength append) {
  LaunchDependents();
  WaitForPredecessors();
  for (int b = threadIdx.x; b < batch; b += blockDim.x) {
    s.tokens[b] = __ldcg(first + b);
    s.dense[b] = dense, s.append[b] = append;
    s.best[b] = 0, s.arrived[b] = 0;
  }
  if (threadIdx.x == 0) *s.step = 0;
}

__global__ void CountKernel(const CountArgs a) {
  LaunchDependents();
  WaitForPredecessors();
  for (int b = threadIdx.x; b < a.batch; b += blockDim.x) {
    const int32_t after = __ldcg(&a.dense[b].encoded);
    a.keys.to[b] = a.keys.count.To(after), a.keys.read[b] = a.keys.count.Read(after);
    a.values.to[b] = a.values.count.To(after), a.values.read[b] = a.values.count.Read(after);
  }
}

// A block a sequence.
template <bool kBFloat16, bool kPositions>
__global__ void __launch_bounds__(kBeginThreads) BeginKernel(const __grid_constant__ BeginArgs a) {
  LaunchDependents();
  WaitForPredecessors();
  __shared__ int position;
  const int b = blockIdx.x;
  if (threadIdx.x == 0) {
    position = __ldcg(&a.state.dense[b].encoded);
    a.state.dense[b].encoded = position + 1;
    SequenceLength* append = a.state.append + b;
    int encoded = __ldcg(&append->encoded), residual = __ldcg(&append->residual);
    if (position < a.sink_tokens) {
      append->sinks = position + 1;
    } else {
      const bool full = residual == a.residual_length;
      if (full) append->encoded = encoded += residual;
      append->residual = residual = full ? 1 : residual + 1;
    }
    if (a.state.read != nullptr) {
      const int sinks = position < a.sink_tokens ? position + 1 : static_cast<int>(a.sink_tokens);
      a.state.read[b] = SequenceLength{sinks, encoded + residual, 0};
    }
    if (b == 0) *a.state.step = __ldcg(a.state.step) + 1;
  }
  __syncthreads();
  if (b == 0) {  // all sequences are at the same position
    for (const BeginArgs::Rope& rope : a.ropes) {
      for (int i = threadIdx.x; i < rope.pairs; i += kBeginThreads) {
        const float angle = static_cast<float>(position) * rope.frequency[i];
        rope.cos[i] = cosf(angle) * rope.factor;
        rope.sin[i] = sinf(angle) * rope.factor;
      }
    }
  }
  const uint16_t* from =
      static_cast<const uint16_t*>(a.embedding) + __ldcg(a.state.tokens + b) * a.hidden;
  for (int i = threadIdx.x; i < a.hidden; i += kBeginThreads) {
    float x[1] = {At<kBFloat16>(from[i], 0) * a.scale};
    if constexpr (kPositions) {
      const uint16_t* learned = static_cast<const uint16_t*>(a.positions) + position * a.hidden;
      x[0] = Round<kBFloat16>(x[0]) + At<kBFloat16>(learned[i], 0);
    }
    Store<kBFloat16>(a.x, b * a.hidden + i, x);
  }
}

// Larger for a larger logit, and of equal ones for a smaller index; NaN above all.
__device__ __forceinline__ unsigned long long Rank(float logit, int index) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 is 0
  const uint32_t order = logit != logit       ? 0xFFFFFFFFu
                         : bits & 0x80000000u ? ~bits
                                              : bits | 0x80000000u;
  return static_cast<unsigned long long>(order) << 32 |
         (0xFFFFFFFFu - static_cast<uint32_t>(index));
}

// Some blocks a sequence; the one that finishes last hands the token over.
template <bool kBFloat16, bool kCapped>
__global__ void __launch_bounds__(kPickThreads) PickKernel(const __grid_constant__ PickArgs a) {
  __shared__ unsigned long long bests[kPickThreads / 32];
  LaunchDependents();
  WaitForPredecessors();
  const int b = blockIdx.y;
  const uint16_t* logits = static_cast<const uint16_t*>(a.logits) + b * a.vocabulary;
  unsigned long long best = 0;
  for (int i = blockIdx.x * kPickThreads + threadIdx.x; i < a.vocabulary;
       i += kPickBlocks * kPickThreads) {
    float logit = At<kBFloat16>(__ldcg(logits + i), 0);
    if constexpr (kCapped) {
      logit = tanhf(logit / a.cap) * a.cap;
      a.capped[b * a.vocabulary + i] = logit;
    }
    best = max(best, Rank(logit, i));
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2)
    best = max(best, __shfl_xor_sync(0xFFFFFFFFu, best, lane));
  if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (const unsigned long long other : bests) best = max(best, other);
  atomicMax(a.state.best + b, best);
  __threadfence();
  if (atomicAdd(a.state.arrived + b, 1u) != kPickBlocks - 1) return;
  best = atomicExch(a.state.best + b, 0ull);
  a.state.arrived[b] = 0;
  const int64_t token = 0xFFFFFFFFu - static_cast<uint32_t>(best);
  a.state.tokens[b] = token;
  a.state.history[(__ldcg(a.state.step) - 1) * a.batch + b] = token;
}

#endif  // __CUDACC__

}  // namespace kvq::step
