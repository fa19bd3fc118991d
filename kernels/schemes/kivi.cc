// kivi-4, kivi-2: KIVI's asymmetric groups, keys along tokens, values along channels, in float16 arithmetic.
//
// Source: Liu et al., "KIVI" (arXiv 2402.02750); jy-yuan/KIVI 876b4d2, quant/new_pack.py
// (triton_quantize_and_pack_along_last_dim and its twin in torch) and quant/csrc/gemv_cuda.cu.
//
// A group x is, of keys, one channel of 32 consecutive tokens, of values 32 consecutive channels of one token. Every operation
// is float16's, f(.): computed in float32 and rounded; m = 2^bits - 1; numbers of other types become float16 first:
//   s = f(f(max - min) / m);   t = f(f(x - min) / s)
//   code q = round(clamp(t, 0, m)), half to even; 0 where s = 0
//   stored are q, s and min, as fp16;   decoded: q s + min, by float32's fused multiply-add, whose product is exact anyway
//
// Exact bytes: D bits / 8 + D / 8 a vector of D channels, keys' metadata spread over their tokens (D = 128: 80, 48; 5 and 3
// bits an element). Planes, per head:
//   codes     head_dim bits / 8 bytes a token, see kernels/code_row.h (KIVI has 32-bit words along tokens or channels)
//   scales    fp16 numbers: of keys head_dim for 32 tokens, of values head_dim / 32 a token;  minima  likewise
// Refused: head_dim that is no multiple of 32, with 2 bits of 64; other groups; of keys, blocks that are no multiple of 32.
//
// Where it differs. KIVI has 0 / 0 where a group is constant, which its CUDA code takes for 0, as here, and its CPU code for
// some negative number that reaches the word's other codes. Its product with a decoded key is rounded to float16 before the
// softmax. Numbers beyond float16 are infinite, there and here: their group decodes to NaN. torch on a GPU multiplies by 1 / m,
// which gives the same float16 for every range. transformers' QuantizedCache is not KIVI (int4-hqq-kivi).
//
// Which tokens are encoded when is the spec's: KIVI keeps the newest tokens mod 128 of the keys, and exactly the newest 128 of
// the values, one of which is encoded in each step; `residual=128` does with the values as with the keys.
#include "kernels/plain.h"

