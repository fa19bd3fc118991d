// turboquant-k4, turboquant-k3 (keys), turboquant-v4, turboquant-v3 (values): TurboQuant as vLLM serves it; and
// turboquant-k4-raw, turboquant-k3-raw, without its correction of the norm.
//
// Source: vLLM 0.33.0, quantization/turboquant/{config,centroids}.py, v1/attention/ops/triton_turboquant_{store,decode}.py;
// after Zandieh, Daliri, Hadian & Mirrokni, "TurboQuant" (arXiv 2504.19874), without its residual bits (QJL), which vLLM left
// out on purpose. Its presets, K and V: turboquant_4bit_nc is `turboquant-k4+turboquant-v4@residual=0`, k3v4_nc
// `turboquant-k3+turboquant-v4@residual=0`, 3bit_nc `turboquant-k3+turboquant-v3@residual=0`. vLLM keeps the first two and the
// last two layers in 16 bits, which a spec has to say (@layers=0-1:none@layers=30-31:none).
//
// Keys, of all D channels x of a token, in float32:
//   n = sqrt(sum x^2), summed in the channels' order, stored as fp16;   y = (x / (n + 1e-8)) H,
//   H the Sylvester-Hadamard matrix of D over sqrt(D), without random signs: part of the format, whatever a spec's @rotate says
//   code q = how many of the middles between neighbouring centroids c[0], ..., c[2^bits - 1] are <= y: a tie goes up
//   decoded: (r H) fp16(n), r = c[q] / sqrt(sum c[q]^2 + 1e-16) ("nc", norm correction), or r = c[q] ("-raw")
// The centroids are what Lloyd and Max's iteration gave vLLM for N(0, 1 / D) when it ended, which with 4 bits is not at its
// goal but after 200 rounds: tables below, for each D.
// Values, of all channels of a token, not turned: s = max((max - min) / m, 1e-8), m = 2^bits - 1
//   code q = min(m, floor((x - min) / s + 0.5)), by the s that is not rounded;   decoded: q fp16(s) + fp16(min)
//
// Exact bytes: keys D bits / 8 + 2, values D bits / 8 + 4 (D = 128: 66, 50; 68, 52). Planes, per token and head:
//   codes     head_dim / 2 bytes, of 3 bits the low two, head_dim / 4, see kernels/code_row.h (vLLM: byte i has channels 2i and
//             2i + 1; 3-bit codes lie one after the other)
//   odd bits  of 3 bits: head_dim / 8 bytes
//   metadata  keys: fp16(n);  values: fp16(s), and fp16(min)
// Refused: keys' head_dim that is none of 64, 128, 256, 512 (vLLM: no power of two); values' that does not fill its row; @group.
//
// Where it differs. vLLM multiplies by H as a matrix, in an order that its library picks, here it is butterflies: a y within
// some 1e-7 of a middle may get the neighbour's code. Its attention does not turn decoded keys back but queries forth, and its
// chunked prefill turns keys back in fp16, which moves them by 2^-11. A norm that fp16 cannot hold is stored as 65504, in vLLM
// as infinity.
// Other engines' "turbo" formats are other ones. llama.cpp's forks (TheTom/llama-cpp-turboquant @69d8e4be4: turbo2, turbo3,
// turbo4) go by blocks of 128 with fixed signs before and after H, divide the norm by that of the codes when they store it,
// and rotate values, too. turbo4 had a table of centroids that ends at +-0.173926 instead of +-0.2415 until 26 June 2026
// (its #197): a mean squared error of 0.0203 instead of 0.0095, and 68 bytes, two of them unused, instead of 66. Numbers of
// turbo4 from before are those of that table. LMDeploy's policy 42 has 3 bits and a sign of what is left of each channel.
#include "kernels/plain.h"

