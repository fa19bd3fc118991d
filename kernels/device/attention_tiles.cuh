// Decode attention on the tile that one warp has in shared memory: queries, logits, weights and sums as operands of
// m16n8k16 products. Why they are as they are: kernels/device/attention.cuh.
//
// Lane 4 g + t throughout: g = 0..7, t = 0..3.
#pragma once

#include <algorithm>

#include "kernels/device/attention.h"
#include "kernels/device/codecs.cuh"
#include "kernels/device/ptx.cuh"
#include "kernels/turn.h"

namespace kvq::decode_attention {

constexpr float kLog2E = 1.44269504f;
constexpr float kNoReference = -1e30f;  // m before the first token
constexpr float kHeadroom = 8;          // a new m puts the largest p s at 2^kHeadroom
constexpr float kOverflow = 32768;      // and p s above this asks for a new m

// One side, keys or values, of a tile: a token's codes, kRow bytes, their odd bits, kOddRow, and kPlanes times kMeta bytes of
// metadata.
template <class Codec_, int kDim>
struct Row : Codec_ {
  using Codec = Codec_;
  static constexpr int kRow = kDim * Codec::kBits / 8, kGranules = kRow / 16;
  static constexpr int kGroups = Codec::kDense ? 1 : kDim / (Codec::kDense ? 1 : Codec::kGroup);
  static constexpr int kOddRow = Codec::kOdd * kDim / 8;
  static constexpr int kMeta = Codec::kMetaBytes * kGroups;
  // Planes behind the codes and what each has of a token.
  static constexpr int kPlanesBehind = (Codec::kOdd > 0 ? 1 : 0) + Codec::kPlanes;
  __device__ static constexpr int PlaneBytes(int plane) { return Codec::kOdd > 0 && plane == 0 ? kOddRow : kMeta; }
  // What a tile of so many tokens has of it, and of all of them: of groups of tokens, whole ones.
  __device__ static constexpr int TilePlane(int plane, int tile) { return PlaneBytes(plane) * std::max(tile, Codec::kTokens); }
  __device__ static constexpr int TileBehind(int tile) {
    int bytes = 0;
    for (int plane = 0; plane < kPlanesBehind; ++plane) bytes += TilePlane(plane, tile);
    return bytes;
  }
  static constexpr int kWordSteps = Codec::kDense ? 1 : 8 / Codec::kBits;  // steps of a product in one word of codes

  // Rows lie one behind the other, but for the order of 16-byte granules within 128 bytes: granule i of a row is at
  // i ^ SwizzleOf(row). So the lanes of one read, which want the same granule of rows 2 t, or neighbouring ones of
  // neighbouring rows, hit different banks. Linear: SwizzleOf(a ^ b) = SwizzleOf(a) ^ SwizzleOf(b); 0 for 8 n.
  __device__ static constexpr int SwizzleOf(int row) {
    return Codec::kDense   ? (row & 6) ^ (row & 1) << 2
           : kGranules >= 8 ? row & 7
                            : row / (8 / kGranules) & (kGranules - 1);
  }
};

// Everything that is fixed when a kernel is compiled. The host chooses warps, stages, tokens of a tile and registers by
// what the device has (attention.cc).
template <class Keys, class Values, int kDim_, int kParts_, int kHeadTiles_, int kWarps_, int kStages_, int kTile_, int kRegisters_,
          int kCluster_, bool kWindow_, int kFlags_>
struct Config {
  static constexpr int kDim = kDim_, kHeadTiles = kHeadTiles_;
  static constexpr int kParts = kParts_;  // of a KV head's query heads, each for a block of its own
  static constexpr int kWarps = kWarps_, kStages = kStages_, kTile = kTile_, kRegisters = kRegisters_;
  static constexpr int kCluster = kCluster_;  // blocks, all of a part; 1: they have only device memory in common
  static constexpr bool kWindow = kWindow_;  // tokens may be hidden by a sliding window
  static constexpr bool kTurnsKeys = (kFlags_ & 1) != 0, kTurnsValues = (kFlags_ & 2) != 0;
  static constexpr bool kApart = (kFlags_ & 4) != 0;  // values have lengths of their own, or a ring
  static constexpr bool kCapped = (kFlags_ & 8) != 0;  // logits have a cap
  static constexpr bool kEncodesKeys = (kFlags_ & 16) != 0, kEncodesValues = (kFlags_ & 32) != 0;  // the newest token's
  static constexpr bool kBFloat16 = (kFlags_ & 64) != 0;  // all that is dense, instead of float16
  static constexpr bool kMakesHeads = (kFlags_ & 128) != 0;  // queries, and the newest token's
  static constexpr bool kEncodes = kEncodesKeys || kEncodesValues;
  using K = Row<Keys, kDim>;
  using V = Row<Values, kDim>;
  static constexpr bool kDense = K::kDense && V::kDense;
  // Tiles are dealt to all warps of all blocks in turn: so each knows its first one whatever the lengths. Where a block makes heads, and
  // there is room for many tokens, it asks for that one before it looks at them (for nothing, where there are few).
  static constexpr bool kDealt = kDense && !kWindow, kAsksFirst = kDealt && kMakesHeads && (kFlags_ & 256) != 0;
  static constexpr bool kOneDense = K::kDense != V::kDense;
  // Dense tokens beside the tiles are fetched before anything is worked on; where registers are too few, when they are.
  static constexpr bool kEager = kDim <= 128 && kHeadTiles == 1;
  // Dense tokens have sums of their own beside those of codes, as their channels lie otherwise. Where registers are too few
  // for both, those of dense tokens, which come first, wait in shared memory.
  static constexpr bool kShelf = !V::kDense && !kEager;
  static constexpr int kHeads = 8 * kHeadTiles;  // columns for query heads
  static constexpr int kSteps = kDim / 16;       // of a product over channels
  static constexpr int kThreads = 32 * kWarps;
  // A tile: key rows, value rows, the keys' planes behind them, the values'.
  static constexpr int kValuesAt = kTile * K::kRow, kKeyMetaAt = kValuesAt + kTile * V::kRow;
  static constexpr int kValueMetaAt = kKeyMetaAt + K::TileBehind(kTile);
  static constexpr int kTileBytes = (kValueMetaAt + V::TileBehind(kTile) + 127) / 128 * 128;
  static_assert(kTile <= K::kTokens || K::kTokens == 1, "a tile has one group of tokens");
  static_assert(V::kTokens == 1 && !(kApart && (kTurnsKeys || kTurnsValues)));
  static constexpr int kHeadStride = kDim + 4;  // floats, in the merge: lanes of one store in different banks
  // Rows and sums of the block's warps; then, of a cluster, sums of the block.
  static constexpr int kSumsAt = kWarps * kHeads * kHeadStride * 4, kBlockSumsAt = kSumsAt + kWarps * kHeads * 8;
  static constexpr int kMergeBytes = kBlockSumsAt + kHeads * 8;
  static constexpr int kShelfAt = std::max(kWarps * kStages * kTileBytes, (kMergeBytes + 127) / 128 * 128);
  // Queries: turned ones, float32 [head, channel], or words as they come, of a head in an order that keeps its readers in different banks.
  static constexpr int kQueriesAt = kShelfAt + (kShelf ? kWarps * kHeads * kDim * 4 : 0);
  static constexpr int kNewestAt = kQueriesAt + kHeads * (kTurnsKeys ? kDim : kDim / 2) * 4;  // where it makes heads
  __device__ static constexpr int QueryWord(int head, int word) { return head * (kDim / 2) + (word ^ head % 8 * 4); }
};

// Metadata of one token, of all groups.
template <class R>
struct Meta {
  uint32_t words[std::max(R::kPlanes, 1)][std::max((R::kMeta + 3) / 4, 1)];
  // `at`: of the token in the first plane; the next one is kPlane bytes further.
  template <int kPlane>
  __device__ __forceinline__ Meta(ptx::Shared at, std::integral_constant<int, kPlane>) {
    if constexpr (R::kPlanes > 0) {
#pragma unroll
      for (int p = 0; p < R::kPlanes; ++p) {
        if constexpr (R::kMeta == 2) {
          words[p][0] = ptx::LoadShared16(at + p * kPlane);
        } else {
          static_assert(R::kMeta % 4 == 0);
          ptx::LoadShared(at + p * kPlane, words[p]);
        }
      }
    }
  }
  __device__ __forceinline__ float scale(int group) const { return R::Scale(words, group); }
  // NaN where a scale is one that scale() does not tell, else 0.
  __device__ __forceinline__ float poison() const {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof words[0] / 4); ++i) {
      const bool half = R::kMeta % 4 != 0;  // its word has two bytes of it
      found |= R::Poison(half ? words[0][i] & 0xFFFF : words[0][i]);
    }
    return found != 0 ? BitsFloat(0x7FC00000) : 0.0f;
  }
  __device__ __forceinline__ float zero(int group) const { return R::ZeroOf(words, group); }
};

