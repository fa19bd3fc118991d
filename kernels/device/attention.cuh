// Fused decode attention: one query a sequence over sinks, encoded tokens and residual, in one launch that reads
// codes as they are stored (kernels/code_row.h). What it takes: kernels/device/attention.h.
//
// Limit: the bytes of the cache, each read once, over memory bandwidth. How it gets there:
//
// - A scale never touches an element. With codes c, scale s and zero z of a token's group, a logit is the sum over
//   groups of s (sum q c - z sum q): s and z meet one number a group and head. An output is the sum over tokens
//   of (p s) c, less the sum of p s z, one number a group: s and z meet the probability p.
// - A code becomes an operand by one `and`: a field of up to 8 bits at the bottom of 10 is a subnormal float16,
//   field * 2^-24, which tensor cores multiply in full; a field `o` bits higher has 2^o times that, which q
//   (keys) or the finished output (values) takes back, exactly. No offset is ever added or subtracted.
// - Queries become float16 times a power of two that puts the largest of a head into [2^14, 2^15): exact for
//   float16, and for bfloat16 (8 bits) whatever its range, except below 2^-28 of that largest, where the
//   error is 2^-39 of it: far below the rounding of the float32 sum.
// - p s is float16, relative to a running reference 2^m, kept such that the largest p s so far is in
//   (2^0, 2^15): m moves only when that overflows, seldom, and not at every tile. What is below 2^-24 is
//   lost: for a million such tokens 2^-12 of the sum. Sums are float32.
// - Warps share nothing while they stream: each has a ring of tiles in shared memory, filled by its own cp.async,
//   16 bytes a lane, in a swizzle that keeps its reads free of bank conflicts.
// - The tokens of a KV head are split among blocks by the lengths in device memory, in a grid sized by the
//   capacity alone, so that a captured graph serves every step. Of 16 bits a block's first tiles are where no length matters: where
//   it makes heads, too, and there is room for many tokens, it asks for them at once, and reads weights of norms later, as each instruction ahead of that copy, and of
//   the wait, comes late. Some of a KV head's share its query heads and combine all
//   blocks' parts. By then the weights of the product that follows are on their way, and a trip to device memory takes 2 us:
//   few blocks are one cluster, and combine in shared memory.
//
// The query heads of a KV head are rows of one product, eight (kHeadTiles = 1) or sixteen: they share every load.
#pragma once

#include "kernels/device/attention_combine.cuh"
#ifdef __CUDACC__
#include "kernels/device/attention_heads.cuh"
#include "kernels/device/attention_tiles.cuh"
#include "kernels/groups.h"
#endif

