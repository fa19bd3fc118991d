// What decode attention (attention.cuh) makes of heads as a product has left them: its own queries, and the newest token.
#pragma once

#include "kernels/device/attention_tiles.cuh"
#include "kernels/device/step.cuh"

namespace kvq::decode_attention {

// As StageQueries, of what a product has left, each head normed and turned by a warp. The newest token's keys and values are, too, by the
// last two warps of the block that has it; they go to where they are stored and to shared memory (`rows`, words of a row each), from where
// they come into the tile that has been fetched without them. `meanwhile` is called when all that is read has been asked for. `appends`
// says how many tokens there are with the newest, or -1 where another block has it.
template <class C, typename Meanwhile, typename Appends>
__device__ __forceinline__ void StageMadeHeads(const DecodeAttentionArgs& args, int pair, int part, int ratio, int warp, uint32_t* queries,
                                               uint32_t* rows, const Meanwhile& meanwhile, const Appends& appends) {
  using Head = step::HeadOfWarp<C::kBFloat16, (C::kDim + 127) / 128>;
  constexpr int kRowWords = C::kDim / 2;
  const int kv_heads = static_cast<int>(args.keys.heads), query_heads = static_cast<int>(args.query_heads);
  const int sequence = pair / kv_heads, first = part * ratio - sequence * query_heads;  // of the block's query heads
  const bool of_keys = warp == C::kWarps - 1;
  const auto from = [&](int head) {
    return static_cast<const uint16_t*>(args.made_of) + static_cast<int64_t>(sequence * (query_heads + 2 * kv_heads) + head) * C::kDim;
  };
  const int head_of_query = first + min(warp, ratio - 1);
  Head query(args.heads, args.heads.q_norm, sequence, head_of_query), newest = query;
  query.Load(from(head_of_query));
  if (warp >= C::kWarps - 2) {
    const int head = query_heads + (of_keys ? 0 : kv_heads) + pair - sequence * kv_heads;
    newest = Head(args.heads, of_keys ? args.heads.k_norm : args.heads.v_norm, sequence, head);
    newest.Load(from(head));
  }
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
      more.Load(from(first + head));
      more.Finish(C::kDim, args.heads.eps, put_query(head));
    }
  }
  if (warp >= C::kWarps - 2) {
    if (const int tokens = appends(); tokens >= 0) {
      const KvView& view = of_keys ? args.keys : args.values;
      std::byte* const first_row = view.planes[0] + pair * view.plane_stride[0];
      uint32_t* const to = reinterpret_cast<uint32_t*>(first_row) + static_cast<int64_t>(max(tokens - 1, 0)) * kRowWords;
      newest.Finish(C::kDim, args.heads.eps, [&](int channel, uint32_t word) {
        rows[(of_keys ? 0 : kRowWords) + channel / 2] = word;
        if (tokens > 0) to[channel / 2] = word;
      });
    }
  }
  __syncthreads();
}

// Into the last row of a tile with so many tokens, by a warp. Values behind it become zero: what has been asked for ahead of the lengths
// may be anything there.
template <class C>
__device__ __forceinline__ void PutNewest(const uint32_t* rows, ptx::Shared tile, int tokens) {
  constexpr int kRowWords = C::kDim / 2, kOfValues = C::V::kRow / 4;
  const int row = tokens - 1, lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (C::kAsksFirst) {
#pragma unroll 1
    for (int i = tokens * kOfValues + lane; i < C::kTile * kOfValues; i += 32) ptx::StoreShared(tile + C::kValuesAt + i * 4, 0);
  }
#pragma unroll
  for (int i = 0; i < 2 * kRowWords; i += 32) {
    const int word = (i + lane) % kRowWords;
    const ptx::Shared of_side = tile + (i < kRowWords ? 0 : C::kValuesAt), granule = word / 4 ^ C::K::SwizzleOf(row);
    ptx::StoreShared(of_side + row * C::K::kRow + granule * 16 + word % 4 * 4, rows[i + lane]);
  }
  __syncwarp();
}

}  // namespace kvq::decode_attention
