// Fused decode attention over latents: what it takes is in kernels/device/latent_attention.h.
//
// Limit: the bytes of the cache, each read once, over memory bandwidth, as long as heads are few. A token of DeepSeek-V2-Lite, 576
// channels in 16 bits, is 1152 bytes, and 16 heads do 2 (576 + 512) 16 = 35 kFLOP with it, 30 a byte; of DeepSeek-V3's 128 heads it
// is 278 kFLOP, 242 a byte: at 4.6 TB/s more than an H200's tensor cores do. How it gets there:
//
// - A tile of tokens is brought to shared memory by cp.async and read twice there: row by row as keys, and transposed, without the
//   rotary part, as values. Heads are the rows of both products. Few tokens of 16 bits come by the tensor memory accelerator instead
//   (`boxes`), for which a warp asks that does nothing else.
// - Of the scores each of eight warps has a quarter of the channels and half of the tokens, so that its share of the queries, which
//   come once a block, stays in registers; the quarters are added in shared memory. Codes are decoded on the way, once, to 16-bit
//   numbers of the type that is computed in: rows lie such that a lane's words (code_row.h) become its operands, and it writes them
//   down for the values.
// - An accumulator of sixteen heads is 16 x 512 float32, more than a warp's registers: each warp has an eighth of its channels.
// - The tokens of a sequence are dealt to blocks; a second kernel adds what they leave, on as many multiprocessors as there are:
//   sixteen heads of 132 blocks are 4 MB. Meanwhile the next launch's first tiles are on their way, where they may be (`early`); in
//   boxes one at a time, as what a kernel has written waits for all that is on its way: its end comes later by as much as they take.
//
// Lane 4 g + t throughout: g = 0..7, t = 0..3.
#pragma once

#include "kernels/device/latent_attention.h"
#include "kernels/device/tensor_map.h"
#include "kernels/vector_math.h"
#ifdef __CUDACC__
#include "kernels/device/attention_tiles.cuh"
#include "kernels/groups.h"
#endif

