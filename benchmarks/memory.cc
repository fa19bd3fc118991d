// memory: peak memory of a prefill and eight decoding steps, as `decode` does them.
//
// On a CPU the process's resident memory, from the kernel's own high-water mark, which is reset first: rss_peak_bytes
// is the whole process; rss_grown_bytes leaves out what was resident before the cell began (weights,
// libraries, text).
//
// On a GPU vram_peak_bytes is what tensors had at most, weights and the scratch memory of kernels included, and
// vram_reserved_bytes what libtorch's allocator had taken for them: what has to fit, so vram_overflow is flagged on it.
// beyond_weights_bytes is the peak without what lived before the cell; the cache is in it once, kv_bytes_allocated.
// nvml_used_bytes is what the driver counts at the end, less what was in use before this process came: CUDA's own
// context and the graphs are in it, too. --vram-diag lists the largest live blocks where memory is cleaned up.
// Where a model lies on several GPUs all these are sums, the JSON has `<name>_by_gpu`, and one GPU over its limit is
// an overflow.
//
// Protocol `study` replays what the reference study's peak holds: its input prefilled in one call with the
// logits of all positions, the cache kept, a second one like it (the study's deep copy), and a third
// prefill as in its decode timer, with its logits; then the steps. study_peak_bytes is the same by
// formula (benchmarks/study.h), without the temporary tensors of the layers.
#include <cstdio>
#include <numeric>

#include "benchmarks/decoding.h"
#include "benchmarks/study.h"
#include "fixtures/finite.h"
#include "fixtures/machine/gpu_memory.h"
#include "kernels/error.h"