namespace kvq::decode_attention {

#ifdef __CUDACC__

// Where a sequence's tokens are: `encoded` on both sides, and behind them, dense on one side at least, the residual. Of those
// behind the sinks each side has encoded so many.
struct Reach : SequenceLength {
  int32_t keys = 0, values = 0;
};
template <class C>
__device__ __forceinline__ Reach ReachOf(const DecodeAttentionArgs& args, int b) {
  const auto read = [](const SequenceLength* at) {
    return SequenceLength{__ldcg(&at->sinks), __ldcg(&at->encoded), __ldcg(&at->residual)};
  };
  Reach reach{read(args.lengths + b)};
  reach.keys = reach.values = reach.encoded;
  if constexpr (C::kApart) {
    if (args.value_lengths != nullptr) reach.values = __ldcg(&args.value_lengths[b].encoded);
    const int all = reach.encoded + reach.residual;
    reach.encoded = min(reach.keys, reach.values), reach.residual = all - reach.encoded;
  }
  return reach;
}

// Tokens of a sequence that a sliding window hides, those before all others.
template <class C>
__device__ __forceinline__ int HiddenTokens(const DecodeAttentionArgs& args, const SequenceLength& length) {
  if constexpr (!C::kWindow) return 0;
  return max(length.sinks + length.encoded + length.residual - args.window, 0);
}

// Sixteen tokens of sinks or residual, those among them that one side has encoded, straight from device memory: what lane 4 g + t of a warp needs of them.
template <class C>
struct DenseTokens {
  // Granules of a row from the lane's first one on; where the side has the token encoded, they are decoded.
  template <class R>
  struct Granules {
    const uint4* dense;
    const KvView* view;
    int pair, token, first;  // token: -1 where it is dense
    bool half;
    __device__ __forceinline__ uint4 operator[](int granule) const {
      if constexpr (C::kApart && !R::kDense) {
        if (token >= 0) {
          EncodedGranule<R, C::kDim> encoded;
          encoded.Load(*view, pair, token, first + granule);
          return encoded.Numbers(half);
        }
      }
      return __ldcg(dense + granule);
    }
  };
  // Granules 0, kStep, ... of rows, all of which are on their way before one is worked on.
  template <int kStep, class R, int kRows, int kGranules>
  __device__ __forceinline__ static void Fetch(const Granules<R> (&rows)[kRows], uint4 (&to)[kRows][kGranules]) {
    if constexpr (C::kApart && !R::kDense) {
      bool encoded = false;
#pragma unroll
      for (const Granules<R>& row : rows) encoded |= row.token >= 0;
      if (__any_sync(~0u, encoded)) {
        EncodedGranule<R, C::kDim> granules[kRows][kGranules];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kGranules; ++j) {
            granules[i][j].Load(*rows[i].view, rows[i].pair, max(rows[i].token, 0), rows[i].first + kStep * j);
          }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kGranules; ++j) {
            to[i][j] = rows[i].token >= 0 ? granules[i][j].Numbers(rows[i].half) : __ldcg(rows[i].dense + kStep * j);
          }
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kGranules; ++j) to[i][j] = __ldcg(rows[i].dense + kStep * j);
    }
  }
  Granules<typename C::K> key_rows[2];
  Granules<typename C::V> value_rows[4];
  uint4 keys[2][C::kDim / 32], values[4][C::kDim / 64];  // as LogitsOfDense and AddDense want them, where kEager
  int valid, hidden;

  __device__ __forceinline__ static int Units(const SequenceLength& length) {
    return (length.sinks + 15) / 16 + (length.residual + 15) / 16;
  }
  __device__ __forceinline__ void Load(const DecodeAttentionArgs& args, int pair, const Reach& length, int unit, int g, int t) {
    const int b = pair / static_cast<int>(args.keys.heads), h = pair % static_cast<int>(args.keys.heads);
    const int sink_units = (length.sinks + 15) / 16;
    const bool sinks = unit < sink_units;
    const DenseView& key_view = sinks ? args.sink_keys : args.residual_keys;
    const DenseView& value_view = sinks ? args.sink_values : args.residual_values;
    const int first = (sinks ? unit : unit - sink_units) * 16;
    valid = (sinks ? length.sinks : length.residual) - first;
    hidden = HiddenTokens<C>(args, length) - first - (sinks ? 0 : length.sinks + length.encoded);
    // Past the last token, that one again: its weight will be 0.
    const int last = min(valid, 16) - 1;
    constexpr bool half = !C::kBFloat16;
    const auto row = [&]<class R>(const DenseView& view, const KvView& codes, int encoded, bool ring, int token, int granule, R*) {
      int at = first + min(token, last), coded = -1;
      if (!sinks) {
        // A dense side beside an encoded one has its residual behind the tokens that are encoded on the other.
        if (R::kDense && C::kOneDense) encoded = 0;
        at += length.encoded;
        const int slots = static_cast<int>(view.tokens);
        if (C::kApart && !R::kDense && (at < encoded || slots == 0)) coded = min(at, max(encoded - 1, 0));
        at = C::kApart && ring ? at % slots : at - encoded;
        // Lengths that were read in the midst of a change, before they are read again, may not fit together.
        if (C::kApart || C::kOneDense) at = max(min(at, slots - 1), 0);
      }
      const auto* dense = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(view.data) + Offset(view, b, h, at, 0));
      return Granules<R>{dense + granule, &codes, pair, coded, granule, half};
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      key_rows[i] = row(key_view, args.keys, length.keys, false, g + 8 * i, t, static_cast<typename C::K*>(nullptr));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value_rows[i] = row(value_view, args.values, length.values, args.values_in_ring, 2 * t + i % 2 + i / 2 * 8, g,
                          static_cast<typename C::V*>(nullptr));
    }
    if constexpr (C::kEager) Fetch<4>(key_rows, keys), Fetch<8>(value_rows, values);
  }
  __device__ __forceinline__ void Attend(int g, const Queries<C>& q, float cap, Partial<C>& partial) const {
    Logits<C> x;
    // Fetched when they are wanted, not all at once: a barrier keeps their registers few.
    const auto fetch = [](const auto& row, int granule, bool first) {
      if (first) __syncwarp();
      return row[granule];
    };
    LogitsOfDense<C>(
        q, [&](int i, int j) { return C::kEager ? keys[i][j] : fetch(key_rows[i], 4 * j, i == 0 && j % 2 == 0); }, x);
    CapLogits<C>(q, cap, x);
    Mask<C>(x, 0, valid, hidden, g);
    AddDense<C>(Factors<C>(q).of, x, partial, [&](int i, int j) {
      const int row = i % 2 + i / 8 * 2;
      return C::kEager ? values[row][j] : fetch(value_rows[row], 8 * j, row == 0);
    });
  }
};

