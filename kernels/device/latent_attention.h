// Fused decode attention over latents (MLA, absorbed; section 2.1.2 of arXiv:2405.04434): all query heads of a sequence see
// one key a token, its latent beside its rotary key, and one value, the latent itself.
#pragma once

#include <cstddef>
#include <cstdint>
#ifndef __CUDACC__
#include <string>
#endif

#include "kernels/device/attention.h"
#include "kernels/views.h"

namespace kvq {

// One of the two parts of a token: where it is. What is encoded has sinks, codes and residual, as `length` counts them; of
// what is not all tokens are in `tokens`, in their order.
struct LatentSide {
  KvView codes;
  CodecParams params;
  DenseView tokens, sinks, residual;  // [batch, 1, tokens, channels] of dtype, rows aligned to 16 bytes; as many as lengths may come to
};

// out = softmax(scale q [c, r]^T) c for one query a sequence and head, over the latents c [rank] and rotary keys r [turned] of
// all of its tokens; 0 where there are none.
struct LatentAttentionArgs {
  DType dtype = DType::kFloat16;         // of queries, out and all dense tokens: float16 or bfloat16
  int64_t batch = 0, heads = 0;
  int64_t rank = 0, turned = 0;          // channels of a latent and of a rotary key
  const void* queries = nullptr;         // [batch, heads, rank + turned], contiguous, aligned to 16 bytes
  void* out = nullptr;                   // [batch, heads, rank], likewise
  float scale = 1;                       // of the logits
  LatentSide latents, rotary_keys;
  int64_t capacity = 0;                  // tokens that a launch may have to read: grids are sized by it
  // Sinks and residual are 0 where nothing is encoded on either side. [batch] in device memory, or null: all have `length`.
  const SequenceLength* lengths = nullptr;
  SequenceLength length;
  // As DecodeAttentionArgs has them; the newest of `none` is that where neither side is encoded.
  bool early = false, newest_is_encoded = false;
  // LatentAttentionWorkspace() bytes of device memory, 256-byte aligned, whatever is in them. Not to be shared by launches that
  // may overlap.
  void* workspace = nullptr;
};

#ifndef __CUDACC__
struct Codec;  // kernels/scheme.h

// Whether there is a kernel for the pair: device codecs that read a token alone, and turn none.
bool HasLatentAttention(const Codec& latents, const Codec& rotary_keys);

// As DecodeAttentionName, DecodeAttentionWorkspace and DecodeAttention of kernels/device/attention.h; two launches.
std::string LatentAttentionName(const Codec& latents, const Codec& rotary_keys, const LatentAttentionArgs& args);
int64_t LatentAttentionWorkspace(const Codec& latents, const Codec& rotary_keys, const LatentAttentionArgs& args);
void LatentAttention(const Codec& latents, const Codec& rotary_keys, const LatentAttentionArgs& args, void* stream);
#endif

}  // namespace kvq
