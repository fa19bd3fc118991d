// The newest token of every sequence, encoded within a decoding step: for caches that encode every token as it comes.
#pragma once

#include "kernels/scheme.h"
#include "kernels/turn.h"

namespace kvq {

// One side of a layer: x [batch, heads, 1, head_dim], float16 or bfloat16, to slot *out.token_base of `out`, turned before.
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

}  // namespace kvq
