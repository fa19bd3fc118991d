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
// with shrink(d) = sign(d) max(|d| - |d|^(p-1) / beta, 0), p = 0.7, beta = 10, rounding half to even. Computed is the
// same in other words, which cost half as much: with d = x s + z - q, an error in codes, and clip(d) what shrink
// takes from it, q - (x - e) s = q + (d - clip(d)) - x s, whose last term has the same mean in all iterations.
// The iterations end when the mean |x - r| over everything encoded together (a block: all heads and
// block_tokens tokens of a sequence) no longer falls.
//
// Groups. Plain: G consecutive channels of one token (the package's axis 1). kivi: keys by the package's
// axis 0, as the reference study's library calls it: the block [heads, tokens, head_dim] as a row of N
// numbers, cut into G rows of N / G; a group is a column. So a group spans all heads and tokens N / (G
// head_dim) apart, and one channel only if that is a whole number. Values as in plain.
//
// Exact bytes: bits / 8 + 4 / G per element (4.5 bits for int4 at G = 64). Planes, per token and head:
//   codes   head_dim bits / 8, see kernels/code_row.h
//   scales  head_dim / G fp16 numbers 1 / s;  zeros  likewise z.  For kivi group c of a block has slot c,
//           counted over head, token, head_dim / G: as many slots as groups.
// Refused: head_dim that is no multiple of G; other G; with 2 bits, head_dim that is no multiple of 64.
//
// A group that is so far from zero for its range that z would not fit fp16 gets the largest scale with which
// it does; the package would store infinity. A group with NaN or infinity decodes to NaN.
//
// CPU and GPU, every instruction set, give the same bits: nothing is fused but what says fma (-ffp-contract=off,
// --fmad=false), and sums run over a fixed tree.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "kernels/code_row.h"
#include "kernels/decode_attention.cuh"
#include "kernels/groups.h"

