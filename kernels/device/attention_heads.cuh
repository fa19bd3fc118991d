// What decode attention (attention.cuh) makes of heads as a product has left them: its own queries, and the newest token.
#pragma once

#include "kernels/device/attention_tiles.cuh"
#include "kernels/device/step.cuh"

namespace kvq::decode_attention {

// As StageQueries, of what a product has left, each head normed and turned by a warp. The newest token's keys and values are, too, by the last
// two warps of the block that has it (`appends`); they go to where they are stored and to shared memory, from where they come into the tile
// that has been fetched without them.
template <class C>
struct MadeHeads {
  using Head = step::HeadOfWarp<C::kBFloat16, (C::kDim + 127) / 128>;
  // Keys and values of the newest token in shared memory, words of a row each.
  static constexpr int kRowWords = C::kDim / 2;
  const DecodeAttentionArgs& args;
  const int sequence, first;      // first: of the block's query heads
  const bool of_keys, of_newest;  // of the warp
  const int head_of_newest;
  Head query, newest;  // the warp's first query head
  const uint16_t *query_at, *newest_at;
  uint32_t* append_to;  // the newest side's row of the first token

  __device__ __forceinline__ MadeHeads(const DecodeAttentionArgs& args, int pair, int part, int ratio, int warp, bool appends)
      : args(args),
        sequence(pair / static_cast<int>(args.keys.heads)),
        first(part * ratio - sequence * static_cast<int>(args.query_heads)),
        of_keys(warp == C::kWarps - 1),
        of_newest(appends && warp >= C::kWarps - 2),
        head_of_newest(static_cast<int>(args.query_heads + (of_keys ? 0 : args.keys.heads)) + pair - sequence * static_cast<int>(args.keys.heads)),
        query(args.heads, args.heads.q_norm, sequence, first + min(warp, ratio - 1)),
        newest(args.heads, of_keys ? args.heads.k_norm : args.heads.v_norm, sequence, head_of_newest),
        query_at(From(first + min(warp, ratio - 1))),
        newest_at(From(head_of_newest)) {
    const KvView& view = of_keys ? args.keys : args.values;
    append_to = reinterpret_cast<uint32_t*>(view.planes[0] + pair * view.plane_stride[0]);
  }
  __device__ __forceinline__ const uint16_t* From(int head) const {
    const int64_t all = args.query_heads + 2 * args.keys.heads;
    return static_cast<const uint16_t*>(args.made_of) + (sequence * all + head) * C::kDim;
  }

  // `encoded`: tokens, with the newest. `meanwhile` is called when all that is read has been asked for.
  template <typename Meanwhile>
  __device__ __forceinline__ void Stage(int ratio, int warp, int encoded, uint32_t* queries, uint32_t* rows,
                                        const Meanwhile& meanwhile) {
    if (warp < ratio) query.Load(query_at);
    if (of_newest) newest.Load(newest_at);
    meanwhile();
    const auto put_query = [&](int head) {
      return [=](int channel, uint32_t word) { queries[C::QueryWord(head, channel / 2)] = word; };
    };
#pragma unroll
    for (int first_head = 0; first_head < C::kHeads; first_head += C::kWarps) {
      const int head = first_head + warp;
      if (head >= ratio) {
        for (int word = threadIdx.x % 32; word < kRowWords; word += 32) put_query(head)(2 * word, 0);
      } else if (first_head == 0) {
        query.Finish(C::kDim, args.heads.eps, put_query(head));
      } else {
        Head more(args.heads, args.heads.q_norm, sequence, first + head);
        more.Load(From(first + head));
        more.Finish(C::kDim, args.heads.eps, put_query(head));
      }
    }
    if (of_newest) {
      uint32_t* const to = append_to + static_cast<int64_t>(max(encoded - 1, 0)) * kRowWords;
      newest.Finish(C::kDim, args.heads.eps, [&](int channel, uint32_t word) {
        rows[(of_keys ? 0 : kRowWords) + channel / 2] = word;
        if (encoded > 0) to[channel / 2] = word;
      });
    }
    __syncthreads();
  }
  // Into row `row` of a tile, by a warp.
  __device__ __forceinline__ static void PutNewest(const uint32_t* rows, ptx::Shared tile, int row) {
#pragma unroll
    for (int i = 0; i < 2 * kRowWords; i += 32) {
      const int word = (i + static_cast<int>(threadIdx.x) % 32) % kRowWords;
      const ptx::Shared of_side = tile + (i < kRowWords ? 0 : C::kValuesAt), granule = word / 4 ^ C::K::SwizzleOf(row);
      ptx::StoreShared(of_side + row * C::K::kRow + granule * 16 + word % 4 * 4, rows[i + static_cast<int>(threadIdx.x) % 32]);
    }
    __syncwarp();
  }
};

}  // namespace kvq::decode_attention
