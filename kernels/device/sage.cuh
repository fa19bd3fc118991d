// SageAttention (sage.h): what CPU and GPU share, the order of sums, scales and codes; and the kernels.
#pragma once

#include "kernels/device/sage.h"
#include "kernels/device/step.cuh"
#include "kernels/half.h"
#include "kernels/vector_math.h"

namespace kvq::sage {

// Sums over tokens are taken in so many strands, token i in strand i % kStrands, and the strands added in order: first
// within blocks of kSageKeys tokens, then over the blocks. One order, so one mean.
inline constexpr int kStrands = 16;

inline constexpr float kSmallest = 1e-12f;  // magnitude that a scale is made for; what is smaller gets code 0

// Of a block whose largest magnitude has these bits. As bits NaN is above infinity and both above all numbers: what is
// not finite makes a scale that is not, and it shows in the output.
KVQ_HD inline float ScaleOf(uint32_t largest) {
  const uint32_t smallest = FloatBits(kSmallest);
  return BitsFloat(largest > smallest ? largest : smallest) / 127;
}
KVQ_HD inline uint32_t Magnitude(float x) { return FloatBits(x) & 0x7FFFFFFF; }
KVQ_HD inline int8_t CodeOf(float x, float scale) {
  const float code = x / scale;
  return code > -128 && code < 128 ? static_cast<int8_t>(RoundToEven(code)) : 0;  // 0 where the scale is not finite
}

KVQ_HD inline int64_t BlocksOf(int64_t tokens, int64_t block) { return (tokens + block - 1) / block; }
KVQ_HD inline int64_t RowOf(const DenseView& x, int64_t b, int64_t head, int64_t token) {
  return b * x.batch_stride + head * x.head_stride + token * x.token_stride;
}

inline constexpr int kQuantizeThreads = 256;

// Four warps, each with 32 queries of a block and all keys of a tile: both operands that come from shared memory are
// then read once for two products. Queries stay there too: registers hold the sums and the logits, 192 a lane. Two
// blocks a multiprocessor, so that one multiplies while the other takes exponentials.
inline constexpr int kWarps = 4, kThreads = 32 * kWarps, kStages = 2;
inline constexpr int kRowTiles = kSageQueries / kWarps / 16;  // of 16 queries
inline constexpr int kKeyTiles = kSageKeys / 8;

template <int kDim>
struct Tiles {
  static constexpr int kQueryBytes = kSageQueries * kDim, kKeyBytes = kSageKeys * kDim;
  static constexpr int kStageBytes = 3 * kKeyBytes;  // codes of keys, then values in 16 bits
  static constexpr int kBytes = kQueryBytes + kStages * kStageBytes;

