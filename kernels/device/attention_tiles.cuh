// Decode attention on the tile that one warp has in shared memory: queries, logits, weights and sums as operands of
// m16n8k16 products. Why they are as they are: kernels/device/attention.cuh.
//
// Lane 4 g + t throughout: g = 0..7, t = 0..3.
#pragma once

#include <algorithm>

#include "kernels/device/attention.h"
#include "kernels/code_row.h"

#ifdef __CUDACC__
#include "kernels/device/ptx.cuh"

namespace kvq::decode_attention {

constexpr float kLog2E = 1.44269504f;
constexpr float kNoReference = -1e30f;  // m before the first token
constexpr float kHeadroom = 8;          // a new m puts the largest p s at 2^kHeadroom
constexpr float kOverflow = 32768;      // and p s above this asks for a new m

// Everything that is fixed when a kernel is compiled. kBits = 16: tokens as they are, no groups.
template <int kBits_, int kGroup_, int kDim_, int kHeadTiles_>
struct Config {
  static constexpr int kBits = kBits_, kGroup = kGroup_, kDim = kDim_, kHeadTiles = kHeadTiles_;
  static constexpr bool kDense = kBits == 16;
  static constexpr int kHeads = 8 * kHeadTiles;                // columns for query heads
  static constexpr int kSteps = kDim / 16;                     // of a product over channels
  static constexpr int kWordSteps = kDense ? 1 : 8 / kBits;    // steps in one word of codes
  static constexpr int kRow = kDim * kBits / 8;                // bytes of a token's codes
  static constexpr int kGranules = kRow / 16;
  static constexpr int kGroups = kDense ? 1 : kDim / kGroup;
  static constexpr int kMeta = kDense ? 0 : 2 * kGroups;       // bytes of a token's scales, and of its zeros
  static constexpr int kTokenBytes = 2 * (kRow + 2 * kMeta);   // keys and values

  // One block an SM, its shared memory rings of three tiles a warp. Latency times bandwidth is 40 KB an SM; with some
  // 110 KB in flight a call is fastest, with twice that warps get their data so unevenly that the last one is late
  // (seen on an H200).
  static constexpr int kStages = 3, kSharedLimit = 226 * 1024, kInFlight = 112 * 1024;
  static constexpr int kWarps = 8 * kStages * 16 * kTokenBytes <= kSharedLimit ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTile = !kDense && kWarps * kStages * 32 * kTokenBytes <= kInFlight ? 32 : 16;  // tokens
  static constexpr int kTileBytes = kTile * kTokenBytes;
  // What leaves room for a block of the product that follows, which then fetches its weights meanwhile.
  // Larger shapes could not do without.
  static constexpr int kRegisters = kThreads == 256 && kHeadTiles == 1 && kDim <= 128 ? 184 : 255;
  static constexpr int kHeadStride = kDim + 4;  // floats, in the merge: lanes of one store in different banks
  static constexpr int kMergeBytes = kWarps * kHeads * (kHeadStride + 2) * 4;
  static constexpr int kSharedBytes = std::max(kWarps * kStages * kTileBytes, kMergeBytes);
  static_assert(kTileBytes % 128 == 0 && kSharedBytes <= kSharedLimit);

  // Rows lie one behind the other, but for the order of 16-byte granules within 128 bytes: granule i of a row is at
  // i ^ SwizzleOf(row). So the lanes of one read, which want the same granule of rows 2 t, or neighbouring ones of
  // neighbouring rows, hit different banks. Linear: SwizzleOf(a ^ b) = SwizzleOf(a) ^ SwizzleOf(b); 0 for 8 n.
  KVQ_HD static constexpr int SwizzleOf(int row) {
    return kDense            ? (row & 6) ^ (row & 1) << 2
           : kGranules >= 8 ? row & 7
                            : row / (8 / kGranules) & (kGranules - 1);
  }

