// int2-hadamard: two bits a number of a whole token and head, turned and clipped: OSCAR's variant without data.
//
// Source: OSCAR (arXiv 2605.17757), FutureMLS-Lab/OSCAR @473ff3f, `--method hadamard` with its clip ratios, uniform codes
// (without SGLANG_LLOYD_MAX); sglang/QuantKernel/oscar_rotation_clip_int2_kv.py, one scale a token and head.
//
// All D channels x of a token, in float32, H the Sylvester-Hadamard matrix of D over sqrt(D), part of the format:
//   y = x H;   t = element floor(ratio D) of |y| in rising order (0 the first), ratio 0.96 for keys, 0.92 for values;
//   y limited to [-t, t];   s = max(max y - min y, 1e-8) / 3;   z = (-min y) / s, which is no whole number
//   code q = clamp(floor(y / s + z + 0.5), 0, 3);   stored are q, and s and z as float32;   decoded: ((q - z) s) H
//
// Exact bytes: D / 4 + 8 (D = 128: 40, 2.5 bits an element; its README counts 16-bit s and z). Planes, per token and head:
//   codes     head_dim / 4 bytes, see kernels/code_row.h (OSCAR: byte i has channels i, i + D/4, i + D/2, i + 3D/4)
//   metadata  float32 s;  likewise z
// Refused: head_dim that is none of 64, 128, 256, 512; @group (OSCAR can have several scales a token).
//
// Where it differs. OSCAR turns by a product in bfloat16, here it is butterflies in float32; its kernel divides approximately
// and has no upper clamp, its torch oracle has one, as here. A token with NaN or infinity decodes to NaN. OSCAR itself turns by
// matrices that it learns from a model's queries, which this is the baseline of.
//
// OSCAR keeps the first 64 and the last 256 tokens in 16 bits: `int2-hadamard@sinks=64@residual=256` comes near to it.
#include "kernels/plain.h"

namespace kvq::oscar {

inline constexpr int64_t kTurnedHeadDims[] = {64, 128, 256, 512};

// The clip ratio in hundredths.
template <int kClip>
struct Clipped {
  static constexpr char kFile[] = "kernels/schemes/int2_hadamard.cc", kLabel[] = "int2-hadamard";
  static constexpr int kBits = 2;
  static constexpr int64_t kGroups[] = {0};
  static constexpr bool kInOrder = true;
  static constexpr auto& kHeadDims = kTurnedHeadDims;

  struct Stored {
    float scale, zero;
  };
  static constexpr int kStored[] = {4, 4};
  struct Fit {
    float threshold;
    plain::Quotients scale;
    Stored stored;
  };

  template <typename Numbers, typename Team>
  KVQ_HD static void Turn(Numbers&& x, int n, const Team& team) {
    plain::Hadamard(x, n, n, team);
  }
  template <typename Numbers, typename Team>
  KVQ_HD static void TurnBack(Numbers&& x, int n, const Team& team) {
    plain::Hadamard(x, n, n, team);
  }
  // The magnitude that `above` others are not below: from the largest down, all that are equal at once.
  template <typename Numbers>
  KVQ_HD static float Threshold(const Numbers& x, int n, int above) {
    float bound = BitsFloat(0x7F800000), largest = 0;
    for (int taken = 0; taken <= above;) {
      int equal = 0;
      largest = 0;
      KVQ_UNROLL
      for (int i = 0; i < n; ++i) {
        const float magnitude = plain::Absolute(x[i]);
        if (!(magnitude < bound) || magnitude < largest) continue;
        equal = magnitude > largest ? 1 : equal + 1;
        largest = magnitude;
      }
      if (largest == 0) break;
      taken += equal, bound = largest;
    }
    return largest;
  }
  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const float threshold = Threshold(x, n, n - 1 - n * kClip / 100);
    const GroupRange range = plain::Range(x, n);
    const float low = plain::Clamped(range.low, -threshold, threshold), high = plain::Clamped(range.high, -threshold, threshold);
    const float scale = plain::Poisoned(Larger(high - low, 1e-8f) / 3, range.poison);
    return {threshold, plain::Quotients::By(scale), {scale, plain::Poisoned((0 - low) / scale, range.poison)}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) {
    const float clipped = plain::Clamped(x, -fit.threshold, fit.threshold);
    return plain::Truncated(fit.scale.Of(clipped) + fit.stored.zero + 0.5f, 3);
  }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    return (static_cast<float>(code) - stored.zero) * stored.scale;
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  static constexpr int64_t kTurnBlock = 0;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {stored.scale, stored.zero}; }
};

struct Keys : Clipped<96> {
  static constexpr char kName[] = "kvq::oscar::Keys";
};
struct Values : Clipped<92> {
  static constexpr char kName[] = "kvq::oscar::Values";
};

#ifndef __CUDACC__
namespace {

constexpr char kNmse[] = "NumPy, from the formula above, head_dim 128";
const RegisterScheme kRow{{.name = "int2-hadamard", .source = "OSCAR (arXiv 2605.17757) @473ff3f, --method hadamard",
                           .keys = plain::MakeCodec<Keys>({0.1560, kNmse, "int2-hadamard-keys.json"}),
                           .values = plain::MakeCodec<Values>({0.1273, kNmse, "int2-hadamard-values.json"}), .refused = ""}};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::oscar
