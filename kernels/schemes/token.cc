// int8-token, fp8-e4m3-token, int4-token: one scale for all channels of a token and head, as vLLM keeps a KV cache with
// --kv-cache-dtype int8_per_token_head, fp8_per_token_head and int4_per_token_head (on its Triton backend).
// int8-token-truncated: int8 as vLLM stored it until June 2026 (#45361).
//
// Source: vLLM 0.33.0, vllm/v1/attention/ops/triton_reshape_and_cache_flash.py, _reshape_cache_per_token_head, and
// int4_per_token_head.py, _reshape_cache_int4_kernel, in float32 without contraction, with IEEE's division.
//
// With y = x (1 / s):
//   int8-token            s = max(max |x| / 127, 1e-6)
//                         code q = trunc(clamp(y + 0.5, -128, 127)), of y < 0 y - 0.5     decoded: q s
//   int8-token-truncated  q = trunc(clamp(y, -128, 127))                                  q s
//   fp8-e4m3-token        s = max(max |x| / 448, 1e-6)
//                         f = y as the nearest E4M3 number, ties to even, at most 448     f s
//   int4-token            s = max((max - min) / 15, 1e-6), z = clamp(round(-min / s), 0, 15)
//                         q = clamp(round(y + z), 0, 15), both half away from zero        (q - z) s'
// s is stored as float32; of int4-token's the low 4 bits of the mantissa are z, and s' is s with zeros there: encoded
// with s, decoded with s'. A token whose numbers all have one sign saturates: z ends at 0 and at 15.
//
// vLLM gives int4's formula rotated numbers: it multiplies keys, values and queries by fixed signs and a Hadamard
// matrix before. A rotation is the spec's business (@rotate=signs); int4-token alone takes the model's own channels.
// vLLM's matrix is not normalized, so that its s is larger by the root of its size, and it casts the product to the
// model's type.
//
// Exact bytes: head_dim + 4 (8.25 bits an element at head_dim 128), of int4-token head_dim / 2 + 4 (4.25). Planes, per
// token and head:
//   codes     head_dim bytes q + 128 or float8s; head_dim / 2 bytes; see kernels/code_row.h (vLLM: pairs in a byte)
//   metadata  a float32
// Refused: head_dim that is no multiple of 16 (int4-token: 32); any @group.
//
// Where it differs. A token with NaN or infinity decodes to NaN; Triton's largest and smallest do not define it.
// Triton's division is approximate on a GPU and it may contract, so a real cache may differ by one in some codes.
// Attention multiplies scores by the keys' scale and probabilities by the values', in other types and another order.
//
// vLLM encodes a token before it is first read: `int8-token@residual=0`.
#include "kernels/plain.h"
#include "kernels/small_float.h"

namespace kvq::token {

struct Scale {
  float s;
};

// s from the largest magnitude and the code's largest number. NaN stays.
KVQ_HD inline float ScaleOf(float largest, float most) {
  return OneNan(plain::Poisoned(Larger(largest / most, 1e-6f), largest));
}

template <bool kTruncates>
struct Int8 {
  static constexpr char kFile[] = "kernels/schemes/token.cc";
  static constexpr int kBits = 8;
  static constexpr int64_t kGroups[] = {0};

  using Stored = Scale;
  static constexpr int kStored[] = {4};
  struct Fit {
    float inverse;
    Stored stored;
  };

  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const float s = ScaleOf(plain::Magnitude(x, n), 127);
    return {1 / s, {s}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) {
    const float y = x * fit.inverse, half = kTruncates ? 0.0f : y >= 0 ? 0.5f : -0.5f;
    return static_cast<uint32_t>(static_cast<int32_t>(plain::Clamped(y + half, -128, 127)) + 128);
  }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) { return (static_cast<float>(code) - 128) * stored.s; }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {stored.s, 128}; }
};