namespace kvq {
namespace {

constexpr int kIterations = 20;
constexpr float kLargestZero = 60000;  // the solver moves it by less than a code; fp16 ends at 65504
constexpr float kLargestHalf = 65504;

// ---- arithmetic of one element, shared by CPU and GPU

// Where |d| <= 0.17, |d|^-0.3 / 10 > |d|: shrink takes all of it.
constexpr float kAllTaken = 0.17f;

// 2^(-0.3 e) / 10 for every exponent a float can have, biased by 127; 0 for that of infinity.
struct PowerTable {
  float of[256];
};
constexpr PowerTable kPowers = [] {
  PowerTable table{};
  double power = 29460684610.010017;  // 2^(0.3 * 127) / 10
  for (int e = 0; e < 255; ++e, power *= 0.81225239635623547) table.of[e] = static_cast<float>(power);  // 2^-0.3
  return table;
}();

// What shrink takes from an error: limited to +- |d|^-0.3 / 10. For a = |d| = 2^e m, a^-0.3 = 2^(-0.3 e) m^-0.3: the
// table times a polynomial for 1 <= m < 2, relative error below 5e-6. Here d is in codes, d inverse in units of x,
// and the limit back in codes by the polynomial's coefficients, which are multiplied by s.
struct ClipPolynomial {
  float of[6];
};
KVQ_HD inline ClipPolynomial ClipPolynomialFor(float s) {
  return {{-0.014653758f * s, 0.13453212f * s, -0.51638743f * s, 1.0785673f * s, -1.3724519f * s, 1.6903888f * s}};
}
KVQ_HD inline float Clip(float d, float inverse, const ClipPolynomial& polynomial, const PowerTable& powers) {
  const uint32_t sign = FloatBits(d) & 0x80000000, magnitude = FloatBits(d) & 0x7FFFFFFF;
  const uint32_t a = FloatBits(BitsFloat(magnitude) * inverse);
  const float m = BitsFloat((a & 0x007FFFFF) | 0x3F800000);
  float limit = polynomial.of[0];
  for (int k = 1; k < 6; ++k) limit = fmaf(limit, m, polynomial.of[k]);
  limit *= powers.of[a >> 23 & 0xFF];
  return BitsFloat(FloatBits(Smaller(limit, BitsFloat(magnitude))) | sign);
}

// Scale and zero point that the solver starts from; both NaN where something in the group is not finite.
KVQ_HD inline void InitialScale(const GroupRange& group, float m, float& s, float& z) {
  const float low = group.low, range = group.high - low;
  s = range <= 1e-4f ? 1.0f : m / range;
  s = s < 2e4f ? s : 2e4f;
  const float far = low < 0 ? -low : low;
  if (far * s > kLargestZero) s = kLargestZero / far;
  z = -low * s + group.poison;
  if (z != z) s = z;
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
};

// Where slot g (over head, token, head_dim / group) of a block of metadata lies.
KVQ_HD inline uint16_t* Slot(const KvView& view, const BlockShape& shape, int plane, int64_t b,
                             int64_t first_token, int64_t g) {
  const int64_t per_token = shape.head_dim / shape.group;
  const uint32_t slot = static_cast<uint32_t>(g), per_head = static_cast<uint32_t>(shape.tokens * per_token);
  const uint32_t h = slot / per_head, rest = slot % per_head;  // 64-bit division is slow on a GPU
  return reinterpret_cast<uint16_t*>(view.planes[plane] +
                                     (b * view.heads + h) * view.plane_stride[plane]) +
         first_token * per_token + rest;
}

// ---- CPU: the definition, a group at a time

template <int n>
KVQ_VECTOR void InitGroup(const float* x, float m, float* s, float* z) {
  InitialScale(RangeOf<n>(x), m, *s, *z);
}

// Mean of x s + z.
template <int n>
KVQ_VECTOR float MeanOf(const float* x, float s, float z) {
  float u[n];
  for (int i = 0; i < n; ++i) u[i] = x[i] * s + z;
  return TreeSum<n>(u) / n;
}

// One iteration: moves z, which began as `first` with a mean of x s + first of `mean`; returns the sum of |x - r|
// before that.
template <int n>
KVQ_VECTOR float StepGroup(const float* x, float m, float s, float first, float mean, float* z) {
  float target[n], error[n], distance[n], largest[n];
  const float zero = *z, inverse = 1.0f / s;
  for (int i = 0; i < n; ++i) {
    const float u = x[i] * s + zero;
    target[i] = RoundCode(u, m);
    error[i] = u - target[i];
    largest[i] = distance[i] = std::fabs(error[i]);
  }
  for (int stride = n / 2; stride > 0; stride /= 2) {
    for (int i = 0; i < stride; ++i) {
      largest[i] = largest[i] > largest[i + stride] ? largest[i] : largest[i + stride];
    }
  }
  if (largest[0] * inverse > kAllTaken) {
    const ClipPolynomial polynomial = ClipPolynomialFor(s);
    for (int i = 0; i < n; ++i) target[i] += error[i] - Clip(error[i], inverse, polynomial, kPowers);
  }
  *z = first + (TreeSum<n>(target) / n - mean);
  return TreeSum<n>(distance) * inverse;
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
  std::vector<float> first_zeros(groups), means(groups);
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
  ForEach(parallel, groups, [&](int64_t g) {
    InitGroup<n>(&values[g * n], m, &scales[g], &zeros[g]);
    first_zeros[g] = zeros[g];
    means[g] = MeanOf<n>(&values[g * n], scales[g], zeros[g]);
  });
  float best = INFINITY;
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    ForEach(parallel, groups, [&](int64_t g) {
      errors[g] = StepGroup<n>(&values[g * n], m, scales[g], first_zeros[g], means[g], &zeros[g]);
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
    PackRow<kBits>(&codes[row * row_size], row_size, packed);
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
    std::vector<float> values(shape.head_dim);
    UnpackRow<kBits>(packed, shape.head_dim, values.data());
    const int64_t flat = row * shape.head_dim;
    for (int64_t d = 0; d < shape.head_dim;) {
      if (!shape.across) {
        const int64_t g = (flat + d) / n;
        ScaleRun(&values[d], n, zeros[g], scales[g]);
        d += n;
      } else {
        // Consecutive elements belong to consecutive groups, around the end.
        const int64_t g = (flat + d) % groups, run = std::min(shape.head_dim - d, groups - g);
        ScaleEach(&values[d], run, &zeros[g], &scales[g]);
        d += run;
      }
    }
    StoreRow(values.data(), shape.head_dim, out.dtype, offset, out.data);
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
  if (head_dim * bits % 128 != 0) {
    throw InputError("codes of ", bits, " bits come in runs of ", 128 / bits, " channels: head_dim ", head_dim,
                     " is no multiple of that");
  }
  return {{"codes", head_dim * bits / 8},
          {"scales", head_dim / group * 2},
          {"zeros", head_dim / group * 2}};
}

// ---- CUDA: the same bits
//
// A group's iterations depend on nothing but the group; only where they stop depends on its whole block. So each
// group runs all of them in registers and leaves z and its error of every one; then each block finds its
// stop; then codes are made with the z of that iteration. Groups seldom run long: when z has not moved, it
// never will again.

#ifdef __CUDACC__

// Of the groups of some blocks, block by block.
struct Solved {
  uint32_t first_block, blocks, groups;  // groups of one block
  float* scales;                         // [blocks, groups]
  float* zeros;                          // [kIterations, blocks, groups], after the iteration, up to `settled`
  float* errors;                         // likewise, the sum of |x - r| in it
  float* means;                          // [blocks, kIterations], of |x - r|
  int* arrived;                          // [blocks], of means
  int* stops;                            // [blocks], the last iteration
  uint8_t* settled;                      // [blocks, groups], the iteration that all later ones repeat
  __host__ __device__ uint32_t all() const { return blocks * groups; }
};
constexpr int64_t kGroupBytes = (2 * kIterations + 1) * 4 + 1, kBlockBytes = (kIterations + 2) * 4;
constexpr int kSolveThreads = 128, kSolveEach = 8;

// How a block's numbers split into rows, heads and sequences, without divisions.
struct Places {
  Divisor groups, head_dim, tokens, heads, blocks;  // of a block; blocks of a sequence
  Places(const BlockShape& shape, const DenseView& x)
      : groups(shape.groups()), head_dim(shape.head_dim), tokens(shape.tokens), heads(shape.heads),
        blocks(x.tokens / shape.tokens) {}
};

__device__ const PowerTable kDevicePowers = kPowers;

// TreeSum of a group whose elements lane, lane + kLanes, ... are in one lane of kLanes; all of them get it.
template <int kLanes, int kEach, int kStride = kEach / 2>
__device__ __forceinline__ float LanesTreeSum(float (&x)[kEach]) {
#pragma unroll
  for (int i = 0; i < kStride; ++i) x[i] += x[i + kStride];
  if constexpr (kStride > 1) {
    return LanesTreeSum<kLanes, kEach, kStride / 2>(x);
  } else {
    float sum = x[0];
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    return sum;
  }
}

// Elements of group `g` of a block, as LanesTreeSum wants them.
template <int n, bool kAcross, int kLanes, int kEach>
__device__ __forceinline__ void LoadGroup(const BlockShape& shape, const Places& places, const DenseView& x,
                                          uint32_t block, uint32_t g, int lane, float (&values)[kEach]) {
  const auto [b, block_of_sequence] = places.blocks.Of(block);
  const auto place = [&](uint32_t flat) {
    const auto [row, channel] = places.head_dim.Of(flat);
    const auto [head, token] = places.tokens.Of(row);
    return Offset(x, b, head, int64_t{block_of_sequence} * shape.tokens + token, channel);
  };
  const int64_t start = kAcross ? 0 : place(g * n) + lane;
  const auto offset = [&](int i) {
    return kAcross ? place((lane + i * kLanes) * places.groups.divisor + g) : start + i * kLanes;
  };
  if (x.dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[i] = static_cast<const float*>(x.data)[offset(i)];
    return;
  }
  uint16_t raw[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) raw[i] = static_cast<const uint16_t*>(x.data)[offset(i)];
  float unused;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (x.dtype == DType::kFloat16) UnpackTwo<DType::kFloat16>(raw[i], values[i], unused);
    else values[i] = BFloat16ToFloat(raw[i]);
  }
}

// One iteration of StepGroup: the target's sum and the sum of |x - r|. Without kClips it takes clip(d) for d and tells
// by `beyond` if that was wrong anywhere.
template <int kLanes, bool kClips, int kEach>
__device__ __forceinline__ float Step(const float (&scaled)[kEach], float m, float z, float inverse,
                                      const ClipPolynomial& polynomial, const PowerTable& powers, float& error,
                                      bool& beyond) {
  float distance[kEach], target[kEach], largest = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float u = scaled[i] + z, q = RoundCode(u, m), d = u - q;
    distance[i] = fabsf(d);
    target[i] = kClips ? q + (d - Clip(d, inverse, polynomial, powers)) : q;
    if constexpr (!kClips) largest = fmaxf(largest, distance[i]);
  }
  beyond = largest * inverse > kAllTaken;
  error = LanesTreeSum<kLanes>(distance) * inverse;
  return LanesTreeSum<kLanes>(target);
}

// Eight elements a lane: few enough that the groups of one warp stand still at about the same time.
template <int n, bool kAcross>
__global__ void __launch_bounds__(kSolveThreads) SolveKernel(BlockShape shape, const Places places, DenseView x, float m,
                                                             Solved solved) {
  constexpr int kEach = kSolveEach, kLanes = n / kEach;
  __shared__ PowerTable powers;
  for (int i = threadIdx.x; i < 256; i += kSolveThreads) powers.of[i] = kDevicePowers.of[i];
  __syncthreads();
  const uint32_t all = solved.all();
  const uint32_t index = (blockIdx.x * kSolveThreads + threadIdx.x) / kLanes;
  const uint32_t id = index < all ? index : all - 1;  // lanes past the end go along and store nothing
  const int lane = threadIdx.x % kLanes;
  const bool stores = lane == 0 && index < all;
  float values[kEach], scaled[kEach];
  const auto [block, g] = places.groups.Of(id);
  WaitForPredecessors();
  LoadGroup<n, kAcross, kLanes>(shape, places, x, solved.first_block + block, g, lane, values);
  float low = values[0], high = values[0];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
    scaled[i] = values[i] * 0;
  }
#pragma unroll
  for (int stride = kLanes / 2; stride > 0; stride /= 2) {
    const float other_low = __shfl_xor_sync(~0u, low, stride), other_high = __shfl_xor_sync(~0u, high, stride);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  float s, first;
  InitialScale({low, high, LanesTreeSum<kLanes>(scaled)}, m, s, first);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    scaled[i] = values[i] * s;
    values[i] = scaled[i] + first;
  }
  const float mean = LanesTreeSum<kLanes>(values) / n, inverse = 1.0f / s;
  const ClipPolynomial polynomial = ClipPolynomialFor(s);
  if (stores) solved.scales[id] = s;
  if (stores && g == 0) solved.arrived[block] = 0;
  float* zeros = solved.zeros + id;
  float* errors = solved.errors + id;

