// Fused decode attention: one query a sequence over tokens that are read as they are stored, whatever codecs keys and
// values have (Codec::device).
#pragma once

#include <cstddef>
#include <cstdint>
#ifndef __CUDACC__
#include <string>
#endif

#include "kernels/device/heads.h"
#include "kernels/turn.h"
#include "kernels/views.h"

namespace kvq {

// Where the tokens of one sequence are, in the order in which attention counts them: sinks, encoded, residual.
struct SequenceLength {
  int32_t sinks = 0;     // in sink_keys, sink_values
  int32_t encoded = 0;   // in keys, values
  int32_t residual = 0;  // in residual_keys, residual_values
};

// out = softmax(scale q K^T) V for one query a sequence and query head, over all of its tokens; 0 where there are
// none. Query head i reads KV head i / (query_heads / keys.heads).
//
// Everything here is fixed for a captured CUDA graph; what changes from step to step is in device memory: the
// lengths, and what the pointers point to. The launch is sized by the capacities.
struct DecodeAttentionArgs {
  DType dtype = DType::kFloat16;  // of queries, out and all dense tokens: float16 or bfloat16
  int64_t query_heads = 0;        // a whole number a KV head
  const void* queries = nullptr;  // [batch, query_heads, head_dim], contiguous, 16-byte aligned
  void* out = nullptr;            // likewise
  float scale = 1;                // of the logits, above 0: usually head_dim^-0.5
  float softcap = 0;              // above 0: softcap * tanh(logit / softcap) stands for each logit
  // [query_heads] in device memory, or null: a logit of each head that counts in the sum of weights and has no value.
  const float* sink_logits = nullptr;

  // The encoded tokens. Planes and their strides are multiples of 16 bytes. Of a dense side plane 0 holds the tokens
  // themselves: [batch, heads, capacity, head_dim] of dtype.
  KvView keys, values;
  CodecParams key_params, value_params;
  // The tokens in dtype before and behind them, [batch, heads, tokens, head_dim], rows 16-byte aligned; empty
  // views (tokens = 0) where the lengths are always 0. Where one side alone is dense, its residual stands behind its
  // `encoded` tokens, and the view of it begins with the first of those.
  DenseView sink_keys, sink_values, residual_keys, residual_values;

  // Where encoded tokens are turned (kernels/turn.h), the query is turned and the output turned back, both in float32. Head_dims
  // of 64, 128 and 256; turned values have no dense tokens beside them.
  Turn key_turn, value_turn;

  // A sliding window: the query, which is the newest token's, sees so many tokens, itself among them; 0: all.
  int32_t window = 0;

  const SequenceLength* lengths = nullptr;  // [batch] in device memory, none above its capacity
  // Of values, where these have other tokens encoded than keys; null: `lengths`. As many tokens in all. Of the tokens that are
  // encoded on one side alone the other has dense ones; neither side is turned.
  const SequenceLength* value_lengths = nullptr;
  // The residual of values is a ring: behind e encoded ones, number i is in slot (e + i) % residual_values.tokens.
  bool values_in_ring = false;

  // The tokens that `lengths` counted before, or counts now, were written before the kernel began that precedes this
  // one on the stream, but for the newest of `none` or where newest_is_encoded: fetching the encoded ones may begin before
  // that kernel has ended.
  // The lengths themselves may still change until then; they are read again.
  bool early = false;
  // The newest of the encoded tokens is one that the kernel before this has encoded, or that this one does.
  bool newest_is_encoded = false;
  // [batch, keys.heads, head_dim] in dtype, or null: the newest token, which is encoded here, to where `lengths` says, and then
  // read as all others are. Of codecs and head_dims that DecodeAttentionEncodes knows, with newest_is_encoded and like lengths.
  const void *newest_keys = nullptr, *newest_values = nullptr;

  // [batch, query_heads + 2 keys.heads, head_dim] in dtype, or null: queries, and the newest token's keys and values, as a product has left
  // them. Each block norms and turns its queries by `heads`, and the newest token, which one of each part writes to where `lengths` says.
  // Where DecodeAttentionMakesHeads; `queries` is not read then, and all tokens count as encoded. Tokens behind the lengths, up to the
  // capacity, may be read then, whatever they are, and count for nothing.
  const void* made_of = nullptr;
  HeadsArgs heads;

  // DecodeAttentionWorkspace() bytes of device memory, 256-byte aligned, all zero before the first launch; launches leave it fit
  // for the next. Not to be shared by launches that may overlap.
  void* workspace = nullptr;
};

#ifndef __CUDACC__
struct Codec;  // kernels/scheme.h

// Whether there is a kernel for the pair: both sides have a device codec.
bool HasDecodeAttention(const Codec& keys, const Codec& values);

// Whether it encodes the newest token of a side with this codec.
bool DecodeAttentionEncodes(const Codec& codec, int64_t head_dim);

// Whether it makes heads of what a product leaves.
bool DecodeAttentionMakesHeads(const Codec& keys, const Codec& values, int64_t head_dim);

// The kernel that these shapes get on the current device, and what it was compiled for, in words for results:
// "fused_decode_int8+int4 (sm_90: 8 warps x 3 x 32 tokens)".
std::string DecodeAttentionName(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args);

// Bytes of workspace for these shapes on the current device; reads no pointer.
int64_t DecodeAttentionWorkspace(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args);

// Asynchronous, one launch on `stream` (a cudaStream_t), whose blocks may wait for each other: on one device at most two such
// launches at a time. Throws InputError for shapes that no kernel knows, std::runtime_error when the launch fails.
void DecodeAttention(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args, void* stream);
#endif

}  // namespace kvq