namespace kvq::turboquant {

inline constexpr int64_t kTurnedHeadDims[] = {64, 128, 256, 512};

// The centroids from zero on, the others are their mirror images: [D = 64, 128, 256, 512].
struct Centroids {
  float of4[4][8], of3[4][4];
};
inline constexpr Centroids kCentroids = {
    {{.0160534576f, .0485172239f, .0821099898f, .11780603f, .157032196f, .20223522f, .25855589f, .341365277f},
     {.0113515087f, .034306858f, .0580605306f, .083301443f, .111038531f, .143001895f, .182826623f, .241381702f},
     {.00802672841f, .0242586117f, .0410549939f, .0589030161f, .0785160959f, .101117611f, .129277945f, .170682639f},
     {.00567575451f, .0171534289f, .0290302653f, .0416507199f, .0555192642f, .0715009496f, .0914133117f, .120690852f}},
    {{.0306229492f, .0944556879f, .167897501f, .268793693f},
     {.0216536951f, .0667902575f, .118721462f, .190065843f},
     {.0153114749f, .0472278446f, .0839487538f, .134396851f},
     {.0108268475f, .0333951302f, .0593607314f, .0950329229f}}};
#ifdef __CUDACC__
__device__ const Centroids kDeviceCentroids = kCentroids;
#endif

template <int kBits>
KVQ_HD constexpr float Centroid(const Centroids& all, int of_dim, uint32_t code) {
  constexpr uint32_t kHalf = 1 << (kBits - 1);
  const uint32_t i = code < kHalf ? kHalf - 1 - code : code - kHalf;
  const float c = kBits == 4 ? all.of4[of_dim][i] : all.of3[of_dim][i];
  return code < kHalf ? -c : c;
}
// Between a centroid and the next.
template <int kBits>
KVQ_HD constexpr float Middle(const Centroids& all, int of_dim, uint32_t code) {
  return (Centroid<kBits>(all, of_dim, code) + Centroid<kBits>(all, of_dim, code + 1)) * 0.5f;
}
KVQ_HD inline const Centroids& AllCentroids() {
#ifdef __CUDACC__
  return kDeviceCentroids;
#else
  return kCentroids;
#endif
}

#ifdef __CUDACC__
template <int kBits>
constexpr Cells MakeCells(int of_dim) {
  constexpr float kSlopes[] = {1.5f, kBits == 3 ? 2.15f : 1.95f};
  float middles[(1 << kBits) - 1] = {};
  for (uint32_t code = 0; code + 1 < 1u << kBits; ++code) middles[code] = Middle<kBits>(kCentroids, of_dim, code);
  return {kSlopes[of_dim], middles};
}
template <int kBits>
__device__ constexpr Cells kDeviceCells[] = {MakeCells<kBits>(0), MakeCells<kBits>(1)};  // D = 64, 128
static_assert(MakeCells<4>(0).apart && MakeCells<4>(1).apart && MakeCells<3>(0).apart && MakeCells<3>(1).apart);
#endif

KVQ_HD constexpr int TableOf(int head_dim) { return head_dim <= 64 ? 0 : head_dim <= 128 ? 1 : head_dim <= 256 ? 2 : 3; }
KVQ_HD constexpr float RootOf(int head_dim) {
  return head_dim <= 64 ? 8.0f : head_dim <= 128 ? 11.3137085f : head_dim <= 256 ? 16.0f : 22.627417f;
}

template <int kBits_, bool kCorrected>
struct Keys {
  static constexpr char kFile[] = "kernels/schemes/turboquant.cc";
  static constexpr int kBits = kBits_;
  static constexpr int64_t kGroups[] = {0};
  static constexpr auto& kHeadDims = kTurnedHeadDims;
  static constexpr bool kPutsCodes = true, kTurnsByProducts = true;

  struct Stored {};
  struct Vector {
    uint16_t norm;
  };
  struct VectorFit {
    float norm;
    Vector stored;
  };
  struct Fit {
    float middles[(1 << kBits) - 1];  // of neighbouring centroids
    Stored stored;
  };
  struct Opened {
    int table;
    float root, norm;
  };

