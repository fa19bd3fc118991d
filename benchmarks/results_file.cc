#include "benchmarks/results_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <regex>
#include <utility>

#include "fixtures/dataset.h"
#include "kernels/error.h"
#include "kernels/file.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kFlag[] = "--benchmark_out";

// The members of a valid JSON object, or the elements of a list, as they are written.
std::vector<std::string_view> Parts(std::string_view text) {
  std::vector<std::string_view> parts;
  int depth = 0;
  bool quoted = false;
  size_t begin = 0;
  const auto end_part = [&](size_t end) {
    const size_t first = text.find_first_not_of(" \t\r\n", begin);
    if (first < end) {
      const size_t last = text.find_last_not_of(" \t\r\n", end - 1);
      parts.push_back(text.substr(first, last + 1 - first));
    }
    begin = end + 1;
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      quoted = c != '"';
    } else if (c == '"') {
      quoted = true;
    } else if (c == '{' || c == '[') {
      if (++depth == 1) begin = i + 1;
    } else if (c == '}' || c == ']') {
      if (--depth == 0) end_part(i);
    } else if (c == ',' && depth == 1) {
      end_part(i);
    }
  }
  return parts;
}

// The value of a member of a valid JSON object as it is written, empty if there is none. `key` has
// nothing to escape.
std::string_view Member(std::string_view object, const std::string& key) {
  const std::string quoted = "\"" + key + "\"";
  for (const std::string_view part : Parts(object)) {
    if (part.substr(0, quoted.size()) != quoted) continue;
    const size_t colon = part.find(':', quoted.size());
    return part.substr(part.find_first_not_of(" \t\r\n", colon + 1));
  }
  return {};
}

// What another run of the same study on the same kind of machine may say otherwise: moments,
// places, and what the machine measured of itself. Everything else must be equal.
bool MayDiffer(const std::string& fact) {
  static const std::set<std::string> kFacts = {
      "date",   "host_name",           "executable",   "load_avg",     "mhz_per_cpu",
      "caches", "cpu_scaling_enabled", "aslr_enabled", "read_gb_per_s", "copy_gb_per_s", "gemm_tflop_per_s",
      "gpu_sm_clock_mhz", "gpu_memory_clock_mhz", "gpu_temperature_c", "gpu_watts", "gpu_throttled",
      "gpu_memory_used_bytes", "gpu_foreign_processes"};
  return kFacts.count(fact.substr(0, fact.find(" gpu:"))) != 0;
}

bool IsOfBuild(const std::string& fact) {
  return fact == "kvqbench_commit" || fact == "kvqbench_sha256";
}

// Of one model, the text or a preset of the user's: a run with another one brings its own.
bool IsOfInput(const std::string& fact) {
  return fact.rfind("model", 0) == 0 || fact.rfind("corpus", 0) == 0 || fact.rfind("kv_dtype ", 0) == 0 ||
         fact.rfind("preset ", 0) == 0;
}

// What may be replaced: nothing, or a regular file that this program does not print to.
bool IsOwnFile(const std::string& path) {
  struct stat there, printed;
  if (::stat(path.c_str(), &there) != 0) return true;
  for (const int stream : {STDOUT_FILENO, STDERR_FILENO}) {
    if (::fstat(stream, &printed) == 0 && printed.st_ino == there.st_ino && printed.st_dev == there.st_dev) return false;
  }
  return S_ISREG(there.st_mode);
}

// The file that a link stands for: two links to one file are one file.
std::string Resolved(const std::string& flag, const std::string& path) {
  std::error_code error;
  fs::path at = path;
  for (int links = 0; fs::is_symlink(at, error); ++links) {
    at = at.parent_path() / fs::read_symlink(at, error);
    if (error || links == 40) throw InputError(flag, ": ", path, ": a link that leads nowhere");
  }
  return at.string();
}

}  // namespace

