// int8-hqq, int4-hqq, int2-hqq, int4-hqq-kivi, int2-hqq-kivi: half-quadratic quantization.
//
// Source: Badri & Shaji, "Half-Quadratic Quantization" (2023); package hqq 0.2.8, Quantizer.quantize with its
// default solver optimize_weights_proximal_legacy, in float32 as on a CPU.
//
// A group of G = 64 elements x (also 32, 128) has a scale s and a zero point z; m = 2^bits - 1:
//   s = m / (max - min), 1 where max - min <= 1e-4, at most 2e4;   z = -min s
//   up to 20 times: q = clamp(round(x s + z), 0, m);  r = (q - z) / s;  e = shrink(x - r)
//                   z = mean(q - (x - e) s)
//   code q = clamp(round(x s + z), 0, m);   stored are q, fp16(1 / s), fp16(z)
//   decoded: (q - fp16(z)) fp16(1 / s)
// with shrink(d) = sign(d) max(|d| - |d|^(p-1) / beta, 0), p = 0.7, beta = 10, rounding half to even. Computed is the
// same in other words, which cost half as much: with d = x s + z - q, an error in codes, and clip(d) what shrink
// takes from it, q - (x - e) s = q + (d - clip(d)) - x s, whose last term has the same mean in all iterations.
// The iterations end when the mean |x - r| over everything encoded together (a block: all heads and
// block_tokens tokens of a sequence) no longer falls.
//
// Groups. Plain: G consecutive channels of one token (the package's axis 1). kivi: keys by the package's
// axis 0, as the reference study's library calls it: the block [heads, tokens, head_dim] as a row of N
// numbers, cut into G rows of N / G; a group is a column. So a group spans all heads and tokens N / (G
// head_dim) apart, and one channel only if that is a whole number. Values as in plain.
//
// Exact bytes: bits / 8 + 4 / G per element (4.5 bits for int4 at G = 64). Planes, per token and head:
//   codes   head_dim bits / 8, see kernels/code_row.h
//   scales  head_dim / G fp16 numbers 1 / s;  zeros  likewise z.  For kivi group c of a block has slot c,
//           counted over head, token, head_dim / G: as many slots as groups.
// Refused: head_dim that is no multiple of G; other G; with 2 bits, head_dim that is no multiple of 64.
//
// A group that is so far from zero for its range that z would not fit fp16 gets the largest scale with which
// it does; the package would store infinity. A group with NaN or infinity decodes to NaN.
//
// CPU and GPU, every instruction set, give the same bits: nothing is fused but what says fma (-ffp-contract=off,
// --fmad=false), and sums run over a fixed tree.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "kernels/device/hqq.cuh"
#include "kernels/runtime/launch.h"
#include "kernels/runtime/scratch.h"

