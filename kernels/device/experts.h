// The experts of a mixture in a decoding step: which ones each token goes through, and their two products, read as they lie in
// one block a layer. As kernels/device/step.h: asynchronous, fit for captured graphs, the host knows no choice.
//
// Limit: the bytes of the experts that any of the tokens has chosen, each read once, over memory bandwidth.
#pragma once

#include <cstdint>

#include "kernels/device/step.h"

namespace kvq {

inline constexpr int kMostExperts = 512, kMostPerToken = 16;

// Of logits [rows, experts] the `per_token` largest of a row are its experts, of equal ones the first; their shares are a
// softmax over all, or, `normalized`, over them alone. With s the share and E an expert's products, a row is
// sum of s E_down (activation(E_gate x) * (E_up x)), each product with its bias where there are biases.
struct ExpertsArgs {
  DType dtype = DType::kFloat16;  // of all but partial
  int64_t rows = 0, hidden = 0, size = 0;  // size: of an expert between its two products
  int64_t experts = 0, per_token = 0;
  bool normalized = false;
  Gate activation = Gate::kSilu;
  const void* logits = nullptr;  // [rows, experts]
  const void* x = nullptr;       // [rows, hidden]
  const void* up = nullptr;      // [experts, gate and up, size, hidden]
  const void* down = nullptr;    // [experts, hidden, size]
  // [experts], [experts, gate and up, size], [experts, hidden]; or null. Logits and their bias lie at multiples of 4 bytes.
  const void *logit_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
  void* gated = nullptr;         // [rows, per_token, size]: from the one product to the other
  float* partial = nullptr;      // [rows, hidden], for AddNorm, of one split
  int32_t* chosen = nullptr;     // [rows, per_token]: the experts, by number
  uint32_t* ranked = nullptr;    // [rows, per_token]: what the first product tells the second of them
  // Experts that were read are added: each once for all tokens, or, where sizes are odd or rows more than eight, for so many.
  unsigned long long* reads = nullptr;
};
// At most kMostExperts and kMostPerToken.
bool ExpertsFit(const ExpertsArgs& args);

// `gated` of x, and `chosen`. Waits for what was launched before.
void ExpertsUp(const ExpertsArgs& args, void* stream);
// `partial` of `gated`; right behind ExpertsUp on the stream. It begins to read experts before that has ended, once all of its blocks
// have begun and one has left `ranked`.
void ExpertsDown(const ExpertsArgs& args, void* stream);

}  // namespace kvq
