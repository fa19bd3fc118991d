// HQQ's arithmetic (kernels/schemes/hqq.cc says what it computes), shared by CPU and GPU, and its CUDA kernels, which give the
// CPU's bits. Included by schemes/hqq.cc alone.
#pragma once

#include <cmath>

#include "kernels/code_row.h"
#include "kernels/groups.h"

namespace kvq::hqq {

inline constexpr int kIterations = 20;
inline constexpr float kLargestZero = 60000;  // the solver moves it by less than a code; fp16 ends at 65504
inline constexpr float kLargestHalf = 65504;

// ---- arithmetic of one element, shared by CPU and GPU

// Where |d| <= 0.17, |d|^-0.3 / 10 > |d|: shrink takes all of it.
inline constexpr float kAllTaken = 0.17f;

// 2^(-0.3 e) / 10 for every exponent a float can have, biased by 127; 0 for that of infinity.
struct PowerTable {
  float of[256];
  // By the bits of an exponent, in their place.
  KVQ_HD float At(uint32_t exponent) const {
#ifdef __CUDACC__  // one instruction instead of two
    return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(of) + (exponent >> 21));
#else
    return of[exponent >> 23];
#endif
  }
};
inline constexpr PowerTable kPowers = [] {
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
KVQ_HD inline uint32_t ClipExponent(float d, float inverse) { return FloatBits(std::fabs(d) * inverse) & 0x7F800000; }
// `powers` is the table, or what it has for this exponent.
template <typename Powers>
KVQ_HD inline float Clip(float d, float inverse, const ClipPolynomial& polynomial, const Powers& powers) {
  const float magnitude = std::fabs(d);
  const uint32_t a = FloatBits(magnitude * inverse), exponent = a & 0x7F800000;
  const float m = BitsFloat(a - exponent + 0x3F800000);
  const float(&c)[6] = polynomial.of;  // written out: a loop here is one that GCC does not unroll before it makes vectors
  const float limit = fmaf(fmaf(fmaf(fmaf(fmaf(c[0], m, c[1]), m, c[2]), m, c[3]), m, c[4]), m, c[5]) * powers.At(exponent);
  return BitsFloat(FloatBits(Smaller(limit, magnitude)) | (FloatBits(d) & 0x80000000));
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

// ---- CUDA: the same bits
//
// A group's iterations depend on nothing but the group; only where they stop depends on its whole block. So each
// group runs all of them in registers and leaves z and its error of every one; then each block finds its
// stop; then codes are made with the z of that iteration. Groups seldom run long: when z has not moved, it
// never will again.

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
  KVQ_HD uint32_t all() const { return blocks * groups; }
};
inline constexpr int64_t kGroupBytes = (2 * kIterations + 1) * 4 + 1, kBlockBytes = (kIterations + 2) * 4;
inline constexpr int kSolveThreads = 128;
inline constexpr int kDecodeTokens = 4;  // of a thread that decodes

// How a block's numbers split into rows, heads and sequences, without divisions.
struct Places {
  Divisor groups, head_dim, tokens, heads, blocks;  // of a block; blocks of a sequence
  KVQ_HD Places(const BlockShape& shape, const DenseView& x)
      : groups(shape.groups()), head_dim(shape.head_dim), tokens(shape.tokens), heads(shape.heads),
        blocks(x.tokens / shape.tokens) {}
};

#ifdef __CUDACC__

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

// kEach elements a lane: the more, the fewer instructions for sums; the fewer, the fewer groups of a warp wait for each
// other to stand still. The bounds on blocks were the best of those tried on an H200.
#if __CUDA_ARCH__ >= 1000  // needs a few registers more
inline constexpr int kSolveBlocks = 5;
#else
inline constexpr int kSolveBlocks = 6;
#endif
template <int n, bool kAcross, int kEach>
__global__ void __launch_bounds__(kSolveThreads, kEach == 16 ? kSolveBlocks : 10)
    SolveKernel(BlockShape shape, const Places places, DenseView x, float m, Solved solved) {
  constexpr int kLanes = n / kEach;
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
  first_token += TokenBase(out);
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
      s[i] = HalfToFloat(reinterpret_cast<const uint16_t*>(in.planes[1] + head * in.plane_stride[1])[slot]);
      z[i] = HalfToFloat(reinterpret_cast<const uint16_t*>(in.planes[2] + head * in.plane_stride[2])[slot]);
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
        s[i] = HalfToFloat(*Slot(in, shape, 1, b, first_token + t - in_block, g));
        z[i] = HalfToFloat(*Slot(in, shape, 2, b, first_token + t - in_block, g));
      }
      const uint32_t word = chunks[i][channel / 2] >> (field * kBits);
      values[channel] = (CodeToFloat(word, 16 * (channel % 2), kBits) - z[i]) * s[i];
    }
    StoreEight<kType>(out, Offset(out, b, h, t, eight * 8), wide, values);
  }
}

#endif  // __CUDACC__

}  // namespace kvq::hqq
