// kvqbench: registers every measurement over models x backends x specs x contexts x batch sizes, runs
// those that the filter picks, and writes what Google Benchmark writes.
#include <benchmark/benchmark.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <regex>

#include "benchmarks/json_reporter.h"
#include "benchmarks/options.h"
#include "benchmarks/schema_v2.h"
#include "kernels/error.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;

// Console output without the counters of single layers and depths, nor lists, which the JSON has.
class Console : public benchmark::ConsoleReporter {
 public:
  Console() : ConsoleReporter(OO_Defaults) {}
  void ReportRuns(const std::vector<Run>& runs) override {
    std::vector<Run> brief = runs;
    for (Run& run : brief) {
      std::erase_if(run.counters, [](const auto& counter) {
        return counter.first.find_first_of("/[") != std::string::npos;
      });
    }
    ConsoleReporter::ReportRuns(brief);
  }
};

// Hands every run to the display and to the JSON file, under the plain names of the cells: the
// suffixes for fixed iterations and manual time say nothing here.
class Tee : public benchmark::BenchmarkReporter {
 public:
  Tee(std::unique_ptr<BenchmarkReporter> display, std::ostream* file) : display_(std::move(display)) {
    if (file != nullptr) {
      file_ = std::make_unique<JsonReporter>();
      file_->SetOutputStream(file);
    }
  }
  bool ReportContext(const Context& context) override {
    const bool go_on = display_->ReportContext(context);
    return file_ == nullptr ? go_on : file_->ReportContext(context) && go_on;
  }
  void ReportRuns(const std::vector<Run>& runs) override {
    std::vector<Run> named = runs;
    for (Run& run : named) {
      run.run_name.iterations.clear();
      run.run_name.time_type.clear();
    }
    display_->ReportRuns(named);
    if (file_ != nullptr) file_->ReportRuns(named);
  }
  void Finalize() override {
    display_->Finalize();
    if (file_ != nullptr) file_->Finalize();
  }

 private:
  std::unique_ptr<BenchmarkReporter> display_;
  std::unique_ptr<JsonReporter> file_;
};

// One line a finished benchmark on stderr, with the time that is left if the rest takes as long.
class Progress {
 public:
  void Begin(size_t total) { total_ = total; }
  void Start(const std::string& name) {
    std::fprintf(stderr, "[%zu/%zu] %s\n", done_ + 1, total_, name.c_str());
  }
  void Done() {
    ++done_;
    const double elapsed =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    const double left = elapsed / static_cast<double>(done_) * static_cast<double>(total_ - done_);
    std::fprintf(stderr, "[%zu/%zu] %.0f s elapsed, about %.0f s left\n", done_, total_, elapsed, left);
  }

