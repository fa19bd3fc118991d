// The table of measurements, and what one of them gets to work with. Adding a measurement is adding one
// file here or in accuracy/ that ends in a row.
#pragma once

#include <benchmark/benchmark.h>

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "accuracy/samples.h"
#include "fixtures/dataset.h"
#include "fixtures/machine/device.h"
#include "fixtures/model.h"
#include "fixtures/machine/nvml.h"
#include "fixtures/tokenizer/tokenizer.h"

namespace kvq {

// The flags of kvqbench beside Google Benchmark's own; --help explains them.
struct Options {
  std::vector<std::string> models = {"smollm2-135m"};
  std::vector<std::string> schemes = {"none", "int4-hqq"};
  std::vector<std::string> backends = {"sdpa"};
  std::vector<int64_t> contexts = {1024};
  std::vector<int64_t> batches = {1};
  std::string corpus = "pride-and-prejudice";
  std::string corpus_file;
  int64_t windows = 4, skip_windows = 0;
  std::vector<std::string> parts = {"all", "k", "v", "kv"};  // of sensitivity
  int64_t stride = 0;  // 0: the protocol's own
  std::string protocol = "decode";
  std::string needles = "both";
  std::string device = "cpu";
  std::string dtype = "auto", kv_dtype = "auto";
  int64_t seed = 42;
  int64_t runs = 3, max_runs = 30, max_seconds = 10;  // see Samples
  int64_t decode_tokens = 128;
  int64_t ruler_samples = 25;
  std::string squad_file, hotpotqa_file;  // what ruler_qa_1 and ruler_qa_2 ask about
  int64_t prefill_chunk = 0;  // 0: by device
  int64_t memory_limit = 0;   // MiB; 0: none
  int64_t memory = 0;         // bytes that capacity plans for; 0: what there is
  bool check_capacity = false;
  bool vram_diag = false;
};

// Whether needle hides the reference study's number, too.
inline bool BothNeedles(const Options& options) { return options.needles == "both" || options.protocol == "study"; }

// One benchmark: a measurement of one model under one backend and spec, at one context and batch size.
struct Cell {
  std::string model, backend, spec;
  int64_t context = 0, batch = 1;
};

// Thrown where a cell cannot run here for a reason that is nobody's mistake; it is reported as skipped.
class Skip : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What the cells of a run share: the loaded model, the text, the flags. Keeps the last of each.
class Session {
 public:
  // `settled` is what --dtype=auto came to before, where that is known ("auto": it is not).
  explicit Session(Options options, const std::string& settled = "auto");

  const Options& options() const { return options_; }
  at::Device device() const { return devices_.front(); }
  // Of --device: a model's layers are spread over them (Model).
  const std::vector<at::Device>& devices() const { return devices_; }
  // Tokens a prefill feeds at once, of each of `batch` sequences.
  int64_t prefill_chunk(int64_t batch) const;
  // The attention that really ran, for the label of the result: the cell's backend, unless a measurement knows more.
  std::string ran;
  at::ScalarType dtype();  // `auto` is settled by measuring both at the first use
  // What the model's caches store dense tokens in. --kv-dtype=auto: what --dtype names; where it names none, what a GPU
  // computes in, and on a CPU, whatever it computes in, CacheTypeOf: so sizes do not depend on the machine.
  at::ScalarType kv_dtype(const std::string& model);

  const Model& model(const std::string& name);
  void WarmUpForModel();  // once for the model that was used last, see Samples
  // The model has a published shape and no real weights: its times mean something, its answers do not.
  bool random_weights(const std::string& model) const { return FindModel(model).random_weights(); }
  const Tokenizer& tokenizer(const std::string& name);
  const Corpus& corpus();
  // The corpus in the model's tokens, without BOS.
  const std::vector<int32_t>& corpus_ids(const std::string& model);
  // The first n tokens of the corpus as [batch, n], BOS first where the tokenizer adds it; for random
  // weights random tokens of --seed. Throws Skip where the corpus is shorter.
  at::Tensor context_ids(const Cell& cell);
  // Keys and values of each layer of the cache as the unquantized model computes them on context_ids,
  // [batch, kv_heads, context, head_dim], as a cache stores dense ones.
  const LayerTokens& captured_cache(const Cell& cell);

  // What a window's first call makes where it encodes nothing: hidden states, and what is stored.
  struct FirstCall {
    at::Tensor hidden;
    LayerTokens tokens;
  };
  // What the unquantized model makes of a text's windows, for all specs.
  struct WindowStates {
    std::map<std::array<int64_t, 2>, FirstCall> first_calls;  // by a window's first token and the call's tokens
    std::map<int64_t, at::Tensor> hidden;  // over whole windows, by a window's first token
    std::map<std::array<int64_t, 3>, at::Tensor> logits;  // of some of its positions, by a window's first token, the first and the last
  };
  // `key` says what they depend on: under another one they are gone.
  WindowStates& window_states(const std::string& key);

  void DropCapturedCache() { captured_ = {}; }

  // A cell begins. True where cells before it may have left something behind: since there was nothing, one has begun.
  bool BeginCell() { return std::exchange(used_, true); }
  // All that cells share is dropped, to be had anew when it is wanted, and no allocator keeps any memory: as before the
  // first cell. No measurement may be running.
  void GiveBack();