  // Rows of kRow bytes lie one behind the other, but for the order of 16-byte granules: so the eight rows of a matrix,
  // which are read in one go, are in different banks. Place(row + 8 i, granule ^ c) = (Place(row, granule) ^ 16 c) +
  // 8 i kRow, so that a lane keeps one place and constants.
  template <int kRow>
  KVQ_HD static int Place(int row, int granule) {
    return row * kRow + ((granule ^ (kRow >= 128 ? row & 7 : row >> 1 & 3)) << 4);
  }
};

#ifdef __CUDACC__

using ptx::Shared;
using step::At;
using step::Pack;

// A thread takes 8 channels, so kDim / 8 of them a token.

// One block a tile of keys of one head.
template <int kDim, bool kBFloat16>
__global__ void __launch_bounds__(kStrands * kDim / 8)
    KeySumsKernel(const __grid_constant__ SageArgs a, const __grid_constant__ SageWorkspace w) {
  __shared__ float strands[kStrands][kDim];
  const int blocks = static_cast<int>(BlocksOf(a.keys.tokens, kSageKeys));
  const int pair = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int strand = threadIdx.x / (kDim / 8), channel = threadIdx.x % (kDim / 8) * 8;
  float sum[8] = {};
#pragma unroll
  for (int i = 0; i < kSageKeys; i += kStrands) {
    const int64_t token = static_cast<int64_t>(block) * kSageKeys + strand + i;
    if (token >= a.keys.tokens) break;
    float x[8];
    step::Load<kBFloat16>(a.keys.data, RowOf(a.keys, pair / a.keys.heads, pair % a.keys.heads, token) + channel, x);
#pragma unroll
    for (int c = 0; c < 8; ++c) sum[c] += x[c];
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) strands[strand][channel + c] = sum[c];
  __syncthreads();
  if (threadIdx.x >= kDim) return;
  float total = 0;
#pragma unroll
  for (int s = 0; s < kStrands; ++s) total += strands[s][threadIdx.x];
  w.key_sums[static_cast<int64_t>(blockIdx.x) * kDim + threadIdx.x] = total;
}

// One block a head.
template <int kDim>
__global__ void __launch_bounds__(kStrands * kDim / 4)
    KeyMeansKernel(const __grid_constant__ SageArgs a, const __grid_constant__ SageWorkspace w) {
  __shared__ float strands[kStrands][kDim];
  const int blocks = static_cast<int>(BlocksOf(a.keys.tokens, kSageKeys));
  const int strand = threadIdx.x / (kDim / 4), channel = threadIdx.x % (kDim / 4) * 4;
  const float* sums = w.key_sums + static_cast<int64_t>(blockIdx.x) * blocks * kDim + channel;
  float sum[4] = {};
#pragma unroll 4
  for (int i = strand; i < blocks; i += kStrands) {
    const float4 x = *reinterpret_cast<const float4*>(sums + static_cast<int64_t>(i) * kDim);
    sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) strands[strand][channel + c] = sum[c];
  __syncthreads();
  if (threadIdx.x >= kDim) return;
  float total = 0;
#pragma unroll
  for (int s = 0; s < kStrands; ++s) total += strands[s][threadIdx.x];
  w.key_means[blockIdx.x * kDim + threadIdx.x] = total / static_cast<float>(a.keys.tokens);
}

// One block a scale.
template <int kDim, bool kBFloat16, bool kKeys>
__global__ void __launch_bounds__(kQuantizeThreads)
    QuantizeKernel(const __grid_constant__ SageArgs a, const __grid_constant__ SageWorkspace w, float factor) {
  constexpr int kTokens = kKeys ? kSageKeys : kSageQueries, kEights = kDim / 8;
  constexpr int kHeld = kTokens * kEights / kQuantizeThreads;
  static_assert(kQuantizeThreads % kEights == 0);  // a thread's channels are the same in all its tokens
  __shared__ uint32_t largest[kQuantizeThreads / 32];
  const DenseView& x = kKeys ? a.keys : a.queries;
  const int blocks = static_cast<int>(BlocksOf(x.tokens, kTokens));
  const int pair = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int channel = threadIdx.x % kEights * 8;
  float mean[8] = {};
  if (kKeys) step::LoadFloats(w.key_means, static_cast<int64_t>(pair) * kDim + channel, mean);
  float rows[kHeld][8];
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t token = static_cast<int64_t>(block) * kTokens + (threadIdx.x + i * kQuantizeThreads) / kEights;
    if (token < x.tokens) {
      step::Load<kBFloat16>(x.data, RowOf(x, pair / x.heads, pair % x.heads, token) + channel, rows[i]);
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      rows[i][c] = token >= x.tokens ? 0 : kKeys ? rows[i][c] - mean[c] : rows[i][c] * factor;
      most = max(most, Magnitude(rows[i][c]));
    }
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) most = max(most, __shfl_xor_sync(~0u, most, lanes));
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kQuantizeThreads / 32; ++warp) most = max(most, largest[warp]);
  const float scale = ScaleOf(most);
  if (threadIdx.x == 0) (kKeys ? w.key_scales : w.query_scales)[blockIdx.x] = scale;
  int8_t* codes = (kKeys ? w.key_codes : w.query_codes) + static_cast<int64_t>(blockIdx.x) * kTokens * kDim;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    uint32_t words[2] = {};
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      words[c / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(CodeOf(rows[i][c], scale))) << c % 4 * 8;
    }
    *reinterpret_cast<uint2*>(codes + (threadIdx.x + i * kQuantizeThreads) * 8) = {words[0], words[1]};
  }
}

template <int kDim, int kRows>
__device__ __forceinline__ void CopyCodes(Shared to, const int8_t* from) {
  constexpr int kGranules = kDim / 16, kPass = kThreads / kGranules;  // rows at a time
  static_assert(kPass % 8 == 0 && kRows % kPass == 0);
  const Shared at = to + Tiles<kDim>::template Place<kDim>(threadIdx.x / kGranules, threadIdx.x % kGranules);
#pragma unroll
  for (int i = 0; i < kRows / kPass; ++i) {
    ptx::CopyAsync(at + i * kPass * kDim, from + (threadIdx.x + i * kThreads) * 16);
  }
}