namespace kvq::kivi {

inline constexpr int kGroup = 32;

struct Affine {
  uint16_t scale, minimum;
};
struct Fit {
  plain::Quotients scale;
  float minimum;
  Affine stored;
};

// What a group is coded with, of its numbers as float16 has them. NaN in all of it where something in it is not finite.
template <int kBits>
KVQ_HD inline Fit FitOf(const GroupRange& range) {
  const float whole = plain::DividedBy<(1 << kBits) - 1>(plain::AsHalf(range.high - range.low));
  const float scale = plain::Poisoned(plain::AsHalf(whole), range.poison);
  const float minimum = plain::Poisoned(plain::PlusZero(range.low), range.poison);
  return {plain::Quotients::By(scale != 0 ? scale : 1), minimum, {FloatToHalf(scale), FloatToHalf(minimum)}};
}
template <int kBits, typename Numbers>
KVQ_HD inline Fit FitGroup(const Numbers& x, int n) {
  return FitOf<kBits>(plain::Range(plain::Halves<Numbers>{x}, n));
}
template <int kBits>
KVQ_HD inline uint32_t Code(const Fit& fit, float x) {
  const float steps = plain::AsHalf(fit.scale.Of(plain::AsHalf(plain::AsHalf(x) - fit.minimum)));
  return plain::RoundedToEven(steps, kMaxCode<kBits>);
}
KVQ_HD inline float Value(float code, float scale, float minimum) { return code * scale + minimum; }
KVQ_HD inline float Value(const Affine& stored, uint32_t code) {
  return Value(static_cast<float>(code), HalfToFloat(stored.scale), HalfToFloat(stored.minimum));
}

#ifdef __CUDACC__
// What codes of float16 are made with two at a time, of two groups or of one: s times a power of two, which is in [1, 2), that power,
// and 1 / s to the nearest. Its float16 quotients are those of float32 rounded, from 1/4 on (QuotientsGpu in scheme_test.cc tries all), and
// none is so large that its code would have to be limited.
struct PairFit {
  uint32_t minus_minimum, power, minus_scale, inverse;
  Affine stored;
};
inline constexpr uint32_t kPairTooLarge = 0x6600;  // 1.5 2^10
__device__ __forceinline__ uint32_t PairOf(const PairFit& fit, uint32_t two) {
  const uint32_t above = MultiplyTwo(AddTwo<DType::kFloat16>(two, fit.minus_minimum), fit.power);
  return AddTwo<DType::kFloat16>(DivideTwo(above, fit.minus_scale, fit.inverse), kPairTooLarge * 0x10001);
}
// Words have numbers of float16, those of `low` in their low halves and those of `high` in their high ones. Where a scale is not one
// that this is done with, each is replaced by its code.
template <int kBits>
__device__ __forceinline__ PairFit PairsOf(const Fit& low, const Fit& high, uint32_t* words, int pairs) {
  const uint32_t scales = low.stored.scale | uint32_t{high.stored.scale} << 16;
  const auto usual = [](uint32_t scale) { return scale >= 0x0400 && scale < 0x7800; };  // 2^-14 ... 2^15
  if (!usual(low.stored.scale) || !usual(high.stored.scale)) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      float first, second;
      UnpackTwo<DType::kFloat16>(words[i], first, second);
      words[i] = PackTwo<DType::kFloat16>(static_cast<float>(Code<kBits>(low, first)), static_cast<float>(Code<kBits>(high, second)));
    }
    return {0, 0x3C003C00, 0xBC00BC00, 0x3C003C00, low.stored};
  }
  // No 1 / s is within 2^-22 of itself of the middle between two float16: an approximate one is rounded as the exact one.
  const uint32_t in_range = (scales & 0x03FF03FF) | 0x3C003C00;
  float first, second;
  UnpackTwo<DType::kFloat16>(in_range, first, second);
  return {(low.stored.minimum | uint32_t{high.stored.minimum} << 16) ^ 0x80008000, 0x78007800 - (scales & 0x7C007C00),
          in_range ^ 0x80008000, PackTwo<DType::kFloat16>(ptx::Reciprocal(first), ptx::Reciprocal(second)), low.stored};
}
#endif

// ---- values

template <int kBits_>
struct Values {
  static constexpr char kFile[] = "kernels/schemes/kivi.cc";
  static constexpr int kBits = kBits_;
  static constexpr int64_t kGroups[] = {kGroup};

  using Stored = Affine;
  static constexpr int kStored[] = {2, 2};
  using Fit = kivi::Fit;

  template <typename Numbers>
  KVQ_HD static auto FitGroup(const Numbers& x, int n) {
#ifdef __CUDACC__
    if constexpr (plain::kHasWords<Numbers>) {
      static_assert(plain::kLanes<Numbers> == 1);
      if constexpr (plain::kInWords<Numbers> != DType::kFloat16) {
        KVQ_UNROLL
        for (int i = 0; i < n / 2; ++i) x.Words()[i] = PackTwo<DType::kFloat16>(x[2 * i], x[2 * i + 1]);
      }
      const Fit fit = FitOf<kBits>(plain::Range(plain::OwnNumbers<1, DType::kFloat16>{x.v, x.words}, n));
      return PairsOf<kBits>(fit, fit, x.Words(), n / 2);
    } else
#endif
    return kivi::FitGroup<kBits>(x, n);
  }
  KVQ_HD static uint32_t Code(const Fit& fit, float x) { return kivi::Code<kBits>(fit, x); }
#ifdef __CUDACC__
  static constexpr uint32_t kPairTooLarge = kivi::kPairTooLarge;
  __device__ __forceinline__ static uint32_t PairOf(const PairFit& fit, uint32_t two) { return kivi::PairOf(fit, two); }
#endif
  KVQ_HD static float Value(const Stored& stored, uint32_t code) { return kivi::Value(stored, code); }

  static constexpr plain::Element kElement = plain::Element::kNumber;
  static constexpr Zero kZero = Zero::kOfValues;
  KVQ_HD static plain::Line LineOf(const Stored& stored) {
    return {HalfToFloat(stored.scale), -HalfToFloat(stored.minimum)};
  }
};

struct Values4 : Values<4> {
  static constexpr char kName[] = "kvq::kivi::Values4", kLabel[] = "kivi-4";
};
struct Values2 : Values<2> {
  static constexpr char kName[] = "kvq::kivi::Values2", kLabel[] = "kivi-2";
};