  // What the driver says of each GPU; none on a CPU, and where NVML does not work: why_no_nvml says why.
  const std::vector<std::unique_ptr<Nvml>>& nvml() { return nvml_; }
  const std::string& why_no_nvml() const { return why_no_nvml_; }
  // All GPUs are watched together (GpuWatch): clocks and temperature of the worst, energy of all.
  bool watched() const { return !watches_.empty(); }
  void BeginWatch();
  void EndWatch();
  GpuSummary TakeWatch();
  // Seconds that `work` takes on the devices, which are watched.
  template <typename Work>
  double Time(Work&& work) {
    BeginWatch();
    struct End {
      Session& session;
      ~End() { session.EndWatch(); }
    } end{*this};
    return kvq::Time(devices_, std::forward<Work>(work));
  }

  // What the cell that runs has to say beside its numbers; ends up in its label.
  std::string note;
  // The items that the cell scored, for FILE.json.samples.jsonl.
  std::vector<Sample> samples;
  void AddNote(const std::string& text) { note += (note.empty() ? "" : "; ") + text; }

 private:
  Options options_;
  std::vector<at::Device> devices_;
  std::optional<at::ScalarType> dtype_, named_kv_dtype_;
  std::map<std::string, at::ScalarType> kv_dtypes_;  // of models, where none is named
  std::pair<std::string, std::unique_ptr<Model>> model_;
  std::string warm_for_;  // the model
  std::pair<std::string, std::unique_ptr<Tokenizer>> tokenizer_;
  std::optional<Corpus> corpus_;
  std::pair<std::string, std::vector<int32_t>> ids_;
  std::pair<std::string, LayerTokens> captured_;
  std::pair<std::string, WindowStates> window_states_;
  bool used_ = false;  // by a cell, since there was nothing
  std::vector<std::unique_ptr<Nvml>> nvml_;
  std::vector<std::unique_ptr<GpuWatch>> watches_;
  std::string why_no_nvml_;
};

// Names and values of a result, in the order in which they are shown. A name with a slash ("nmse_k/layer:3") is
// written to the JSON and left out of the console. What was not measured is not there: never 0.
using Counters = std::vector<std::pair<std::string, double>>;

// Adds a list of numbers, which the JSON has as one array called `name`; the elements are counters
// `name[i]` (benchmarks/json_reporter.h).
void AddList(Counters& counters, const std::string& name, const std::vector<double>& values);

// What was seen of the GPU while a cell was measured, if anything: sm_clock_mhz, temperature_c, throttled;
// and a note where something else than the cell made it slow.
void AddGpuState(Session& session, const GpuSummary& seen, Counters& counters);

struct Measurement {
  std::string name;
  std::string what;           // one line for --help
  std::string study = {};     // what --protocol=study does instead; empty: it changes nothing
  bool timed = false;         // its number is a time: refused in anything but a Release build
  bool needs_encoding = false;  // means nothing for specs that encode nothing
  bool quality = false;         // means nothing on random weights
  bool unquantized = false;     // of the model alone: runs once, under the spec `none`
  bool on_request = false;      // so costly that it runs only where --benchmark_filter names it, or what its name begins with
  int turn = 1;  // cells run turn by turn: 0 what a first table wants, 2 what takes longest
  // The first cell of a model, backend, context and batch size takes so many times as long as the others: it makes what they share.
  double (*first)(const Options& options) = [](const Options&) { return 1.0; };
  // Tokens of a prompt that take about as long as a cell: for the time left, while none like it is done.
  double (*like_tokens)(const Options& options, double tokens) = [](const Options&, double tokens) { return 5 * tokens; };
  // Tokens that it goes on for behind the context: they need positions, too.
  int64_t (*new_tokens)(const Options& options) = [](const Options&) { return int64_t{0}; };
  // Measures once per state iteration, setting its time, and returns the counters.
  Counters (*run)(Session& session, const Cell& cell, benchmark::State& state);
};

// By turn, then by name.
const std::vector<Measurement>& Measurements();

struct RegisterMeasurement {
  explicit RegisterMeasurement(Measurement measurement);
};

// Median, smallest and largest as `name`, `name_min` and `name_max`: how sure a repeated time is.
void AddSpread(Counters& counters, const std::string& name, std::vector<double> values);

// Takes samples, each the seconds of one repetition, until their median is sure: at least --runs of them, then until
// half of its 95 % interval is below 1 % of it, --max-runs are taken or --max-seconds have passed. All within one
// iteration of the state, whose time is the median. Before the first sample of a model its GPUs work for two seconds, or
// what is measured first would look faster than it is. On a CPU samples during which others used the processors are taken
// again while --max-runs and --max-seconds allow. Counters: samples, ci95_fraction (half the interval over the
// median; not there for fewer than six); on a CPU foreign_processors, and disturbed, 1 where quiet samples are fewer than
// --runs: then all count, and nothing is certain.
std::vector<double> Samples(Session& session, benchmark::State& state,
                            const std::function<double()>& sample);

// `<measurement>/<model>/<backend>/<spec>/ctx:N/batch:B`.
std::string CellName(const Measurement& measurement, const Cell& cell);

}  // namespace kvq