// ---- encoded tokens one number at a time, straight from device memory: where there is no tile

// A group's, of one token, so that a number is as Decoded says.
struct GroupScale {
  float scale = 0, zero = 0;
};
// Of a group's metadata, one word a plane.
template <class R>
__device__ __forceinline__ GroupScale GroupScaleOf(const uint32_t (&meta)[std::max(R::kPlanes, 1)][1]) {
  GroupScale of;
  of.scale = R::Scale(meta, 0);
  if constexpr (R::kPoisons) of.scale = R::Poison(meta[0][0]) != 0 ? BitsFloat(0x7FC00000) : of.scale * 256;
  if constexpr (!R::kCentred) of.zero = R::ZeroOf(meta, 0);
  return of;
}
// `pair`: the KV head of a sequence.
template <class R>
__device__ __forceinline__ GroupScale LoadGroupScale(const KvView& view, int pair, int64_t token, int group) {
  uint32_t meta[std::max(R::kPlanes, 1)][1] = {};  // of this group alone
#pragma unroll
  for (int p = 0; p < R::kPlanes; ++p) {
    const int plane = (R::kOdd > 0 ? 2 : 1) + p;
    const std::byte* at = view.planes[plane] + pair * view.plane_stride[plane] + (token * R::kGroups + group) * R::kMetaBytes;
    if constexpr (R::kMetaBytes == 1) meta[p][0] = __ldcg(reinterpret_cast<const uint8_t*>(at));
    if constexpr (R::kMetaBytes == 2) meta[p][0] = __ldcg(reinterpret_cast<const uint16_t*>(at));
    if constexpr (R::kMetaBytes == 4) meta[p][0] = __ldcg(reinterpret_cast<const uint32_t*>(at));
  }
  return GroupScaleOf<R>(meta);
}
template <class R>
__device__ __forceinline__ float Decoded(uint32_t code, const GroupScale& of) {
  const float element = R::Element(code);
  if constexpr (R::kCentred) return element * of.scale;
  else return R::kZero == Zero::kOfCodes ? (element - of.zero) * of.scale : of.scale * element - of.zero;
}

// Channels 8 granule and on of a token: what is fetched of them, and what they are as 16-bit numbers.
template <class R, int kDim>
struct EncodedGranule {
  uint32_t words[4];  // chunk by chunk
  uint32_t odd[std::max(R::kOdd, 1)][4][2];
  GroupScale group;
  uint32_t scales[4], minima[4];  // of pairs of channels, where tokens share them
  int field;

