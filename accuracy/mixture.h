// A layer of experts as libtorch computes it in float64, for the tests of kernels that do.
#pragma once

#include <ATen/ATen.h>

#include <cmath>

#include "fixtures/cache/codec_tensors.h"
#include "kernels/device/experts.h"

namespace kvq {

// x, logits of experts, and weights, such that what comes out is near one; and room for what the kernels leave.
struct Mixture {
  int64_t rows, hidden, size, experts, per_token;
  bool normalized;
  at::Tensor x, logits, up, down, gated, partial, chosen, ranked, reads;
  at::Tensor logit_bias, up_bias, down_bias;  // undefined: none, and gates without a limit

  Mixture(int64_t rows, int64_t hidden, int64_t size, int64_t experts, int64_t per_token, bool normalized, at::TensorOptions options)
      : rows(rows), hidden(hidden), size(size), experts(experts), per_token(per_token), normalized(normalized) {
    x = at::randn({rows, hidden}, options), logits = at::randn({rows, experts}, options);
    up = at::randn({experts, 2 * size, hidden}, options) / std::sqrt(static_cast<double>(hidden));
    down = at::randn({experts, hidden, size}, options) / std::sqrt(static_cast<double>(size));
    gated = at::full({rows, per_token, size}, NAN, options), partial = at::full({rows, hidden}, NAN, options.dtype(at::kFloat));
    chosen = at::full({rows, per_token}, -1, options.dtype(at::kInt)), ranked = at::zeros_like(chosen), reads = at::zeros({1}, options.dtype(at::kLong));
  }
  // gpt-oss's biases, and its gates: of x of the same size some reach their limit, and some factors theirs.
  Mixture& WithBiases() {
    logit_bias = at::randn({experts}, logits.options());
    up_bias = at::randn({experts, 2 * size}, x.options()) * 4, down_bias = at::randn({experts, hidden}, x.options());
    return *this;
  }
  ExpertsArgs args() const {
    const auto data = [](const at::Tensor& of) { return of.defined() ? of.data_ptr() : nullptr; };
    return {.dtype = DTypeOf(x.scalar_type()),
            .rows = rows,
            .hidden = hidden,
            .size = size,
            .experts = experts,
            .per_token = per_token,
            .normalized = normalized,
            .activation = up_bias.defined() ? Gate::kClamped : Gate::kSilu,
            .logits = logits.data_ptr(),
            .x = x.data_ptr(),
            .up = up.data_ptr(),
            .down = down.data_ptr(),
            .logit_bias = data(logit_bias),
            .up_bias = data(up_bias),
            .down_bias = data(down_bias),
            .gated = gated.data_ptr(),
            .partial = partial.data_ptr<float>(),
            .chosen = chosen.data_ptr<int32_t>(),
            .ranked = reinterpret_cast<uint32_t*>(ranked.data_ptr<int32_t>()),
            .reads = reinterpret_cast<unsigned long long*>(reads.data_ptr<int64_t>())};
  }
  // transformers' Qwen3MoeSparseMoeBlock: a softmax over all, the largest of it, which are made to add up to one or are not. Of
  // equal logits topk says not which; the first is asked for here.
  at::Tensor Biased() const { return logit_bias.defined() ? logits + logit_bias : logits; }
  at::Tensor Chosen() const {
    return std::get<1>(Biased().to(at::kDouble).sort(/*stable=*/true, -1, /*descending=*/true)).narrow(1, 0, per_token);
  }
  at::Tensor Exact() const {
    const at::Tensor those = Chosen();
    at::Tensor shares = at::softmax(Biased().to(at::kDouble), -1).gather(1, those);
    if (normalized) shares = shares / shares.sum(-1, /*keepdim=*/true);
    const at::Tensor flat = those.flatten();
    const at::Tensor rows_of_x = x.to(at::kDouble).repeat_interleave(per_token, 0).unsqueeze(2);
    at::Tensor both = at::bmm(up.index_select(0, flat).to(at::kDouble), rows_of_x).squeeze(2);
    if (up_bias.defined()) both = both + up_bias.index_select(0, flat);
    const at::Tensor gate = both.narrow(1, 0, size), factor = both.narrow(1, size, size), limited = gate.clamp_max(7);
    // transformers' GptOssExperts._apply_gate, or silu.
    const at::Tensor inner = up_bias.defined() ? (factor.clamp(-7, 7) + 1) * limited * at::sigmoid(limited * 1.702) : at::silu(gate) * factor;
    at::Tensor made = at::bmm(down.index_select(0, flat).to(at::kDouble), inner.unsqueeze(2)).squeeze(2);
    if (down_bias.defined()) made = made + down_bias.index_select(0, flat);
    return (made.view({rows, per_token, hidden}) * shares.unsqueeze(2)).sum(1);
  }
};

}  // namespace kvq
