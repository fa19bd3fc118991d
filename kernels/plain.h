// Plain schemes: a group is neighbouring channels of one token; it becomes a code a number and a few bytes, which depend on
// nothing else. Such a scheme is one file whose formula stands once, in inline functions that host and device share; this
// makes the planes, `encode` and `decode` on the CPU and their CUDA twins from it. CPU and GPU give the same bits because they
// run the same operations in the same order: one thread goes through a group from its first number to its last (but where order
// does not matter: Magnitude, Range, Total), nothing is fused (-ffp-contract=off, --fmad=false), division and conversions are
// IEEE's. Where a GPU has a shorter way to the same number, it stands beside the CPU's (Quotients, Truncated, E2M1::Code); where codes
// alone are the same, by a bound of what they are made from, plain_encode_turned.cuh says it.
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
//   Vector, VectorFit,        kept of a whole token; what its Turn wants to know, with a member `stored`; made from all its
//   FitVector(x, n)           channels. Then it is FitGroup(x, n, vector) and Value(stored, vector, q)
//   Opened, Open(q, n, ...)   made from all codes q[0], ... of a group and what is stored (Stored, then Vector) before it is
//                             decoded; then it is Value(opened, q)
//
// and, where a token's numbers are turned before they are coded, by an orthonormal matrix that all tokens have in common:
//
//   Turn(x, n, team)      turns the n numbers of a token in place; FitVector sees them before, FitGroup and Code after it. Where there
//                         is a Vector, Turn(x, n, fit, team)
//   TurnBack(x, n, team)  the way back, of what Value gave. A team is the threads that do so together; which of the numbers each
//                         sees is the team's business (ForEachNumber, Hadamard, Butterflies)
//
// and, so that fused attention reads it as it lies, on a GPU on tensor cores (kernels/device/plain_codes.cuh), on a CPU as
// kernels/host/codes.cc says; without it none does on a GPU, and on a CPU its codec decodes:
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
// and, for a GPU that encodes many tokens, where several lanes have a part of a larger group or of a token in registers
// (kernels/device/plain_encode.cuh):
//
//   kInOrder              true where FitGroup takes x[0], ..., x[n - 1] itself, not by Magnitude, Range, Total and SumInOrder alone:
//                         then one lane has all of a group (without a word it does not compile)
//   kPutsCodes            true where FitGroup of numbers in shared memory leaves their codes in their place (x.PutCode), those that
//                         Code would give; lanes may do so twice (plain_kernels.cuh), so all numbers are read, then __syncwarp()
//
// FitGroup may return another type for numbers that are there as they came, two in a word (kHasWords): one that makes two codes at
// once, in float16's arithmetic where that gives the same, or has made them:
//
//   PairOf(fit, two)      the codes of a word's numbers, in its halves, below 2^16 both. Instead of Code. Of a Coded they are made
//   kPairTooLarge         how much larger they are, in each half
//   kSigns                Signs::kOfNumbers: a code's highest bit is its number's sign, and PairOf leaves it out
//
// or FitGroup's work is done by another function for such words, by a table that lies in a warp's lanes:
//
//   LaneTable             a lane's part, LaneTable::Of(), read while numbers are on their way
//   FitWords(x, n, table) what FitGroup would be
//
// and, where a token's numbers x become x / Divisor(vector fit) times the Hadamard matrix of all of them, and codes of 4 or 3 bits are
// how many of some thresholds those reach: tensor cores then turn many tokens (kernels/device/plain_encode_turned.cuh)
//
//   kTurnsByProducts      true
//   Divisor(vector)       a VectorFit's, which has a member `norm`; not below the token's length, and at least 1e-8
//   DeviceCells(dim)      the thresholds' Cells (kernels/device/cells.cuh), of 64 and 128 channels: a slope of 1.95 at most with
//                         thresholds below 0.22, or of 1.5 with those below 0.3, as the bound says
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
#ifdef __CUDACC__
#include "kernels/device/cells.cuh"
#endif
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

KVQ_HD inline float Absolute(float v) {
#ifdef __CUDA_ARCH__
  return fabsf(v);  // most instructions have it for nothing
#else
  return BitsFloat(FloatBits(v) & 0x7FFFFFFF);
#endif
}

// v limited to [low, high], which are numbers; low where it is NaN.
KVQ_HD inline float Clamped(float v, float low, float high) { return Smaller(Larger(v, low), high); }

// Nearest whole number, half away from zero, of |v| < 2^31: as roundf. The largest number below a half is added, as a half itself
// would take 0.49999997 to 1; what lies half between is still carried over, by the sum's rounding.
KVQ_HD inline int32_t Nearest(float v) {
  return static_cast<int32_t>(v + copysignf(0.49999997f, v));
}

