// kvarn-4, kvarn-2: KVarN's tiles of 128 tokens, turned, and balanced along both sides before they are rounded.
//
// Source: "KVarN" (arXiv 2606.03458), vLLM PRs 44581 and 46812, kvarn/sinkhorn.py and kvarn_store.py; the reference in
// huawei-csl/KVarN f9806bd, ascend_kernel/kvarn_store_tile_k/api_test.py. The paper's k4v2 is `kvarn-4+kvarn-2@residual=128`.
//
// A tile is 128 tokens of a head, each turned by the Sylvester-Hadamard matrix over sqrt(head_dim), as a matrix M: of keys the
// rows are channels and the columns tokens, of values it is the other way round. In float32, with column scales c and row
// scales r that begin at 1, and B = M / c / r, 16 times:
//   c = limit(c std of B's columns), then B anew;  r = limit(r std of B's rows), then B anew: std with n - 1 and between 1e-3
//   and 1e3, limit(v) between e^-0.3 and e^10. Of these 16 and the beginning the last one counts that has the smallest
//   largest / max(smallest, 1e-8) std of the columns, plus the same of the rows
// Each row of B: s = max((max - min) / m, 1e-10), code q = clamp(round((B - min) / s), 0, m), half to even, m = 2^bits - 1
//   stored are q, fp16(r s) and fp16(r min) of each row, and fp16(c) of each column
//   decoded: (q fp16(r s) + fp16(r min)) fp16(c), turned back
//
// Exact bytes a vector, D channels: keys D bits / 8 + D / 32 + 2, values D bits / 8 + 4 + D / 64 (D = 128: kvarn-4 keys 70,
// 4.375 bits an element, kvarn-2 values 38, 2.375). Planes, per head:
//   codes    head_dim bits / 8 bytes a token, see kernels/code_row.h (KVarN has them along the rows, low bits first)
//   scales   fp16 r s: of keys head_dim for 128 tokens, of values one a token;  minima  likewise
//   columns  fp16 c: of keys one a token, of values head_dim for 128 tokens
// Refused: head_dim that is neither 64 nor 128 (a tile of more is too large for most GPUs' shared memory); @group; blocks that
// are no multiple of 128 tokens.
//
// Where it differs. KVarN adds logarithms of scales, here they are multiplied: some 1e-7. What fp16 cannot hold is stored as
// 65504. A token with NaN, infinity or what float16 cannot hold decodes to NaN, and is taken for zeros when its tile is
// balanced; there the tile is lost. KVarN keeps incomplete tiles and the first tokens in 16 bits.
#include "kernels/plain.h"