// `left` tokens from `from` on, which has this thread's granule of its first row; zeros behind them: their weights are
// 0, and 0 times anything must be 0.
template <int kDim>
__device__ __forceinline__ void CopyValues(Shared to, const uint16_t* from, int64_t token_stride, int left) {
  constexpr int kGranules = kDim / 8, kPass = kThreads / kGranules;
  static_assert(kPass % 8 == 0);
  const int row = threadIdx.x / kGranules;
  const Shared at = to + Tiles<kDim>::template Place<2 * kDim>(row, threadIdx.x % kGranules);
#pragma unroll
  for (int i = 0; i < kSageKeys / kPass; ++i) {
    const bool there = row + i * kPass < left;
    ptx::CopyAsyncOrZero(at + i * kPass * 2 * kDim, there ? from + i * kPass * token_stride : from, there);
  }
}

template <bool kBFloat16>
__device__ __forceinline__ void Mma16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kBFloat16) {
    ptx::MmaBFloat16(d, a[0], a[1], a[2], a[3], b0, b1);
  } else {
    ptx::MmaHalf(d, a[0], a[1], a[2], a[3], b0, b1);
  }
}

// Lane 4 g + t has rows g and g + 8 of each tile of 16 queries (h = 0, 1) throughout.
template <int kDim, bool kBFloat16>
__global__ void __launch_bounds__(kThreads, 2)
    AttendKernel(const __grid_constant__ SageArgs a, const __grid_constant__ SageWorkspace w) {
  using T = Tiles<kDim>;
  extern __shared__ __align__(256) std::byte shared[];
  const Shared queries = ptx::SharedAddress(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Heads vary fastest: blocks that run together read the same keys and values. Late queries, who see most, come first.
  const int pairs = static_cast<int>(a.queries.batch * a.queries.heads), pair = blockIdx.x % pairs;
  const int query_blocks = static_cast<int>(BlocksOf(a.queries.tokens, kSageQueries));
  const int block = query_blocks - 1 - blockIdx.x / pairs;
  const int heads = static_cast<int>(a.queries.heads), kv_heads = static_cast<int>(a.keys.heads);
  const int b = pair / heads, head = pair % heads, kv_head = head / (heads / kv_heads);
  const int length = static_cast<int>(a.keys.tokens), n = static_cast<int>(a.queries.tokens);
  const int first = length - n + block * kSageQueries;  // token of the first query
  const int last = min(first + static_cast<int>(kSageQueries), length) - 1;
  const int tiles = last / static_cast<int>(kSageKeys) + 1;
  const int of_keys = (b * kv_heads + kv_head) * static_cast<int>(BlocksOf(length, kSageKeys));
  const int of_queries = pair * query_blocks + block;
  const uint16_t* values = static_cast<const uint16_t*>(a.values.data) +  // the granule that this thread copies first
                           RowOf(a.values, b, kv_head, threadIdx.x / (kDim / 8)) + threadIdx.x % (kDim / 8) * 8;

  const auto copy_tile = [&](int tile) {
    const Shared stage = queries + T::kQueryBytes + tile % kStages * T::kStageBytes;
    const int64_t token = static_cast<int64_t>(tile) * kSageKeys;
    CopyCodes<kDim, kSageKeys>(stage, w.key_codes + static_cast<int64_t>(of_keys + tile) * T::kKeyBytes);
    CopyValues<kDim>(stage + T::kKeyBytes, values + token * a.values.token_stride, a.values.token_stride,
                     length - static_cast<int>(token));
    ptx::CopyCommit();
  };
  CopyCodes<kDim, kSageQueries>(queries, w.query_codes + static_cast<int64_t>(of_queries) * T::kQueryBytes);
  copy_tile(0);

  float sums[kRowTiles][kDim / 8][4] = {};
  // The exponentials' reference, and each lane's share of their sum: not in registers, which are full.
  __shared__ float references[kRowTiles][2][kThreads], l[kRowTiles][2][kThreads];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    references[r][0][threadIdx.x] = references[r][1][threadIdx.x] = -INFINITY;
    l[r][0][threadIdx.x] = l[r][1][threadIdx.x] = 0;
  }
  const int row = warp * 16 * kRowTiles;  // of this warp's first query
  // Where this lane points to in the first matrices of queries, keys and values.
  const Shared query_at = queries + T::template Place<kDim>(row + lane % 16, lane / 16);
  const int key_place = T::template Place<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const int value_place = T::kKeyBytes + T::template Place<2 * kDim>(lane % 16, lane / 16);

  for (int tile = 0; tile < tiles; ++tile) {
    ptx::CopyWait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    if (tile + 1 < tiles) copy_tile(tile + 1);
    const int first_key = tile * static_cast<int>(kSageKeys);
    if (first_key > first + row + 16 * kRowTiles - 1) continue;  // hidden from all queries of this warp
    const Shared stage = queries + T::kQueryBytes + tile % kStages * T::kStageBytes;

    // Products of codes on top of 1.5 * 2^23 as float32 has it: |sum| <= 127^2 128 < 2^22, so that the bits of the sum
    // are the float32 of it, and no conversion is needed.
    constexpr float kMagic = 12582912.0f;
    int32_t dots[kRowTiles][kKeyTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dots[r][k][i] = __float_as_int(kMagic);
      }
    }
#pragma unroll
    for (int step = 0; step < kDim / 32; ++step) {
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        ptx::LoadMatrices((query_at ^ 32 * step) + 16 * r * kDim, q[r]);
      }
#pragma unroll
      for (int k = 0; k < kKeyTiles; k += 2) {
        uint32_t key[4];
        ptx::LoadMatrices(stage + (key_place ^ 32 * step) + 8 * k * kDim, key);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          ptx::MmaInt8(dots[r][k], q[r][0], q[r][1], q[r][2], q[r][3], key[0], key[1]);
          ptx::MmaInt8(dots[r][k + 1], q[r][0], q[r][1], q[r][2], q[r][3], key[2], key[3]);
        }
      }
    }

    float p[kRowTiles][kKeyTiles][4];
    const bool hides = first_key + static_cast<int>(kSageKeys) - 1 > first + row;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[r][k][i] = __int_as_float(dots[r][k][i]) - kMagic;
          const int key = first_key + 8 * k + 2 * t + i % 2, query = first + row + 16 * r + g + i / 2 * 8;
          if (hides && key > query) p[r][k][i] = -INFINITY;
        }
      }
    }

    const float unit = w.query_scales[of_queries] * w.key_scales[of_keys + tile];
    float m[kRowTiles][2], moved[kRowTiles][2];
    bool moves = false;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = -INFINITY;