  // log2 of what a field (2 * (step in its word) + half) has too much as float16, besides 2^-24: see Unpack.
  KVQ_HD static constexpr int FieldShift(int field) {
    return kBits == 8 ? 0 : kBits == 4 ? field % 2 * 4 : field < 5 ? 2 * field : 2 * (field - 5);
  }
};

// All fields of a word as pairs of float16, times 2^(FieldShift - 24).
template <int kBits>
__device__ __forceinline__ void Unpack(uint32_t word, uint32_t (&pairs)[16 / kBits]) {
  if constexpr (kBits == 8) {
    pairs[0] = word & 0x00FF00FF;
    pairs[1] = ptx::PickBytes(word, 0, 0x4341);
  } else if constexpr (kBits == 4) {
    pairs[0] = word & 0x000F000F;
    pairs[1] = word & 0x00F000F0;
    pairs[2] = word >> 8 & 0x000F000F;
    pairs[3] = word >> 8 & 0x00F000F0;
  } else {
#pragma unroll
    for (int field = 0; field < 5; ++field) pairs[field] = word & 0x00030003 << 2 * field;
#pragma unroll
    for (int field = 5; field < 8; ++field) pairs[field] = word >> 10 & 0x00030003 << 2 * (field - 5);
  }
}

// Scales (or zeros) of one token, of all groups.
template <class C>
struct Meta {
  uint32_t words[(C::kGroups + 1) / 2];
  __device__ __forceinline__ explicit Meta(ptx::Shared at) {
    if constexpr (C::kGroups == 1) {
      words[0] = ptx::LoadShared16(at);
    } else {
      ptx::LoadShared(at, words);
    }
  }
  __device__ __forceinline__ float operator[](int group) const { return ptx::HalfAt(words[group / 2], group % 2); }
};

// ---- what a warp knows. Heads 8 ht + 2 t and + 1 are this lane's, `i` = 0 and 1 below.

// Of its tokens: for each head the reference m (the same in all lanes), a share of the sum l of 2^(logit - m), of
// the sum of p s z, and sums of p v: channels by rows g (o0, o1) and g + 8 (o2, o3) of a product.
template <class C>
struct Partial {
  float o[C::kHeadTiles][C::kSteps][4];
  float m[C::kHeadTiles][2], l[C::kHeadTiles][2];
  float zero[C::kHeadTiles][2][C::kGroups];

  __device__ __forceinline__ Partial() {
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        m[ht][i] = kNoReference, l[ht][i] = 0;
#pragma unroll
        for (int group = 0; group < C::kGroups; ++group) zero[ht][i][group] = 0;
      }
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[ht][step][i] = 0;
      }
    }
  }

  // Moves a head's reference so that the largest of all lanes' `top` = log2(p s) + m is at kHeadroom.
  __device__ __forceinline__ void Rebase(int ht, int i, float top) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
    const float moved = fmaxf(m[ht][i], fmaxf(top - kHeadroom, 0.1f * kNoReference));
    const float factor = ptx::Exp2(m[ht][i] - moved);
    m[ht][i] = moved;
    l[ht][i] *= factor;
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) zero[ht][i][group] *= factor;
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) o[ht][step][i] *= factor, o[ht][step][i + 2] *= factor;
  }
};

// The query heads of one KV head as the right operand of products over channels: head 8 ht + g.
template <class C>
struct Queries {
  uint32_t b[C::kHeadTiles][C::kSteps][2];
  float sum[C::kHeadTiles][2][C::kGroups];  // over a group's channels, times 2^-24
  float factor[C::kHeadTiles][2];           // of a product, to the logit in base 2
};

// nullptr past the last head.
template <class C>
__device__ __forceinline__ const uint32_t* QueryRow(const DecodeAttentionArgs& args, int pair, int head) {
  const int ratio = static_cast<int>(args.query_heads / args.keys.heads);
  if (head >= ratio) return nullptr;
  return static_cast<const uint32_t*>(args.queries) +
         (static_cast<int64_t>(pair) * ratio + head) * (C::kDim / 2);
}

// As they are, as products over codes want them: channels 2 t, 2 t + 1 of each half step.
template <class C>
__device__ void LoadQueries(const DecodeAttentionArgs& args, int pair, int g, int t, Queries<C>& q) {
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
    const uint32_t* row = QueryRow<C>(args, pair, 8 * ht + g);
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        q.b[ht][step][half] = row == nullptr ? 0 : __ldcg(row + 8 * step + 4 * half + t);
      }
    }
  }
}

