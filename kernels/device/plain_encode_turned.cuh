// Encoding of many tokens by a plain scheme that divides a token by its norm, turns all of it by the Hadamard matrix, and counts
// thresholds (kTurnsByProducts, kernels/plain.h). Device code alone.
//
// As the CPU does it, a number takes 25 instructions, 20 of them for a division, seven butterflies and a search whose roundings all have
// to be the CPU's. But a code is the same wherever the number is known well enough to be on one side of a threshold. So a warp turns
// 32 tokens quickly, and those of which a number is too near to a threshold, one in 40 of 128 channels and 4 bits, once more as the CPU
// does it. Instructions a number, 17 of 4 bits and 128 channels:
//
//   the norm      is the CPU's, a sum in order, as a lane has a token: 2
//   turned        sixteen channels by a product on tensor cores, 1/2 with its operands; then butterflies between a lane's own numbers: 3
//   the code      scaled and cut to a step, 2, its cell, 1, what the cell adds, 2, how near the nearest threshold is, 1, packed, 1
//   once more     2; places, loads and stores are what is left
//
// What it is off by. In units of a turned number, of which a token of norm 1 has some 1 / sqrt(D); u = 2^-24; L, the sum of |x| over
// sqrt(D), is at most 1, and so at most 1 is what any stage's numbers add up to that one number is made of:
//   the CPU's     u for x / n, for the factor, for each butterfly, each times L:  9 u
//   a product     of 16 numbers and +-1, exact, of which any may lose 2 u of the largest of them, or of what has been added up before,
//                 if tensor cores add eight at a time, and the sum 2 u. The largest of the blocks of 16 add up to at most 1/4, eight
//                 numbers' sums to 0.71, sixteen's to 1:  2 u (8 / 4 + 9 * 0.71 + 1) < 19 u
//   butterflies   3 u;  the scale, 4 u of a number near a threshold, below 0.3:  2 u;  limited to [0, 1]:  u / slope
// 34 u in all, 2.0e-6, which is 4.25 steps of Cells where the slope is 2 (D = 128), and less where it is smaller. (39 u and 4.84 steps
// if they add four at a time. Not bound is a token of bfloat16 longer than 2^30 with numbers below 2^-110, whose quotients are subnormal.)
// The tests compare with the CPU's codes.
#pragma once

#include "kernels/plain.h"

namespace kvq::plain {

// A token's 16-bit numbers in shared memory, all of them one lane's, eight at a time.
template <DType kType>
struct RowNumbers {
  const uint8_t* row;
  __device__ __forceinline__ void Eight(int i, float (&v)[8]) const {
    const uint4 words = *reinterpret_cast<const uint4*>(row + 16 * i);
    UnpackTwo<kType>(words.x, v[0], v[1]);
    UnpackTwo<kType>(words.y, v[2], v[3]);
    UnpackTwo<kType>(words.z, v[4], v[5]);
    UnpackTwo<kType>(words.w, v[6], v[7]);
  }
};
template <DType kType>
inline constexpr DType kInWords<RowNumbers<kType>> = kType;

// Codes of a lane's channels of a token, of each 32 channels in fields of four bits, to its chunk of the token's rows (code_row.h).
template <typename S, int kDim>
__device__ __forceinline__ void StoreChunk(const uint32_t (&fours)[kDim / 32], const KvView& mine, uint32_t token, uint32_t chunk) {
  constexpr int kWords = kDim * kLow<S> / 128;
  uint32_t words[kWords];
  if constexpr (kLow<S> == 4) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = fours[w];
  } else {
    uint32_t odd[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) MoveThrees(fours[2 * w], fours[2 * w + 1], words[w], odd[w]);
    const uint32_t bytes = ptx::PickBytes(odd[0], odd[kWords - 1], 0x7531);
    std::byte* const to = mine.planes[1] + token * (kDim / 8) + chunk * (2 * kWords);
    if constexpr (kWords == 2) *reinterpret_cast<uint32_t*>(to) = bytes;
    else *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bytes);
  }
  auto* const to = reinterpret_cast<uint32_t*>(mine.planes[0]) + (token * 4 + chunk) * kWords;
  if constexpr (kWords == 4) *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
  else if constexpr (kWords == 2) *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
  else *to = words[0];
}

