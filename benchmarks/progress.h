// What a run says of itself while it goes on, and at its end.
#pragma once

#include <array>
#include <chrono>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "benchmarks/measurement.h"
#include "benchmarks/results_file.h"

namespace kvq {

// "34 s", "12 min", "5 h 20 min".
std::string DurationText(double seconds);

// Progress on stderr: `[done + 1/all] elapsed, time left; name`, when a cell starts. On a terminal
// the line is drawn over the one before; elsewhere each is a line of its own.
class Progress {
 public:
  Progress(const Options& options, size_t cells, bool terminal)
      : options_(options), all_(cells), terminal_(terminal) {}

  // A cell that will be measured.
  void Expect(const Measurement& measurement, const Cell& cell);
  // A cell that took `seconds`, in this run or an earlier one of the same file.
  void Took(const Measurement& measurement, const Cell& cell, double seconds);

  void Start(const std::string& name);
  // Returns the seconds since Start.
  double Done(const std::string& name);
  void Clear();  // removes the line from a terminal, before something else is printed

  double elapsed() const;
  // Seconds that the cells which are not done will take: each the mean of those of the same
  // measurement, model, backend, context and batch size, of which the first counts Measurement::first times; else by the
  // tokens it is like (Measurement::like_tokens) at the rate of the measurement's others, else of the slowest measurement that
  // took a tenth of the time until now: one whose cells share what they compute, or are cut short, looks quick. Nothing while
  // none is done.
  std::optional<double> left() const;

 private:
  struct Expected {
    std::array<std::string, 2> groups;  // closest first
    double tokens, first;
  };
  struct Sum {
    double seconds = 0, tokens = 0, cells = 0;
  };
  using Clock = std::chrono::steady_clock;

  const Options& options_;
  size_t all_;
  bool terminal_;
  Clock::time_point begin_ = Clock::now(), start_ = begin_;
  std::map<std::string, Expected> expected_;  // by name
  std::map<std::string, Sum> took_;           // by group
  double all_seconds_ = 0;
  std::set<std::string> measurements_;        // that took_ has
};

// The plain text of --summary-file: how many of `names` are done, which failed or were skipped and
// why, and the time. `missing`: those that this run was to measure; the others were in the file.
std::string Summary(const ResultsFile& results, const std::vector<std::string>& names,
                    const std::set<std::string>& missing, double seconds);

}  // namespace kvq
