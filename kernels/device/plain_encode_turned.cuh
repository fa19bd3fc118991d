// Encoding of many tokens by a plain scheme that divides a token by its norm, turns all of it by the Hadamard matrix, and counts
// thresholds (kTurnsByProducts, kernels/plain.h). Device code alone.
//
// As the CPU does it, a number takes 25 instructions, 20 of them for a division, seven butterflies and a search whose roundings all have
// to be the CPU's. But a code is the same wherever the number is known well enough to be on one side of a threshold. So a warp turns
// 32 tokens quickly, and what is too near to a threshold, a number of one in 50 tokens of 128 channels and 4 bits, is found once more as the
// CPU does it. Instructions a number, 13.5 of 4 bits and 128 channels:
//
//   the norm      is the CPU's, a sum in order, as a lane has a token: 2.5
//   turned        sixteen channels by a product on tensor cores, 1/2 with its operands; then butterflies between a lane's own numbers: 3
//   the code      its cell, 1, what the cell adds, 1, both together, 1, packed and limited, 1.5, how near the nearest threshold is, 1/2
//   once more     1; places, loads and stores are what is left
//
// What it is off by. In units of a turned number, of which a token of norm 1 has some 1 / sqrt(D); u = 2^-24. A number x is off by some w u
// for each |x| / sqrt(D) that goes into it, as below; as the squares of x add up to 1, all of them are no more than the root of the mean
// of w^2. Of D = 128:
//   the CPU's     u for x / n, for the factor, for each of seven butterflies:  w = 9
//   a product     of 16 numbers and +-1, exact, of which any may lose 2 u of the largest of them, or of what has been added up before, and
//                 each sum 2 u, as tensor cores add eight at a time (sm_80's; later ones more)
//   butterflies   w = 3
// which is some 28 u in all. The scale is off by 4 u, of a number near a threshold, below 0.22, by 0.9 u; of 3 bits below 0.16, by 0.7 u.
// Four steps of Cells are 32.8 u where the slope is 1.95, and 29.7 u where it is 2.15, as of 3 bits. (Of D = 64 it is less, and 1.2 u below
// 0.3, and 4 steps of slope 1.5 are 42 u. Tensor cores that add four at a time, as those before sm_80, would be off by up to 36.4 u. Not
// bound is a token of bfloat16 longer than 2^30 with numbers below 2^-110, whose quotients are subnormal.) The tests compare with the CPU's codes.
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

// Where the codes of channels 8 i + 2 t, 8 i + 2 t + 1 are put together, which a lane has of all i: fields of four bits in both halves of a
// word. Of 4 bits as in rows (code_row.h), of 3 bits even i in the words 0, 2, ..., odd ones in the next.
template <typename S>
__device__ constexpr int WordOfEight(int i) { return S::kBits == 4 ? i / 4 : i / 8 * 2 + i % 2; }
template <typename S>
__device__ constexpr int ShiftOfEight(int i) { return S::kBits == 4 ? i % 4 * 4 : i % 8 / 2 * 4; }

// `first` where `mask` has ones, `second` elsewhere: one instruction, which the compiler does not see.
template <uint32_t mask>
__device__ __forceinline__ uint32_t Either(uint32_t first, uint32_t second) {
  uint32_t both;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(both) : "r"(first), "r"(second), "n"(mask));
  return both;
}

