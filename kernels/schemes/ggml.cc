// q4_0, q4_1, q5_0, q5_1, iq4_nl: ggml's blocks of 4 and 5 bits, as llama.cpp keeps a KV cache with -ctk q4_0 -ctv q4_0 and
// likewise (its 8-bit ones: q8_0.cc).
//
// Source: ggml/src/ggml-quants.c of llama.cpp 0c1e57098, quantize_row_*_ref and dequantize_row_*, in float32 without
// contraction; gguf's NumPy gives the same bytes.
//
// A group of 32 channels x has a scale d and, in q4_1 and q5_1, a minimum m, which are stored as fp16. Codes are made with
// what is not rounded, by the reciprocal 1 / d (0 where d = 0); M is the number of largest magnitude, with its sign, the
// first one of several:
//   q4_0    d = M / -8            code q = min(15, floor(x (1 / d) + 8.5))     decoded: (q - 8) fp16(d)
//   q5_0    d = M / -16           q = min(31, floor(x (1 / d) + 16.5))         (q - 16) fp16(d)
//   q4_1    d = (max - min) / 15  q = min(15, floor((x - min) (1 / d) + 0.5))  q fp16(d) + fp16(min)
//   q5_1    d = (max - min) / 31  q = min(31, floor((x - min) (1 / d) + 0.5))  q fp16(d) + fp16(min)
//   iq4_nl  q = the nearest v[q] to x / (M / -127), of two the upper one; then
//           d = sum(x^2 v x) / sum(x^2 v v), v = v[q], summed in the channels' order    v[q] fp16(d)
// So in q4_0 and q5_0 M has code 0 and is kept as well as fp16 can, and the other end is cut off at 7 / 8 or 15 / 16 of it.
//
// Exact bytes for 32 channels: q4_0 and iq4_nl 18 (4.5 bits an element), q4_1 20 (5), q5_0 22 (5.5), q5_1 24 (6). Planes, per
// token and head:
//   codes     head_dim / 2 bytes, of 5 bits the low 4, see kernels/code_row.h (a block has them otherwise: j with j + 16)
//   odd bits  q5_0, q5_1: head_dim / 8 bytes
//   metadata  head_dim / 32 fp16 numbers d;  q4_1, q5_1: likewise m
// Refused: head_dim that is no multiple of 32; other groups.
//
// Where it differs. A minimum that is zero is stored as +0; in C it has the sign of the first of them. A group with NaN or
// infinity decodes to NaN; in C its codes are not defined. Codes of an iq4_nl group that is zero (below 1e-15) are 8, as
// CUDA writes them; on a CPU they are what a buffer held.
#include "kernels/plain.h"

namespace kvq::ggml {

struct Scale {
  uint16_t d;
};
struct ScaleAndMinimum {
  uint16_t d, m;
};

// q4_0, q5_0
template <int kBits_>
struct Symmetric {
  static constexpr char kFile[] = "kernels/schemes/ggml.cc";
  static constexpr int kBits = kBits_;
  static constexpr int64_t kGroups[] = {32};
  static constexpr float kOffset = 1 << (kBits - 1);

  using Stored = Scale;
  static constexpr int kStored[] = {2};
  struct Fit {
    float inverse;
    Stored stored;
  };

  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const float d = plain::SignedMagnitude(x, n) / -kOffset;
    return {plain::Reciprocal(d), {FloatToHalf(d)}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return plain::Truncated(x * fit.inverse + (kOffset + 0.5f), 2 * kOffset - 1); }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    return (static_cast<float>(code) - kOffset) * HalfToFloat(stored.d);
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {HalfToFloat(stored.d), kOffset}; }
};

// q4_1, q5_1
template <int kBits_>
struct Asymmetric {
  static constexpr char kFile[] = "kernels/schemes/ggml.cc";
  static constexpr int kBits = kBits_;
  static constexpr int64_t kGroups[] = {32};
  static constexpr float kLargest = (1 << kBits) - 1;

  using Stored = ScaleAndMinimum;
  static constexpr int kStored[] = {2, 2};
  struct Fit {
    float inverse, minimum;
    Stored stored;
  };

  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const GroupRange range = plain::Range(x, n);
    const float d = plain::Poisoned((range.high - range.low) / kLargest, range.poison);
    const float m = plain::Poisoned(plain::PlusZero(range.low), range.poison);
    return {plain::Reciprocal(d), m, {FloatToHalf(d), FloatToHalf(m)}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return plain::Truncated((x - fit.minimum) * fit.inverse + 0.5f, kLargest); }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    return static_cast<float>(code) * HalfToFloat(stored.d) + HalfToFloat(stored.m);
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfValues;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {HalfToFloat(stored.d), -HalfToFloat(stored.m)}; }
};

