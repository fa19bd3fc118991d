// Plain schemes: a group is neighbouring channels of one token; it becomes a code a number and a few bytes, which depend on
// nothing else. Such a scheme is one file whose formula stands once, in inline functions that host and device share; this
// makes the planes, `encode` and `decode` on the CPU and their CUDA twins from it. CPU and GPU give the same bits because they
// run the same operations in the same order: one thread goes through a group from its first number to its last, nothing is
// fused (-ffp-contract=off, --fmad=false), division and conversions are IEEE's.
//
// A scheme is a struct in a namespace, that device code finds by its name (kernels/schemes/q8_0.cc is the model):
//
//   kFile, kName       its file in the repository and its own name, "kernels/schemes/q8_0.cc", "kvq::ggml::Q8_0"
//   kLabel             in messages, "q8_0"
//   kBits              of a code: 8, 7, 6, 5, 4, 3 or 2
//   kGroups            group sizes that @group may ask for, the default first; {0}: all channels of a token, without a choice
//   Stored             what is kept of a group, a plain struct without gaps
//   kStored            bytes of each of its members, in order; leave it out where Stored is empty
//   Fit                what Code wants to know of a group, with a member `stored`; a plain struct
//   FitGroup(x, n)     the Fit of the n float32 numbers x[0], ..., x[n - 1]
//   Code(fit, v)       the code of one of them, below 2^kBits; a NaN, too, gets one (Clamped, Nearest)
//   Value(stored, q)   what the code becomes
//
// and, only where a token has something besides its groups:
//
//   Vector, FitVector(x, n)   kept of a whole token, from all its channels; then it is FitGroup(x, n, vector) and
//                             Value(stored, vector, q)
//   Opened, Open(q, n, ...)   made from all codes q[0], ... of a group and what is stored (Stored, then Vector) before it is
//                             decoded; then it is Value(opened, q)
//
// and, where a token's numbers are turned before they are coded, by an orthonormal matrix that all tokens have in common:
//
//   Turn(x, n, team)      turns the n numbers of a token in place; FitVector sees them before, FitGroup and Code after it
//   TurnBack(x, n, team)  the way back, of what Value gave. A team is the threads that do so together: each takes the
//                         numbers team.rank, team.rank + team.size, ..., and Sync() is between what depends on others
//
// and, so that fused attention on a GPU reads it on tensor cores (kernels/device/plain_codes.cuh); without it none does:
//
//   kElement              what a code is: Element::kNumber, itself; kE4M3, kE5M2, kE2M1; kTable, TableEntry(code, head_dim);
//                         kBytes, the same where entries are whole numbers below 256
//   LineOf(stored)        what makes its value, {scale, zero}: scale (element - zero) or, by kZero, scale element - zero;
//                         without kZero there is no zero. Where there is a Vector it is LineOf(vector, head_dim)
//   kScaleByte            where Stored is one byte that is the scale: in which float (its LineOf says the same)
//   kNormed               a row of elements is divided by its norm; of keys alone
//   kTurnBlock            where Turn is there: channels that its Hadamard matrix mixes, 0 all. Then its values and theirs, who
//                         see turned queries and turn the output back, differ by rounding
//
// kHeadDims names the only head_dims that a scheme takes, where there are only some.
//
// A group with a NaN or an infinity has to decode to NaN: Magnitude and Range below give NaN then, and a scale of NaN does
// the rest. Codes lie as code_row.h says, so that fused attention can read them once there is a device codec; codes that have
// a sign are kept with an offset (q + 128).
//
// Planes: "codes"; "odd bits" of codes of 7, 6, 5 and 3 bits; a plane for each member of Stored, of every group; "vector".
#pragma once

#include <cstdint>

#include "kernels/code_row.h"
#include "kernels/groups.h"
#include "kernels/turn.h"
#ifndef __CUDACC__
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/runtime/launch.h"
#endif

