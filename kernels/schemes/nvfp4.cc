// nvfp4, nvfp4-4over6: E2M1 numbers with an E4M3 scale for 16 channels, as vLLM keeps a KV cache with --kv-cache-dtype
// nvfp4 and nvfp4_4over6, and TensorRT-LLM and SGLang an NVFP4 one. The global scale, a float32 for a layer's keys or
// values, is 1: vLLM's default and what NVIDIA's recipe nvfp4_cast exports. (SGLang's fp4_e2m1 is another
// format: mx.cc.)
//
// Source: FlashInfer 0.7.2.post1, include/flashinfer/page.cuh, nvfp4_append_quantize_block, which vLLM 0.33.0 runs on
// SM80, 90 and 120, with IEEE's division; 4over6: vLLM 0.33.0, csrc/nvfp4_kv_cache_kernels.cu,
// cvt_warp_fp16_to_fp4_4over6.
//
// A block is 16 channels; E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives:
//   s = E4M3(max |x| / 6), to the nearest, ties to even, at most 448
//   code = E2M1(x (1 / s)), likewise, at most 6; 0 (of x's sign) where s = 0     decoded: its number times s
// So a block whose largest number is at most 6 / 1024 becomes zeros, and one above 6 * 448 = 2688 is cut off.
//
// 4over6 tries the s of max |x| / 4, too, and takes it where the block's squared error is smaller: the error's sum goes
// over pairs of channels, (a a + b b), and decodes with 1 / (1 / s).
//
// Exact bytes: head_dim / 2 + head_dim / 16, 4.5 bits an element. Planes, per token and head:
//   codes     head_dim / 2 bytes, sign * 8 + number's index, see kernels/code_row.h (vLLM has neighbours in a byte)
//   metadata  head_dim / 16 E4M3 scales (the same bytes on SM100, whose attention wants the values' by four tokens)
// Refused: head_dim that is no multiple of 32; other groups.
//
// Where it differs. A block with NaN or infinity decodes to NaN; FlashInfer makes NaN a zero and infinity 2688. On
// SM100 vLLM and TensorRT-LLM take approximate reciprocals for the divisions, as vLLM's 4over6 does everywhere, so a
// real cache may differ by one in some codes and scales. ModelOpt and torchao never have s = 0: they clamp it to 2^-9
// and 2^-6. llama.cpp's NVFP4 rounds ties towards zero.
//
// vLLM encodes a token before it is first read: `nvfp4@residual=0`.
#include "kernels/plain.h"
#include "kernels/small_float.h"

namespace kvq::nvfp4 {

// What one scale makes of a block.
struct Candidate {
  uint32_t s;
  float inverse;
};
template <int kMost, bool kFinite>
KVQ_HD inline Candidate ScaleFor(float largest) {
  const uint32_t code = E4M3::Code(plain::DividedBy<kMost, kFinite>(largest));
  const float s = E4M3::Value(code);
  return {code, s > 0 ? 1 / s : 0};
}

// The sum of a block's squared errors under it.
template <typename Numbers>
KVQ_HD inline float Error(const Candidate& candidate, const Numbers& x, int n) {
  const float s = candidate.inverse != 0 ? 1 / candidate.inverse : 0;
  float error = 0;
  KVQ_UNROLL
  for (int i = 0; i < n; i += 2) {
    const float a = E2M1::Value(E2M1::Index(x[i] * candidate.inverse)) * s - plain::Absolute(x[i]);  // or its negative
    const float b = E2M1::Value(E2M1::Index(x[i + 1] * candidate.inverse)) * s - plain::Absolute(x[i + 1]);
    error += a * a + b * b;
  }
  return error;
}

#ifdef __CUDACC__
// What codes are made with two at a time: float16 quotients by s, or products with 1 / s, which are there already. `up`: a bit in each
// half where 1 / s in float32 takes ties up.
template <typename Stored>
struct QuotientFit {
  uint32_t minus_s, inverse, up;
  Stored stored;
};
template <typename Stored>
struct ProductFit {
  uint32_t up;
  Stored stored;
};
// The codes of quotients. s has 4 bits and what ties are made of 3, so that a number that is at none is a bit of a float16 away from it.
// One that is, the product in float32 leaves there; but for an s of 1.875 2^i: of ties that would go down, then those of 1.25 2^i go
// up, as if they were one bit more. They have the bit 2^-2 behind the highest one, that of 1 / 4 has not; and whatever else gets
// that bit, which had a 0 there, is not one below a tie. (QuotientsGpu in scheme_test.cc tries all numbers with all scales.)
__device__ __forceinline__ uint32_t CodesOf(uint32_t quotients, uint32_t up) {
  return E2M1::IndexOfTwo((quotients | (quotients >> 8 & up)) & 0x7FFF7FFF);
}
#endif

template <bool kFourOverSix>
struct Blocks {
  static constexpr char kFile[] = "kernels/schemes/nvfp4.cc";
  static constexpr int kBits = 4;
  static constexpr int64_t kGroups[] = {16};
  static constexpr bool kInOrder = kFourOverSix;

