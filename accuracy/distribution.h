// What is known of a layer's keys or values after they have streamed by: moments in one pass,
// counts that need them in a second one. Nothing of the cache is kept.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace kvq {

// Count, mean, and sums of the second to fourth powers of the deviations from the mean, of many
// variables at once: float64 tensors of one shape. Deviations are taken from the mean of what is at
// hand, never as differences of sums of powers, so that a mean far from zero costs no digits.
struct Moments {
  double count = 0;  // values of each variable
  at::Tensor mean, m2, m3, m4;

  // Along dimension `dim` of x, which disappears.
  static Moments Along(const at::Tensor& x, int64_t dim);
  // More values of the same variables (Chan, Golub and LeVeque 1979 for m2; Pebay, SAND2008-6212,
  // for m3, m4).
  void Merge(const Moments& other);
  // All values of all variables as those of one; tensors of no dimension.
  Moments Pooled() const;
};

// Keys or values of one layer. Definitions are the reference study's.
class Distribution {
 public:
  static constexpr int64_t kBins = 200;  // of the histogram
  static constexpr double kRange = 6;    // on either side of 0, in standard deviations

  // First pass: x [batch, kv_heads, n, head_dim] of any floating type, all tokens in any split.
  void Add(const at::Tensor& x);
  // Second pass over the same tokens, when the first is complete.
  void Count(const at::Tensor& x);

  double mean() const { return pooled().mean.item<double>(); }
  double std() const;       // n - 1
  double kurtosis() const;  // mean of ((x - mean) / std)^4, less the normal distribution's 3
  double min() const { return min_.item<double>(); }
  double max() const { return max_.item<double>(); }
  double max_over_mean() const;  // of |x|
  // Mean over heads and channels of the variance along tokens, and over heads and tokens of the
  // variance along head_dim; n - 1 both.
  double per_channel_var() const;
  double per_token_var() const { return token_var_sum_ / static_cast<double>(tokens_); }
  // Largest |x| of every channel, [kv_heads * head_dim], and the number of channels in which it
  // exceeds 6 standard deviations.
  std::vector<double> channel_max() const;
  int64_t outlier_channels() const;

  // Of the second pass: shares of |x| > 3 std and > 6 std (not centred), and the density of
  // (x - mean) / std over what lies in [-6, 6]. Where all x are equal they are not numbers, and
  // the density is empty.
  double beyond_3sigma() const { return beyond_[0] / static_cast<double>(counted_); }
  double beyond_6sigma() const { return beyond_[1] / static_cast<double>(counted_); }
  std::vector<double> density() const;

 private:
  Moments pooled() const { return channels_.Pooled(); }

  Moments channels_;                    // [batch, kv_heads, head_dim], along tokens
  at::Tensor min_, max_, channel_max_;  // float64; channel_max_ [kv_heads, head_dim]
  double abs_sum_ = 0, token_var_sum_ = 0;
  int64_t tokens_ = 0;  // of all heads and sequences
  double beyond_[2] = {};
  int64_t counted_ = 0;
  at::Tensor histogram_;  // [kBins]
};

}  // namespace kvq