namespace kvq::kvarn {

inline constexpr int kTile = 128, kRounds = 16;
inline constexpr float kLeast = 0.74081822068f, kMost = 22026.465795f;  // e^-0.3, e^10
inline constexpr int64_t kTurnedHeadDims[] = {64, 128};

// Rows and columns of a tile; which way they lie in numbers[token][channel] with `pitch` numbers a token.
struct Shape {
  int rows, columns, row_step, column_step;
  KVQ_HD Shape(bool keys, int dim, int pitch)
      : rows(keys ? dim : kTile), columns(keys ? kTile : dim), row_step(keys ? 1 : pitch), column_step(keys ? pitch : 1) {}
};

// A row of M / c / r, and a column of it.
struct RowNumbers {
  const float* first;
  int step;
  const float* columns;
  float row;
  KVQ_HD float operator[](int i) const { return first[i * step] / columns[i] / row; }
};
struct ColumnNumbers {
  const float* first;
  int step;
  float column;
  const float* rows;
  KVQ_HD float operator[](int i) const { return first[i * step] / column / rows[i]; }
};

// Standard deviation with n - 1.
template <typename Numbers>
KVQ_HD inline float Deviation(const Numbers& x, int n) {
  float sum = 0, squares = 0;
  for (int i = 0; i < n; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(n);
  for (int i = 0; i < n; ++i) {
    const float off = x[i] - mean;
    squares += off * off;
  }
  return sqrtf(squares / static_cast<float>(n - 1));
}

// Largest over smallest.
KVQ_HD inline float Imbalance(const float* deviations, int n) {
  float least = deviations[0], most = deviations[0];
  for (int i = 1; i < n; ++i) {
    least = Smaller(deviations[i], least);
    most = Larger(deviations[i], most);
  }
  return most / Larger(least, 1e-8f);
}

KVQ_HD inline float Moved(float scale, float deviation) {
  return plain::Clamped(scale * plain::Clamped(deviation, 1e-3f, 1e3f), kLeast, kMost);
}

// Memory of a tile: scales now and the best ones, standard deviations, and which tokens are lost.
struct Balance {
  float column[kTile], row[kTile], best_column[kTile], best_row[kTile], column_deviation[kTile], row_deviation[kTile];
  bool lost[kTile];
};

// Finds the best scales of a tile: `team` shares the work, and all of it has called Sync before.
template <typename Team>
KVQ_HD inline void Solve(const float* numbers, const Shape& shape, Balance& balance, const Team& team) {
  const auto deviations_of_columns = [&] {
    for (int c = team.rank; c < shape.columns; c += team.size) {
      balance.column_deviation[c] =
          Deviation(ColumnNumbers{numbers + c * shape.column_step, shape.row_step, balance.column[c], balance.row}, shape.rows);
    }
  };
  const auto deviations_of_rows = [&] {
    for (int r = team.rank; r < shape.rows; r += team.size) {
      balance.row_deviation[r] =
          Deviation(RowNumbers{numbers + r * shape.row_step, shape.column_step, balance.column, balance.row[r]}, shape.columns);
    }
  };
  for (int i = team.rank; i < kTile; i += team.size) balance.column[i] = balance.row[i] = 1;
  team.Sync();
  float best = 0;
  for (int round = 0; round <= kRounds; ++round) {
    if (round > 0) {
      for (int c = team.rank; c < shape.columns; c += team.size) {
        balance.column[c] = Moved(balance.column[c], balance.column_deviation[c]);
      }
      team.Sync();
      deviations_of_rows();
      team.Sync();
      for (int r = team.rank; r < shape.rows; r += team.size) balance.row[r] = Moved(balance.row[r], balance.row_deviation[r]);
      team.Sync();
    }
    deviations_of_columns();
    deviations_of_rows();
    team.Sync();
    const float imbalance = Imbalance(balance.column_deviation, shape.columns) + Imbalance(balance.row_deviation, shape.rows);
    if (round == 0 || imbalance <= best) {
      best = imbalance;
      for (int c = team.rank; c < shape.columns; c += team.size) balance.best_column[c] = balance.column[c];
      for (int r = team.rank; r < shape.rows; r += team.size) balance.best_row[r] = balance.row[r];
    }
    team.Sync();
  }
}

// Smallest number and step of a row of balanced numbers.
struct RowFit {
  float low, step;
};
template <int kBits>
KVQ_HD inline RowFit FitRow(const RowNumbers& x, int n) {
  const GroupRange range = plain::Range(x, n);
  return {plain::PlusZero(range.low), Larger((range.high - range.low) / kMaxCode<kBits>, 1e-10f)};
}
template <int kBits>
KVQ_HD inline uint32_t Code(const RowFit& fit, float balanced) {
  return static_cast<uint32_t>(RoundCode((balanced - fit.low) / fit.step, kMaxCode<kBits>));
}

// What is kept of a scale or a minimum.
KVQ_HD inline uint16_t Stored(float v, bool lost) {
  return lost ? uint16_t{0x7E00} : FloatToHalf(plain::Clamped(v, -65504, 65504));
}

// Whether a token cannot be kept.
template <typename Numbers>
KVQ_HD inline bool IsLost(const Numbers& x, int n) {
  const float largest = plain::Magnitude(x, n);
  return !(largest <= 65504);
}

// A number of the tile that has token `slot`: of keys' rows and values' columns one for each channel, else one for each token.
KVQ_HD inline uint16_t* Of(const KvView& view, int plane, bool of_channels, int64_t b, int64_t h, int64_t slot,
                           int64_t channel) {
  return of_channels ? MetadataRow(view, plane, view.head_dim, b, h, slot / kTile) + channel
                     : MetadataRow(view, plane, 1, b, h, slot);
}

// What a code becomes: `scale` and `low` are its row's, `factor` its column's.
KVQ_HD inline float Value(float code, float scale, float low, float factor) { return (code * scale + low) * factor; }

#ifndef __CUDACC__
namespace {

template <int kBits, bool kKeys>
void Encode(const CodecParams&, const DenseView& x, int64_t first_token, const KvView& out) {
  const int64_t dim = x.head_dim, tiles = x.tokens / kTile;
  ForEach(/*parallel=*/true, x.batch * x.heads * tiles, [&](int64_t index) {
    const int64_t b = index / tiles / x.heads, h = index / tiles % x.heads, first = index % tiles * kTile;
    const int64_t slot = first_token + first;
    const Shape shape(kKeys, static_cast<int>(dim), static_cast<int>(dim));
    std::vector<float> numbers(kTile * dim);
    std::vector<uint8_t> codes(kTile * dim);
    Balance balance;
    for (int64_t t = 0; t < kTile; ++t) {
      float* token = &numbers[t * dim];
      LoadRow(x.data, x.dtype, Offset(x, b, h, first + t, 0), dim, token);
      balance.lost[t] = IsLost(token, static_cast<int>(dim));
      if (balance.lost[t]) std::fill_n(token, dim, 0.0f);
      plain::Hadamard(token, static_cast<int>(dim), static_cast<int>(dim), plain::Alone{});
    }
    Solve(numbers.data(), shape, balance, plain::Alone{});
    for (int r = 0; r < shape.rows; ++r) {
      const RowNumbers row{&numbers[r * shape.row_step], shape.column_step, balance.best_column, balance.best_row[r]};
      const RowFit fit = FitRow<kBits>(row, shape.columns);
      for (int c = 0; c < shape.columns; ++c) {
        codes[r * shape.row_step + c * shape.column_step] = static_cast<uint8_t>(Code<kBits>(fit, row[c]));
      }
      const bool lost = !kKeys && balance.lost[r];
      const int64_t token = kKeys ? 0 : r, channel = kKeys ? r : 0;
      *Of(out, 1, kKeys, b, h, slot + token, channel) = Stored(balance.best_row[r] * fit.step, lost);
      *Of(out, 2, kKeys, b, h, slot + token, channel) = Stored(balance.best_row[r] * fit.low, lost);
    }
    for (int c = 0; c < shape.columns; ++c) {
      *Of(out, 3, !kKeys, b, h, slot + (kKeys ? c : 0), kKeys ? 0 : c) = Stored(balance.best_column[c], kKeys && balance.lost[c]);
    }
    for (int64_t t = 0; t < kTile; ++t) PackRow<kBits>(&codes[t * dim], dim, CodeRow<kBits>(out, b, h, slot + t));
  });
}

template <bool kKeys>
KVQ_VECTOR void DecodeRow(const float* scales, const float* lows, const float* factors, int64_t n, float* x) {
  for (int64_t d = 0; d < n; ++d) {
    const int64_t row = kKeys ? d : 0, column = kKeys ? 0 : d;
    x[d] = Value(x[d], scales[row], lows[row], factors[column]);
  }
}

template <int kBits, bool kKeys, bool kTurnsBack>
void Decode(const CodecParams&, const KvView& in, int64_t first_token, const DenseView& out) {
  const int64_t dim = out.head_dim;
  const int64_t tiles = out.tokens / kTile;
  ForEach(/*parallel=*/AreMany(out), out.batch * out.heads * tiles, [&](int64_t index) {
    const int64_t b = index / tiles / out.heads, h = index / tiles % out.heads, first = index % tiles * kTile;
    const int64_t slot = first_token + first;
    const int64_t rows = kKeys ? dim : kTile, columns = kKeys ? kTile : dim;
    FewNumbers<float> scales(rows), lows(rows), factors(columns), values(dim);
    LoadRow(Of(in, 1, kKeys, b, h, slot, 0), DType::kFloat16, 0, rows, scales.data());
    LoadRow(Of(in, 2, kKeys, b, h, slot, 0), DType::kFloat16, 0, rows, lows.data());
    LoadRow(Of(in, 3, !kKeys, b, h, slot, 0), DType::kFloat16, 0, columns, factors.data());
    for (int64_t t = 0; t < kTile; ++t) {
      const int64_t row = kKeys ? 0 : t, column = kKeys ? t : 0;
      UnpackRow<kBits>(CodeRow<kBits>(in, b, h, slot + t), dim, values.data());
      DecodeRow<kKeys>(scales.data() + row, lows.data() + row, factors.data() + column, dim, values.data());
      if (kTurnsBack) plain::Hadamard(values.data(), static_cast<int>(dim), static_cast<int>(dim), plain::Alone{});
      StoreRow(values.data(), dim, out.dtype, Offset(out, b, h, first + t, 0), out.data);
    }
  });
}

constexpr int kThreads = 256, kDecodeTokens = 16;

KernelLaunch KernelOf(const char* kernel, int bits, bool keys, const DenseView& x, int tokens, size_t shared_bytes) {
  return {.instance = {{"kernels/schemes/kvarn.cc"}, InstanceName(kernel, bits, keys, TypeName(x.dtype))},
          .grid = {static_cast<unsigned>(x.tokens / tokens), static_cast<unsigned>(x.heads), static_cast<unsigned>(x.batch)},
          .threads = kThreads,
          .shared_bytes = shared_bytes,
          .early = false};
}
template <int kBits, bool kKeys>
void EncodeCuda(const CodecParams&, const DenseView& x, int64_t first_token, const KvView& out, void* stream) {
  if (RowsOf(x) == 0) return;
  const size_t shared = sizeof(Balance) + kTile * (x.head_dim + 1) * sizeof(float);
  Launch("kvarn encode", KernelOf("kvq::kvarn::EncodeKernel", kBits, kKeys, x, kTile, shared), stream, x, first_token, out);
}
template <int kBits, bool kKeys>
void DecodeCuda(const CodecParams&, const KvView& in, int64_t first_token, const DenseView& out, void* stream) {
  if (RowsOf(out) == 0) return;
  Launch("kvarn decode", KernelOf("kvq::kvarn::DecodeKernel", kBits, kKeys, out, kDecodeTokens, 0), stream, in, first_token, out);
}

// ---- the rows

template <int kBits, bool kKeys>
Codec MakeCodec(double nmse, const char* golden) {
  Codec codec;
  codec.bits = kBits;
  codec.head_dim_multiple = kRunChannels<kBits>, codec.head_dims = kTurnedHeadDims;
  codec.grouping = kKeys ? "128 consecutive tokens of one channel, turned and balanced"
                         : "all channels of one token, turned and balanced over 128 tokens";
  codec.min_block_tokens = kTile;
  codec.block_wide = true;  // though which multiple of 128 a block is does not matter
  codec.turned = true;
  codec.planes = [](int64_t /*heads*/, int64_t head_dim, const CodecParams& params) -> std::vector<Plane> {
    if (params.group_size != 0) throw InputError("kvarn takes tiles of 128 tokens for groups; leave out @group");
    CheckHeadDims("kvarn", kTurnedHeadDims, head_dim);
    const Plane codes{"codes", head_dim * kBits / 8};
    if (kKeys) return {codes, {"scales", head_dim * 2, kTile}, {"minima", head_dim * 2, kTile}, {"columns", 2}};
    return {codes, {"scales", 2}, {"minima", 2}, {"columns", head_dim * 2, kTile}};
  };
  codec.encode = Encode<kBits, kKeys>;
  codec.decode = Decode<kBits, kKeys, true>;
  codec.host.decode_turned = Decode<kBits, kKeys, false>;
  codec.encode_cuda = EncodeCuda<kBits, kKeys>;
  codec.decode_cuda = DecodeCuda<kBits, kKeys>;
  codec.nmse = nmse;
  codec.nmse_source = "torch 2.11.0, from KVarN's reference, head_dim 128";
  codec.golden = golden;
  return codec;
}

constexpr char kSource[] = "KVarN (arXiv 2606.03458), reference in huawei-csl/KVarN f9806bd";

const RegisterScheme k4{{.name = "kvarn-4", .source = kSource, .keys = MakeCodec<4, true>(9.775e-3, "kvarn-4-keys.json"),
                         .values = MakeCodec<4, false>(9.776e-3, "kvarn-4-values.json"), .refused = ""}};
const RegisterScheme k2{{.name = "kvarn-2", .source = kSource, .keys = MakeCodec<2, true>(0.2457, "kvarn-2-keys.json"),
                         .values = MakeCodec<2, false>(0.2459, "kvarn-2-values.json"), .refused = ""}};

}  // namespace

#else
// ---- CUDA: the same bits. A block has a tile, or 16 tokens of one.

struct Block {
  int rank, size;
  __device__ __forceinline__ void Sync() const { __syncthreads(); }
};

template <int kBits, bool kKeys, DType kType>
__global__ void __launch_bounds__(256) EncodeKernel(DenseView x, int64_t first_token, KvView out) {
  extern __shared__ __align__(16) char memory[];
  Balance& balance = *reinterpret_cast<Balance*>(memory);
  float* numbers = reinterpret_cast<float*>(memory + sizeof(Balance));  // [token][channel], one more a token
  constexpr int kFields = 16 / kBits;
  const int64_t b = blockIdx.z, h = blockIdx.y, first = int64_t{blockIdx.x} * kTile;
  const int64_t slot = TokenBase(out) + first_token + first;
  const Block block{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  const int dim = static_cast<int>(x.head_dim), pitch = dim + 1, words = dim * kBits / 32;
  const Shape shape(kKeys, dim, pitch);
  for (int i = block.rank; i < kTile * dim; i += block.size) {
    numbers[i / dim * pitch + i % dim] = LoadElement(x.data, kType, Offset(x, b, h, first + i / dim, i % dim));
  }
  block.Sync();
  for (int t = block.rank; t < kTile; t += block.size) balance.lost[t] = IsLost(numbers + t * pitch, dim);
  block.Sync();
  for (int i = block.rank; i < kTile * dim; i += block.size) {
    if (balance.lost[i / dim]) numbers[i / dim * pitch + i % dim] = 0;
  }
  block.Sync();
  for (int t = block.rank / 32; t < kTile; t += block.size / 32) {
    // In shared memory: a thread has no registers left for it.
    plain::Scale(numbers + t * pitch, dim, 1 / sqrtf(static_cast<float>(dim)), plain::Warp{block.rank % 32});
    plain::Butterflies(numbers + t * pitch, dim, dim, plain::Warp{block.rank % 32});
  }
  block.Sync();
  Solve(numbers, shape, balance, block);
  // What rows are fit with takes the place of the scales' last round.
  for (int r = block.rank; r < shape.rows; r += block.size) {
    const RowFit fit =
        FitRow<kBits>({numbers + r * shape.row_step, shape.column_step, balance.best_column, balance.best_row[r]}, shape.columns);
    balance.row[r] = fit.low, balance.row_deviation[r] = fit.step;
    const bool lost = !kKeys && balance.lost[r];
    const int64_t token = kKeys ? 0 : r, channel = kKeys ? r : 0;
    *Of(out, 1, kKeys, b, h, slot + token, channel) = Stored(balance.best_row[r] * fit.step, lost);
    *Of(out, 2, kKeys, b, h, slot + token, channel) = Stored(balance.best_row[r] * fit.low, lost);
  }
  for (int c = block.rank; c < shape.columns; c += block.size) {
    *Of(out, 3, !kKeys, b, h, slot + (kKeys ? c : 0), kKeys ? 0 : c) = Stored(balance.best_column[c], kKeys && balance.lost[c]);
  }
  block.Sync();
  for (int i = block.rank; i < kTile * words; i += block.size) {
    const int t = i / words, place = i % words, chunk = place / (words / 4), w = place % (words / 4);
    uint32_t word = 0;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll 2  // each is three divisions, and registers are few
      for (int field = 0; field < kFields; ++field) {
        const int d = static_cast<int>(ChannelOf<kBits>(chunk, w, side, field)), r = kKeys ? d : t, c = kKeys ? t : d;
        const float balanced = numbers[t * pitch + d] / balance.best_column[c] / balance.best_row[r];
        word |= Code<kBits>({balance.row[r], balance.row_deviation[r]}, balanced) << (16 * side + field * kBits);
      }
    }
    reinterpret_cast<uint32_t*>(CodeRow<kBits>(out, b, h, slot + t))[place] = word;
  }
}

template <int kBits, bool kKeys, DType kType>
__global__ void __launch_bounds__(256) DecodeKernel(KvView in, int64_t first_token, DenseView out) {
  constexpr int kTokens = 16;
  __shared__ float numbers[kTokens * (128 + 1)];
  const int64_t b = blockIdx.z, h = blockIdx.y, first = int64_t{blockIdx.x} * kTokens, slot = first_token + first;
  const Block block{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  const int dim = static_cast<int>(out.head_dim), pitch = dim + 1;
  for (int i = block.rank; i < kTokens * dim; i += block.size) {
    const int t = i / dim, d = i % dim;
    const WordPlace place = PlaceOf<kBits>(d, dim * kBits / 128);
    const uint32_t word = reinterpret_cast<const uint32_t*>(CodeRow<kBits>(in, b, h, slot + t))[place.word];
    const auto of = [&](int plane, bool of_channels) { return HalfToFloat(*Of(in, plane, of_channels, b, h, slot + t, d)); };
    numbers[t * pitch + d] =
        Value(static_cast<float>(word >> place.shift & ((1u << kBits) - 1)), of(1, kKeys), of(2, kKeys), of(3, !kKeys));
  }
  block.Sync();
  for (int t = block.rank / 32; t < kTokens; t += block.size / 32) {
    plain::Hadamard(numbers + t * pitch, dim, dim, plain::Warp{block.rank % 32});
  }
  block.Sync();
  for (int i = block.rank; i < kTokens * dim; i += block.size) {
    StoreElement(out.data, kType, Offset(out, b, h, first + i / dim, i % dim), numbers[i / dim * pitch + i % dim]);
  }
}

#endif  // __CUDACC__

}  // namespace kvq::kvarn