  float z = first;
  int settled = kIterations;
  bool clips = false;
#pragma unroll 1
  for (int iteration = 0; iteration < kIterations; ++iteration, zeros += all, errors += all) {
    float error, target;
    bool beyond = false;
    if (!clips) {
      target = Step<kLanes, false>(scaled, m, z, inverse, polynomial, powers, error, beyond);
      clips = __any_sync(~0u, beyond);
    }
    if (clips) target = Step<kLanes, true>(scaled, m, z, inverse, polynomial, powers, error, beyond);
    const float moved = first + (target / n - mean);
    if (stores && iteration <= settled) *zeros = moved, *errors = error;
    if (settled > iteration && (moved == z || (z != z && moved != moved))) settled = iteration;
    z = moved;
    if (__all_sync(~0u, settled <= iteration)) break;  // the rest is more of the same
  }
  if (stores) solved.settled[id] = static_cast<uint8_t>(settled < kIterations ? settled : kIterations - 1);
  LaunchDependents();
}

// One thread block an iteration of a block: ErrorSum. The last one of a block finds where the mean no longer falls.
__global__ void __launch_bounds__(256) StopKernel(Solved solved, int64_t group) {
  __shared__ double lanes[128];
  const uint32_t thread = threadIdx.x, block = blockIdx.x / kIterations, iteration = blockIdx.x % kIterations;
  const uint32_t begin = block * solved.groups;
  double sum = 0;
  WaitForPredecessors();
#pragma unroll 8
  for (uint32_t g = thread; g < solved.groups; g += 256) {
    const uint32_t row = min(iteration, uint32_t{solved.settled[begin + g]});
    sum += solved.errors[int64_t{row} * solved.all() + begin + g];
  }
  for (uint32_t stride = 128; stride >= 32; stride /= 2) {
    if (thread >= stride && thread < 2 * stride) lanes[thread - stride] = sum;
    __syncthreads();
    if (thread < stride) sum += lanes[thread];
    __syncthreads();
  }
  if (thread >= 32) return;
  for (int stride = 16; stride > 0; stride /= 2) sum += __shfl_down_sync(~0u, sum, stride);
  if (thread != 0) return;
  float* means = solved.means + block * kIterations;
  means[iteration] = static_cast<float>(sum / static_cast<double>(int64_t{solved.groups} * group));
  if (ptx::AddInOrder(&solved.arrived[block], 1) != kIterations - 1) return;
  float all[kIterations], best = INFINITY;
#pragma unroll
  for (int i = 0; i < kIterations; ++i) all[i] = __ldcg(means + i);
  int stop = kIterations - 1;
#pragma unroll
  for (int i = 0; i < kIterations; ++i) {
    if (stop == kIterations - 1 && !(all[i] < best)) stop = i;
    best = all[i];
  }
  solved.stops[block] = stop;
}

// One thread a word of codes, see code_row.h; and one a group for scale and zero point. `pairs`: two neighbouring
// channels lie in one aligned word of x.
template <int kBits, int n, bool kAcross>
__global__ void __launch_bounds__(256) PackKernel(BlockShape shape, const Places places, const Divisor chunk_words,
                                                  DenseView x, bool pairs, KvView out, int64_t first_token,
                                                  Solved solved) {
  constexpr int kRun = kRunChannels<kBits>;
  const uint32_t index = blockIdx.x * 256 + threadIdx.x, all = solved.all();
  WaitForPredecessors();
  const auto zero_of = [&](uint32_t block, uint32_t id) {
    const uint32_t row = min(uint32_t{solved.settled[id]}, static_cast<uint32_t>(solved.stops[block]));
    return solved.zeros[int64_t{row} * all + id];
  };
  if (index < all) {
    const auto [block, slot] = places.groups.Of(index);
    const auto [b, block_of_sequence] = places.blocks.Of(solved.first_block + block);
    const int64_t token = first_token + int64_t{block_of_sequence} * shape.tokens;
    *Slot(out, shape, 1, b, token, slot) = StoredScale(solved.scales[index]);
    *Slot(out, shape, 2, b, token, slot) = FloatToHalf(zero_of(block, index));
  }
  const auto [row_and_chunk, run] = chunk_words.Of(index);
  const uint32_t chunk = row_and_chunk % 4;
  const auto [head_and_block, token] = places.tokens.Of(row_and_chunk / 4);
  const auto [block, h] = places.heads.Of(head_and_block);
  if (block >= solved.blocks) return;
  const auto [b, block_of_sequence] = places.blocks.Of(solved.first_block + block);
  const int64_t t = int64_t{block_of_sequence} * shape.tokens + token;
  const int64_t offset = Offset(x, b, h, t, run * kRun + 2 * chunk);
  const uint32_t flat = (h * places.tokens.divisor + token) * places.head_dim.divisor + run * kRun + 2 * chunk;
  float values[16 / kBits][2];
#pragma unroll
  for (int field = 0; field < 16 / kBits; ++field) {
    if (pairs && x.dtype != DType::kFloat32) {
      const uint32_t pair =
          *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(x.data) + offset + field * 8);
      if (x.dtype == DType::kFloat16) UnpackTwo<DType::kFloat16>(pair, values[field][0], values[field][1]);
      else UnpackTwo<DType::kBFloat16>(pair, values[field][0], values[field][1]);
      continue;
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      values[field][side] = LoadElement(x.data, x.dtype, offset + field * 8 + side);
    }
  }
  uint32_t packed = 0;
  float s = 0, z = 0;
#pragma unroll
  for (int field = 0; field < 16 / kBits; ++field) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (kAcross || (field * 8 % n == 0 && side == 0)) {
        const uint32_t g = block * places.groups.divisor +
                           (kAcross ? places.groups.Of(flat + field * 8 + side).rest : (flat + field * 8) / n);
        s = solved.scales[g], z = zero_of(block, g);
      }
      packed |= static_cast<uint32_t>(RoundCode(values[field][side] * s + z, kMaxCode<kBits>))
                << (field * kBits + 16 * side);
    }
  }
  reinterpret_cast<uint32_t*>(CodeRow<kBits>(out, b, h, first_token + t))[chunk * chunk_words.divisor + run] = packed;
}