// ---- keys

// Scales (plane 1) or minima (plane 2) of the channels, of the group of tokens that has token `slot`.
KVQ_HD inline uint16_t* OfGroup(const KvView& view, int plane, int64_t b, int64_t h, int64_t slot) {
  return MetadataRow(view, plane, view.head_dim, b, h, slot / kGroup);
}

#ifndef __CUDACC__
namespace {

template <int kBits>
void EncodeKeys(const CodecParams&, const DenseView& x, int64_t first_token, const KvView& out) {
  const int64_t dim = x.head_dim, blocks = x.tokens / kGroup;
  ForEach(/*parallel=*/true, x.batch * x.heads * blocks, [&](int64_t index) {
    const int64_t b = index / blocks / x.heads, h = index / blocks % x.heads, first = index % blocks * kGroup;
    const int64_t slot = first_token + first;
    std::vector<float> values(kGroup * dim), group(kGroup);
    std::vector<uint8_t> codes(kGroup * dim);
    for (int64_t t = 0; t < kGroup; ++t) LoadRow(x.data, x.dtype, Offset(x, b, h, first + t, 0), dim, &values[t * dim]);
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t t = 0; t < kGroup; ++t) group[t] = values[t * dim + d];
      const Fit fit = FitGroup<kBits>(group.data(), kGroup);
      for (int64_t t = 0; t < kGroup; ++t) codes[t * dim + d] = static_cast<uint8_t>(Code<kBits>(fit, group[t]));
      OfGroup(out, 1, b, h, slot)[d] = fit.stored.scale;
      OfGroup(out, 2, b, h, slot)[d] = fit.stored.minimum;
    }
    for (int64_t t = 0; t < kGroup; ++t) PackRow<kBits>(&codes[t * dim], dim, CodeRow<kBits>(out, b, h, slot + t));
  });
}

KVQ_VECTOR void DecodeRow(const float* scales, const float* minima, int64_t n, float* x) {
  for (int64_t d = 0; d < n; ++d) x[d] = Value(x[d], scales[d], minima[d]);
}

template <int kBits>
void DecodeKeys(const CodecParams&, const KvView& in, int64_t first_token, const DenseView& out) {
  const int64_t dim = out.head_dim;
  const int64_t blocks = out.tokens / kGroup;
  ForEach(/*parallel=*/AreMany(out), out.batch * out.heads * blocks, [&](int64_t index) {
    const int64_t b = index / blocks / out.heads, h = index / blocks % out.heads, first = index % blocks * kGroup;
    const int64_t slot = first_token + first;
    FewNumbers<float> scales(dim), minima(dim), values(dim);
    LoadRow(OfGroup(in, 1, b, h, slot), DType::kFloat16, 0, dim, scales.data());
    LoadRow(OfGroup(in, 2, b, h, slot), DType::kFloat16, 0, dim, minima.data());
    for (int64_t t = 0; t < kGroup; ++t) {
      UnpackRow<kBits>(CodeRow<kBits>(in, b, h, slot + t), dim, values.data());
      DecodeRow(scales.data(), minima.data(), dim, values.data());
      StoreRow(values.data(), dim, out.dtype, Offset(out, b, h, first + t, 0), out.data);
    }
  });
}

// A block has a group of tokens of a head; its threads are as many as channels, or half as many to encode, in whole warps.
KernelLaunch KernelOf(const char* kernel, int bits, const DenseView& x) {
  if (x.head_dim > 1024) throw InputError("kivi: a head_dim of ", x.head_dim, " is too large for a GPU");
  return {.instance = {{"kernels/schemes/kivi.cc"}, InstanceName(kernel, bits, TypeName(x.dtype))},
          .grid = {static_cast<unsigned>(x.tokens / kGroup), static_cast<unsigned>(x.heads), static_cast<unsigned>(x.batch)},
          .threads = static_cast<int>((x.head_dim + 31) / 32 * 32),
          .early = false};
}
template <int kBits>
void EncodeKeysCuda(const CodecParams&, const DenseView& x, int64_t first_token, const KvView& out, void* stream) {
  if (RowsOf(x) == 0) return;
  KernelLaunch launch = KernelOf("kvq::kivi::EncodeKernel", kBits, x);
  launch.threads = static_cast<int>((x.head_dim / 2 + 31) / 32 * 32);
  launch.shared_bytes = static_cast<size_t>(kGroup * x.head_dim * kBits / 8);
  Launch("kivi encode", launch, stream, x, first_token, out, IsWide(x));
}
template <int kBits>
void DecodeKeysCuda(const CodecParams&, const KvView& in, int64_t first_token, const DenseView& out, void* stream) {
  if (RowsOf(out) == 0) return;
  Launch("kivi decode", KernelOf("kvq::kivi::DecodeKernel", kBits, out), stream, in, first_token, out);
}

