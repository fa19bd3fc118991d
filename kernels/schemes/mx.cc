// mxfp4, mxfp4-rceil, mxfp4-even, mxfp8, mxfp8-rceil: OCP's microscaling formats (MX 1.0), small floats with a power of
// two for 32 channels; sglang-fp4: the like for 16 channels, as SGLang keeps a KV cache with --kv-cache-dtype fp4_e2m1.
//
// Source: torchao 0.18.0, torchao/prototype/mx_formats/mx_tensor.py, to_mx with FLOOR (OCP's rule, section 6.3), RCEIL
// (the rule of cuBLAS, TensorRT-LLM and ModelOpt) and EVEN (vLLM's UE8M0); SGLang,
// python/sglang/srt/layers/quantization/kvfp4_tensor.py at 0dae407b, FP4MXBlock16KVQuantizeUtil.
//
// The scale of a block is 2^e, stored as a byte e + 127 (E8M0: 255 is NaN, there is no zero), M its largest magnitude:
//   mxfp4        e = floor(log2 M) - 2               elements E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6)
//   mxfp4-rceil  e = ceil(log2(M / 6))               E2M1
//   mxfp4-even   e = floor(log2 M') - 2              E2M1; M' = M, but 2^(k + 1) where M is in [1.75 2^k, 2^(k + 1))
//   mxfp8        e = floor(log2 M) - 8               elements E4M3 (up to 448)
//   mxfp8-rceil  e = ceil(log2(M / 448))             E4M3
//   sglang-fp4   e = ceil(log2(max(M / 6, 1e-10)))   E2M1, blocks of 16
// e is at least -127; M = 0 has that. code = x / 2^e as the nearest element, ties to even, but in sglang-fp4 away from
// zero, where a number that would be -0 keeps its sign and -0 does not; decoded: its number times 2^e. By OCP's rule
// what lies above 6 (448) is cut off to it: the largest number loses up to a quarter (an eighth). Logarithms are taken
// from the bits of a float32.
//
// Exact bytes for 32 channels: mxfp4 17 (4.25 bits an element), mxfp8 33 (8.25); sglang-fp4 for 16 channels 9 (4.5).
// Planes, per token and head:
//   codes     head_dim / 2 bytes, sign * 8 + number's index, or head_dim float8s: see kernels/code_row.h (engines have
//             neighbours in a byte, ggml j with j + 16)
//   metadata  head_dim / 32 (16) bytes e + 127
// Refused: head_dim that is no multiple of 32; other groups.
//
// Where it differs. A block with NaN or infinity decodes to NaN. torchao takes 2^-126 (FLOOR) or 1 (RCEIL) for a scale
// of 2^-127, and in RCEIL, like SGLang, a log2 in float32, which rounds to a whole number just beside a power of two.
// ggml's MXFP4 has FLOOR with ties towards zero, ModelOpt's rounds every tie down, microxcaling's default is half away
// from zero.
#include "kernels/plain.h"
#include "kernels/small_float.h"

namespace kvq::mx {

struct Exponent {
  uint8_t e;
};
struct ExponentFit {
  float inverse;
  Exponent stored;
};
KVQ_HD inline ExponentFit FitOf(uint32_t e) {
  return {PowerOfTwo(e == 255 ? 255 : 254 - e), {static_cast<uint8_t>(e)}};  // 2^-(e - 127)
}

#ifdef __CUDACC__
// What codes of E2M1 are made with two at a time: 2^-e as float16.
struct PairFit {
  uint32_t inverse;
  Exponent stored;
};
// Numbers of float16 times 2^-e are as they are, below 8; so are those of bfloat16, which are multiplied here, but for what is
// nearly zero.
template <typename Numbers>
__device__ __forceinline__ PairFit PairsOf(const Numbers& x, int n, const ExponentFit& fit) {
  static_assert(plain::kLanes<Numbers> == 1);
  constexpr uint32_t kOne = 0x3C003C00;
  uint32_t* words = x.Words();
  const int up = 127 - static_cast<int>(fit.stored.e);
  if constexpr (plain::kInWords<Numbers> != DType::kFloat16) {
    KVQ_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      words[i] = up == -128 ? 0 : PackTwo<DType::kFloat16>(x[2 * i] * fit.inverse, x[2 * i + 1] * fit.inverse);
    }
    return {kOne, fit.stored};
  } else {
    if (up > 15 || up == -128) {  // more than float16 has; or NaN, whose codes are 0. A group of zeros remains that.
      const uint32_t power = static_cast<uint32_t>(15 + (up < 30 ? up - 15 : 15)) << 10;
      KVQ_UNROLL
      for (int i = 0; i < n / 2; ++i) words[i] = up == -128 ? 0 : MultiplyTwo(words[i], power * 0x10001);
    }
    return {static_cast<uint32_t>(15 + (up == -128 ? 0 : up < 15 ? up : 15)) * (0x10001 << 10), fit.stored};
  }
}
#endif

