// Encoding of many tokens by a plain scheme (kernels/plain.h), their numbers in registers. Device code alone.
//
// A warp has a tile of some tokens, of which each lane has kOwn neighbouring channels: some groups, one, or a part of one, in any case
// those of whole words of codes. So a group's fit is one lane's work, or the same in each lane that has a part, and a code is made
// where its word is. Numbers come by coalesced copies of 16 bytes to shared memory, from where each lane takes its own; words go the
// other way. No warp waits for another. A launch begins while the one before ends, and waits for that; the next one may begin once all of
// its blocks have ended.
//
// What it takes, on an H200 with 132 multiprocessors at 1.98 GHz: an instruction for each of 33.5 million numbers (32k tokens, 8 heads of
// 128 channels) is 1.0 us, the bytes of 4 to 8 bit codes 20 to 25 us. So up to some 18 instructions a number, memory is what it waits
// for. Most schemes have 10 to 18, of which packing is 1, half of a minimum and a maximum 1, a quotient 5; those that make two codes at
// a time (PairOf) 8 to 14; where one number at a time is looked up in a table, and sums in order come before (iq4_nl), it is 18. The
// time is then those and some 9 us, as not every slot is taken, and multiprocessors fill and empty. Loops over tiles of which the next
// one is copied meanwhile are slower (ci/baselines/h200-encode). Tokens that are turned whole: plain_encode_turned.cuh.
#pragma once

#include "kernels/plain.h"