// After LoadQueries, for codes: times the power of two that puts a head's largest into [2^14, 2^15), for float16 at most
// 2^30, and less by the fields' shifts.
template <class C>
__device__ void PrepareQueries(const DecodeAttentionArgs& args, int t, Queries<C>& q) {
  const bool half = args.dtype == DType::kFloat16;
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 2 * C::kSteps; ++i) {
      const uint32_t magnitudes = q.b[ht][i / 2][i % 2] & 0x7FFF7FFF;
      top = half ? ptx::MaxHalf(top, magnitudes) : ptx::MaxBFloat16(top, magnitudes);
    }
    float largest = half ? fmaxf(ptx::HalfAt(top, 0), ptx::HalfAt(top, 1))
                         : fmaxf(ptx::BFloat16At(top, 0), ptx::BFloat16At(top, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 16u), half ? 127u + 15 : 127u + 127);
    int up = 14 + 127 - static_cast<int>(exponent);
    if (half) {  // packed, by powers of two up to 2^15, so twice where the numbers are small
      up = min(up, 30);  // enough: a float16 below 2^-16 has few bits
      const int once = min(up, 15), again = up - once;
      const auto power = [](int e) {
        return static_cast<uint32_t>(e + 15) << 10 | static_cast<uint32_t>(e + 15) << 26;
      };
      if (__any_sync(~0u, again != 0)) {
#pragma unroll
        for (int i = 0; i < 2 * C::kSteps; ++i) {
          uint32_t& word = q.b[ht][i / 2][i % 2];
          word = ptx::MultiplyHalf(word, power(again));
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * C::kSteps; ++i) {
        uint32_t& word = q.b[ht][i / 2][i % 2];
        word = ptx::MultiplyHalf(word, power(once - C::FieldShift(i % (2 * C::kWordSteps))));
      }
    } else {
      const float factor = __uint_as_float(static_cast<uint32_t>(up + 127) << 23);
#pragma unroll
      for (int i = 0; i < 2 * C::kSteps; ++i) {
        const float of_field = factor / static_cast<float>(1 << C::FieldShift(i % (2 * C::kWordSteps)));
        uint32_t& word = q.b[ht][i / 2][i % 2];
        word = ptx::PackHalf(ptx::BFloat16At(word, 0) * of_field, ptx::BFloat16At(word, 1) * of_field);
      }
    }
    // The sums over a group's channels: products with codes that are all 1.
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
      float sum[4] = {0, 0, 0, 0};
#pragma unroll
      for (int step = group * C::kGroup / 16; step < (group + 1) * C::kGroup / 16; ++step) {
        const uint32_t ones[2] = {0x00010001u << C::FieldShift(2 * (step % C::kWordSteps)),
                                  0x00010001u << C::FieldShift(2 * (step % C::kWordSteps) + 1)};
        ptx::MmaHalf(sum, ones[0], ones[0], ones[1], ones[1], q.b[ht][step][0], q.b[ht][step][1]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) q.sum[ht][i][group] = sum[i];
    }
    // From lanes of head g to lanes of heads 2 t and 2 t + 1.
    const float down = __uint_as_float(static_cast<uint32_t>(127 - up) << 23);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      q.factor[ht][i] = __shfl_sync(~0u, args.scale * kLog2E * down * 16777216.0f, 8 * t + 4 * i);
    }
  }
}

// For dense tokens, whose lanes read 8 neighbouring channels at once, 32 j + 8 t + 0..7: steps 2 j and 2 j + 1.
template <class C>
__device__ void LoadQueriesForDense(const DecodeAttentionArgs& args, int pair, int g, int t, Queries<C>& q) {
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
    const uint32_t* row = QueryRow<C>(args, pair, 8 * ht + g);
#pragma unroll
    for (int step = 0; step < C::kSteps; step += 2) {
      uint4 v = {0, 0, 0, 0};
      if (row != nullptr) v = __ldcg(reinterpret_cast<const uint4*>(row + 8 * step + 4 * t));
      q.b[ht][step][0] = v.x, q.b[ht][step][1] = v.y;
      q.b[ht][step + 1][0] = v.z, q.b[ht][step + 1][1] = v.w;
    }
    q.factor[ht][0] = q.factor[ht][1] = args.scale * kLog2E;
  }
}

