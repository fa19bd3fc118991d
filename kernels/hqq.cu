// int8-hqq, int4-hqq, int2-hqq, int4-hqq-kivi, int2-hqq-kivi: half-quadratic quantization.
//
// Source: Badri & Shaji, "Half-Quadratic Quantization" (2023); package hqq 0.2.8, Quantizer.quantize with its
// default solver optimize_weights_proximal_legacy, in float32 as on a CPU.
//
// A group of G = 64 elements x (also 32, 128) has a scale s and a zero point z; m = 2^bits - 1:
//   s = m / (max - min), 1 where max - min <= 1e-4, at most 2e4;   z = -min s
//   up to 20 times: q = clamp(round(x s + z), 0, m);  r = (q - z) / s;  e = shrink(x - r)
//                   z = mean(q - (x - e) s)
//   code q = clamp(round(x s + z), 0, m);   stored are q, fp16(1 / s), fp16(z)
//   decoded: (q - fp16(z)) fp16(1 / s)
// with shrink(d) = sign(d) max(|d| - |d|^(p-1) / beta, 0), p = 0.7, beta = 10, rounding half to even.
// The iterations end when the mean |x - r| over everything encoded together (a block: all heads and
// block_tokens tokens of a sequence) no longer falls.
//
// Groups. Plain: G consecutive channels of one token (the package's axis 1). kivi: keys by the package's
// axis 0, as the reference study's library calls it: the block [heads, tokens, head_dim] as a row of N
// numbers, cut into G rows of N / G; a group is a column. So a group spans all heads and tokens N / (G
// head_dim) apart, and one channel only if that is a whole number. Values as in plain.
//
// Exact bytes: bits / 8 + 4 / G per element (4.5 bits for int4 at G = 64). Planes, per token and head:
//   codes   head_dim bits / 8; in each run of G codes, byte k holds codes k, k + G bits / 8, ...; the
//           first in the low bits
//   scales  head_dim / G fp16 numbers 1 / s;  zeros  likewise z.  For kivi group c of a block has slot c,
//           counted over head, token, head_dim / G: as many slots as groups.
// Refused: head_dim that is no multiple of G; other G.
//
// A group that is so far from zero for its range that z would not fit fp16 gets the largest scale with which
// it does; the package would store infinity. A group with NaN or infinity decodes to NaN.
//
// No operation here may be fused: CPU and GPU, every instruction set, give the same bits
// (-ffp-contract=off, --fmad=false). Sums run over a fixed tree.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/groups.h"

namespace kvq {
namespace {

constexpr int kIterations = 20;
constexpr float kLargestZero = 60000;  // the solver moves it by less than a code; fp16 ends at 65504
constexpr float kLargestHalf = 65504;

// ---- arithmetic of one element, shared by CPU and GPU

// a^-0.3 for a > 0.1 by log2 and exp2, relative error below 4e-7. Below the threshold of Shrink nobody asks.
KVQ_HD inline float PowMinus03(float a) {
  const uint32_t bits = FloatBits(a) + (0x3F800000 - 0x3F3504F3);
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  const float mantissa = BitsFloat((bits & 0x007FFFFF) + 0x3F3504F3);  // in [sqrt(1/2), sqrt(2))
  const float t = (mantissa - 1) / (mantissa + 1), t2 = t * t;
  // log2(m) = 2 / ln 2 (t + t^3 / 3 + t^5 / 5 + ...)
  const float log2 =
      t * (2.8853901f + t2 * (0.96179669f + t2 * (0.57707802f + t2 * (0.41219859f + t2 * 0.32059890f))));
  const float y = -0.3f * exponent + -0.3f * log2;
  return Exp2(y);
}

// Where |d| <= 0.17, |d|^-0.3 / 10 > |d|: shrink(d) = 0.
constexpr float kShrinksToZero = 0.17f;

KVQ_HD inline float Shrink(float d) {
  const float a = d < 0 ? -d : d;
  const float shrunk = a - 0.1f * PowMinus03(a > kShrinksToZero ? a : kShrinksToZero);
  const float positive = shrunk > 0 ? shrunk : 0;
  return d < 0 ? -positive : positive;
}

// Scale and zero point that the solver starts from.
KVQ_HD inline void InitialScale(float low, float high, float m, float& s, float& z) {
  const float range = high - low;
  s = range <= 1e-4f ? 1.0f : m / range;
  s = s < 2e4f ? s : 2e4f;
  const float far = low < 0 ? -low : low;
  if (far * s > kLargestZero) s = kLargestZero / far;
  z = -low * s;
}

KVQ_HD inline uint16_t StoredScale(float s) {
  const float inverse = 1.0f / s;
  return FloatToHalf(inverse > kLargestHalf ? kLargestHalf : inverse);
}

// ---- shape of a block: which element belongs to which group

struct BlockShape {
  int64_t heads, tokens, head_dim, group;
  bool across;  // kivi keys: groups are columns of [group, groups()]