namespace kvq {
namespace {

// Returns the last one's hidden states.
at::Tensor Steps(const Model& model, at::Tensor token, KvCache& cache, const Backend& backend) {
  at::Tensor hidden;
  for (int64_t i = 0; i < kSteps; ++i) {
    hidden = model.Forward(token, cache, backend);
    token = model.Logits(hidden).argmax(-1);
  }
  return hidden;
}

// --vram-diag: what lives at a moment, on stderr.
void Diagnose(Session& session, const char* when, const KvCache* cache) {
  if (!session.options().vram_diag || !session.device().is_cuda()) return;
  const auto mib = [](int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  std::string text = StrCat("GPU memory, ", when);
  if (cache != nullptr) {
    text += StrCat(": the cache ", mib(cache->AllocatedBytes()), " MiB, its scratch ", mib(cache->ScratchBytes()));
  }
  std::fprintf(stderr, "%s\n", text.c_str());
  for (const at::Device gpu : session.devices()) {
    std::fprintf(stderr, "%s: %.2f MiB allocated\n%s", gpu.str().c_str(), mib(ReadGpuMemory(gpu).allocated),
                 LargestBlocks(gpu, 12).c_str());
  }
}

Counters Honest(Session& session, const Cell& cell) {
  Decoding decoding(session, cell, kSteps);
  decoding.Run(decoding.Start(/*once=*/true));
  decoding.CheckFinite();
  Diagnose(session, "after the last step", &decoding.cache());
  return {{"kv_bytes_allocated", static_cast<double>(decoding.cache().AllocatedBytes())},
          {"scratch_bytes", static_cast<double>(decoding.cache().ScratchBytes())}};
}

Counters Study(Session& session, const Cell& cell, const Model& model, const at::Tensor& ids) {
  const Backend& backend = FindBackend(cell.backend);
  const Spec spec = ParseSpec(cell.spec);
  const CacheShape shape = model.cache_shape(cell.batch);
  const int64_t n = ids.size(1);
  std::vector<std::unique_ptr<KvCache>> caches;  // the original, its copy, the one that decodes
  for (int i = 0; i < 3; ++i) {
    caches.emplace_back(new KvCache(model.NewCache(spec, cell.batch, n + kSteps)));
    StudyPrefill(model, ids, *caches.back(), backend);
  }
  const at::Tensor hidden = Steps(model, ids.narrow(1, n - 1, 1), *caches.back(), backend);
  CheckFinite(model.Logits(hidden), model, ids, spec, backend);
  Diagnose(session, "after the last step, three caches", caches[0].get());
  return {{"study_peak_bytes",
           static_cast<double>(StudyPeakBytes(spec, shape, n, model.config().vocab_size,
                                              model.config().hidden_size, model.kv_dtype(), model.dtype()))},
          {"kv_bytes_allocated", static_cast<double>(caches[0]->AllocatedBytes())},
          {"scratch_bytes", static_cast<double>(caches[0]->ScratchBytes())}};
}

Counters MemoryOfProcess(Session&, const std::function<Counters()>& work) {
  const std::optional<int64_t> before = ResidentBytes();
  if (!before || !ResetPeakResident()) throw Skip("this system does not report resident memory");
  Counters counters = work();
  const double peak = static_cast<double>(*PeakResidentBytes());
  counters.emplace_back("rss_peak_bytes", peak);
  counters.emplace_back("rss_grown_bytes", peak - static_cast<double>(*before));
  return counters;
}

Counters MemoryOfGpu(Session& session, const std::function<Counters()>& work) {
  const std::vector<at::Device>& gpus = session.devices();
  Diagnose(session, "before the cell", nullptr);
  std::vector<int64_t> before;
  for (const at::Device gpu : gpus) {
    ResetGpuPeaks(gpu);
    before.push_back(ReadGpuMemory(gpu).allocated);
  }
  Counters counters = work();
  Synchronize(gpus);
  std::vector<double> peak, reserved, total, beyond, added;
  bool overflow = false;
  for (size_t i = 0; i < gpus.size(); ++i) {
    const GpuMemory after = ReadGpuMemory(gpus[i]);
    peak.push_back(static_cast<double>(after.peak_allocated));
    reserved.push_back(static_cast<double>(after.peak_reserved));
    total.push_back(static_cast<double>(after.device_total));
    beyond.push_back(static_cast<double>(after.peak_allocated - before[i]));
    overflow = overflow || after.peak_reserved > after.device_total;
    if (session.nvml().empty()) continue;
    if (const auto bytes = session.nvml()[i]->MemoryAddedBytes()) added.push_back(static_cast<double>(*bytes));
  }
  const auto add = [&](const std::string& name, const std::vector<double>& by_gpu) {
    if (by_gpu.size() != gpus.size()) return;  // one of them does not say
    counters.emplace_back(name, std::accumulate(by_gpu.begin(), by_gpu.end(), 0.0));
    if (gpus.size() > 1) AddList(counters, name + "_by_gpu", by_gpu);
  };
  add("vram_peak_bytes", peak);
  add("vram_reserved_bytes", reserved);
  add("vram_total_bytes", total);
  counters.emplace_back("vram_overflow", overflow ? 1 : 0);
  add("beyond_weights_bytes", beyond);
  add("nvml_used_bytes", added);
  ReleaseFreedMemory(gpus);
  Diagnose(session, "after the cell", nullptr);
  return counters;
}

Counters Memory(Session& session, const Cell& cell, benchmark::State& state) {
  const bool study = session.options().protocol == "study";
  const Model& model = session.model(cell.model);
  const at::Tensor ids = study ? StudyInput(session, cell) : session.context_ids(cell);
  Counters counters;
  for (auto _ : state) {
    session.DropCapturedCache();
    ReleaseFreedMemory(session.devices());
    const auto measure = session.device().is_cuda() ? MemoryOfGpu : MemoryOfProcess;
    state.SetIterationTime(Time(session.devices(), [&] {
      counters = measure(session, [&] {
        return study ? Study(session, cell, model, ids) : Honest(session, cell);
      });
    }));
  }
  return counters;
}

const RegisterMeasurement kMemory{
    {.name = "memory", .what = "peak bytes of a prefill and some decoding: resident (CPU), allocated and reserved (CUDA)",
     .study = "three caches and the logits of all positions at once, as the study's peaks hold",
     .like_tokens = [](const Options&, double tokens) { return 1.5 * tokens; },
     .new_tokens = [](const Options&) { return kSteps; }, .run = Memory}};

}  // namespace
}  // namespace kvq