namespace kvq::latent_attention {

inline constexpr int kMostSplits = 256;
inline constexpr int kWarps = 8, kThreads = 32 * kWarps;
inline constexpr int kShares = 4;           // of the channels of a key, one a warp
// Of the second kernel: loads of a thread; and shared memory that its blocks ask for, and do not use, so that what a multiprocessor has
// of it need not be divided anew between the two kernels, and blocks find room beside one of the first.
inline constexpr int kMergeBatch = 9;
inline constexpr int kMergeShared = 20 << 10, kMergeSharedOfBoxes = 16 << 10;
inline constexpr int kBarrierBytes = 128;  // of boxes

// What blocks leave: m and the sum l of 2^(logit - m), [batch, head, split]; sums of 2^(logit - m) c, [rank] each, [batch, split, head].
struct Workspace {
  void* sums;  // float2
  float* outputs;
  int64_t bytes;
};
KVQ_HD inline Workspace LayOut(void* base, int64_t batch, int64_t splits, int64_t heads, int64_t rank) {
  const int64_t rows = batch * splits * heads, sums = (rows * 8 + 255) / 256 * 256;
  char* at = static_cast<char*>(base);
  return {at, reinterpret_cast<float*>(at + sums), sums + rows * rank * 4};
}

// Channels of a row in shared memory: whole steps of a product.
KVQ_HD constexpr int Padded(int channels) { return (channels + 15) / 16 * 16; }
// Bytes from a row in shared memory to the next: an odd number of granules of 16 bytes, so that eight rows' reads of one granule are
// in different banks; or no gap where rows are no granules.
KVQ_HD constexpr int Stride(int bytes) { return bytes % 32 == 0 ? bytes + 16 : bytes; }
// Rows of 16-bit numbers that are copied as they are have no gap where they are 128 bytes times a power of two, as most are: copies to
// others take longer.
KVQ_HD constexpr bool IsSwizzled(int channels, bool copied) { return copied && channels >= 64 && (channels & (channels - 1)) == 0; }
KVQ_HD constexpr int NumberStride(int channels, bool copied = false) {
  return IsSwizzled(channels, copied) ? channels * 2 : Stride(Padded(channels) * 2);
}
// Queries in boxes are whole lines, too; nobody looks for one further on than his own.
KVQ_HD constexpr int QueryStride(int channels, bool boxes) { return boxes ? channels * 2 : NumberStride(channels); }

// Of tiles that come in boxes, and of queries (kernels/runtime/tensor_map.h).
struct TensorMaps {
  TensorMap latents, rotary_keys, queries;
};

#ifdef __CUDACC__

using decode_attention::GroupScale;
using decode_attention::GroupScaleOf;
using decode_attention::kLog2E;
using decode_attention::kNoReference;
using decode_attention::Mma;
using decode_attention::Row;

__device__ constexpr int Up(int bytes) { return (bytes + 127) / 128 * 128; }

// Rows of 16-bit numbers: granules in their order; or where rows have no gap, as the tensor memory accelerator writes boxes of 64
// channels with a swizzle of 128 bytes, kTile rows each: eight rows' reads of one granule are in different banks.
template <int kChannels, int kTile = 0>  // 0: rows with a gap
struct Rows {
  static constexpr bool kSwizzled = kTile > 0;
  static_assert(!kSwizzled || kChannels % 64 == 0);
  static constexpr int kStride = kSwizzled ? 128 : NumberStride(kChannels), kBox = 128 * kTile;
  __device__ static constexpr unsigned At(unsigned row, unsigned granule) {
    return row * kStride + (kSwizzled ? granule / 8 * kBox + ((granule ^ row) % 8 << 4) : granule << 4);
  }
  // Likewise of rows and granules that are a lane's own and more, none with a bit of the lane's (of rows, the low three): `own` is At
  // of the lane's own from a multiple of 128 on, so that a lane keeps one register.
  __device__ static constexpr ptx::Shared Further(ptx::Shared own, int rows, int granules) {
    if (!kSwizzled) return own + rows * kStride + granules * 16;
    static_assert(!kSwizzled || IsSwizzled(kChannels, true), "a lane's own granules and others have bits in common");
    return (own ^ ((granules ^ rows) % 8 << 4)) + granules / 8 * kBox + rows * kStride;
  }
};

// One part of a token, and a tile of it as it is stored.
template <class Codec, int kDim, int kTile>
struct Part : Row<Codec, kDim> {
  using R = Row<Codec, kDim>;
  static_assert(R::kTokens == 1 && !R::kNormed, "a token is read alone");
  using N = Rows<kDim, IsSwizzled(kDim, R::kDense) ? kTile : 0>;
  static constexpr int kNumbers = kTile * NumberStride(kDim, R::kDense);  // bytes of a tile of 16-bit numbers
  // Bytes of a token in plane p.
  __device__ static constexpr int Bytes(int p) { return p == 0 ? R::kRow : R::PlaneBytes(p - 1); }
  // Where plane p lies in a tile of codes.
  __device__ static constexpr int PlaneAt(int p) {
    int at = 0;
    for (int before = 0; before < p; ++before) at += (kTile * Stride(Bytes(before)) + 15) / 16 * 16;
    return at;
  }
  static constexpr int kStored = R::kDense ? kNumbers : PlaneAt(R::kPlanesBehind + 1);
};

template <class Latent, class Rotary, int kRank_, int kTurned_, int kHeadTiles_, int kTile_, int kStages_, int kBlocks_, bool kBoxes_>
struct Config {
  static constexpr int kRank = kRank_, kTurned = kTurned_, kHeadTiles = kHeadTiles_, kTile = kTile_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor
  static constexpr bool kBoxes = kBoxes_;   // tiles come by the tensor memory accelerator
  static constexpr int kAhead = kStages - 1;  // of them, before the kernel before has ended
  // For a compiler, which then keeps to 128 registers: with more, three warps of a quarter of a multiprocessor leave no room there for two of
  // the second kernel's.
  static constexpr int kMostThreads = kBoxes ? 512 : kThreads;
  using L = Part<Latent, kRank, kTile>;
  using T = Part<Rotary, kTurned, kTile>;
  static_assert(kRank % 16 == 0 && kTurned % 8 == 0 && kTile % 32 == 0);
  static constexpr bool kDense = L::kDense && T::kDense;
  static constexpr int kHeads = 16 * kHeadTiles;
  // Steps of a product over a key's channels; of a share of the latent, which are neighbours, and of the rotary key, every fourth.
  static constexpr int kLatentSteps = (kRank / 16 + kShares - 1) / kShares, kAllRotary = Padded(kTurned) / 16;
  static constexpr int kRotarySteps = (kAllRotary + kShares - 1) / kShares, kOwnSteps = kLatentSteps + kRotarySteps;
  static constexpr int kSteps = kRank / 16 + kAllRotary;
  static constexpr bool kEven = kRank / 16 % kShares == 0 && kAllRotary % kShares == 0;  // all shares are of as many steps
  static_assert(kEven || kDense, "shares of codes are whole words");
  using Queries = Rows<kSteps * 16, kBoxes ? kHeads : 0>;
  using Weights = Rows<kTile>;
  static constexpr int kTokenTiles = kTile / 16;  // columns by eights of a warp's scores, those of half a tile
  static constexpr int kPairs = (kRank / 16 + kWarps - 1) / kWarps;  // of eights of a warp's channels of the output
  static constexpr bool kHoldsQueries = kHeadTiles <= 2;  // in registers
  // Shared memory: stages, a tile of numbers of each part that is encoded, or where boxes come queries; scores [share, head, token],
  // weights [head, token], factors [head]; barriers of boxes, or queries that stay.
  static constexpr int kStage = Up(L::kStored) + Up(T::kStored), kQueryBytes = kHeads * QueryStride(kSteps * 16, kBoxes);
  static constexpr int kNumbersAt = kStages * kStage;
  static constexpr int kScoresAt =
      kNumbersAt + (L::kDense ? 0 : Up(L::kNumbers)) + (T::kDense ? 0 : Up(T::kNumbers)) + (kBoxes ? kQueryBytes : 0);
  static constexpr int kScoreRow = kTile + 8;  // floats: lanes of a store in different banks
  static constexpr int kWeightsAt = kScoresAt + kShares * kHeads * kScoreRow * 4;
  static constexpr int kFactorsAt = kWeightsAt + kHeads * Weights::kStride;
  static constexpr int kBehind = kFactorsAt + Up(kHeads * 8);
  static constexpr int kSharedBytes = kBehind + (kBoxes ? kBarrierBytes : kHoldsQueries ? 0 : kQueryBytes);
  // Queries that end in registers come to where scores and weights will be. Where tiles are small that is not enough, and they begin
  // in what lies before, the room of decoded numbers or the last stage: what comes there is asked for when they are in registers.
  static constexpr int kQueriesAt = kBoxes ? kNumbersAt : kHoldsQueries ? kFactorsAt - kQueryBytes : kBehind;
  static constexpr bool kQueriesAlone = kQueriesAt >= kScoresAt;
  // Whether the last stage is asked for as soon as the kernel before has ended, while queries are on their way. Codes did not gain.
  static constexpr bool kFills = kDense && kQueriesAlone;
  static_assert(kQueriesAt >= kNumbersAt - kStage && kQueriesAt % 16 == 0);
  // Barriers of boxes: that queries have come, and that of each stage, and that it is free again; then how many tiles came in vain.
  static constexpr int kStagesCome = 8, kStagesFree = kStagesCome + 8 * kStages, kInVain = kStagesFree + 8 * kStages;
  static_assert(!kBoxes || (kDense && kHeadTiles == 1 && kRank % 64 == 0 && kTurned % 64 == 0 && kEven && kInVain < kBarrierBytes));
  // Where dense tokens beside encoded ones are: of a part that is never encoded in the last stage, which waits for them.
  static constexpr int kDenseLatentsAt = L::kDense ? kNumbersAt - kStage : kNumbersAt;
  static constexpr int kDenseRotaryAt =
      T::kDense ? kNumbersAt - kStage + Up(L::kStored) : kNumbersAt + (L::kDense ? 0 : Up(L::kNumbers));
};

// Rows of a tile, from `rows` on, `stride` elements apart; zeros from row `left` on.
template <class N, int kChannels, int kTile>
__device__ __forceinline__ void CopyNumbers(ptx::Shared to, const uint16_t* rows, int64_t stride, int left, int thread) {
  constexpr int kGranules = kChannels / 8, kStep = kThreads / kGranules;  // of a row; rows that the threads copy at a time
  const int first = thread / kGranules, granule = thread % kGranules;
  const uint16_t* from = rows + first * stride + granule * 8;
  to += N::At(first, granule);
#pragma unroll
  for (int i = 0; i < (kTile + kStep - 1) / kStep; ++i) {
    const int row = first + i * kStep;
    if ((kTile % kStep != 0 || kThreads % kGranules != 0) && (row >= kTile || first >= kStep)) break;
    ptx::CopyAsyncOrZero(N::Further(to, i * kStep, 0), from, row < left);
    from += kStep * stride;
  }
}

__device__ __forceinline__ const uint16_t* RowOf(const DenseView& view, int b, int token) {
  return static_cast<const uint16_t*>(view.data) + Offset(view, b, 0, token, 0);
}

// Tile number `tile` of the tokens behind the sinks, as it is stored; encoded ones, where P encodes.
template <class P, int kDim, int kTile>
__device__ __forceinline__ void CopyStored(const LatentSide& side, const SequenceLength& length, int b, int tile, ptx::Shared to,
                                           int thread) {
  const int first = tile * kTile, left = length.encoded - first;
  if constexpr (P::kDense) {
    CopyNumbers<typename P::N, kDim, kTile>(to, RowOf(side.tokens, b, length.sinks + first), side.tokens.token_stride, left, thread);
  } else {
#pragma unroll
    for (int p = 0; p <= P::kPlanesBehind; ++p) {
      const int bytes = P::Bytes(p), granules = kTile * bytes / 16, own = thread * 16;
      const std::byte* from = side.codes.planes[p] + b * side.codes.plane_stride[p] + static_cast<int64_t>(first) * bytes + own;
#pragma unroll
      for (int i = 0; i < (granules + kThreads - 1) / kThreads; ++i) {
        if (granules % kThreads != 0 && i * kThreads + thread >= granules) break;
        const int further = i * kThreads * 16;  // bytes
        const int row = further % bytes == 0 ? own / bytes + further / bytes : (own + further) / bytes;
        const int at = bytes % 16 == 0 ? own + further + row * (Stride(bytes) - bytes) : own + further;
        ptx::CopyAsyncOrZero(to + P::PlaneAt(p) + at, from + further, row < left);
      }
    }
  }
}

// ---- codes of a tile as it is stored

template <class P>
__device__ __forceinline__ GroupScale GroupAt(const std::byte* tile, int token, int group) {
  constexpr int kMetaPlane = P::kOdd > 0 ? 2 : 1;
  uint32_t meta[std::max(P::kPlanes, 1)][1] = {};
#pragma unroll
  for (int p = 0; p < P::kPlanes; ++p) {
    const std::byte* at = tile + P::PlaneAt(kMetaPlane + p) + token * Stride(P::kMeta) + group * P::kMetaBytes;
    if constexpr (P::kMetaBytes == 1) meta[p][0] = *reinterpret_cast<const uint8_t*>(at);
    if constexpr (P::kMetaBytes == 2) meta[p][0] = *reinterpret_cast<const uint16_t*>(at);
    if constexpr (P::kMetaBytes == 4) meta[p][0] = *reinterpret_cast<const uint32_t*>(at);
  }
  return GroupScaleOf<P>(meta);
}

// The pairs of numbers, neighbouring channels, that word `at` of a token's row is: field f those of half f % 2 of step f / 2. The
// first field is in group `group` of those of `groups`.
template <class P, int kDim, bool kBFloat16, int kGroups>
__device__ __forceinline__ void Decode(const std::byte* tile, int token, int at, uint32_t word, const GroupScale (&groups)[kGroups],
                                       int channel, bool there, uint32_t (&numbers)[16 / P::kBits]) {
  constexpr int kFields = 16 / P::kBits;
  OddWords<P::kOdd> odd = {};
#pragma unroll
  for (int i = 0; i < P::kOdd; ++i) {
    const std::byte* bits = tile + P::PlaneAt(1) + token * Stride(P::kOddRow) + i * (kDim / 8);
    if constexpr (P::kBits == 4) {
      const uint32_t byte = reinterpret_cast<const uint8_t*>(bits)[at];
      odd[i] = byte | byte << 12;
    } else {
      odd[i] = ptx::PickBytes(reinterpret_cast<const uint16_t*>(bits)[at], 0, 0x4140);
    }
  }
  P::Unpack(word, odd, numbers);
  if constexpr (P::kMayBreak) {  // codes of 8 bits, NaN among them: bytes `field` and `field` + 2
    if (const uint32_t broken = P::Broken(word) & 0x80808080u; broken != 0) {
#pragma unroll
      for (int field = 0; field < 2; ++field) {
        numbers[field] |= (broken >> (7 + 8 * field) & 1) * 0x7E00u | (broken >> (23 + 8 * field) & 1) * 0x7E000000u;
      }
    }
  }
#pragma unroll
  for (int field = 0; field < kFields; ++field) {
    const GroupScale& group = groups[kGroups == 1 ? 0 : (channel + 8 * field) / P::kGroup];
    // A power of two: what a field's number has too little.
    const float unit = P::kUnit / (P::kPoisons ? 256.0f : 1.0f) / static_cast<float>(1 << P::FieldShift(field));
    float x[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float number = ptx::HalfAt(numbers[field], side);
      if constexpr (P::kCentred) x[side] = number * (unit * group.scale);
      else if constexpr (P::kZero == Zero::kOfCodes) x[side] = fmaf(number, unit, -group.zero) * group.scale;
      else x[side] = fmaf(number, unit * group.scale, -group.zero);
    }
    numbers[field] = !there ? 0 : kBFloat16 ? ptx::PackBFloat16(x[0], x[1]) : ptx::PackHalf(x[0], x[1]);
  }
}

__device__ __forceinline__ SequenceLength LengthNow(const LatentAttentionArgs& args, int b) {
  if (args.lengths == nullptr) return args.length;
  const SequenceLength* at = args.lengths + b;
  return {__ldcg(&at->sinks), __ldcg(&at->encoded), __ldcg(&at->residual)};
}

// One thread's work, where tiles come in boxes: it asks for the queries and for the block's tiles, each as soon as there is a stage for it.
// C::kAhead tiles come before the kernel before has ended, if they are older than the step; each when the one before has come.
template <class C>
__device__ __forceinline__ void CopyBlock(const LatentAttentionArgs& args, const TensorMaps& maps, ptx::Shared base, int b, int first_head,
                                          int split, int splits) {
  const ptx::Shared barriers = base + C::kBehind;
  const auto come = [&](unsigned n) { return barriers + C::kStagesCome + 8 * (n % C::kStages); };
  const auto free = [&](unsigned n) { return barriers + C::kStagesFree + 8 * (n % C::kStages); };
  const auto copy = [&](unsigned n, int tile) {
    const ptx::Shared to = base + n % C::kStages * C::kStage;
    ptx::ExpectBytes(come(n), C::kStage);
    ptx::CopyBoxes(to, maps.latents, tile * C::kTile, b, come(n));
    ptx::CopyBoxes(to + C::L::kStored, maps.rotary_keys, tile * C::kTile, b, come(n));
  };
  if (!args.early) WaitForPredecessors();
  SequenceLength length = LengthNow(args, b);
  int end = (length.encoded + C::kTile - 1) / C::kTile, tile = split;
  unsigned n = 0, in_vain = 0;  // tiles asked for; those of a length that was not the step's
  if (args.early) {
    bool old = true;
#pragma unroll
    for (int i = 0; i < C::kAhead; ++i) old &= (length.encoded - 1) / C::kTile != split + i * splits;
#pragma unroll 1
    for (; old && n < C::kAhead && tile < end; ++n, tile += splits) {
      if (n > 0) ptx::WaitFor(come(n - 1), 0);
      copy(n, tile);
    }
    WaitForPredecessors();
  }
  const SequenceLength now = LengthNow(args, b);
  ptx::CopyBoxes(base + C::kQueriesAt, maps.queries, first_head, b, barriers);
#pragma unroll 1
  for (; n < C::kStages && tile < end; ++n, tile += splits) copy(n, tile);
  if (now.encoded != length.encoded) {  // a step began after we looked
#pragma unroll 1
    for (; in_vain < n; ++in_vain) {
      ptx::WaitFor(come(in_vain), 0);
      ptx::Arrive(free(in_vain));
    }
    end = (now.encoded + C::kTile - 1) / C::kTile, tile = split;
  }
  ptx::StoreShared(barriers + C::kInVain, in_vain);
  ptx::ExpectBytes(barriers, C::kQueryBytes);
#pragma unroll 1
  for (; tile < end; ++n, tile += splits) {
    if (n >= C::kStages) ptx::WaitFor(free(n), n / C::kStages % 2 ^ 1);
    copy(n, tile);
  }
}

template <class C, bool kBFloat16>
__global__ void __launch_bounds__(C::kMostThreads, C::kBlocks)
    Kernel(const __grid_constant__ LatentAttentionArgs args, int parts, int splits, const __grid_constant__ TensorMaps maps, Workspace workspace) {
  extern __shared__ __align__(1024) std::byte shared[];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int share = warp % kShares, half = warp / kShares;  // of a key's channels; of a tile's tokens
  // Blocks that read the same tokens, for other heads, are neighbours.
  const int part = blockIdx.x % parts, split = blockIdx.x / parts % splits, b = blockIdx.x / parts / splits;
  const int first_head = part * C::kHeads, all_heads = static_cast<int>(args.heads), heads = min(all_heads - first_head, C::kHeads);
  const ptx::Shared base = ptx::SharedAddress(shared);
  LaunchDependents();
  const ptx::Shared barriers = base + C::kBehind;
  if constexpr (C::kBoxes) {
    if (threadIdx.x == kThreads) {
#pragma unroll
      for (int at = 0; at < C::kInVain; at += 8) ptx::InitBarrier(barriers + at);
      ptx::FenceBarriers();
    }
    __syncthreads();
    if (warp == kWarps) {
      if (lane == 0) CopyBlock<C>(args, maps, base, b, first_head, split, splits);
      return;
    }
  }
  // Of more heads, or of two blocks on a multiprocessor, registers are too few for what it takes.
  const bool early = !C::kBoxes && C::kBlocks == 1 && C::kHeadTiles == 1 && args.early;
  if (!early) WaitForPredecessors();
  SequenceLength length = LengthNow(args, b);
  const auto fill_up = [&](int from) {  // what fills up a row is 0
    for (int at = from + threadIdx.x * 16; at < C::kScoresAt; at += kThreads * 16) *reinterpret_cast<uint4*>(shared + at) = {0, 0, 0, 0};
    __syncthreads();
  };
  if constexpr (C::kTurned % 16 != 0) fill_up(0);

  // Tiles of encoded tokens, dealt to the blocks in turn, and from the last block on those of sinks and residual.
  const auto tile_of = [&](int n) { return split + n * splits; };
  const auto tiles_now = [&] { return (length.encoded + C::kTile - 1) / C::kTile; };
  int end = tiles_now();
  const auto fetch = [&](int n) {
    if (const int tile = tile_of(n); tile < end) {
      const ptx::Shared to = base + n % C::kStages * C::kStage;
      int sequence = b, thread = static_cast<int>(threadIdx.x);
      asm volatile("" : "+r"(sequence), "+r"(thread));  // places are found anew for every tile: registers are few
      CopyStored<typename C::L, C::kRank, C::kTile>(args.latents, length, sequence, tile, to, thread);
      CopyStored<typename C::T, C::kTurned, C::kTile>(args.rotary_keys, length, sequence, tile, to + Up(C::L::kStored), thread);
    }
    ptx::CopyCommit();
  };
  const auto start = [&] {
#pragma unroll 1
    for (int n = 0; n < C::kStages - 1; ++n) fetch(n);
  };
  bool started = false;
  if constexpr (!C::kBoxes) {
    // The newest token, of 16 bits or encoded within the step, is not there yet.
    bool starts_old = true;
#pragma unroll
    for (int n = 0; n < C::kStages - 1; ++n) starts_old &= (length.encoded - 1) / C::kTile != tile_of(n);
    started = early && ((!C::kDense && !args.newest_is_encoded) || starts_old);
    if (started) start();
    if (early) WaitForPredecessors();
    // Queries: zeros where there is no head, and behind a row's end.
    constexpr int kOfHead = 2 * C::kSteps;  // granules
#pragma unroll
    for (int i = 0; i < (C::kHeads * kOfHead + kThreads - 1) / kThreads; ++i) {
      const int n = i * kThreads + static_cast<int>(threadIdx.x), head = n / kOfHead, granule = n % kOfHead;
      if (C::kHeads * kOfHead % kThreads != 0 && head >= C::kHeads) break;
      const int64_t row = static_cast<int64_t>(b) * all_heads + first_head + head;
      const uint16_t* from = static_cast<const uint16_t*>(args.queries) + row * (C::kRank + C::kTurned) + granule * 8;
      ptx::CopyAsyncOrZero(base + C::kQueriesAt + C::Queries::At(head, granule), from,
                           head < heads && granule * 8 < C::kRank + C::kTurned);
    }
    ptx::CopyCommit();
  }
  if (early) {
    const SequenceLength now = LengthNow(args, b);
    if (now.sinks != length.sinks || now.encoded != length.encoded || now.residual != length.residual) {
      length = now;  // a step began after we looked
      ptx::CopyWait<0>();
      end = tiles_now(), started = false;
    }
  }

  const int sink_units = (length.sinks + C::kTile - 1) / C::kTile;
  const int dense_units = C::kDense ? 0 : sink_units + (length.residual + C::kTile - 1) / C::kTile;
  // Returns how many tokens there are.
  const auto copy_dense = [&](int unit) {
    const bool sinks = unit < sink_units;
    const int token = (sinks ? unit : unit - sink_units) * C::kTile, left = (sinks ? length.sinks : length.residual) - token;
    const auto copy = [&]<class P, int kDim>(const LatentSide& side, ptx::Shared to, P*, std::integral_constant<int, kDim>) {
      const DenseView& view = P::kDense ? side.tokens : sinks ? side.sinks : side.residual;
      const int row = P::kDense && !sinks ? length.sinks + length.encoded + token : token;
      CopyNumbers<typename P::N, kDim, C::kTile>(to, RowOf(view, b, row), view.token_stride, left, static_cast<int>(threadIdx.x));
    };
    copy(args.latents, base + C::kDenseLatentsAt, static_cast<typename C::L*>(nullptr), std::integral_constant<int, C::kRank>());
    copy(args.rotary_keys, base + C::kDenseRotaryAt, static_cast<typename C::T*>(nullptr), std::integral_constant<int, C::kTurned>());
    return left;
  };
  int unit = splits - 1 - split, dense_left = 0;
  const bool fetches = !C::kDense && C::kQueriesAlone && unit < dense_units;
  const bool nothing = split >= end && unit >= dense_units;
  if constexpr (!C::kBoxes) {
    if (fetches) dense_left = copy_dense(unit);
    ptx::CopyCommit();
    if (!started) start();
    if (C::kFills) fetch(C::kStages - 1);
  }

  // Number i of this warp's steps, those of the latent first; kSteps where it has none.
  const auto step_of = [&](int i) {
    const bool turns = i >= C::kLatentSteps;
    const int step = turns ? share + kShares * (i - C::kLatentSteps) : share * C::kLatentSteps + i;
    if (turns) return step < C::kAllRotary ? C::kRank / 16 + step : C::kSteps;
    return step < C::kRank / 16 ? step : C::kSteps;
  };
  // As left operands: rows of heads g and g + 8, channels 2 t, 2 t + 1 and 8 more of a step.
  uint32_t q[C::kHoldsQueries ? C::kHeadTiles : 1][C::kHoldsQueries ? C::kOwnSteps : 1][4] = {};
  if constexpr (C::kHoldsQueries) {
    if constexpr (C::kBoxes) {
      ptx::WaitFor(barriers, 0);
    } else {
      if (started) ptx::CopyWait<1>();
      else ptx::CopyWait<C::kStages>();
      __syncthreads();
    }
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int i = 0; i < C::kOwnSteps; ++i) {
        if (!C::kEven && step_of(i) == C::kSteps) continue;
        ptx::LoadMatrices(base + C::kQueriesAt + C::Queries::At(16 * ht + lane % 16, 2 * step_of(i) + lane / 16), q[ht][i]);
      }
    }
    if constexpr (C::kTurned % 16 != 0 && !C::kQueriesAlone) {
      __syncthreads();
      fill_up(C::kNumbersAt - C::kStage);
    }
  }

  float* scores = reinterpret_cast<float*>(shared + C::kScoresAt);
  float* factors = reinterpret_cast<float*>(shared + C::kFactorsAt);
  float o[C::kHeadTiles][2 * C::kPairs][4];  // of heads g and g + 8: channels 2 t, 2 t + 1 of eights
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
    for (int n = 0; n < 2 * C::kPairs; ++n) o[ht][n][0] = o[ht][n][1] = o[ht][n][2] = o[ht][n][3] = 0;
  }
  // Half a warp makes the weights of kRows heads, in tiles of kOwn neighbouring tokens a lane.
  constexpr int kRows = C::kHeadTiles, kOwn = C::kTile / 16;
  float m[kRows], l[kRows];  // the reference; the lane's share of the sum
