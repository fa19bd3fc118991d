#include "benchmarks/measurement.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <random>
#include <tuple>

#include "accuracy/statistics.h"
#include "fixtures/finite.h"
#include "fixtures/machine/host_load.h"
#include "fixtures/machine/out_of_memory.h"
#include "kernels/error.h"
#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

std::vector<Measurement>& Table() {
  static std::vector<Measurement> table;
  return table;
}

// bfloat16 on this CPU unless it takes half as long again as float32, for a prompt of 512 tokens and 64 new ones: what a weight then
// takes in products and in being read. Where nothing multiplies bfloat16 it takes several times as long; by less a probe is wrong
// beside other work, and one machine's runs are not to differ in their type. Products are small, which says enough for that: larger ones
// were most of a start.
at::ScalarType CpuType() {
  const at::Device cpu(at::kCPU);
  const auto seconds = [&](at::ScalarType type) {
    return 512 * 2 / GemmRate(cpu, type, 512) + 64 * static_cast<double>(c10::elementSize(type)) / ReadBandwidth(cpu);
  };
  return seconds(at::kBFloat16) < 1.5 * seconds(at::kFloat) ? at::kBFloat16 : at::kFloat;
}

}  // namespace

const std::vector<Measurement>& Measurements() {
  std::sort(Table().begin(), Table().end(),
            [](const Measurement& a, const Measurement& b) { return std::tie(a.turn, a.name) < std::tie(b.turn, b.name); });
  return Table();
}

RegisterMeasurement::RegisterMeasurement(Measurement measurement) {
  Table().push_back(std::move(measurement));
}

Session::Session(Options options, const std::string& settled)
    : options_(std::move(options)), devices_(ParseDevices(options_.device)) {
  const std::string& dtype = options_.dtype == "auto" ? settled : options_.dtype;
  if (dtype != "auto") dtype_ = ParseDType("--dtype", dtype);
  if (options_.kv_dtype != "auto") named_kv_dtype_ = ParseDType("--kv-dtype", options_.kv_dtype);
  if (!device().is_cuda()) return;
  try {
    for (const at::Device gpu : devices_) nvml_.push_back(std::make_unique<Nvml>(PciBusId(gpu.index())));
    for (const auto& nvml : nvml_) watches_.push_back(std::make_unique<GpuWatch>(*nvml));
  } catch (const std::runtime_error& error) {
    nvml_.clear();
    why_no_nvml_ = error.what();
  }
  // For good: "cuda" without a number and our own kernels mean the current one.
  c10::impl::VirtualGuardImpl(at::kCUDA).setDevice(device());
}

void Session::BeginWatch() {
  for (const auto& watch : watches_) watch->Begin();
}

void Session::EndWatch() {
  for (const auto& watch : watches_) watch->End();
}

GpuSummary Session::TakeWatch() {
  GpuSummary all;
  for (const auto& watch : watches_) {
    GpuSummary one = watch->Take();
    if (watch == watches_.front()) {
      all = one;
      continue;
    }
    all.AddState(one);  // and their intervals are the same
    all.joules = all.joules && one.joules ? std::optional(*all.joules + *one.joules) : std::nullopt;
    all.energy_counter = all.energy_counter && one.energy_counter;
  }
  return all;
}

at::ScalarType Session::dtype() {
  if (!dtype_) dtype_ = device().is_cuda() ? at::kHalf : CpuType();
  return *dtype_;
}

at::ScalarType Session::kv_dtype(const std::string& model) {
  if (named_kv_dtype_) return *named_kv_dtype_;
  if (options_.dtype != "auto" || device().is_cuda()) return dtype();
  const auto known = kv_dtypes_.find(model);
  if (known != kv_dtypes_.end()) return known->second;
  const ModelFiles files = FindModel(model);
  return kv_dtypes_[model] = CacheTypeOf(files.config(), files.dir);
}

// On a CPU the caches decide. On a GPU a product wants some thousand rows, and more buy nothing: 8192 tokens of a 7B
// model keep their temporaries below half a GiB, and few calls decode the history.
int64_t Session::prefill_chunk(int64_t batch) const {
  if (options_.prefill_chunk > 0) return options_.prefill_chunk;
  return device().is_cuda() ? std::max<int64_t>(8192 / batch, 128) : 1024;
}

