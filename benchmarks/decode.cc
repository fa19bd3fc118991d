// decode: new tokens per second at a context, greedy, one at a time; the prefill is outside the timer.
// Limit: the bytes one step must read, weights and stored KV cache, over the read bandwidth measured in
// the same run (peak_fraction).
//
// Backend fused runs the steps as one CUDA graph, whose first logits are compared with the other path's before
// anything is timed. What the graph refuses runs as under sdpa, and the label says why.
#include <cmath>
#include <optional>

#include "benchmarks/measurement.h"
#include "fixtures/decode_graph.h"
#include "kernels/error.h"

namespace kvq {
namespace {

// Both paths round some twelve tensors a layer, in the same places but after sums in another order: independent
// errors of at most a unit roundoff each, in both.
double Tolerance(const Model& model) {
  const double roundoff = model.dtype() == at::kHalf ? 0x1p-11 : 0x1p-8;
  return roundoff * std::sqrt(2 * 12.0 * static_cast<double>(model.config().layers.size()));
}

Counters Decode(Session& session, const Cell& cell, benchmark::State& state) {
  const Model& model = session.model(cell.model);
  const Backend& backend = FindBackend(cell.backend);
  const at::Tensor ids = session.context_ids(cell);
  const Spec spec = ParseSpec(cell.spec);
  const int64_t new_tokens = session.options().decode_tokens;
  KvCache cache(spec, model.cache_shape(cell.batch), cell.context + new_tokens, model.dtype(),
                model.device());
  const auto next = [&](const at::Tensor& hidden) {
    return model.Logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1);
  };
  const auto prefill = [&] {
    cache.Clear();
    return next(Feed(model, ids, cache, backend, session.prefill_chunk(cell.batch)));
  };
  std::optional<DecodeGraph> graph;
  if (backend.graph) {
    try {
      graph.emplace(model, cache);
      session.ran = graph->kernels();
    } catch (const InputError& why) {
      session.ran = StrCat("sdpa", spec.stores_dense() ? "" : " on decoded tokens", " (", why.what(), ")");
    }
  }
  {  // warm-up of both shapes
    const at::Tensor first = prefill(), logits = model.Logits(model.Forward(first, cache, backend)).select(1, 0);
    if (graph) {
      prefill();
      graph->Run(first, 1);
      const double error = ((graph->logits() - logits).norm() / logits.norm()).item<double>();
      if (!(error < Tolerance(model))) {
        throw std::runtime_error(StrCat("the graph's logits are off by ", error, " of their norm"));
      }
    }
  }
  std::vector<double> rates, per_token;
  for (auto _ : state) {
    at::Tensor token = prefill();
    const double seconds = Time(model.device(), [&] {
      if (graph) {
        graph->Run(token, new_tokens);
      } else {
        for (int64_t i = 0; i < new_tokens; ++i) token = next(model.Forward(token, cache, backend));
      }
    });
    state.SetIterationTime(seconds);
    rates.push_back(static_cast<double>(new_tokens * cell.batch) / seconds);
    per_token.push_back(seconds * 1e3 / static_cast<double>(new_tokens));
  }
  Counters counters;
  AddSpread(counters, "tokens_per_s", rates);
  AddSpread(counters, "ms_per_token", per_token);
  const int64_t middle = cell.context + new_tokens / 2;
  const double bytes =
      static_cast<double>(model.WeightBytes() +
                          KvBytes(spec, model.cache_shape(cell.batch), middle, model.dtype()));
  const double median_s = counters[3].second / 1e3;
  counters.emplace_back("bytes_per_token", bytes);
  counters.emplace_back("peak_fraction", bytes / median_s / ReadBandwidth(model.device()));
  return counters;
}

const RegisterMeasurement kDecode{
    {.name = "decode", .what = "new tokens/s at a context, without its prefill", .timed = true,
     .run = Decode}};

}  // namespace
}  // namespace kvq