// ---- a tile of encoded tokens

// Where a lane reads in a tile: key codes, value codes, [key scales, zeros, value scales, zeros].
template <class C>
struct TileReader {
  static constexpr int kWords = C::kRow / 16;  // of a chunk
  static constexpr int kVector = kWords < 4 ? kWords : 4;
  static constexpr int kPlane = C::kTile * C::kMeta;

  ptx::Shared keys;    // chunk t of row g
  ptx::Shared values;  // chunk g / 2 of row 2 t
  ptx::Shared meta;    // token g

  __device__ __forceinline__ TileReader(ptx::Shared tile, int g, int t)
      : keys(tile + Place(g, t)),
        values(tile + C::kTile * C::kRow + Place(2 * t, g / 2)),
        meta(tile + 2 * C::kTile * C::kRow + g * C::kMeta) {}

  __device__ __forceinline__ static int Place(int row, int chunk) {
    return row * C::kRow + (chunk * kWords * 4 ^ C::SwizzleOf(row) * 16);
  }
  // Words `first` and on, of chunk t of row g + `on`, a multiple of 8.
  __device__ __forceinline__ void KeyWords(int on, int first, uint32_t (&words)[kVector]) const {
    ptx::LoadShared((keys ^ first * 4) + on * C::kRow, words);
  }
  // Of chunk g / 2 of row 2 t + `on`, 8 n or 8 n + 1.
  __device__ __forceinline__ void ValueWords(int on, int first, uint32_t (&words)[kVector]) const {
    ptx::LoadShared((values ^ (first * 4 ^ C::SwizzleOf(on % 8) * 16)) + on * C::kRow, words);
  }
  // Plane p of meta, token g + `on`.
  __device__ __forceinline__ Meta<C> MetaOf(int p, int on) const {
    return Meta<C>(meta + p * kPlane + on * C::kMeta);
  }
};

template <class C>
__device__ __forceinline__ void AttendCodes(ptx::Shared tile, int valid, int g, int t, const Queries<C>& q,
                                            Partial<C>& partial) {
  using Reader = TileReader<C>;
  constexpr int kBlocks = C::kTile / 16;  // of sixteen tokens: rows of a product, then its sums
  constexpr int kWords = Reader::kWords, kVector = Reader::kVector, kFields = 16 / C::kBits;
  const Reader reader(tile, g, t);

  // Logits, but for a factor: of token 16 n + g (x0, x1: head i) and 8 more (x2, x3).
  float x[C::kHeadTiles][kBlocks][4];
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const Meta<C> scale[2] = {reader.MetaOf(0, 16 * n), reader.MetaOf(0, 16 * n + 8)};
    const Meta<C> zero[2] = {reader.MetaOf(1, 16 * n), reader.MetaOf(1, 16 * n + 8)};
    float sum[C::kHeadTiles][4];
#pragma unroll
    for (int first = 0; first < kWords; first += kVector) {
      uint32_t words[2][kVector];
      reader.KeyWords(16 * n, first, words[0]);
      reader.KeyWords(16 * n + 8, first, words[1]);
#pragma unroll
      for (int w = 0; w < kVector; ++w) {
        uint32_t low[kFields], high[kFields];
        Unpack<C::kBits>(words[0][w], low);
        Unpack<C::kBits>(words[1][w], high);
#pragma unroll
        for (int s = 0; s < C::kWordSteps; ++s) {
          const int step = (first + w) * C::kWordSteps + s, group = step * 16 / C::kGroup;
#pragma unroll
          for (int ht = 0; ht < C::kHeadTiles; ++ht) {
            float(&d)[4] = sum[ht];
            if (step * 16 % C::kGroup == 0) d[0] = d[1] = d[2] = d[3] = 0;
            ptx::MmaHalf(d, low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1], q.b[ht][step][0],
                         q.b[ht][step][1]);
            if ((step + 1) * 16 % C::kGroup != 0) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float centred = fmaf(-zero[i / 2][group], q.sum[ht][i % 2][group], d[i]);
              x[ht][n][i] = fmaf(scale[i / 2][group], centred, group == 0 ? 0.0f : x[ht][n][i]);
            }
          }
        }
      }
    }
  }
  if (valid < C::kTile) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (16 * n + g + i / 2 * 8 < valid) continue;