namespace kvq {

// At least as many turns as such a loop has, and not many more: with 1024, NVRTC's optimizer for sm_100 and later takes 10 to 20 seconds
// for an encoder that turns, instead of one.
template <int kLanes_, DType kType>
inline constexpr int kUnrolled<plain::OwnNumbers<kLanes_, kType>> = 128;
template <typename Numbers>
inline constexpr int kUnrolled<plain::Halves<Numbers>> = kUnrolled<Numbers>;

namespace plain {

// Bytes of a token in a plane.
template <typename S>
constexpr int PlaneBytes(int plane, int dim, int group) {
  if (plane == 0) return dim * kLow<S> / 8;
  if (plane < kFirstStored<S>) return kOdd<S> * dim / 8;
  if constexpr (kMembers<S> > 0) {
    if (plane < kFirstStored<S> + kMembers<S>) return dim / group * S::kStored[plane - kFirstStored<S>];
  }
  return sizeof(Vector<S>);
}

// Signs of the numbers in words `first`, first + 4, first + 8 and first + 12, in the highest bits of a word's fields of four.
__device__ __forceinline__ uint32_t SignsOf(const uint32_t* words, uint32_t first) {
  const uint32_t even = ptx::PickBytes(words[first], words[first + 8], 0x7351);
  const uint32_t odd = ptx::PickBytes(words[first + 4], words[first + 12], 0x7351);
  return (even >> 4 & 0x08080808) | (odd & 0x80808080);
}

// Codes of three bits that lie four apart, fields 0 to 3 of both halves in `low`, 4 to 7 in `high`: their lower two bits as a word, the
// upper one in the upper byte of each half. What is multiplied lies so far apart that nothing is carried.
__device__ __forceinline__ void MoveThrees(uint32_t low, uint32_t high, uint32_t& word, uint32_t& odd) {
  const auto twos = [](uint32_t x) {  // in the upper byte of each half
    const uint32_t fours = (x & 0x33333333) * 20 & 0xF0F0F0F0;
    return fours + (fours << 4);
  };
  const auto ones = [](uint32_t x) { return (x & 0x44444444) * 0x492; };  // in the uppermost four bits of each half
  word = ptx::PickBytes(twos(low), twos(high), 0x7351);
  odd = (ones(low) >> 4 & 0x0F000F00) | (ones(high) & 0xF000F000);
}

// Copies a warp's tile to shared memory, zeros behind x's last token: kTokens tokens from `first` on, of which `count` are there, each
// kDim / kOwn rows of kOwn numbers, with a gap behind each against bank conflicts.
constexpr int RowPitch(int own) { return 2 * own + 16; }  // bytes
template <int kDim, int kOwn, int kTokens>
__device__ __forceinline__ void CopyTile(const DenseView& x, uint32_t b, uint32_t h, uint32_t first, uint32_t count, uint8_t* tile) {
  constexpr uint32_t kCopied = 256 / kDim, kPieces = kOwn / 8;  // tokens at a time; of a row, 16 bytes each
  const uint32_t lane = threadIdx.x % 32;
  const auto* from = static_cast<const uint16_t*>(x.data) + b * x.batch_stride + h * x.head_stride +
                     (first + lane / (kDim / 8)) * x.token_stride + lane % (kDim / 8) * 8;
  const ptx::Shared to = ptx::SharedAddress(tile) + lane / kPieces * RowPitch(kOwn) + lane % kPieces * 16;
  if (x.token_stride == kDim && count >= kTokens) {  // one behind the other, so that no address has to be made
#pragma unroll
    for (uint32_t i = 0; i < kTokens / kCopied; ++i) ptx::CopyAsync(to + 32 / kPieces * RowPitch(kOwn) * i, from + kCopied * kDim * i);
  } else {
#pragma unroll
    for (uint32_t i = 0; i < kTokens / kCopied; ++i) {
      ptx::CopyAsyncOrZero(to + 32 / kPieces * RowPitch(kOwn) * i, from, lane / (kDim / 8) + kCopied * i < count);
      from += kCopied * x.token_stride;
    }
  }
  ptx::CopyCommit();
}

// Planes from `slot` on, of one sequence and head.
template <typename S, int kDim, int kGroup>
__device__ __forceinline__ KvView PlanesAt(const KvView& out, uint32_t b, uint32_t h, int64_t slot) {
  KvView mine;
#pragma unroll
  for (int p = 0; p < kFirstStored<S> + kMembers<S> + kHasVector<S>; ++p) {
    mine.planes[p] = out.planes[p] + (b * static_cast<uint32_t>(out.heads) + h) * out.plane_stride[p] +
                     slot * PlaneBytes<S>(p, kDim, kGroup);
  }
  return mine;
}

template <typename S>
__device__ __forceinline__ auto LaneTableOf() {
  if constexpr (requires { typename S::LaneTable; }) return S::LaneTable::Of();
  else return Nothing();
}
template <typename S, typename Numbers, typename Table>
__device__ __forceinline__ auto FitOwnGroup(const Numbers& x, int n, const Vector<S>& vector, const Table& table) {
  if constexpr (requires { typename S::LaneTable; }) return S::FitWords(x, n, table);
  else return FitGroup<S>(x, n, vector);
}

template <typename S, DType kType, int kDim, int kGroup, int kOwn>
__global__ void __launch_bounds__(32 * kWarps, OwnBlocks(kOwn))
    EncodeOwnKernel(const __grid_constant__ DenseView x, int64_t first_token, const __grid_constant__ KvView out) {
  constexpr int kTokenLanes = kDim / kOwn, kTokens = 32 / kTokenLanes;
  constexpr int kPieces = kOwn / 8, kPitch = RowPitch(kOwn);  // of a lane's numbers: 16 bytes each
  constexpr int kWords = kDim * kLow<S> / 32, kOwnRuns = kOwn / kRunChannels<kLow<S>>;
  constexpr int kRowPitch = kWords + (kOwnRuns == 2 ? 8 : 4);  // words
  constexpr int kOddBytes = kOdd<S> * kDim / 8;                // of a token
  constexpr int kFields = 16 / kLow<S>;
  constexpr uint32_t kMask = (1u << kLow<S>) - 1;
  constexpr int kTile = 32 * kPitch, kRows = kTokens * (4 * kRowPitch + kOddBytes);
  __shared__ __align__(16) uint8_t tiles[kWarps][kTile > kRows ? kTile : kRows];
  const uint32_t lane = threadIdx.x % 32;
  uint8_t* const tile = tiles[threadIdx.x / 32];
  const uint32_t b = blockIdx.z, h = blockIdx.y, first = (blockIdx.x * kWarps + threadIdx.x / 32) * kTokens;
  if (first >= x.tokens) return;
  WaitForPredecessors();
  const uint32_t count = static_cast<uint32_t>(x.tokens) - first;  // of tokens from here on

  CopyTile<kDim, kOwn, kTokens>(x, b, h, first, count, tile);
  const KvView mine = PlanesAt<S, kDim, kGroup>(out, b, h, TokenBase(out) + first_token + first);
  const auto table = LaneTableOf<S>();
  ptx::CopyWait<0>();
  __syncwarp();
  uint32_t words[kOwn / 2];  // as they come, two in each
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const uint4 four = *reinterpret_cast<const uint4*>(tile + lane * kPitch + 16 * i);
    words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
  }
  float v[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn / 2; ++i) UnpackTwo<kType>(words[i], v[2 * i], v[2 * i + 1]);
  __syncwarp();

  // ---- what codes are made with
  const uint32_t token = lane / kTokenLanes, part = lane % kTokenLanes;
  const bool there = token < count;
  const VectorFit<S> vector = FitVector<S>(OwnNumbers<kTokenLanes, kType>{v, words}, kDim);
  if (part == 0 && there) StoreVector<S>(vector.stored, mine, 0, 0, token);
  if constexpr (kTurns<S>) TurnToken<S>(OwnNumbers<kTokenLanes, kType>{v, words}, kDim, vector, OwnLanes<kTokenLanes>{});
  constexpr DType kWordsType = kTurns<S> ? DType::kFloat32 : kType;
  constexpr int kFits = kOwn > kGroup ? kOwn / kGroup : 1, kGroupLanes = kGroup > kOwn ? kGroup / kOwn : 1;
  using GroupFit = decltype(FitOwnGroup<S>(OwnNumbers<kGroupLanes, kWordsType>{v, words}, kGroup, vector.stored, table));
  GroupFit fits[kFits];
#pragma unroll
  for (int g = 0; g < kFits; ++g) {
    fits[g] = FitOwnGroup<S>(OwnNumbers<kGroupLanes, kWordsType>{v + g * kGroup, words + g * kGroup / 2}, kGroup, vector.stored, table);
    if (part % kGroupLanes == 0 && there) {
      Store<S>(fits[g].stored, mine, 0, 0, token, kDim / kGroup, part / kGroupLanes * kFits + g);
    }
  }