#pragma unroll
  for (int r = 0; r < kRows; ++r) m[r] = kNoReference, l[r] = 0;
  const float to_base2 = args.scale * kLog2E;

  // Scores of a tile that all threads see, `valid` tokens of it: 16-bit numbers at `latents` and `rotary_keys`; or codes in `stage`, of
  // which latents are decoded to `latents`.
  const auto score = [&]<bool kLatentCodes, bool kRotaryCodes>(
                          ptx::Shared latents, ptx::Shared rotary_keys, const std::byte* stage, int valid,
                          std::bool_constant<kLatentCodes>, std::bool_constant<kRotaryCodes>) {
    // What a thread is, and where its rows are, it finds anew for every tile: registers are few.
    unsigned thread = threadIdx.x;
    if (!C::kBoxes) asm volatile("" : "+r"(thread));
    {
      const unsigned place = thread % 32, g = place / 4, t = place % 4, share = thread / 32 % kShares, half = thread / 32 / kShares;
      // Its rows of keys, of queries; and of codes its token, the first of eight by eight.
      const unsigned key_row = half * (C::kTile / 2) + place / 16 * 8 + place % 8, key_side = place / 8 % 2;
      const ptx::Shared own_key = C::L::N::At(key_row, 2 * share * C::kLatentSteps + key_side);
      const ptx::Shared own_rotary = C::T::N::At(key_row, 2 * share + key_side);
      const auto query_at = [&](unsigned granule) {
        return base + C::kQueriesAt + C::Queries::At(place % 16, granule + place / 16);
      };
      const ptx::Shared own_query = query_at(2 * share * C::kLatentSteps), own_turned_query = query_at(C::kRank / 8 + 2 * share);
      const int coded_row = half * (C::kTile / 2) + g;
      // Of few sums, two of each: a product waits for the one before.
      constexpr int kSums = C::kBoxes && C::kHeadTiles * C::kTokenTiles < 4 ? 2 : 1;
      float sums[kSums][C::kHeadTiles][C::kTokenTiles][4] = {};
      auto& x = sums[0];
      // The queries of the warp's step i times keys (n, j): half j of the step's channels, of eight tokens n.
      const auto multiply = [&](int i, const auto& key) {
#pragma unroll
        for (int ht = 0; ht < C::kHeadTiles; ++ht) {
          uint32_t a[4];
          if constexpr (C::kHoldsQueries) {
#pragma unroll
            for (int j = 0; j < 4; ++j) a[j] = q[ht][i][j];
          } else {
            const int turned = i - C::kLatentSteps;
            ptx::LoadMatrices(turned < 0 ? C::Queries::Further(own_query, 16 * ht, 2 * i)
                                         : C::Queries::Further(own_turned_query, 16 * ht, 2 * kShares * turned), a);
          }
#pragma unroll
          for (int n = 0; n < C::kTokenTiles; ++n) {
            const uint32_t columns[2] = {key(n, 0), key(n, 1)};
            Mma<kBFloat16>(sums[i % kSums][ht][n], a[0], a[1], a[2], a[3], columns);
          }
        }
      };
      // Of numbers in shared memory.
      const auto multiply_numbers = [&](int i) {
        if (!C::kEven && step_of(i) >= C::kSteps) return;
        uint32_t k[C::kTokenTiles / 2][4];
#pragma unroll
        for (int n = 0; n < C::kTokenTiles; n += 2) {
          const int turned = i - C::kLatentSteps;
          ptx::LoadMatrices(turned < 0 ? C::L::N::Further(latents + own_key, 8 * n, 2 * i)
                                       : C::T::N::Further(rotary_keys + own_rotary, 8 * n, 2 * kShares * turned), k[n / 2]);
        }
        multiply(i, [&](int n, int j) { return k[n / 2][n % 2 * 2 + j]; });
      };
      if constexpr (!C::L::kDense) {  // of a lambda's own condition alone all would be compiled
        if constexpr (kLatentCodes) {
          using P = typename C::L;
          // Words of a chunk; a share's; that are read at once; and channels of a share.
          constexpr int kMost = P::kBits == 4 && P::kOdd == 0 && C::kHeadTiles == 1 ? 4 : 2;
          constexpr int kWords = P::kRow / 16, kOwnWords = kWords / kShares, kVector = std::min(kOwnWords, kMost);
          constexpr int kChannels = C::kRank / kShares;
          constexpr int kFields = 16 / P::kBits, kRun = 128 / P::kBits;
          // Groups that are not larger than a word's channels are looked up with it, others before.
          constexpr bool kEach = P::kGroup <= kRun;
          constexpr int kGroups = std::max((kEach ? kRun : kChannels) / P::kGroup, 1);
          static_assert(kWords % kShares == 0 && kOwnWords % kVector == 0 && (kChannels % P::kGroup == 0 || P::kGroup % kChannels == 0));
          const ptx::Shared own_number = latents + C::L::N::At(coded_row, 2 * share * C::kLatentSteps) + 4 * t;
          GroupScale groups[C::kTokenTiles][kGroups];
          const auto look_up = [&](int n, int channel) {
#pragma unroll
            for (int i = 0; i < kGroups; ++i) {
              groups[n][i] = GroupAt<P>(stage, coded_row + 8 * n, (share * kChannels + channel) / P::kGroup + i);
            }
          };
#pragma unroll
          for (int n = 0; n < C::kTokenTiles; ++n) {
            if (!kEach) look_up(n, 0);
          }
#pragma unroll
          for (int first = 0; first < kOwnWords; first += kVector) {
            uint32_t words[C::kTokenTiles][kVector];
            const int at = t * kWords + share * kOwnWords + first;
#pragma unroll
            for (int n = 0; n < C::kTokenTiles; ++n) {
              ptx::LoadShared(ptx::SharedAddress(stage + (coded_row + 8 * n) * Stride(P::kRow) + at * 4), words[n]);
            }
#pragma unroll
            for (int w = 0; w < kVector; ++w) {
              uint32_t numbers[C::kTokenTiles][kFields];
#pragma unroll
              for (int n = 0; n < C::kTokenTiles; ++n) {
                if (kEach) look_up(n, (first + w) * kRun);
                Decode<P, C::kRank, kBFloat16>(stage, coded_row + 8 * n, at + w, words[n][w], groups[n], kEach ? 0 : (first + w) * kRun,
                                               coded_row + 8 * n < valid, numbers[n]);
#pragma unroll
                for (int field = 0; field < kFields; ++field) {
                  ptx::StoreShared(C::L::N::Further(own_number, 8 * n, (first + w) * kFields + field), numbers[n][field]);
                }
              }
#pragma unroll
              for (int s = 0; s < kFields / 2; ++s) {
                multiply((first + w) * (kFields / 2) + s, [&](int n, int j) { return numbers[n][2 * s + j]; });
              }
            }
          }
        }
      }
      if constexpr (!kLatentCodes) {
#pragma unroll
        for (int i = 0; i < C::kLatentSteps; ++i) multiply_numbers(i);
      }
#pragma unroll
      for (int i = 0; i < C::kRotarySteps; ++i) {
        if constexpr (!C::T::kDense) {
          if constexpr (kRotaryCodes) {
            using P = typename C::T;
            constexpr int kWords = P::kRow / 16, kFields = 16 / P::kBits, kRun = 128 / P::kBits, kGroups = std::max(kRun / P::kGroup, 1);
            static_assert(kWords >= 1 && C::kAllRotary % kShares == 0 && (kRun % P::kGroup == 0 || P::kGroup % kRun == 0));
            const int step = share + kShares * i, w = step / (kFields / 2), of_word = step % (kFields / 2);
            uint32_t pairs[C::kTokenTiles][2];
#pragma unroll
            for (int n = 0; n < C::kTokenTiles; ++n) {
              const int token = coded_row + 8 * n, at = t * kWords + w;
              const std::byte* tile = stage + Up(C::L::kStored);
              GroupScale groups[kGroups];
#pragma unroll
              for (int group = 0; group < kGroups; ++group) groups[group] = GroupAt<P>(tile, token, w * kRun / P::kGroup + group);
              uint32_t word[1], numbers[kFields];
              ptx::LoadShared(ptx::SharedAddress(tile + token * Stride(P::kRow) + at * 4), word);
              Decode<P, C::kTurned, kBFloat16>(tile, token, at, word[0], groups, 0, token < valid, numbers);
#pragma unroll
              for (int s = 0; s < kFields / 2; ++s) {
                if (s == 0 || s == of_word) pairs[n][0] = numbers[2 * s], pairs[n][1] = numbers[2 * s + 1];
              }
            }
            multiply(C::kLatentSteps + i, [&](int n, int j) { return pairs[n][j]; });
          }
        }
        if constexpr (!kRotaryCodes) multiply_numbers(C::kLatentSteps + i);
      }
#pragma unroll
      for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
        for (int n = 0; n < C::kTokenTiles; ++n) {
#pragma unroll
          for (int j = 0; kSums > 1 && j < 4; ++j) x[ht][n][j] += sums[kSums - 1][ht][n][j];
          float* to = scores + (share * C::kHeads + 16 * ht + g) * C::kScoreRow + half * (C::kTile / 2) + 8 * n + 2 * t;
          *reinterpret_cast<float2*>(to) = {x[ht][n][0], x[ht][n][1]};
          *reinterpret_cast<float2*>(to + 8 * C::kScoreRow) = {x[ht][n][2], x[ht][n][3]};
        }
      }
    }
  };
  // What all its tokens weigh.
  const auto weigh = [&](int valid) {
    unsigned thread = threadIdx.x;
    if (!C::kBoxes) asm volatile("" : "+r"(thread));
    const unsigned lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const unsigned head = (2 * warp + lane / 16) * kRows + r, token = kOwn * (lane % 16);
      float x[kOwn];
#pragma unroll
      for (int s = 0; s < kShares; ++s) {
        uint32_t words[kOwn];
        ptx::LoadShared(base + C::kScoresAt + ((s * C::kHeads + head) * C::kScoreRow + token) * 4, words);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) x[i] = s == 0 ? __uint_as_float(words[i]) : x[i] + __uint_as_float(words[i]);
      }
      float top = m[r];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        x[i] = static_cast<int>(token) + i < valid ? x[i] * to_base2 : -INFINITY;
        top = fmaxf(top, x[i]);
      }
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
      const float factor = ptx::Exp2(m[r] - top);
      m[r] = top, l[r] *= factor;