// ---- the rows

template <int kBits>
Codec KeysCodec() {
  static constexpr int64_t kGroups[] = {kGroup};
  Codec codec;
  codec.bits = kBits;
  codec.default_group = kGroup, codec.groups = kGroups, codec.head_dim_multiple = kRunChannels<kBits>;
  codec.grouping = "32 consecutive tokens of one channel";
  codec.min_block_tokens = kGroup;
  codec.block_wide = true;  // though which multiple of 32 a block is does not matter
  codec.planes = [](int64_t /*heads*/, int64_t head_dim, const CodecParams& params) -> std::vector<Plane> {
    CheckGroups("kivi", kGroups, head_dim, params.group_size);
    CheckRun(kBits, head_dim);
    return {{"codes", head_dim * kBits / 8}, {"scales", head_dim * 2, kGroup}, {"minima", head_dim * 2, kGroup}};
  };
  codec.encode = EncodeKeys<kBits>;
  codec.decode = DecodeKeys<kBits>;
  codec.encode_cuda = EncodeKeysCuda<kBits>;
  codec.decode_cuda = DecodeKeysCuda<kBits>;
  codec.device = {.label = kBits == 4 ? "kivi-4" : "kivi-2",
                  .type = [](const CodecParams&, int64_t head_dim) {
                    return InstanceName("kvq::ChannelCodes", kBits, kGroup, head_dim);
                  },
                  .keys_alone = true};
  return codec;
}

template <typename S>
Scheme Runs(double nmse, const char* keys, const char* values) {
  Scheme scheme{.name = S::kLabel, .source = "KIVI (arXiv 2402.02750), quant/new_pack.py at 876b4d2",
                .keys = KeysCodec<S::kBits>(), .values = plain::MakeCodec<S>({nmse, "NumPy in float16, from the formula above", values}), .refused = ""};
  scheme.keys.nmse = nmse, scheme.keys.nmse_source = scheme.values.nmse_source, scheme.keys.golden = keys;
  return scheme;
}

const RegisterScheme k4{Runs<Values4>(6.12e-3, "kivi-4-keys.json", "kivi-4-values.json")};
const RegisterScheme k2{Runs<Values2>(0.155, "kivi-2-keys.json", "kivi-2-values.json")};

}  // namespace

#else
// ---- CUDA: the same bits. A thread has the group's tokens of two neighbouring channels, whose codes of `kFields` tokens it packs;
// lanes that have the same words' fields exchange them until each has whole words, of some tokens. Threads beyond the channels do what
// the last one does, but store nothing.

template <int kBits, DType kType>
__global__ void __launch_bounds__(512) EncodeKernel(DenseView x, int64_t first_token, KvView out, bool wide) {
  extern __shared__ __align__(16) uint32_t rows[];  // of words
  constexpr uint32_t kFields = 16 / kBits;
  const int64_t b = blockIdx.z, h = blockIdx.y, first = int64_t{blockIdx.x} * kGroup;
  const int64_t slot = TokenBase(out) + first_token + first;
  const uint32_t dim = static_cast<uint32_t>(x.head_dim), words = dim * kBits / 32;
  const bool there = 2 * threadIdx.x < dim;
  const uint32_t two = there ? threadIdx.x : dim / 2 - 1;

  // ---- the numbers, as float16
  uint32_t v[kGroup];
  const int64_t from = Offset(x, b, h, first, 2 * two);
#pragma unroll
  for (int t = 0; t < kGroup; ++t) {
    const int64_t at = from + t * x.token_stride;
    if (kType != DType::kFloat32 && wide) {
      v[t] = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(x.data) + at);
      if constexpr (kType == DType::kBFloat16) {
        float low, high;
        UnpackTwo<kType>(v[t], low, high);
        v[t] = PackTwo<DType::kFloat16>(low, high);
      }
    } else {
      v[t] = PackTwo<DType::kFloat16>(LoadElement(x.data, kType, at), LoadElement(x.data, kType, at + 1));
    }
  }

  // ---- what they are coded with
  uint32_t lows = v[0], highs = v[0];
