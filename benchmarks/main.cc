// kvqbench: registers every measurement over models x backends x specs x contexts x batch sizes, runs
// those that the filter picks, and writes what Google Benchmark writes.
#include <benchmark/benchmark.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>
#include <regex>
#include <set>
#include <sstream>

#include "accuracy/samples.h"
#include "benchmarks/commit.h"
#include "benchmarks/json_reporter.h"
#include "benchmarks/options.h"
#include "benchmarks/progress.h"
#include "benchmarks/results_file.h"
#include "benchmarks/schema_v2.h"
#include "fixtures/cache/kv_cache.h"
#include "fixtures/cache/presets.h"
#include "fixtures/gguf.h"
#include "fixtures/machine/host_load.h"
#include "fixtures/machine/host_memory.h"
#include "fixtures/machine/out_of_memory.h"
#include "kernels/error.h"
#include "kernels/runtime/compiler.h"
#include "kernels/sha256.h"

namespace kvq {
namespace {

// Console output without the counters of single layers and depths, nor lists, which the JSON has. Colours are for
// terminals.
class Console : public benchmark::ConsoleReporter {
 public:
  Console() : ConsoleReporter(isatty(STDOUT_FILENO) ? OO_ColorTabular : OO_Tabular) {}
  void ReportRuns(const std::vector<Run>& runs) override {
    std::vector<Run> brief = runs;
    for (Run& run : brief) {
      std::erase_if(run.counters, [](const auto& counter) {
        return counter.first.find_first_of("/[") != std::string::npos || counter.first == "elapsed_s";
      });
    }
    ConsoleReporter::ReportRuns(brief);
  }
};

// Hands every run to the display and to the results, under the plain names of the cells: the suffixes
// for fixed iterations and manual time say nothing here. The display sees one run of many benchmarks.
class Tee : public benchmark::BenchmarkReporter {
 public:
  Tee(std::unique_ptr<BenchmarkReporter> display, const std::set<std::string>& names, ResultsFile& results,
      Progress& progress)
      : display_(std::move(display)), results_(results), progress_(progress) {
    for (const std::string& name : names) widest_ = std::max(widest_, name.size());
  }
  bool ReportContext(const Context& context) override {
    if (std::exchange(begun_, true)) return true;
    Context of_all = context;
    of_all.name_field_width = widest_;
    return display_->ReportContext(of_all);
  }
  void ReportRuns(const std::vector<Run>& runs) override {
    if (std::exchange(drops_, false)) return;
    std::vector<Run> named = runs;
    for (Run& run : named) {
      run.run_name.iterations.clear();
      run.run_name.time_type.clear();
      // Of the file, not of the part of it that this run measures.
      run.family_index = static_cast<int64_t>(results_.Place(run.run_name.str()));
    }
    progress_.Clear();
    display_->ReportRuns(named);
    std::ostringstream entries;
    JsonReporter json;
    json.SetOutputStream(&entries);
    json.ReportRuns(named);
    results_.Add(entries.str());
  }
  void DropNext() { drops_ = true; }  // the next runs are no result
  void End() { display_->Finalize(); }