  __device__ __forceinline__ void Load(const KvView& view, int pair, int64_t token, int granule) {
    constexpr int kWords = R::kRow / 16, kRun = 128 / R::kBits;  // of a chunk; and channels that a word of each covers
    const int channel = 8 * granule, w = channel / kRun;
    const auto plane = [&](int p) { return view.planes[p] + pair * view.plane_stride[p]; };
    field = channel % kRun / 8;
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      const int at = chunk * kWords + w;
      words[chunk] = __ldcg(reinterpret_cast<const uint32_t*>(plane(0) + token * R::kRow) + at);
#pragma unroll
      for (int i = 0; i < R::kOdd; ++i) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int bit = at * (32 / R::kBits) + side * (16 / R::kBits) + field;
          const std::byte* byte = plane(1) + token * R::kOddRow + i * (kDim / 8) + bit / 8;
          odd[i][chunk][side] = __ldcg(reinterpret_cast<const uint8_t*>(byte)) >> bit % 8 & 1u;
        }
      }
    }
    if constexpr (R::kTokens == 1) {
      group = LoadGroupScale<R>(view, pair, token, channel / R::kGroup);
    } else {
      const int64_t at = (token / R::kTokens * kDim + channel) / 8;
      const uint4 s = __ldcg(reinterpret_cast<const uint4*>(plane(1)) + at), m = __ldcg(reinterpret_cast<const uint4*>(plane(2)) + at);
      scales[0] = s.x, scales[1] = s.y, scales[2] = s.z, scales[3] = s.w;
      minima[0] = m.x, minima[1] = m.y, minima[2] = m.z, minima[3] = m.w;
    }
  }
  __device__ __forceinline__ uint4 Numbers(bool half) const {
    uint32_t out[4];
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      float x[2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        uint32_t code = words[chunk] >> (field * R::kBits + 16 * side) & ((1u << R::kBits) - 1);
#pragma unroll
        for (int i = 0; i < R::kOdd; ++i) code |= odd[i][chunk][side] << (R::kBits + i);
        if constexpr (R::kTokens == 1) x[side] = Decoded<R>(code, group);
        else x[side] = fmaf(R::Element(code), ptx::HalfAt(scales[chunk], side), ptx::HalfAt(minima[chunk], side));
      }
      out[chunk] = half ? ptx::PackHalf(x[0], x[1]) : ptx::PackBFloat16(x[0], x[1]);
    }
    return {out[0], out[1], out[2], out[3]};
  }
};

// ---- what a warp knows. Heads 8 ht + 2 t and + 1 are this lane's, `i` = 0 and 1 below.

// Of its tokens: for each head the reference m (the same in all lanes), a share of the sum l of 2^(logit - m), of
// the sum of p s z, and sums of p v: channels by rows g (o0, o1) and g + 8 (o2, o3) of a product.
template <class C>
struct Partial {
  float o[C::kHeadTiles][C::kSteps][4];
  float m[C::kHeadTiles][2], l[C::kHeadTiles][2];
  float zero[C::kHeadTiles][2][C::V::kGroups];
  uint32_t broken = 0;  // where codes may stand for NaN: bits of codecs' Broken

  __device__ __forceinline__ Partial() {
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        m[ht][i] = kNoReference, l[ht][i] = 0;
#pragma unroll
        for (int group = 0; group < C::V::kGroups; ++group) zero[ht][i][group] = 0;
      }
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[ht][step][i] = 0;
      }
    }
  }

  // Moves a head's reference so that the largest of all lanes' `top` = log2(p s) + m is at kHeadroom.
  __device__ __forceinline__ void Rebase(int ht, int i, float top) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
    const float moved = fmaxf(m[ht][i], fmaxf(top - kHeadroom, 0.1f * kNoReference));
    const float factor = ptx::Exp2(m[ht][i] - moved);
    m[ht][i] = moved;
    l[ht][i] *= factor;
#pragma unroll
    for (int group = 0; group < C::V::kGroups; ++group) zero[ht][i][group] *= factor;
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) o[ht][step][i] *= factor, o[ht][step][i + 2] *= factor;
  }
};

// The query heads of one KV head as the right operand of products over channels: head 8 ht + g.
template <class C>
struct Queries {
  uint32_t b[C::kHeadTiles][C::kSteps][2];
  float sum[C::kHeadTiles][2][C::K::kGroups];  // over a group's channels, over kUnit
  float factor[C::kHeadTiles][2];           // of a product, to the logit in base 2
};

// nullptr past the last head.
template <class C>
__device__ __forceinline__ const uint32_t* QueryRow(const DecodeAttentionArgs& args, int pair, int ratio, int head) {
  if (head >= ratio) return nullptr;
  return static_cast<const uint32_t*>(args.queries) +
         (static_cast<int64_t>(pair) * ratio + head) * (C::kDim / 2);
}

// A block's queries as they come, by a warp each to where all find them; zeros past the last head. They come while many other bytes are
// on their way, and late to a warp that asks for all of them itself. `meanwhile` is called when they have been asked for.
template <class C, typename Meanwhile>
__device__ void StageQueries(const DecodeAttentionArgs& args, int pair, int ratio, int warp, uint32_t* queries, const Meanwhile& meanwhile) {
  constexpr int kRounds = (C::kHeads + C::kWarps - 1) / C::kWarps, kWords = C::kDim / 64;
  const int lane = threadIdx.x % 32;
  uint32_t words[kRounds][kWords];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t* row = QueryRow<C>(args, pair, ratio, round * C::kWarps + warp);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[round][i] = row == nullptr ? 0 : __ldcg(row + 32 * i + lane);
  }
  meanwhile();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) queries[C::QueryWord(round * C::kWarps + warp, 32 * i + lane)] = words[round][i];
  }
  __syncthreads();
}
// Of those, as products over codes want them: channels 2 t, 2 t + 1 of each half step.
template <class C>
__device__ void LoadQueries(const uint32_t* queries, int g, int t, Queries<C>& q) {
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) q.b[ht][step][half] = queries[C::QueryWord(8 * ht + g, 8 * step + 4 * half + t)];
    }
  }
}

// The sums over a group's channels: products with codes that are all 1.
template <class C>
__device__ void SumQueries(Queries<C>& q) {
  if constexpr (!C::K::kCentred) {
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
      float sum[4];
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        if (step * 16 % C::K::kGroup == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
        const uint32_t ones[2] = {0x00010001u << C::K::FieldShift(2 * (step % C::K::kWordSteps)),
                                  0x00010001u << C::K::FieldShift(2 * (step % C::K::kWordSteps) + 1)};
        ptx::MmaHalf(sum, ones[0], ones[0], ones[1], ones[1], q.b[ht][step][0], q.b[ht][step][1]);
        if ((step + 1) * 16 % C::K::kGroup != 0) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) q.sum[ht][i][step * 16 / C::K::kGroup] = sum[i];
      }
    }
  }
}