  KVQ_HD int64_t groups() const { return heads * tokens * head_dim / group; }
  // Place in the block, counted over head, token, channel, of element i of group g.
  KVQ_HD int64_t Flat(int64_t g, int64_t i) const {
    return across ? i * groups() + g : g * group + i;
  }
  KVQ_HD int64_t GroupOf(int64_t flat) const { return across ? flat % groups() : flat / group; }
};

// Where slot g (over head, token, head_dim / group) of a block of metadata lies.
KVQ_HD inline uint16_t* Slot(const KvView& view, const BlockShape& shape, int plane, int64_t b,
                             int64_t first_token, int64_t g) {
  const int64_t per_token = shape.head_dim / shape.group;
  const int64_t h = g / (shape.tokens * per_token), rest = g % (shape.tokens * per_token);
  return reinterpret_cast<uint16_t*>(view.planes[plane] +
                                     (b * view.heads + h) * view.plane_stride[plane]) +
         first_token * per_token + rest;
}

// ---- CPU: the definition, a group at a time

template <int n>
KVQ_VECTOR void InitGroup(const float* x, float m, float* s, float* z) {
  const GroupRange range = RangeOf<n>(x);
  InitialScale(range.low, range.high, m, *s, *z);
  *z += range.poison;
}

// One iteration: moves z, returns the sum of |x - r| before that.
template <int n>
KVQ_VECTOR float StepGroup(const float* x, float m, float s, float* z) {
  float q[n], error[n], distance[n], largest[n];
  const float zero = *z;
  for (int i = 0; i < n; ++i) {
    q[i] = RoundCode(x[i] * s + zero, m);
    error[i] = x[i] - (q[i] - zero) / s;
    largest[i] = distance[i] = std::fabs(error[i]);
  }
  for (int stride = n / 2; stride > 0; stride /= 2) {
    for (int i = 0; i < stride; ++i) {
      largest[i] = largest[i] > largest[i + stride] ? largest[i] : largest[i + stride];
    }
  }
  if (largest[0] > kShrinksToZero) {
    for (int i = 0; i < n; ++i) q[i] = q[i] - (x[i] - Shrink(error[i])) * s;
  } else {
    for (int i = 0; i < n; ++i) q[i] = q[i] - x[i] * s;
  }
  *z = TreeSum<n>(q) / n;
  return TreeSum<n>(distance);
}

template <int n>
KVQ_VECTOR void CodeGroup(const float* x, float m, float s, float z, uint8_t* codes) {
  for (int i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(RoundCode(x[i] * s + z, m));
}

// Sum of the groups' errors in double: lane l of 256 takes groups l, l + 256, ..., then a tree.
double ErrorSum(const std::vector<float>& errors) {
  double lanes[256] = {};
  for (size_t g = 0; g < errors.size(); ++g) lanes[g % 256] += errors[g];
  for (int stride = 128; stride > 0; stride /= 2) {
    for (int i = 0; i < stride; ++i) lanes[i] += lanes[i + stride];
  }
  return lanes[0];
}

// (q - z) s with one zero and scale for a run, or one for each element.
KVQ_VECTOR void ScaleRun(float* codes, int64_t n, float z, float s) {
  for (int64_t i = 0; i < n; ++i) codes[i] = (codes[i] - z) * s;
}
KVQ_VECTOR void ScaleEach(float* codes, int64_t n, const float* z, const float* s) {
  for (int64_t i = 0; i < n; ++i) codes[i] = (codes[i] - z[i]) * s[i];
}

// Encodes the block of sequence b that begins at token `first` of x and goes to slot `first_slot`.
// `parallel`: spread over threads inside the block (where there are too few blocks for that).
template <int kBits, int n>
void EncodeBlock(const BlockShape& shape, const DenseView& x, int64_t b, int64_t first,
                 const KvView& out, int64_t first_slot, bool parallel) {
  constexpr float m = kMaxCode<kBits>;
  const int64_t groups = shape.groups();
  const int64_t rows = shape.heads * shape.tokens, row_size = shape.head_dim;
  std::vector<float> values(groups * n), scales(groups), zeros(groups), errors(groups);
  // Elements group by group, so that everything after this runs over consecutive memory.
  ForEach(parallel, rows, [&](int64_t row) {
    float* plain = &values[row * row_size];
    std::vector<float> one;
    if (shape.across) {
      one.resize(row_size);
      plain = one.data();
    }
    LoadRow(x.data, x.dtype, Offset(x, b, row / shape.tokens, first + row % shape.tokens, 0), row_size,
            plain);
    for (int64_t d = 0; shape.across && d < row_size; ++d) {
      const int64_t flat = row * row_size + d;
      values[flat % groups * n + flat / groups] = plain[d];
    }
  });
  ForEach(parallel, groups, [&](int64_t g) { InitGroup<n>(&values[g * n], m, &scales[g], &zeros[g]); });
  float best = INFINITY;
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    ForEach(parallel, groups, [&](int64_t g) {
      errors[g] = StepGroup<n>(&values[g * n], m, scales[g], &zeros[g]);
    });
    const float error =
        static_cast<float>(ErrorSum(errors) / static_cast<double>(groups * n));
    if (!(error < best)) break;
    best = error;
  }
  std::vector<uint8_t> codes(groups * n);  // by place in the block
  ForEach(parallel, groups, [&](int64_t g) {
    uint8_t group_codes[n];
    CodeGroup<n>(&values[g * n], m, scales[g], zeros[g], group_codes);
    for (int64_t i = 0; i < n; ++i) codes[shape.Flat(g, i)] = group_codes[i];
    *Slot(out, shape, 1, b, first_slot, g) = StoredScale(scales[g]);
    *Slot(out, shape, 2, b, first_slot, g) = FloatToHalf(zeros[g]);
  });
  ForEach(parallel, rows, [&](int64_t row) {
    uint8_t* packed = CodeRow<kBits>(out, b, row / shape.tokens, first_slot + row % shape.tokens);
    for (int64_t d = 0; d < row_size; d += n) {
      PackRun<kBits, n>(&codes[row * row_size + d], packed + d * kBits / 8);
    }
  });
}

template <int kBits, int n>
void DecodeBlock(const BlockShape& shape, const KvView& in, int64_t b, int64_t first_slot,
                 const DenseView& out, int64_t first, bool parallel) {
  const int64_t groups = shape.groups(), rows = shape.heads * shape.tokens;
  std::vector<float> scales(groups), zeros(groups);
  for (int64_t g = 0; g < groups; ++g) {
    scales[g] = HalfToFloat(*Slot(in, shape, 1, b, first_slot, g));
    zeros[g] = HalfToFloat(*Slot(in, shape, 2, b, first_slot, g));
  }
  ForEach(parallel, rows, [&](int64_t row) {
    const int64_t h = row / shape.tokens, t = row % shape.tokens;
    const uint8_t* packed = CodeRow<kBits>(in, b, h, first_slot + t);
    const int64_t offset = Offset(out, b, h, first + t, 0);
    float values[n];
    for (int64_t d = 0; d < shape.head_dim; d += n) {
      UnpackRun<kBits, n>(packed + d * kBits / 8, values);
      const int64_t flat = row * shape.head_dim + d;
      if (!shape.across) {
        ScaleRun(values, n, zeros[flat / n], scales[flat / n]);
      } else {
        // Consecutive elements belong to consecutive groups, around the end.
        for (int64_t i = 0; i < n;) {
          const int64_t g = (flat + i) % groups, run = std::min<int64_t>(n - i, groups - g);
          ScaleEach(values + i, run, &zeros[g], &scales[g]);
          i += run;
        }
      }
      StoreRow(values, n, out.dtype, offset + d, out.data);
    }
  });
}

BlockShape ShapeOf(const KvView& view, const CodecParams& params, bool across) {
  return {view.heads, view.block_tokens, view.head_dim, params.group_size, across};
}

// Calls work(sequence, block, parallel) for all blocks of all sequences.
template <typename Work>
void ForBlocks(int64_t batch, int64_t tokens, int64_t block_tokens, const Work& work) {
  const int64_t blocks = tokens / block_tokens, all = batch * blocks;
  // One block: its rows and groups are spread. Not inside a region of one thread: OpenMP would start new
  // threads for every loop in it.
  if (all == 1) return work(0, 0, /*parallel=*/true);
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < all; ++i) work(i / blocks, i % blocks, /*parallel=*/false);
}

template <int kBits, bool kAcross>
void Encode(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out) {
  const BlockShape shape = ShapeOf(out, params, kAcross);
  WithGroup(shape.group, [&](auto group) {
    ForBlocks(x.batch, x.tokens, shape.tokens, [&](int64_t b, int64_t block, bool parallel) {
      EncodeBlock<kBits, group()>(shape, x, b, block * shape.tokens, out,
                                  first_token + block * shape.tokens, parallel);
    });
  });
}

template <int kBits, bool kAcross>
void Decode(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out) {
  const BlockShape shape = ShapeOf(in, params, kAcross);
  WithGroup(shape.group, [&](auto group) {
    ForBlocks(out.batch, out.tokens, shape.tokens, [&](int64_t b, int64_t block, bool parallel) {
      DecodeBlock<kBits, group()>(shape, in, b, first_token + block * shape.tokens, out,
                                  block * shape.tokens, parallel);
    });
  });
}

std::vector<Plane> Planes(int64_t /*heads*/, int64_t head_dim, const CodecParams& params, int bits) {
  const int64_t group = params.group_size;
  CheckGroups("hqq", head_dim, group);
  return {{"codes", head_dim * bits / 8},
          {"scales", head_dim / group * 2},
          {"zeros", head_dim / group * 2}};
}

// ---- CUDA: the same bits

#ifdef __CUDACC__

// TreeSum of a group spread over a warp: lane l holds elements l, l + 32, ... in x[0], x[1], ...
template <int kPerLane>
__device__ float WarpTreeSum(float* x) {
  for (int stride = kPerLane / 2; stride > 0; stride /= 2) {
    for (int i = 0; i < stride; ++i) x[i] += x[i + stride];
  }
  float sum = x[0];
  for (int stride = 16; stride > 0; stride /= 2) sum += __shfl_down_sync(~0u, sum, stride);
  return __shfl_sync(~0u, sum, 0);
}

// One thread block a block of a sequence: scales and zero points of its groups into `solved`
// [2, groups] and into the planes. `errors` is scratch, [groups].
template <int kBits, int kPerLane>
__global__ void __launch_bounds__(1024)
    SolveKernel(BlockShape shape, DenseView x, KvView out, int64_t first_token, float* all_solved,
                float* all_errors) {
  constexpr float m = kMaxCode<kBits>;
  __shared__ double lanes[256];
  const int64_t groups = shape.groups(), blocks = x.tokens / shape.tokens;
  const int64_t b = blockIdx.x / blocks, first = blockIdx.x % blocks * shape.tokens;
  float* scales = all_solved + blockIdx.x * 2 * groups;
  float* zeros = scales + groups;
  float* errors = all_errors + blockIdx.x * groups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto load = [&](int64_t g, float* values) {
    for (int i = 0; i < kPerLane; ++i) {
      const int64_t flat = shape.Flat(g, lane + 32 * i), row = flat / shape.head_dim;
      values[i] = LoadElement(x.data, x.dtype,
                              Offset(x, b, row / shape.tokens, first + row % shape.tokens,
                                     flat % shape.head_dim));
    }
  };
  float values[kPerLane], a[kPerLane];
  for (int64_t g = warp; g < groups; g += warps) {
    load(g, values);
    float low = values[0], high = values[0];
    for (int i = 0; i < kPerLane; ++i) {
      low = values[i] < low ? values[i] : low;
      high = values[i] > high ? values[i] : high;
      a[i] = values[i] * 0;
    }
    for (int stride = 16; stride > 0; stride /= 2) {
      const float other_low = __shfl_xor_sync(~0u, low, stride);
      const float other_high = __shfl_xor_sync(~0u, high, stride);
      low = other_low < low ? other_low : low;
      high = other_high > high ? other_high : high;
    }
    const float poison = WarpTreeSum<kPerLane>(a);
    if (lane == 0) {
      InitialScale(low, high, m, scales[g], zeros[g]);
      zeros[g] += poison;
    }
  }
  __syncthreads();
  float best = INFINITY;
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    for (int64_t g = warp; g < groups; g += warps) {
      load(g, values);
      const float s = scales[g], z = zeros[g];
      float distance[kPerLane];
      for (int i = 0; i < kPerLane; ++i) {
        const float q = RoundCode(values[i] * s + z, m);
        const float error = values[i] - (q - z) / s;
        distance[i] = fabsf(error);
        a[i] = distance[i] > kShrinksToZero ? q - (values[i] - Shrink(error)) * s : q - values[i] * s;
      }
      const float sum = WarpTreeSum<kPerLane>(a), distances = WarpTreeSum<kPerLane>(distance);
      __syncwarp();
      if (lane == 0) {
        zeros[g] = sum / static_cast<float>(shape.group);
        errors[g] = distances;
      }
    }
    __syncthreads();
    if (threadIdx.x < 256) {
      double sum = 0;
      for (int64_t g = threadIdx.x; g < groups; g += 256) sum += errors[g];
      lanes[threadIdx.x] = sum;
    }
    __syncthreads();
    for (int stride = 128; stride > 0; stride /= 2) {
      if (threadIdx.x < stride) lanes[threadIdx.x] += lanes[threadIdx.x + stride];
      __syncthreads();
    }
    const float error = static_cast<float>(lanes[0] / static_cast<double>(groups * shape.group));
    __syncthreads();  // before the next iteration writes lanes
    if (!(error < best)) break;
    best = error;
  }
  for (int64_t g = threadIdx.x; g < groups; g += blockDim.x) {
    *Slot(out, shape, 1, b, first_token + first, g) = StoredScale(scales[g]);
    *Slot(out, shape, 2, b, first_token + first, g) = FloatToHalf(zeros[g]);
  }
}