#pragma unroll
      for (int i = 0; i < kOwn; i += 2) {
        x[i] = ptx::Exp2(x[i] - top), x[i + 1] = ptx::Exp2(x[i + 1] - top), l[r] += x[i] + x[i + 1];
        ptx::StoreShared(base + C::kWeightsAt + C::Weights::At(head, token / 8) + token % 8 * 2 + i * 2,
                         kBFloat16 ? ptx::PackBFloat16(x[i], x[i + 1]) : ptx::PackHalf(x[i], x[i + 1]));
      }
      if (lane % 16 == 0) factors[head] = factor;
    }
  };
  const auto add = [&](ptx::Shared latents) {
    unsigned thread = threadIdx.x;
    if (!C::kBoxes) asm volatile("" : "+r"(thread));
    const unsigned lane = thread % 32, warp = thread / 32, g = lane / 4;
    const ptx::Shared own_value = latents + C::L::N::At(lane % 16, 2 * C::kPairs * warp + lane / 16);
    const ptx::Shared own_weight = base + C::kWeightsAt + C::Weights::At(lane % 16, lane / 16);

#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
      const float low = factors[16 * ht + g], high = factors[16 * ht + g + 8];
      if (!__any_sync(~0u, low != 1 || high != 1)) continue;
#pragma unroll
      for (int n = 0; n < 2 * C::kPairs; ++n) o[ht][n][0] *= low, o[ht][n][1] *= low, o[ht][n][2] *= high, o[ht][n][3] *= high;
    }