// A thread decodes eight neighbouring channels, a field of a word of each chunk, of kDecodeTokens tokens that are
// `rows` apart. Sequence and head are the block's z and y: division is slow.
constexpr int kDecodeTokens = 4;

template <int kBits, DType kType, int n, bool kAcross>
__global__ void __launch_bounds__(256) DecodeKernel(BlockShape shape, KvView in, int64_t first_token, DenseView out,
                                                    bool wide, uint32_t rows) {
  constexpr int kFields = 16 / kBits, kRun = kRunChannels<kBits>;
  const uint32_t head_dim = static_cast<uint32_t>(shape.head_dim), eights = head_dim / 8, words = head_dim / kRun;
  const uint32_t index = blockIdx.x * 256 + threadIdx.x, first = index / eights, eight = index % eights;
  const uint32_t tokens = static_cast<uint32_t>(out.tokens);
  const int64_t b = blockIdx.z, h = blockIdx.y;
  if (first >= rows) return;
  const int field = eight % kFields;
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(CodeRow<kBits>(in, b, h, first_token)) + eight / kFields;
  uint32_t chunks[kDecodeTokens][4];
  float s[kDecodeTokens], z[kDecodeTokens];
#pragma unroll
  for (int i = 0; i < kDecodeTokens; ++i) {
    const uint32_t t = first + i * rows;
    if (t >= tokens) break;
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) chunks[i][chunk] = codes[(t * 4 + chunk) * words];
    if constexpr (!kAcross) {
      const int64_t slot = (first_token + t) * (head_dim / n) + eight * 8 / n, head = b * in.heads + h;
      s[i] = LoadHalf(reinterpret_cast<const uint16_t*>(in.planes[1] + head * in.plane_stride[1]) + slot);
      z[i] = LoadHalf(reinterpret_cast<const uint16_t*>(in.planes[2] + head * in.plane_stride[2]) + slot);
    }
  }
