// The table of measurements, and what one of them gets to work with. Adding a measurement is adding one
// file here or in accuracy/ that ends in a row.
#pragma once

#include <benchmark/benchmark.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fixtures/dataset.h"
#include "fixtures/device.h"
#include "fixtures/model.h"
#include "fixtures/tokenizer.h"

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
  int64_t windows = 4;
  int64_t stride = 0;  // 0: the protocol's own
  std::string protocol = "decode";
  std::string device = "cpu";
  std::string dtype = "auto";
  int64_t seed = 42;
  int64_t runs = 3;
  int64_t decode_tokens = 128;
  int64_t prefill_chunk = 0;  // 0: by device
};

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
  explicit Session(Options options);

  const Options& options() const { return options_; }
  at::Device device() const { return device_; }
  // Tokens a prefill feeds at once, of each of `batch` sequences.
  int64_t prefill_chunk(int64_t batch) const;
  // The attention that really ran, for the label of the result: the cell's backend, unless a measurement knows more.
  std::string ran;
  at::ScalarType dtype();  // `auto` is settled by measuring both at the first use

  const Model& model(const std::string& name);
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
  // [batch, kv_heads, context, head_dim], before any cache.
  const std::vector<std::pair<at::Tensor, at::Tensor>>& captured_cache(const Cell& cell);

 private:
  Options options_;
  at::Device device_;
  std::optional<at::ScalarType> dtype_;
  std::pair<std::string, std::unique_ptr<Model>> model_;
  std::pair<std::string, std::unique_ptr<Tokenizer>> tokenizer_;
  std::optional<Corpus> corpus_;
  std::pair<std::string, std::vector<int32_t>> ids_;
  std::pair<std::string, std::vector<std::pair<at::Tensor, at::Tensor>>> captured_;
};

// Names and values of a result, in the order in which they are shown. A name with a slash ("nmse_k/layer:3") is
// written to the JSON and left out of the console. What was not measured is not there: never 0.
using Counters = std::vector<std::pair<std::string, double>>;

struct Measurement {
  std::string name;
  std::string what;           // one line for --help
  bool timed = false;         // its number is a time: refused in anything but a Release build
  bool needs_encoding = false;  // means nothing for specs that encode nothing
  bool quality = false;         // means nothing on random weights
  // Measures once per state iteration, setting its time, and returns the counters.
  Counters (*run)(Session& session, const Cell& cell, benchmark::State& state);
};

const std::vector<Measurement>& Measurements();

struct RegisterMeasurement {
  explicit RegisterMeasurement(Measurement measurement);
};

// Median, smallest and largest as `name`, `name_min` and `name_max`: how sure a repeated time is.
void AddSpread(Counters& counters, const std::string& name, std::vector<double> values);

// Runs `work` once per iteration of the state, as its manual time; returns the seconds of each.
template <typename Work>
std::vector<double> TimeIterations(benchmark::State& state, at::Device device, Work&& work) {
  std::vector<double> seconds;
  for (auto _ : state) {
    seconds.push_back(Time(device, work));
    state.SetIterationTime(seconds.back());
  }
  return seconds;
}

// `<measurement>/<model>/<backend>/<spec>/ctx:N/batch:B`.
std::string CellName(const Measurement& measurement, const Cell& cell);

}  // namespace kvq