#pragma unroll
    for (int step = 0; step < C::kTile / 16; ++step) {
      uint32_t a[C::kHeadTiles][4];
#pragma unroll
      for (int ht = 0; ht < C::kHeadTiles; ++ht) {
        ptx::LoadMatrices(C::Weights::Further(own_weight, 16 * ht, 2 * step), a[ht]);
      }
#pragma unroll
      for (int p = 0; p < C::kPairs; ++p) {
        const int pair = static_cast<int>(warp) * C::kPairs + p;
        if (C::kRank / 16 % kWarps != 0 && pair >= C::kRank / 16) break;
        uint32_t v[4];
        ptx::LoadMatricesTransposed(C::L::N::Further(own_value, 16 * step, 2 * p), v);
#pragma unroll
        for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t columns[2] = {v[2 * j], v[2 * j + 1]};
            Mma<kBFloat16>(o[ht][2 * p + j], a[ht][0], a[ht][1], a[ht][2], a[ht][3], columns);
          }
        }
      }
    }
  };

  const auto attend = [&](ptx::Shared latents, ptx::Shared rotary_keys, const std::byte* stage, int valid, auto latent_codes, auto rotary_codes) {
    score(latents, rotary_keys, stage, valid, latent_codes, rotary_codes);
    __syncthreads();
    weigh(valid);
    __syncthreads();
    add(latents);
  };

  if constexpr (!C::kDense) {
    for (bool fetched = fetches; unit < dense_units; unit += splits, fetched = false) {
      if (fetched && early) {
        ptx::CopyWait<0>();
      } else if (fetched) {
        ptx::CopyWait<C::kStages - 1>();
      } else {
        __syncthreads();  // the tile before is done with
        dense_left = copy_dense(unit);
        ptx::CopyCommit();
        ptx::CopyWait<0>();
      }
      __syncthreads();
      attend(base + C::kDenseLatentsAt, base + C::kDenseRotaryAt, shared, dense_left, std::false_type(), std::false_type());
    }
  }
  if constexpr (C::kBoxes) {
    // The values of a tile and the scores of the next are between the same two barriers.
    uint32_t number[1];
    ptx::LoadShared(barriers + C::kInVain, number);
    unsigned n = number[0];
    const auto stage_of = [&](unsigned n) { return base + n % C::kStages * C::kStage; };
#pragma unroll 1
    for (int tile = split; tile < end; tile += splits, ++n) {
      if (tile != split) add(stage_of(n - 1));
      ptx::WaitFor(barriers + C::kStagesCome + 8 * (n % C::kStages), n / C::kStages % 2);
      score(stage_of(n), stage_of(n) + C::L::kStored, shared, 0, std::false_type(), std::false_type());
      ptx::SyncThreads(1, kThreads);
      if (threadIdx.x == 0 && tile != split) ptx::Arrive(barriers + C::kStagesFree + 8 * ((n - 1) % C::kStages));
      const int valid = length.encoded - tile * C::kTile;
      weigh(valid);
      constexpr int kOfRow = C::kRank / 8;
#pragma unroll 1
      for (int i = valid * kOfRow + static_cast<int>(threadIdx.x); i < C::kTile * kOfRow; i += kThreads) {  // no tokens: may be anything
        *reinterpret_cast<uint4*>(shared + n % C::kStages * C::kStage + C::L::N::At(i / kOfRow, i % kOfRow)) = {0, 0, 0, 0};
      }
      ptx::SyncThreads(1, kThreads);
    }
    if (split < end) add(stage_of(n - 1));
  } else {
#pragma unroll 1
    for (int n = 0; tile_of(n) < end; ++n) {
      const bool filled = C::kFills && n == 0;
      if (filled) ptx::CopyWait<C::kStages - 1>();
      else ptx::CopyWait<C::kStages - 2>();
      __syncthreads();  // the tile is there, and the one before is done with
      if (!filled) fetch(n + C::kStages - 1);
      const int stage = n % C::kStages * C::kStage, valid = length.encoded - tile_of(n) * C::kTile;
      attend(base + (C::L::kDense ? stage : C::kNumbersAt), base + stage + Up(C::L::kStored), shared + stage, valid,
             std::bool_constant<!C::L::kDense>(), std::bool_constant<!C::T::kDense>());
    }
  }

  const int slot = (b * splits + split) * all_heads + first_head;
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
    if (nothing) break;  // the second kernel reads no output of it
