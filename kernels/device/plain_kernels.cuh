// Encoding and decoding by a plain scheme (kernels/plain.h) of any shape: numbers, or what they are decoded with, in shared memory. And
// a step's own tokens, by a block each; by a warp within attention, plain_codes.cuh. Device code alone.
#pragma once

#include "kernels/plain.h"

namespace kvq::plain {

// Neighbouring groups begin in neighbouring banks of shared memory.
KVQ_HD constexpr uint32_t Padded(uint32_t i) { return i + i / 32; }
struct SharedNumbersToTurn {
  float* tile;
  uint32_t first;
  __device__ __forceinline__ float& operator[](int i) const { return tile[Padded(first + i)]; }
};

// A group or a token of n numbers in shared memory, of which each of kLanes_ neighbouring lanes sees a part. As of OwnNumbers, what is
// made of it is the same in all of them.
template <int kLanes_>
struct SharedNumbers {
  float* tile;
  uint32_t start, first;  // of all, and of those that this lane sees
  __device__ __forceinline__ SharedNumbers(float* tile, uint32_t start, uint32_t n)
      : tile(tile), start(start), first(start + (kLanes_ > 1 ? threadIdx.x % kLanes_ * (n / kLanes_) : 0)) {}
  __device__ __forceinline__ float operator[](int i) const
    requires(kLanes_ == 1)
  {
    return Part(i);
  }
  __device__ __forceinline__ float Part(int i) const { return tile[Padded(first + i)]; }
  __device__ __forceinline__ float Any(int i) const { return tile[Padded(start + i)]; }
  __device__ __forceinline__ void PutCode(int i, uint32_t code) const { tile[Padded(first + i)] = BitsFloat(code); }
};
template <int kLanes_>
inline constexpr int kLanes<SharedNumbers<kLanes_>> = kLanes_;

// So many lanes for a token: they divide every head_dim, which codes of 4 bits and fewer have to fill rows of. And for a group.
template <typename S>
inline constexpr int kTokenLanes = kRunChannels<kLow<S>> < 32 ? 16 : 32;
template <typename S>
inline constexpr int kGroupLanes = kInOrder<S> ? 1 : S::kGroups[0] == 0 ? kTokenLanes<S> : 8;

// Who encodes tokens together: a block, or a warp (Warp).
struct Block {
  static constexpr int size = kThreads;
  int rank;
  __device__ __forceinline__ void Sync() const { __syncthreads(); }
};

// A Split of one token of a shape that is known when a kernel is compiled.
template <uint32_t n>
struct FixedDivisor {
  static constexpr uint32_t divisor = n;
  __device__ __forceinline__ Divisor::Result Of(uint32_t i) const { return {i / n, i % n}; }
};
template <int kDim, int kGroup, int kLow>
struct FixedSplit {
  FixedDivisor<kDim> head_dim;
  FixedDivisor<kGroup> group;
  FixedDivisor<kDim / kGroup> groups;
  FixedDivisor<kDim * kLow / 32> words;
};

// What a team has in shared memory: numbers of tokens, and what their groups' and their own codes are made with.
template <typename S, int kNumbers, int kFits, int kVectors>
struct EncoderRoom {
  float tile[Padded(kNumbers)];
  typename S::Fit fits[kFits];
  VectorFit<S> vectors[kHasVector<S> ? kVectors : 1];
};
template <typename S>
using BlockRoom = EncoderRoom<S, kTile, kTile / kSmallestGroup, kTile / kSmallestGroup>;

// Calls work(i, first) for each i below `count` on kEach neighbouring lanes, `first` on the first of them; by whole warps, the last of
// which may call it once more for what others of the same warp do, without a first one.
template <int kEach, typename Team, typename Work>
__device__ __forceinline__ void ForEachByLanes(uint32_t count, const Team& team, const Work& work) {
  const uint32_t rank = static_cast<uint32_t>(team.rank);
  for (uint32_t of_warp = team.size == 32 ? 0 : rank / 32 * (32 / kEach); of_warp < count; of_warp += team.size / kEach) {
    const uint32_t i = of_warp + rank % 32 / kEach;
    work(i < count ? i : count - 1, i < count && rank % kEach == 0);
  }
}

// Encodes `tokens` tokens whose numbers lie in room.tile, and do no longer after that, to the slots from `slot` on.
template <typename S, typename Room, typename SplitBy, typename Team>
__device__ __forceinline__ void EncodeTile(Room& room, uint32_t tokens, const KvView& out, const SplitBy& split, int64_t b, int64_t h,
                                           int64_t slot, const Team& team) {
  float* const tile = room.tile;
  constexpr int kFields = 16 / kLow<S>;
  constexpr uint32_t kMask = (1u << kLow<S>) - 1;
  const uint32_t dim = split.head_dim.divisor, groups = split.groups.divisor, words = split.words.divisor;
  if constexpr (kHasVector<S>) {
    ForEachByLanes<kTokenLanes<S>>(tokens, team, [&](uint32_t t, bool first) {
      const VectorFit<S> fit = FitVector<S>(SharedNumbers<kTokenLanes<S>>(tile, t * dim, dim), static_cast<int>(dim));
      if (!first) return;
      room.vectors[t] = fit;
      StoreVector<S>(fit.stored, out, b, h, slot + t);
    });
    team.Sync();
  }
  if constexpr (kTurns<S>) {
    for (uint32_t t = team.rank / 32; t < tokens; t += team.size / 32) {
      TurnToken<S>(SharedNumbersToTurn{tile, t * dim}, static_cast<int>(dim), room.vectors[kHasVector<S> ? t : 0],
                   Warp{static_cast<int>(threadIdx.x % 32)});
    }
    team.Sync();
  }
  ForEachByLanes<kGroupLanes<S>>(tokens * groups, team, [&](uint32_t i, bool first) {
    const auto [t, g] = split.groups.Of(i);
    const uint32_t n = split.group.divisor;
    const typename S::Fit fit =
        FitGroup<S>(SharedNumbers<kGroupLanes<S>>(tile, i * n, n), static_cast<int>(n), room.vectors[kHasVector<S> ? t : 0].stored);
    if (!first) return;
    if constexpr (!kPutsCodes<S>) room.fits[i] = fit;
    Store<S>(fit.stored, out, b, h, slot + t, groups, g);
  });
  team.Sync();
  for (uint32_t i = team.rank; i < tokens * words; i += team.size) {
    const auto [t, place] = split.words.Of(i);
    const uint32_t chunk = place / (words / 4), w = place % (words / 4);
    uint32_t word = 0, odd[kOdd<S> + 1] = {};
    const uint32_t run = split.group.Of(w * kRunChannels<kLow<S>>).quotient;  // of a word's first channel
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int field = 0; field < kFields; ++field) {
        const uint32_t channel = ChannelOf<kLow<S>>(chunk, w, side, field);
        uint32_t g = run;
        if (split.group.divisor % kRunChannels<kLow<S>> != 0) g = split.group.Of(channel).quotient;
        const float number = tile[Padded(t * dim + channel)];
        const uint32_t code = kPutsCodes<S> ? FloatBits(number) : S::Code(room.fits[t * groups + g], number);
        word |= (code & kMask) << (16 * side + field * kLow<S>);
#pragma unroll
        for (int i = 0; i < kOdd<S>; ++i) odd[i] |= (code >> (kLow<S> + i) & 1) << (side * kFields + field);
      }
    }
    reinterpret_cast<uint32_t*>(CodeRow<kLow<S>>(out, b, h, slot + t))[place] = word;
#pragma unroll
    for (int i = 0; i < kOdd<S>; ++i) {
      uint8_t* row = MetadataRow<uint8_t>(out, 1, kOdd<S> * dim / 8, b, h, slot + t) + i * dim / 8 + place * (kFields / 4);
      row[0] = static_cast<uint8_t>(odd[i]);
      if constexpr (kFields == 8) row[1] = static_cast<uint8_t>(odd[i] >> 8);
    }
  }
}

