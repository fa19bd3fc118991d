// memory: peak resident memory of a prefill and eight decoding steps on the CPU, from the kernel's own high-water
// mark, which is reset first. rss_peak_bytes is the whole process; rss_grown_bytes leaves out what was
// resident before the cell began (weights, libraries, text).
#include "benchmarks/measurement.h"

namespace kvq {
namespace {

Counters Memory(Session& session, const Cell& cell, benchmark::State& state) {
  if (session.device().is_cuda()) throw Skip("resident memory is measured with --device=cpu");
  const Model& model = session.model(cell.model);
  const Backend& backend = FindBackend(cell.backend);
  const at::Tensor ids = session.context_ids(cell);
  Counters counters;
  for (auto _ : state) {
    ReleaseFreedMemory();
    const std::optional<int64_t> before = ResidentBytes();
    if (!before || !ResetPeakResident()) throw Skip("this system does not report resident memory");
    state.SetIterationTime(Time(model.device(), [&] {
      KvCache cache(ParseSpec(cell.spec), model.cache_shape(cell.batch), cell.context + 8,
                    model.dtype(), model.device());
      at::Tensor hidden = Feed(model, ids, cache, backend, session.prefill_chunk(cell.batch));
      for (int i = 0; i < 8; ++i) {
        hidden = model.Forward(model.Logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1),
                               cache, backend);
      }
      counters = {{"kv_bytes_allocated", static_cast<double>(cache.AllocatedBytes())},
                  {"scratch_bytes", static_cast<double>(cache.ScratchBytes())}};
    }));
    const double peak = static_cast<double>(*PeakResidentBytes());
    counters.emplace_back("rss_peak_bytes", peak);
    counters.emplace_back("rss_grown_bytes", peak - static_cast<double>(*before));
  }
  return counters;
}

const RegisterMeasurement kMemory{
    {.name = "memory", .what = "peak resident bytes of a prefill and some decoding (CPU)",
     .run = Memory}};

}  // namespace
}  // namespace kvq