#pragma unroll
    for (int n = 0; n < 2 * C::kPairs; ++n) {
      const int channel = (warp * 2 * C::kPairs + n) * 8 + 2 * t;
      if (C::kRank / 16 % kWarps != 0 && channel >= C::kRank) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = 16 * ht + g + 8 * i;
        if (head >= heads) continue;
        *reinterpret_cast<float2*>(workspace.outputs + static_cast<int64_t>(slot + head) * C::kRank + channel) = {o[ht][n][2 * i], o[ht][n][2 * i + 1]};
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) l[r] += __shfl_xor_sync(~0u, l[r], lanes);
    const int head = (2 * warp + lane / 16) * kRows + r;
    if (lane % 16 == 0 && head < heads) static_cast<float2*>(workspace.sums)[(b * all_heads + first_head + head) * splits + split] = {m[r], l[r]};
  }
}

// What the blocks of a sequence have left of one head, kChannels of it.
template <int kRank, int kChannels, bool kBFloat16>
__global__ void __launch_bounds__(kThreads, 2) MergeKernel(const __grid_constant__ LatentAttentionArgs args, int splits, Workspace workspace) {
  constexpr int kColumns = kChannels / 4, kChunks = (kRank + kChannels - 1) / kChannels;
  constexpr int kReaders = kThreads / kColumns;                // of every kReaders-th block each
  constexpr int kSums = (kMergeBatch * kReaders + 31) / 32;    // of a lane
  static_assert(kColumns >= 8 && 32 % kReaders == 0);
  __shared__ float4 partial[kReaders][kColumns];
  const int lane = threadIdx.x % 32;
  const int chunk = blockIdx.x % kChunks, all_heads = static_cast<int>(args.heads), head = blockIdx.x / kChunks % all_heads;
  const int b = blockIdx.x / kChunks / all_heads;
  const int column = threadIdx.x % kColumns, reader = threadIdx.x / kColumns, channel = chunk * kChannels + 4 * column;
  LaunchDependents();
  const int first = b * splits * all_heads + head;  // of the first block
  const float2* const sums = static_cast<const float2*>(workspace.sums) + (b * all_heads + head) * splits + lane;
  const float* const outputs = workspace.outputs + static_cast<int64_t>(first + reader * all_heads) * kRank + channel;
  WaitForPredecessors();
  // On their way before it is known what they weigh: where a block had no token, anything.
  float4 x[kMergeBatch];
#pragma unroll
  for (int i = 0; i < kMergeBatch; ++i) {
    x[i] = {0, 0, 0, 0};
    ptx::LoadSeen(reinterpret_cast<const float4*>(outputs + i * kReaders * all_heads * kRank),
                  reader + i * kReaders < splits && channel < kRank, x[i]);
  }
  float2 of[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    of[i] = {kNoReference, 0};
    ptx::LoadSeen(sums + 32 * i, lane + 32 * i < splits, of[i]);
  }
  // Each warp works out for itself what they weigh: lane j those of blocks j, j + 32, ...
  float top = of[0].x, total = 0, weights[kSums];
#pragma unroll
  for (int i = 1; i < kSums; ++i) top = fmaxf(top, of[i].x);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    weights[i] = of[i].y == 0 ? 0 : ptx::Exp2(of[i].x - top);
    total = fmaf(weights[i], of[i].y, total);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
  float4 sum = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kMergeBatch; ++i) {
    const float w = __shfl_sync(~0u, weights[i * kReaders / 32], reader % kReaders + i * kReaders % 32);
    if (w == 0) continue;
    sum.x = fmaf(w, x[i].x, sum.x), sum.y = fmaf(w, x[i].y, sum.y);
    sum.z = fmaf(w, x[i].z, sum.z), sum.w = fmaf(w, x[i].w, sum.w);
  }
  partial[reader][column] = sum;
  __syncthreads();
  if (reader != 0 || channel >= kRank) return;
#pragma unroll
  for (int other = 1; other < kReaders; ++other) {
    const float4 x = partial[other][column];
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  const float scale = total == 0 ? 0 : ptx::Reciprocal(total);
  const uint2 packed = {kBFloat16 ? ptx::PackBFloat16(sum.x * scale, sum.y * scale) : ptx::PackHalf(sum.x * scale, sum.y * scale),
                        kBFloat16 ? ptx::PackBFloat16(sum.z * scale, sum.w * scale) : ptx::PackHalf(sum.z * scale, sum.w * scale)};
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(args.out) + static_cast<int64_t>(b * all_heads + head) * kRank + channel) = packed;
}

#endif  // __CUDACC__

}  // namespace kvq::latent_attention