void WriteWhole(const std::string& flag, const std::string& path, std::string_view text) {
  const bool replaces = IsOwnFile(path);
  const std::string target = replaces ? Resolved(flag, path) : path;
  const std::string part = replaces ? target + ".part" : path;
  const auto give_up = [&](int error) {
    if (replaces) ::unlink(part.c_str());
    throw InputError(flag, ": cannot write ", path, ": ", std::strerror(error));
  };
  if (!replaces) std::cout.flush();  // before what follows it
  const int file = ::open(part.c_str(), O_WRONLY | O_CLOEXEC | (replaces ? O_CREAT | O_TRUNC | O_NOFOLLOW : O_APPEND),
                          0666);
  if (file < 0) give_up(errno);
  int error = 0;
  while (!text.empty() && error == 0) {
    const ssize_t count = ::write(file, text.data(), text.size());
    if (count >= 0) {
      text.remove_prefix(static_cast<size_t>(count));
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  if (replaces && error == 0 && ::fsync(file) != 0) error = errno;
  if (::close(file) != 0 && error == 0) error = errno;
  if (replaces && error == 0 && ::rename(part.c_str(), target.c_str()) != 0) error = errno;
  if (error != 0) give_up(error);
  if (!replaces) return;
  // The new name, too, outlives a power cut; a file system that cannot do this has nothing better.
  const std::string folder = fs::path(target).parent_path().string();
  const int dir = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (dir >= 0) {
    ::fsync(dir);
    ::close(dir);
  }
}

void CheckWritable(const std::string& flag, const std::string& path) {
  std::error_code error;
  if (fs::is_directory(path, error)) throw InputError(flag, ": ", path, " is a folder; name a file in it");
  const std::string folder = fs::path(path).parent_path().string();
  if (IsOwnFile(path) && ::access(folder.empty() ? "." : folder.c_str(), W_OK) != 0) {
    throw InputError(flag, ": cannot write ", path, ": ", std::strerror(errno), "; the folder must be there");
  }
}

ResultsFile::ResultsFile(const std::string& path) : path_(path) {
  if (path_.empty()) return;
  std::error_code error;
  if (fs::is_directory(path_, error)) {
    throw InputError(kFlag, ": ", path_, " is a folder; name a file in it, as ", path_,
                     "/results.json");
  }
  if (!IsOwnFile(path_)) {
    throw InputError(kFlag, ": ", path_, " is a device, a pipe, or where this program prints; results are taken up again ",
                     "from their file, so name a regular one, or write JSON to stdout by --benchmark_format=json");
  }
  path_ = Resolved(kFlag, path_);
  Lock();
  try {
    if (std::error_code error; fs::exists(path_, error)) TakeUp(ReadFile(path_));
  } catch (...) {
    ::unlink((path_ + ".lock").c_str());
    ::close(lock_);
    throw;
  }
}

ResultsFile::~ResultsFile() {
  if (lock_ < 0) return;
  ::unlink((path_ + ".lock").c_str());  // before it is released: see Lock
  ::close(lock_);
}

void ResultsFile::Lock() {
  const std::string name = path_ + ".lock";
  while (true) {
    lock_ = ::open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (lock_ < 0) {
      throw InputError(kFlag, ": cannot write ", name, ": ", std::strerror(errno),
                       "; the folder must be there");
    }
    if (::flock(lock_, LOCK_EX | LOCK_NB) != 0) {
      const int error = errno;
      char holder[256] = {};
      const ssize_t count = ::pread(lock_, holder, sizeof holder - 1, 0);
      ::close(lock_);
      if (error != EWOULDBLOCK) {
        throw InputError(kFlag, ": cannot lock ", name, ": ", std::strerror(error));
      }
      throw InputError(kFlag, ": ", path_, " is being written by another kvqbench (",
                       count > 0 ? holder : "it has just started",
                       "); wait until it ends, or name another file");
    }
    // The holder before may have removed the file between our opening and locking it.
    struct stat ours, there;
    if (::fstat(lock_, &ours) == 0 && !S_ISREG(ours.st_mode)) {
      ::close(std::exchange(lock_, -1));
      throw InputError(kFlag, ": ", name, " is no regular file; move it away, or name another file");
    }
    if (::fstat(lock_, &ours) == 0 && ::stat(name.c_str(), &there) == 0 &&
        ours.st_ino == there.st_ino && ours.st_dev == there.st_dev) {
      break;
    }
    ::close(lock_);
  }
  char host[256] = {};
  ::gethostname(host, sizeof host - 1);
  const std::string holder = StrCat("pid ", ::getpid(), " on ", host);
  // Only for the message: the lock holds without.
  if (::ftruncate(lock_, 0) != 0 || ::pwrite(lock_, holder.data(), holder.size(), 0) < 0) return;
}

void ResultsFile::TakeUp(const std::string& text) {
  if (text.empty()) return;  // as mktemp leaves it
  try {
    // Member and Parts rely on its being JSON; it is written by recursion.
    const json file = json::parse(text, [](int depth, json::parse_event_t, json&) {
      if (depth > 32) throw InputError("it has lists within lists, more than 32 deep");
      return true;
    });
    if (!file.is_object()) throw InputError("it is no object");
    // Members are taken as they are written: of two with one name the first, and none whose name is written in escapes.
    context_ = Member(text, "context");
    const json context = json::parse(context_);
    if (!context.contains("kvqbench_build")) throw InputError("it was not kvqbench");
    for (const auto& [fact, value] : context.items()) {
      if (fact == "dtype" || fact.rfind("model ", 0) == 0) value.get_ref<const std::string&>();
    }
    const std::string_view benchmarks = Member(text, "benchmarks"), history = Member(text, "history");
    json::parse(benchmarks).get_ref<const json::array_t&>();
    for (const std::string_view entry : Parts(benchmarks)) Add(entry);
    if (!history.empty()) history_ = nlohmann::ordered_json::parse(history);
    for (const auto& run : history_.get_ref<const nlohmann::ordered_json::array_t&>()) {
      run.value("patched", "");
      run.value("left", std::vector<std::string>());
    }
  } catch (const std::exception& error) {  // of JSON, of a missing field, of those above
    throw InputError(kFlag, ": ", path_,
                     " is there, but is no results file of kvqbench, or cut off; ",
                     "name another or move it away (", error.what(), ")");
  }
  begun_ = true;
  changed_ = false;
  added_.clear();
}

std::string ResultsFile::Fact(const std::string& name) const {
  if (context_.empty()) return "";
  const json context = json::parse(context_);
  const auto fact = context.find(name);
  return fact != context.end() && fact->is_string() ? fact->get<std::string>() : "";
}

void ResultsFile::Refuse(const std::string& fact, const json* theirs, const json* ours) const {
  const auto said = [&](const json* value) {
    if (value == nullptr) return "no " + fact;
    return fact + "=" + (value->is_string() ? value->get<std::string>() : value->dump());
  };
  throw InputError(kFlag, ": ", path_, " was measured with ", said(theirs), ", this run has ",
                   said(ours),
                   "; the two are never mixed: name another file or move this one away");
}

void ResultsFile::Join(const std::string& head, bool patch) {
  const std::string whole = head + "]}";
  const std::string_view text = Member(whole, "context");
  const json ours = json::parse(text);
  now_ = {{"date", ours.at("date")}, {"commit", ours.value("kvqbench_commit", "")}};
  if (!begun_) {
    context_ = text;
    return;
  }
  const json theirs = json::parse(context_);
  const auto must_match = [&](const std::string& fact) {
    return !MayDiffer(fact) && !(patch && IsOfBuild(fact));
  };
  std::string added;
  for (const auto& [fact, value] : ours.items()) {
    if (fact.rfind("kv_dtype ", 0) == 0 && !theirs.contains(fact) && theirs.contains("model_config " + fact.substr(9))) {
      const json computed = theirs.value("dtype", "");  // a build before --kv-dtype stored what it computed in
      if (computed != value) Refuse(fact, &computed, &value);
    }
    if (theirs.contains(fact)) {
      if (must_match(fact) && theirs.at(fact) != value) Refuse(fact, &theirs.at(fact), &value);
    } else if (IsOfInput(fact) || MayDiffer(fact)) {  // rates, where nothing was timed before
      added += StrCat(",\n    ", json(fact).dump(), ": ", value.dump());
    } else if (must_match(fact)) {
      Refuse(fact, nullptr, &value);
    }
  }
  for (const auto& [fact, value] : theirs.items()) {
    if (must_match(fact) && !ours.contains(fact) && !IsOfInput(fact)) Refuse(fact, &value, nullptr);
  }
  // A model is named by the last folder of its path: under one name there is one model.
  const auto models = [](const json& context) {
    std::map<std::string, std::string> sha256;
    for (const auto& [fact, value] : context.items()) {
      if (fact.rfind("model ", 0) != 0) continue;
      sha256[ModelLabel(fact.substr(6))] = value.get<std::string>();
    }
    return sha256;
  };
  const auto of_file = models(theirs);
  for (const auto& [label, sha256] : models(ours)) {
    const auto there = of_file.find(label);
    if (there == of_file.end() || there->second == sha256) continue;
    const json file = there->second, mine = sha256;
    Refuse("model " + label, &file, &mine);
  }
  context_.insert(context_.find_last_not_of(" \t\r\n", context_.size() - 2) + 1, added);
  if (!patch && !history_.empty() && history_.back().contains("left")) {
    throw InputError(kFlag, ": ", path_,
                     " has an interrupted --patch=", history_.back().value("patched", ""),
                     "; run that again first, it goes on");
  }
}

const StoredCell* ResultsFile::Find(const std::string& name) const {
  const auto place = places_.find(name);
  return place == places_.end() ? nullptr : &cells_[place->second];
}

size_t ResultsFile::Place(const std::string& name) const {
  const auto place = places_.find(name);
  return place == places_.end() ? cells_.size() : place->second;
}

std::vector<std::string> ResultsFile::PatchNames(const std::string& pattern) const {
  if (!begun_) {
    throw InputError("--patch: ", path_, " is not there; a run without --patch makes it");
  }
  if (!history_.empty() && history_.back().contains("left")) {
    const std::string begun = history_.back().value("patched", "");
    if (begun == pattern) return history_.back().at("left").get<std::vector<std::string>>();
    throw InputError("--patch: ", path_, " has an interrupted --patch=", begun,
                     "; run that again first, it goes on");
  }
  const std::regex regex(pattern);
  std::vector<std::string> names;
  for (const StoredCell& cell : cells_) {
    if (std::regex_search(cell.name, regex)) names.push_back(cell.name);
  }
  if (names.empty()) {
    throw InputError("--patch: '", pattern, "' matches none of the ", cells_.size(),
                     " benchmarks of ", path_);
  }
  return names;
}

bool ResultsFile::BeginPatch(const std::string& pattern, const std::vector<std::string>& names,
                             bool backup) {
  patching_ = true;
  if (!history_.empty() && history_.back().contains("left")) return false;
  if (backup) WriteWhole("--patch", path_ + ".bak", ReadFile(path_));
  nlohmann::ordered_json patch = {{"patched", pattern}};
  patch.update(now_);
  patch["benchmarks"] = names.size();
  patch["left"] = names;
  history_.push_back(patch);
  return true;
}

void ResultsFile::Add(std::string_view entries) {
  const std::string list = StrCat("[", entries, "]");
  for (const std::string_view text : Parts(list)) {
    const json entry = json::parse(text);
    const std::string name = entry.at("run_name").get<std::string>();
    if (begun_ && added_.empty() && !patching_) {
      nlohmann::ordered_json resumed = {{"resumed_after", cells_.size()}};
      resumed.update(now_);
      history_.push_back(resumed);
    }
    const size_t place = places_.emplace(name, cells_.size()).first->second;
    if (place == cells_.size()) cells_.emplace_back();
    StoredCell& cell = cells_[place];
    if (added_.insert(name).second) {
      cell = {.name = name, .text = std::string(text), .error = "", .seconds = 0};
    } else {
      cell.text += StrCat(",\n    ", text);
    }
    if (entry.value("error_occurred", false)) {
      cell.error = entry.value("error_message", "failed: no reason");
    }
    const auto seconds = entry.find("elapsed_s");
    if (seconds != entry.end() && seconds->is_number()) cell.seconds = seconds->get<double>();
    if (patching_ && history_.back().contains("left")) {
      auto& left = history_.back()["left"].get_ref<nlohmann::ordered_json::array_t&>();
      std::erase(left, nlohmann::ordered_json(name));
    }
    changed_ = true;
  }
}

void ResultsFile::Save() {
  if (!changed_ || path_.empty()) return;
  if (patching_ && history_.back().contains("left") && history_.back()["left"].empty()) {
    history_.back().erase("left");
  }
  WriteWhole(kFlag, path_, Text());
  changed_ = false;
}

std::string ResultsFile::Text() const {
  std::string text = StrCat("{\n  \"context\": ", context_);
  const auto begin_list = [&](const char* name) { text += StrCat(",\n  \"", name, "\": [\n    "); };
  begin_list("benchmarks");
  for (const StoredCell& cell : cells_) {
    if (&cell != &cells_.front()) text += ",\n    ";
    text += cell.text;
  }
  text += "\n  ]";
  if (!history_.empty()) {
    begin_list("history");
    for (const auto& run : history_) {
      text += (&run == &history_.front() ? "" : ",\n    ") + run.dump();
    }
    text += "\n  ]";
  }
  return text + "\n}\n";
}

}  // namespace kvq