#pragma unroll
        for (int ht = 0; ht < C::kHeadTiles; ++ht) x[ht][n][i] = -INFINITY;
      }
    }
    // Where there is no token, what lies in the planes is anything, and 0 times that must be 0.
    const ptx::Shared values_meta = tile + 2 * C::kTile * C::kRow + 2 * Reader::kPlane;
    for (int i = valid * C::kMeta + 2 * (4 * g + t); i < Reader::kPlane; i += 64) {
      ptx::ZeroShared16(values_meta + i);
      ptx::ZeroShared16(values_meta + Reader::kPlane + i);
    }
    __syncwarp();
  }

  // p s, of heads 2 t and 2 t + 1 in one word: of token 16 n + g, and 8 more.
  uint32_t weights[C::kHeadTiles][C::kGroups][kBlocks][2];
  for (bool rebase = partial.m[0][0] == kNoReference;;) {  // all heads get their first reference together
    if (rebase) {
#pragma unroll
      for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float highest = -INFINITY;
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const Meta<C> scale = reader.MetaOf(2, 16 * n + 8 * half);
              float largest = 0x1p-24f;
#pragma unroll
              for (int group = 0; group < C::kGroups; ++group) largest = fmaxf(largest, scale[group]);
              highest = fmaxf(highest, fmaf(x[ht][n][2 * half + i], q.factor[ht][i], ptx::Log2(largest)));
            }
          }
          partial.Rebase(ht, i, highest);
        }
      }
    }
    uint32_t top = 0;
    float l[C::kHeadTiles][2], z[C::kHeadTiles][2][C::kGroups];
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        l[ht][i] = partial.l[ht][i];
#pragma unroll
        for (int group = 0; group < C::kGroups; ++group) z[ht][i][group] = partial.zero[ht][i][group];
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Meta<C> scale = reader.MetaOf(2, 16 * n + 8 * half), zero = reader.MetaOf(3, 16 * n + 8 * half);
#pragma unroll
        for (int ht = 0; ht < C::kHeadTiles; ++ht) {
          float p[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            p[i] = ptx::Exp2(fmaf(x[ht][n][2 * half + i], q.factor[ht][i], -partial.m[ht][i]));
            l[ht][i] += p[i];
          }
#pragma unroll
          for (int group = 0; group < C::kGroups; ++group) {
            float weight[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              weight[i] = p[i] * scale[group];
              z[ht][i][group] = fmaf(weight[i], zero[group], z[ht][i][group]);
            }
            weights[ht][group][n][half] = ptx::PackHalf(weight[0], weight[1]);
            top = ptx::MaxHalf(top, weights[ht][group][n][half]);
          }
        }
      }
    }
    rebase = __any_sync(~0u, fmaxf(ptx::HalfAt(top, 0), ptx::HalfAt(top, 1)) > kOverflow);
    if (rebase) continue;
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        partial.l[ht][i] = l[ht][i];
#pragma unroll
        for (int group = 0; group < C::kGroups; ++group) partial.zero[ht][i][group] = z[ht][i][group];
      }
    }
    break;
  }

  // Values: channels 16 step + g and + 8 of tokens 2 t, 2 t + 1 and 8 more, from the halves `side` of words.
  const uint32_t side = g % 2 == 0 ? 0x5410 : 0x7632;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    // Heads 2 t, 2 t + 1 of token g become tokens 2 t, 2 t + 1 of head g.
    uint32_t b[C::kHeadTiles][C::kGroups][2];
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group) {
#pragma unroll
        for (int half = 0; half < 2; ++half) b[ht][group][half] = ptx::Transpose(weights[ht][group][n][half]);
      }
    }
