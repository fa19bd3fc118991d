#include "kernels/host/experts.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/groups.h"

namespace kvq::host {
namespace {

// `to` plus as many numbers of `bias` from `at` on, as a tensor of the type would hold it.
void AddRounded(const void* bias, int64_t at, DType dtype, std::vector<float>& to) {
  const int64_t n = static_cast<int64_t>(to.size());
  std::vector<float> more(to.size());
  std::vector<std::byte> rounded(static_cast<size_t>(n * SizeOf(dtype)));
  LoadRow(bias, dtype, at, n, more.data());
  for (int64_t i = 0; i < n; ++i) to[static_cast<size_t>(i)] += more[static_cast<size_t>(i)];
  StoreRow(to.data(), n, dtype, 0, rounded.data());
  LoadRow(rounded.data(), dtype, 0, n, to.data());
}

}  // namespace

void ChooseExperts(const ExpertsArgs& a, float* shares) {
  std::vector<float> logits(static_cast<size_t>(a.experts));
  std::vector<int32_t> order(logits.size());
  for (int64_t row = 0; row < a.rows; ++row) {
    LoadRow(a.logits, a.dtype, row * a.experts, a.experts, logits.data());
    if (a.logit_bias != nullptr) AddRounded(a.logit_bias, 0, a.dtype, logits);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t one, int32_t other) {  // NaN above all
      const float x = logits[static_cast<size_t>(one)], y = logits[static_cast<size_t>(other)];
      return x > y || (std::isnan(x) && !std::isnan(y));
    });
    const float largest = logits[static_cast<size_t>(order[0])];
    float sum = 0;
    for (int64_t i = 0; i < (a.normalized ? a.per_token : a.experts); ++i) {
      sum += std::exp(logits[static_cast<size_t>(order[static_cast<size_t>(i)])] - largest);
    }
    for (int64_t i = 0; i < a.per_token; ++i) {
      const int32_t expert = order[static_cast<size_t>(i)];
      a.chosen[row * a.per_token + i] = expert;
      shares[row * a.per_token + i] = std::exp(logits[static_cast<size_t>(expert)] - largest) / sum;
    }
  }
}

void Experts(const ExpertsArgs& a, void* out) {
  const int64_t places = a.rows * a.per_token, bytes = SizeOf(a.dtype);
  std::vector<float> shares(static_cast<size_t>(places)), sums(static_cast<size_t>(a.rows * a.hidden));
  ChooseExperts(a, shares.data());
  const auto room = [&](int64_t columns) { return std::vector<std::byte>(static_cast<size_t>(a.rows * columns * bytes)); };
  std::vector<std::byte> x = room(a.hidden), up = room(2 * a.size), gated = room(a.size), down = room(a.hidden);
  std::vector<float> made(static_cast<size_t>(a.hidden));
  for (int64_t expert = 0; expert < a.experts; ++expert) {
    std::vector<int64_t> those;  // places of rows that chose it
    for (int64_t place = 0; place < places; ++place) {
      if (a.chosen[place] == expert) those.push_back(place);
    }
    if (those.empty()) continue;
    ++*a.reads;
    const int64_t rows = static_cast<int64_t>(those.size());
    for (int64_t i = 0; i < rows; ++i) {
      const auto* from = static_cast<const std::byte*>(a.x) + those[static_cast<size_t>(i)] / a.per_token * a.hidden * bytes;
      std::copy_n(from, a.hidden * bytes, x.data() + i * a.hidden * bytes);
    }
    ProductArgs product;
    product.dtype = a.dtype, product.rows = rows, product.in = a.hidden, product.out = 2 * a.size;
    product.weight = static_cast<const std::byte*>(a.up) + expert * 2 * a.size * a.hidden * bytes;
    product.x = x.data(), product.stored = up.data();
    Product(product);
    GateUp({.dtype = a.dtype, .rows = rows, .size = a.size, .activation = a.activation,
            .bias = a.up_bias == nullptr ? nullptr : static_cast<const std::byte*>(a.up_bias) + expert * 2 * a.size * bytes,
            .out = gated.data()}, up.data());
    product.in = a.size, product.out = a.hidden;
    product.weight = static_cast<const std::byte*>(a.down) + expert * a.hidden * a.size * bytes;
    product.x = gated.data(), product.stored = down.data();
    Product(product);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t place = those[static_cast<size_t>(i)];
      LoadRow(down.data(), a.dtype, i * a.hidden, a.hidden, made.data());
      if (a.down_bias != nullptr) AddRounded(a.down_bias, expert * a.hidden, a.dtype, made);
      float* sum = sums.data() + place / a.per_token * a.hidden;
      for (int64_t k = 0; k < a.hidden; ++k) sum[k] += shares[static_cast<size_t>(place)] * made[static_cast<size_t>(k)];
    }
  }
  StoreRow(sums.data(), a.rows * a.hidden, a.dtype, 0, out);
}

}  // namespace kvq::host
