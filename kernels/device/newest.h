// One token of every sequence, encoded within a decoding step: the newest, for caches that encode every token as it comes, or
// the oldest of a window.
#pragma once

#include <cstddef>

#include "kernels/scheme.h"
#include "kernels/turn.h"

namespace kvq {

// One side of a layer: of x [batch, heads, tokens, head_dim], float16 or bfloat16, number *out.token_base % tokens, turned before,
// to slot *out.token_base of `out`.
struct NewestToken {
  const Codec* codec = nullptr;
  CodecParams params;
  DenseView x;
  KvView out;
  Turn turn;
};

// Whether EncodeNewest knows the codec: plain schemes' alone.
inline bool EncodesNewest(const Codec& codec) { return codec.device.plain != nullptr; }

// Keys and values, or one of them (the other null), in one launch, the same bits as EncodeRotated. Asynchronous, fit for a
// captured graph; it may begin before its predecessor has ended.
void EncodeNewest(const NewestToken* keys, const NewestToken* values, void* stream);

// Several sides of one scheme and shape in one launch, as kernels want them described in device memory: NewestSideBytes()
// for each, which DescribeNewest writes to host memory.
int64_t NewestSideBytes();
void DescribeNewest(const NewestToken& token, std::byte* to);
// `first`: one of them; `sides`: all, described, in device memory.
void EncodeNewest(const NewestToken& first, const std::byte* sides, int64_t count, void* stream);

}  // namespace kvq