// ---- the ring of tiles of one warp, whose lanes copy every 32nd granule

template <class C>
struct Ring {
  // Copies of a lane: of keys, of values, of the planes behind them, which lie one behind the other in a tile.
  template <class R>
  static constexpr int kCopies = (C::kTile * R::kGranules + 31) / 32;
  using K = typename C::K;
  using V = typename C::V;
  static constexpr int kKeyMeta = K::TileBehind(C::kTile) / 16, kAllMeta = kKeyMeta + V::TileBehind(C::kTile) / 16;
  static constexpr int kMetaCopies = (kAllMeta + 31) / 32;
  static constexpr int kEncodesInstead = 160;  // tokens that are read in that time: on an H200 50 of q8_0, 200 of iq4_nl
  static constexpr bool kMayEncode = requires { typename K::Room; } || requires { typename V::Room; };
  // Granule n of those planes: whose it is, in which plane, what that has of a token, the place in it, and the tokens that share
  // it.
  struct Behind {
    bool of_keys;
    int plane, bytes, granule, tokens;
  };
  __device__ __forceinline__ static Behind BehindAt(int n) {
    Behind at{n < kKeyMeta, 1, 0, n < kKeyMeta ? n : n - kKeyMeta, 1};
    const auto find = [&]<class R>(R*) {
      at.tokens = R::kTokens;
      if constexpr (R::kPlanesBehind > 0) {
        at.bytes = R::PlaneBytes(0);
#pragma unroll
        for (int plane = 1; plane < R::kPlanesBehind; ++plane) {
          const int before = R::TilePlane(plane - 1, C::kTile) / 16;
          if (at.plane != plane || at.granule < before) continue;
          at.plane = plane + 1, at.granule -= before, at.bytes = R::PlaneBytes(plane);
        }
      }
    };
    if (at.of_keys) find(static_cast<K*>(nullptr));
    else find(static_cast<V*>(nullptr));
    return at;
  }

  ptx::Shared tiles;                    // [kStages, kTileBytes]
  ptx::Shared key_place, value_place;   // of the lane's first granule in a tile's rows
  const std::byte* keys;                // the lane's first granule of the tile that is fetched next
  const std::byte* values;
  const std::byte* meta[kMetaCopies > 0 ? kMetaCopies : 1];
  int first;   // of the warp's tiles
  int step;    // from one of them to the next
  int end;     // behind the block's last tile, or where tiles are dealt the sequence's
  int tokens;  // encoded ones of this sequence
  int hidden;  // of them, by a window

  template <class R>
  __device__ __forceinline__ static ptx::Shared PlaceOf(int lane) {
    const int row = lane / R::kGranules;
    return row * R::kRow + (lane % R::kGranules ^ R::SwizzleOf(row)) * 16;
  }

