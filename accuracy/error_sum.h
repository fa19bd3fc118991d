// Sums over the errors of tensors, in float64.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

namespace kvq {

struct ErrorSum {
  double squared_error = 0, squares = 0, largest = 0;

  static ErrorSum Of(const at::Tensor& exact, const at::Tensor& other) {
    const at::Tensor original = exact.to(at::kDouble);
    const at::Tensor difference = other.to(at::kDouble) - original;
    return {difference.square().sum().item<double>(), original.square().sum().item<double>(),
            difference.abs().max().item<double>()};
  }
  void Add(const ErrorSum& other) {
    squared_error += other.squared_error;
    squares += other.squares;
    largest = std::max(largest, other.largest);
  }
  double nmse() const { return squared_error == 0 ? 0 : squared_error / squares; }  // zeros, too, can be exact
};

}  // namespace kvq
