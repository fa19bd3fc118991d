// The arithmetic of `drift` (accuracy/drift.cc): what long decodings that go apart are described by.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <vector>

namespace kvq {

// When something happened, or until when it had not.
struct Survival {
  double time;
  bool happened;  // else: not until then, and nobody looked further
};

// Median time by Kaplan and Meier (1958, J. Am. Stat. Assoc. 53:457): the first at which at most half are left, where of
// those still watched at a time a share of one over their number leaves with each event. Nothing where more than half are
// left at the end.
inline std::optional<double> KaplanMeierMedian(std::vector<Survival> all) {
  // At one time events come first: who was watched until then was there to see them.
  std::sort(all.begin(), all.end(), [](const Survival& a, const Survival& b) {
    return a.time < b.time || (a.time == b.time && a.happened && !b.happened);
  });
  double left = 1;
  for (size_t i = 0; i < all.size();) {
    size_t end = i, events = 0;
    for (; end < all.size() && all[end].time == all[i].time; ++end) events += all[end].happened;
    left *= 1 - static_cast<double>(events) / static_cast<double>(all.size() - i);
    if (events > 0 && left <= 0.5 + 1e-12) return all[i].time;
    i = end;
  }
  return std::nullopt;
}

// The share of 4-grams that stand earlier in the same text; 0 for fewer than two 4-grams.
inline double RepetitionRate(const std::vector<int32_t>& ids) {
  constexpr size_t kGram = 4;
  if (ids.size() <= kGram) return 0;
  std::set<std::vector<int32_t>> seen;
  const size_t grams = ids.size() - kGram + 1;
  for (size_t i = 0; i < grams; ++i) seen.insert({ids.begin() + static_cast<int64_t>(i), ids.begin() + static_cast<int64_t>(i + kGram)});
  return 1 - static_cast<double>(seen.size()) / static_cast<double>(grams);
}

// Of the straight line through (0, values[0]), (1, values[1]), ... by least squares; nothing for fewer than two.
inline std::optional<double> Slope(const std::vector<double>& values) {
  const double n = static_cast<double>(values.size());
  if (n < 2) return std::nullopt;
  const double middle = (n - 1) / 2;
  double products = 0, squares = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double x = static_cast<double>(i) - middle;
    products += x * values[i];
    squares += x * x;
  }
  return products / squares;
}

// NumPy's quantile: linear between the two values around it.
inline double Quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  const double at = share * static_cast<double>(values.size() - 1);
  const size_t below = static_cast<size_t>(at), above = std::min(below + 1, values.size() - 1);
  return values[below] + (at - static_cast<double>(below)) * (values[above] - values[below]);
}

}  // namespace kvq
