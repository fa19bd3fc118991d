// q6_0, q8_kv: two formats of ik_llama.cpp's own, as it keeps a KV cache with -ctk q6_0 -ctv q6_0 and with -ctk q8_KV.
//
// Source: ik_llama.cpp 8337e4cd, ggml/src/ggml-quants.c, quantize_row_q6_0_ref, and ggml/src/iqk/iqk_quantize.cpp,
// iqk_quantize_row_q8_KV, in float32 without contraction.
//
//   q6_0   a group of 32 channels x, M the number of largest magnitude, with its sign, the first one of several:
//          d = M / -32, y = x (1 / d)         code q = min(63, floor(y + 32.5))
//          then d' = sum(y^2 x (q - 32)) / sum(y^2 (q - 32)^2), summed in pairs of channels j and j + 16 (d' = d where
//          the lower sum is 0)                decoded: (q - 32) fp16(d')
//   q8_kv  all channels of a token and head:  d = max |x| / 127 in float32, q = round(x (1 / d)), ties to even
//          kept beside d is the sum of the codes, for products with unsigned bytes     decoded: q d
//
// Exact bytes: q6_0 26 for 32 channels (6.5 bits an element); q8_kv head_dim + 8 (8.5 at head_dim 128, 9 at 64). Planes, per
// token and head:
//   codes     q6_0: head_dim / 2 bytes, the low 4 bits; q8_kv: head_dim bytes q + 128; see kernels/code_row.h (q6_0 pairs j
//             with j + 16 in a block)
//   odd bits  q6_0: head_dim / 4 bytes
//   metadata  q6_0: head_dim / 32 fp16 numbers d';  q8_kv: a float32 d, then an int32 sum
// Refused: head_dim that is no multiple of 32 (q8_kv: 16, there 32); other groups.
//
// Where it differs. A group with NaN or infinity decodes to NaN, and where 1 / d overflows q6_0 keeps d; in C both are not
// defined. ik_llama.cpp has a row of q8_KV for each token and head of keys (its pull request 208); a cache of values has one
// row for all that one call writes, which is not done here.
//
// ik_llama.cpp encodes each token when it is written: `q6_0@residual=0`; with -khad keys are rotated: `@rotate=hadamard+none`.
#include "kernels/plain.h"
#include "kernels/small_float.h"

namespace kvq::ik_llama {

struct Q6_0 {
  static constexpr char kFile[] = "kernels/schemes/ik_llama.cc", kName[] = "kvq::ik_llama::Q6_0", kLabel[] = "q6_0";
  static constexpr int kBits = 6;
  static constexpr int64_t kGroups[] = {32};
  static constexpr bool kInOrder = true;

  struct Stored {
    uint16_t d;
  };
  static constexpr int kStored[] = {2};
  struct Fit {
    float inverse;
    Stored stored;
  };

  KVQ_HD static uint32_t CodeOf(float y) { return plain::Truncated(y + 32.5f, 63); }
  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const float d = plain::SignedMagnitude(x, n) / -32, inverse = plain::Reciprocal(d);
    float with_x = 0, with_itself = 0;
    KVQ_UNROLL
    for (int j = 0; j < n / 2; ++j) {
      const float x0 = x[j], x1 = x[j + n / 2], y0 = x0 * inverse, y1 = x1 * inverse, weight0 = y0 * y0, weight1 = y1 * y1;
      const float q0 = static_cast<float>(CodeOf(y0)) - 32, q1 = static_cast<float>(CodeOf(y1)) - 32;
      with_x += weight0 * x0 * q0 + weight1 * x1 * q1;
      with_itself += weight0 * q0 * q0 + weight1 * q1 * q1;
    }
    const bool finite = with_itself - with_itself == 0;  // neither NaN nor infinity
    return {inverse, {FloatToHalf(with_itself > 0 && finite ? with_x / with_itself : d)}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return CodeOf(x * fit.inverse); }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    return (static_cast<float>(code) - 32) * HalfToFloat(stored.d);
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {HalfToFloat(stored.d), 32}; }
};

struct Q8Kv {
  static constexpr char kFile[] = "kernels/schemes/ik_llama.cc", kName[] = "kvq::ik_llama::Q8Kv", kLabel[] = "q8_kv";
  static constexpr int kBits = 8;
  static constexpr int64_t kGroups[] = {0};

  struct Stored {
    float d;
    int32_t sum;
  };
  static constexpr int kStored[] = {4, 4};
  struct Fit {
    float inverse;
    Stored stored;
  };

  KVQ_HD static int32_t Quant(float y) { return static_cast<int32_t>(rintf(plain::Clamped(y, -127, 127))); }
  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const float d = OneNan(plain::Magnitude(x, n) / 127), inverse = plain::Reciprocal(d);
    return {inverse, {d, plain::Total(x, n, [&](float v) { return Quant(v * inverse); })}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return static_cast<uint32_t>(Quant(x * fit.inverse) + 128); }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) { return stored.d * (static_cast<float>(code) - 128); }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {stored.d, 128}; }
};

#ifndef __CUDACC__
namespace {

constexpr char kNmse[] = "ik_llama.cpp's C in NumPy on 4 million numbers";
const RegisterScheme kQ6_0{plain::MakeScheme<Q6_0>("ik_llama.cpp, ggml-quants.c", {4.444e-4, kNmse, "q6_0.json"})};
const RegisterScheme kQ8Kv{plain::MakeScheme<Q8Kv>("ik_llama.cpp, iqk_quantize.cpp", {4.181e-5, kNmse, "q8_kv.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::ik_llama
