// How far tensors are from what they should be.
#pragma once

#include <ATen/ATen.h>

namespace kvq {

// Half the distance of a type's neighbours at 1.
inline double Roundoff(at::ScalarType type) { return type == at::kHalf ? 0x1p-11 : type == at::kBFloat16 ? 0x1p-8 : 0x1p-24; }

// The norm of the difference, in float64, as a share of theirs.
inline double RelativeError(const at::Tensor& ours, const at::Tensor& theirs) {
  const at::Tensor exact = theirs.to(at::kDouble);
  return ((ours.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
}

}  // namespace kvq