// A token's codes that a lane has put together so, to its chunk of the rows at `codes` and `odd`.
template <typename S, int kDim>
__device__ __forceinline__ void StoreChunk(const uint32_t (&fours)[kDim / 32], std::byte* codes, std::byte* odd, bool there) {
  constexpr int kWords = kDim * kLow<S> / 128;
  uint32_t words[kWords];
  if constexpr (kLow<S> == 4) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = fours[w];
  } else {
    // The upper bits: of the first two words in bits 0 and 1 of fields, even and odd; of the next two in bits 2 and 3. Then fields become
    // halves of bytes, of two each, and those bytes.
    constexpr int kNext = kDim == 128 ? 2 : 0;
    uint32_t bits = Either<0x33333333>(fours[0] >> 2, fours[kNext]) + Either<0x33333333>(fours[1] >> 2, fours[kNext + 1]) * 2;
    bits = Either<0xC3C3C3C3>(bits, Either<0x0C0C0C0C>(bits >> 2, bits << 2));
    bits = ptx::PickBytes(bits, 0, 0x3120);
    bits = Either<0xF0F00F0F>(bits, Either<0x0000FFFF>(bits >> 12, bits << 12));
    if constexpr (kWords == 2) {
      asm volatile("" : "+r"(bits));  // or all of this were done behind a branch
      if (there) *reinterpret_cast<uint32_t*>(odd) = bits;
    } else {
      if (there) *reinterpret_cast<uint16_t*>(odd) = static_cast<uint16_t>(bits);
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = Either<0x33333333>(fours[2 * w], fours[2 * w + 1] << 2);
  }
  if (!there) return;
  if constexpr (kWords == 4) *reinterpret_cast<uint4*>(codes) = {words[0], words[1], words[2], words[3]};
  else if constexpr (kWords == 2) *reinterpret_cast<uint2*>(codes) = {words[0], words[1]};
  else *reinterpret_cast<uint32_t*>(codes) = words[0];
}

// One code where all of the token's lie already, while other lanes put others.
template <typename S, int kDim>
__device__ __forceinline__ void PutCode(const KvView& mine, uint32_t token, uint32_t channel, uint32_t code) {
  constexpr uint32_t kChunkWords = kDim * kLow<S> / 128, kMask = (1u << kLow<S>) - 1;
  const WordPlace place = PlaceOf<kLow<S>>(channel, kChunkWords);
  auto* const word = reinterpret_cast<uint32_t*>(mine.planes[0]) + token * 4 * kChunkWords + place.word;
  atomicAnd(word, ~(kMask << place.shift));
  atomicOr(word, (code & kMask) << place.shift);
  if constexpr (kOdd<S> > 0) {
    const uint32_t bit = place.word * (32 / kLow<S>) + place.shift / kLow<S>;
    auto* const odd = reinterpret_cast<uint32_t*>(mine.planes[1]) + token * (kDim / 32) + bit / 32;
    atomicAnd(odd, ~(1u << bit % 32));
    atomicOr(odd, code >> kLow<S> << bit % 32);
  }
}

// As the CPU has them: the numbers 2 chunk and 2 chunk + 1 of each eight of a turned token. A lane of a warp gets those of eight
// lane / (256 / kDim).
template <typename S, DType kType, int kDim>
__device__ __forceinline__ void TurnExactly(const uint8_t* row, const VectorFit<S>& vector, float inverse, uint32_t lane, uint32_t chunk,
                                            float (&pair)[2]) {
  constexpr int kOwn = kDim / 32;  // neighbouring numbers
  float y[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i += 2) UnpackTwo<kType>(*reinterpret_cast<const uint32_t*>(row + (lane * kOwn + i) * 2), y[i], y[i + 1]);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if constexpr (kType == DType::kFloat16) y[i] = ShortQuotient(y[i], S::Divisor(vector), inverse);
    else y[i] = Quotients::By(S::Divisor(vector)).Of(y[i]);
    y[i] *= InverseRootOfPower(kDim);
  }
  // Of what butterflies within eights make, the two alone.
  const auto way = [&](uint32_t bit) { return (chunk & bit) != 0 ? -1.0f : 1.0f; };
  pair[0] = y[0] + y[1], pair[1] = y[0] - y[1];
  if constexpr (kOwn == 4) {
    const float next[2] = {y[2] + y[3], y[2] - y[3]};
#pragma unroll
    for (int side = 0; side < 2; ++side) pair[side] = fmaf(next[side], way(1), pair[side]);
  }
#pragma unroll
  for (uint32_t lanes = 1; lanes < 8 / kOwn; lanes *= 2) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float low = __shfl_sync(~0u, pair[side], static_cast<int>(lane & ~lanes)), high = __shfl_sync(~0u, pair[side], static_cast<int>(lane | lanes));
      pair[side] = fmaf(high, way(lanes * kOwn / 2), low);
    }
  }
#pragma unroll
  for (uint32_t lanes = 8 / kOwn; lanes < 32; lanes *= 2) {
    const float sign = (lane & lanes) != 0 ? -1 : 1;  // the upper one has the difference
#pragma unroll
    for (int side = 0; side < 2; ++side) pair[side] = fmaf(pair[side], sign, __shfl_xor_sync(~0u, pair[side], static_cast<int>(lanes)));
  }
}