#pragma unroll
  for (int i = 0; i < kDecodeTokens; ++i) {
    const uint32_t t = first + i * rows;
    if (t >= tokens) break;
    float values[8];
#pragma unroll
    for (int channel = 0; channel < 8; ++channel) {
      if constexpr (kAcross) {
        const uint32_t block_tokens = static_cast<uint32_t>(shape.tokens), in_block = t % block_tokens;
        const uint32_t flat = (static_cast<uint32_t>(h) * block_tokens + in_block) * head_dim + eight * 8 + channel;
        const uint32_t g = flat % static_cast<uint32_t>(shape.groups());
        s[i] = LoadHalf(Slot(in, shape, 1, b, first_token + t - in_block, g));
        z[i] = LoadHalf(Slot(in, shape, 2, b, first_token + t - in_block, g));
      }
      const uint32_t word = chunks[i][channel / 2] >> (field * kBits);
      values[channel] = (CodeToFloat(word, 16 * (channel % 2), kBits) - z[i]) * s[i];
    }
    StoreEight<kType>(out, Offset(out, b, h, t, eight * 8), wide, values);
  }
}

template <int kBits, int n, bool kAcross>
void EncodeBlocks(const BlockShape& shape, const DenseView& x, int64_t first_token, const KvView& out,
                  const Solved& solved, cudaStream_t stream) {
  const int64_t words = solved.blocks * shape.heads * shape.tokens * shape.head_dim * kBits / 32;
  const Places places(shape, x);
  LaunchEarly("hqq encode", SolveKernel<n, kAcross>,
              GridFor(int64_t{solved.all()} * (n / kSolveEach), kSolveThreads), kSolveThreads, 0, stream, shape, places, x,
              kMaxCode<kBits>, solved);
  LaunchEarly("hqq encode", StopKernel, solved.blocks * kIterations, 256, 0, stream, solved, int64_t{n});
  LaunchEarly("hqq encode", PackKernel<kBits, n, kAcross>, GridFor(std::max<int64_t>(words, solved.all())), 256, 0,
              stream, shape, places, Divisor(shape.head_dim / kRunChannels<kBits>), x, IsWide(x), out, first_token,
              solved);
}