 private:
  std::unique_ptr<BenchmarkReporter> display_;
  ResultsFile& results_;
  Progress& progress_;
  size_t widest_ = 10;
  bool begun_ = false, drops_ = false;
};

// The first line of an error: libtorch appends a stack to its own.
std::string FirstLine(const char* text) {
  const std::string_view all(text);
  return std::string(all.substr(0, all.find('\n')));
}

// Throws what ends a cell without a result.
void Measure(benchmark::State& state, const Measurement& measurement, const Cell& cell, Session& session) {
  const Spec spec = ParseSpec(cell.spec);
  if (measurement.needs_encoding && spec.stores_dense()) throw Skip("nothing is encoded");
  if (measurement.quality && session.random_weights(cell.model)) {
    throw Skip("random weights say nothing about quality; give --models a directory with real ones");
  }
  const ModelFiles files = FindModel(cell.model);
  const ModelConfig config = files.config();
  const int64_t new_tokens = measurement.new_tokens(session.options());
  // Rotary positions on random weights have no length they were trained for.
  const bool endless = files.random_weights() && !config.ropes.empty();
  if (cell.context + new_tokens > config.max_position_embeddings && !endless) {
    throw Skip(StrCat("the context's ", cell.context, " tokens", new_tokens > 0 ? StrCat(" and ", new_tokens, " new ones") : "",
                      " exceed the model's ", config.max_position_embeddings, " positions"));
  }
  const Backend& backend = FindBackend(cell.backend);
  if (backend.graph && session.device().is_cuda() && session.dtype() == at::kFloat) {
    throw Skip(StrCat("backend ", cell.backend, " needs 16 bits on a GPU"));
  }
  const c10::InferenceMode no_gradients;
  session.note.clear();
  session.samples.clear();
  session.ran = StrCat(backend.graph ? "sdpa" : cell.backend, spec.stores_dense() ? "" : " on decoded tokens");
  if (backend.ran != nullptr) backend.ran();  // of a cell that failed
  session.TakeWatch();                        // what a cell that failed has left
  Counters counters = measurement.run(session, cell, state);
  session.ran = RanText(backend, session.ran);
  AddGpuState(session, session.TakeWatch(), counters);
  CheckSamples(session.samples);
  for (const auto& [name, value] : counters) {
    // The model's own numbers were looked at by the measurement (fixtures/finite.h); this is what it made of them.
    if (!std::isfinite(value)) throw std::runtime_error(StrCat(name, " is not a finite number"));
    state.counters[name] = value;
  }
  if (state.counters.count("disturbed") > 0 && state.counters["disturbed"] != 0) state.counters.erase("ci95_fraction");
  const std::string stages = StageText(config, session.devices());
  // The kernels that really ran: nothing falls back silently.
  state.SetLabel(StrCat(session.device().is_cuda() ? "cuda" : "cpu", " ",
                        c10::toString(session.dtype()), ", ", session.ran,
                        spec.meaning.empty() ? "" : "; ", spec.meaning, stages.empty() ? "" : "; ", stages,
                        session.note.empty() ? "" : "; ", session.note));
}

// True where memory ran out that cells before this one may have held: all is given back then, and the cell is to be
// tried once more. So what fits does not depend on their order.
bool RunCell(benchmark::State& state, const Measurement& measurement, const Cell& cell, Session& session) {
  const bool others_before = session.BeginCell();
  std::string out_of_memory;
  try {
    Measure(state, measurement, cell, session);
  } catch (const Skip& reason) {
    state.SkipWithError(StrCat("skipped: ", reason.what()).c_str());
  } catch (const std::exception& error) {
    if (IsOutOfMemory(error)) {
      out_of_memory = OutOfMemoryText(error, session.devices());
    } else {
      state.SkipWithError(StrCat("failed: ", FirstLine(error.what())).c_str());
    }
  }
  if (out_of_memory.empty()) return false;
  state.SkipWithError(StrCat("skipped: out of memory: ", out_of_memory).c_str());
  session.GiveBack();
  return others_before;
}

// All cells of the flags, each with its measurement; bad names and impossible specs end here, before
// anything is measured.
std::vector<std::pair<const Measurement*, Cell>> Cells(const CommandLine& line) {
  const Options& o = line.options;
  for (const std::string& backend : o.backends) FindBackend(backend);
  std::vector<std::pair<const Measurement*, Cell>> cells;
  const bool negative = !line.output.filter.empty() && line.output.filter[0] == '-';
  const std::regex filter = CompileRegex("--benchmark_filter", line.output.filter.substr(negative ? 1 : 0));
  std::map<std::string, std::string> labels;
  for (const std::string& model : o.models) {
    const std::string& other = labels.emplace(ModelLabel(model), model).first->second;
    if (other != model) {
      throw InputError("--models: '", other, "' and '", model, "' would both be named '", ModelLabel(model),
                       "' in the results");
    }
    const CacheShape shape = CacheShapeOf(FindModel(model).config(), 1);
    for (const std::string& spec : o.schemes) CheckSpec(ParseSpec(spec), shape);
  }
  BoundConvertedGgufs();  // when all models are held that this command names
  const std::vector<std::string> none = {"none"};
  std::set<std::string> names;  // a list may say the same twice
  for (const Measurement& measurement : Measurements()) {
    // ruler_vt runs where ruler_vt is asked for, or ruler.
    const std::string family = measurement.name.substr(0, negative ? std::string::npos : measurement.name.find('_'));
    if (measurement.on_request && line.output.filter.find(family) == std::string::npos &&
        line.output.patch.find(family) == std::string::npos) {
      continue;
    }
    for (const std::string& model : o.models) {
      for (const std::string& backend : o.backends) {
        for (const int64_t context : o.contexts) {
          for (const int64_t batch : o.batches) {
            for (const std::string& spec : measurement.unquantized ? none : o.schemes) {
              const Cell cell{model, backend, spec, context, batch};
              const std::string name = CellName(measurement, cell);
              if (std::regex_search(name, filter) != negative && names.insert(name).second) {
                cells.emplace_back(&measurement, cell);
              }
            }
          }
        }
      }
    }
  }
  if (cells.empty()) {
    throw InputError("--benchmark_filter: '", line.output.filter,
                     "' matches none of the benchmarks; --benchmark_list_tests lists them");
  }
  return cells;
}

// What the results were made by, on and with. All of it must be the same where a file is taken up again
// (benchmarks/results_file.cc has the exceptions), so everything that moves a number belongs here. What the machine's memory and
// products reach is looked at, a third of a second on two processors, where something is timed.
void AddContext(Session& session, const std::vector<std::string>& benchmark_flags, bool timed) {
  const Options& o = session.options();
  benchmark::AddCustomContext("kvqbench_build", KVQ_BUILD_TYPE);
  benchmark::AddCustomContext("kvqbench_commit", Commit());
  benchmark::AddCustomContext("kvqbench_sha256", Sha256File("/proc/self/exe"));
  std::string flags;
  for (const std::string& flag : benchmark_flags) flags += (flags.empty() ? "" : " ") + flag;
  if (!flags.empty()) benchmark::AddCustomContext("benchmark_flags", flags);
  bool text = false;
  for (const std::string& model : o.models) {
    const ModelFiles files = FindModel(model);
    text = text || !files.random_weights();
    benchmark::AddCustomContext("model " + model, "sha256:" + ModelSha256(files) +
                                                      (files.random_weights() ? ", random weights" : ""));
    benchmark::AddCustomContext("model_config " + ModelLabel(model), ModelConfigV2(files).dump());
    benchmark::AddCustomContext("kv_dtype " + ModelLabel(model), c10::toString(session.kv_dtype(model)));
    if (!files.random_weights()) {
      benchmark::AddCustomContext("model_tokenizer " + ModelLabel(model), "sha256:" + TokenizerSha256(files.dir));
    }
  }
  for (const std::string& scheme : o.schemes) {  // what a name of the user's means; those of engines stand in every label
    const Preset* preset = FindPreset(scheme.substr(0, scheme.find('@')));
    if (preset != nullptr && preset->engine.empty()) benchmark::AddCustomContext("preset " + preset->name, preset->spec);
  }
  if (text) {
    benchmark::AddCustomContext("corpus", session.corpus().name);
    benchmark::AddCustomContext("corpus_sha256", session.corpus().sha256);
  }
  benchmark::AddCustomContext("protocol", o.protocol);
  if (!BothNeedles(o)) benchmark::AddCustomContext("needles", o.needles);
  benchmark::AddCustomContext("runs", std::to_string(o.runs));
  benchmark::AddCustomContext("max_runs", std::to_string(o.max_runs));
  benchmark::AddCustomContext("max_seconds", std::to_string(o.max_seconds));
  benchmark::AddCustomContext("decode_tokens", std::to_string(o.decode_tokens));
  // Where they are asked for: nothing else depends on them.
  if (o.ruler_samples != Options().ruler_samples) benchmark::AddCustomContext("ruler_samples", std::to_string(o.ruler_samples));
  for (const auto& [name, file] : {std::pair("squad_file_sha256", o.squad_file), {"hotpotqa_file_sha256", o.hotpotqa_file}}) {
    if (!file.empty()) benchmark::AddCustomContext(name, Sha256File(file));
  }
  benchmark::AddCustomContext("windows", std::to_string(o.windows));
  if (o.skip_windows > 0) benchmark::AddCustomContext("skip_windows", std::to_string(o.skip_windows));
  if (o.parts != Options().parts) benchmark::AddCustomContext("parts", Join(o.parts));
  benchmark::AddCustomContext("stride", std::to_string(o.stride));
  benchmark::AddCustomContext("prefill_chunk", std::to_string(o.prefill_chunk));
  benchmark::AddCustomContext("seed", std::to_string(o.seed));
  if (o.memory_limit > 0) benchmark::AddCustomContext("memory_limit_mib", std::to_string(o.memory_limit));
  if (o.memory > 0) benchmark::AddCustomContext("memory_bytes", std::to_string(o.memory));
  if (o.check_capacity) benchmark::AddCustomContext("check_capacity", "true");
  benchmark::AddCustomContext("device", DeviceText(session.devices()));
  benchmark::AddCustomContext("dtype", c10::toString(session.dtype()));
  for (size_t i = 0; i < session.nvml().size(); ++i) {  // before the probes warm them up
    const std::string which = i == 0 ? "" : StrCat(" gpu:", int{session.devices()[i].index()});
    for (const auto& [name, value] : session.nvml()[i]->Facts()) benchmark::AddCustomContext(name + which, value);
  }
  if (!session.why_no_nvml().empty()) benchmark::AddCustomContext("nvml", session.why_no_nvml());
  for (const auto& [name, value] : DeviceFacts(session.devices())) benchmark::AddCustomContext(name, value);
  if (!timed) return;
  for (const auto& [name, value] : ProbedRates(session.devices(), session.dtype())) benchmark::AddCustomContext(name, value);
}

// The head of a results file, as Google Benchmark writes it.
std::string ContextText() {
  std::ostringstream text;
  JsonReporter json;
  json.SetOutputStream(&text);
  json.ReportContext(benchmark::BenchmarkReporter::Context());
  return text.str();
}

// The --dtype that means what a context calls it.
std::string DTypeFlag(const std::string& name) {
  for (const char* flag : {"float32", "float16", "bfloat16"}) {
    if (c10::toString(ParseDType("--dtype", flag)) == name) return flag;
  }
  return "auto";
}

// The cells that are to be measured now: those that have no result yet, or that --patch names.
std::set<std::string> Missing(const std::vector<std::string>& names, const OutputOptions& output,
                              ResultsFile& results, const SamplesFile& samples) {
  std::set<std::string> missing;
  if (output.patch.empty()) {
    for (const std::string& name : names) {
      const StoredCell* cell = results.Find(name);
      if (cell == nullptr || cell->failed()) missing.insert(name);
    }
    return missing;
  }
  const std::vector<std::string> patched = results.PatchNames(output.patch);
  for (const std::string& name : patched) {
    if (std::find(names.begin(), names.end(), name) == names.end()) {
      throw InputError("--patch: ", output.out, " has ", name, ", which the other flags do not name; ",
                       "give those that ", output.out, " was made with");
    }
  }
  if (results.BeginPatch(output.patch, patched, output.backup) && output.backup) samples.Backup();
  return {patched.begin(), patched.end()};
}

// Presets with the bits per element of `context` tokens of a model's cache, all counted, and of encoded tokens alone.
std::string PresetList(const std::string& model, int64_t context) {
  const ModelFiles files = FindModel(model);
  const CacheShape shape = CacheShapeOf(files.config(), 1);
  const at::ScalarType dense = CacheTypeOf(files.config(), files.dir);
  std::vector<std::array<std::string, 6>> rows = {{"preset", StrCat("bits, ", context), "encoded", "engine", "spec", "the engine's flags"}};
  const auto bits = [](double value) {
    char text[16];
    std::snprintf(text, sizeof text, "%.3f", value);
    return std::string(text);
  };
  for (const Preset& preset : Presets()) {
    const Spec spec = ParseSpec(preset.name);
    std::string all = "-", encoded = "-";
    try {
      CheckSpec(spec, shape);
      all = bits(8.0 * static_cast<double>(KvBytes(spec, shape, context, dense)) /
                 static_cast<double>(shape.TokenElements() * context));
      encoded = bits(EncodedBits(spec, shape).value_or(16));
    } catch (const InputError&) {  // not for this shape
    }
    rows.push_back({preset.name, all, encoded, preset.engine.empty() ? "your own" : preset.engine, preset.spec,
                    preset.flags});
  }
  std::array<size_t, 6> widths = {};
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text = StrCat("of ", ModelLabel(model), "; -: not for its cache\n");
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      text += row[i] + (i + 1 < row.size() ? std::string(widths[i] + 2 - row[i].size(), ' ') : "\n");
    }
  }
  return text;
}