// After LoadQueries, for codes: times the power of two that puts a head's largest into [2^14, 2^15), for float16 at most
// 2^30, and less by the fields' shifts.
template <class C>
__device__ void PrepareQueries(const DecodeAttentionArgs& args, int t, Queries<C>& q) {
  constexpr bool half = !C::kBFloat16;
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 2 * C::kSteps; ++i) {
      const uint32_t magnitudes = q.b[ht][i / 2][i % 2] & 0x7FFF7FFF;
      top = half ? ptx::MaxHalf(top, magnitudes) : ptx::MaxBFloat16(top, magnitudes);
    }
    float largest = half ? fmaxf(ptx::HalfAt(top, 0), ptx::HalfAt(top, 1))
                         : fmaxf(ptx::BFloat16At(top, 0), ptx::BFloat16At(top, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 16u), half ? 127u + 15 : 127u + 127);
    int up = 14 + 127 - static_cast<int>(exponent);
    if (half) {  // packed, by powers of two up to 2^15, so twice where the numbers are small
      up = min(up, 30);  // enough: a float16 below 2^-16 has few bits
      const int once = min(up, 15), again = up - once;
      const auto power = [](int e) {
        return static_cast<uint32_t>(e + 15) << 10 | static_cast<uint32_t>(e + 15) << 26;
      };
      if (__any_sync(~0u, again != 0)) {
#pragma unroll
        for (int i = 0; i < 2 * C::kSteps; ++i) {
          uint32_t& word = q.b[ht][i / 2][i % 2];
          word = ptx::MultiplyHalf(word, power(again));
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * C::kSteps; ++i) {
        uint32_t& word = q.b[ht][i / 2][i % 2];
        word = ptx::MultiplyHalf(word, power(once - C::K::FieldShift(i % (2 * C::K::kWordSteps))));
      }
    } else {
      const float factor = __uint_as_float(static_cast<uint32_t>(up + 127) << 23);
#pragma unroll
      for (int i = 0; i < 2 * C::kSteps; ++i) {
        const float of_field = factor / static_cast<float>(1 << C::K::FieldShift(i % (2 * C::K::kWordSteps)));
        uint32_t& word = q.b[ht][i / 2][i % 2];
        word = ptx::PackHalf(ptx::BFloat16At(word, 0) * of_field, ptx::BFloat16At(word, 1) * of_field);
      }
    }
    // From lanes of head g to lanes of heads 2 t and 2 t + 1.
    const float down = __uint_as_float(static_cast<uint32_t>(127 - up) << 23);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      q.factor[ht][i] = __shfl_sync(~0u, args.scale * kLog2E * down * C::K::kUnit, 8 * t + 4 * i);
    }
  }
  SumQueries<C>(q);
}

// What a block's warps turn together, in float32 [head, channel] of shared memory, and what a warp takes of it: as
// PrepareQueries, but for the sums.
template <class C>
__device__ void TurnQueries(const DecodeAttentionArgs& args, int pair, int ratio, int warp, float* turned) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int first_head = 0; first_head < C::kHeads; first_head += C::kWarps) {
    const int head = first_head + warp;
    if (head >= ratio) break;
    const uint32_t* row = QueryRow<C>(args, pair, ratio, head);
    float* to = turned + head * C::kDim;
    constexpr bool half = !C::kBFloat16;
#pragma unroll
    for (int first = 0; first < C::kDim / 2; first += 32) {
      const int i = first + lane;
      const uint32_t word = __ldcg(row + i);
      to[2 * i] = half ? ptx::HalfAt(word, 0) : ptx::BFloat16At(word, 0);
      to[2 * i + 1] = half ? ptx::HalfAt(word, 1) : ptx::BFloat16At(word, 1);
    }
    __syncwarp();
    TurnBy(args.key_turn, to, C::kDim, lane);
  }
  __syncthreads();
}
template <class C>
__device__ void LoadTurnedQueries(const DecodeAttentionArgs& args, int ratio, const float* turned, int g, int t,
                                  Queries<C>& q) {
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
    const int head = 8 * ht + g;
    const float2* row = reinterpret_cast<const float2*>(turned + min(head, ratio - 1) * C::kDim);
    const auto at = [&](int i) {  // channels 2 t, 2 t + 1 of a half step
      const float2 x = row[4 * i + t];
      return head < ratio ? x : float2{0, 0};
    };
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 2 * C::kSteps; ++i) largest = fmaxf(largest, fmaxf(fabsf(at(i).x), fabsf(at(i).y)));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 16u), 127u + 127);
    const int up = 14 + 127 - static_cast<int>(exponent);
    const float factor = __uint_as_float(static_cast<uint32_t>(up + 127) << 23);
#pragma unroll
    for (int i = 0; i < 2 * C::kSteps; ++i) {
      const float of_field = factor / static_cast<float>(1 << C::K::FieldShift(i % (2 * C::K::kWordSteps)));
      q.b[ht][i / 2][i % 2] = ptx::PackHalf(at(i).x * of_field, at(i).y * of_field);
    }
    const float down = __uint_as_float(static_cast<uint32_t>(127 - up) << 23);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      q.factor[ht][i] = __shfl_sync(~0u, args.scale * kLog2E * down * C::K::kUnit, 8 * t + 4 * i);
    }
  }
}

// For dense tokens, whose lanes read 8 neighbouring channels at once, 32 j + 8 t + 0..7: steps 2 j and 2 j + 1. From
// `queries`, or, where those there are turned, from device memory.
template <class C>
__device__ void LoadQueriesForDense(const DecodeAttentionArgs& args, int pair, int ratio, const uint32_t* queries, int g, int t,
                                    Queries<C>& q) {
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
    const uint32_t* row = QueryRow<C>(args, pair, ratio, 8 * ht + g);
#pragma unroll
    for (int step = 0; step < C::kSteps; step += 2) {
      uint4 v = {0, 0, 0, 0};
      if (!C::kTurnsKeys) v = *reinterpret_cast<const uint4*>(queries + C::QueryWord(8 * ht + g, 8 * step + 4 * t));
      else if (row != nullptr) v = __ldcg(reinterpret_cast<const uint4*>(row + 8 * step + 4 * t));
      q.b[ht][step][0] = v.x, q.b[ht][step][1] = v.y;
      q.b[ht][step + 1][0] = v.z, q.b[ht][step + 1][1] = v.w;
    }
    q.factor[ht][0] = q.factor[ht][1] = args.scale * kLog2E;
  }
}

