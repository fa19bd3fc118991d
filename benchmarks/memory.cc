// memory: peak resident memory of a prefill and eight decoding steps on the CPU, from the kernel's own high-water
// mark, which is reset first. rss_peak_bytes is the whole process; rss_grown_bytes leaves out what was
// resident before the cell began (weights, libraries, text).
//
// Protocol `study` replays what the reference study's peak holds: its input prefilled in one call with the
// logits of all positions, the cache kept, a second one like it (the study's deep copy), and a third
// prefill as in its decode timer, with its logits; then the steps. study_peak_bytes is the same by
// formula (benchmarks/study.h), without the temporary tensors of the layers.
#include "benchmarks/study.h"

namespace kvq {
namespace {

constexpr int64_t kSteps = 8;

void Steps(const Model& model, at::Tensor token, KvCache& cache, const Backend& backend) {
  for (int64_t i = 0; i < kSteps; ++i) {
    token = model.Logits(model.Forward(token, cache, backend)).argmax(-1);
  }
}

Counters Honest(Session& session, const Cell& cell, const Model& model, const at::Tensor& ids) {
  const Backend& backend = FindBackend(cell.backend);
  KvCache cache(ParseSpec(cell.spec), model.cache_shape(cell.batch), cell.context + kSteps,
                model.dtype(), model.device());
  const at::Tensor hidden = Feed(model, ids, cache, backend, session.options().prefill_chunk);
  Steps(model, model.Logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1), cache, backend);
  return {{"kv_bytes_allocated", static_cast<double>(cache.AllocatedBytes())},
          {"scratch_bytes", static_cast<double>(cache.ScratchBytes())}};
}

Counters Study(const Cell& cell, const Model& model, const at::Tensor& ids) {
  const Backend& backend = FindBackend(cell.backend);
  const Spec spec = ParseSpec(cell.spec);
  const CacheShape shape = model.cache_shape(cell.batch);
  const int64_t n = ids.size(1);
  std::vector<std::unique_ptr<KvCache>> caches;  // the original, its copy, the one that decodes
  for (int i = 0; i < 3; ++i) {
    caches.push_back(
        std::make_unique<KvCache>(spec, shape, n + kSteps, model.dtype(), model.device()));
    StudyPrefill(model, ids, *caches.back(), backend);
  }
  Steps(model, ids.narrow(1, n - 1, 1), *caches.back(), backend);
  return {{"study_peak_bytes",
           static_cast<double>(StudyPeakBytes(spec, shape, n, model.config().vocab_size,
                                              model.config().hidden_size, model.dtype()))},
          {"kv_bytes_allocated", static_cast<double>(caches[0]->AllocatedBytes())},
          {"scratch_bytes", static_cast<double>(caches[0]->ScratchBytes())}};
}

Counters Memory(Session& session, const Cell& cell, benchmark::State& state) {
  if (session.device().is_cuda()) throw Skip("resident memory is measured with --device=cpu");
  const bool study = session.options().protocol == "study";
  const Model& model = session.model(cell.model);
  const at::Tensor ids = study ? StudyInput(session, cell) : session.context_ids(cell);
  Counters counters;
  for (auto _ : state) {
    ReleaseFreedMemory(session.device());
    const std::optional<int64_t> before = ResidentBytes();
    if (!before || !ResetPeakResident()) throw Skip("this system does not report resident memory");
    state.SetIterationTime(Time(model.device(), [&] {
      counters = study ? Study(cell, model, ids) : Honest(session, cell, model, ids);
    }));
    const double peak = static_cast<double>(*PeakResidentBytes());
    counters.emplace_back("rss_peak_bytes", peak);
    counters.emplace_back("rss_grown_bytes", peak - static_cast<double>(*before));
  }
  return counters;
}

const RegisterMeasurement kMemory{
    {.name = "memory", .what = "peak resident bytes of a prefill and some decoding (CPU)",
     .study = "three caches and the logits of all positions at once, as the study's peaks hold",
     .run = Memory}};

}  // namespace
}  // namespace kvq
