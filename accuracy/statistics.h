// How sure a statistic is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace kvq {

struct Interval {
  double low, high;
};

// Two-sided 95 % quantile of Student's t with `freedom` degrees of freedom: tabulated to 30, then the
// first two terms of the Cornish-Fisher expansion around the normal one (within 1e-4).
inline double StudentT95(int64_t freedom) {
  static constexpr double kTable[] = {12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060,
                                      2.2622,  2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199,
                                      2.1098,  2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639,
                                      2.0595,  2.0555, 2.0518, 2.0484, 2.0452, 2.0423};
  if (freedom <= 30) return kTable[freedom - 1];
  const double z = 1.959964, n = static_cast<double>(freedom);
  return z + (z * z * z + z) / (4 * n) +
         (5 * std::pow(z, 5) + 16 * z * z * z + 3 * z) / (96 * n * n);
}

inline double Mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

// 95 % interval of the mean of independent values (one a window); nothing for fewer than two.
inline std::optional<Interval> MeanInterval(const std::vector<double>& values) {
  const auto n = static_cast<int64_t>(values.size());
  if (n < 2) return std::nullopt;
  const double mean = Mean(values);
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  const double n_real = static_cast<double>(n);
  const double half = StudentT95(n - 1) * std::sqrt(squares / (n_real - 1) / n_real);
  return Interval{mean - half, mean + half};
}

// 95 % interval of the median of independent values, whatever their distribution: the j-th smallest and
// the j-th largest, j the most for which fewer than j heads of n fair coins have a chance of at most 2.5 %
// (Hahn & Meeker 1991, Statistical Intervals, 5.2). Nothing for fewer than six.
inline std::optional<Interval> MedianInterval(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  const double n_real = static_cast<double>(n);
  size_t j = 0;
  if (n <= 500) {
    double chance = std::pow(0.5, n_real), sum = 0;  // of j heads, and of fewer
    while (sum + chance <= 0.025) {
      sum += chance;
      chance *= (n_real - static_cast<double>(j)) / static_cast<double>(j + 1);
      ++j;
    }
  } else {  // the binomial distribution is normal enough, and 2^-n too small to be a number
    j = static_cast<size_t>((n_real - 1.959964 * std::sqrt(n_real)) / 2);
  }
  if (j == 0) return std::nullopt;
  return Interval{values[j - 1], values[n - j]};
}

// Wilson's 95 % interval of a rate (Wilson 1927, J. Am. Stat. Assoc. 22:209).
inline Interval WilsonInterval(int64_t successes, int64_t trials) {
  const double z = 1.959964, n = static_cast<double>(trials), p = static_cast<double>(successes) / n;
  const double center = (p + z * z / (2 * n)) / (1 + z * z / n);
  const double half =
      z / (1 + z * z / n) * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n));
  return {center - half, center + half};
}

}  // namespace kvq
