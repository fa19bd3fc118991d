// mlx-4, mlx-8: MLX's affine groups, as mlx-lm keeps a KV cache with --kv-bits 4 or 8 (QuantizedKVCache).
//
// Source: mlx 0.32.4, mx.quantize and mx.dequantize with mode "affine" on a CPU (mlx/backend/cpu/quantized.cpp, @846d17622).
//
// A group of 64 channels x (also 32, 128) in float32, m = 2^bits - 1; both divisions and roundings are IEEE's, half to even:
//   s = max((max - min) / m, 1e-7);   edge = min where |min| > |max|, else edge = max and s = -s
//   q0 = round(edge / s);  where q0 is not 0: s = edge / q0, bias = edge;  else bias = 0
//   code q = clamp(round((x - bias) / s), 0, m), by the s and bias that are not rounded yet
//   stored are q, fp16(s), fp16(bias);   decoded: q fp16(s) + fp16(bias)
// So one end of the group is kept as well as fp16 can, and zero is a code of its own where it lies between the ends.
//
// Exact bytes: bits / 8 + 4 / group an element (4.5 bits for mlx-4 in groups of 64, 5 of 32). Planes, per token and head:
//   codes     head_dim bits / 8 bytes, see kernels/code_row.h (MLX has them in 32-bit words, the first in the low bits)
//   metadata  head_dim / group fp16 numbers s;  likewise bias
// Refused: head_dim that is no multiple of the group; other groups.
//
// Where it differs from itself. MLX keeps s and bias in the type of its input: here they are fp16, whatever the input's type
// is. Its Metal and CUDA kernels round half away from zero, and begin their search for the largest number at 0, so that a
// group of negative numbers alone gets 0 for its max, and codes are other ones; this is the CPU's. mx.dequantize gives numbers
// in the type of s; here they are float32 before they are stored. A group with NaN or infinity decodes to NaN.
//
// mlx-lm encodes each token when it is written (`--quantized-kv-start 0`): `mlx-4@residual=0`.
#include "kernels/plain.h"

namespace kvq::mlx {

template <int kBits_>
struct Affine {
  static constexpr char kFile[] = "kernels/schemes/mlx.cc";
  static constexpr int kBits = kBits_;
  static constexpr int64_t kGroups[] = {64, 32, 128};
  static constexpr float kLargest = (1 << kBits) - 1;

  struct Stored {
    uint16_t scale, bias;
  };
  static constexpr int kStored[] = {2, 2};
  struct Fit {
    plain::Quotients scale;
    float bias;
    Stored stored;
  };

  template <typename Numbers>
  KVQ_HD static auto FitGroup(const Numbers& x, int n) {
    const GroupRange range = plain::Range(x, n);
    const bool low_is_edge = plain::Absolute(range.low) > plain::Absolute(range.high);
    const float part = plain::DividedBy<(1 << kBits) - 1, plain::kAreHalves<Numbers>>(range.high - range.low);
    const float edge = low_is_edge ? range.low : range.high, magnitude = Larger(part, 1e-7f);
    float scale = low_is_edge ? magnitude : -magnitude, bias = 0;
    const float steps = rintf(edge / scale);
    if (steps != 0) scale = edge / steps, bias = edge;
    scale = plain::Poisoned(scale, range.poison), bias = plain::Poisoned(bias, range.poison);
    const Fit fit{plain::Quotients::By(scale), bias, {FloatToHalf(scale), FloatToHalf(bias)}};
#ifdef __CUDACC__
    if constexpr (kBits == 4 && plain::kHasWords<Numbers>) {
      const float inverse = fit.scale.scale * fit.scale.inverse;
      const bool near = steps != 0 && plain::Absolute(edge * inverse) <= 16;  // the other end is not larger, and none below the bias
      plain::CodeWhole<true>(x, n, inverse, fmaf(-bias, inverse, 0.5f), near, [&](float v) { return Code(fit, v); });
      return plain::Coded<Stored>{fit.stored};
    } else
#endif
    return fit;
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) {
    return plain::RoundedToEven(fit.scale.Of(x - fit.bias), kLargest);
  }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    return static_cast<float>(code) * HalfToFloat(stored.scale) + HalfToFloat(stored.bias);
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfValues;
  KVQ_HD static plain::Line LineOf(const Stored& stored) {
    return {HalfToFloat(stored.scale), -HalfToFloat(stored.bias)};
  }
};

struct Mlx4 : Affine<4> {
  static constexpr char kName[] = "kvq::mlx::Mlx4", kLabel[] = "mlx-4";
};
struct Mlx8 : Affine<8> {
  static constexpr char kName[] = "kvq::mlx::Mlx8", kLabel[] = "mlx-8";
};

#ifndef __CUDACC__
namespace {

constexpr char kSource[] = "mlx 0.32.4, mx.quantize on a CPU";
constexpr char kNmse[] = "mlx 0.32.4 on 4 million numbers in groups of 64";
const RegisterScheme kMlx4{plain::MakeScheme<Mlx4>(kSource, {8.27e-3, kNmse, "mlx-4.json"})};
const RegisterScheme kMlx8{plain::MakeScheme<Mlx8>(kSource, {2.945e-5, kNmse, "mlx-8.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::mlx
