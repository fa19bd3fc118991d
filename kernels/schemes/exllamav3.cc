// exl3-2, exl3-3, exl3-4, exl3-5, exl3-6, exl3-7, exl3-8: exllamav3's quantized cache (CacheLayer_quant, `-cq BITS`),
// without its compander.
//
// Source: exllamav3, exllamav3_ext/cache/q_cache_kernels.cuh @80fd9eec (v1.4.1's midpoint grid), quant_block_x4 and
// dequant_block_x4, in float32.
//
// A group of 32 channels x of one token, as fp16 holds them, m = 2^(bits - 1), H the Sylvester-Hadamard matrix of 32 of +-1:
//   y = (x H) (1 / sqrt(32)), butterflies over distances 1, 2, 4, 8, 16, the factor last;   s = max |y| + 1e-10
//   code q = clamp(floor(y (1 / s) m + m), 0, 2 m - 1), by the s that is not rounded;   stored are q and fp16(s)
//   decoded: v H, v = (q - m + 1/2) (fp16(s) (1 / sqrt(32)) / m), butterflies again
// So numbers lie in the middle of their cells, and none is zero. The rotation is part of the format.
//
// Exact bytes: bits / 8 + 1/16 an element (4.5 bits for exl3-4). Planes, per token and head:
//   codes     head_dim bits / 8 bytes; of 5, 6 and 7 bits the low 4, of 3 the low 2, see kernels/code_row.h (exllamav3 has bit
//             planes of powers of two, the high bits first)
//   odd bits  of 5 and 3 bits: head_dim / 8 bytes; of 6 and 7 twice and three times that
//   metadata  head_dim / 32 fp16 numbers s
// Refused: head_dim that is no multiple of 32 (of 64 with 2 and 3 bits); other groups.
//
// Where it differs. An s that fp16 cannot hold is stored as 65504, there as infinity. A group with NaN or infinity, also one
// that fp16 makes of a number, decodes to NaN; there its codes are not defined. exllamav3 writes decoded numbers as fp16.
// Releases before the midpoint grid rounded to a grid with a zero, which has some 5 % more error.
//
// exllamav3 encodes each token when it is written: `exl3-4@residual=0`.
#include "kernels/plain.h"

namespace kvq::exllamav3 {

inline constexpr int kBlock = 32;
inline constexpr float kFactor = 0.17677669529663688110f;  // 1 / sqrt(32)

template <int kBits_>
struct Midpoints {
  static constexpr char kFile[] = "kernels/schemes/exllamav3.cc";
  static constexpr int kBits = kBits_;
  static constexpr int64_t kGroups[] = {kBlock};
  static constexpr float kHalf = 1 << (kBits - 1);

  struct Stored {
    uint16_t scale;
  };
  static constexpr int kStored[] = {2};
  struct Fit {
    float inverse;
    Stored stored;
  };

  template <typename Numbers, typename Team>
  KVQ_HD static void Turn(Numbers&& x, int n, const Team& team) {
    plain::ForEachNumber(x, n, team, [](float v) { return plain::AsHalf(v); });
    plain::Butterflies(x, n, kBlock, team);
    plain::Scale(x, n, kFactor, team);
  }
  template <typename Numbers, typename Team>
  KVQ_HD static void TurnBack(Numbers&& x, int n, const Team& team) {
    plain::Butterflies(x, n, kBlock, team);
  }
  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const float scale = plain::Magnitude(x, n) + 1e-10f;
    return {1 / scale, {FloatToHalf(scale > 65504 ? 65504 : scale)}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) {
    return plain::Truncated(x * fit.inverse * kHalf + kHalf, 2 * kHalf - 1);
  }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    return (static_cast<float>(code) - (kHalf - 0.5f)) * (HalfToFloat(stored.scale) * kFactor * (1 / kHalf));
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  static constexpr int64_t kTurnBlock = kBlock;
  // Of the orthonormal matrix, which has the factor.
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {HalfToFloat(stored.scale) * (1 / kHalf), kHalf - 0.5f}; }
};

struct Bits2 : Midpoints<2> {
  static constexpr char kName[] = "kvq::exllamav3::Bits2", kLabel[] = "exl3-2";
};
struct Bits3 : Midpoints<3> {
  static constexpr char kName[] = "kvq::exllamav3::Bits3", kLabel[] = "exl3-3";
};
struct Bits4 : Midpoints<4> {
  static constexpr char kName[] = "kvq::exllamav3::Bits4", kLabel[] = "exl3-4";
};
struct Bits5 : Midpoints<5> {
  static constexpr char kName[] = "kvq::exllamav3::Bits5", kLabel[] = "exl3-5";
};
struct Bits6 : Midpoints<6> {
  static constexpr char kName[] = "kvq::exllamav3::Bits6", kLabel[] = "exl3-6";
};
struct Bits7 : Midpoints<7> {
  static constexpr char kName[] = "kvq::exllamav3::Bits7", kLabel[] = "exl3-7";
};
struct Bits8 : Midpoints<8> {
  static constexpr char kName[] = "kvq::exllamav3::Bits8", kLabel[] = "exl3-8";
};

#ifndef __CUDACC__
namespace {

constexpr char kSource[] = "exllamav3, q_cache_kernels.cuh @80fd9eec";
constexpr char kNmse[] = "NumPy, from the formula above";
const RegisterScheme k2{plain::MakeScheme<Bits2>(kSource, {0.1260, kNmse, "exl3-2.json"})};
const RegisterScheme k3{plain::MakeScheme<Bits3>(kSource, {0.0316, kNmse, "exl3-3.json"})};
const RegisterScheme k4{plain::MakeScheme<Bits4>(kSource, {7.90e-3, kNmse, "exl3-4.json"})};
const RegisterScheme k5{plain::MakeScheme<Bits5>(kSource, {1.974e-3, kNmse, "exl3-5.json"})};
const RegisterScheme k6{plain::MakeScheme<Bits6>(kSource, {4.935e-4, kNmse, "exl3-6.json"})};
const RegisterScheme k7{plain::MakeScheme<Bits7>(kSource, {1.233e-4, kNmse, "exl3-7.json"})};
const RegisterScheme k8{plain::MakeScheme<Bits8>(kSource, {3.095e-5, kNmse, "exl3-8.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::exllamav3