// One thread a byte of codes.
template <int kBits>
__global__ void PackKernel(BlockShape shape, DenseView x, KvView out, int64_t first_token,
                           const float* all_solved) {
  constexpr int kPerByte = 8 / kBits;
  const int64_t row_bytes = shape.head_dim / kPerByte, run_bytes = shape.group / kPerByte;
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (index >= x.batch * x.heads * x.tokens * row_bytes) return;
  const int64_t byte = index % row_bytes, t = index / row_bytes % x.tokens;
  const int64_t h = index / row_bytes / x.tokens % x.heads, b = index / row_bytes / x.tokens / x.heads;
  const int64_t block = b * (x.tokens / shape.tokens) + t / shape.tokens;
  const float* scales = all_solved + block * 2 * shape.groups();
  const float* zeros = scales + shape.groups();
  unsigned packed = 0;
  for (int j = 0; j < kPerByte; ++j) {
    const int64_t d = byte / run_bytes * shape.group + byte % run_bytes + j * run_bytes;
    const int64_t g = shape.GroupOf((h * shape.tokens + t % shape.tokens) * shape.head_dim + d);
    const float value = LoadElement(x.data, x.dtype, Offset(x, b, h, t, d));
    packed |= static_cast<unsigned>(RoundCode(value * scales[g] + zeros[g], kMaxCode<kBits>))
              << (j * kBits);
  }
  CodeRow<kBits>(out, b, h, first_token + t)[byte] = static_cast<uint8_t>(packed);
}