namespace kvq {
namespace {

using namespace hqq;

// ---- CPU: the definition, a group at a time

template <int n>
KVQ_VECTOR void InitGroup(const float* x, float m, float* s, float* z) {
  InitialScale(RangeOf<n>(x), m, *s, *z);
}

// Mean of x s + z.
template <int n>
KVQ_VECTOR float MeanOf(const float* x, float s, float z) {
  float u[n];
  for (int i = 0; i < n; ++i) u[i] = x[i] * s + z;
  return TreeSum<n>(u) / n;
}

// Of a PowerTable, what was looked up before.
struct LookedUp {
  float power;
  float At(uint32_t) const { return power; }
};

// One iteration: moves z, which began as `first` with a mean of x s + first of `mean`; returns the sum of |x - r|
// before that.
template <int n>
KVQ_VECTOR float StepGroup(const float* x, float m, float s, float first, float mean, float* z) {
  float target[n], error[n], distance[n], largest[n];
  const float zero = *z, inverse = 1.0f / s;
  for (int i = 0; i < n; ++i) {
    const float u = x[i] * s + zero;
    target[i] = RoundCode(u, m);
    error[i] = u - target[i];
    largest[i] = distance[i] = std::fabs(error[i]);
  }
  for (int stride = n / 2; stride > 0; stride /= 2) {
    for (int i = 0; i < stride; ++i) {
      largest[i] = largest[i] > largest[i + stride] ? largest[i] : largest[i + stride];
    }
  }
  if (largest[0] * inverse > kAllTaken) {
    // Looked up in a loop of their own: all else is in vectors.
    const ClipPolynomial polynomial = ClipPolynomialFor(s);
    uint32_t exponents[n];
    float powers[n];
    for (int i = 0; i < n; ++i) exponents[i] = ClipExponent(error[i], inverse);
    for (int i = 0; i < n; ++i) powers[i] = kPowers.At(exponents[i]);
    for (int i = 0; i < n; ++i) target[i] += error[i] - Clip(error[i], inverse, polynomial, LookedUp{powers[i]});
  }
  *z = first + (TreeSum<n>(target) / n - mean);
  return TreeSum<n>(distance) * inverse;
}

template <int n>
KVQ_VECTOR void CodeGroup(const float* x, float m, float s, float z, uint8_t* codes) {
  for (int i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(RoundCode(x[i] * s + z, m));
}

// Sum of the groups' errors in double: lane l of 256 takes groups l, l + 256, ..., then a tree.
double ErrorSum(const std::vector<float>& errors) {
  double lanes[256] = {};
  for (size_t g = 0; g < errors.size(); ++g) lanes[g % 256] += errors[g];
  for (int stride = 128; stride > 0; stride /= 2) {
    for (int i = 0; i < stride; ++i) lanes[i] += lanes[i + stride];
  }
  return lanes[0];
}

// (q - z) s with one zero and scale for a run, or one for each element.
KVQ_VECTOR void ScaleRun(float* codes, int64_t n, float z, float s) {
  for (int64_t i = 0; i < n; ++i) codes[i] = (codes[i] - z) * s;
}
KVQ_VECTOR void ScaleEach(float* codes, int64_t n, const float* z, const float* s) {
  for (int64_t i = 0; i < n; ++i) codes[i] = (codes[i] - z[i]) * s[i];
}

// Encodes the block of sequence b that begins at token `first` of x and goes to slot `first_slot`.
// `parallel`: spread over threads inside the block (where there are too few blocks for that).
template <int kBits, int n>
void EncodeBlock(const BlockShape& shape, const DenseView& x, int64_t b, int64_t first,
                 const KvView& out, int64_t first_slot, bool parallel) {
  constexpr float m = kMaxCode<kBits>;
  const int64_t groups = shape.groups();
  const int64_t rows = shape.heads * shape.tokens, row_size = shape.head_dim;
  std::vector<float> values(groups * n), scales(groups), zeros(groups), errors(groups);
  std::vector<float> first_zeros(groups), means(groups);
  // Elements group by group, so that everything after this runs over consecutive memory.
  ForEach(parallel, rows, [&](int64_t row) {
    float* plain = &values[row * row_size];
    std::vector<float> one;
    if (shape.across) {
      one.resize(row_size);
      plain = one.data();
    }
    LoadRow(x.data, x.dtype, Offset(x, b, row / shape.tokens, first + row % shape.tokens, 0), row_size,
            plain);
    for (int64_t d = 0; shape.across && d < row_size; ++d) {
      const int64_t flat = row * row_size + d;
      values[flat % groups * n + flat / groups] = plain[d];
    }
  });
  ForEach(parallel, groups, [&](int64_t g) {
    InitGroup<n>(&values[g * n], m, &scales[g], &zeros[g]);
    first_zeros[g] = zeros[g];
    means[g] = MeanOf<n>(&values[g * n], scales[g], zeros[g]);
  });
  float best = INFINITY;
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    ForEach(parallel, groups, [&](int64_t g) {
      errors[g] = StepGroup<n>(&values[g * n], m, scales[g], first_zeros[g], means[g], &zeros[g]);
    });
    const float error =
        static_cast<float>(ErrorSum(errors) / static_cast<double>(groups * n));
    if (!(error < best)) break;
    best = error;
  }
  std::vector<uint8_t> codes(groups * n);  // by place in the block
  ForEach(parallel, groups, [&](int64_t g) {
    uint8_t group_codes[n];
    CodeGroup<n>(&values[g * n], m, scales[g], zeros[g], group_codes);
    for (int64_t i = 0; i < n; ++i) codes[shape.Flat(g, i)] = group_codes[i];
    *Slot(out, shape, 1, b, first_slot, g) = StoredScale(scales[g]);
    *Slot(out, shape, 2, b, first_slot, g) = FloatToHalf(zeros[g]);
  });
  ForEach(parallel, rows, [&](int64_t row) {
    uint8_t* packed = CodeRow<kBits>(out, b, row / shape.tokens, first_slot + row % shape.tokens);
    PackRow<kBits>(&codes[row * row_size], row_size, packed);
  });
}

template <int kBits, int n>
void DecodeBlock(const BlockShape& shape, const KvView& in, int64_t b, int64_t first_slot,
                 const DenseView& out, int64_t first, bool parallel) {
  const int64_t groups = shape.groups(), rows = shape.heads * shape.tokens;
  // The slots of a head's tokens lie one behind the other.
  std::vector<float> scales(groups), zeros(groups);
  const int64_t of_head = groups / shape.heads;
  for (int64_t g = 0; g < groups; g += of_head) {
    LoadRow(Slot(in, shape, 1, b, first_slot, g), DType::kFloat16, 0, of_head, &scales[g]);
    LoadRow(Slot(in, shape, 2, b, first_slot, g), DType::kFloat16, 0, of_head, &zeros[g]);
  }
  ForEach(parallel, rows, [&](int64_t row) {
    const int64_t h = row / shape.tokens, t = row % shape.tokens;
    const uint8_t* packed = CodeRow<kBits>(in, b, h, first_slot + t);
    const int64_t offset = Offset(out, b, h, first + t, 0);
    FewNumbers<float> values(shape.head_dim);
    UnpackRow<kBits>(packed, shape.head_dim, values.data());
    const int64_t flat = row * shape.head_dim;
    for (int64_t d = 0; d < shape.head_dim;) {
      if (!shape.across) {
        const int64_t g = (flat + d) / n;
        ScaleRun(&values[d], n, zeros[g], scales[g]);
        d += n;
      } else {
        // Consecutive elements belong to consecutive groups, around the end.
        const int64_t g = (flat + d) % groups, run = std::min(shape.head_dim - d, groups - g);
        ScaleEach(&values[d], run, &zeros[g], &scales[g]);
        d += run;
      }
    }
    StoreRow(values.data(), shape.head_dim, out.dtype, offset, out.data);
  });
}

BlockShape ShapeOf(const KvView& view, const CodecParams& params, bool across) {
  return {view.heads, view.block_tokens, view.head_dim, params.group_size, across};
}

// Calls work(sequence, block, parallel) for all blocks of all sequences.
template <typename Work>
void ForBlocks(int64_t batch, int64_t tokens, int64_t block_tokens, const Work& work) {
  const int64_t blocks = tokens / block_tokens, all = batch * blocks;
  // One block: its rows and groups are spread.
  Deal(all, [&](int64_t i) { work(i / blocks, i % blocks, /*parallel=*/all == 1); });
}

template <int kBits, bool kAcross>
void Encode(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out) {
  const BlockShape shape = ShapeOf(out, params, kAcross);
  WithGroup(shape.group, [&](auto group) {
    ForBlocks(x.batch, x.tokens, shape.tokens, [&](int64_t b, int64_t block, bool parallel) {
      EncodeBlock<kBits, group()>(shape, x, b, block * shape.tokens, out,
                                  first_token + block * shape.tokens, parallel);
    });
  });
}

template <int kBits, bool kAcross>
void Decode(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out) {
  const BlockShape shape = ShapeOf(in, params, kAcross);
  WithGroup(shape.group, [&](auto group) {
    ForBlocks(out.batch, out.tokens, shape.tokens, [&](int64_t b, int64_t block, bool parallel) {
      DecodeBlock<kBits, group()>(shape, in, b, first_token + block * shape.tokens, out,
                                  block * shape.tokens, parallel);
    });
  });
}

std::vector<Plane> Planes(int64_t /*heads*/, int64_t head_dim, const CodecParams& params, int bits) {
  const int64_t group = params.group_size;
  CheckGroups("hqq", kThreeGroups, head_dim, group);
  CheckRun(bits, head_dim);
  return {{"codes", head_dim * bits / 8},
          {"scales", head_dim / group * 2},
          {"zeros", head_dim / group * 2}};
}

// ---- CUDA: kernels/device/hqq.cuh

KernelLaunch KernelOf(const std::string& name, dim3 grid, int threads, bool early) {
  return {.instance = {{"kernels/device/hqq.cuh"}, name}, .grid = grid, .threads = threads, .early = early};
}

template <int kBits, bool kAcross>
void EncodeBlocks(const BlockShape& shape, const DenseView& x, int64_t first_token, const KvView& out,
                  const Solved& solved, void* stream) {
  constexpr int kEach = kBits == 2 ? 16 : 8;  // elements of a lane
  const int64_t words = solved.blocks * shape.heads * shape.tokens * shape.head_dim * kBits / 32;
  const Places places(shape, x);
  const float m = kMaxCode<kBits>;
  Launch("hqq encode",
         KernelOf(InstanceName("kvq::hqq::SolveKernel", shape.group, kAcross, kEach),
                  GridFor(int64_t{solved.all()} * (shape.group / kEach), kSolveThreads), kSolveThreads, true),
         stream, shape, places, x, m, solved);
  Launch("hqq encode", KernelOf("kvq::hqq::StopKernel", solved.blocks * kIterations, 256, true), stream, solved,
         shape.group);
  Launch("hqq encode",
         KernelOf(InstanceName("kvq::hqq::PackKernel", kBits, shape.group, kAcross),
                  GridFor(std::max<int64_t>(words, solved.all())), 256, true),
         stream, shape, places, Divisor(shape.head_dim / kRunChannels<kBits>), x, IsWide(x), out, first_token, solved);
}

template <int kBits, bool kAcross>
void EncodeCuda(const CodecParams& params, const DenseView& x, int64_t first_token, const KvView& out,
                void* stream) {
  constexpr int64_t kScratchBytes = int64_t{64} << 20;
  const BlockShape shape = ShapeOf(out, params, kAcross);
  const int64_t all_blocks = x.batch * (x.tokens / shape.tokens), groups = shape.groups();
  if (all_blocks == 0) return;
  if (groups >= int64_t{1} << 24) throw InputError("hqq: a block of ", groups, " groups is too large for a GPU");
  // A bounded number of blocks at a time.
  const int64_t block_bytes = groups * kGroupBytes + kBlockBytes;
  const int64_t most = std::clamp<int64_t>(kScratchBytes / block_bytes, 1, all_blocks);
  const Scratch memory(most * block_bytes, stream);
  auto* scratch = static_cast<float*>(memory.data());
  for (int64_t first = 0; first < all_blocks; first += most) {
    const int64_t blocks = std::min(most, all_blocks - first), all = blocks * groups;
    Solved solved{static_cast<uint32_t>(first), static_cast<uint32_t>(blocks), static_cast<uint32_t>(groups), scratch,
                  nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    solved.zeros = solved.scales + all;
    solved.errors = solved.zeros + kIterations * all;
    solved.means = solved.errors + kIterations * all;
    solved.arrived = reinterpret_cast<int*>(solved.means + kIterations * blocks);
    solved.stops = solved.arrived + blocks;
    solved.settled = reinterpret_cast<uint8_t*>(solved.stops + blocks);
    EncodeBlocks<kBits, kAcross>(shape, x, first_token, out, solved, stream);
  }
}

template <int kBits, bool kAcross>
void DecodeCuda(const CodecParams& params, const KvView& in, int64_t first_token, const DenseView& out,
                void* stream) {
  const BlockShape shape = ShapeOf(in, params, kAcross);
  if (out.batch * out.heads * out.tokens == 0) return;
  if (out.tokens * out.head_dim >= int64_t{1} << 31) throw InputError("hqq: too many tokens for one call on a GPU");
  const auto rows = static_cast<uint32_t>((out.tokens + kDecodeTokens - 1) / kDecodeTokens);
  const dim3 grid(GridFor(rows * (out.head_dim / 8)), static_cast<unsigned>(out.heads),
                  static_cast<unsigned>(out.batch));
  Launch("hqq decode",
         KernelOf(InstanceName("kvq::hqq::DecodeKernel", kBits, TypeName(out.dtype), shape.group, kAcross), grid, 256, false),
         stream, shape, in, first_token, out, IsWide(out), rows);
}

// ---- the rows

template <int kBits, bool kAcross>
Codec MakeCodec() {
  Codec codec;
  codec.bits = kBits;
  codec.default_group = 64, codec.groups = kThreeGroups, codec.head_dim_multiple = kRunChannels<kBits>;
  codec.grouping = kAcross ? "64 elements N/64 apart over all heads and tokens of a block"
                           : "64 consecutive channels of one token";
  codec.block_wide = kAcross;
  codec.planes = [](int64_t heads, int64_t head_dim, const CodecParams& params) {
    return Planes(heads, head_dim, params, kBits);
  };
  codec.encode = Encode<kBits, kAcross>;
  codec.decode = Decode<kBits, kAcross>;
  codec.encode_cuda = EncodeCuda<kBits, kAcross>;
  codec.decode_cuda = DecodeCuda<kBits, kAcross>;
  if constexpr (!kAcross) {  // keys of neighbouring channels would have scales of groups that end with the block
    codec.device = {.label = kBits == 8 ? "int8" : kBits == 4 ? "int4" : "int2",
                    .type = [](const CodecParams& params, int64_t) {
                      return InstanceName("kvq::AffineCodes", kBits, params.group_size, "kvq::Zero::kOfCodes");
                    }};
    codec.host.lines = HalfLines<Zero::kOfCodes>;
  }
  codec.nmse = kBits == 8 ? 2.60e-5 : kBits == 4 ? 7.39e-3 : 0.1876;
  codec.nmse_source = "NumPy, from the package's formula";
  codec.golden = kAcross      ? (kBits == 4 ? "int4-hqq-kivi.json" : "int2-hqq-kivi.json")
                 : kBits == 8 ? "int8-hqq.json"
                 : kBits == 4 ? "int4-hqq.json"
                              : "int2-hqq.json";
  return codec;
}

constexpr char kSource[] = "hqq 0.2.8 (Badri & Shaji 2023), groups as in transformers' QuantizedCache";

template <int kBits>
Scheme Plain(const char* name) {
  return {.name = name, .source = kSource, .keys = MakeCodec<kBits, false>(), .values = MakeCodec<kBits, false>(),
          .refused = ""};
}
template <int kBits>
Scheme Kivi(const char* name) {
  return {.name = name, .source = kSource, .keys = MakeCodec<kBits, true>(),
          .values = MakeCodec<kBits, false>(), .refused = ""};
}

const RegisterScheme kInt8{Plain<8>("int8-hqq")};
const RegisterScheme kInt4{Plain<4>("int4-hqq")};
const RegisterScheme kInt2{Plain<2>("int2-hqq")};
const RegisterScheme kInt4Kivi{Kivi<4>("int4-hqq-kivi")};
const RegisterScheme kInt2Kivi{Kivi<2>("int2-hqq-kivi")};

}  // namespace
}  // namespace kvq