struct Q4_0 : Symmetric<4> {
  static constexpr char kName[] = "kvq::ggml::Q4_0", kLabel[] = "q4_0";
};
struct Q5_0 : Symmetric<5> {
  static constexpr char kName[] = "kvq::ggml::Q5_0", kLabel[] = "q5_0";
};
struct Q4_1 : Asymmetric<4> {
  static constexpr char kName[] = "kvq::ggml::Q4_1", kLabel[] = "q4_1";
};
struct Q5_1 : Asymmetric<5> {
  static constexpr char kName[] = "kvq::ggml::Q5_1", kLabel[] = "q5_1";
};

// v[code] of iq4_nl: signed bytes, the first in the low bits, so that a GPU has them in registers.
KVQ_HD constexpr float NonLinear(uint32_t code) {
  const uint64_t half = code < 8 ? 0xF6EADDCFBFAD9881u : 0x7159453526190D01u;
  return static_cast<float>(static_cast<int8_t>(half >> (8 * (code % 8))));
}

#ifdef __CUDACC__
// Middles between an entry and the next, from where on the next one is the nearer, are whole numbers of halves. So the code of y is
// one of floor(2 y); of 32 cells of eight whole numbers, one for each lane, none has more than one middle. To floor(2 y) is added what
// carries into the upper half from its cell's middle on, and there what the cells before have.
struct MiddleCells {
  static constexpr float kWhole = 8388608, kEights = 100663296;  // 2^23, 1.5 * 2^26: so many are their last bits
  float carry[32] = {};                                          // in lane i that of cell i, or i - 32
  constexpr MiddleCells() {
    int before[33] = {}, middle[32] = {};
    bool has[32] = {};
    for (uint32_t code = 0; code < 15; ++code) {
      const auto twice = static_cast<int>(NonLinear(code) + NonLinear(code + 1));
      const int cell = (twice + 256) / 16;
      middle[cell] = twice, has[cell] = true;
      for (int after = cell + 1; after < 32; ++after) ++before[after];
    }
    for (int i = 0; i < 32; ++i) carry[i ^ 16] = kWhole + static_cast<float>(before[i] * 0x10000 + (has[i] ? 0x10000 - middle[i] : 0x8000));
  }
};
constexpr bool MiddlesAreApart() {
  for (uint32_t code = 0; code < 14; ++code) {
    if (NonLinear(code + 2) - NonLinear(code) < 16) return false;
  }
  return true;
}
static_assert(MiddlesAreApart());
__device__ constexpr MiddleCells kDeviceMiddles;
#endif

struct Iq4Nl {
  static constexpr char kFile[] = "kernels/schemes/ggml.cc", kName[] = "kvq::ggml::Iq4Nl", kLabel[] = "iq4_nl";
  static constexpr int kBits = 4;
  static constexpr int64_t kGroups[] = {32};

  using Stored = Scale;
  static constexpr int kStored[] = {2};
  static constexpr bool kPutsCodes = true;
  struct Fit {
    float inverse;
    Stored stored;
  };

  // The entry that is nearest to v, of two the upper one; the first for NaN. ggml compares v's distances from the entries around it,
  // which are exact next to the middle of the two.
  struct Entry {
    uint32_t code;
    float value;
  };
  KVQ_HD static Entry Nearest(float v) {
    Entry entry{0, NonLinear(0)};
    for (uint32_t i = 0; i < 15; ++i) {
      const float middle = (NonLinear(i) + NonLinear(i + 1)) * 0.5f;
      plain::CountReached(v, middle, entry.code);
#ifndef __CUDA_ARCH__
      entry.value += v >= middle ? NonLinear(i + 1) - NonLinear(i) : 0;
#endif
    }
#ifdef __CUDA_ARCH__
    entry.value = NonLinear(entry.code);
#endif
    return entry;
  }
  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const float largest = plain::SignedMagnitude(x, n);
    const bool zero = plain::Absolute(largest) < 1e-15f;
    const float inverse = zero ? 0 : 1 / (largest / NonLinear(0));
#ifdef __CUDACC__
    constexpr int kSeen = 32 / plain::kLanes<Numbers>;  // of the group, by this lane
#else
    constexpr int kSeen = 32;
#endif
    float of_x[kSeen], of_itself[kSeen];
    uint32_t codes[kSeen];
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int i = 0; i < kSeen; ++i) {
      const float v = plain::PartOf(x, i), weight = v * v;
      const Entry q = Nearest(inverse * v);
      of_x[i] = weight * q.value * v, of_itself[i] = weight * q.value * q.value, codes[i] = q.code;
    }
    const plain::TwoSums sums = plain::SumsOfTerms<Numbers>(of_x, of_itself);
    if constexpr (requires { x.PutCode(0, 0u); }) {
#ifdef __CUDACC__
      __syncwarp();  // all lanes have their numbers
#endif
      for (int i = 0; i < kSeen; ++i) x.PutCode(i, codes[i]);
    }
    return Fit{inverse, {zero ? uint16_t{0} : FloatToHalf(sums.first / sums.second)}};
  }