// ---- logits, but for a factor, of sixteen tokens: x[ht][i] of token g (i = 0, 1: head 8 ht + 2 t + i) and g + 8 (2, 3)

template <class C>
using Logits = float[C::kHeadTiles][4];
template <class C>
using TileLogits = float[C::kTile / 16][C::kHeadTiles][4];

// Where a lane reads codes and metadata: chunk `chunk` of rows `row` + multiples of 8, whose metadata are those of token g.
template <class C, class R>
struct CodeReader {
  static constexpr int kWords = R::kRow / 16;  // of a chunk
  static constexpr int kVector = kWords < 4 ? kWords : 4;
  static constexpr int kPlane = C::kTile * R::kMeta;
  static constexpr int kOddPart = R::kOddRow / std::max(R::kOdd, 1);  // of a row: one bit of each code
  static constexpr int kOddBytes = kOddPart / 4;                      // and of a chunk: a byte or two for each word

  ptx::Shared rows, odd, meta;

  __device__ __forceinline__ CodeReader(ptx::Shared rows_at, ptx::Shared meta_at, int row, int chunk, int g)
      : rows(rows_at + row * R::kRow + (chunk * kWords * 4 ^ R::SwizzleOf(row) * 16)),
        odd(meta_at + row * R::kOddRow + chunk * kOddBytes),
        meta(meta_at + C::kTile * R::kOddRow + g * R::kMeta) {}

  // Words `first` and on of the row `on` further. Keys: `on` is a multiple of 8. Values: the reader's row is even.
  __device__ __forceinline__ void Words(int on, int first, uint32_t (&words)[kVector]) const {
    ptx::LoadShared((rows ^ (first * 4 ^ R::SwizzleOf(on % 8) * 16)) + on * R::kRow, words);
  }
  // The odd bits of the chunk's words, of the row `on` further.
  using OddBits = uint32_t[std::max(R::kOdd, 1)][std::max(kOddBytes / 4, 1)];
  __device__ __forceinline__ void Odd(int on, OddBits& bits) const {
#pragma unroll
    for (int i = 0; i < R::kOdd; ++i) {
      const ptx::Shared at = odd + on * R::kOddRow + i * kOddPart;
      if constexpr (kOddBytes == 2) {
        bits[i][0] = ptx::LoadShared16(at);
      } else {
        ptx::LoadShared(at, bits[i]);
      }
    }
  }
  // Those of word w.
  __device__ __forceinline__ static void OddOf(const OddBits& bits, int w, OddWords<R::kOdd>& words) {
#pragma unroll
    for (int i = 0; i < R::kOdd; ++i) {
      if constexpr (R::kBits == 4) {
        const uint32_t byte = bits[i][w / 4] >> w % 4 * 8 & 0xFF;
        words[i] = byte | byte << 12;
      } else {
        words[i] = ptx::PickBytes(bits[i][w / 2], 0, w % 2 == 0 ? 0x4140 : 0x4342);
      }
    }
  }
  // Metadata of token g + `on`.
  __device__ __forceinline__ Meta<R> MetaOf(int on) const {
    return Meta<R>(meta + on * R::kMeta, std::integral_constant<int, kPlane>());
  }
};

template <class C>
__device__ __forceinline__ void LogitsOfCodes(ptx::Shared tile, int g, int t, const Queries<C>& q, TileLogits<C>& x,
                                              uint32_t& broken) {
  using K = typename C::K;
  using Reader = CodeReader<C, K>;
  constexpr int kBlocks = C::kTile / 16, kWords = Reader::kWords, kVector = Reader::kVector, kFields = 16 / K::kBits;
  const Reader reader(tile, tile + C::kKeyMetaAt, g, t, g);
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const Meta<K> meta[2] = {reader.MetaOf(16 * n), reader.MetaOf(16 * n + 8)};
    typename Reader::OddBits odd[2];
    reader.Odd(16 * n, odd[0]), reader.Odd(16 * n + 8, odd[1]);
    float sum[C::kHeadTiles][4], squares[2] = {0, 0};
#pragma unroll
    for (int first = 0; first < kWords; first += kVector) {
      uint32_t words[2][kVector];
      reader.Words(16 * n, first, words[0]);
      reader.Words(16 * n + 8, first, words[1]);
#pragma unroll
      for (int w = 0; w < kVector; ++w) {
        uint32_t low[kFields], high[kFields];
        OddWords<K::kOdd> low_odd, high_odd;
        Reader::OddOf(odd[0], first + w, low_odd), Reader::OddOf(odd[1], first + w, high_odd);
        K::Unpack(words[0][w], low_odd, low);
        K::Unpack(words[1][w], high_odd, high);
        if constexpr (K::kMayBreak) broken |= K::Broken(words[0][w]) | K::Broken(words[1][w]);
        if constexpr (K::kNormed) squares[0] += ptx::SumOfSquares(low), squares[1] += ptx::SumOfSquares(high);
#pragma unroll
        for (int s = 0; s < K::kWordSteps; ++s) {
          const int step = (first + w) * K::kWordSteps + s, group = step * 16 / K::kGroup;
#pragma unroll
          for (int ht = 0; ht < C::kHeadTiles; ++ht) {
            float(&d)[4] = sum[ht];
            if (step * 16 % K::kGroup == 0) d[0] = d[1] = d[2] = d[3] = 0;
            ptx::MmaHalf(d, low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1], q.b[ht][step][0],
                         q.b[ht][step][1]);
            if ((step + 1) * 16 % K::kGroup != 0) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float before = group == 0 ? 0.0f : x[n][ht][i], scale = meta[i / 2].scale(group);
              if constexpr (K::kCentred) {
                x[n][ht][i] = fmaf(scale, d[i], before);
              } else if constexpr (K::kZero == Zero::kOfCodes) {
                const float centred = fmaf(-meta[i / 2].zero(group), q.sum[ht][i % 2][group], d[i]);
                x[n][ht][i] = fmaf(scale, centred, before);
              } else {
                x[n][ht][i] = fmaf(scale, d[i], fmaf(-meta[i / 2].zero(group), q.sum[ht][i % 2][group], before));
              }
            }
          }
        }
      }
    }
    if constexpr (K::kPoisons) {
#pragma unroll
      for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][ht][i] += meta[i / 2].poison();
      }
    }
    if constexpr (K::kNormed) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // the row's other chunks are in the lanes beside
        squares[i] += __shfl_xor_sync(~0u, squares[i], 1);
        squares[i] += __shfl_xor_sync(~0u, squares[i], 2);
      }