template <typename S, DType kType>
__global__ void __launch_bounds__(kThreads)
    EncodeKernel(DenseView x, int64_t first_token, KvView out, const Split split, bool wide) {
  __shared__ BlockRoom<S> room;
  const int64_t b = blockIdx.z, h = blockIdx.y, first = int64_t{blockIdx.x} * split.tokens;
  const auto tokens = static_cast<uint32_t>(x.tokens - first < split.tokens ? x.tokens - first : split.tokens);
  for (uint32_t i = threadIdx.x; i < tokens * split.head_dim.divisor / 8; i += kThreads) {
    const auto [t, channel] = split.head_dim.Of(8 * i);
    float values[8];
    LoadEight<kType>(x, Offset(x, b, h, first + t, channel), wide, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) room.tile[Padded(8 * i) + j] = values[j];
  }
  __syncthreads();
  EncodeTile<S>(room, tokens, out, split, b, h, TokenBase(out) + first_token + first, Block{static_cast<int>(threadIdx.x)});
}

// The newest token of each sequence, keys and values in one launch: block (head, sequence, side).
template <typename S, DType kType>
__device__ __forceinline__ void EncodeOne(const NewestSide& side) {
  __shared__ BlockRoom<S> room;
  const DenseView& x = side.x;
  const int64_t b = blockIdx.y, h = blockIdx.x;
  if (h >= x.heads) return;
  const int dim = static_cast<int>(x.head_dim);
  const int32_t slot = __ldcg(side.out.token_base);
  const auto* row = static_cast<const uint16_t*>(x.data) + Offset(x, b, h, slot % static_cast<int32_t>(x.tokens), 0);
  for (int i = threadIdx.x; i < dim; i += kThreads) {  // past the L1 cache, as there could be older lines
    room.tile[Padded(i)] = kType == DType::kFloat16 ? HalfToFloat(__ldcg(row + i)) : BFloat16ToFloat(__ldcg(row + i));
  }
  __syncthreads();
  if (side.turn.block > 0) {
    if (threadIdx.x < 32) TurnBy(side.turn, SharedNumbersToTurn{room.tile, 0}, dim, static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  EncodeTile<S>(room, 1, side.out, side.split, b, h, slot, Block{static_cast<int>(threadIdx.x)});
}

template <typename Keys, typename Values, DType kType>
__global__ void __launch_bounds__(kThreads) EncodeNewestKernel(const __grid_constant__ NewestSide keys,
                                                               const __grid_constant__ NewestSide values) {
  LaunchDependents();
  WaitForPredecessors();
  if (blockIdx.z == 0) {
    EncodeOne<Keys, kType>(keys);
  } else {
    EncodeOne<Values, kType>(values);
  }
}

// Of many sides of one scheme: block (head, sequence, side).
template <typename S, DType kType>
__global__ void __launch_bounds__(kThreads) EncodeEachKernel(const NewestSide* sides) {
  LaunchDependents();
  WaitForPredecessors();
  EncodeOne<S, kType>(sides[blockIdx.z]);
}

// A code of one token, by its channel.
template <typename S>
struct RowCodes {
  const uint32_t* words;
  const uint8_t* odd;
  uint32_t chunk_words, first;
  __device__ __forceinline__ uint32_t operator[](uint32_t i) const {
    const WordPlace place = PlaceOf<kLow<S>>(first + i, chunk_words);
    uint32_t code = words[place.word] >> place.shift & ((1u << kLow<S>) - 1);
    if constexpr (kOdd<S> > 0) {
      const uint32_t bit = place.word * (32 / kLow<S>) + place.shift / kLow<S>, row = chunk_words * (16 / kLow<S>);  // bytes
#pragma unroll
      for (int i = 0; i < kOdd<S>; ++i) code |= (odd[i * row + bit / 8] >> bit % 8 & 1u) << (kLow<S> + i);
    }
    return code;
  }
};

template <typename S, DType kType>
__global__ void __launch_bounds__(kThreads) DecodeKernel(KvView in, int64_t first_token, DenseView out, const Split split) {
  __shared__ Key<S> keys[kTile / kSmallestGroup];
  const int64_t b = blockIdx.z, h = blockIdx.y, first = int64_t{blockIdx.x} * split.tokens, slot = first_token + first;
  const auto tokens = static_cast<uint32_t>(out.tokens - first < split.tokens ? out.tokens - first : split.tokens);
  const uint32_t dim = split.head_dim.divisor, groups = split.groups.divisor, n = split.group.divisor;
  const auto codes_of = [&](uint32_t t, uint32_t channel) {
    const uint8_t* odd = nullptr;
    if constexpr (kOdd<S> > 0) odd = MetadataRow<uint8_t>(in, 1, kOdd<S> * dim / 8, b, h, slot + t);
    return RowCodes<S>{reinterpret_cast<const uint32_t*>(CodeRow<kLow<S>>(in, b, h, slot + t)), odd,
                       split.words.divisor / 4, channel};
  };
  for (uint32_t i = threadIdx.x; i < tokens * groups; i += kThreads) {
    const auto [t, g] = split.groups.Of(i);
    Kept<S> kept;
    Load<S>(in, b, h, slot + t, groups, g, kept.stored);
    LoadVector<S>(in, b, h, slot + t, kept.vector);
    keys[i] = Open<S>(codes_of(t, g * n), static_cast<int>(n), kept);
  }
  __syncthreads();
  const auto value_of = [&](uint32_t t, uint32_t channel) {
    return Value<S>(keys[t * groups + split.group.Of(channel).quotient], codes_of(t, channel)[0]);
  };
  if constexpr (kTurns<S>) {
    __shared__ float tile[kTile + kTile / 32];
    for (uint32_t i = threadIdx.x; i < tokens * dim; i += kThreads) {
      const auto [t, channel] = split.head_dim.Of(i);
      tile[Padded(i)] = value_of(t, channel);
    }
    __syncthreads();
    for (uint32_t t = ptx::WarpNumber(); t < tokens; t += kThreads / 32) {
      S::TurnBack(SharedNumbersToTurn{tile, t * dim}, static_cast<int>(dim), Warp{static_cast<int>(threadIdx.x % 32)});
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < tokens * dim; i += kThreads) {
      const auto [t, channel] = split.head_dim.Of(i);
      StoreElement(out.data, kType, Offset(out, b, h, first + t, channel), tile[Padded(i)]);
    }
  } else {
    for (uint32_t i = threadIdx.x; i < tokens * dim; i += kThreads) {
      const auto [t, channel] = split.head_dim.Of(i);
      StoreElement(out.data, kType, Offset(out, b, h, first + t, channel), value_of(t, channel));
    }
  }
}

}  // namespace kvq::plain