// One thread a byte of codes.
template <int kBits>
__global__ void DecodeKernel(BlockShape shape, KvView in, int64_t first_token, DenseView out) {
  constexpr int kPerByte = 8 / kBits;
  const int64_t row_bytes = shape.head_dim / kPerByte, run_bytes = shape.group / kPerByte;
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (index >= out.batch * out.heads * out.tokens * row_bytes) return;
  const int64_t byte = index % row_bytes, t = index / row_bytes % out.tokens;
  const int64_t h = index / row_bytes / out.tokens % out.heads;
  const int64_t b = index / row_bytes / out.tokens / out.heads;
  const int64_t block_first = first_token + t / shape.tokens * shape.tokens;
  const unsigned packed = CodeRow<kBits>(in, b, h, first_token + t)[byte];
  for (int j = 0; j < kPerByte; ++j) {
    const int64_t d = byte / run_bytes * shape.group + byte % run_bytes + j * run_bytes;
    const int64_t g = shape.GroupOf((h * shape.tokens + t % shape.tokens) * shape.head_dim + d);
    const float s = HalfToFloat(*Slot(in, shape, 1, b, block_first, g));
    const float z = HalfToFloat(*Slot(in, shape, 2, b, block_first, g));
    const float code = static_cast<float>((packed >> (j * kBits)) & ((1 << kBits) - 1));
    StoreElement(out.data, out.dtype, Offset(out, b, h, t, d), (code - z) * s);
  }
}