template <typename S, DType kType, int kDim, int kThreads>
__global__ void __launch_bounds__(kThreads, 640 / kThreads)
    EncodeTurnedKernel(const __grid_constant__ DenseView x, int64_t first_token, const __grid_constant__ KvView out) {
  static_assert(S::kBits == 4 || S::kBits == 3);
  constexpr int kTokens = 32, kPitch = RowPitch(kDim), kProducts = kDim / 16;
  __shared__ __align__(16) uint8_t tiles[kThreads / 32][kTokens * kPitch];
  const uint32_t lane = threadIdx.x % 32;
  uint8_t* const tile = tiles[threadIdx.x / 32];
  const uint32_t b = blockIdx.z, h = blockIdx.y, first = blockIdx.x * kThreads + threadIdx.x / 32 * kTokens;
  if (first >= x.tokens) return;
  const uint32_t count = static_cast<uint32_t>(x.tokens) - first;  // of tokens from here on
  CopyTile<kDim, kDim, kTokens>(x, b, h, first, count, tile);
  const KvView mine = PlanesAt<S, kDim, kDim>(out, b, h, TokenBase(out) + first_token + first);
  const Cells& cells = S::DeviceCells(kDim);
  const uint32_t carry = cells.carry[lane];
  ptx::CopyWait<0>();
  __syncwarp();

  // ---- a lane's token
  const VectorFit<S> vector = FitVector<S>(RowNumbers<kType>{tile + lane * kPitch}, kDim);
  if (lane < count) StoreVector<S>(vector.stored, mine, 0, 0, lane);
  const float scale = cells.slope * InverseRootOfPower(kDim) / S::Divisor(vector);

  // ---- of tokens g and g + 8 of sixteen, channels 2 t, 2 t + 1 and each eighth behind
  const uint32_t g = lane / 4, t = lane % 4;
  // (-1)^popcount(i & j) of 16 by 16 channels, whose quarters differ by their sign alone.
  constexpr uint32_t kOnes = kType == DType::kFloat16 ? 0x3C003C00 : 0x3F803F80;
  const uint32_t plus = kOnes ^ (__popc(2 * t & g) % 2 != 0 ? 0x80008000 : 0) ^ (g % 2 != 0 ? 0x80000000 : 0), minus = plus ^ 0x80008000;
  const ptx::Shared matrices = ptx::SharedAddress(tile) + lane % 16 * kPitch + lane / 16 * 16;
  uint32_t unsure = 0;  // of a lane's token and seven neighbours, the four lanes that have its channels
#pragma unroll 1
  for (uint32_t sixteen = 0; sixteen < kTokens; sixteen += 16) {
    const float scales[2] = {__shfl_sync(~0u, scale, static_cast<int>(sixteen + g)), __shfl_sync(~0u, scale, static_cast<int>(sixteen + g + 8))};
    uint32_t fours[2][kDim / 32] = {}, nearest[2] = {~0u, ~0u};
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of sixteen channels
      float z[kProducts][4] = {};
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        uint32_t a[4];
        ptx::LoadMatrices(matrices + sixteen * kPitch + 32 * i, a);
        if constexpr (kType == DType::kFloat16) ptx::MmaHalf(z[i], a[0], a[1], a[2], a[3], plus, half == 0 ? plus : minus);
        else ptx::MmaBFloat16(z[i], a[0], a[1], a[2], a[3], plus, half == 0 ? plus : minus);
      }
#pragma unroll
      for (int distance = 1; distance < kProducts; distance *= 2) {
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          if ((i & distance) != 0) continue;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float u = z[i][j], v = z[i + distance][j];
            z[i][j] = u + v, z[i + distance][j] = u - v;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        uint32_t sums[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] = Cells::StepOf(z[i][j], scales[j / 2]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] += __shfl_sync(~0u, carry, Cells::CellOf(sums[j]));
#pragma unroll
        for (int of = 0; of < 2; ++of) {
          nearest[of] = SmallerWholeOfTwo(ptx::PickBytes(sums[2 * of], sums[2 * of + 1], 0x5410), nearest[of]);
          fours[of][i / 2] += ptx::PickBytes(sums[2 * of], sums[2 * of + 1], 0x7632) << (i % 2 * 8 + half * 4);
        }
      }
    }
#pragma unroll
    for (int of = 0; of < 2; ++of) {
      const uint32_t token = sixteen + 8 * of + g;
      if (token < count) StoreChunk<S, kDim>(fours[of], mine, token, t);
      const uint32_t lanes = __ballot_sync(~0u, Cells::IsUnsure(nearest[of]) || Cells::IsUnsure(nearest[of] >> 16));
      unsure = lane / 8 * 8 == sixteen + 8 * of ? lanes : unsure;
    }
  }

  // ---- tokens of which a code is not said, one by one
  // Steps of zeros are exact; a norm of bfloat16 may be zero where they are not. Sums of larger numbers might be infinite.
  const bool zeros = kType == DType::kFloat16 && vector.norm == 0;
  const bool exactly = ((unsure >> lane % 8 * 4 & 15) != 0 && !zeros) || !(vector.norm < 1e18f);
  uint32_t left = __ballot_sync(~0u, exactly && lane < count);
  if (left == 0) return;
  const float middle = lane + 1 < 1u << S::kBits ? S::DeviceMiddle(kDim, lane) : INFINITY;
  const Warp warp{static_cast<int>(lane)};
  __syncwarp();  // what was stored of them is overwritten
#pragma unroll 1
  for (; left != 0; left &= left - 1) {
    const int token = __ffs(static_cast<int>(left)) - 1;
    const Quotients quotients = Quotients::By(__shfl_sync(~0u, S::Divisor(vector), token));
    float y[kDim / 32];  // numbers lane, lane + 32, ...
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) y[i] = quotients.Of(LoadElement(tile + token * kPitch, kType, lane + 32 * i));
    warp.Turn(y, kDim);
    uint32_t fours[kDim / 32];
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {  // a threshold that is near is the last that was counted
      const uint32_t step = Cells::StepOf(y[i], cells.slope), sum = step + __shfl_sync(~0u, carry, Cells::CellOf(step));
      const bool below = y[i] < __shfl_sync(~0u, middle, static_cast<int>(sum >> 16) - 1);
      fours[i] = (sum >> 16) - (Cells::IsUnsure(sum) && below ? 1 : 0);
    }
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) fours[i] <<= lane / 8 * 4 + lane % 2 * 16;
#pragma unroll
    for (const int distance : {1, 8, 16}) {
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) fours[i] |= __shfl_xor_sync(~0u, fours[i], distance);
    }
    if (lane < 8 && lane % 2 == 0) StoreChunk<S, kDim>(fours, mine, static_cast<uint32_t>(token), lane / 2);
  }
}

}  // namespace kvq::plain