// Counts a threshold that v is not below.
KVQ_HD inline void CountReached(float v, float threshold, uint32_t& count) {
#ifdef __CUDA_ARCH__
  asm("{.reg .pred p; setp.ge.f32 p, %1, %2; @p add.u32 %0, %0, 1;}" : "+r"(count) : "f"(v), "f"(threshold));
#else
  count += v >= threshold ? 1 : 0;
#endif
}

// A code: v without its fraction, or the nearest whole number, half to even; from 0 to `most`, and 0 where v is NaN.
KVQ_HD inline uint32_t Truncated(float v, float most) {
#ifdef __CUDA_ARCH__
  uint32_t whole;  // what is below is 0
  asm("cvt.rzi.u32.f32 %0, %1;" : "=r"(whole) : "f"(v));
  return whole < static_cast<uint32_t>(most) ? whole : static_cast<uint32_t>(most);
#else
  return static_cast<uint32_t>(Clamped(v, 0, most));
#endif
}
KVQ_HD inline uint32_t RoundedToEven(float v, float most) {
#ifdef __CUDA_ARCH__
  uint32_t whole;
  asm("cvt.rni.u32.f32 %0, %1;" : "=r"(whole) : "f"(v));
  return whole < static_cast<uint32_t>(most) ? whole : static_cast<uint32_t>(most);
#else
  return static_cast<uint32_t>(RoundCode(v, most));
#endif
}

// x / d in three operations, `inverse` 1 / d: as IEEE rounds it (but for the sign of a zero) where x has 11 bits, as a float16, or d is
// one of DividedBy's, and all of it is in range. Tried for all of them (ShortQuotient in scheme_test.cc).
KVQ_HD inline float ShortQuotient(float x, float d, float inverse) {
  const float near = x * inverse;
  return fmaf(fmaf(-d, near, x), inverse, near);
}

// v / kDivisor of a v that is not negative. `kFinite`: nor infinite, and 0 or at least 1e-28, as differences of float16 are.
template <int kDivisor, bool kFinite = false>
KVQ_HD inline float DividedBy(float v) {
#ifdef __CUDA_ARCH__
  if (kFinite || (v >= 1e-28f && v < 1e38f)) return ShortQuotient(v, kDivisor, 1.0f / kDivisor);
#endif
  return v / kDivisor;
}

// 1 / d; 0 where d is, as ggml has it: a group of zeros.
KVQ_HD inline float Reciprocal(float d) { return d != 0 ? 1 / d : 0; }