struct Int8Token : Int8<false> {
  static constexpr char kName[] = "kvq::token::Int8Token", kLabel[] = "int8-token";
};
struct Int8TokenTruncated : Int8<true> {
  static constexpr char kName[] = "kvq::token::Int8TokenTruncated", kLabel[] = "int8-token-truncated";
};

struct Fp8Token {
  static constexpr char kFile[] = "kernels/schemes/token.cc", kName[] = "kvq::token::Fp8Token";
  static constexpr char kLabel[] = "fp8-e4m3-token";
  static constexpr int kBits = 8;
  static constexpr int64_t kGroups[] = {0};

  using Stored = Scale;
  static constexpr int kStored[] = {4};
  struct Fit {
    float inverse;
    Stored stored;
  };

  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const float s = ScaleOf(plain::Magnitude(x, n), 448);
    return {1 / s, {s}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return E4M3::Code(x * fit.inverse); }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) { return E4M3::Value(code) * stored.s; }

  static constexpr plain::Element kElement = plain::Element::kE4M3;
  KVQ_HD static plain::Line LineOf(const Stored& stored) { return {stored.s, 0}; }
};

struct Int4Token {
  static constexpr char kFile[] = "kernels/schemes/token.cc", kName[] = "kvq::token::Int4Token";
  static constexpr char kLabel[] = "int4-token";
  static constexpr int kBits = 4;
  static constexpr int64_t kGroups[] = {0};

  struct Stored {
    uint32_t scale_and_zero;
  };
  static constexpr int kStored[] = {4};
  struct Fit {
    float inverse, zero;
    Stored stored;
  };

  // clamp(round(v), 0, 15), half away from zero: what is below zero ends there whichever way it is rounded.
  KVQ_HD static uint32_t Rounded(float v) { return plain::Truncated(v + 0.5f, 15); }
  template <typename Numbers>
  KVQ_HD static Fit FitGroup(const Numbers& x, int n) {
    const GroupRange range = plain::Range(x, n);
    const float s = OneNan(plain::Poisoned(Larger((range.high - range.low) / 15, 1e-6f), range.poison));
    const uint32_t zero = Rounded(-range.low / s);
    return {1 / s, static_cast<float>(zero), {(FloatBits(s) & ~15u) | zero}};
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return Rounded(x * fit.inverse + fit.zero); }
  KVQ_HD static float Value(const Stored& stored, uint32_t code) {
    const uint32_t zero = stored.scale_and_zero & 15;
    return (static_cast<float>(code) - static_cast<float>(zero)) * BitsFloat(stored.scale_and_zero - zero);
  }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfCodes;
  KVQ_HD static plain::Line LineOf(const Stored& stored) {
    const uint32_t zero = stored.scale_and_zero & 15;
    return {BitsFloat(stored.scale_and_zero - zero), static_cast<float>(zero)};
  }
};

#ifndef __CUDACC__
namespace {

template <typename S>
Scheme Row(const char* source, double nmse, const char* golden) {
  Scheme scheme = plain::MakeScheme<S>(source, {nmse, "vLLM's kernels in NumPy on 4 million numbers", golden});
  scheme.keys.one_sign_saturates = scheme.values.one_sign_saturates = S::kBits == 4;
  return scheme;
}

const RegisterScheme kInt8{Row<Int8Token>("vLLM, int8_per_token_head", 4.181e-5, "int8-token.json")};
const RegisterScheme kInt8Truncated{
    Row<Int8TokenTruncated>("vLLM before #45361, int8_per_token_head", 1.674e-4, "int8-token-truncated.json")};
const RegisterScheme kFp8{Row<Fp8Token>("vLLM, fp8_per_token_head", 6.618e-4, "fp8-e4m3-token.json")};
const RegisterScheme kInt4{Row<Int4Token>("vLLM, int4_per_token_head", 1.012e-2, "int4-token.json")};

}  // namespace
#endif  // __CUDACC__

}  // namespace kvq::token