#pragma unroll
      for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][ht][i] *= ptx::InverseRoot(squares[i / 2]);
      }
    }
  }
}

// The same where keys share scales and minima over tokens. Of a tile's group, with s and m of channel c: a logit is the sum of
// (q s) code + q m. The sum of q m is that of a key which all tokens share. q s is float16, times the power of two that puts
// the group's largest s into [1/2, 1): rounded by 2^-12 of itself, or less than 2^-39 of the largest.
template <class C>
__device__ __forceinline__ void LogitsOfChannelGroups(ptx::Shared tile, int g, int t, const Queries<C>& q, TileLogits<C>& x) {
  using K = typename C::K;
  using Reader = CodeReader<C, K>;
  constexpr int kBlocks = C::kTile / 16, kWords = Reader::kWords, kVector = Reader::kVector, kFields = 16 / K::kBits;
  const Reader reader(tile, tile + C::kKeyMetaAt, g, t, g);
  const ptx::Shared scales = tile + C::kKeyMetaAt, minima = scales + 2 * C::kDim;
  const auto pair_of = [](ptx::Shared channels, int step, int half, int t) {  // channels 2 t, 2 t + 1 of a half step
    uint32_t word[1];
    ptx::LoadShared(channels + (8 * step + 4 * half + t) * 4, word);
    return word[0];
  };
  const auto power = [](int e) {  // 2^e twice, from 2^-24 to 2^15
    const uint32_t bits = e >= -14 ? static_cast<uint32_t>(e + 15) << 10 : 1u << (e + 24);
    return bits | bits << 16;
  };
  uint32_t some[C::kDim / 64], top = 0;
  ptx::LoadShared(scales + (4 * g + t) * (C::kDim / 16), some);
#pragma unroll
  for (const uint32_t pair : some) top = ptx::MaxHalf(top, pair);
  float largest = fmaxf(ptx::HalfAt(top, 0), ptx::HalfAt(top, 1));
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
  const int down = min(max(126 - static_cast<int>(__float_as_uint(largest) >> 23), -16), 15);
  const uint32_t norm = power(down);
  const float up = __uint_as_float(static_cast<uint32_t>(127 + 24 - down) << 23);
  float sum[kBlocks][C::kHeadTiles][4], shared[C::kHeadTiles][4];
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shared[ht][i] = 0;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) sum[n][ht][i] = 0;
    }
  }
#pragma unroll
  for (int first = 0; first < kWords; first += kVector) {
    uint32_t words[kBlocks][2][kVector];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      reader.Words(16 * n, first, words[n][0]);
      reader.Words(16 * n + 8, first, words[n][1]);
    }
#pragma unroll
    for (int w = 0; w < kVector; ++w) {
      uint32_t low[kBlocks][kFields], high[kBlocks][kFields];
      const OddWords<0> none = {};
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) K::Unpack(words[n][0][w], none, low[n]), K::Unpack(words[n][1][w], none, high[n]);
#pragma unroll
      for (int s = 0; s < K::kWordSteps; ++s) {
        const int step = (first + w) * K::kWordSteps + s;
        uint32_t scaled[2], lowest[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          scaled[half] = ptx::MultiplyHalf(pair_of(scales, step, half, t), norm);
          lowest[half] = pair_of(minima, step, half, t);
        }
#pragma unroll
        for (int ht = 0; ht < C::kHeadTiles; ++ht) {
          uint32_t b[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            b[half] = ptx::MultiplyHalf(q.b[ht][step][half], scaled[half]);
            const int shift = NumberFields::Shift<K::kBits>(2 * s + half);
            if (shift > 0) b[half] = ptx::MultiplyHalf(b[half], static_cast<uint32_t>(15 - shift) * 0x04000400u);
          }
          ptx::MmaHalf(shared[ht], lowest[0], lowest[0], lowest[1], lowest[1], q.b[ht][step][0], q.b[ht][step][1]);
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
            ptx::MmaHalf(sum[n][ht], low[n][2 * s], high[n][2 * s], low[n][2 * s + 1], high[n][2 * s + 1], b[0], b[1]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][ht][i] = fmaf(sum[n][ht][i], up, shared[ht][i]);
    }
  }
}

template <bool kBFloat16>
__device__ __forceinline__ void Mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    const uint32_t (&b)[2]) {
  if constexpr (kBFloat16) {
    ptx::MmaBFloat16(d, a0, a1, a2, a3, b[0], b[1]);
  } else {
    ptx::MmaHalf(d, a0, a1, a2, a3, b[0], b[1]);
  }
}

// Of sixteen dense tokens. key(i, j) gives granule 4 j + t of token g + 8 i; any numbers where no token is.
template <class C, typename Key>
__device__ __forceinline__ void LogitsOfDense(const Queries<C>& q, const Key& key, Logits<C>& x) {
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) x[ht][0] = x[ht][1] = x[ht][2] = x[ht][3] = 0;
#pragma unroll
  for (int step = 0; step < C::kSteps; step += 2) {
    const uint4 low = key(0, step / 2), high = key(1, step / 2);
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
      Mma<C::kBFloat16>(x[ht], low.x, high.x, low.y, high.y, q.b[ht][step]);
      Mma<C::kBFloat16>(x[ht], low.z, high.z, low.w, high.w, q.b[ht][step + 1]);
    }
  }
}