// A block is a warp, which has 32 tokens; the last ones, by the height of the grid, have sixteen: what they still do when nothing is read
// any more is done sooner, for which half of their lanes add up squares in vain.
template <typename S, DType kType, int kDim>
__global__ void __launch_bounds__(32, 20)
    EncodeTurnedKernel(const __grid_constant__ DenseView x, int64_t first_token, const __grid_constant__ KvView out) {
  static_assert(S::kBits == 4 || S::kBits == 3);
  constexpr int kTokens = 32, kPitch = RowPitch(kDim), kProducts = kDim / 16, kMost = (1 << S::kBits) - 1;
  struct OfToken {
    float norm, inverse;  // 1 / its divisor: of float16 to the nearest
  };
  __shared__ __align__(16) uint8_t tile[kTokens * kPitch];
  __shared__ OfToken of_tokens[kTokens];
  const uint32_t lane = threadIdx.x, b = blockIdx.z, h = blockIdx.x, tokens = static_cast<uint32_t>(x.tokens);
  const uint32_t large = 2 * ((tokens + kTokens - 1) / kTokens) - gridDim.y;  // blocks of 32
  const bool small = blockIdx.y >= large;
  const uint32_t first = small ? (blockIdx.y + large) * 16 : blockIdx.y * kTokens;
  if (first >= tokens) return;
  const uint32_t count = small ? min(tokens - first, 16u) : tokens - first;  // of tokens from here on
  WaitForPredecessors();
  if (small) CopyTile<kDim, kDim, 16>(x, b, h, first, count, tile);
  else CopyTile<kDim, kDim, kTokens>(x, b, h, first, count, tile);
  const KvView mine = PlanesAt<S, kDim, kDim>(out, b, h, TokenBase(out) + first_token + first);
  const Cells& cells = S::DeviceCells(kDim);
  const auto [carry, threshold] = cells.lanes[lane];
  ptx::CopyWait<0>();
  __syncwarp();

  // ---- a lane's token
  {
    const VectorFit<S> vector = FitVector<S>(RowNumbers<kType>{tile + lane * kPitch}, kDim);
    if (lane < count) StoreVector<S>(vector.stored, mine, 0, 0, lane);
    const float divisor = S::Divisor(vector);
    of_tokens[lane] = {vector.norm, kType == DType::kFloat16 ? ShortReciprocal(divisor) : ptx::Reciprocal(divisor)};
  }
  __syncwarp();

  // ---- of tokens g and g + 8 of sixteen, channels 2 t, 2 t + 1 and each eighth behind
  const uint32_t g = lane / 4, t = lane % 4;
  // (-1)^popcount(i & j) of 16 by 16 channels, whose quarters differ by their sign alone.
  constexpr uint32_t kOnes = kType == DType::kFloat16 ? 0x3C003C00 : 0x3F803F80;
  const uint32_t plus = kOnes ^ (__popc(2 * t & g) % 2 != 0 ? 0x80008000 : 0) ^ (g % 2 != 0 ? 0x80000000 : 0), minus = plus ^ 0x80008000;
  const uint32_t minus_large = Cells::MinusTooLarge();
  const ptx::Shared matrices = ptx::SharedAddress(tile) + lane % 16 * kPitch + lane / 16 * 16;
  constexpr int kRow = kDim * kLow<S> / 8, kOddRow = kOdd<S> * kDim / 8;  // bytes
  std::byte* const codes = mine.planes[0] + g * kRow + t * (kRow / 4);
  std::byte* odd = nullptr;
  if constexpr (kOdd<S> > 0) odd = mine.planes[1] + g * kOddRow + t * (kOddRow / 4);
#pragma unroll 1
  for (uint32_t sixteen = 0; sixteen < kTokens && sixteen < count; sixteen += 16) {
    float norms[2], scales[2];
#pragma unroll
    for (int of = 0; of < 2; ++of) {
      const OfToken token = of_tokens[sixteen + 8 * of + g];
      norms[of] = token.norm, scales[of] = token.inverse * (cells.slope * InverseRootOfPower(kDim) * Cells::kSteps);
    }
    uint32_t a[kProducts][4];
#pragma unroll
    for (int i = 0; i < kProducts; ++i) ptx::LoadMatrices(matrices + sixteen * kPitch + 32 * i, a[i]);
    uint32_t fours[2][kDim / 32] = {}, nearest[2] = {~0u, ~0u};  // in the lower half; the upper one says nothing
#pragma unroll
    for (int half = 1; half >= 0; --half) {  // of sixteen channels
      float z[kProducts][4] = {};
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        if constexpr (kType == DType::kFloat16) ptx::MmaHalf(z[i], a[i][0], a[i][1], a[i][2], a[i][3], plus, half == 0 ? plus : minus);
        else ptx::MmaBFloat16(z[i], a[i][0], a[i][1], a[i][2], a[i][3], plus, half == 0 ? plus : minus);
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
        for (int j = 0; j < 4; ++j) {
          const int cell = static_cast<int>(Cells::CellOf(z[i][j], scales[j / 2]));
          sums[j] = Cells::SumOf(z[i][j], scales[j / 2], __shfl_sync(~0u, carry, cell));
        }
        const int eight = 2 * i + half;
#pragma unroll
        for (int of = 0; of < 2; ++of) {
          nearest[of] = SmallerWholeOfTwo(SmallerWholeOfTwo(sums[2 * of], sums[2 * of + 1]), nearest[of]);
          fours[of][WordOfEight<S>(eight)] += Cells::CountsOf(sums[2 * of], sums[2 * of + 1], minus_large, kMost) << ShiftOfEight<S>(eight);
        }
      }
    }
    uint32_t left[2];  // lanes, of whose numbers of a token a code is not said
#pragma unroll
    for (int of = 0; of < 2; ++of) {
      const uint32_t behind = sixteen + 8 * of;
      const bool there = behind + g < count;
      StoreChunk<S, kDim>(fours[of], codes + behind * kRow, odd + behind * kOddRow, there);
      // Steps of zeros are exact; a norm of bfloat16 may be zero where they are not. Sums of larger numbers might be infinite.
      const bool zeros = kType == DType::kFloat16 && norms[of] == 0;
      left[of] = __ballot_sync(~0u, there && ((Cells::IsUnsure(nearest[of]) && !zeros) || !(norms[of] < 1e18f)));
    }
    if ((left[0] | left[1]) == 0) continue;

    // ---- one by one. A threshold that is near is the last that was counted; where a code may be another one, the number is no more than
    // twice as far from it as where it is not said.
    __syncwarp();  // what was stored is changed
    uint32_t own;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(own));  // read here: what follows from it is not made before