  // Of the tiles of all encoded tokens that are in sight, the equal share of a block, and of that every kWarps-th for this
  // warp; or, dealt, as many of all.
  __device__ __forceinline__ Ring(const DecodeAttentionArgs& args, int pair, const SequenceLength& length, int split,
                                  int splits, int warp, ptx::Shared tiles)
      : tiles(tiles), step(C::kWarps), tokens(length.encoded), hidden(0) {
    int before = 0;
    if constexpr (C::kWindow) {
      hidden = min(max(HiddenTokens<C>(args, length) - length.sinks, 0), tokens);
      before = hidden / C::kTile;
    }
    const int all = (tokens + C::kTile - 1) / C::kTile - before;
    // The last block has the newest token, whatever else. As it encodes that (or would), it has so much less to read.
    const int shared_out = all + (kMayEncode && args.newest_is_encoded ? kEncodesInstead / C::kTile : 0);
    const auto cut = [&](int i) {
      const int part = shared_out / splits * i + (shared_out % splits * i + splits - 1) / splits;  // of i / splits, in 32 bits
      return before + (i == splits ? all : max(min(part, all - 1), 0));
    };
    if constexpr (C::kDealt) {
      first = warp * splits + split, step = C::kWarps * splits, end = all;
    } else {
      first = cut(split) + warp, end = cut(split + 1);
    }
    const int lane = threadIdx.x % 32;
    key_place = PlaceOf<K>(lane), value_place = PlaceOf<V>(lane);
    static_assert(C::kWarps * C::kTile % K::kTokens == 0);
    const auto at = [&](const KvView& view, int plane, int token_bytes, int together) {
      return view.planes[plane] + pair * view.plane_stride[plane] +
             static_cast<int64_t>(first * C::kTile & ~(together - 1)) * token_bytes;
    };
    keys = at(args.keys, 0, K::kRow, 1) + lane * 16;
    values = at(args.values, 0, V::kRow, 1) + lane * 16;
#pragma unroll
    for (int i = 0; i < kMetaCopies; ++i) {
      const Behind behind = BehindAt(lane + 32 * i);
      meta[i] = at(behind.of_keys ? args.keys : args.values, behind.plane, behind.bytes, behind.tokens) + behind.granule * 16;
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void CopyTile(int tile, ptx::Shared to) const {
    const int lane = threadIdx.x % 32, left = tokens - tile * C::kTile;
    // Of 16 bits they come quicker as what is read once; of codes most do not.
    if constexpr (kWhole && C::kDense) to = ptx::OfLanes(to);
    const ptx::CachePolicy policy = ptx::ReadOnce();
    const auto copy = [&](ptx::Shared shared, const std::byte* global, int token) {
      if constexpr (kWhole && C::kDense) {
        ptx::CopyAsync(shared, global, policy);
      } else if constexpr (kWhole) {
        ptx::CopyAsync(shared, global);
      } else {
        ptx::CopyAsyncOrZero(shared, global, token < left);
      }
    };
    // The lane's granule i is 32 / kGranules rows on.
    const auto copy_row = [&]<class R>(int i, ptx::Shared rows, ptx::Shared place, const std::byte* from, R*) {
      if (C::kTile * R::kGranules % 32 != 0 && lane + 32 * i >= C::kTile * R::kGranules) return;
      copy(rows + (place ^ R::SwizzleOf(32 * i / R::kGranules) * 16) + 512 * i, from + 512 * i,
           (lane + 32 * i) / R::kGranules);
    };
#pragma unroll
    for (int i = 0; i < max(kCopies<K>, kCopies<V>); ++i) {
      if (i < kCopies<K>) copy_row(i, to, key_place, keys, static_cast<K*>(nullptr));
      if (i < kCopies<V>) copy_row(i, to + C::kValuesAt, value_place, values, static_cast<V*>(nullptr));
    }
#pragma unroll
    for (int i = 0; i < kMetaCopies; ++i) {
      const int n = lane + 32 * i;
      if (kAllMeta % 32 != 0 && n >= kAllMeta) continue;
      const Behind behind = BehindAt(n);
      copy(to + C::kKeyMetaAt + n * 16, meta[i], kWhole || behind.tokens > 1 ? 0 : behind.granule * 16 / max(behind.bytes, 1));
    }
  }

  __device__ __forceinline__ int Step() const { return C::kDealt ? step : C::kWarps; }

  // Begins to copy a tile, a step behind the one before; an empty group where there is none.
  __device__ __forceinline__ void Fetch(int tile, int stage) {
    if (tile < end) {
      if ((tile + 1) * C::kTile <= tokens) {
        CopyTile<true>(tile, tiles + stage * C::kTileBytes);
      } else {
        CopyTile<false>(tile, tiles + stage * C::kTileBytes);
      }
      keys += Step() * C::kTile * K::kRow;
      values += Step() * C::kTile * V::kRow;
#pragma unroll
      for (int i = 0; i < kMetaCopies; ++i) {
        meta[i] += C::kWarps * C::kTile * BehindAt(static_cast<int>(threadIdx.x) % 32 + 32 * i).bytes;
      }
    }
    ptx::CopyCommit();
  }

  // In place of those it was made with, where tiles are dealt.
  __device__ __forceinline__ void TakeLength(const SequenceLength& length) {
    tokens = length.encoded, end = (length.encoded + C::kTile - 1) / C::kTile;
  }

  // Begins to copy the warp's tiles from `begin` to `until`, which is kStages - 1 in the end: as many as the ring takes but one.
  __device__ __forceinline__ void Start(int begin, int until) {
#pragma unroll
    for (int stage = 0; stage < C::kStages - 1; ++stage) {
      if (stage >= begin && stage < until) Fetch(first + stage * Step(), stage);
    }
  }

  // Whether the block has any.
  __device__ __forceinline__ bool HasTiles(int split, int warp) const { return (C::kDealt ? split : first - warp) < end; }

  // How many of those there are before the one with the newest token.
  __device__ __forceinline__ int StagesBeforeNewest() const {
    const int newest = (tokens - 1) / C::kTile;
    int before = C::kStages - 1;
#pragma unroll
    for (int stage = 0; stage < C::kStages - 1; ++stage) {
      if (first + stage * Step() == newest) before = stage;
    }
    return before;
  }

  // After that: calls attend(tile, tokens in it, hidden ones of them, whether it has the newest) for its tiles, from the first on, below end.
  template <typename Attend>
  __device__ __forceinline__ void Stream(const Attend& attend) {
    ptx::Shared tile = tiles;
    int free = C::kStages - 1;
#pragma unroll 1
    for (int index = first; index < end; index += Step()) {
      ptx::CopyWait<C::kStages - 2>();
      __syncwarp();  // all lanes' copies have arrived, and all lanes are done with the tile before
      Fetch(index + (C::kStages - 1) * Step(), free);
      const int left = tokens - index * C::kTile;
      attend(tile, min(left, C::kTile), C::kWindow ? max(hidden - index * C::kTile, 0) : 0, left <= C::kTile);
      free = free + 1 == C::kStages ? 0 : free + 1;
      tile = tile + C::kTileBytes == tiles + C::kStages * C::kTileBytes ? tiles : tile + C::kTileBytes;
    }
    ptx::CopyWait<0>();
  }
};

// Which of a pair's blocks has the newest token's tile.
template <class C>
__device__ __forceinline__ int BlockOfNewest(const SequenceLength& length, int splits) {
  if constexpr (C::kDealt) return max(length.encoded - 1, 0) / C::kTile % splits;
  return splits - 1;
}

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

// The newest token of a pair, by the block's last two warps, keys and values, each in the stage of its ring that Start leaves free.
// Both go where they are stored; behind the block's next barrier, that of the queries, its warps find them there, too.
template <class C>
__device__ __forceinline__ void EncodeNewest(const DecodeAttentionArgs& args, int pair, int warp, std::byte* shared) {
  const auto encode = [&]<class R, bool kTurned>(const void* newest, const Turn& turn, const KvView& out, std::bool_constant<kTurned>, R*) {
    static_assert(sizeof(typename R::Room) <= C::kTileBytes);
    auto& room = *reinterpret_cast<typename R::Room*>(shared + (warp * C::kStages + C::kStages - 1) * C::kTileBytes);
    R::template Encode<kTurned>(room, static_cast<const uint32_t*>(newest) + static_cast<int64_t>(pair) * (C::kDim / 2),
                                !C::kBFloat16, turn, out, pair, &args.lengths[pair / static_cast<int>(out.heads)].encoded);
  };
  if constexpr (C::kEncodesKeys && C::kEncodesValues && C::kTurnsKeys == C::kTurnsValues && kSame<typename C::K, typename C::V>) {
    // One encoder's instructions for both: a multiprocessor holds those of a layer's kernels as long as they are few.
    if (warp < C::kWarps - 2) return;
    const bool keys = warp == C::kWarps - 1;
    encode(keys ? args.newest_keys : args.newest_values, keys ? args.key_turn : args.value_turn, keys ? args.keys : args.values,
           std::bool_constant<C::kTurnsKeys>(), static_cast<typename C::K*>(nullptr));
    return;
  }
  if constexpr (C::kEncodesKeys) {
    if (warp == C::kWarps - 1) {
      encode(args.newest_keys, args.key_turn, args.keys, std::bool_constant<C::kTurnsKeys>(), static_cast<typename C::K*>(nullptr));
    }
  }
  if constexpr (C::kEncodesValues) {
    if (warp == C::kWarps - 2) {
      encode(args.newest_values, args.value_turn, args.values, std::bool_constant<C::kTurnsValues>(), static_cast<typename C::V*>(nullptr));
    }
  }
}

template <class C>
__global__ void __maxnreg__(C::kRegisters)
    Kernel(const __grid_constant__ DecodeAttentionArgs args, int splits, int combiners) {
  extern __shared__ __align__(128) std::byte shared[];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = ptx::WarpNumber();
  if constexpr (C::kCluster > 1) splits = C::kCluster;
  // A part of a pair's query heads counts as a pair of its own in the workspace.
  const int part = blockIdx.x / splits, split = blockIdx.x % splits, pair = part / C::kParts;
  const int heads = static_cast<int>(args.keys.heads), ratio = static_cast<int>(args.query_heads) / heads / C::kParts;
  const auto ring_of = [&](const SequenceLength& of) {
    return Ring<C>(args, pair, of, split, splits, warp, ptx::SharedAddress(shared) + warp * C::kStages * C::kTileBytes);
  };
  const auto length_now = [&] { return ReachOf<C>(args, pair / heads); };
  LaunchDependents();
  if (!args.early) WaitForPredecessors();
  Reach length;
  if constexpr (C::kAsksFirst) length.encoded = static_cast<int>(args.keys.capacity);
  else length = length_now();
  Ring<C> ring = ring_of(length);
  // The newest token, of `none` or encoded within the step, is not there yet.
  int started = C::kMakesHeads || (!C::kDense && !args.newest_is_encoded) ? C::kStages - 1 : ring.StagesBeforeNewest();
  // Of 16 bits so many stages are asked for ahead of the queries, the rest right behind them: these come in their turn.
  constexpr int kAhead = C::kDense ? 1 : C::kStages - 1;
  static_assert(!C::kDense || !C::kTurnsKeys);
  ring.Start(0, min(kAhead, started));
  if (args.early) WaitForPredecessors();
  const Reach now = length_now();  // asked for together with the queries, as each comes late
  const auto ask_on = [&] {
    if constexpr (C::kAsksFirst) {
      length = now;
      ring.TakeLength(now);
    }
    ring.Start(kAhead, started);
  };
  if constexpr (C::kEncodes) {
    if (split == splits - 1) EncodeNewest<C>(args, pair, warp, shared);
  }
  Queries<C> q;
  auto* const turned = reinterpret_cast<float*>(shared + C::kQueriesAt);
  auto* const queries = reinterpret_cast<uint32_t*>(shared + C::kQueriesAt);
  [[maybe_unused]] auto* const newest_rows = reinterpret_cast<uint32_t*>(shared + C::kNewestAt);
  if constexpr (C::kTurnsKeys) {
    TurnQueries<C>(args, part, ratio, warp, turned);
    if constexpr (C::kEager) LoadTurnedQueries<C>(args, ratio, turned, g, t, q);
  } else {
    if constexpr (C::kMakesHeads) {
      const auto appends = [&] { return split == BlockOfNewest<C>(now, splits) ? now.encoded : -1; };
      StageMadeHeads<C>(args, pair, part, ratio, warp, queries, newest_rows, ask_on, appends);
    } else {
      StageQueries<C>(args, part, ratio, warp, queries, ask_on);
    }
    if constexpr (C::K::kDense) LoadQueriesForDense<C>(args, part, ratio, queries, g, t, q);
    else if constexpr (C::kEager) LoadQueries<C>(queries, g, t, q);
  }
  // The warps' sixteens of dense tokens are dealt to all blocks in turn, the last warps first, which may have a tile
  // less.
  int unit = split + (C::kWarps - 1 - warp) * splits;
  DenseTokens<C> tokens;
  Queries<C> dense_q;
  const auto load_dense = [&] {
    if (C::kEager && !C::kMakesHeads && unit < DenseTokens<C>::Units(length)) tokens.Load(args, pair, length, unit, g, t);
  };
  load_dense();
  const bool same = now.sinks == length.sinks && now.encoded == length.encoded && now.residual == length.residual &&
                    now.keys == length.keys && now.values == length.values;
  if (!C::kAsksFirst && !same) {
    length = now;  // a step began after we looked
    ptx::CopyWait<0>();
    ring = ring_of(length), started = 0;
    load_dense();
  }
  const int units = C::kMakesHeads ? 0 : DenseTokens<C>::Units(length);
  const bool has_dense = unit < units;
  if ((C::kEager || !C::K::kDense) && has_dense) LoadQueriesForDense<C>(args, part, ratio, queries, g, t, dense_q);
  ring.Start(started, C::kStages - 1);  // all that comes from memory is on its way before any of it is worked on

  if (ring.HasTiles(split, warp) || split < units) {
    Partial<C> partial, dense;
    while (unit < units) {
      Partial<C>& of = C::V::kDense ? partial : dense;
      if constexpr (!C::kEager) tokens.Load(args, pair, length, unit, g, t);
      tokens.Attend(g, C::K::kDense && !C::kEager ? q : dense_q, args.softcap, of);
      unit += C::kWarps * splits;
      if (C::kEager && unit < units) tokens.Load(args, pair, length, unit, g, t);
    }
    if (C::kShelf && has_dense) Shelve<C>(dense, ShelfOf<C>(shared, warp), g, t);
    if constexpr (C::kTurnsKeys) {
      if constexpr (!C::kEager) LoadTurnedQueries<C>(args, ratio, turned, g, t, q);
      SumQueries<C>(q);
    } else if constexpr (!C::K::kDense) {
      if constexpr (!C::kEager) LoadQueries<C>(queries, g, t, q);
      PrepareQueries<C>(args, t, q);
    }
    ring.Stream([&](ptx::Shared tile, int valid, int hidden, bool last) {
      if constexpr (C::kMakesHeads) {
        if (last) PutNewest<C>(newest_rows, tile, valid);
      }
      AttendTile<C>(tile, valid, hidden, g, t, q, args.softcap, partial);
    });
    Merge<C>(partial, warp, !C::V::kDense && has_dense, dense, ratio, shared, SlotOf<C>(args, splits, ratio, shared));
  } else {  // no tokens: the weight 0, and so outputs that are numbers
    if constexpr (C::kAsksFirst) ptx::CopyWait<0>();  // of a tile that holds none
    if constexpr (C::kCluster > 1) __syncthreads();  // the rings are done with
    const auto [sums, outputs] = SlotOf<C>(args, splits, ratio, shared);
    if constexpr (C::kCluster > 1) {
      if (threadIdx.x < ratio) sums[threadIdx.x] = {kNoReference, 0};
      for (int i = threadIdx.x; i < ratio * C::kHeadStride; i += C::kThreads) outputs[i] = 0;
    } else {
      if (threadIdx.x < ratio) Leave(sums + threadIdx.x, {kNoReference, 0});
#pragma unroll 1
      for (int i = threadIdx.x; i < ratio * C::kDim / 4; i += C::kThreads) Leave(reinterpret_cast<float4*>(outputs) + i, {0, 0, 0, 0});
    }
    __syncthreads();
  }
  if constexpr (C::kCluster > 1) {
    CombineInCluster<C>(args, part, split, ratio, warp, shared);
    return;
  }

  CombineSlots<C>(args, splits, combiners, ratio, shared);
}

#endif  // __CUDACC__

}  // namespace kvq::decode_attention