// What fp16 keeps of a number.
KVQ_HD inline float AsHalf(float v) {
#ifdef __CUDA_ARCH__
  float half;  // which NaN does not matter here
  asm("{.reg .f16 h; cvt.rn.f16.f32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(half) : "f"(v));
  return half;
#else
  return HalfToFloat(FloatToHalf(v));
#endif
}

// x / d of many x by one d, as IEEE rounds it (but for the sign of a zero), for |x / d| < 2^32, in five operations where a GPU's own
// division has some sixteen: the product with d's reciprocal in two parts is off by less than a unit in its last place, and what it
// leaves, which is exact, over d corrects it (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor",
// 1990, theorem 5). Powers of two keep all of it in range, but for quotients below 2^-70 of a d from 2^30 on.
struct ReciprocalQuotients {
  float divisor, scale, inverse, rest;

  KVQ_HD static ReciprocalQuotients By(float d) {
    const float magnitude = Absolute(d);
    const bool infinite = magnitude == BitsFloat(0x7F800000);
    const float scale = magnitude >= 1073741824.0f ? infinite ? 0.0f : 2.3283064e-10f : 1.8446744e19f;  // 2^30: 2^-32, 2^64
    const float divisor = infinite ? 1.0f : d * scale, inverse = 1 / divisor;
    return {divisor, scale, inverse, fmaf(-divisor, inverse, 1) * inverse};
  }
  KVQ_HD float Of(float x) const {
    const float scaled = x * scale, near = fmaf(scaled, inverse, scaled * rest);
    return fmaf(fmaf(-divisor, near, scaled), inverse, near);
  }
};
#ifdef __CUDACC__
using Quotients = ReciprocalQuotients;
#else
struct Quotients {
  float divisor;

  static Quotients By(float d) { return {d}; }
  float Of(float x) const { return x / divisor; }
};
#endif

// v, or NaN where the poison is one, of the same bits everywhere. (Adding it would lose the sign of a zero.)
KVQ_HD inline float Poisoned(float v, float poison) {
  float poisoned = poison == poison ? v : BitsFloat(0x7FC00000);
#ifdef __CUDA_ARCH__
  asm("" : "+f"(poisoned));  // or what is done with it would be done with both
#endif
  return poisoned;
}

// v, but 0 for -0: where the smallest of several zeros is stored, CPU and GPU may have found another one.
KVQ_HD inline float PlusZero(float v) { return v + 0.0f; }

#ifndef __CUDACC__
template <typename Numbers>
inline constexpr bool kAreHalves = false;
#endif

// A group's numbers as float16 has them.
template <typename Numbers>
struct Halves {
  const Numbers& x;
  KVQ_HD float operator[](int i) const { return AsHalf(x[i]); }
#ifdef __CUDACC__
  __device__ __forceinline__ float Part(int i) const
    requires requires(const Numbers& of) { of.Part(0); }
  {
    return AsHalf(x.Part(i));
  }
  __device__ __forceinline__ uint32_t* Words() const { return x.Words(); }
#endif
};

#ifdef __CUDACC__
// Numbers that a lane has in registers: of a group all, or as many as each of kLanes neighbouring lanes has, which then come here
// together and cannot number them; what follows below is of the whole group, in each lane. Also as they came, two of kType in a word,
// but where that is kFloat32.
template <int kLanes_, DType kType>
struct OwnNumbers {
  float* v;
  uint32_t* words;
  __device__ __forceinline__ float& operator[](int i) const
    requires(kLanes_ == 1)
  {
    return v[i];
  }
  __device__ __forceinline__ float& Part(int i) const { return v[i]; }
  __device__ __forceinline__ uint32_t* Words() const { return words; }
};
template <typename Numbers>
inline constexpr int kLanes = 1;
template <int kLanes_, DType kType>
inline constexpr int kLanes<OwnNumbers<kLanes_, kType>> = kLanes_;
template <typename Numbers>
inline constexpr int kLanes<Halves<Numbers>> = kLanes<Numbers>;
template <typename Numbers>
inline constexpr DType kInWords = DType::kFloat32;
template <int kLanes_, DType kType>
inline constexpr DType kInWords<OwnNumbers<kLanes_, kType>> = kType;
template <typename Numbers>
inline constexpr DType kInWords<Halves<Numbers>> = kInWords<Numbers> == DType::kFloat16 ? DType::kFloat16 : DType::kFloat32;

template <typename Numbers>
inline constexpr DType kInWords<Numbers&> = kInWords<Numbers>;
template <typename Numbers>
inline constexpr bool kHasWords = kInWords<Numbers> != DType::kFloat32;
template <typename Numbers>
inline constexpr bool kAreHalves = kInWords<Numbers> == DType::kFloat16;

// `combine` of v over those lanes.
template <typename Numbers, typename T, typename Combine>
__device__ __forceinline__ T OverLanes(T v, const Combine& combine) {
#pragma unroll
  for (int distance = 1; distance < kLanes<Numbers>; distance *= 2) v = combine(v, __shfl_xor_sync(~0u, v, distance));
  return v;
}

// Smallest and largest of those that this thread sees, NaN where one is: words in half the instructions.
struct Ends {
  float low, high;
};
template <typename Numbers>
__device__ __forceinline__ Ends EndsOf(const Numbers& x, int n) {
  if constexpr (kHasWords<Numbers>) {
    constexpr DType kType = kInWords<Numbers>;
    uint32_t low = x.Words()[0], high = low;
    KVQ_UNROLL
    for (int i = 1; i < n / 2; ++i) {
      low = SmallerOfTwo<kType>(low, x.Words()[i]);
      high = LargerOfTwo<kType>(high, x.Words()[i]);
    }
    float lows[2], highs[2];
    UnpackTwo<kType>(low, lows[0], lows[1]);
    UnpackTwo<kType>(high, highs[0], highs[1]);
    return {SmallerOrNan(lows[0], lows[1]), LargerOrNan(highs[0], highs[1])};
  } else {
    Ends ends{PartOf(x, 0), PartOf(x, 0)};
    KVQ_UNROLL
    for (int i = 1; i < n; ++i) {
      const float v = PartOf(x, i);
      ends.low = SmallerOrNan(v, ends.low);
      ends.high = LargerOrNan(v, ends.high);
    }
    return ends;
  }
}
#endif

// The largest magnitude of a group; NaN where something in it is not finite.
template <typename Numbers>
KVQ_HD inline float Magnitude(const Numbers& x, int n) {
#ifdef __CUDACC__
  float largest = 0;
  if constexpr (requires(float (&eight)[8]) { x.Eight(0, eight); }) {
#pragma unroll 1  // for few tokens
    for (int i = 0; i < n / 8; ++i) {
      float eight[8];
      x.Eight(i, eight);
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = LargerOrNan(Absolute(eight[j]), largest);
    }
  } else if constexpr (kHasWords<Numbers>) {
    const Ends ends = EndsOf(x, n / kLanes<Numbers>);
    largest = LargerOrNan(Absolute(ends.low), Absolute(ends.high));
  } else {
    KVQ_UNROLL
    for (int i = 0; i < n / kLanes<Numbers>; ++i) largest = LargerOrNan(Absolute(PartOf(x, i)), largest);
  }
  largest = OverLanes<Numbers>(largest, LargerOrNan);
  return Poisoned(largest, largest * 0);
#else
  float largest = 0, poison = 0;
  for (int i = 0; i < n; ++i) {
    largest = Larger(Absolute(x[i]), largest);
    poison += x[i] * 0;
  }
  return Poisoned(largest, poison);
#endif
}

// The number of the largest magnitude with its sign, the first one of several; NaN where something is not finite. Of a group
// that one thread has.
template <typename Numbers>
KVQ_HD inline float SignedMagnitude(const Numbers& x, int n) {
#ifdef __CUDACC__
  if constexpr (kHasWords<Numbers>) {
    static_assert(kLanes<Numbers> == 1);
    const Ends ends = EndsOf(x, n);
    const float poison = ends.low * 0 + ends.high * 0;
    if (-ends.low != ends.high) return Poisoned(ends.high > -ends.low ? ends.high : ends.low, poison);
  }
  float with_sign = 0, poison = 0;
  KVQ_UNROLL
  for (int i = 0; i < n / kLanes<Numbers>; ++i) {
    const float v = PartOf(x, i);
    with_sign = Absolute(v) > Absolute(with_sign) ? v : with_sign;
    poison = fmaf(v, 0, poison);
  }
  if constexpr (kLanes<Numbers> > 1) {  // the first lane of those that have the largest, which is no NaN
    static_assert(kLanes<Numbers> < 32);
    const float largest = OverLanes<Numbers>(Absolute(with_sign), LargerOrNan);
    const uint32_t first_lane = threadIdx.x % 32 / kLanes<Numbers> * kLanes<Numbers>;
    const uint32_t lanes = __ballot_sync(~0u, Absolute(with_sign) == largest) >> first_lane & ((1u << kLanes<Numbers>) - 1);
    with_sign = __shfl_sync(~0u, with_sign, static_cast<int>(first_lane) + __ffs(static_cast<int>(lanes)) - 1);
    poison = OverLanes<Numbers>(poison, [](float a, float b) { return a + b; });
  }
  return Poisoned(with_sign, poison);
#else
  float largest = 0, with_sign = 0, poison = 0;
  for (int i = 0; i < n; ++i) {
    const float v = x[i], magnitude = Absolute(v);
    with_sign = magnitude > largest ? v : with_sign;
    largest = Larger(magnitude, largest);
    poison += v * 0;
  }
  return Poisoned(with_sign, poison);
#endif
}

#ifdef __CUDACC__
__device__ __forceinline__ GroupRange RangeOf(const Ends& ends) {
  const float poison = ends.low * 0 + ends.high * 0;
  return {Poisoned(ends.low, poison), Poisoned(ends.high, poison), poison};
}
#endif

// Smallest and largest, NaN where something is not finite (which comparisons see in some orders and not in others), and the
// poison for what is stored.
template <typename Numbers>
KVQ_HD inline GroupRange Range(const Numbers& x, int n) {
#ifdef __CUDACC__
  const Ends ends = EndsOf(x, n / kLanes<Numbers>);
  return RangeOf({OverLanes<Numbers>(ends.low, SmallerOrNan), OverLanes<Numbers>(ends.high, LargerOrNan)});
#else
  GroupRange range{x[0], x[0], 0};
  for (int i = 0; i < n; ++i) {
    range.low = Smaller(x[i], range.low);
    range.high = Larger(x[i], range.high);
    range.poison += x[i] * 0;
  }
  range.low = Poisoned(range.low, range.poison), range.high = Poisoned(range.high, range.poison);
  return range;
#endif
}

// A sum over a group's or a token's numbers, in their order: sum = add(number, sum).
template <typename Numbers, typename Add>
KVQ_HD inline float SumInOrder(const Numbers& x, int n, const Add& add) {
  float sum = 0;
#ifdef __CUDACC__
  if constexpr (requires { x.Any(0); }) {  // each lane adds all of them
#pragma unroll 16
    for (int i = 0; i < n; ++i) sum = add(x.Any(i), sum);
  } else if constexpr (requires(float (&eight)[8]) { x.Eight(0, eight); }) {  // one lane has all of them
#pragma unroll 4
    for (int i = 0; i < n / 8; ++i) {
      float eight[8];
      x.Eight(i, eight);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = add(eight[j], sum);
    }
  } else {
    const int lane = static_cast<int>(threadIdx.x) % kLanes<Numbers>;
#pragma unroll
    for (int turn = 0; turn < kLanes<Numbers>; ++turn) {  // each lane adds its own to what the one before has
      if (lane == turn) {
        KVQ_UNROLL
        for (int i = 0; i < n / kLanes<Numbers>; ++i) sum = add(PartOf(x, i), sum);
      }
      if constexpr (kLanes<Numbers> > 1) sum = __shfl_sync(~0u, sum, turn, kLanes<Numbers>);
    }
  }
#else
  for (int i = 0; i < n; ++i) sum = add(x[i], sum);
#endif
  return sum;
}

// The sums, in their order, of two sorts of terms that were made of a group's numbers, of each thread's its own.
struct TwoSums {
  float first, second;
};
template <typename Numbers, int n>
KVQ_HD inline TwoSums SumsOfTerms(const float (&first)[n], const float (&second)[n]) {
  TwoSums sums{0, 0};
#ifdef __CUDACC__
#pragma unroll 1
  for (int lane = 0; lane < kLanes<Numbers>; ++lane) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      sums.first += kLanes<Numbers> == 1 ? first[i] : __shfl_sync(~0u, first[i], lane, kLanes<Numbers>);
      sums.second += kLanes<Numbers> == 1 ? second[i] : __shfl_sync(~0u, second[i], lane, kLanes<Numbers>);
    }
  }