const Model& Session::model(const std::string& name) {
  if (model_.second == nullptr || model_.first != name) {
    captured_ = {};
    window_states_ = {};
    model_ = {"", nullptr};  // before the next one is loaded: there may not be room for two
    const ModelFiles files = FindModel(name);
    model_ = {name, files.random_weights()
                        ? std::make_unique<Model>(files.config(), Weights::Random(static_cast<uint64_t>(options_.seed),
                                                                                 dtype(), device()), devices_)
                        : LoadModel(files.dir, dtype(), devices_)};
    model_.second->set_kv_dtype(kv_dtype(name));
  }
  return *model_.second;
}

void Session::WarmUpForModel() {
  if (model_.second == nullptr || warm_for_ == model_.first) return;
  WarmUp(devices_, 2);
  warm_for_ = model_.first;
}

const Tokenizer& Session::tokenizer(const std::string& name) {
  if (tokenizer_.second == nullptr || tokenizer_.first != name) {
    tokenizer_ = {name, std::make_unique<Tokenizer>(Tokenizer::Load(FindModel(name).dir))};
  }
  return *tokenizer_.second;
}

const Corpus& Session::corpus() {
  if (!corpus_) corpus_ = LoadCorpus(options_.corpus, options_.corpus_file);
  return *corpus_;
}

const std::vector<int32_t>& Session::corpus_ids(const std::string& model) {
  if (ids_.first != model) ids_ = {model, tokenizer(model).Encode(corpus().text, false)};
  return ids_.second;
}

at::Tensor Session::context_ids(const Cell& cell) {
  if (random_weights(cell.model)) {
    std::mt19937_64 random(static_cast<uint64_t>(options_.seed));
    const uint64_t vocabulary = static_cast<uint64_t>(model(cell.model).config().vocab_size);
    std::vector<int32_t> ids(static_cast<size_t>(cell.context));
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % vocabulary);
    return IdTensor(ids, cell.batch, device());
  }
  const std::vector<int32_t>& corpus = corpus_ids(cell.model);
  std::vector<int32_t> ids;
  if (tokenizer(cell.model).adds_bos()) ids.push_back(*tokenizer(cell.model).bos_id());
  const int64_t missing = cell.context - static_cast<int64_t>(ids.size());
  if (missing > static_cast<int64_t>(corpus.size())) {
    throw Skip(StrCat("the corpus '", this->corpus().name, "' has ", corpus.size(),
                      " tokens, the context wants ", cell.context));
  }
  ids.insert(ids.end(), corpus.begin(), corpus.begin() + missing);
  return IdTensor(ids, cell.batch, device());
}

const LayerTokens& Session::captured_cache(const Cell& cell) {
  const std::string key = StrCat(cell.model, "/", cell.backend, "/", cell.context, "/", cell.batch);
  if (captured_.first == key) return captured_.second;
  captured_ = {};
  const Model& of = model(cell.model);
  const Spec none = ParseSpec("none");
  const at::Tensor ids = context_ids(cell);
  Capture capture(of);
  {
    KvCache cache = of.NewCache(none, cell.batch, cell.context);
    Feed(of, ids, cache, FindBackend(cell.backend), prefill_chunk(cell.batch), 0, capture.tap());
  }
  LayerTokens captured = capture.Take();
  for (const auto& [keys, values] : captured) {
    for (const at::Tensor& of_side : {keys, values}) CheckFinite(of_side, of, ids, none, FindBackend(cell.backend));
  }
  captured_ = {key, std::move(captured)};  // at last: half of it, where memory runs out, is none
  return captured_.second;
}

Session::WindowStates& Session::window_states(const std::string& key) {
  if (window_states_.first != key) window_states_ = {key, {}};
  return window_states_.second;
}

void Session::GiveBack() {
  captured_ = {};
  window_states_ = {};
  ids_ = {};
  tokenizer_ = {};
  corpus_.reset();
  model_ = {"", nullptr};
  warm_for_.clear();
  ForgetMasks();
  GiveBackMemory(devices_);
  used_ = false;
}

