// int4-quanto, int2-quanto: min/max quantization; int8-quanto and quanto with kivi axes, refused.
//
// Source: package optimum-quanto 0.2.7, MaxOptimizer and quantize_weight, as the KV cache of transformers 5.5.4
// calls them (cache_utils.py, QuantoQuantizedLayer: axis 0, groups of 64) on a CPU.
//
// A group of G = 64 elements x (also 32, 128) has a scale and a shift; m = 2^bits - 1:
//   scale = (max - min) / m;   shift = -min
//   code q = clamp(round((x + shift) / scale), 0, m), half to even; 0 / 0 gives code 0
//   decoded: scale q - shift
// The package computes in the type of x, so every operation here is rounded to that type, and in decoding to
// the type of the output: the codes and the decoded numbers of a float16 or bfloat16 cache are the package's.
//
// Groups. The package reads [batch, heads, tokens, head_dim] as rows of G consecutive elements (its axis 0; see
// its grouped.py). As head_dim is a multiple of G here, a group is G consecutive channels of one token, and
// depends on nothing else.
//
// Exact bytes: bits / 8 + 4 / G per element (4.5 bits for int4 at G = 64). Planes, per token and head:
//   codes   head_dim bits / 8; in each run of G codes, byte k holds codes k, k + G bits / 8, ...; the
//           first in the low bits
//   scales  head_dim / G fp16 numbers;  shifts  likewise
// Refused: head_dim that is no multiple of G (the package then lets groups run on into the next token, if
// all of the tensor is a multiple of G); other G; and what QuantoQuantizedLayer refuses: see the rows.
//
// Where it differs. The package stores scale and shift in the type of x, here they are always fp16: the same
// for float16; for bfloat16 if 0 or from 2^-17 to 65504 in magnitude (8 significant bits fit fp16, also its
// subnormals); float32 ones are rounded, after the codes were made with the exact ones. Larger ones become
// infinity, and their group decodes to no finite number. A group with NaN or infinity decodes to NaN, as in the
// package. A tensor of one group: the package takes its row for G columns and stores it as 64 shifts,
// unquantized; here it is a group like any other.
//
// No operation here may be fused: CPU and GPU, every instruction set, give the same bits.
#include <algorithm>
#include <vector>

#include "kernels/groups.h"