#else
  for (int i = 0; i < n; ++i) sums.first += first[i], sums.second += second[i];
#endif
  return sums;
}

// The sum of squares, in their order. A float16's square is a float32, so that adding it and rounding once is the same.
template <typename Numbers>
KVQ_HD inline float SumOfSquares(const Numbers& x, int n) {
#ifdef __CUDACC__
  if constexpr (kInWords<Numbers> == DType::kFloat16) return SumInOrder(x, n, [](float v, float sum) { return fmaf(v, v, sum); });
#endif
  return SumInOrder(x, n, [](float v, float sum) { return sum + v * v; });
}

// The sum of whole numbers that are made of a group's.
template <typename Numbers, typename Term>
KVQ_HD inline int32_t Total(const Numbers& x, int n, const Term& term) {
  int32_t sum = 0;
#ifdef __CUDACC__
  KVQ_UNROLL
  for (int i = 0; i < n / kLanes<Numbers>; ++i) sum += term(PartOf(x, i));
  return OverLanes<Numbers>(sum, [](int32_t a, int32_t b) { return a + b; });
#else
  for (int i = 0; i < n; ++i) sum += term(x[i]);
  return sum;
#endif
}

#ifdef __CUDACC__
// 1 / d and a / b, to the nearest, as the compiler makes them where all is in range, without asking whether it is: as of sums of products
// of float16.
__device__ __forceinline__ float ShortReciprocal(float d) {
  const float near = ptx::Reciprocal(d);
  return fmaf(near, -fmaf(d, near, -1), near);
}
__device__ __forceinline__ float ShortDivision(float a, float b) {
  const float near = ptx::Reciprocal(b), inverse = fmaf(near, fmaf(-b, near, 1), near), quotient = a * inverse;
  return fmaf(inverse, fmaf(-b, quotient, a), quotient);
}

