#include "benchmarks/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "kernels/error.h"

namespace kvq {
namespace {

double Seconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<double>(time).count();
}

double TokensLike(const Measurement& measurement, const Cell& cell, const Options& options) {
  return measurement.like_tokens(options, static_cast<double>(cell.context * cell.batch));
}

// What a cell's time is like, closest first.
std::array<std::string, 2> Groups(const Measurement& measurement, const Cell& cell) {
  return {StrCat(measurement.name, "/", ModelLabel(cell.model), "/", cell.backend, "/", cell.context, "/", cell.batch), measurement.name};
}

}  // namespace

std::string DurationText(double seconds) {
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  if (whole < 120) return StrCat(whole, " s");
  if (whole < 120 * 60) return StrCat((whole + 30) / 60, " min");
  return StrCat(whole / 3600, " h ", whole % 3600 / 60, " min");
}

void Progress::Expect(const Measurement& measurement, const Cell& cell) {
  expected_[CellName(measurement, cell)] = {Groups(measurement, cell), TokensLike(measurement, cell, options_), measurement.first(options_)};
}

void Progress::Took(const Measurement& measurement, const Cell& cell, double seconds) {
  const std::array<std::string, 2> groups = Groups(measurement, cell);
  const double cells = took_.contains(groups[0]) ? 1 : measurement.first(options_);
  for (const std::string& group : groups) {
    Sum& sum = took_[group];
    sum.seconds += seconds, sum.tokens += cells * TokensLike(measurement, cell, options_), sum.cells += cells;
  }
  all_seconds_ += seconds;
  measurements_.insert(measurement.name);
}

double Progress::elapsed() const { return Seconds(Clock::now() - begin_); }

std::optional<double> Progress::left() const {
  if (took_.empty()) return std::nullopt;
  double slowest = 0, sum = 0;  // seconds a token
  for (const std::string& measurement : measurements_) {
    const Sum& took = took_.at(measurement);
    if (took.seconds >= all_seconds_ / 10 && took.tokens > 0) slowest = std::max(slowest, took.seconds / took.tokens);
  }
  std::set<std::string> begun;
  for (const auto& [name, cell] : expected_) {
    const auto close = took_.find(cell.groups[0]), like = took_.find(cell.groups[1]);
    if (close != took_.end()) {
      sum += close->second.seconds / close->second.cells;
      continue;
    }
    const double cells = begun.insert(cell.groups[0]).second ? cell.first : 1;
    if (like != took_.end() && like->second.tokens == 0) {
      sum += cells * like->second.seconds / like->second.cells;
    } else {
      sum += cells * (like != took_.end() ? like->second.seconds / like->second.tokens : slowest) * cell.tokens;
    }
  }
  return sum;
}

void Progress::Start(const std::string& name) {
  start_ = Clock::now();
  const std::optional<double> rest = left();
  std::string line =
      StrCat("[", all_ - expected_.size() + 1, "/", all_, "] ", DurationText(elapsed()), " elapsed",
             rest ? StrCat(", about ", DurationText(*rest), " left") : "", "; ", name);
  Clear();
  struct winsize window;
  if (terminal_ && ::ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 1) {
    line.resize(std::min<size_t>(line.size(), window.ws_col - 1u));  // Clear does not clear two
  }
  std::fprintf(stderr, "%s%s", line.c_str(), terminal_ ? "" : "\n");
  std::fflush(stderr);
}

double Progress::Done(const std::string& name) {
  expected_.erase(name);
  return Seconds(Clock::now() - start_);
}

void Progress::Clear() {
  if (terminal_) std::fputs("\r\033[K", stderr);
}

std::string Summary(const ResultsFile& results, const std::vector<std::string>& names,
                    const std::set<std::string>& missing, double seconds) {
  size_t done = 0, not_run = 0;
  std::vector<const StoredCell*> failed, skipped;
  for (const std::string& name : names) {
    const StoredCell* cell = results.Find(name);
    if (cell == nullptr) {
      ++not_run;
    } else if (cell->error.empty()) {
      ++done;
    } else {
      (cell->failed() ? failed : skipped).push_back(cell);
    }
  }
  std::string text = StrCat(names.size(), " benchmarks: ", done, " done, ", failed.size(),
                            " failed, ", skipped.size(), " skipped, ", not_run, " not run\n");
  text +=
      StrCat(names.size() - missing.size(), " of them were there from earlier runs; this one took ",
             DurationText(seconds), "\n");
  const auto list = [&](const char* title, const std::vector<const StoredCell*>& cells) {
    if (!cells.empty()) text += StrCat("\n", title, "\n");
    for (const StoredCell* cell : cells) {
      // The error begins with the same word.
      const size_t reason = cell->error.find(": ");
      text += StrCat("  ", cell->name, ": ",
                     cell->error.substr(reason == std::string::npos ? 0 : reason + 2), "\n");
    }
  };
  list("failed", failed);
  list("skipped", skipped);
  return text;
}

}  // namespace kvq