// floor(log2 v) + 127 less `most`, and ceil(log2 v) + 127, of v >= 0, both at least 0; 255 for NaN.
KVQ_HD inline uint32_t FloorLog2(float v, uint32_t most) {
  const uint32_t floor = FloatBits(v) >> 23;
  return v != v ? 255 : floor > most ? floor - most : 0;
}
KVQ_HD inline uint32_t CeilLog2(float v) {
  const uint32_t bits = FloatBits(v), floor = bits >> 23;  // 0: below 2^-126
  return v != v ? 255 : floor + ((bits & 0x7FFFFF) > (floor == 0 ? 0x400000u : 0));
}

enum class Rule { kFloor, kCeil, kEven };

template <typename Element, int kElementBits, int kLargest, int kLargestLog2, Rule kRule>
struct Mx {
  static constexpr char kFile[] = "kernels/schemes/mx.cc";
  static constexpr int kBits = kElementBits;
  static constexpr int64_t kGroups[] = {32};

  using Stored = Exponent;
  static constexpr int kStored[] = {1};
  using Fit = ExponentFit;

  KVQ_HD static Fit FitFor(float largest) {
    if constexpr (kRule == Rule::kCeil) return FitOf(CeilLog2(plain::DividedBy<kLargest>(largest)));
    // Half of the last bit of an element's mantissa.
    constexpr uint32_t kHalf = kRule == Rule::kEven ? 1u << (Element::kDropped - 1) : 0;
    return FitOf(FloorLog2(plain::Poisoned(BitsFloat(FloatBits(largest) + kHalf), largest), kLargestLog2));
  }
  template <typename Numbers>
  KVQ_HD static auto FitGroup(const Numbers& x, int n) {
    const Fit fit = FitFor(plain::Magnitude(x, n));
#ifdef __CUDACC__
    if constexpr (kElementBits == 4 && plain::kHasWords<Numbers>) return PairsOf(x, n, fit);
    else
#endif
    return fit;
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return Element::Code(x * fit.inverse); }
#ifdef __CUDACC__
  static constexpr plain::Signs kSigns = plain::Signs::kOfNumbers;
  static constexpr uint32_t kPairTooLarge = E2M1::kIndexTooLarge;
  __device__ __forceinline__ static uint32_t PairOf(const PairFit& fit, uint32_t two) {
    return E2M1::IndexOfTwo(MultiplyTwo(two, fit.inverse) & 0x7FFF7FFF);
  }
#endif
  KVQ_HD static float Value(const Stored& stored, uint32_t code) { return Element::Value(code) * PowerOfTwo(stored.e); }

  static constexpr plain::Element kElement = kElementBits == 4 ? plain::Element::kE2M1 : plain::Element::kE4M3;
  static constexpr plain::ScaleByte kScaleByte = plain::ScaleByte::kE8M0;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {PowerOfTwo(stored.e), 0}; }
};

struct Mxfp4 : Mx<E2M1, 4, 6, 2, Rule::kFloor> {
  static constexpr char kName[] = "kvq::mx::Mxfp4", kLabel[] = "mxfp4";
};
struct Mxfp4Rceil : Mx<E2M1, 4, 6, 2, Rule::kCeil> {
  static constexpr char kName[] = "kvq::mx::Mxfp4Rceil", kLabel[] = "mxfp4-rceil";
};
struct Mxfp4Even : Mx<E2M1, 4, 6, 2, Rule::kEven> {
  static constexpr char kName[] = "kvq::mx::Mxfp4Even", kLabel[] = "mxfp4-even";
};
struct Mxfp8 : Mx<E4M3, 8, 448, 8, Rule::kFloor> {
  static constexpr char kName[] = "kvq::mx::Mxfp8", kLabel[] = "mxfp8";
};
struct Mxfp8Rceil : Mx<E4M3, 8, 448, 8, Rule::kCeil> {
  static constexpr char kName[] = "kvq::mx::Mxfp8Rceil", kLabel[] = "mxfp8-rceil";
};

struct SglangFp4 {
  static constexpr char kFile[] = "kernels/schemes/mx.cc", kName[] = "kvq::mx::SglangFp4", kLabel[] = "sglang-fp4";
  static constexpr int kBits = 4;
  static constexpr int64_t kGroups[] = {16};