template <int kBits, bool kAcross>
void EncodeCuda(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out,
                void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const BlockShape shape = ShapeOf(out, params, kAcross);
  const int64_t blocks = x.batch * (x.tokens / shape.tokens), groups = shape.groups();
  if (blocks == 0) return;
  float* scratch = nullptr;  // scales and zero points in float32, and errors, of all groups
  Check(cudaMallocAsync(reinterpret_cast<void**>(&scratch), blocks * groups * 3 * sizeof(float), stream),
        "scratch memory");
  float* errors = scratch + blocks * groups * 2;
  const unsigned grid = static_cast<unsigned>(blocks);
  WithGroup(shape.group, [&](auto group) {
    SolveKernel<kBits, group() / 32><<<grid, 1024, 0, stream>>>(shape, x, out, first_token, scratch,
                                                                errors);
  });
  PackKernel<kBits><<<GridFor(x.batch * x.heads * x.tokens * x.head_dim * kBits / 8), 256, 0, stream>>>(
      shape, x, out, first_token, scratch);
  const cudaError_t launched = cudaGetLastError();
  Check(cudaFreeAsync(scratch, stream), "scratch memory");
  Check(launched, "encode");
}

template <int kBits, bool kAcross>
void DecodeCuda(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out,
                void* stream) {
  const BlockShape shape = ShapeOf(in, params, kAcross);
  const int64_t bytes = out.batch * out.heads * out.tokens * out.head_dim * kBits / 8;
  if (bytes == 0) return;
  DecodeKernel<kBits><<<GridFor(bytes), 256, 0, static_cast<cudaStream_t>(stream)>>>(
      shape, in, first_token, out);
  Check(cudaGetLastError(), "decode");
}

