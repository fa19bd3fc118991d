// What happens to heads between their product and attention.
#pragma once

#include <cstdint>

#include "kernels/vector_math.h"
#include "kernels/views.h"

namespace kvq {

// Query and key heads behind their product: norm, and rotation of the channels i and i + turned / 2 of the first `turned`.
struct HeadsArgs {
  DType dtype = DType::kFloat16;
  int64_t rows = 0;  // tokens, of all sequences
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  const void* bias = nullptr;                        // [heads + 2 kv_heads, head_dim], or null
  const float *q_norm = nullptr, *k_norm = nullptr;  // [head_dim], or null
  float eps = 0;
  const float *cos = nullptr, *sin = nullptr;        // [positions, turned / 2]
  int64_t positions = 1;                             // row r is at position r % positions
  const float* v_norm = nullptr;                     // [head_dim], or null: of AppendHeads and attention
  int64_t turned = 0;                                // channels, the others stay; 0: all

  KVQ_HD int pairs() const { return static_cast<int>((turned == 0 ? head_dim : turned) / 2); }
  // Channels are worked on in pairs, first those that turn, then the others likewise: the first channel of pair i, and how far
  // from it the second is.
  KVQ_HD int First(int i) const { return i < pairs() ? i : i + pairs(); }
  KVQ_HD int Apart(int i) const { return i < pairs() ? pairs() : static_cast<int>(head_dim / 2) - pairs(); }
};

}  // namespace kvq