// A logit in base 2 under a cap, in base 2 likewise: cap tanh(logit / cap), off by some 2^-23 of the cap.
__device__ __forceinline__ float Capped(float x, float cap) {
  const float top = cap * kLog2E;
  return fmaf(-2 * top, __fdividef(1.0f, 1.0f + ptx::Exp2(x * (2.0f / cap))), top);
}
// Of all logits, whose factors are 1 behind it.
template <class C>
__device__ __forceinline__ void CapLogits(const Queries<C>& q, float cap, Logits<C>& x) {
  if constexpr (C::kCapped) {
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[ht][i] = Capped(x[ht][i] * q.factor[ht][i % 2], cap);
    }
  }
}
// Of logits behind CapLogits, to the logit in base 2.
template <class C>
struct Factors {
  float of[C::kHeadTiles][2];
  __device__ __forceinline__ explicit Factors(const Queries<C>& q) {
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int i = 0; i < 2; ++i) of[ht][i] = C::kCapped ? 1.0f : q.factor[ht][i];
    }
  }
};

// Hides what is no token: those from `valid` on, and those before `hidden`. `first` is that of x[.][0] in the tile.
template <class C>
__device__ __forceinline__ void Mask(Logits<C>& x, int first, int valid, int hidden, int g) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = first + g + i / 2 * 8;
    if (token < valid && (!C::kWindow || token >= hidden)) continue;
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) x[ht][i] = -INFINITY;
  }
}

// ---- weights and values

template <class C>
__device__ __forceinline__ void AddCodes(ptx::Shared tile, int valid, int g, int t, const float (&factor)[C::kHeadTiles][2],
                                         const TileLogits<C>& x, Partial<C>& partial) {
  using V = typename C::V;
  using Reader = CodeReader<C, V>;
  constexpr int kBlocks = C::kTile / 16, kWords = Reader::kWords, kVector = Reader::kVector, kFields = 16 / V::kBits;
  // Of rows 2 t, 2 t + 1 and 8 more: chunk g / 2.
  const Reader reader(tile + C::kValuesAt, tile + C::kValueMetaAt, 2 * t, g / 2, g);
  if (valid < C::kTile) {
    // Where there is no token, what lies in the planes is anything, and 0 times that must be 0.
    const ptx::Shared meta = tile + C::kValueMetaAt + C::kTile * V::kOddRow;
    for (int i = valid * V::kMeta + 2 * (4 * g + t); i < Reader::kPlane; i += 64) {
#pragma unroll
      for (int p = 0; p < V::kPlanes; ++p) ptx::ZeroShared16(meta + p * Reader::kPlane + i);
    }
    __syncwarp();
  }

  // p s, of heads 2 t and 2 t + 1 in one word: of token 16 n + g, and 8 more.
  uint32_t weights[C::kHeadTiles][V::kGroups][kBlocks][2];
  for (bool rebase = __any_sync(~0u, partial.m[0][0] == kNoReference);;) {  // all heads get their first reference together
    if (rebase) {
#pragma unroll
      for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float highest = -INFINITY;
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const Meta<V> meta = reader.MetaOf(16 * n + 8 * half);
              float largest = 0x1p-24f;
#pragma unroll
              for (int group = 0; group < V::kGroups; ++group) {
                largest = fmaxf(largest, V::kSigned ? fabsf(meta.scale(group)) : meta.scale(group));
              }
              highest = fmaxf(highest, fmaf(x[n][ht][2 * half + i], factor[ht][i], ptx::Log2(largest)));
            }
          }
          partial.Rebase(ht, i, highest);
        }
      }
    }
    uint32_t top = 0;
    float l[C::kHeadTiles][2], z[C::kHeadTiles][2][V::kGroups];
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        l[ht][i] = partial.l[ht][i];
#pragma unroll
        for (int group = 0; group < V::kGroups; ++group) z[ht][i][group] = partial.zero[ht][i][group];
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Meta<V> meta = reader.MetaOf(16 * n + 8 * half);
#pragma unroll
        for (int ht = 0; ht < C::kHeadTiles; ++ht) {
          float p[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            p[i] = ptx::Exp2(fmaf(x[n][ht][2 * half + i], factor[ht][i], -partial.m[ht][i]));
            l[ht][i] += p[i];
            if constexpr (V::kPoisons) l[ht][i] += meta.poison();
          }
#pragma unroll
          for (int group = 0; group < V::kGroups; ++group) {
            float weight[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              weight[i] = p[i] * meta.scale(group);
              if constexpr (!V::kCentred) {
                z[ht][i][group] =
                    fmaf(V::kZero == Zero::kOfCodes ? weight[i] : p[i], meta.zero(group), z[ht][i][group]);
              }
            }
            weights[ht][group][n][half] = ptx::PackHalf(weight[0], weight[1]);
            top = ptx::MaxHalf(top, weights[ht][group][n][half] & (V::kSigned ? 0x7FFF7FFFu : ~0u));
          }
        }
      }
    }
    rebase = __any_sync(~0u, fmaxf(ptx::HalfAt(top, 0), ptx::HalfAt(top, 1)) > kOverflow);
    if (rebase) continue;
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        partial.l[ht][i] = l[ht][i];
#pragma unroll
        for (int group = 0; group < V::kGroups; ++group) partial.zero[ht][i][group] = z[ht][i][group];
      }
    }
    break;
  }

  // Values: channels 16 step + g and + 8 of tokens 2 t, 2 t + 1 and 8 more, from the halves `side` of words.
  const uint32_t side = g % 2 == 0 ? 0x5410 : 0x7632;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    // Heads 2 t, 2 t + 1 of token g become tokens 2 t, 2 t + 1 of head g.
    uint32_t b[C::kHeadTiles][V::kGroups][2];
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int group = 0; group < V::kGroups; ++group) {
#pragma unroll
        for (int half = 0; half < 2; ++half) b[ht][group][half] = ptx::Transpose(weights[ht][group][n][half]);
      }
    }
    typename Reader::OddBits odd[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) reader.Odd(16 * n + i % 2 + i / 2 * 8, odd[i]);
