// fp8-e4m3, fp8-e5m2: numbers cast to 8-bit floats, as vLLM keeps a KV cache with --kv-cache-dtype fp8 (fp8_e4m3) or
// fp8_e5m2 where the checkpoint has no scales (its default; Ampere only has e5m2). With a scale for each token:
// token.cc.
//
// Source: vLLM 0.33.0, csrc/quantization/w8a8/fp8/nvidia/quant_utils.cuh, scaled_vec_conversion, called by
// reshape_and_cache_flash of csrc/cache_kernels.cu, with a scale of 1: __nv_cvt_float_to_fp8 with __NV_SATFINITE.
//
//   code     the nearest float8, ties to even; |x| above 448 (e4m3) or 57344 (e5m2), infinity too, becomes that; NaN
//            stays NaN
//   decoded  the code's number, which float16 holds
//
// Exact bytes: head_dim, 8 bits an element, no metadata (the scale of 1 is nowhere). Planes, per token and head:
//   codes  head_dim bytes, the float8s' own, see kernels/code_row.h
// Refused: head_dim that is no multiple of 16; any @group.
//
// Where it differs. All NaNs are 0x7F; vLLM keeps e5m2's mantissa. torch's casts (2.11) do not saturate: clamp first.
// FA3 rounds queries and probabilities to e4m3 as well, which is attention's business and not done here.
//
// Not here: a scale of a layer or of a head. Engines take it from the checkpoint, amax / 448 of some calibration texts, and
// store the nearest float8 to x / scale. A codec knows shapes, not layers, and what it makes of a token depends on nothing
// that comes before or beside it: a scale from the first call's numbers would make bytes depend on how tokens arrive (vLLM
// had that, calculate_kv_scales, and took it out again), and one from a calibration is data of the model that a spec would
// have to name by layer. What a scale can win is seen by fp8-e4m3-token (token.cc), which has the best one for each token.
//
// vLLM encodes a token before it is first read: `fp8-e4m3@residual=0`.
#include "kernels/plain.h"
#include "kernels/small_float.h"

namespace kvq::fp8 {

template <typename Format>
struct Cast {
  static constexpr char kFile[] = "kernels/schemes/fp8.cc";
  static constexpr int kBits = 8;
  static constexpr int64_t kGroups[] = {0};

  struct Stored {};
  struct Fit {
    Stored stored;
  };

  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& /*x*/, int /*n*/) {
    return {};
  }
  KVQ_HD static uint32_t Code(const Fit& /*fit*/, float x) { return Format::Code(x); }
  KVQ_HD static float Value(const Stored& /*stored*/, uint32_t code) { return Format::Value(code); }

  KVQ_HD static plain::Line LineOf(const Stored& /*stored*/) { return {1, 0}; }
};

struct Fp8E4M3 : Cast<E4M3> {
  static constexpr char kName[] = "kvq::fp8::Fp8E4M3", kLabel[] = "fp8-e4m3";
  static constexpr plain::Element kElement = plain::Element::kE4M3;
};
struct Fp8E5M2 : Cast<E5M2> {
  static constexpr char kName[] = "kvq::fp8::Fp8E5M2", kLabel[] = "fp8-e5m2";
  static constexpr plain::Element kElement = plain::Element::kE5M2;
};

#ifndef __CUDACC__
namespace {

constexpr char kSource[] = "vLLM, quant_utils.cuh";
constexpr char kNmse[] = "torch's casts of 4 million numbers";
const RegisterScheme kE4M3{plain::MakeScheme<Fp8E4M3>(kSource, {7.037e-4, kNmse, "fp8-e4m3.json"})};
const RegisterScheme kE5M2{plain::MakeScheme<Fp8E5M2>(kSource, {2.789e-3, kNmse, "fp8-e5m2.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::fp8