#endif  // __CUDACC__

// ---- the rows

template <int kBits, bool kAcross>
Codec MakeCodec() {
  Codec codec;
  codec.bits = kBits;
  codec.default_group = 64;
  codec.grouping = kAcross ? "64 elements N/64 apart over all heads and tokens of a block"
                           : "64 consecutive channels of one token";
  codec.block_wide = kAcross;
  codec.planes = [](int64_t heads, int64_t head_dim, const CodecParams& params) {
    return Planes(heads, head_dim, params, kBits);
  };
  codec.encode = Encode<kBits, kAcross>;
  codec.decode = Decode<kBits, kAcross>;
#ifdef __CUDACC__
  codec.encode_cuda = EncodeCuda<kBits, kAcross>;
  codec.decode_cuda = DecodeCuda<kBits, kAcross>;
#endif
  SetUniformBudget(codec);
  return codec;
}

constexpr char kSource[] = "hqq 0.2.8 (Badri & Shaji 2023), groups as in transformers' QuantizedCache";

template <int kBits>
Scheme Plain(const char* name) {
  return {.name = name, .source = kSource, .keys = MakeCodec<kBits, false>(),
          .values = MakeCodec<kBits, false>(), .refused = ""};
}
template <int kBits>
Scheme Kivi(const char* name) {
  return {.name = name, .source = kSource, .keys = MakeCodec<kBits, true>(),
          .values = MakeCodec<kBits, false>(), .refused = ""};
}

const RegisterScheme kInt8{Plain<8>("int8-hqq")};
const RegisterScheme kInt4{Plain<4>("int4-hqq")};
const RegisterScheme kInt2{Plain<2>("int2-hqq")};
const RegisterScheme kInt4Kivi{Kivi<4>("int4-hqq-kivi")};
const RegisterScheme kInt2Kivi{Kivi<2>("int2-hqq-kivi")};

}  // namespace
}  // namespace kvq
