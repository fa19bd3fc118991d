// q8_0: ggml's 8-bit blocks, as llama.cpp keeps a KV cache with -ctk q8_0 -ctv q8_0.
//
// Source: ggml/src/ggml-quants.c of llama.cpp 0c1e57098, quantize_row_q8_0_ref and dequantize_row_q8_0, in float32 without
// contraction; gguf's NumPy agrees with it. llama.cpp on x86 with AVX rounds half to even and takes 127 / amax, which
// gives another code, by one, for 878 of 6.4 million normal numbers of fp16.
//
// A group of 32 channels x has a scale d = max |x| / 127, which is stored as fp16:
//   code q = round(x (1 / d)), half away from zero, by the d that is not rounded; 0 where d = 0
//   decoded: q fp16(d)
//
// Exact bytes: 34 for 32 channels, 8.5 bits an element. Planes, per token and head:
//   codes     head_dim bytes q + 128, see kernels/code_row.h; a block's qs are theirs less 128, in the channels' order
//   metadata  head_dim / 32 fp16 numbers d
// Refused: head_dim that is no multiple of 32; other groups.
//
// Where it differs. A group with NaN or infinity decodes to NaN; in C its codes are not defined.
//
// llama.cpp encodes a token before it is first read: `q8_0@residual=0`.
#include "kernels/plain.h"

namespace kvq::ggml {

struct Q8_0 {
  static constexpr char kFile[] = "kernels/schemes/q8_0.cc", kName[] = "kvq::ggml::Q8_0", kLabel[] = "q8_0";
  static constexpr int kBits = 8;
  static constexpr int64_t kGroups[] = {32};

  struct Stored {
    uint16_t d;
  };
  static constexpr int kStored[] = {2};
  struct Fit {
    float inverse;
    Stored stored;
  };

  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const float d = plain::Magnitude(x, n) / 127;
    return {d != 0 ? 1 / d : 0, {FloatToHalf(d)}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) {
    return static_cast<uint32_t>(plain::Nearest(plain::Clamped(x * fit.inverse, -127, 127)) + 128);
  }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    return (static_cast<float>(code) - 128) * HalfToFloat(stored.d);
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {HalfToFloat(stored.d), 128}; }
};

#ifndef __CUDACC__
namespace {

const RegisterScheme kRow{plain::MakeScheme<Q8_0>("llama.cpp, ggml-quants.c", {2.856e-5, "gguf 0.19.0 on 4 million numbers", "q8_0.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::ggml
