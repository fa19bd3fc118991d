// What a quality measurement says of single items, so that two specs can be compared item by item: one line of JSON an
// item in FILE.json.samples.jsonl beside the results FILE.json. A measurement hands its items to Session::samples; the
// lines of a cell are written before the cell itself, so a cell that has a result has its lines; they are replaced when
// the cell is measured again, and dropped where it has no result.
//
// Fields: benchmark (the cell's name), sample (the item, by one name under every spec), cluster (items that share a
// context or a document have one; what is resampled together), prompt_sha256 (of the prompt's tokens: where two differ
// nothing is compared), then what is known: right, nll, margin, encoded_share, answer, and further numbers by name.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fixtures/cache/spec.h"

namespace kvq {

struct Sample {
  std::string id, cluster, prompt_sha256;
  std::optional<double> right = {};          // 0 or 1, or a share of what was asked for
  std::optional<double> nll = {};            // of the right answer, nats a token
  std::optional<double> margin = {};         // its log-probability over that of the best wrong answer in the context
  std::optional<double> encoded_share = {};  // EncodedShareRead over the scored tokens
  std::optional<std::string> answer = {};    // text
  std::vector<std::pair<std::string, double>> numbers = {};
};

// Throws where two have one id, or a number is none.
void CheckSamples(const std::vector<Sample>& samples);

// Of the tokens' ids as int32, little endian.
std::string PromptSha256(const std::vector<int32_t>& ids);

// Of the keys and values that attention reads at the positions [begin, end) of a sequence, each with its own token among
// them, the mean share that is encoded. The first `first_call` tokens come in one call, which under @prefill=raw and
// the policies kivi and hf reads its originals, the others as when decoding token by token. A sliding window counts as
// if it saw all.
double EncodedShareRead(const Spec& spec, const CacheShape& shape, int64_t first_call, int64_t begin, int64_t end);

// The lines beside a results file, in memory until Save.
class SamplesFile {
 public:
  // `results`: the path of the results file, whose lock is held; empty: nothing is ever written. Reads the lines that are
  // there. Throws InputError, naming the line, where it is no samples file.
  explicit SamplesFile(const std::string& results);

  // Copies the file, if there is one, to PATH.bak, as a patch does the results.
  void Backup() const;
  // The items of a cell, in place of those that it had.
  void Put(const std::string& benchmark, const std::vector<Sample>& samples);
  // Writes the file whole, if anything changed; none is made where no cell has items. Cells that `known` does not name are
  // left out.
  void Save(const std::vector<std::string>& known);

  // What the file says then, of one cell or of all.
  std::string Text(const std::string& benchmark) const;

 private:
  std::string path_;
  std::map<std::string, std::string> lines_;  // by benchmark
  bool changed_ = false, begun_ = false;
};

}  // namespace kvq