namespace kvq {
namespace {

// ---- arithmetic of one element, shared by CPU and GPU

// x as the package would hold it in a tensor of this type.
template <DType kType>
KVQ_HD inline float Rounded(float x) {
  if constexpr (kType == DType::kFloat16) return HalfToFloat(FloatToHalf(x));
  if constexpr (kType == DType::kBFloat16) return BFloat16ToFloat(FloatToBFloat16(x));
  return x;
}

// Both are NaN if anything in the group is not finite.
template <DType kType>
KVQ_HD inline void ScaleAndShift(const GroupRange& range, float m, float& scale, float& shift) {
  scale = Rounded<kType>(Rounded<kType>(range.high - range.low) / m) + range.poison;
  shift = range.poison - range.low;
}

template <DType kType>
KVQ_HD inline float CodeOf(float x, float m, float scale, float shift) {
  return RoundCode(Rounded<kType>(Rounded<kType>(x + shift) / scale), m);
}

// Still to be rounded to kType, by whoever stores it.
template <DType kType>
KVQ_HD inline float Decoded(float code, float scale, float shift) {
  return Rounded<kType>(scale * code) - shift;
}

// One NaN for all, as CPU and GPU make different ones.
KVQ_HD inline uint16_t Stored(float x) { return x == x ? FloatToHalf(x) : 0x7E00; }

// The scales (plane 1) or shifts (plane 2) of one token.
KVQ_HD inline uint16_t* MetadataRow(const KvView& view, int plane, int64_t group, int64_t b, int64_t h,
                                    int64_t token) {
  return reinterpret_cast<uint16_t*>(view.planes[plane] + (b * view.heads + h) * view.plane_stride[plane]) +
         token * (view.head_dim / group);
}

// Row `index` of all rows of head_dim elements, counted over sequence, head, token.
struct Row {
  int64_t b, h, t;
  KVQ_HD Row(const DenseView& x, int64_t index)
      : b(index / x.tokens / x.heads), h(index / x.tokens % x.heads), t(index % x.tokens) {}
};

KVQ_HD inline int64_t Rows(const DenseView& x) { return x.batch * x.heads * x.tokens; }

// ---- CPU: the definition, a group at a time

template <DType kType, int n>
KVQ_VECTOR void CodeGroup(const float* x, float m, float scale, float shift, uint8_t* codes) {
  for (int i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(CodeOf<kType>(x[i], m, scale, shift));
}

template <DType kType, int n>
KVQ_VECTOR void DecodeGroup(float* codes, float scale, float shift) {
  for (int i = 0; i < n; ++i) codes[i] = Decoded<kType>(codes[i], scale, shift);
}

template <int kBits, DType kType, int n>
void EncodeRow(const DenseView& x, const Row& row, const KvView& out, int64_t slot) {
  constexpr float m = kMaxCode<kBits>;
  uint8_t* packed = CodeRow<kBits>(out, row.b, row.h, slot);
  uint16_t* scales = MetadataRow(out, 1, n, row.b, row.h, slot);
  uint16_t* shifts = MetadataRow(out, 2, n, row.b, row.h, slot);
  for (int64_t g = 0; g < x.head_dim / n; ++g) {
    float values[n], scale, shift;
    uint8_t codes[n];
    LoadRow(x.data, kType, Offset(x, row.b, row.h, row.t, g * n), n, values);
    ScaleAndShift<kType>(RangeOf<n>(values), m, scale, shift);
    CodeGroup<kType, n>(values, m, scale, shift, codes);
    PackRun<kBits, n>(codes, packed + g * n * kBits / 8);
    scales[g] = Stored(scale);
    shifts[g] = Stored(shift);
  }
}

template <int kBits, DType kType, int n>
void DecodeRow(const KvView& in, int64_t slot, const DenseView& out, const Row& row) {
  const uint8_t* packed = CodeRow<kBits>(in, row.b, row.h, slot);
  const uint16_t* scales = MetadataRow(in, 1, n, row.b, row.h, slot);
  const uint16_t* shifts = MetadataRow(in, 2, n, row.b, row.h, slot);
  for (int64_t g = 0; g < out.head_dim / n; ++g) {
    float values[n];
    UnpackRun<kBits, n>(packed + g * n * kBits / 8, values);
    DecodeGroup<kType, n>(values, HalfToFloat(scales[g]), HalfToFloat(shifts[g]));
    StoreRow(values, n, kType, Offset(out, row.b, row.h, row.t, g * n), out.data);
  }
}

// Calls work with the type and the group size as constants.
template <typename Work>
void WithTypeAndGroup(DType dtype, int64_t group, const Work& work) {
  WithGroup(group, [&](auto n) {
    switch (dtype) {
      case DType::kFloat32: return work(std::integral_constant<DType, DType::kFloat32>(), n);
      case DType::kFloat16: return work(std::integral_constant<DType, DType::kFloat16>(), n);
      case DType::kBFloat16: return work(std::integral_constant<DType, DType::kBFloat16>(), n);
    }
  });
}

template <int kBits>
void Encode(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out) {
  WithTypeAndGroup(x.dtype, params.group_size, [&](auto type, auto group) {
    ForEach(/*parallel=*/true, Rows(x), [&](int64_t index) {
      const Row row(x, index);
      EncodeRow<kBits, type(), group()>(x, row, out, first_token + row.t);
    });
  });
}

template <int kBits>
void Decode(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out) {
  WithTypeAndGroup(out.dtype, params.group_size, [&](auto type, auto group) {
    ForEach(/*parallel=*/true, Rows(out), [&](int64_t index) {
      const Row row(out, index);
      DecodeRow<kBits, type(), group()>(in, first_token + row.t, out, row);
    });
  });
}

// ---- CUDA: the same bits

#ifdef __CUDACC__

// A team of up to 32 threads encodes a group of n elements; each of them owns whole bytes of codes.
template <int kBits, int n>
inline constexpr int kTeam = std::min(32, n * kBits / 8);

template <int kBits, DType kType, int n>
__global__ void EncodeKernel(DenseView x, int64_t first_token, KvView out) {
  constexpr float m = kMaxCode<kBits>;
  constexpr int kPerByte = 8 / kBits, kBytes = n / kPerByte, kThreads = kTeam<kBits, n>;
  constexpr int kOwnBytes = kBytes / kThreads, kOwn = n / kThreads;
  const int64_t per_row = x.head_dim / n, groups = Rows(x) * per_row;
  const int64_t team = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kThreads;
  const bool in_range = team < groups;  // those past the end take part in the shuffles below
  const int64_t index = in_range ? team : groups - 1, g = index % per_row;
  const int lane = threadIdx.x % kThreads;
  const Row row(x, index / per_row);
  float values[kOwn];  // code j of byte i at i kPerByte + j
  GroupRange range;
  for (int i = 0; i < kOwn; ++i) {
    const int element = lane + i / kPerByte * kThreads + i % kPerByte * kBytes;
    const float v = LoadElement(x.data, kType, Offset(x, row.b, row.h, row.t, g * n + element));
    range.low = i == 0 || v < range.low ? v : range.low;
    range.high = i == 0 || v > range.high ? v : range.high;
    range.poison = i == 0 ? v * 0 : range.poison + v * 0;
    values[i] = v;
  }
  for (int stride = kThreads / 2; stride > 0; stride /= 2) {
    const float low = __shfl_xor_sync(~0u, range.low, stride);
    const float high = __shfl_xor_sync(~0u, range.high, stride);
    range.low = low < range.low ? low : range.low;
    range.high = high > range.high ? high : range.high;
    range.poison += __shfl_xor_sync(~0u, range.poison, stride);
  }
  if (!in_range) return;
  float scale, shift;
  ScaleAndShift<kType>(range, m, scale, shift);
  const int64_t slot = first_token + row.t;
  uint8_t* packed = CodeRow<kBits>(out, row.b, row.h, slot) + g * kBytes;
  for (int i = 0; i < kOwnBytes; ++i) {
    unsigned byte = 0;
    for (int j = 0; j < kPerByte; ++j) {
      byte |= static_cast<unsigned>(CodeOf<kType>(values[i * kPerByte + j], m, scale, shift)) << (j * kBits);
    }
    packed[lane + i * kThreads] = static_cast<uint8_t>(byte);
  }
  if (lane == 0) {
    MetadataRow(out, 1, n, row.b, row.h, slot)[g] = Stored(scale);
    MetadataRow(out, 2, n, row.b, row.h, slot)[g] = Stored(shift);
  }
}

// One thread a byte of codes.
template <int kBits, DType kType, int n>
__global__ void DecodeKernel(KvView in, int64_t first_token, DenseView out) {
  constexpr int kPerByte = 8 / kBits, kBytes = n / kPerByte;
  const int64_t row_bytes = out.head_dim / kPerByte;
  const int64_t index = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (index >= Rows(out) * row_bytes) return;
  const Row row(out, index / row_bytes);
  const int64_t byte = index % row_bytes, g = byte / kBytes, slot = first_token + row.t;
  const unsigned packed = CodeRow<kBits>(in, row.b, row.h, slot)[byte];
  const float scale = HalfToFloat(MetadataRow(in, 1, n, row.b, row.h, slot)[g]);
  const float shift = HalfToFloat(MetadataRow(in, 2, n, row.b, row.h, slot)[g]);
  for (int j = 0; j < kPerByte; ++j) {
    const float code = static_cast<float>((packed >> (j * kBits)) & ((1 << kBits) - 1));
    const int64_t d = g * n + byte % kBytes + j * kBytes;
    StoreElement(out.data, kType, Offset(out, row.b, row.h, row.t, d),
                 Decoded<kType>(code, scale, shift));
  }
}

template <int kBits>
void EncodeCuda(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out,
                void* stream) {
  if (Rows(x) == 0) return;
  WithTypeAndGroup(x.dtype, params.group_size, [&](auto type, auto group) {
    const int64_t threads = Rows(x) * (x.head_dim / group()) * kTeam<kBits, group()>;
    EncodeKernel<kBits, type(), group()>
        <<<GridFor(threads), 256, 0, static_cast<cudaStream_t>(stream)>>>(x, first_token, out);
  });
  Check(cudaGetLastError(), "encode");
}

template <int kBits>
void DecodeCuda(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out,
                void* stream) {
  if (Rows(out) == 0) return;
  WithTypeAndGroup(out.dtype, params.group_size, [&](auto type, auto group) {
    const int64_t threads = Rows(out) * (out.head_dim * kBits / 8);
    DecodeKernel<kBits, type(), group()>
        <<<GridFor(threads), 256, 0, static_cast<cudaStream_t>(stream)>>>(in, first_token, out);
  });
  Check(cudaGetLastError(), "decode");
}

#endif  // __CUDACC__

// ---- the rows

constexpr char kSource[] = "optimum-quanto 0.2.7, called as in transformers' QuantizedCache";

template <int kBits>
Codec MakeCodec() {
  Codec codec;
  codec.bits = kBits;
  codec.default_group = 64;
  codec.grouping = "64 consecutive channels of one token";
  codec.planes = [](int64_t /*heads*/, int64_t head_dim, const CodecParams& params) -> std::vector<Plane> {
    CheckGroups("quanto", head_dim, params.group_size);
    const int64_t metadata = head_dim / params.group_size * 2;
    return {{"codes", head_dim * kBits / 8}, {"scales", metadata}, {"shifts", metadata}};
  };
  codec.encode = Encode<kBits>;
  codec.decode = Decode<kBits>;
#ifdef __CUDACC__
  codec.encode_cuda = EncodeCuda<kBits>;
  codec.decode_cuda = DecodeCuda<kBits>;
#endif
  SetUniformBudget(codec);
  return codec;
}

template <int kBits>
Scheme Runs(const char* name) {
  return {.name = name, .source = kSource, .keys = MakeCodec<kBits>(), .values = MakeCodec<kBits>(),
          .refused = ""};
}

Scheme Refused(const char* name, const char* why) {
  return {.name = name, .source = kSource, .keys = {}, .values = {}, .refused = why};
}

constexpr char kTwoOrFour[] = "quanto's KV cache has 2 and 4 bits only";
constexpr char kSameAxis[] = "quanto's KV cache groups along axis 0 or -1 only, kivi wants 0 and 1";

const RegisterScheme kInt4{Runs<4>("int4-quanto")};
const RegisterScheme kInt2{Runs<2>("int2-quanto")};
const RegisterScheme kInt8{Refused("int8-quanto", kTwoOrFour)};
const RegisterScheme kInt8Kivi{Refused("int8-quanto-kivi", kTwoOrFour)};
const RegisterScheme kInt4Kivi{Refused("int4-quanto-kivi", kSameAxis)};
const RegisterScheme kInt2Kivi{Refused("int2-quanto-kivi", kSameAxis)};

}  // namespace
}  // namespace kvq
