// What two models' logits say about the tokens that really came.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace kvq {

// reference, logits [batch, n, vocab] float32, targets [batch, n] int64 -> [batch, n, 4] float64:
// nll of the reference, nll, KL(reference || other) in nats, and 1 where the likeliest token is the same. Where a logit of
// either is not finite, neither are the last two: nothing agrees with what is no number.
at::Tensor ScoreTokens(const at::Tensor& reference, const at::Tensor& logits,
                       const at::Tensor& targets);

// Sums over the scored tokens of one window.
struct WindowScore {
  double reference_nll = 0, nll = 0, kld = 0, agreements = 0;
  int64_t tokens = 0;
};

// Scores logits of both models [batch, n, vocab] for the tokens that follow them (targets
// [batch, n]); adds to one sum a sequence.
void AddScores(const at::Tensor& reference, const at::Tensor& logits, const at::Tensor& targets,
               WindowScore* scores);

// One number a window: a sum over its scored tokens.
template <typename Get>
std::vector<double> PerToken(const std::vector<WindowScore>& scores, Get get) {
  std::vector<double> values;
  for (const WindowScore& score : scores) {
    values.push_back(get(score) / static_cast<double>(score.tokens));
  }
  return values;
}

// Weighted by tokens, so that it is the mean over tokens even where windows differ in length.
template <typename Get>
double Total(const std::vector<WindowScore>& scores, Get get) {
  double sum = 0;
  int64_t tokens = 0;
  for (const WindowScore& score : scores) {
    sum += get(score);
    tokens += score.tokens;
  }
  return sum / static_cast<double>(tokens);
}

}  // namespace kvq