#ifdef __CUDACC__
  struct LaneTable {
    float carry, entry;
    __device__ static LaneTable Of() { return {kDeviceMiddles.carry[threadIdx.x % 32], NonLinear(threadIdx.x % 16)}; }
  };
  template <typename Numbers>
  __device__ __forceinline__ static auto FitWords(const Numbers& x, int n, const LaneTable& table) {
    constexpr uint32_t kTooLarge = 0x4B00;
    const float largest = plain::SignedMagnitude(x, n);
    const bool zero = plain::Absolute(largest) < 1e-15f, broken = largest != largest;
    const float step = plain::ShortQuotient(largest, NonLinear(0), 1 / NonLinear(0));
    float inverse;
    if constexpr (plain::kAreHalves<Numbers>) inverse = plain::ShortReciprocal(step);
    else inverse = 1 / step;
    if (zero) inverse = 0;
    float with_x = 0, with_itself = 0;
    // Eight at once, so that no shuffle is waited for. The codes are in the upper halves of sums, and kTooLarge more; 0 has 8.
    KVQ_UNROLL
    for (int i = 0; i < n / 8; ++i) {
      uint32_t sums[8];
      float entries[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float y = inverse * x[8 * i + j];
        const float carry = __shfl_sync(~0u, table.carry, static_cast<int>(FloatBits(__fadd_rd(y, MiddleCells::kEights))));
        sums[j] = FloatBits(__fmaf_rd(y, 2, carry));
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const uint32_t two = ptx::PickBytes(sums[j], sums[j + 1], 0x7632);
        x.Words()[4 * i + j / 2] = two;
        entries[j] = __shfl_sync(~0u, table.entry, static_cast<int>(two));
        entries[j + 1] = __shfl_sync(~0u, table.entry, static_cast<int>(two >> 16));
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float v = x[8 * i + j], weighted = v * v * entries[j];
        with_x += weighted * v;
        with_itself += weighted * entries[j];
      }
    }
    if (broken) {
      KVQ_UNROLL
      for (int i = 0; i < n / 2; ++i) x.Words()[i] = kTooLarge * 0x10001;
    }
    float d;
    if constexpr (plain::kAreHalves<Numbers>) d = plain::ShortDivision(with_x, with_itself);
    else d = with_x / with_itself;
    return plain::Coded<Stored, kTooLarge>{{zero ? uint16_t{0} : FloatToHalf(plain::Poisoned(d, largest))}};
  }
#endif
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return fit.inverse == 0 ? 8 : Nearest(x * fit.inverse).code; }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) { return NonLinear(code) * HalfToFloat(stored.d); }

  static constexpr plain::Element kElement = plain::Element::kBytes;
  static constexpr Zero kZero = Zero::kOfCodes;
  static constexpr float TableEntry(int code, int /*head_dim*/) { return NonLinear(static_cast<uint32_t>(code)) + 128; }
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {HalfToFloat(stored.d), 128}; }
};

#ifndef __CUDACC__
namespace {

constexpr char kSource[] = "llama.cpp, ggml-quants.c";
constexpr char kNmse[] = "gguf 0.19.0 on 4 million numbers; iq4_nl: ggml-quants.c in NumPy";
const RegisterScheme kQ4_0{plain::MakeScheme<Q4_0>(kSource, {7.37e-3, kNmse, "q4_0.json"})};
const RegisterScheme kQ4_1{plain::MakeScheme<Q4_1>(kSource, {6.11e-3, kNmse, "q4_1.json"})};
const RegisterScheme kQ5_0{plain::MakeScheme<Q5_0>(kSource, {1.816e-3, kNmse, "q5_0.json"})};
const RegisterScheme kQ5_1{plain::MakeScheme<Q5_1>(kSource, {1.430e-3, kNmse, "q5_1.json"})};
const RegisterScheme kIq4Nl{plain::MakeScheme<Iq4Nl>(kSource, {6.19e-3, kNmse, "iq4_nl.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::ggml