#pragma unroll
    for (int first = 0; first < kWords; first += kVector) {
      uint32_t words[4][kVector];
#pragma unroll
      for (int i = 0; i < 4; ++i) reader.Words(16 * n + i % 2 + i / 2 * 8, first, words[i]);
#pragma unroll
      for (int w = 0; w < kVector; ++w) {
        uint32_t low[kFields], high[kFields];
        const auto odd_of = [&](int row, OddWords<V::kOdd>& both) {
          OddWords<V::kOdd> next;
          Reader::OddOf(odd[row], first + w, both), Reader::OddOf(odd[row + 1], first + w, next);
#pragma unroll
          for (int i = 0; i < V::kOdd; ++i) both[i] = ptx::PickBytes(both[i], next[i], side);
        };
        OddWords<V::kOdd> low_odd, high_odd;
        odd_of(0, low_odd), odd_of(2, high_odd);
        V::Unpack(ptx::PickBytes(words[0][w], words[1][w], side), low_odd, low);
        V::Unpack(ptx::PickBytes(words[2][w], words[3][w], side), high_odd, high);
        if constexpr (V::kMayBreak) {
#pragma unroll
          for (int i = 0; i < 4; ++i) partial.broken |= V::Broken(words[i][w]);
        }
#pragma unroll
        for (int s = 0; s < V::kWordSteps; ++s) {
          const int step = (first + w) * V::kWordSteps + s, group = step * 16 / V::kGroup;
#pragma unroll
          for (int ht = 0; ht < C::kHeadTiles; ++ht) {
            ptx::MmaHalf(partial.o[ht][step], low[2 * s], low[2 * s + 1], high[2 * s], high[2 * s + 1],
                         b[ht][group][0], b[ht][group][1]);
          }
        }
      }
    }
  }
}

// Of sixteen dense tokens. value(i, j) gives granule 8 j + g of token 2 t + i, i = 0, 1, 8, 9; any numbers where no token
// is.
template <class C, typename Value>
__device__ __forceinline__ void AddDense(const float (&factor)[C::kHeadTiles][2], const Logits<C>& x, Partial<C>& partial,
                                         const Value& value) {
  uint32_t b[C::kHeadTiles][2];
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float top = fmaxf(x[ht][i], x[ht][i + 2]) * factor[ht][i];
      // The largest p stays below 2^15 here, too.
      const bool rebase = partial.m[ht][i] == kNoReference || top > partial.m[ht][i] + 15;
      if (__any_sync(~0u, rebase)) partial.Rebase(ht, i, top);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float p[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        p[i] = ptx::Exp2(fmaf(x[ht][2 * half + i], factor[ht][i], -partial.m[ht][i]));
        partial.l[ht][i] += p[i];
      }
      b[ht][half] = ptx::Transpose(C::kBFloat16 ? ptx::PackBFloat16(p[0], p[1]) : ptx::PackHalf(p[0], p[1]));
    }
  }
  // Channels 64 j + 8 g + 2 w and + 1 are rows g and g + 8 of step 4 j + w.
#pragma unroll
  for (int j = 0; j < C::kDim / 64; ++j) {
    uint32_t words[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = value(i % 2 + i / 2 * 8, j);
      words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // row g or g + 8, tokens 2 t, 2 t + 1 or 8 more
        a[i] = ptx::PickBytes(words[i / 2 * 2][w], words[i / 2 * 2 + 1][w], i % 2 == 0 ? 0x5410 : 0x7632);
      }
#pragma unroll
      for (int ht = 0; ht < C::kHeadTiles; ++ht) {
        Mma<C::kBFloat16>(partial.o[ht][4 * j + w], a[0], a[1], a[2], a[3], b[ht]);
      }
    }
  }
}

// ---- a whole tile in shared memory, of which `valid` tokens are there and the first `hidden` out of sight

template <class C>
__device__ __forceinline__ void AttendTile(ptx::Shared tile, int valid, int hidden, int g, int t, const Queries<C>& q,
                                           float cap, Partial<C>& partial) {
  const auto load = [](ptx::Shared at) {
    uint32_t words[4];
    ptx::LoadShared(at, words);
    return uint4{words[0], words[1], words[2], words[3]};
  };
  TileLogits<C> x;
  if constexpr (C::K::kDense) {
    const ptx::Shared keys = tile + g * C::K::kRow + (t ^ C::K::SwizzleOf(g)) * 16;
#pragma unroll
    for (int n = 0; n < C::kTile / 16; ++n) {
      LogitsOfDense<C>(
          q, [&](int i, int j) { return load((keys ^ j % 2 * 64) + j / 2 * 128 + (16 * n + 8 * i) * C::K::kRow); }, x[n]);
    }
  } else if constexpr (C::K::kTokens > 1) {
    LogitsOfChannelGroups<C>(tile, g, t, q, x);
  } else {
    LogitsOfCodes<C>(tile, g, t, q, x, partial.broken);
  }
#pragma unroll
  for (int n = 0; n < C::kTile / 16; ++n) CapLogits<C>(q, cap, x[n]);
  const Factors<C> factors(q);
  if (C::kDense || valid < C::kTile || (C::kWindow && hidden > 0)) {
#pragma unroll
    for (int n = 0; n < C::kTile / 16; ++n) Mask<C>(x[n], 16 * n, valid, hidden, g);
  }
  if constexpr (C::V::kDense) {
    const ptx::Shared values = tile + C::kValuesAt + 2 * t * C::V::kRow + (g ^ C::V::SwizzleOf(2 * t)) * 16;
#pragma unroll
    for (int n = 0; n < C::kTile / 16; ++n) {
      AddDense<C>(factors.of, x[n], partial, [&](int i, int j) {
        return load((values ^ C::V::SwizzleOf(i % 2) * 16) + (16 * n + i) * C::V::kRow + 128 * j);
      });
    }
  } else {
    AddCodes<C>(tile, valid, g, t, factors.of, x, partial);
  }
}

}  // namespace kvq::decode_attention