  struct Stored {
    uint8_t s;
  };
  static constexpr int kStored[] = {1};
  struct Fit {
    float inverse;
    Stored stored;
  };

  template <typename Numbers>
  KVQ_HD static auto FitGroup(const Numbers& x, int n) {
    const float largest = plain::Magnitude(x, n);
    Candidate best = ScaleFor<6, plain::kAreHalves<Numbers>>(largest);
    if constexpr (kFourOverSix) {
      const Candidate four = ScaleFor<4, plain::kAreHalves<Numbers>>(largest);
      if (Error(four, x, n) < Error(best, x, n)) best = four;
    }
#ifdef __CUDACC__
    if constexpr (!kFourOverSix && plain::kHasWords<Numbers>) return PairsOf(x, n, best, largest);
    else
#endif
    return Fit{best.inverse, {static_cast<uint8_t>(best.s)}};
  }
#ifdef __CUDACC__
  template <typename Numbers>
  __device__ __forceinline__ static auto PairsOf(const Numbers& x, int n, const Candidate& best, float largest) {
    static_assert(plain::kLanes<Numbers> == 1);
    const Stored stored{static_cast<uint8_t>(best.s)};
    uint32_t* words = x.Words();
    if constexpr (plain::kInWords<Numbers> != DType::kFloat16) {
      KVQ_UNROLL
      for (int i = 0; i < n / 2; ++i) words[i] = PackTwo<DType::kFloat16>(x[2 * i] * best.inverse, x[2 * i + 1] * best.inverse);
    }
    if (largest != largest) {  // s is NaN: all that is left of a number is its sign, and of one that is none nothing
      KVQ_UNROLL
      for (int i = 0; i < n; ++i) {
        const uint32_t bits = FloatBits(x[i]), sign = (bits & 0x7F800000) == 0x7F800000 ? 0 : bits >> 31 << 15;
        words[i / 2] = i % 2 == 0 ? sign : words[i / 2] | sign << 16;
      }
    }
    const uint32_t up = best.s >= 8 && best.s % 8 == 7 ? 0x00010001 : 0;
    if constexpr (plain::kInWords<Numbers> != DType::kFloat16) {
      return ProductFit<Stored>{up, stored};
    } else {
      // The bits of an E4M3 are those of a float16 that is 2^8 too small. No 1 / s is so near to the middle between two float16 that
      // an approximate one would be rounded otherwise.
      const uint32_t s = MultiplyTwo(best.s * 0x800080, 0x5C005C00);
      const float inverse = best.s == 0 ? 0 : ptx::Reciprocal(ptx::HalfAt(s, 0));
      return QuotientFit<Stored>{s ^ 0x80008000, PackTwo<DType::kFloat16>(inverse, inverse), up, stored};
    }
  }
  static constexpr plain::Signs kSigns = plain::Signs::kOfNumbers;
  static constexpr uint32_t kPairTooLarge = E2M1::kIndexTooLarge;
  __device__ __forceinline__ static uint32_t PairOf(const QuotientFit<Stored>& fit, uint32_t two) {
    return CodesOf(DivideTwo(two, fit.minus_s, fit.inverse), fit.up);
  }
  __device__ __forceinline__ static uint32_t PairOf(const ProductFit<Stored>& fit, uint32_t two) { return CodesOf(two, fit.up); }
#endif
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return E2M1::Code(x * fit.inverse); }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) { return E2M1::Value(code) * E4M3::Value(stored.s); }

  static constexpr plain::Element kElement = plain::Element::kE2M1;
  static constexpr plain::ScaleByte kScaleByte = plain::ScaleByte::kE4M3;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {E4M3::Value(stored.s), 0}; }
};

struct Nvfp4 : Blocks<false> {
  static constexpr char kName[] = "kvq::nvfp4::Nvfp4", kLabel[] = "nvfp4";
};
struct FourOverSix : Blocks<true> {
  static constexpr char kName[] = "kvq::nvfp4::FourOverSix", kLabel[] = "nvfp4-4over6";
};

#ifndef __CUDACC__
namespace {

constexpr char kNmse[] = "page.cuh and nvfp4_kv_cache_kernels.cu in NumPy on 4 million numbers";
const RegisterScheme kNvfp4{plain::MakeScheme<Nvfp4>("FlashInfer, page.cuh", {9.048e-3, kNmse, "nvfp4.json"})};
const RegisterScheme kFourOverSix{plain::MakeScheme<FourOverSix>("vLLM, nvfp4_kv_cache_kernels.cu", {7.568e-3, kNmse, "nvfp4-4over6.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::nvfp4
