// What two models' logits say about the tokens that really came.
#pragma once

#include <ATen/ATen.h>

namespace kvq {

// reference, logits [batch, n, vocab] float32, targets [batch, n] int64 -> [batch, n, 4] float64:
// nll of the reference, nll, KL(reference || other) in nats, and 1 where the likeliest token is the same.
at::Tensor ScoreTokens(const at::Tensor& reference, const at::Tensor& logits,
                       const at::Tensor& targets);

}  // namespace kvq
