// lmdeploy-8, lmdeploy-4: a scale and a zero point for all channels of a token and head, as LMDeploy's PyTorch engine
// keeps a KV cache with --quant-policy 8 and 4 (its TurboMind engine has another formula).
//
// Source: LMDeploy 1263d5cd8, lmdeploy/pytorch/kernels/cuda/fill_kv_cache.py, _quant_int8 and _quant_int4, for a
// float16 model: Triton computes a float16 difference in float16 and every quotient, with what follows, in float32.
// IEEE's division.
//
//   r = max - min: in lmdeploy-8 rounded to fp16, as its numbers are fp16; in lmdeploy-4 they are widened before
//   s = r / (2^bits - 1), z = -min / s, not rounded to a whole number
//   code q = trunc(x / s + z + 0.5)     decoded: (q - fp16(z)) fp16(s)
// s and z are stored as fp16 and used unrounded by the encoder.
//
// Exact bytes: lmdeploy-8 head_dim + 4 (8.25 bits an element at head_dim 128), lmdeploy-4 head_dim / 2 + 4 (4.25).
// Planes, per token and head:
//   codes     head_dim or head_dim / 2 bytes, see kernels/code_row.h (LMDeploy has j with j + head_dim / 2 in a byte)
//   metadata  an fp16 s; an fp16 z
// Refused: head_dim that is no multiple of 16 (lmdeploy-4: 32); any @group.
//
// Where it differs. LMDeploy has no smallest s: a token whose numbers are all the same is divided by zero and decodes
// to NaN, and one whose |min| is above 65504 s has an infinite z. Both have codes 0, s = 1 and z = -min here, and
// decode to the minimum. A token with NaN or infinity decodes to NaN, in lmdeploy-8 one with r above 65504, too, as
// there. A bfloat16 model keeps r, s and z in bfloat16, which is worse (z has 8 bits) and not done here. Attention
// decodes in the model's type, rounding q - z and the product; prefill, q s and s z (flatten_kv_cache).
//
// LMDeploy encodes a token before it is first read: `lmdeploy-8@residual=0`.
#include "kernels/plain.h"

namespace kvq::lmdeploy {

template <int kBits_>
struct Affine {
  static constexpr char kFile[] = "kernels/schemes/lmdeploy.cc";
  static constexpr int kBits = kBits_;
  static constexpr int64_t kGroups[] = {0};
  static constexpr float kLargest = (1 << kBits) - 1;

  struct Stored {
    uint16_t s, z;
  };
  static constexpr int kStored[] = {2, 2};
  struct Fit {
    plain::Quotients s;
    float z;
    Stored stored;
  };

  template <typename Numbers>
  KVQ_HD static auto FitGroup(const Numbers& x, int n) {
    const GroupRange range = plain::Range(x, n);
    const float difference = range.high - range.low;
    float s = plain::DividedBy<(1 << kBits) - 1, plain::kAreHalves<Numbers>>(kBits == 8 ? plain::AsHalf(difference) : difference);
    float z = (0 - range.low) / s;  // Triton's minus is 0 - x: no negative zero
    const bool constant = s == 0 || plain::Absolute(plain::AsHalf(z)) > 65504;
    if (constant) s = 1, z = 0 - range.low;
    s = plain::Poisoned(s, range.poison);
    const float of_codes = constant ? -BitsFloat(0x7F800000) : z;  // whose codes are all 0
    const Fit fit{plain::Quotients::By(s), of_codes, {FloatToHalf(s), FloatToHalf(z)}};
#ifdef __CUDACC__
    if constexpr (kBits == 4 && plain::kHasWords<Numbers>) {
      const float inverse = fit.s.scale * fit.s.inverse;
      const bool near = of_codes >= -32 && Larger(plain::Absolute(range.low), plain::Absolute(range.high)) * inverse <= 32;
      plain::CodeWhole<false>(x, n, inverse, z + 0.5f, near, [&](float v) { return Code(fit, v); });
      return plain::Coded<Stored>{fit.stored};
    } else
#endif
    return fit;
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) {
    return plain::Truncated(fit.s.Of(x) + fit.z + 0.5f, kLargest);
  }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    return (static_cast<float>(code) - HalfToFloat(stored.z)) * HalfToFloat(stored.s);
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {HalfToFloat(stored.s), HalfToFloat(stored.z)}; }
};

struct Lmdeploy8 : Affine<8> {
  static constexpr char kName[] = "kvq::lmdeploy::Lmdeploy8", kLabel[] = "lmdeploy-8";
};
struct Lmdeploy4 : Affine<4> {
  static constexpr char kName[] = "kvq::lmdeploy::Lmdeploy4", kLabel[] = "lmdeploy-4";
};

#ifndef __CUDACC__
namespace {

constexpr char kSource[] = "LMDeploy, fill_kv_cache.py";
constexpr char kNmse[] = "fill_kv_cache.py in NumPy on 4 million numbers";
const RegisterScheme k8{plain::MakeScheme<Lmdeploy8>(kSource, {3.487e-5, kNmse, "lmdeploy-8.json"})};
const RegisterScheme k4{plain::MakeScheme<Lmdeploy4>(kSource, {9.964e-3, kNmse, "lmdeploy-4.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::lmdeploy