  // ---- codes
  auto* const row = reinterpret_cast<uint32_t*>(tile) + token * kRowPitch;
  uint8_t* const odd_rows = tile + kTokens * 4 * kRowPitch;
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) {
#pragma unroll
    for (int run = 0; run < kOwnRuns; ++run) {
      constexpr bool kCoded = requires { GroupFit::kTooLarge; };
      constexpr bool kPairs = kCoded || requires(const GroupFit& fit) { S::PairOf(fit, 0u); };
      constexpr bool kThree = kLow<S> == 2 && kOdd<S> == 1;  // three bits: made four apart, in two words, and moved together after that
      uint32_t word = 0, odd[kOdd<S> + 1] = {};
      if constexpr (kOdd<S> == 0 || kThree) {
        constexpr int kBits = kThree ? 4 : kLow<S>;
        constexpr uint32_t kOnes = kBits == 8 ? 0x01010101 : kBits == 4 ? 0x11111111 : 0x55555555;
        uint32_t made[2];
        made[0] = made[1] = kPairs ? 0u - kPairTooLarge<S, GroupFit> * kOnes : 0;
#pragma unroll
        for (int field = 0; field < kFields; ++field) {
          const uint32_t first = ChannelOf<kLow<S>>(chunk, run, 0, field);
          const GroupFit& fit = fits[first / kGroup % kFits];
          uint32_t& to = made[kThree ? field / 4 : 0];
          const int up = (kThree ? field % 4 : field) * kBits;
          if constexpr (kCoded) {
            to += words[first / 2] << up;
          } else if constexpr (kPairs) {
            to += S::PairOf(fit, words[first / 2]) << up;
          } else {
            to += (S::Code(fit, v[first]) << up) + (S::Code(fit, v[first + 1]) << (up + 16));
          }
        }
        word = made[0];
        if constexpr (kSigns<S> == Signs::kOfNumbers && kPairs) word += SignsOf(words, ChannelOf<kLow<S>>(chunk, run, 0, 0) / 2);
        if constexpr (kThree) MoveThrees(made[0], made[1], word, odd[0]);
      } else {
#pragma unroll
        for (int field = 0; field < kFields; ++field) {
          uint32_t pair = 0;  // both sides of a field in a word's halves
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const uint32_t channel = ChannelOf<kLow<S>>(chunk, run, side, field);
            pair += S::Code(fits[channel / kGroup % kFits], v[channel]) << (16 * side);
          }
          word += (pair & (0x10001u * kMask)) << (field * kLow<S>);
#pragma unroll
          for (int i = 0; i < kOdd<S>; ++i) {
            const int up = field - kLow<S> - i;
            odd[i] |= (up < 0 ? pair >> -up : pair << up) & (0x10001u << field);
          }
        }
      }
      const uint32_t place = chunk * (kWords / 4) + part * kOwnRuns + run;
      row[place] = word;
#pragma unroll
      for (int i = 0; i < kOdd<S>; ++i) {
        uint8_t* const to = odd_rows + token * kOddBytes + i * (kDim / 8) + place * (kFields / 4);
        if constexpr (kFields == 8) {
          static_assert(kThree || kOdd<S> == 0);  // MoveThrees has put them into the upper bytes
          to[0] = static_cast<uint8_t>(odd[i] >> 8), to[1] = static_cast<uint8_t>(odd[i] >> 24);
        } else {
          to[0] = static_cast<uint8_t>(odd[i] | odd[i] >> (16 - kFields));
        }
      }
    }
  }
  __syncwarp();
  auto* const codes = reinterpret_cast<uint4*>(mine.planes[0]);
#pragma unroll
  for (int i = 0; i < kTokens * kWords / 128; ++i) {
    const uint32_t piece = lane + 32 * i, t = piece / (kWords / 4);
    if (t < count) {
      codes[piece] = *reinterpret_cast<const uint4*>(reinterpret_cast<const uint32_t*>(tile) + t * kRowPitch + piece % (kWords / 4) * 4);
    }
  }
  if constexpr (kOdd<S> > 0) {
    auto* const rows = reinterpret_cast<uint32_t*>(mine.planes[1]);
#pragma unroll
    for (int i = 0; i < kTokens * kOddBytes / 128; ++i) {
      const uint32_t word = lane + 32 * i;
      if (word * 4 / kOddBytes < count) rows[word] = reinterpret_cast<const uint32_t*>(odd_rows)[word];
    }
  }
}

}  // namespace plain
}  // namespace kvq
