// The results of a run on disk: Google Benchmark's JSON, complete after every cell whatever kills
// the process, and taken up where it stands by the next run.
#pragma once

#include <cstddef>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace kvq {

// One benchmark's entries of the file. With repetitions there are several: each run, mean, median,
// ...
struct StoredCell {
  std::string name;
  std::string text;    // as it stands in the file, byte for byte; several joined by commas
  std::string error;   // "skipped: ..." or "failed: ..."; empty if it was measured
  double seconds = 0;  // that the whole cell took, if it says so

  bool skipped() const { return error.rfind("skipped: ", 0) == 0; }
  bool failed() const { return !error.empty() && !skipped(); }
};

// Writes `text` beside `path`, on to the disk, and renames: whoever reads `path` sees the old or
// the new file whole. What is no file of its own, a device, a pipe, or where this program prints, is not
// replaced: it is handed the text. Throws InputError that begins with `flag`, names the file and says why;
// the old one stays.
void WriteWhole(const std::string& flag, const std::string& path, std::string_view text);

// Throws InputError as WriteWhole would, where that can be told before there is a text.
void CheckWritable(const std::string& flag, const std::string& path);

class ResultsFile {
 public:
  // Locks `path` against other runs until this object ends, by flock on PATH.lock, and reads it if
  // it is there. An empty `path`: results are kept in memory only. Throws InputError where another
  // run holds it (naming its process), where it cannot be written, where it is no file of its own
  // (WriteWhole), and where it is no results of kvqbench or cut off.
  explicit ResultsFile(const std::string& path);
  ~ResultsFile();
  ResultsFile(const ResultsFile&) = delete;
  ResultsFile& operator=(const ResultsFile&) = delete;

  // Takes up what a file says, as the constructor does. Throws InputError where it is no results of kvqbench or cut off.
  void TakeUp(const std::string& text);

  // A fact of the file's context, empty if it has none.
  std::string Fact(const std::string& name) const;

  // Settles under which context the results stand: `json` is what Google Benchmark's reporter
  // writes as the head of a file. A file that was begun keeps its own; results of another build,
  // model, text, machine or setting are not mixed in: InputError naming the first difference. Only
  // facts of models and texts that it does not have yet are added. A patch may come from another
  // build of kvqbench.
  void Join(const std::string& json, bool patch);

  const std::vector<StoredCell>& cells() const { return cells_; }
  const StoredCell* Find(const std::string& name) const;
  // Where in the file the cell is, or will be.
  size_t Place(const std::string& name) const;

  // The cells that `--patch=pattern` measures again: those that match, or what an interrupted patch
  // of the same pattern left. Throws InputError if there is none.
  std::vector<std::string> PatchNames(const std::string& pattern) const;
  // From now on cells of `names` replace what is there. Copies the file to PATH.bak, unless an
  // interrupted patch goes on, whose copy has what was there before it: then it returns false.
  bool BeginPatch(const std::string& pattern, const std::vector<std::string>& names, bool backup);

  // Adds entries, as Google Benchmark's reporter wrote them; a cell that is there is replaced in
  // place.
  void Add(std::string_view entries);
  // Puts what was added on to the disk.
  void Save();
  // What the file says then.
  std::string Text() const;

 private:
  void Lock();
  void Refuse(const std::string& fact, const nlohmann::json* theirs,
              const nlohmann::json* ours) const;

  std::string path_;
  int lock_ = -1;
  bool begun_ = false;    // the file was there
  bool changed_ = false;  // there is something to save
  std::string context_;   // text of the object, byte for byte
  std::vector<StoredCell> cells_;
  std::map<std::string, size_t> places_;
  std::set<std::string> added_;  // by this run
  // Later runs that changed the file, oldest first; the last one has "left" while it is an
  // unfinished patch.
  nlohmann::ordered_json history_ = nlohmann::ordered_json::array();
  nlohmann::ordered_json now_;  // date and commit of this run
  bool patching_ = false;
};

}  // namespace kvq
