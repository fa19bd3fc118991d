// quarot-4, quarot-4-cuda: QuaRot's 4-bit groups of a whole token and head, without the rotation, which is a spec's @rotate.
//
// Source: Ashkboos et al., "QuaRot" (arXiv 2404.00456); spcl/QuaRot @5008669. Its accuracy is that of quarot-4,
// fake_quant/quant_utils.py (ActQuantizer, clip ratio 1), its speed that of quarot-4-cuda, quarot/transformers/kv_cache.py
// (asym_quantize_and_pack_i4): two quantizers.
//
// quarot-4, of all channels x of a token, m = 15:
//   keys    low = min(min x, 0), high = max(max x, 0), so that zero is always there; both 0: -1 and 1. In float32
//           (torch.zeros is of that type, and what it meets becomes so): s = (high - low) / m, z = round(-low / s)
//           code q = clamp(round(x / s) + z, 0, m)
//   values  low = min x, high = max x, both 0: -1 and 1, and every operation f(.) is float16's, computed in float32 and
//           rounded: s = f(f(high - low) / m), z = round(f(-low / s)), q = clamp(f(round(f(x / s)) + z), 0, m)
//   stored are q, fp16(s) and z as fp16, which holds it;   decoded: keys fp16(s) (q - z), values f(s f(q - z))
// quarot-4-cuda, keys and values, in float16: s = f(max(f(max - min), 1e-5) / m), q = clamp(round(f(f(x - min) / s)), 0, m)
//   stored are q, s and -min as fp16;   decoded: q s + min, in float32
// All round half to even. Numbers of other types become float16 first, but for keys of quarot-4.
//
// Exact bytes: head_dim / 2 + 4 (D = 128: 68, 4.25 bits an element). Planes, per token and head:
//   codes     head_dim / 2 bytes, see kernels/code_row.h
//   metadata  fp16 s, and fp16 z (or -min)
// Refused: head_dim that is no multiple of 32; @group.
//
// Where it differs. QuaRot's fake quantizer stores nothing: its keys are decoded by the s that is not rounded. A value
// group without a range, or with one too small for s, gives NaN there; here it is taken as a key group is, zero included.
// Values are grouped so with --v_groupsize of the head_dim (-1, the default, groups a token's heads together). The paper's
// figures are of a clip ratio of 0.95. A group with NaN or infinity decodes to NaN.
#include "kernels/plain.h"

namespace kvq::quarot {

struct ScaleAndZero {
  uint16_t scale, zero;
};
struct Fit {
  plain::Quotients scale;
  float zero;
  ScaleAndZero stored;
};
inline constexpr float kLargest = 15;

// float32, or the type that quotients, sums and products are rounded to.
template <bool kHalf>
KVQ_HD inline float Rounded(float v) {
  return kHalf ? plain::AsHalf(v) : v;
}

template <bool kHalf>
KVQ_HD inline Fit FitOf(float low, float high, float poison) {
  if (low == 0 && high == 0) low = -1, high = 1;
  const float scale = plain::Poisoned(Rounded<kHalf>(Rounded<kHalf>(high - low) / kLargest), poison);
  const float zero = rintf(Rounded<kHalf>((0 - low) / scale));
  return {plain::Quotients::By(scale), zero, {FloatToHalf(scale), FloatToHalf(zero)}};
}

// With zero in the range; where that has too small a scale, as zeros.
template <bool kHalf>
KVQ_HD inline Fit FitWithZero(const GroupRange& range) {
  const Fit fit = FitOf<kHalf>(Smaller(range.low, 0), Larger(range.high, 0), range.poison);
  return fit.scale.divisor != 0 ? fit : FitOf<kHalf>(0, 0, range.poison);
}

template <bool kHalf>
KVQ_HD inline uint32_t CodeOf(const Fit& fit, float x) {
  const float steps = rintf(Rounded<kHalf>(fit.scale.Of(Rounded<kHalf>(x))));
  return plain::Truncated(Rounded<kHalf>(steps + fit.zero), kLargest);
}
template <bool kHalf>
KVQ_HD inline float ValueOf(const ScaleAndZero& stored, uint32_t code) {
  return Rounded<kHalf>(HalfToFloat(stored.scale) * Rounded<kHalf>(static_cast<float>(code) - HalfToFloat(stored.zero)));
}

KVQ_HD inline plain::Line LineOfCodes(const ScaleAndZero& stored) {
  return {HalfToFloat(stored.scale), HalfToFloat(stored.zero)};
}

struct Common {
  static constexpr char kFile[] = "kernels/schemes/quarot.cc";
  static constexpr int kBits = 4;
  static constexpr int64_t kGroups[] = {0};
  using Stored = ScaleAndZero;
  static constexpr int kStored[] = {2, 2};
  using Fit = quarot::Fit;
};

struct Keys : Common {
  static constexpr char kName[] = "kvq::quarot::Keys", kLabel[] = "quarot-4";
  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    return FitWithZero<false>(plain::Range(x, n));
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return CodeOf<false>(fit, x); }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) { return ValueOf<false>(stored, code); }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return LineOfCodes(stored); }
};

struct Values : Common {
  static constexpr char kName[] = "kvq::quarot::Values", kLabel[] = "quarot-4";
  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const GroupRange range = plain::Range(plain::Halves<Numbers>{x}, n);
    const Fit fit = FitOf<true>(range.low, range.high, range.poison);
    return fit.scale.divisor != 0 ? fit : FitWithZero<true>(range);
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return CodeOf<true>(fit, x); }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) { return ValueOf<true>(stored, code); }

  // But for float16's rounding of the product.
  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return LineOfCodes(stored); }
};

struct Cuda : Common {
  static constexpr char kName[] = "kvq::quarot::Cuda", kLabel[] = "quarot-4-cuda";
  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const GroupRange range = plain::Range(plain::Halves<Numbers>{x}, n);
    const float wide = Larger(plain::AsHalf(range.high - range.low), plain::AsHalf(1e-5f));
    const float scale = plain::Poisoned(plain::AsHalf(wide / kLargest), range.poison);
    const float zero = plain::Poisoned(0 - range.low, range.poison);
    return {plain::Quotients::By(scale), zero, {FloatToHalf(scale), FloatToHalf(zero)}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) {
    return plain::RoundedToEven(plain::AsHalf(fit.scale.Of(plain::AsHalf(plain::AsHalf(x) + fit.zero))), kLargest);
  }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    return static_cast<float>(code) * HalfToFloat(stored.scale) - HalfToFloat(stored.zero);
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfValues;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {HalfToFloat(stored.scale), HalfToFloat(stored.zero)}; }
};

#ifndef __CUDACC__
namespace {

constexpr char kSource[] = "QuaRot (arXiv 2404.00456), spcl/QuaRot @5008669";
constexpr char kNmse[] = "torch 2.11.0, from QuaRot's own formulas, head_dim 128";
const RegisterScheme kFake{{.name = "quarot-4", .source = kSource, .keys = plain::MakeCodec<Keys>({1.012e-2, kNmse, "quarot-4-keys.json"}),
                            .values = plain::MakeCodec<Values>({1.012e-2, kNmse, "quarot-4-values.json"}), .refused = ""}};
const RegisterScheme kReal{plain::MakeScheme<Cuda>(kSource, {9.97e-3, kNmse, "quarot-4-cuda.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::quarot
