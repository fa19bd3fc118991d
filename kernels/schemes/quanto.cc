// int4-quanto, int2-quanto: min/max quantization; int8-quanto and quanto with kivi axes, refused.
//
// Source: package optimum-quanto 0.2.7, MaxOptimizer and quantize_weight, as the KV cache of transformers
// 5.5.4 calls them (cache_utils.py, QuantoQuantizedLayer: axis 0, groups of 64) on a CPU.
//
// A group of G = 64 elements x (also 32, 128) has a scale and a shift; m = 2^bits - 1:
//   scale = (max - min) / m;   shift = -min
//   code q = clamp(round((x + shift) / scale), 0, m), half to even; 0 / 0 gives code 0
//   decoded: scale q - shift
// The package computes in the type of x, so every operation here is rounded to that type, and in decoding
// to the type of the output: codes and decoded numbers of float16 and bfloat16 caches are the package's.
//
// Groups. The package reads [batch, heads, tokens, head_dim] as rows of G consecutive elements (its axis 0,
// grouped.py). As head_dim is a multiple of G here, a group is G consecutive channels of one token, and
// depends on nothing else.
//
// Exact bytes: bits / 8 + 4 / G per element (4.5 bits for int4 at G = 64). Planes, per token and head:
//   codes   head_dim bits / 8, see kernels/code_row.h
//   scales  head_dim / G fp16 numbers;  shifts  likewise
// Refused: head_dim that is no multiple of G (the package then lets groups run on into the next token, if
// the whole tensor is a multiple of G); other G; with 2 bits, head_dim that is no multiple of 64; what
// QuantoQuantizedLayer refuses, see the rows.
//
// Where it differs. The package keeps scale and shift in the type of x, here they are always fp16. That is
// the same for float16, and for bfloat16 where they are 0 or from 2^-17 to 65504 in magnitude (8
// significant bits fit, in subnormals too); float32 ones are rounded, after the codes were made with the
// exact ones. Beyond 65504 they become infinity, and their group decodes to no finite number. A group with
// NaN or infinity decodes to NaN, as in the package. A tensor of one group only: the package takes its row
// for G columns and keeps G shifts, the numbers themselves; here it is a group like any other.
//
// No operation here may be fused: CPU and GPU, every instruction set, give the same bits.
#include "kernels/code_row.h"
#include "kernels/groups.h"
#ifndef __CUDACC__
#include <vector>

#include "kernels/runtime/launch.h"
#endif