 private:
  size_t total_ = 0, done_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

int failures = 0;

bool IsOutOfMemory(const std::exception& error) {
  return dynamic_cast<const std::bad_alloc*>(&error) != nullptr ||
         dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr ||
         std::string_view(error.what()).find("can't allocate memory") != std::string_view::npos;
}

// The first line of an error: libtorch appends a stack to its own.
std::string FirstLine(const char* text) {
  const std::string_view all(text);
  return std::string(all.substr(0, all.find('\n')));
}

void RunCell(benchmark::State& state, const Measurement& measurement, const Cell& cell,
             Session& session) {
  try {
    const Spec spec = ParseSpec(cell.spec);
    if (measurement.needs_encoding && spec.stores_dense()) throw Skip("nothing is encoded");
    if (measurement.quality && session.random_weights(cell.model)) {
      throw Skip("random weights say nothing about quality; give --models a directory with real ones");
    }
    if (FindBackend(cell.backend).graph && (!session.device().is_cuda() || session.dtype() == at::kFloat)) {
      throw Skip(StrCat("backend ", cell.backend, " needs --device=cuda and 16 bits"));
    }
    const c10::InferenceMode no_gradients;
    session.note.clear();
    session.ran = StrCat(FindBackend(cell.backend).graph ? "sdpa" : cell.backend,
                         spec.stores_dense() ? "" : " on decoded tokens");
    if (session.watch() != nullptr) session.watch()->Take();  // what a cell that failed has left
    Counters counters = measurement.run(session, cell, state);
    if (session.watch() != nullptr) AddGpuState(session, session.watch()->Take(), counters);
    for (const auto& [name, value] : counters) state.counters[name] = value;
    // The kernels that really ran: nothing falls back silently.
    state.SetLabel(StrCat(session.device().is_cuda() ? "cuda" : "cpu", " ",
                          c10::toString(session.dtype()), ", ", session.ran,
                          session.note.empty() ? "" : "; ", session.note));
  } catch (const InputError&) {
    throw;
  } catch (const Skip& reason) {
    state.SkipWithError(StrCat("skipped: ", reason.what()).c_str());
  } catch (const std::exception& error) {
    if (IsOutOfMemory(error)) {
      state.SkipWithError(StrCat("skipped: out of memory: ", FirstLine(error.what())).c_str());
    } else {
      ++failures;
      state.SkipWithError(StrCat("failed: ", FirstLine(error.what())).c_str());
    }
  }
}

// All cells of the flags, each with its measurement; bad names and impossible specs end here, before
// anything is measured.
std::vector<std::pair<const Measurement*, Cell>> Cells(const CommandLine& line) {
  const Options& o = line.options;
  for (const std::string& backend : o.backends) FindBackend(backend);
  std::vector<std::pair<const Measurement*, Cell>> cells;
  const bool negative = !line.output.filter.empty() && line.output.filter[0] == '-';
  std::regex filter;
  try {
    filter = std::regex(line.output.filter.substr(negative ? 1 : 0));
  } catch (const std::regex_error& error) {
    throw InputError("--benchmark_filter: '", line.output.filter, "' is not a regular expression: ",
                     error.what());
  }
  for (const std::string& model : o.models) {
    const ModelFiles files = FindModel(model);
    const ModelConfig config = files.config();
    for (const std::string& spec : o.schemes) CheckSpec(ParseSpec(spec), CacheShapeOf(config, 1));
    for (const int64_t context : o.contexts) {
      // Rotary positions on random weights have no length they were trained for.
      if (context > config.max_position_embeddings && !(files.random_weights() && !config.ropes.empty())) {
        throw InputError("--contexts: ", context, " is longer than the ",
                         config.max_position_embeddings, " positions of model '", model, "'");
      }
    }
  }
  const std::vector<std::string> none = {"none"};
  for (const Measurement& measurement : Measurements()) {
    if (measurement.on_request &&
        line.output.filter.find(measurement.name) == std::string::npos) {
      continue;
    }
    for (const std::string& model : o.models) {
      for (const std::string& backend : o.backends) {
        for (const int64_t context : o.contexts) {
          for (const int64_t batch : o.batches) {
            for (const std::string& spec : measurement.unquantized ? none : o.schemes) {
              const Cell cell{model, backend, spec, context, batch};
              if (std::regex_search(CellName(measurement, cell), filter) != negative) {
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

void AddContext(Session& session) {
  const Options& o = session.options();
  benchmark::AddCustomContext("kvqbench_build", KVQ_BUILD_TYPE);
  benchmark::AddCustomContext("kvqbench_commit", KVQ_COMMIT);
  bool text = false;
  for (const std::string& model : o.models) {
    const ModelFiles files = FindModel(model);
    text = text || !files.random_weights();
    benchmark::AddCustomContext("model " + model, "sha256:" + ModelSha256(files) +
                                                      (files.random_weights() ? ", random weights" : ""));
    benchmark::AddCustomContext("model_config " + ModelLabel(model), ModelConfigV2(files).dump());
  }
  if (text) {
    benchmark::AddCustomContext("corpus", session.corpus().name);
    benchmark::AddCustomContext("corpus_sha256", session.corpus().sha256);
  }
  benchmark::AddCustomContext("protocol", o.protocol);
  benchmark::AddCustomContext("runs", std::to_string(o.runs));
  benchmark::AddCustomContext("max_runs", std::to_string(o.max_runs));
  benchmark::AddCustomContext("max_seconds", std::to_string(o.max_seconds));
  benchmark::AddCustomContext("decode_tokens", std::to_string(o.decode_tokens));
  benchmark::AddCustomContext("seed", std::to_string(o.seed));
  benchmark::AddCustomContext("device", o.device);
  benchmark::AddCustomContext("dtype", c10::toString(session.dtype()));
  if (session.nvml() != nullptr) {  // before the probes warm it up
    for (const auto& [name, value] : session.nvml()->Facts()) benchmark::AddCustomContext(name, value);
  } else if (session.device().is_cuda()) {
    benchmark::AddCustomContext("nvml", session.why_no_nvml());
  }
  for (const auto& [name, value] : DeviceFacts(session.device(), session.dtype())) {
    benchmark::AddCustomContext(name, value);
  }
}

// Writes beside, and renames when everything is there.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path) : path_(path), part_(path + ".part") {
    if (path.empty()) return;
    stream_.open(part_);
    if (!stream_) throw InputError("--benchmark_out: cannot write ", part_, "; is the folder there?");
  }
  ~OutputFile() {
    if (!path_.empty() && !finished_) std::remove(part_.c_str());
  }
  std::ostream* stream() { return path_.empty() ? nullptr : &stream_; }
  void Finish() {
    if (path_.empty()) return;
    stream_.close();
    std::error_code error;
    if (stream_) fs::rename(part_, path_, error);
    if (!stream_ || error) throw InputError("--benchmark_out: cannot write ", path_, "; disk full?");
    finished_ = true;
  }

 private:
  std::string path_, part_;
  std::ofstream stream_;
  bool finished_ = false;
};

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
  Session session(line.options);
  OutputFile out(line.output.out);

  std::vector<std::string> words = line.rest;
  words.insert(words.begin(), argv[0]);
  std::vector<char*> rest;
  for (std::string& word : words) rest.push_back(word.data());
  int count = static_cast<int>(rest.size());
  benchmark::Initialize(&count, rest.data());
  if (count > 1) throw InputError(rest[1], ": no such flag; --help lists them");

  // Everything that can be wrong with the input is found before anything is measured.
  for (const std::string& model : line.options.models) {
    const std::string dir = FindModel(model).dir;
    if (dir.empty()) continue;  // random weights
    Safetensors::Open(dir);
    const int64_t tokens = session.tokenizer(model).vocab_size();
    const int64_t vocabulary = LoadModelConfig(dir).vocab_size;
    if (tokens > vocabulary) {
      throw InputError(dir, "/tokenizer.json: has ", tokens, " tokens, config.json says vocab_size ",
                       vocabulary, "; it belongs to another model");
    }
  }
  AddContext(session);
  Progress progress;
  progress.Begin(cells.size());
  const bool release = std::string(KVQ_BUILD_TYPE) == "Release";
  for (const auto& [measurement, cell] : cells) {
    const std::string name = CellName(*measurement, cell);
    benchmark::RegisterBenchmark(
        name.c_str(),
        [&session, &progress, name, measurement = measurement, cell = cell,
         release](benchmark::State& state) {
          progress.Start(name);
          if (measurement->timed && !release) {
            state.SkipWithError("skipped: times are measured in Release builds only, this is "
                                KVQ_BUILD_TYPE);
          } else {
            RunCell(state, *measurement, cell, session);
          }
          progress.Done();
        })
        ->Iterations(1)  // with as many samples as it takes: see Samples
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
  }
  std::unique_ptr<benchmark::BenchmarkReporter> display;
  if (line.output.format == "json") {
    display = std::make_unique<JsonReporter>();
  } else {
    display = std::make_unique<Console>();
  }
  Tee reporter(std::move(display), out.stream());
  benchmark::RunSpecifiedBenchmarks(&reporter, ".");
  out.Finish();
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace kvq

int main(int argc, char** argv) {
  try {
    return kvq::Main(argc, argv);
  } catch (const kvq::InputError& error) {
    std::fprintf(stderr, "kvqbench: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvqbench: internal error: %s\n", error.what());
    return 1;
  }
}