// A cell, as a run of Google Benchmark by itself: of one run it could not be tried a second time.
void RunBenchmark(const std::string& name, const Measurement& measurement, const Cell& cell, Session& session,
                  Progress& progress, Tee& reporter) {
  bool again = false;
  const auto attempt = [&](bool last) {
    again = false;
    benchmark::ClearRegisteredBenchmarks();
    benchmark::RegisterBenchmark(
        name.c_str(),
        [&](benchmark::State& state) {
          if (measurement.timed && std::string_view(KVQ_BUILD_TYPE) != "Release") {
            state.SkipWithError("skipped: times are measured in Release builds only, this is "
                                KVQ_BUILD_TYPE);
          } else if (RunCell(state, measurement, cell, session) && !last) {
            again = true;
          }
          if (again) return reporter.DropNext();
          const double seconds = progress.Done(name);
          state.counters["elapsed_s"] = seconds;
          if (!state.error_occurred()) progress.Took(measurement, cell, seconds);
        })
        ->Iterations(1)  // with as many samples as it takes: see Samples
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
    benchmark::RunSpecifiedBenchmarks(&reporter, ".");
  };
  progress.Start(name);
  attempt(/*last=*/false);
  if (!again) return;
  progress.Clear();
  std::fprintf(stderr, "kvqbench: %s ran out of memory; what others left is given back, and it is tried once more\n",
               name.c_str());
  attempt(/*last=*/true);
}