// What is left of a fit by which FitGroup has put codes where their words were, in each half so much too large.
inline constexpr uint32_t kTooLargeWhole = 0x4340;
template <typename Stored, uint32_t kTooLarge_ = kTooLargeWhole>
struct Coded {
  static constexpr uint32_t kTooLarge = kTooLarge_;
  Stored stored;
};

// Codes that are the whole part of s = x inverse + offset, below 16 or limited (kLimits) to 15, but for what a scheme's own roundings
// make of that: as pairs in x.Words(), for Coded. Where s ends up within 2^-15 of a whole number, or is not `near` enough
// for that to be said (all |x inverse| <= 32), `exact(number)` makes them. (192 + s has 16 bits behind the point: one operation makes a
// code and what lies behind it. That sum's and the offset's roundings are 2^-17 at most each, the reciprocal's and a scheme's three
// together less than 2^-17: some 2^-15.4 in all.)
template <bool kLimits, typename Numbers, typename Exact>
__device__ __forceinline__ void CodeWhole(const Numbers& x, int n, float inverse, float offset, bool near, const Exact& exact) {
  uint32_t* words = x.Words();
  uint32_t codes[32], least = ~0u;
  const int pairs = n / kLanes<Numbers> / 2;
  const float from = offset + (192 + 3.0517578e-5f);  // 2^-15 more, so that what is left below 2^-14 cannot be said
  KVQ_UNROLL
  for (int i = 0; i < pairs; ++i) {
    float low, high;
    uint32_t word = words[i];
    asm volatile("" : "+r"(word));  // numbers are wanted here, not all of them long before
    UnpackTwo<kInWords<Numbers>>(word, low, high);
    const uint32_t first = FloatBits(fmaf(low, inverse, from)), second = FloatBits(fmaf(high, inverse, from));
    least = SmallerWholeOfTwo(ptx::PickBytes(first, second, 0x5410), least);
    codes[i] = ptx::PickBytes(first, second, 0x7632);
    if constexpr (kLimits) codes[i] = SmallerWholeOfTwo(codes[i], (kTooLargeWhole + 15) * 0x10001);
  }
  if (near && (least & 0xFFFF) >= 4 && least >> 16 >= 4) {
    KVQ_UNROLL
    for (int i = 0; i < pairs; ++i) words[i] = codes[i];
  } else {
    KVQ_UNROLL
    for (int i = 0; i < pairs; ++i) {
      float low, high;  // once more, which the 0 hides
      UnpackTwo<kInWords<Numbers>>(words[i] ^ threadIdx.z, low, high);
      words[i] = exact(low) + (exact(high) << 16) + kTooLargeWhole * 0x10001;
    }
  }
}
#endif

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
struct VectorFitOf {
  struct Type {
    Nothing stored;
  };
};
template <typename S>
  requires kHasVector<S>