std::vector<double> Samples(Session& session, benchmark::State& state,
                            const std::function<double()>& sample) {
  const Options& o = session.options();
  session.WarmUpForModel();
  // On a CPU, what others take of it is looked at where a tenth of a second has passed: samples since then were quiet, or
  // are taken again as long as there is time. Nothing is certain of disturbed ones.
  constexpr double kLook = 0.1;
  const bool watched = session.device().is_cpu();
  std::vector<double> quiet, unseen, disturbed;
  ForeignLoad all, since;
  const auto half_width = [](const std::vector<double>& of) -> std::optional<double> {
    const auto interval = MedianInterval(of);
    Counters median;
    if (interval) AddSpread(median, "seconds", of);
    return interval ? std::optional((interval->high - interval->low) / 2 / median.front().second) : std::nullopt;
  };
  const auto look = [&](bool last) {
    const bool seen = since.Seconds() >= kLook;
    if (unseen.empty() || !(seen || last)) return;
    const ForeignLoad& of = seen ? since : all;
    const bool foreign = watched && of.Seconds() >= kLook && of.Processors().value_or(0) > MostForeignProcessors();
    std::vector<double>& to = foreign ? disturbed : quiet;
    to.insert(to.end(), unseen.begin(), unseen.end());
    unseen.clear();
    since.Restart();
  };
  for (auto _ : state) {
    const auto go_on = [&] {
      look(/*last=*/false);
      const auto good = static_cast<int64_t>(quiet.size() + unseen.size());
      const auto taken = good + static_cast<int64_t>(disturbed.size());
      if (taken < o.runs) return true;
      if (taken >= o.max_runs || all.Seconds() >= static_cast<double>(o.max_seconds)) return false;
      if (good < o.runs) return true;
      std::vector<double> so_far = quiet;
      so_far.insert(so_far.end(), unseen.begin(), unseen.end());
      return half_width(so_far).value_or(1) >= 0.01;
    };
    while (go_on()) {
      const int64_t loaded = LoadedCount();
      const double one = sample();
      if (LoadedCount() != loaded) {  // a kernel was compiled or loaded in it
        since.Restart();
        continue;
      }
      unseen.push_back(one);
    }
    look(/*last=*/true);
    const bool enough = static_cast<int64_t>(quiet.size()) >= o.runs;
    if (!enough) quiet.insert(quiet.end(), disturbed.begin(), disturbed.end());
    Counters median;
    AddSpread(median, "seconds", quiet);
    state.SetIterationTime(median.front().second);
    if (watched) {
      if (const std::optional<double> foreign = all.Processors()) state.counters["foreign_processors"] = *foreign;
      state.counters["disturbed"] = enough ? 0 : 1;
      if (!enough) {
        session.AddNote(StrCat("disturbed: others took processors, ", disturbed.size(), " of ", quiet.size(), " samples"));
      }
    }
    if (const auto half = half_width(quiet); half && enough) state.counters["ci95_fraction"] = *half;
  }
  state.counters["samples"] = static_cast<double>(quiet.size());
  return quiet;
}

void AddGpuState(Session& session, const GpuSummary& seen, Counters& counters) {
  if (seen.readings == 0) return;
  if (seen.sm_clock_mhz) counters.emplace_back("sm_clock_mhz", static_cast<double>(*seen.sm_clock_mhz));
  if (seen.temperature_c) counters.emplace_back("temperature_c", static_cast<double>(*seen.temperature_c));
  if (seen.clock_reasons) {
    std::string words;
    for (const std::string& word : ThrottleReasons(*seen.clock_reasons)) {
      words += (words.empty() ? "" : ", ") + word;
    }
    counters.emplace_back("throttled", words.empty() ? 0 : 1);
    if (!words.empty()) session.AddNote("throttled: " + words);
  }
  std::vector<GpuProcess> foreign;
  for (const auto& nvml : session.nvml()) {
    const auto others = nvml->ForeignProcesses();
    if (others) foreign.insert(foreign.end(), others->begin(), others->end());
  }
  if (foreign.empty()) return;
  counters.emplace_back("foreign_processes", static_cast<double>(foreign.size()));
  counters.emplace_back("disturbed", 1);
  session.AddNote("foreign processes: " + ProcessText(foreign));
}

void AddSpread(Counters& counters, const std::string& name, std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  counters.emplace_back(name, n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2);
  counters.emplace_back(name + "_min", values.front());
  counters.emplace_back(name + "_max", values.back());
}

void AddList(Counters& counters, const std::string& name, const std::vector<double>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    counters.emplace_back(StrCat(name, "[", i, "]"), values[i]);
  }
}

std::string CellName(const Measurement& measurement, const Cell& cell) {
  return StrCat(measurement.name, "/", ModelLabel(cell.model), "/", cell.backend, "/", cell.spec,
                "/ctx:", cell.context, "/batch:", cell.batch);
}

}  // namespace kvq