int Main(int argc, char** argv) {
  const CommandLine line = ParseCommandLine({argv + 1, argv + argc});
  if (line.help) {
    std::cout << HelpText();
    return 0;
  }
  if (Schemes().empty() || Measurements().empty() || Architectures().empty() ||
      PublishedShapes().empty()) {
    throw std::runtime_error("a table is empty: its rows were lost at link time");
  }
  if (line.output.list_devices) {
    std::cout << DeviceList();
    return 0;
  }
  if (line.output.list_presets) {
    std::cout << PresetList(line.options.models.front(), line.options.contexts.front());
    return 0;
  }
  if (!line.output.to_v2.empty()) {
    for (const std::string& path : WriteV2(line.output.files, line.output.to_v2)) std::cout << path << "\n";
    return 0;
  }
  LimitMemory();
  KeepFreedMemory();
  const auto cells = Cells(line);
  if (line.output.list_tests) {
    for (const auto& [measurement, cell] : cells) std::cout << CellName(*measurement, cell) << "\n";
    return 0;
  }
  if (!line.output.summary_file.empty()) CheckWritable("--summary-file", line.output.summary_file);
  ResultsFile results(line.output.out);
  SamplesFile samples(line.output.out);
  // What `auto` was when the file was begun: settled again, on a busy machine, it could be the other.
  Session session(line.options, DTypeFlag(results.Fact("dtype")));

  std::vector<std::string> words = line.rest;
  words.insert(words.begin(), "kvqbench");  // into the file's context; argv[0] would tell where this machine keeps it
  std::vector<char*> rest;
  for (std::string& word : words) rest.push_back(word.data());
  int count = static_cast<int>(rest.size());
  benchmark::Initialize(&count, rest.data());
  if (count > 1) throw InputError(rest[1], ": no such flag; --help lists them");

  // Everything that can be wrong with the input is found before anything is measured.
  for (const std::string& model : line.options.models) {
    const std::string dir = FindModel(model).dir;
    if (dir.empty()) continue;  // random weights
    LoadModel(dir, at::kFloat, at::Device(at::kMeta));  // the tensors' names, types and shapes, without their numbers
    const int64_t tokens = session.tokenizer(model).vocab_size();
    const int64_t vocabulary = LoadModelConfig(dir).vocab_size;
    if (tokens > vocabulary) {
      throw InputError(dir, "/tokenizer.json: has ", tokens, " tokens, config.json says vocab_size ",
                       vocabulary, "; it belongs to another model");
    }
  }
  AddContext(session, line.rest, std::ranges::any_of(cells, [](const auto& cell) { return cell.first->timed; }));
  // Behind the probes, which take more than a small limit leaves.
  if (line.options.memory_limit > 0) LimitMemory(session.devices(), line.options.memory_limit << 20);
  results.Join(ContextText(), !line.output.patch.empty());
  std::vector<std::string> names;
  for (const auto& [measurement, cell] : cells) names.push_back(CellName(*measurement, cell));
  const std::set<std::string> missing = Missing(names, line.output, results, samples);

  Progress progress(line.options, cells.size(), isatty(STDERR_FILENO) != 0);
  OnCompiling([&progress](const std::string& line) {
    progress.Clear();
    std::fprintf(stderr, "kvqbench: %s\n", line.c_str());
  });
  for (size_t i = 0; i < cells.size(); ++i) {
    const auto& [measurement, cell] = cells[i];
    const std::string& name = names[i];
    const StoredCell* stored = results.Find(name);
    if (stored != nullptr && stored->error.empty()) progress.Took(*measurement, cell, stored->seconds);
    if (missing.count(name) == 0) continue;
    progress.Expect(*measurement, cell);
  }
  std::unique_ptr<benchmark::BenchmarkReporter> display;
  if (line.output.format == "json") {
    display = std::make_unique<JsonReporter>();
  } else {
    display = std::make_unique<Console>();
  }
  const auto summarize = [&] {
    if (line.output.summary_file.empty()) return;
    WriteWhole("--summary-file", line.output.summary_file,
               Summary(results, names, missing, progress.elapsed()));
  };
  if (missing.size() < names.size() && line.output.patch.empty()) {
    std::fprintf(stderr, "kvqbench: %s has %zu of %zu benchmarks%s\n", line.output.out.c_str(),
                 names.size() - missing.size(), names.size(),
                 missing.empty() ? "; nothing to do (--patch=REGEX measures again)" : ", the others follow");
  }
  if (!missing.empty()) {
    Tee reporter(std::move(display), missing, results, progress);
    // Items before the cell that they belong to: a cell that is there has them.
    const auto save = [&] {
      std::vector<std::string> known;
      for (const StoredCell& cell : results.cells()) known.push_back(cell.name);
      samples.Save(known);
      results.Save();
    };
    try {
      for (size_t i = 0; i < cells.size(); ++i) {
        if (missing.count(names[i]) == 0) continue;
        save();  // all before
        session.samples.clear();
        RunBenchmark(names[i], *cells[i].first, cells[i].second, session, progress, reporter);
        const StoredCell* cell = results.Find(names[i]);
        samples.Put(names[i], cell != nullptr && cell->error.empty() ? session.samples : std::vector<Sample>());
      }
    } catch (const InputError&) {  // results cannot be written
      reporter.End();
      summarize();
      throw;
    }
    reporter.End();
    progress.Clear();
    save();
  }
  summarize();
  size_t failures = 0;
  for (const std::string& name : missing) {
    const StoredCell* cell = results.Find(name);
    failures += cell != nullptr && cell->failed();
  }
  if (failures > 0) {
    std::fprintf(stderr, "kvqbench: %zu of %zu benchmarks failed; their error_message says why\n", failures,
                 names.size());
  }
  return failures == 0 ? 0 : 1;
}

int Guarded(int argc, char** argv) {
  try {
    return Main(argc, argv);
  } catch (const InputError& error) {
    std::fprintf(stderr, "kvqbench: %s\n", error.what());
    return 2;
  } catch (const std::filesystem::filesystem_error& error) {  // a path that cannot be followed
    std::fprintf(stderr, "kvqbench: %s: %s\n", error.path1().c_str(), error.code().message().c_str());
    return 2;
  } catch (const std::exception& error) {
    const char* kind = IsOutOfMemory(error) ? "out of memory, and not in a benchmark" : "internal error";
    std::fprintf(stderr, "kvqbench: %s: %s\n", kind, error.what());
    return 1;
  }
}

}  // namespace
}  // namespace kvq

[[gnu::section(".preinit_array"), gnu::used]] void (*const kBeforeAll)(int, char**, char**) = kvq::LimitSpinning;

int main(int argc, char** argv) {
  kvq::Leave(kvq::Guarded(argc, argv));
}
