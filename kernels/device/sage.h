// Attention whose logits are products of 8-bit codes: SageAttention (Zhang et al., arXiv:2410.02367), its form with a
// scale for a block of tokens.
//
// Q, times scale * log2 e, and K, minus its mean over all tokens, become int8 codes with one scale for kSageQueries
// and kSageKeys tokens of a head: largest magnitude / 127, codes rounded to the nearest, half to even. The mean adds
// the same number to all logits of a query, which softmax does not see; what it removes is the offset that some
// channels of keys have, which would take up the codes' range. Softmax in float32, tile by tile of kSageKeys tokens as
// FlashAttention-2 does; its weights and V are multiplied in the type of V (float16 as in the paper, bfloat16 where the
// model is) and summed in float32.
#pragma once

#include <cstdint>

#include "kernels/views.h"

namespace kvq {

inline constexpr int64_t kSageQueries = 128, kSageKeys = 64;  // tokens that share a scale

// Everything of one type. Query head i reads KV head i / (queries.heads / keys.heads). The queries belong to the last
// queries.tokens of keys.tokens tokens and see the tokens up to their own.
struct SageArgs {
  DenseView queries, keys, values, out;
  double scale = 1;           // of q . k, above 0
  void* workspace = nullptr;  // LayOutSage().bytes, 16-byte aligned; left with codes, scales and means
};

// What is in the workspace. Tokens are padded to whole blocks, with codes 0.
struct SageWorkspace {
  int8_t *query_codes, *key_codes;   // [batch, heads, blocks * tokens of a block, head_dim]
  float *query_scales, *key_scales;  // [batch, heads, blocks]
  float* key_sums;                   // [batch, kv_heads, blocks, head_dim]
  float* key_means;                  // [batch, kv_heads, head_dim]
  int64_t bytes;
};
SageWorkspace LayOutSage(const SageArgs&);

// On the CPU, the recipe as it stands: slow. float32 (nothing is rounded to 16 bits then), float16 or bfloat16;
// head_dim 64 or 128. Both throw InputError for shapes and types that they do not know.
void SageAttention(const SageArgs&);

// On the current GPU (sm_80 and later), asynchronous on `stream` (a cudaStream_t): the same codes and scales, the same
// tiles. float16 or bfloat16, rows aligned to 16 bytes. Throws std::runtime_error when a launch fails.
void SageAttentionCuda(const SageArgs&, void* stream);

}  // namespace kvq
