#include "accuracy/scoring.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "kernels/vector_math.h"

namespace kvq {
namespace {

constexpr int64_t kBlock = 256;  // summed in float32; blocks are added in double

// Adds sum e^(r - r_max), sum e^(q - q_max) and sum e^(r - r_max) (r - q) of a block to sums[0..2].
KVQ_VECTOR void AddBlock(const float* r, const float* q, int64_t n, float r_max, float q_max,
                         double* sums) {
  float er[kBlock], eq[kBlock], weighted[kBlock];
  for (int64_t i = 0; i < n; ++i) {
    er[i] = Exp(r[i] - r_max);
    eq[i] = Exp(q[i] - q_max);
    weighted[i] = er[i] * (r[i] - q[i]);
  }
  for (int64_t i = n; i < kBlock; ++i) er[i] = eq[i] = weighted[i] = 0;
  for (int64_t stride = kBlock / 2; stride > 0; stride /= 2) {
    for (int64_t i = 0; i < stride; ++i) {
      er[i] += er[i + stride];
      eq[i] += eq[i + stride];
      weighted[i] += weighted[i + stride];
    }
  }
  sums[0] += er[0];
  sums[1] += eq[0];
  sums[2] += weighted[0];
}

KVQ_VECTOR float Maximum(const float* x, int64_t n) {
  float lanes[64];
  for (int i = 0; i < 64; ++i) lanes[i] = x[0];
  int64_t at = 0;
  for (; at + 64 <= n; at += 64) {
    for (int i = 0; i < 64; ++i) lanes[i] = lanes[i] > x[at + i] ? lanes[i] : x[at + i];
  }
  for (; at < n; ++at) lanes[0] = lanes[0] > x[at] ? lanes[0] : x[at];
  return *std::max_element(lanes, lanes + 64);
}

// One token on the CPU, in two passes over its logits.
void ScoreRow(const float* r, const float* q, int64_t vocab, int64_t target, double* out) {
  const float r_max = Maximum(r, vocab), q_max = Maximum(q, vocab);
  double sums[3] = {};
  for (int64_t at = 0; at < vocab; at += kBlock) {
    AddBlock(r + at, q + at, std::min(kBlock, vocab - at), r_max, q_max, sums);
  }
  const double r_log = r_max + std::log(sums[0]), q_log = q_max + std::log(sums[1]);
  out[0] = r_log - r[target];
  out[1] = q_log - q[target];
  // sum p (log p - log q), with log p = r - r_log and log q = q - q_log
  out[2] = sums[2] / sums[0] - (r_log - q_log);
  out[3] = !std::isfinite(out[2]) ? NAN : std::find(r, r + vocab, r_max) - r == std::find(q, q + vocab, q_max) - q;
}

}  // namespace

at::Tensor ScoreTokens(const at::Tensor& reference, const at::Tensor& logits,
                       const at::Tensor& targets) {
  if (reference.is_cuda()) {
    const at::Tensor r = at::log_softmax(reference, -1), q = at::log_softmax(logits, -1);
    const at::Tensor index = targets.unsqueeze(-1);
    const at::Tensor kld = (r.exp() * (r - q)).sum(-1, false, at::kDouble);
    return at::stack({-r.gather(-1, index).squeeze(-1).to(at::kDouble),
                      -q.gather(-1, index).squeeze(-1).to(at::kDouble), kld,
                      r.argmax(-1).eq(q.argmax(-1)).to(at::kDouble).masked_fill(kld.isfinite().logical_not(), NAN)},
                     -1);
  }
  const at::Tensor r = reference.contiguous(), q = logits.contiguous(), t = targets.contiguous();
  const int64_t vocab = r.size(-1);
  at::Tensor scores = at::empty({t.size(0), t.size(1), 4}, at::kDouble);
  at::parallel_for(0, t.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      ScoreRow(r.data_ptr<float>() + row * vocab, q.data_ptr<float>() + row * vocab, vocab,
               t.data_ptr<int64_t>()[row], scores.data_ptr<double>() + row * 4);
    }
  });
  return scores;
}

void AddScores(const at::Tensor& reference, const at::Tensor& logits, const at::Tensor& targets,
               WindowScore* scores) {
  const at::Tensor sums = ScoreTokens(reference, logits, targets).sum(1).cpu();
  for (int64_t b = 0; b < targets.size(0); ++b) {
    scores[b].reference_nll += sums[b][0].item<double>();
    scores[b].nll += sums[b][1].item<double>();
    scores[b].kld += sums[b][2].item<double>();
    scores[b].agreements += sums[b][3].item<double>();
    scores[b].tokens += targets.size(1);
  }
}

}  // namespace kvq