namespace kvq::quanto {

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
  const float range_of_type = Rounded<kType>(range.high - range.low);
  // Of two float16 or bfloat16 numbers, a (1 / b) rounded to that type is a / b rounded to it: of all pairs, none
  // differs.
  scale = Rounded<kType>(kType == DType::kFloat32 ? range_of_type / m : range_of_type * (1 / m)) + range.poison;
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

#ifndef __CUDACC__
namespace {

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
  uint16_t* scales = MetadataRow(out, 1, out.head_dim / n, row.b, row.h, slot);
  uint16_t* shifts = MetadataRow(out, 2, out.head_dim / n, row.b, row.h, slot);
  std::vector<uint8_t> codes(x.head_dim);
  for (int64_t g = 0; g < x.head_dim / n; ++g) {
    float values[n], scale, shift;
    LoadRow(x.data, kType, Offset(x, row.b, row.h, row.t, g * n), n, values);
    ScaleAndShift<kType>(RangeOf<n>(values), m, scale, shift);
    CodeGroup<kType, n>(values, m, scale, shift, &codes[g * n]);
    scales[g] = FloatToHalf(scale);
    shifts[g] = FloatToHalf(shift);
  }
  PackRow<kBits>(codes.data(), x.head_dim, CodeRow<kBits>(out, row.b, row.h, slot));
}

template <int kBits, DType kType, int n>
void DecodeRow(const KvView& in, int64_t slot, const DenseView& out, const Row& row) {
  const uint16_t* scales = MetadataRow(in, 1, in.head_dim / n, row.b, row.h, slot);
  const uint16_t* shifts = MetadataRow(in, 2, in.head_dim / n, row.b, row.h, slot);
  FewNumbers<float> values(out.head_dim);
  UnpackRow<kBits>(CodeRow<kBits>(in, row.b, row.h, slot), out.head_dim, values.data());
  for (int64_t g = 0; g < out.head_dim / n; ++g) {
    DecodeGroup<kType, n>(&values[g * n], HalfToFloat(scales[g]), HalfToFloat(shifts[g]));
  }
  StoreRow(values.data(), out.head_dim, kType, Offset(out, row.b, row.h, row.t, 0), out.data);
}

template <int kBits>
void Encode(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out) {
  WithTypeAndGroup(x.dtype, params.group_size, [&](auto type, auto group) {
    ForEach(/*parallel=*/AreMany(x), RowsOf(x), [&](int64_t index) {
      const Row row(x, index);
      EncodeRow<kBits, type(), group()>(x, row, out, first_token + row.t);
    });
  });
}

template <int kBits>
void Decode(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out) {
  WithTypeAndGroup(out.dtype, params.group_size, [&](auto type, auto group) {
    ForEach(/*parallel=*/AreMany(out), RowsOf(out), [&](int64_t index) {
      const Row row(out, index);
      DecodeRow<kBits, type(), group()>(in, first_token + row.t, out, row);
    });
  });
}

// ---- CUDA: what is launched, a thread for 16 channels

KernelLaunch KernelOf(const char* name, int bits, int64_t group, const DenseView& x) {
  return {.instance = {{"kernels/schemes/quanto.cc"}, InstanceName(name, bits, TypeName(x.dtype), group)},
          .grid = {GridFor(x.tokens * x.head_dim / 16), static_cast<unsigned>(x.heads), static_cast<unsigned>(x.batch)},
          .threads = 256,
          .early = false};
}

template <int kBits>
void EncodeCuda(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out,
                void* stream) {
  Launch("quanto encode", KernelOf("kvq::quanto::EncodeKernel", kBits, params.group_size, x), stream, x,
         first_token, out, IsWide(x), Divisor(x.head_dim / 16));
}

template <int kBits>
void DecodeCuda(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out,
                void* stream) {
  Launch("quanto decode", KernelOf("kvq::quanto::DecodeKernel", kBits, params.group_size, out), stream, in,
         first_token, out, IsWide(out), Divisor(out.head_dim / 16));
}

// ---- the rows

constexpr char kSource[] = "optimum-quanto 0.2.7, called as in transformers' QuantizedCache";

template <int kBits>
Codec MakeCodec() {
  Codec codec;
  codec.bits = kBits;
  codec.default_group = 64, codec.groups = kThreeGroups, codec.head_dim_multiple = kRunChannels<kBits>;
  codec.typed = true;
  codec.grouping = "64 consecutive channels of one token";
  codec.planes = [](int64_t /*heads*/, int64_t head_dim, const CodecParams& params) -> std::vector<Plane> {
    CheckGroups("quanto", kThreeGroups, head_dim, params.group_size);
    CheckRun(kBits, head_dim);
    const int64_t metadata = head_dim / params.group_size * 2;
    return {{"codes", head_dim * kBits / 8}, {"scales", metadata}, {"shifts", metadata}};
  };
  codec.encode = Encode<kBits>;
  codec.decode = Decode<kBits>;
  codec.encode_cuda = EncodeCuda<kBits>;
  codec.decode_cuda = DecodeCuda<kBits>;
  codec.device = {.label = kBits == 4 ? "int4_quanto" : "int2_quanto", .type = [](const CodecParams& params, int64_t) {
                    return InstanceName("kvq::AffineCodes", kBits, params.group_size, "kvq::Zero::kOfValues");
                  }};
  codec.host.lines = HalfLines<Zero::kOfValues>;
  codec.nmse = kBits == 4 ? 8.04e-3 : 0.2025;
  codec.nmse_source = "NumPy, from the formula above";
  codec.golden = kBits == 4 ? "int4-quanto.json" : "int2-quanto.json";
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

#else
// ---- CUDA: the same bits

// Two numbers as the package would hold them.
template <DType kType>
__device__ __forceinline__ void RoundTwo(float& low, float& high) {
  if constexpr (kType != DType::kFloat32) UnpackTwo<kType>(PackTwo<kType>(low, high), low, high);
}

// A thread's eight elements of each part, float32 or two 16-bit numbers a word.
template <DType kType, int kParts>
struct Eights {
  static constexpr bool kPairs = kType != DType::kFloat32;
  float values[kPairs ? 1 : kParts][8];
  uint32_t words[kPairs ? kParts : 1][4];

  __device__ __forceinline__ void Load(int part, const DenseView& x, int64_t offset, bool wide) {
    if constexpr (kPairs) {
      LoadEightWords(x, offset, wide, words[part]);
    } else {
      LoadEight<kType>(x, offset, wide, values[part]);
    }
  }
  __device__ __forceinline__ void Two(int part, int i, float& low, float& high) const {  // elements i and i + 1
    if constexpr (kPairs) {
      UnpackTwo<kType>(words[part][i / 2], low, high);
    } else {
      low = values[part][i], high = values[part][i + 1];
    }
  }
  // Of the group that `lanes` threads have together; NaN in all of it where there is one.
  __device__ __forceinline__ GroupRange Range(int lanes) const {
    float low, high;
    if constexpr (kPairs) {
      uint32_t smallest = words[0][0], largest = words[0][0];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          smallest = SmallerOfTwo<kType>(smallest, words[part][i]);
          largest = LargerOfTwo<kType>(largest, words[part][i]);
        }
      }
      // The larger of (-smallest, largest) of both halves, then of the lanes.
      smallest ^= 0x80008000;
      uint32_t both = LargerOfTwo<kType>(smallest & 0xFFFF | largest << 16, smallest >> 16 | largest & 0xFFFF0000);
      for (int stride = lanes / 2; stride > 0; stride /= 2) {
        both = LargerOfTwo<kType>(both, __shfl_xor_sync(~0u, both, stride));
      }
      UnpackTwo<kType>(both, low, high);
      low = -low;
    } else {
      float poison = 0;
      low = high = values[0][0];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float v = values[part][i];
          low = Smaller(v, low), high = Larger(v, high), poison = fmaf(v, 0.0f, poison);
        }
      }
      for (int stride = lanes / 2; stride > 0; stride /= 2) {
        low = Smaller(__shfl_xor_sync(~0u, low, stride), low);
        high = Larger(__shfl_xor_sync(~0u, high, stride), high);
        poison += __shfl_xor_sync(~0u, poison, stride);
      }
      return {low, high, poison};
    }
    return {low, high, low * 0 + high * 0};
  }
};

