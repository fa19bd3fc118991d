// decode: new tokens per second at a context, greedy, one at a time; the prefill is outside the timer.
// Limit: the bytes one step must read, weights and stored KV cache, over the read bandwidth measured in
// the same run (peak_fraction).
#include "benchmarks/measurement.h"

namespace kvq {
namespace {

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
    return next(Feed(model, ids, cache, backend, session.options().prefill_chunk));
  };
  next(model.Forward(prefill(), cache, backend));  // warm-up of both shapes
  std::vector<double> rates, per_token;
  for (auto _ : state) {
    at::Tensor token = prefill();
    const double seconds = Time(model.device(), [&] {
      for (int64_t i = 0; i < new_tokens; ++i) token = next(model.Forward(token, cache, backend));
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