struct VectorFitOf<S> {
  using Type = typename S::VectorFit;
};
template <typename S>
using VectorFit = typename VectorFitOf<S>::Type;
template <typename S>
inline constexpr bool kTurns = [] {
  if constexpr (kHasVector<S>) return requires(float* x, VectorFit<S> fit) { S::Turn(x, 0, fit, Alone{}); };
  else return requires(float* x) { S::Turn(x, 0, Alone{}); };
}();
template <typename S>
inline constexpr bool kOpens = requires { typename S::Opened; };

using kvq::Element;
enum class Signs : uint8_t { kNone, kOfNumbers };
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
inline constexpr Signs kSigns = [] {
  if constexpr (requires { S::kSigns; }) return S::kSigns;
  else return Signs::kNone;
}();
template <typename S, typename Fit>
inline constexpr uint32_t kPairTooLarge = [] {
  if constexpr (requires { Fit::kTooLarge; }) return Fit::kTooLarge;
  else if constexpr (requires { S::kPairTooLarge; }) return S::kPairTooLarge;
  else return 0u;
}();
template <typename S>
inline constexpr bool kNormed = requires { requires S::kNormed; };
template <typename S>
inline constexpr bool kInOrder = requires { requires S::kInOrder; };
template <typename S>
inline constexpr bool kPutsCodes = requires { requires S::kPutsCodes; };
template <typename S>
inline constexpr bool kTurnsByProducts = requires { requires S::kTurnsByProducts; };

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
KVQ_HD inline VectorFit<S> FitVector(const Numbers& x, int n) {
  if constexpr (kHasVector<S>) return S::FitVector(x, n);
  return {};
}
template <typename S, typename Numbers, typename Team>
KVQ_HD inline void TurnToken(Numbers&& x, int n, const VectorFit<S>& vector, const Team& team) {
  if constexpr (kHasVector<S>) {
    S::Turn(x, n, vector, team);
  } else {
    S::Turn(x, n, team);
  }
}
template <typename S, typename Numbers>
KVQ_HD inline auto FitGroup(const Numbers& x, int n, const Vector<S>& vector) {
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

// What is kept of a group or token, `kBytes` of it, copied from and to a plane; on a GPU, where planes are aligned, at once.
template <int kBytes>
KVQ_HD inline void CopyTo(uint8_t* plane, const void* kept) {
#ifdef __CUDACC__
  plane = static_cast<uint8_t*>(__builtin_assume_aligned(plane, kBytes & -kBytes));
#endif
  memcpy(plane, kept, kBytes);
}
template <int kBytes>
KVQ_HD inline void CopyFrom(const uint8_t* plane, void* kept) {
#ifdef __CUDACC__
  plane = static_cast<const uint8_t*>(__builtin_assume_aligned(plane, kBytes & -kBytes));
#endif
  memcpy(kept, plane, kBytes);
}

// Group `g` of a token that has `groups` of them.
template <typename S, int kMember = 0, int kOffset = 0>
KVQ_HD inline void Store(const typename S::Stored& stored, const KvView& view, int64_t b, int64_t h, int64_t token,
                         int64_t groups, int64_t g) {
  if constexpr (kMember < kMembers<S>) {
    constexpr int kBytes = S::kStored[kMember];
    static_assert(kMember + 1 < kMembers<S> || kOffset + kBytes == sizeof(typename S::Stored), "kStored adds up to Stored");
    CopyTo<kBytes>(MetadataRow<uint8_t>(view, kFirstStored<S> + kMember, groups * kBytes, b, h, token) + g * kBytes,
                   reinterpret_cast<const char*>(&stored) + kOffset);
    Store<S, kMember + 1, kOffset + kBytes>(stored, view, b, h, token, groups, g);
  }
}
template <typename S, int kMember = 0, int kOffset = 0>
KVQ_HD inline void Load(const KvView& view, int64_t b, int64_t h, int64_t token, int64_t groups, int64_t g,
                        typename S::Stored& stored) {
  if constexpr (kMember < kMembers<S>) {
    constexpr int kBytes = S::kStored[kMember];
    CopyFrom<kBytes>(MetadataRow<uint8_t>(view, kFirstStored<S> + kMember, groups * kBytes, b, h, token) + g * kBytes,
                     reinterpret_cast<char*>(&stored) + kOffset);
    Load<S, kMember + 1, kOffset + kBytes>(view, b, h, token, groups, g, stored);
  }
}
template <typename S>
KVQ_HD inline void StoreVector(const Vector<S>& vector, const KvView& view, int64_t b, int64_t h, int64_t token) {
  if constexpr (kHasVector<S>) {
    constexpr int kBytes = sizeof vector;
    CopyTo<kBytes>(MetadataRow<uint8_t>(view, kFirstStored<S> + kMembers<S>, kBytes, b, h, token), &vector);
  }
}
template <typename S>
KVQ_HD inline void LoadVector(const KvView& view, int64_t b, int64_t h, int64_t token, Vector<S>& vector) {
  if constexpr (kHasVector<S>) {
    constexpr int kBytes = sizeof vector;
    CopyFrom<kBytes>(MetadataRow<uint8_t>(view, kFirstStored<S> + kMembers<S>, kBytes, b, h, token), &vector);
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

template <typename S>
void Encode(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out) {
  const int64_t dim = x.head_dim, n = GroupOf(params, dim), groups = dim / n;
  ForEach(/*parallel=*/AreMany(x), RowsOf(x), [&](int64_t index) {
    const Row row(x, index);
    const int64_t slot = first_token + row.t;
    FewNumbers<float> values(dim);
    FewNumbers<uint8_t> codes(dim);
    LoadRow(x.data, x.dtype, Offset(x, row.b, row.h, row.t, 0), dim, values.data());
    const VectorFit<S> vector = FitVector<S>(values.data(), static_cast<int>(dim));
    StoreVector<S>(vector.stored, out, row.b, row.h, slot);
    if constexpr (kTurns<S>) TurnToken<S>(values.data(), static_cast<int>(dim), vector, Alone{});
    for (int64_t g = 0; g < groups; ++g) {
      const typename S::Fit fit = FitGroup<S>(&values[g * n], static_cast<int>(n), vector.stored);
      CodeGroup<S>(fit, &values[g * n], n, &codes[g * n]);
      Store<S>(fit.stored, out, row.b, row.h, slot, groups, g);
    }
    if constexpr (kOdd<S> > 0) {
      PackOddBits<kLow<S>, kOdd<S>>(codes.data(), dim, MetadataRow<uint8_t>(out, 1, kOdd<S> * dim / 8, row.b, row.h, slot));
      for (int64_t i = 0; i < dim; ++i) codes[i] &= (1 << kLow<S>) - 1;
    }
    PackRow<kLow<S>>(codes.data(), dim, CodeRow<kLow<S>>(out, row.b, row.h, slot));
  });
}

template <typename S>
void Decode(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out) {
  const int64_t dim = out.head_dim, n = GroupOf(params, dim), groups = dim / n;
  ForEach(/*parallel=*/AreMany(out), RowsOf(out), [&](int64_t index) {
    const Row row(out, index);
    const int64_t slot = first_token + row.t;
    FewNumbers<float> values(dim);
    FewNumbers<uint8_t> codes(dim);
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

// HostCodec::lines.
template <typename S>
KVQ_VECTOR void Lines(const CodecParams& params, const KvView& in, int64_t b, int64_t h, int64_t first, int64_t tokens, float* scales,
                      float* shifts) {
  const int64_t groups = in.head_dim / GroupOf(params, in.head_dim);
  for (int64_t i = 0; i < tokens * groups; ++i) {  // which lie one behind the other
    Line line;
    if constexpr (kHasVector<S>) {
      Vector<S> vector;
      LoadVector<S>(in, b, h, first + i, vector);
      line = S::LineOf(vector, static_cast<int>(in.head_dim));
    } else {
      typename S::Stored stored;
      Load<S>(in, b, h, first * groups + i, 1, 0, stored);
      line = S::LineOf(stored);
    }
    scales[i] = line.scale;
    if constexpr (kHasZero<S>) shifts[i] = S::kZero == Zero::kOfCodes ? -line.zero * line.scale : -line.zero;
    else shifts[i] = 0;
  }
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

// Where the shape is known when a kernel is compiled, and numbers and codes are aligned (EncodesOwn), a lane has those that it encodes
// in registers (kernels/device/plain_encode.cuh): so many neighbouring channels of a token, whose codes fill words; more, where
// fewer lanes then have to exchange numbers, or where a lane's own work (places, loads, stores) would be much of it; and all of a group
// that is seen number by number.
inline constexpr int kWarps = 2;  // of a block: small ones, so that few multiprocessors wait for the last one
template <typename S>
constexpr int OwnChannels(int group) {
  int own = kLow<S> <= 4 && (kOdd<S> == 0 || kLow<S> == 2) ? 64 : 32;
  if constexpr (kInOrder<S>) own = group > own ? group : own;
  return own;
}
// Blocks of a multiprocessor that registers have to be left for.
constexpr int OwnBlocks(int own) { return own > 64 ? 6 : own > 32 ? 10 : 14; }

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

// Whether lanes may have their numbers in registers, and the launch that has them so (kernels/device/plain_encode.cc).
bool EncodesOwn(const DenseView& x, int64_t group, const KvView& out, bool odd);
KernelLaunch EncodeOwnLaunch(const char* file, const char* scheme, const DenseView& x, int64_t group, int own);
// And of a lane for each token, which tensor cores turn (kTurnsByProducts).
KernelLaunch EncodeTurnedLaunch(const char* file, const char* scheme, const DenseView& x);

template <typename S>
void EncodeCuda(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out, void* stream) {
  const int64_t dim = x.head_dim, group = GroupOf(params, dim);
  if (EncodesOwn(x, group, out, kOdd<S> > 0)) {
    if constexpr (kTurnsByProducts<S>) {
      Launch(S::kLabel, EncodeTurnedLaunch(S::kFile, S::kName, x), stream, x, first_token, out);
    } else {
      const int own = OwnChannels<S>(static_cast<int>(group));
      Launch(S::kLabel, EncodeOwnLaunch(S::kFile, S::kName, x, group, own), stream, x, first_token, out);
    }
    return;
  }
  const Split split(dim, group, kLow<S>);
  KernelLaunch launch = KernelOf<S>("kvq::plain::EncodeKernel", x, split);
  Launch(S::kLabel, launch, stream, x, first_token, out, split, IsWide(x));
}
template <typename S>
void DecodeCuda(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out, void* stream) {
  const Split split(out.head_dim, GroupOf(params, out.head_dim), kLow<S>);
  Launch(S::kLabel, KernelOf<S>("kvq::plain::DecodeKernel", out, split), stream, in, first_token, out, split);
}

// ---- the row

// All of a codec but what only its author knows.
template <typename S>
Codec MakeCodec() {
  static_assert(kFirstStored<S> + kMembers<S> + kHasVector<S> <= kMaxPlanes);
  static constexpr std::span<const int64_t> kGroups = S::kGroups;
  constexpr bool kWhole = kGroups[0] == 0;
  static_assert(std::ranges::all_of(S::kGroups, [](int64_t group) { return group == 0 || group >= kSmallestGroup; }));
  Codec codec;
  codec.bits = S::kBits;
  codec.default_group = kGroups[0];
  if (!kWhole) codec.groups = kGroups;
  codec.head_dim_multiple = kRunChannels<kLow<S>>;
  codec.grouping = kMembers<S> == 0 && !kHasVector<S> ? "no scales" : kWhole ? "all channels of one token" : StrCat(kGroups[0], " consecutive channels of one token");
  codec.vector_wide = kHasVector<S>, codec.turned = kTurns<S>;
  codec.device.source = S::kFile, codec.device.plain = S::kName;
  if constexpr (kTurns<S> && kHasElement<S>) codec.turn_block = S::kTurnBlock;
  if constexpr (kHasElement<S>) {
    // What attention on a CPU has readers for (kernels/host/codes.cc), and where it finds scales.
    constexpr bool kEntries = S::kElement == Element::kTable || S::kElement == Element::kBytes;
    constexpr bool kByte = S::kElement == Element::kE4M3 || S::kElement == Element::kE5M2;
    static_assert(kEntries ? S::kBits == 4 || S::kBits == 3 : kByte ? S::kBits == 8 : S::kElement != Element::kE2M1 || S::kBits == 4);
    static_assert(kEntries || !kNormed<S>, "a row that is divided by its norm has entries");
    static_assert(!kHasVector<S> || kWhole, "a vector is the scale of all channels");
    codec.device.label = S::kLabel, codec.device.keys_alone = kNormed<S>;
    codec.host = {.lines = Lines<S>, .element = S::kElement, .normed = kNormed<S>};
    if constexpr (requires { S::TableEntry(0, 0); }) codec.host.entry = S::TableEntry;
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

// Its nmse, where that comes from, and its golden file.
struct Known {
  double nmse;
  const char *source, *golden;
};
template <typename S>
Codec MakeCodec(const Known& known) {
  Codec codec = MakeCodec<S>();
  codec.nmse = known.nmse, codec.nmse_source = known.source, codec.golden = known.golden;
  return codec;
}
// Of one that encodes keys as values.
template <typename S>
Scheme MakeScheme(const char* source, const Known& known) {
  return {.name = S::kLabel, .source = source, .keys = MakeCodec<S>(known), .values = MakeCodec<S>(known), .refused = ""};
}

#endif  // __CUDACC__

}  // namespace kvq::plain

#ifdef __CUDACC__
#include "kernels/device/plain_kernels.cuh"
#include "kernels/device/plain_codes.cuh"
#include "kernels/device/plain_encode.cuh"
#include "kernels/device/plain_encode_turned.cuh"
#endif