// Of the 8 / kBits threads that share a word of each chunk (code_row.h) each has two of its fields: what a warp loads and
// stores at a time are then whole sectors of memory, 32 bytes. Where a word's channels are two groups, both fields are of
// one.
template <int kBits, int n>
struct TwoFields {
  static constexpr int kThreads = 8 / kBits;
  static constexpr bool kApart = n >= kRunChannels<kBits>;
  static constexpr int kFirst = kApart ? 1 : 2, kNext = kApart ? kThreads : 1;  // field = thread kFirst + part kNext
  uint32_t word, thread;

  // `place`: of a thread among those of a token.
  __device__ __forceinline__ explicit TwoFields(uint32_t place) : word(place / kThreads), thread(place % kThreads) {}
  __device__ __forceinline__ uint32_t Channel() const { return word * kRunChannels<kBits> + 8 * thread * kFirst; }  // of part 0
  static constexpr int PartChannel(int part) { return 8 * part * kNext; }  // and on top of that
  __device__ __forceinline__ uint32_t Shift() const { return thread * (kFirst * kBits); }  // of part 0
  static constexpr int PartShift(int part) { return part * kNext * kBits; }
};

// A thread encodes two fields. The threads of a word hand each other what they have of it, so that each stores whole ones.
// Sequence and head are the block's z and y: division is slow.
template <int kBits, DType kType, int n>
__global__ void __launch_bounds__(256)
    EncodeKernel(DenseView x, int64_t first_token, KvView out, bool wide, const Divisor threads_of_token) {
  using Fields = TwoFields<kBits, n>;
  constexpr float m = kMaxCode<kBits>;
  constexpr uint32_t kMask = 0x00010001u * ((1 << kBits) - 1);
  constexpr int kGroupThreads = n / 16;
  const auto [token, place] = threads_of_token.Of(blockIdx.x * 256 + threadIdx.x);
  const bool in_range = token < x.tokens;  // those past the end take part in the shuffles below
  const uint32_t t = in_range ? token : 0, g = place / kGroupThreads, lane = place % kGroupThreads;
  const int64_t b = blockIdx.z, h = blockIdx.y;
  const Fields fields(place);
  const int64_t offset = Offset(x, b, h, t, fields.Channel()), slot = TokenBase(out) + first_token + t;
  Eights<kType, 2> eights;
#pragma unroll
  for (int part = 0; part < 2; ++part) eights.Load(part, x, offset + Fields::PartChannel(part), wide);
  const GroupRange range = eights.Range(kGroupThreads);
  float scale, shift;
  ScaleAndShift<kType>(range, m, scale, shift);
  uint32_t words[4] = {0, 0, 0, 0};  // of the chunks, with this thread's fields
  // By the reciprocal, see ScaleAndShift. With a scale that has all its bits the largest quotient is m and less than a
  // half, and none is NaN: nothing is to be clamped.
  if (kType != DType::kFloat32 && scale >= 6.1035156e-5f && scale < 1e18f) {
    // Adding what has an ulp of 1 rounds a quotient, half to even, into the low bits.
    constexpr uint32_t kBias = kType == DType::kFloat16 ? 0x64006400 : 0x43004300;
    const float inverse = 1.0f / scale;
    const uint32_t shifts = PackTwo<kType == DType::kFloat32 ? DType::kFloat16 : kType>(shift, shift);
    if constexpr (kType != DType::kFloat32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t codes[2];  // of each part: in the low byte of each half
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          float low, high;
          UnpackTwo<kType>(AddTwo<kType>(eights.words[part][i], shifts), low, high);
          codes[part] = AddTwo<kType>(PackTwo<kType>(low * inverse, high * inverse), kBias);
        }
        if constexpr (Fields::PartShift(1) == 8) {
          words[i] = ptx::PickBytes(codes[0], codes[1], 0x6240);
        } else {
          words[i] = codes[0] & kMask | (codes[1] & kMask) << Fields::PartShift(1);
        }
      }
    }
  } else {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float low, high;
        eights.Two(part, 2 * i, low, high);
        const auto code = [&](float value) { return static_cast<uint32_t>(CodeOf<kType>(value, m, scale, shift)); };
        words[i] |= (code(low) | code(high) << 16) << Fields::PartShift(part);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] <<= fields.Shift();
  // Each keeps the words of chunks thread, thread + kThreads, ...