template <int kBits, bool kAcross>
void EncodeCuda(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out,
                void* stream_pointer) {
  constexpr int64_t kScratchBytes = int64_t{64} << 20;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const BlockShape shape = ShapeOf(out, params, kAcross);
  const int64_t all_blocks = x.batch * (x.tokens / shape.tokens), groups = shape.groups();
  if (all_blocks == 0) return;
  if (groups >= int64_t{1} << 24) throw InputError("hqq: a block of ", groups, " groups is too large for a GPU");
  // A bounded number of blocks at a time.
  const int64_t block_bytes = groups * kGroupBytes + kBlockBytes;
  const int64_t most = std::clamp<int64_t>(kScratchBytes / block_bytes, 1, all_blocks);
  auto* scratch = static_cast<float*>(AllocateScratch(most * block_bytes, stream));
  for (int64_t first = 0; first < all_blocks; first += most) {
    const int64_t blocks = std::min(most, all_blocks - first), all = blocks * groups;
    Solved solved{static_cast<uint32_t>(first), static_cast<uint32_t>(blocks), static_cast<uint32_t>(groups), scratch,
                  nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    solved.zeros = solved.scales + all;
    solved.errors = solved.zeros + kIterations * all;
    solved.means = solved.errors + kIterations * all;
    solved.arrived = reinterpret_cast<int*>(solved.means + kIterations * blocks);
    solved.stops = solved.arrived + blocks;
    solved.settled = reinterpret_cast<uint8_t*>(solved.stops + blocks);
    WithGroup(shape.group, [&](auto group) {
      EncodeBlocks<kBits, group(), kAcross>(shape, x, first_token, out, solved, stream);
    });
  }
  Check(cudaFreeAsync(scratch, stream), "scratch memory");
}

template <int kBits, bool kAcross>
void DecodeCuda(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out,
                void* stream) {
  const BlockShape shape = ShapeOf(in, params, kAcross);
  if (out.batch * out.heads * out.tokens == 0) return;
  if (out.tokens * out.head_dim >= int64_t{1} << 31) throw InputError("hqq: too many tokens for one call on a GPU");
  const auto rows = static_cast<uint32_t>((out.tokens + kDecodeTokens - 1) / kDecodeTokens);
  const dim3 grid(GridFor(rows * (out.head_dim / 8)), static_cast<unsigned>(out.heads),
                  static_cast<unsigned>(out.batch));
  WithTypeAndGroup(out.dtype, shape.group, [&](auto type, auto group) {
    DecodeKernel<kBits, type(), group(), kAcross><<<grid, 256, 0, static_cast<cudaStream_t>(stream)>>>(
        shape, in, first_token, out, IsWide(out), rows);
  });
  Check(cudaGetLastError(), "hqq decode");
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
  Scheme scheme{.name = name, .source = kSource, .keys = MakeCodec<kBits, false>(),
                .values = MakeCodec<kBits, false>(), .refused = ""};
#ifdef __CUDACC__
  scheme.decode_attention = decode_attention::Make<kBits>(kBits == 8   ? "fused_decode_int8"
                                                          : kBits == 4 ? "fused_decode_int4"
                                                                       : "fused_decode_int2");
#endif
  return scheme;
}
// Keys of neighbouring channels have different scales, in groups that end with the block: no fused kernel.
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
