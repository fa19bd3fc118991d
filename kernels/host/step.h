// The CPU's twins of kernels/device/step.h: what a decoding step of a few sequences does, for whichever type the model
// is in, float32 as well. They round where those do, and fixtures/decoder.cc does.
//
// A step reads every weight once: its limit is those bytes over memory bandwidth. So weights of 16 bits are widened in
// registers, on any processor with AVX2; and products and attention are dealt to threads in small pieces, so that a
// processor which others use, too, costs its share. Product and DecodeAttention are for processors that HasAvx2().
#pragma once

#include "kernels/deal.h"
#include "kernels/device/step.h"
#include "kernels/host/avx2.h"
#include "kernels/rotation.h"
#include "kernels/scheme.h"

namespace kvq::host {

void AddNorm(const AddNormArgs& args);  // no partial
void AddNormed(const AddNormedArgs& args);
void AppendHeads(const AppendArgs& args, const void* qkv);
void GateUp(const GateArgs& args, const void* up);
void Activate(const GateArgs& args, const void* gate);
void LayerInputs(const LayerInputsArgs& args);
void StartSteps(const StepState& state, int64_t batch, const int64_t* first, SequenceLength dense, SequenceLength append);
void BeginStep(const BeginArgs& args);
void CountSides(const CountArgs& args);
void PickTokens(const PickArgs& args);

// stored [rows, out] = x W^T, sums in float32, for any number of rows; without a norm, ProductEnd::kStore.
void Product(const ProductArgs& args);
// What it reads of the weight, by thread (kernels/deal.h).
Ahead AheadOf(const ProductArgs& args);

// ---- attention, one query a sequence over tokens that are read as they are stored

// Whether tokens of the pair can be read: dense ones and codes of most schemes (kernels/host/codes.h) as they are, and others by
// their codec, a block at a time.
bool HasDecodeAttention(const Codec& keys, const Codec& values);
// "host_decode_int4 (avx2)"
std::string DecodeAttentionName(const Codec& keys, const Codec& values);

// What caches may want that the GPU's kernels do not know.
struct CacheRules {
  Rotation key_rotation, value_rotation;  // of encoded tokens: queries are rotated for them, their output is rotated back
};

// As DecodeAttention of kernels/device/attention.h, but that dense tokens are in the types of their views, those in plane
// 0 in `tokens`. `args.workspace` is not used. Codes and 16-bit numbers are widened in registers or a first cache, what only a
// codec reads is decoded a block at a time. Of a scheme that turns tokens, queries are turned, and the output is turned back.
void DecodeAttention(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args, DType tokens,
                     const CacheRules& rules = {});

}  // namespace kvq::host