#pragma unroll
  for (int lanes = 1, left = 2; lanes < Fields::kThreads; lanes *= 2, left /= 2) {
    const bool odd = (fields.thread & lanes) != 0;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const uint32_t other = __shfl_xor_sync(~0u, odd ? words[2 * i] : words[2 * i + 1], lanes);
      words[i] = (odd ? words[2 * i + 1] : words[2 * i]) | other;
    }
  }
  if (!in_range) return;
  uint32_t* row = reinterpret_cast<uint32_t*>(CodeRow<kBits>(out, b, h, slot)) + fields.word;
  const uint32_t chunk_words = threads_of_token.divisor / Fields::kThreads;
#pragma unroll
  for (int i = 0; i < 4 / Fields::kThreads; ++i) row[(i * Fields::kThreads + fields.thread) * chunk_words] = words[i];
  // The group's first two threads store a number each. (Which plane is not asked by an index: `out` would be copied into
  // every thread's memory.)
  uint16_t *scales = MetadataRow(out, 1, out.head_dim / n, b, h, slot) + g;
  uint16_t *shifts = MetadataRow(out, 2, out.head_dim / n, b, h, slot) + g;
  if (lane < 2) *(lane == 0 ? scales : shifts) = FloatToHalf(lane == 0 ? scale : shift);
}

// A thread decodes two fields.
template <int kBits, DType kType, int n>
__global__ void __launch_bounds__(256)
    DecodeKernel(KvView in, int64_t first_token, DenseView out, bool wide, const Divisor threads_of_token) {
  using Fields = TwoFields<kBits, n>;
  const auto [t, place] = threads_of_token.Of(blockIdx.x * 256 + threadIdx.x);
  if (t >= out.tokens) return;
  const int64_t b = blockIdx.z, h = blockIdx.y, slot = first_token + t;
  const Fields fields(place);
  const uint32_t* row = reinterpret_cast<const uint32_t*>(CodeRow<kBits>(in, b, h, slot)) + fields.word;
  const uint32_t chunk_words = threads_of_token.divisor / Fields::kThreads, g = place / (n / 16);
  uint32_t words[4];
#pragma unroll
  for (int chunk = 0; chunk < 4; ++chunk) words[chunk] = row[chunk * chunk_words] >> fields.Shift();
  const float scale = HalfToFloat(MetadataRow(in, 1, in.head_dim / n, b, h, slot)[g]);
  const float shift = HalfToFloat(MetadataRow(in, 2, in.head_dim / n, b, h, slot)[g]);
  const int64_t offset = Offset(out, b, h, t, fields.Channel());
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    float values[8];
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      const uint32_t word = words[chunk] >> Fields::PartShift(part);
      float low = scale * CodeToFloat(word, 0, kBits), high = scale * CodeToFloat(word, 16, kBits);
      RoundTwo<kType>(low, high);
      values[2 * chunk] = low - shift, values[2 * chunk + 1] = high - shift;
    }
    StoreEight<kType>(out, offset + Fields::PartChannel(part), wide, values);
  }
}

#endif  // __CUDACC__

}  // namespace kvq::quanto