#pragma unroll 1
    for (uint32_t behind = sixteen, lanes = left[0]; behind < sixteen + 16; behind += 8, lanes = left[1]) {
#pragma unroll 1
      for (; lanes != 0; lanes &= lanes - 1) {
        const uint32_t one = __ffs(static_cast<int>(lanes)) - 1, token = behind + one / 4, chunk = one % 4;
        const OfToken of_token = of_tokens[token];
        VectorFit<S> vector;
        vector.norm = of_token.norm;
        float pair[2];
        TurnExactly<S, kType, kDim>(tile + token * kPitch, vector, of_token.inverse, own, chunk, pair);
        constexpr uint32_t kLanes = 256 / kDim;  // have the same
        const float scale = cells.slope * Cells::kSteps;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int cell = static_cast<int>(Cells::CellOf(pair[side], scale));
          const uint32_t sum = Cells::SumOf(pair[side], scale, __shfl_sync(~0u, carry, cell));
          const bool below = pair[side] < __shfl_sync(~0u, threshold, cell);
          if (own % kLanes == 0 && (Cells::IsWithinTwice(sum) || !(of_token.norm < 1e18f))) {
            const int counted = Cells::CountOf(sum, kMost), code = counted - (Cells::IsUnsure(sum) && below && counted > 0 ? 1 : 0);
            PutCode<S, kDim>(mine, token, own / kLanes * 8 + 2 * chunk + side, pair[side] == pair[side] ? static_cast<uint32_t>(code) : 0);
          }
        }
      }
    }
  }
}

}  // namespace kvq::plain