  using Stored = Exponent;
  static constexpr int kStored[] = {1};
  using Fit = ExponentFit;

  template <typename Numbers>
  KVQ_HD static auto FitGroup(const Numbers& x, int n) {
    const float largest = plain::Magnitude(x, n);
    const Fit fit = FitOf(CeilLog2(plain::Poisoned(Larger(plain::DividedBy<6, plain::kAreHalves<Numbers>>(largest), 1e-10f), largest)));
#ifdef __CUDACC__
    if constexpr (plain::kInWords<Numbers> == DType::kFloat16) {
      const PairFit pairs = PairsOf(x, n, fit);
      KVQ_UNROLL
      for (int i = 0; i < n / 2; ++i) x.Words()[i] = AddTwo<DType::kFloat16>(x.Words()[i], 0);  // -0 has no sign
      return pairs;
    } else
#endif
    return fit;
  }
#ifdef __CUDACC__
  // What lies behind the numbers that ties are made of is cut off, and a bit set there: what was a tie is one no longer, and
  // above it. A bfloat16 that float16 takes for zero would lose its sign.
  static constexpr plain::Signs kSigns = plain::Signs::kOfNumbers;
  static constexpr uint32_t kPairTooLarge = E2M1::kIndexTooLarge;
  __device__ __forceinline__ static uint32_t PairOf(const PairFit& fit, uint32_t two) {
    return E2M1::IndexOfTwo((MultiplyTwo(two, fit.inverse) & 0x7FF87FF8) | 0x00040004);
  }
#endif
  KVQ_HD static uint32_t Code(const Fit& fit, float x) {
    const float scaled = x * fit.inverse;
#ifdef __CUDA_ARCH__
    // As E2M1::Code, but to the nearest as plain::Nearest has it; a sum rounded towards zero drops what is behind the point.
    constexpr float kWhole = 8388608, kHalf = 0.49999997f;
    const float eighth = __saturatef(fabsf(scaled) * 0.125f);
    const float number = Smaller(Smaller(__fadd_rz(fmaf(eighth, 16, kHalf), kWhole), __fadd_rz(fmaf(eighth, 8, kHalf), kWhole + 2)),
                                 Smaller(__fadd_rz(fmaf(eighth, 4, kHalf), kWhole + 4), kWhole + 7));
    return FloatBits(number) - FloatBits(kWhole) + (scaled < 0 ? 8 : 0);
#else
    const float v = plain::Absolute(scaled);
    const uint32_t number =
        (v >= 0.25f) + (v >= 0.75f) + (v >= 1.25f) + (v >= 1.75f) + (v >= 2.5f) + (v >= 3.5f) + (v >= 5.0f);
    return number + (scaled < 0 ? 8 : 0);
#endif
  }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) { return E2M1::Value(code) * PowerOfTwo(stored.e); }

  static constexpr plain::Element kElement = plain::Element::kE2M1;
  static constexpr plain::ScaleByte kScaleByte = plain::ScaleByte::kE8M0;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {PowerOfTwo(stored.e), 0}; }
};

#ifndef __CUDACC__
namespace {

constexpr char kTorchao[] = "torchao 0.18.0 on 4 million numbers";
const RegisterScheme kMxfp4{plain::MakeScheme<Mxfp4>("OCP MX 1.0; torchao, to_mx FLOOR", {1.323e-2, kTorchao, "mxfp4.json"})};
const RegisterScheme kMxfp4Rceil{plain::MakeScheme<Mxfp4Rceil>("torchao, to_mx RCEIL", {1.333e-2, kTorchao, "mxfp4-rceil.json"})};
const RegisterScheme kMxfp4Even{plain::MakeScheme<Mxfp4Even>("torchao, to_mx EVEN", {1.252e-2, kTorchao, "mxfp4-even.json"})};
const RegisterScheme kMxfp8{plain::MakeScheme<Mxfp8>("OCP MX 1.0; torchao, to_mx FLOOR", {8.61e-4, kTorchao, "mxfp8.json"})};
const RegisterScheme kMxfp8Rceil{plain::MakeScheme<Mxfp8Rceil>("torchao, to_mx RCEIL", {7.037e-4, kTorchao, "mxfp8-rceil.json"})};
const RegisterScheme kSglangFp4{plain::MakeScheme<SglangFp4>("SGLang, kvfp4_tensor.py", {1.273e-2, "kvfp4_tensor.py in torch on 4 million numbers", "sglang-fp4.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::mx