#pragma unroll
        for (int k = 0; k < kKeyTiles; ++k) top = fmaxf(top, fmaxf(p[r][k][2 * h], p[r][k][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        m[r][h] = references[r][h][threadIdx.x];
        moved[r][h] = fmaxf(m[r][h], top * unit);
        moves |= moved[r][h] != m[r][h];
      }
    }
    if (__any_sync(~0u, moves)) {  // rare once the largest logits have been seen
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float factor = ptx::Exp2(m[r][h] - moved[r][h]);
          m[r][h] = references[r][h][threadIdx.x] = moved[r][h];
          l[r][h][threadIdx.x] *= factor;
#pragma unroll
          for (int c = 0; c < kDim / 8; ++c) sums[r][c][2 * h] *= factor, sums[r][c][2 * h + 1] *= factor;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float sum[2] = {l[r][0][threadIdx.x], l[r][1][threadIdx.x]};
#pragma unroll
      for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[r][k][i] = ptx::Exp2(fmaf(p[r][k][i], unit, -m[r][i / 2]));
          sum[i / 2] += p[r][k][i];
        }
      }
      l[r][0][threadIdx.x] = sum[0], l[r][1][threadIdx.x] = sum[1];
    }

#pragma unroll
    for (int step = 0; step < kSageKeys / 16; ++step) {
      uint32_t weights[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&four)[4] = p[r][2 * step + i / 2];
          weights[r][i] = Pack<kBFloat16>(four[i % 2 * 2], four[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int c = 0; c < kDim / 16; ++c) {
        uint32_t value[4];
        ptx::LoadMatricesTransposed(stage + (value_place ^ 32 * c) + 16 * step * 2 * kDim, value);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          Mma16<kBFloat16>(sums[r][2 * c], weights[r], value[0], value[1]);
          Mma16<kBFloat16>(sums[r][2 * c + 1], weights[r], value[2], value[3]);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = l[r][h][threadIdx.x];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int query = block * static_cast<int>(kSageQueries) + row + 16 * r + 8 * h + g;
      if (query >= n) continue;
      const float inverse = 1 / sum;
      uint16_t* out = static_cast<uint16_t*>(a.out.data) + RowOf(a.out, b, head, query);
#pragma unroll
      for (int c = 0; c < kDim / 8; ++c) {
        *reinterpret_cast<uint32_t*>(out + 8 * c + 2 * t) =
            Pack<kBFloat16>(sums[r][c][2 * h] * inverse, sums[r][c][2 * h + 1] * inverse);
      }
    }
  }
}

#endif  // __CUDACC__

}  // namespace kvq::sage