#pragma unroll
  for (int t = 1; t < kGroup; ++t) {
    lows = SmallerOfTwo<DType::kFloat16>(lows, v[t]);
    highs = LargerOfTwo<DType::kFloat16>(highs, v[t]);
  }
  plain::Ends ends[2];
  UnpackTwo<DType::kFloat16>(lows, ends[0].low, ends[1].low);
  UnpackTwo<DType::kFloat16>(highs, ends[0].high, ends[1].high);
  const Fit fits[2] = {FitOf<kBits>(plain::RangeOf(ends[0])), FitOf<kBits>(plain::RangeOf(ends[1]))};
  if (there) {
    const auto both = [](uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; };
    reinterpret_cast<uint32_t*>(OfGroup(out, 1, b, h, slot))[two] = both(fits[0].stored.scale, fits[1].stored.scale);
    reinterpret_cast<uint32_t*>(OfGroup(out, 2, b, h, slot))[two] = both(fits[0].stored.minimum, fits[1].stored.minimum);
  }
  const PairFit fit = PairsOf<kBits>(fits[0], fits[1], v, kGroup);

  // ---- codes: word i has those of tokens kFields i, ..., one a field
  constexpr uint32_t kWords = kGroup / kFields, kOnes = kFields == 8 ? 0x55555555 : 0x11111111;
  uint32_t packed[kWords];
#pragma unroll
  for (uint32_t i = 0; i < kWords; ++i) {
    packed[i] = 0u - kPairTooLarge * kOnes;
#pragma unroll
    for (uint32_t field = 0; field < kFields; ++field) packed[i] += PairOf(fit, v[kFields * i + field]) << (field * kBits);
  }
  // Lanes 4 apart have the channels of neighbouring fields: a matrix of lanes and fields is turned over by halves, then halves of
  // these. Lane `of` has token kFields i + of in the end.
  const uint32_t of = two / 4 % kFields, chunk = two % 4, w = two / (4 * kFields);
#pragma unroll
  for (uint32_t half = kFields / 2; half > 0; half /= 2) {
    const uint32_t shift = half * kBits;
    const uint32_t lower = shift == 8 ? 0x00FF00FF : shift == 4 ? 0x0F0F0F0F : 0x33333333;
    const bool upper = (of & half) != 0;
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
      const uint32_t other = __shfl_xor_sync(~0u, packed[i], 4 * half);
      packed[i] = upper ? (other >> shift & lower) | (packed[i] & ~lower) : (packed[i] & lower) | (other & lower) << shift;
    }
  }
  if (there) {
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) rows[(kFields * i + of) * words + chunk * (words / 4) + w] = packed[i];
  }
  __syncthreads();
  // A group's rows lie one after the other.
  auto* const to = reinterpret_cast<uint4*>(CodeRow<kBits>(out, b, h, slot));
  for (uint32_t i = threadIdx.x; i < kGroup * words / 4; i += blockDim.x) to[i] = reinterpret_cast<const uint4*>(rows)[i];
}

template <int kBits, DType kType>
__global__ void __launch_bounds__(1024) DecodeKernel(KvView in, int64_t first_token, DenseView out) {
  const int64_t b = blockIdx.z, h = blockIdx.y, first = int64_t{blockIdx.x} * kGroup, slot = first_token + first;
  const uint32_t dim = static_cast<uint32_t>(out.head_dim), d = threadIdx.x;
  if (d >= dim) return;
  const Affine stored{OfGroup(in, 1, b, h, slot)[d], OfGroup(in, 2, b, h, slot)[d]};
  const WordPlace place = PlaceOf<kBits>(d, dim * kBits / 128);
  for (int t = 0; t < kGroup; ++t) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(CodeRow<kBits>(in, b, h, slot + t))[place.word];
    StoreElement(out.data, kType, Offset(out, b, h, first + t, d), Value(stored, word >> place.shift & ((1u << kBits) - 1)));
  }
}

#endif  // __CUDACC__

}  // namespace kvq::kivi