namespace kvq::plain {

// ---- what formulas are made of

KVQ_HD inline float Absolute(float v) { return BitsFloat(FloatBits(v) & 0x7FFFFFFF); }

// v limited to [low, high], which are numbers; low where it is NaN.
KVQ_HD inline float Clamped(float v, float low, float high) { return Smaller(Larger(v, low), high); }

// Nearest whole number, half away from zero, of |v| < 2^31: as roundf. The difference is exact.
KVQ_HD inline int32_t Nearest(float v) {
  const auto whole = static_cast<int32_t>(v);
  const float rest = v - static_cast<float>(whole);
  return whole + (rest >= 0.5f) - (rest <= -0.5f);
}

// 1 / d; 0 where d is, as ggml has it: a group of zeros.
KVQ_HD inline float Reciprocal(float d) { return d != 0 ? 1 / d : 0; }

// What fp16 keeps of a number.
KVQ_HD inline float AsHalf(float v) { return HalfToFloat(FloatToHalf(v)); }

// v, or NaN where the poison is one, of the same bits everywhere. (Adding it would lose the sign of a zero.)
KVQ_HD inline float Poisoned(float v, float poison) { return poison == poison ? v : BitsFloat(0x7FC00000); }

// v, but 0 for -0: where the smallest of several zeros is stored, CPU and GPU may have found another one.
KVQ_HD inline float PlusZero(float v) { return v + 0.0f; }

// The largest magnitude of a group; NaN where something in it is not finite.
template <typename Numbers>
KVQ_HD inline float Magnitude(const Numbers& x, int n) {
  float largest = 0, poison = 0;
  KVQ_UNROLL
  for (int i = 0; i < n; ++i) {
    largest = Larger(Absolute(x[i]), largest);
    poison += x[i] * 0;
  }
  return Poisoned(largest, poison);
}

// The number of the largest magnitude with its sign, the first one of several; NaN where something is not finite.
template <typename Numbers>
KVQ_HD inline float SignedMagnitude(const Numbers& x, int n) {
  float largest = 0, with_sign = 0, poison = 0;
  KVQ_UNROLL
  for (int i = 0; i < n; ++i) {
    const float v = x[i], magnitude = Absolute(v);
    with_sign = magnitude > largest ? v : with_sign;
    largest = Larger(magnitude, largest);
    poison += v * 0;
  }
  return Poisoned(with_sign, poison);
}

// Smallest and largest, NaN where something is not finite (which comparisons see in some orders and not in others), and the
// poison for what is stored.
template <typename Numbers>
KVQ_HD inline GroupRange Range(const Numbers& x, int n) {
  GroupRange range{x[0], x[0], 0};
  KVQ_UNROLL
  for (int i = 0; i < n; ++i) {
    range.low = Smaller(x[i], range.low);
    range.high = Larger(x[i], range.high);
    range.poison += x[i] * 0;
  }
  range.low = Poisoned(range.low, range.poison), range.high = Poisoned(range.high, range.poison);
  return range;
}

// ---- what a scheme says, and what it leaves out

template <typename S>
inline constexpr int kLow = kLowBits<S::kBits>;  // bits of a code in plane 0
template <typename S>
inline constexpr int kOdd = S::kBits - kLow<S>;        // and those above
template <typename S>
inline constexpr int kFirstStored = kOdd<S> > 0 ? 2 : 1;

template <typename S>
inline constexpr int kMembers = [] {
  if constexpr (requires { S::kStored[0]; }) return static_cast<int>(sizeof S::kStored / sizeof S::kStored[0]);
  return 0;
}();

struct Nothing {};
template <typename S>
struct VectorOf {
  using Type = Nothing;
};
template <typename S>
  requires requires { typename S::Vector; }
struct VectorOf<S> {
  using Type = typename S::Vector;
};
template <typename S>
using Vector = typename VectorOf<S>::Type;
template <typename S>
inline constexpr bool kHasVector = requires { typename S::Vector; };
template <typename S>
inline constexpr bool kTurns = requires(float* x) { S::Turn(x, 0, Alone{}); };
template <typename S>
inline constexpr bool kOpens = requires { typename S::Opened; };

enum class Element : uint8_t { kNumber, kE4M3, kE5M2, kE2M1, kTable, kBytes };
enum class ScaleByte : uint8_t { kNone, kE4M3, kE8M0 };
struct Line {
  float scale, zero;
};
template <typename S>
inline constexpr bool kHasElement = requires { S::kElement; };
template <typename S>
inline constexpr bool kHasZero = requires { S::kZero; };
template <typename S>
inline constexpr ScaleByte kScaleByte = [] {
  if constexpr (requires { S::kScaleByte; }) return S::kScaleByte;
  else return ScaleByte::kNone;
}();
template <typename S>
inline constexpr bool kNormed = requires { requires S::kNormed; };

// What a group's codes are decoded with.
template <typename S>
struct Kept {
  typename S::Stored stored;
  Vector<S> vector;
};
template <typename S>
struct DecodedWith {
  using Type = Kept<S>;
};
template <typename S>
  requires kOpens<S>
struct DecodedWith<S> {
  using Type = typename S::Opened;
};
template <typename S>
using Key = typename DecodedWith<S>::Type;

template <typename S, typename Numbers>
KVQ_HD inline Vector<S> FitVector(const Numbers& x, int n) {
  if constexpr (kHasVector<S>) return S::FitVector(x, n);
  return {};
}
template <typename S, typename Numbers>
KVQ_HD inline typename S::Fit FitGroup(const Numbers& x, int n, const Vector<S>& vector) {
  if constexpr (kHasVector<S>) {
    return S::FitGroup(x, n, vector);
  } else {
    return S::FitGroup(x, n);
  }
}
template <typename S, typename Codes>
KVQ_HD inline Key<S> Open(const Codes& codes, int n, const Kept<S>& kept) {
  if constexpr (kOpens<S> && kHasVector<S>) {
    return S::Open(codes, n, kept.stored, kept.vector);
  } else if constexpr (kOpens<S>) {
    return S::Open(codes, n, kept.stored);
  } else {
    return kept;
  }
}
template <typename S>
KVQ_HD inline float Value(const Key<S>& key, uint32_t code) {
  if constexpr (kOpens<S>) {
    return S::Value(key, code);
  } else if constexpr (kHasVector<S>) {
    return S::Value(key.stored, key.vector, code);
  } else {
    return S::Value(key.stored, code);
  }
}

// ---- metadata, to and from its planes

// Group `g` of a token that has `groups` of them.
template <typename S, int kMember = 0, int kOffset = 0>
KVQ_HD inline void Store(const typename S::Stored& stored, const KvView& view, int64_t b, int64_t h, int64_t token,
                         int64_t groups, int64_t g) {
  if constexpr (kMember < kMembers<S>) {
    constexpr int kBytes = S::kStored[kMember];
    static_assert(kMember + 1 < kMembers<S> || kOffset + kBytes == sizeof(typename S::Stored), "kStored adds up to Stored");
    memcpy(MetadataRow<uint8_t>(view, kFirstStored<S> + kMember, groups * kBytes, b, h, token) + g * kBytes,
           reinterpret_cast<const char*>(&stored) + kOffset, kBytes);
    Store<S, kMember + 1, kOffset + kBytes>(stored, view, b, h, token, groups, g);
  }
}
template <typename S, int kMember = 0, int kOffset = 0>
KVQ_HD inline void Load(const KvView& view, int64_t b, int64_t h, int64_t token, int64_t groups, int64_t g,
                        typename S::Stored& stored) {
  if constexpr (kMember < kMembers<S>) {
    constexpr int kBytes = S::kStored[kMember];
    memcpy(reinterpret_cast<char*>(&stored) + kOffset,
           MetadataRow<uint8_t>(view, kFirstStored<S> + kMember, groups * kBytes, b, h, token) + g * kBytes, kBytes);
    Load<S, kMember + 1, kOffset + kBytes>(view, b, h, token, groups, g, stored);
  }
}
template <typename S>
KVQ_HD inline void StoreVector(const Vector<S>& vector, const KvView& view, int64_t b, int64_t h, int64_t token) {
  if constexpr (kHasVector<S>) {
    constexpr int kBytes = sizeof vector;
    memcpy(MetadataRow<uint8_t>(view, kFirstStored<S> + kMembers<S>, kBytes, b, h, token), &vector, kBytes);
  }
}
template <typename S>
KVQ_HD inline void LoadVector(const KvView& view, int64_t b, int64_t h, int64_t token, Vector<S>& vector) {
  if constexpr (kHasVector<S>) {
    constexpr int kBytes = sizeof vector;
    memcpy(&vector, MetadataRow<uint8_t>(view, kFirstStored<S> + kMembers<S>, kBytes, b, h, token), kBytes);
  }
}

#ifndef __CUDACC__
// ---- the CPU

template <typename S>
KVQ_VECTOR void CodeGroup(const typename S::Fit& fit, const float* x, int64_t n, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(S::Code(fit, x[i]));
}

template <typename S>
KVQ_VECTOR void DecodeGroup(const Key<S>& key, const uint8_t* codes, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = Value<S>(key, codes[i]);
}

inline int64_t GroupOf(const CodecParams& params, int64_t head_dim) {
  return params.group_size != 0 ? params.group_size : head_dim;
}

template <typename S>
void Encode(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out) {
  const int64_t dim = x.head_dim, n = GroupOf(params, dim), groups = dim / n;
  ForEach(/*parallel=*/true, RowsOf(x), [&](int64_t index) {
    const Row row(x, index);
    const int64_t slot = first_token + row.t;
    std::vector<float> values(dim);
    std::vector<uint8_t> codes(dim);
    LoadRow(x.data, x.dtype, Offset(x, row.b, row.h, row.t, 0), dim, values.data());
    const Vector<S> vector = FitVector<S>(values.data(), static_cast<int>(dim));
    StoreVector<S>(vector, out, row.b, row.h, slot);
    if constexpr (kTurns<S>) S::Turn(values.data(), static_cast<int>(dim), Alone{});
    for (int64_t g = 0; g < groups; ++g) {
      const typename S::Fit fit = FitGroup<S>(&values[g * n], static_cast<int>(n), vector);
      CodeGroup<S>(fit, &values[g * n], n, &codes[g * n]);
      Store<S>(fit.stored, out, row.b, row.h, slot, groups, g);
    }
    if constexpr (kOdd<S> > 0) {
      PackOddBits<kLow<S>, kOdd<S>>(codes.data(), dim, MetadataRow<uint8_t>(out, 1, kOdd<S> * dim / 8, row.b, row.h, slot));
      for (uint8_t& code : codes) code &= (1 << kLow<S>) - 1;
    }
    PackRow<kLow<S>>(codes.data(), dim, CodeRow<kLow<S>>(out, row.b, row.h, slot));
  });
}

template <typename S>
void Decode(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out) {
  const int64_t dim = out.head_dim, n = GroupOf(params, dim), groups = dim / n;
  ForEach(/*parallel=*/true, RowsOf(out), [&](int64_t index) {
    const Row row(out, index);
    const int64_t slot = first_token + row.t;
    std::vector<float> values(dim);
    std::vector<uint8_t> codes(dim);
    UnpackRow<kLow<S>>(CodeRow<kLow<S>>(in, row.b, row.h, slot), dim, codes.data());
    if constexpr (kOdd<S> > 0) {
      AddOddBits<kLow<S>, kOdd<S>>(MetadataRow<uint8_t>(in, 1, kOdd<S> * dim / 8, row.b, row.h, slot), dim, codes.data());
    }
    Kept<S> kept{};
    LoadVector<S>(in, row.b, row.h, slot, kept.vector);
    for (int64_t g = 0; g < groups; ++g) {
      Load<S>(in, row.b, row.h, slot, groups, g, kept.stored);
      DecodeGroup<S>(Open<S>(&codes[g * n], static_cast<int>(n), kept), &codes[g * n], n, &values[g * n]);
    }
    if constexpr (kTurns<S>) S::TurnBack(values.data(), static_cast<int>(dim), Alone{});
    StoreRow(values.data(), dim, out.dtype, Offset(out, row.b, row.h, row.t, 0), out.data);
  });
}
#endif  // __CUDACC__

// ---- the GPU: a block has some tokens of one head and keeps their numbers, or what decodes them, in shared memory. A thread
// goes through a group, then all of them make words or numbers.

inline constexpr int kThreads = 256, kTile = 2048, kSmallestGroup = 16;

// How numbers and places of a block's tokens divide.
struct Split {
  Divisor head_dim, group, groups, words;  // channels of a token, of a group; groups and words of a token
  int32_t tokens;                                // of a block
  Split(int64_t dim, int64_t n, int low)
      : head_dim(dim), group(n), groups(dim / n), words(dim * low / 32), tokens(static_cast<int32_t>(kTile / dim)) {}
};

// The same where it is known when a kernel is compiled: nothing divides then.
template <uint32_t kDivisor>
struct FixedDivisor {
  static constexpr uint32_t divisor = kDivisor;
  KVQ_HD static Divisor::Result Of(uint32_t n) { return {n / kDivisor, n % kDivisor}; }
};
template <int kDim, int kGroup, int kLow>
struct FixedSplit {
  static constexpr FixedDivisor<kDim> head_dim{};
  static constexpr FixedDivisor<kGroup> group{};
  static constexpr FixedDivisor<kDim / kGroup> groups{};
  static constexpr FixedDivisor<kDim * kLow / 32> words{};
  static constexpr int32_t tokens = kTile / kDim;
  KVQ_HD explicit FixedSplit(const Split&) {}
};

// The newest token of each sequence on one side, before and after it is encoded.
struct NewestSide {
  DenseView x;  // float16 or bfloat16, one token
  KvView out;   // to slot *token_base
  Split split;
  Turn turn;
};

#ifndef __CUDACC__
template <typename S>
KernelLaunch KernelOf(const char* kernel, const DenseView& x, const Split& split) {
  if (x.head_dim > kTile) throw InputError(S::kLabel, ": a head_dim of ", x.head_dim, " is too large for a GPU");
  return {.instance = {{S::kFile}, InstanceName(kernel, S::kName, TypeName(x.dtype))},
          .grid = {GridFor(x.tokens, split.tokens), static_cast<unsigned>(x.heads), static_cast<unsigned>(x.batch)},
          .threads = kThreads,
          .early = false};
}

template <typename S>
void EncodeCuda(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out, void* stream) {
  const int64_t dim = x.head_dim, group = GroupOf(params, dim);
  const Split split(dim, group, kLow<S>);
  KernelLaunch launch = KernelOf<S>("kvq::plain::EncodeKernel", x, split);
  const std::string chosen = dim == 64 || dim == 128 ? InstanceName("kvq::plain::FixedSplit", dim, group, kLow<S>) : "kvq::plain::Split";
  launch.instance.name = InstanceName("kvq::plain::EncodeKernel", S::kName, TypeName(x.dtype), chosen);
  Launch(S::kLabel, launch, stream, x, first_token, out, split, IsWide(x));
}
template <typename S>
void DecodeCuda(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out, void* stream) {
  const Split split(out.head_dim, GroupOf(params, out.head_dim), kLow<S>);
  Launch(S::kLabel, KernelOf<S>("kvq::plain::DecodeKernel", out, split), stream, in, first_token, out, split);
}

// ---- the row

// All of a codec but what only its author knows: the nmse and the golden file.
template <typename S>
Codec MakeCodec() {
  static_assert(kFirstStored<S> + kMembers<S> + kHasVector<S> <= kMaxPlanes);
  static constexpr std::span<const int64_t> kGroups = S::kGroups;
  constexpr bool kWhole = kGroups[0] == 0;
  Codec codec;
  codec.bits = S::kBits;
  codec.default_group = kGroups[0];
  if (!kWhole) codec.groups = kGroups;
  codec.head_dim_multiple = kRunChannels<kLow<S>>;
  codec.grouping = kWhole ? "all channels of one token" : StrCat(kGroups[0], " consecutive channels of one token");
  codec.vector_wide = kHasVector<S>, codec.turned = kTurns<S>;
  codec.device.source = S::kFile, codec.device.plain = S::kName;
  if constexpr (kTurns<S> && kHasElement<S>) codec.turn_block = S::kTurnBlock;
  if constexpr (kHasElement<S>) {
    codec.device.label = S::kLabel, codec.device.keys_alone = kNormed<S>;
    codec.device.type = [](const CodecParams& params, int64_t head_dim) {
      return InstanceName("kvq::PlainCodes", S::kName, GroupOf(params, head_dim), head_dim);
    };
  }
  if constexpr (requires { S::kHeadDims; }) codec.head_dims = S::kHeadDims;
  codec.planes = [](int64_t /*heads*/, int64_t head_dim, const CodecParams& params) -> std::vector<Plane> {
    if constexpr (!kWhole) {
      CheckGroups(S::kLabel, kGroups, head_dim, params.group_size);
    } else if (params.group_size != 0) {
      throw InputError(S::kLabel, " takes all channels of a token for a group; leave out @group");
    }
    CheckRun(kLow<S>, head_dim);
    if constexpr (requires { S::kHeadDims; }) CheckHeadDims(S::kLabel, S::kHeadDims, head_dim);
    const int64_t groups = head_dim / GroupOf(params, head_dim);
    std::vector<Plane> planes = {{"codes", head_dim * kLow<S> / 8}};
    if (kOdd<S> > 0) planes.push_back({"odd bits", kOdd<S> * head_dim / 8});
    if constexpr (kMembers<S> > 0) {
      for (const int bytes : S::kStored) planes.push_back({"metadata", groups * bytes});
    }
    if (kHasVector<S>) planes.push_back({"vector", sizeof(Vector<S>)});
    return planes;
  };
  codec.encode = Encode<S>;
  codec.decode = Decode<S>;
  codec.encode_cuda = EncodeCuda<S>;
  codec.decode_cuda = DecodeCuda<S>;
  return codec;
}

#else

// Neighbouring groups begin in neighbouring banks of shared memory.
__device__ __forceinline__ uint32_t Padded(uint32_t i) { return i + i / 32; }
struct SharedNumbers {
  const float* tile;
  uint32_t first;
  __device__ __forceinline__ float operator[](int i) const { return tile[Padded(first + i)]; }
};
struct SharedNumbersToTurn {
  float* tile;
  uint32_t first;
  __device__ __forceinline__ float& operator[](int i) const { return tile[Padded(first + i)]; }
};

// A block encodes `tokens` tokens whose numbers lie in `tile`, to the slots from `slot` on.
template <typename S, typename Splits>
__device__ __forceinline__ void EncodeTile(float* tile, uint32_t tokens, const KvView& out, const Splits& split, int64_t b,
                                           int64_t h, int64_t slot) {
  __shared__ typename S::Fit fits[kTile / kSmallestGroup];
  __shared__ Vector<S> vectors[kHasVector<S> ? kTile / kSmallestGroup : 1];
  constexpr int kFields = 16 / kLow<S>;
  constexpr uint32_t kMask = (1u << kLow<S>) - 1;
  const uint32_t dim = split.head_dim.divisor, groups = split.groups.divisor, words = split.words.divisor;
  if constexpr (kHasVector<S>) {
    for (uint32_t t = threadIdx.x; t < tokens; t += kThreads) {
      vectors[t] = FitVector<S>(SharedNumbers{tile, t * dim}, static_cast<int>(dim));
      StoreVector<S>(vectors[t], out, b, h, slot + t);
    }
    __syncthreads();
  }
  if constexpr (kTurns<S>) {
    for (uint32_t t = threadIdx.x / 32; t < tokens; t += kThreads / 32) {
      S::Turn(SharedNumbersToTurn{tile, t * dim}, static_cast<int>(dim), Warp{static_cast<int>(threadIdx.x % 32)});
    }
    __syncthreads();
  }
  for (uint32_t i = threadIdx.x; i < tokens * groups; i += kThreads) {
    const auto [t, g] = split.groups.Of(i);
    const uint32_t n = split.group.divisor;
    const typename S::Fit fit = FitGroup<S>(SharedNumbers{tile, i * n}, static_cast<int>(n), vectors[kHasVector<S> ? t : 0]);
    fits[i] = fit;
    Store<S>(fit.stored, out, b, h, slot + t, groups, g);
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < tokens * words; i += kThreads) {
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
        const uint32_t code = S::Code(fits[t * groups + g], tile[Padded(t * dim + channel)]);
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

template <typename S, DType kType, typename Splits>
__global__ void __launch_bounds__(kThreads)
    EncodeKernel(DenseView x, int64_t first_token, KvView out, const Split known, bool wide) {
  __shared__ float tile[kTile + kTile / 32];
  const Splits split(known);
  const int64_t b = blockIdx.z, h = blockIdx.y, first = int64_t{blockIdx.x} * split.tokens;
  const auto tokens = static_cast<uint32_t>(x.tokens - first < split.tokens ? x.tokens - first : split.tokens);
  for (uint32_t i = threadIdx.x; i < tokens * split.head_dim.divisor / 8; i += kThreads) {
    const auto [t, channel] = split.head_dim.Of(8 * i);
    float values[8];
    LoadEight<kType>(x, Offset(x, b, h, first + t, channel), wide, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) tile[Padded(8 * i) + j] = values[j];
  }
  __syncthreads();
  EncodeTile<S>(tile, tokens, out, split, b, h, TokenBase(out) + first_token + first);
}

// The newest token of each sequence, keys and values in one launch: block (head, sequence, side).
template <typename S, DType kType>
__device__ __forceinline__ void EncodeOne(const NewestSide& side) {
  __shared__ float tile[kTile + kTile / 32];
  const DenseView& x = side.x;
  const int64_t b = blockIdx.y, h = blockIdx.x;
  if (h >= x.heads) return;
  const int dim = static_cast<int>(x.head_dim);
  const int32_t slot = __ldcg(side.out.token_base);
  const auto* row = static_cast<const uint16_t*>(x.data) + Offset(x, b, h, slot % static_cast<int32_t>(x.tokens), 0);
  for (int i = threadIdx.x; i < dim; i += kThreads) {  // past the L1 cache, as there could be older lines
    tile[Padded(i)] = kType == DType::kFloat16 ? HalfToFloat(__ldcg(row + i)) : BFloat16ToFloat(__ldcg(row + i));
  }
  __syncthreads();
  if (side.turn.block > 0) {
    if (threadIdx.x < 32) TurnBy(side.turn, SharedNumbersToTurn{tile, 0}, dim, static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  EncodeTile<S>(tile, 1, side.out, side.split, b, h, slot);
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
    for (uint32_t t = threadIdx.x / 32; t < tokens; t += kThreads / 32) {
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

#endif  // __CUDACC__

}  // namespace kvq::plain

#ifdef __CUDACC__
#include "kernels/device/plain_codes.cuh"
#endif
