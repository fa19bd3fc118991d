// prefill: time to store a whole prompt and know its next token. Counted: every token through the
// model in calls of --prefill-chunk tokens, encoding and decoding of the cache included, logits of the
// last token only. Limit: the operations of the weights and of attention over the GEMM rate measured in
// the same run (peak_fraction); that of all GPUs where the layers are spread: a stage begins with the next call
// while the following stages are busy with this one, so a prompt of many calls can fill them, one call cannot.
#include "benchmarks/measurement.h"
#include "fixtures/finite.h"

namespace kvq {
namespace {

constexpr int64_t kWarmUpOfCpu = 128;

Counters Prefill(Session& session, const Cell& cell, benchmark::State& state) {
  const Model& model = session.model(cell.model);
  const Backend& backend = FindBackend(cell.backend);
  const at::Tensor ids = session.context_ids(cell);
  const Spec spec = ParseSpec(cell.spec);
  KvCache cache = model.NewCache(spec, cell.batch, cell.context);
  const int64_t chunk = session.prefill_chunk(cell.batch);
  at::Tensor logits;
  const auto prefill = [&](int64_t tokens) {
    cache.Clear();
    logits = at::Tensor();
    const at::Tensor hidden = Feed(model, ids.narrow(1, 0, tokens), cache, backend, chunk);
    logits = model.Logits(hidden.select(1, hidden.size(1) - 1));
    logits.argmax(-1);
  };
  // Warm-up: threads, weights' pages, and kernels, which a GPU chooses by shape. A CPU may take seconds for a whole prompt.
  prefill(std::min({cell.context, chunk, session.device().is_cpu() ? kWarmUpOfCpu : chunk}));
  std::vector<double> rates, milliseconds;
  const double tokens = static_cast<double>(cell.context * cell.batch);
  for (const double seconds : Samples(session, state, [&] { return session.Time([&] { prefill(cell.context); }); })) {
    milliseconds.push_back(seconds * 1e3);
    rates.push_back(tokens / seconds);
  }
  CheckFinite(logits, model, ids, spec, backend);
  Counters counters;
  AddSpread(counters, "prefill_ms", milliseconds);
  AddSpread(counters, "tokens_per_s", rates);
  const double flops = model.TokenFlops(false) * tokens + model.AttentionFlops(cell.batch, cell.context);
  const double median_s = counters.front().second / 1e3;
  double rate = 0;
  for (const at::Device device : model.devices()) rate += GemmRate(device, model.dtype());
  counters.emplace_back("gflop", flops / 1e9);
  counters.emplace_back("peak_fraction", flops / median_s / rate);
  return counters;
}

const RegisterMeasurement kPrefill{
    {.name = "prefill", .what = "ms and tokens/s until the prompt's next token is known",
     .timed = true, .turn = 0,
     .like_tokens = [](const Options& o, double tokens) { return (static_cast<double>(o.runs) + 0.5) * tokens; }, .run = Prefill}};

}  // namespace
}  // namespace kvq
