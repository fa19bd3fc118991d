// How far tensors are from what they should be.
#pragma once

#include <ATen/ATen.h>

namespace kvq {

// The norm of the difference, in float64, as a share of theirs.
inline double RelativeError(const at::Tensor& ours, const at::Tensor& theirs) {
  const at::Tensor exact = theirs.to(at::kDouble);
  return ((ours.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
}

}  // namespace kvq