  template <typename Numbers>
  KVQ_HD static VectorFit FitVector(const Numbers& x, int n) {
    const float norm = sqrtf(plain::SumOfSquares(x, n));
    float poison = norm * 0;
    if (poison != poison) poison = plain::Magnitude(x, n) * 0;  // or large numbers have still larger squares
    return {norm, {FloatToHalf(plain::Poisoned(Smaller(norm, 65504), poison))}};
  }
  KVQ_HD static float Divisor(const VectorFit& vector) { return vector.norm + 1e-8f; }
#ifdef __CUDACC__
  __device__ static const Cells& DeviceCells(int head_dim) { return kDeviceCells<kBits>[TableOf(head_dim)]; }
#endif
  template <typename Numbers, typename Team>
  KVQ_HD static void Turn(Numbers&& x, int n, const VectorFit& vector, const Team& team) {
    const plain::Quotients quotients = plain::Quotients::By(Divisor(vector));
    plain::ForEachNumber(x, n, team, [&](float v) { return quotients.Of(v); });
    plain::Hadamard(x, n, n, team);
  }
  template <typename Numbers, typename Team>
  KVQ_HD static void TurnBack(Numbers&& x, int n, const Team& team) {
    plain::Hadamard(x, n, n, team);
  }
  template <typename Numbers>
  KVQ_HD static Fit FitGroup([[maybe_unused]] const Numbers& x, int n, const Vector&) {
    Fit fit = {};
    for (uint32_t i = 0; i < (1u << kBits) - 1; ++i) fit.middles[i] = Middle<kBits>(AllCentroids(), TableOf(n), i);
#ifdef __CUDACC__
    if constexpr (requires { x.PutCode(0, 0u); }) {  // a lane its own, as a warp has one token
      static_assert(plain::kLanes<Numbers> == 32);
#pragma unroll 2
      for (int i = 0; i < n / plain::kLanes<Numbers>; ++i) x.PutCode(i, Code(fit, x.Part(i)));
    }
#endif
    return fit;
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float y) {
    uint32_t code = 0;
    for (uint32_t i = 0; i < (1u << kBits) - 1; ++i) plain::CountReached(y, fit.middles[i], code);
    return code;
  }
  template <typename Codes>
  KVQ_HD static Opened Open(const Codes& codes, int n, const Stored&, const Vector& vector) {
    const int table = TableOf(n);
    float sum = 0;
    for (int i = 0; i < n; ++i) {
      const float c = Centroid<kBits>(AllCentroids(), table, codes[i]);
      sum += c * c;
    }
    return {table, kCorrected ? sqrtf(sum + 1e-16f) : 1.0f, HalfToFloat(vector.norm)};
  }
  KVQ_HD static float Value(const Opened& opened, uint32_t code) {
    return Centroid<kBits>(AllCentroids(), opened.table, code) / opened.root * opened.norm;
  }

  static constexpr plain::Element kElement = plain::Element::kTable;
  static constexpr bool kNormed = kCorrected;
  static constexpr int64_t kTurnBlock = 0;
  // Times sqrt(head_dim), which float16 has more bits for; the same for all head_dims, nearly.
  static constexpr float TableEntry(int code, int head_dim) {
    constexpr int kHalf = 1 << (kBits - 1);
    const int of_dim = TableOf(head_dim), i = code < kHalf ? kHalf - 1 - code : code - kHalf;
    const float c = (kBits == 4 ? kCentroids.of4[of_dim][i] : kCentroids.of3[of_dim][i]) * RootOf(head_dim);
    return code < kHalf ? -c : c;
  }
  KVQ_HD static plain::Line LineOf(const Vector& vector, int head_dim) {
    return {HalfToFloat(vector.norm) / (kCorrected ? 1 : RootOf(head_dim)), 0};
  }
};

struct K4 : Keys<4, true> {
  static constexpr char kName[] = "kvq::turboquant::K4", kLabel[] = "turboquant-k4";
};
struct K3 : Keys<3, true> {
  static constexpr char kName[] = "kvq::turboquant::K3", kLabel[] = "turboquant-k3";
};
struct K4Raw : Keys<4, false> {
  static constexpr char kName[] = "kvq::turboquant::K4Raw", kLabel[] = "turboquant-k4-raw";
};
struct K3Raw : Keys<3, false> {
  static constexpr char kName[] = "kvq::turboquant::K3Raw", kLabel[] = "turboquant-k3-raw";
};

template <int kBits_>
struct Values {
  static constexpr char kFile[] = "kernels/schemes/turboquant.cc";
  static constexpr int kBits = kBits_;
  static constexpr int64_t kGroups[] = {0};
  static constexpr float kLargest = (1 << kBits) - 1;