#pragma unroll
    for (int first = 0; first < kWords; first += kVector) {
      uint32_t words[4][kVector];
#pragma unroll
      for (int i = 0; i < 4; ++i) reader.ValueWords(16 * n + i % 2 + i / 2 * 8, first, words[i]);
#pragma unroll
      for (int w = 0; w < kVector; ++w) {
        uint32_t low[kFields], high[kFields];
        Unpack<C::kBits>(ptx::PickBytes(words[0][w], words[1][w], side), low);
        Unpack<C::kBits>(ptx::PickBytes(words[2][w], words[3][w], side), high);
#pragma unroll
        for (int s = 0; s < C::kWordSteps; ++s) {
          const int step = (first + w) * C::kWordSteps + s, group = step * 16 / C::kGroup;
#pragma unroll
          for (int ht = 0; ht < C::kHeadTiles; ++ht) {
            ptx::MmaHalf(partial.o[ht][step], low[2 * s], low[2 * s + 1], high[2 * s], high[2 * s + 1],
                         b[ht][group][0], b[ht][group][1]);
          }
        }
      }
    }
  }
}

// ---- sixteen dense tokens. key(i, j) gives granule 4 j + t of token g + 8 i; value(i, j) granule 8 j + g of
// token 2 t + i, i = 0, 1, 8, 9; any numbers where no token is

template <class C, bool kBFloat16, typename Key, typename Value>
__device__ __forceinline__ void AttendDense(int valid, int g, const Queries<C>& q, Partial<C>& partial,
                                            const Key& key, const Value& value) {
  const auto multiply = [](float(&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           const uint32_t(&b)[2]) {
    if constexpr (kBFloat16) {
      ptx::MmaBFloat16(d, a0, a1, a2, a3, b[0], b[1]);
    } else {
      ptx::MmaHalf(d, a0, a1, a2, a3, b[0], b[1]);
    }
  };
  float x[C::kHeadTiles][4] = {};
#pragma unroll
  for (int step = 0; step < C::kSteps; step += 2) {
    const uint4 low = key(0, step / 2), high = key(1, step / 2);
#pragma unroll
    for (int ht = 0; ht < C::kHeadTiles; ++ht) {
      multiply(x[ht], low.x, high.x, low.y, high.y, q.b[ht][step]);
      multiply(x[ht], low.z, high.z, low.w, high.w, q.b[ht][step + 1]);
    }
  }
  uint32_t b[C::kHeadTiles][2];
#pragma unroll
  for (int ht = 0; ht < C::kHeadTiles; ++ht) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (g + i / 2 * 8 >= valid) x[ht][i] = -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float top = fmaxf(x[ht][i], x[ht][i + 2]) * q.factor[ht][i];
      // The largest p stays below 2^15 here, too.
      const bool rebase = partial.m[ht][i] == kNoReference || top > partial.m[ht][i] + 15;
      if (__any_sync(~0u, rebase)) partial.Rebase(ht, i, top);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float p[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        p[i] = ptx::Exp2(fmaf(x[ht][2 * half + i], q.factor[ht][i], -partial.m[ht][i]));
        partial.l[ht][i] += p[i];
      }
      b[ht][half] = ptx::Transpose(kBFloat16 ? ptx::PackBFloat16(p[0], p[1]) : ptx::PackHalf(p[0], p[1]));
    }
  }
  // Values: channels 64 j + 8 g + 2 w and + 1 are rows g and g + 8 of step 4 j + w.
#pragma unroll
  for (int j = 0; j < C::kDim / 64; ++j) {
    uint32_t words[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = value(i % 2 + i / 2 * 8, j);
      words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // row g or g + 8, tokens 2 t, 2 t + 1 or 8 more
        a[i] = ptx::PickBytes(words[i / 2 * 2][w], words[i / 2 * 2 + 1][w], i % 2 == 0 ? 0x5410 : 0x7632);
      }
#pragma unroll
      for (int ht = 0; ht < C::kHeadTiles; ++ht) {
        multiply(partial.o[ht][4 * j + w], a[0], a[1], a[2], a[3], b[ht]);
      }
    }
  }
}

}  // namespace kvq::decode_attention
#endif  // __CUDACC__