  struct Stored {
    uint16_t scale, minimum;
  };
  static constexpr int kStored[] = {2, 2};
  struct Fit {
    plain::Quotients scale;
    float minimum;
    Stored stored;
  };

  template <typename Numbers>
  KVQ_HD static auto FitGroup(const Numbers& x, int n) {
    const GroupRange range = plain::Range(x, n);
    const float part = plain::DividedBy<(1 << kBits) - 1, plain::kAreHalves<Numbers>>(range.high - range.low);
    const float scale = plain::Poisoned(Larger(part, 1e-8f), range.poison);
    const float minimum = plain::Poisoned(plain::PlusZero(range.low), range.poison);
    const Fit fit{plain::Quotients::By(scale), minimum, {FloatToHalf(scale), FloatToHalf(minimum)}};
#ifdef __CUDACC__
    if constexpr (plain::kHasWords<Numbers>) {
      const float inverse = fit.scale.scale * fit.scale.inverse;
      const bool near = Larger(plain::Absolute(range.low), plain::Absolute(range.high)) * inverse <= 32;
      plain::CodeWhole<false>(x, n, inverse, fmaf(-minimum, inverse, 0.5f), near, [&](float v) { return Code(fit, v); });
      return plain::Coded<Stored>{fit.stored};
    } else
#endif
    return fit;
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) {
    return plain::Truncated(fit.scale.Of(x - fit.minimum) + 0.5f, kLargest);
  }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    return static_cast<float>(code) * HalfToFloat(stored.scale) + HalfToFloat(stored.minimum);
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfValues;
  KVQ_HD static plain::Line LineOf(const Stored& stored) {
    return {HalfToFloat(stored.scale), -HalfToFloat(stored.minimum)};
  }
};

struct V4 : Values<4> {
  static constexpr char kName[] = "kvq::turboquant::V4", kLabel[] = "turboquant-v4";
};
struct V3 : Values<3> {
  static constexpr char kName[] = "kvq::turboquant::V3", kLabel[] = "turboquant-v3";
};

#ifndef __CUDACC__
namespace {

constexpr char kSource[] = "vLLM 0.33.0, turboquant";
constexpr char kNmse[] = "NumPy, from the formula above, head_dim 128";
const RegisterScheme kK4{plain::MakeScheme<K4>(kSource, {9.17e-3, kNmse, "turboquant-k4.json"})};
const RegisterScheme kK3{plain::MakeScheme<K3>(kSource, {3.38e-2, kNmse, "turboquant-k3.json"})};
const RegisterScheme kK4Raw{plain::MakeScheme<K4Raw>(kSource, {9.31e-3, kNmse, "turboquant-k4-raw.json"})};
const RegisterScheme kK3Raw{plain::MakeScheme<K3Raw>(kSource, {3.4e-2, kNmse, "turboquant-k3-raw.json"})};
const RegisterScheme kV4{plain::MakeScheme<V4>(kSource, {9.99e-3, kNmse, "turboquant-v4.json"})};
const RegisterScheme kV3{plain::MakeScheme<V3>(kSource, {4.59e-2, kNmse, "turboquant-v3.json"})};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::turboquant
