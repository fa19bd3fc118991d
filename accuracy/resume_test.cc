// Long runs: what `kill -9` leaves, what the same command makes of it, what --patch changes, and
// that two runs do not share a file. All of it on the command as its users run it. accuracy/hardening.sh runs
// what is slow more often.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <random>
#include <thread>

#include "accuracy/tiny_model.h"
#include "benchmarks/progress.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

std::string Text(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(file)), {});
}

// The texts of the file's benchmarks, byte for byte, by name: kvqbench begins and ends each on a
// line.
std::map<std::string, std::string> Entries(const std::string& text) {
  std::map<std::string, std::string> entries;
  const std::string begin = "\n    {\n      \"name\": \"", end = "\n    }";
  for (size_t at = 0; (at = text.find(begin, at)) != std::string::npos;) {
    const size_t name = at + begin.size(), stop = text.find(end, at);
    entries[text.substr(name, text.find('"', name) - name)] = text.substr(at, stop - at);
    at = stop;
  }
  return entries;
}

// What must not depend on how often a run was interrupted: all but the moments, times, rates and
// shares of time, readings of the machine's load, clock and memory, and the list of the
// interruptions.
json Deterministic(const json& file) {
  json kept = file;
  kept.erase("history");
  for (const char* fact :
       {"date", "load_avg", "mhz_per_cpu", "cpu_scaling_enabled", "read_gb_per_s"}) {
    kept["context"].erase(fact);
  }
  for (json& run : kept["benchmarks"]) {
    for (auto field = run.begin(); field != run.end();) {
      const std::string& name = field.key();
      bool moves = name == "real_time" || name == "cpu_time" || name == "elapsed_s" || name == "samples";
      for (const char* word : {"_ms", "ms_per_", "per_s", "peak_fraction", "ci95_fraction", "share_of_", "rss_",
                               "foreign_processors", "disturbed"}) {
        moves = moves || name.find(word) != std::string::npos;
      }
      field = moves ? run.erase(field) : std::next(field);
    }
    if (run.contains("label")) {  // what a neighbour did is no fact of the cell
      const std::string label = run["label"];
      run["label"] = label.substr(0, label.find("; disturbed"));
    }
  }
  return kept;
}

// How often, from which seed: accuracy/hardening.sh says it.
int Count(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::atoi(text) : otherwise;
}

double Seconds(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// kvqbench in the background.
class Running {
 public:
  Running(const std::string& arguments, const fs::path& err) : err_(err) {
    const std::string command =
        StrCat("exec ", KVQ_BENCH_EXE, " ", arguments, " >/dev/null 2>", err.string());
    fs::remove(err);
    pid_ = fork();
    if (pid_ == 0) {
      execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
      _exit(127);
    }
  }
  ~Running() { Kill(); }
  pid_t pid() const { return pid_; }
  int status() const { return status_; }  // of waitpid

  // Cells it has begun to measure.
  size_t Started() const {
    const std::string text = Text(err_);
    size_t count = 0;
    for (size_t at = 0; (at = text.find("] ", at)) != std::string::npos; ++at) ++count;
    return count;
  }
  bool Ended() {
    if (pid_ > 0 && waitpid(pid_, &status_, WNOHANG) == pid_) pid_ = 0;
    return pid_ == 0;
  }
  void WaitForStart(size_t cells) {
    while (!Ended() && Started() < cells) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  // False if it had ended before.
  bool Kill() {
    if (Ended()) return false;
    kill(pid_, SIGKILL);
    waitpid(pid_, &status_, 0);
    pid_ = 0;
    return WIFSIGNALED(status_);
  }
  int Wait() {
    if (pid_ > 0) waitpid(pid_, &status_, 0);
    pid_ = 0;
    return WIFEXITED(status_) ? WEXITSTATUS(status_) : -1;
  }

 private:
  fs::path err_;
  pid_t pid_ = 0;
  int status_ = 0;
};

class LongRun : public TinyModel {
 protected:
  void SetUp() override {
    TinyModel::SetUp();
    WidenHeads(dir_ / "tiny");
  }
  // Long cells and short ones, of 2 contexts and 4 specs.
  std::string Study(const fs::path& file) const {
    return Tiny() +
           " --schemes=none,int8-hqq@residual=16,int4-hqq@residual=16,int2-hqq-kivi@residual=16 "
           "--contexts=48,64 --windows=2 --runs=1 --decode-tokens=2 --dtype=float32 "
           "--benchmark_filter='kv_size|perplexity|error|distribution|sensitivity|decode|needle' "
           "--benchmark_out=" +
           file.string();
  }
  // Cheap cells that are the same to the bit.
  std::string Small(const fs::path& file, const std::string& more = "") const {
    return Tiny() +
           " --schemes=none,int4-hqq@residual=16 --contexts=48,64 --windows=2 --dtype=float32 "
           "--benchmark_filter='kv_size|perplexity' --benchmark_out=" +
           file.string() + " " + more;
  }
  // An uninterrupted study, and how long it takes.
  struct Whole {
    json results;
    double start_up = 0, all = 0;  // seconds: until its first cell, until its end
    size_t cells() const { return results["benchmarks"].size(); }
    double a_cell() const { return (all - start_up) / static_cast<double>(cells()); }
  };
  Whole Uninterrupted() const {
    const fs::path file = dir_ / "whole.json", err = dir_ / "err";
    const auto begin = Clock::now();
    Running run(Study(file), err);
    run.WaitForStart(1);
    Whole whole{{}, Seconds(begin)};
    EXPECT_EQ(run.Wait(), 0) << Text(err);
    whole.all = Seconds(begin);
    whole.results = json::parse(Text(file));
    EXPECT_GE(whole.cells(), 20u);
    return whole;
  }
  void KillAndResume(int kills, unsigned seed);
};

void ExpectEqual(const fs::path& file, const json& expected) {
  const json found = json::parse(Text(file));
  EXPECT_EQ(found["benchmarks"].size(), expected["benchmarks"].size());
  // json::diff says what differs, where all of it would fill the screen.
  EXPECT_EQ(json::diff(Deterministic(found), Deterministic(expected)), json::array());
}

// Seconds, at random.
void Wait(std::mt19937& random, double most) {
  std::this_thread::sleep_for(std::chrono::duration<double>(std::uniform_real_distribution<double>(0, most)(random)));
}

// The file's entries, of which all that were there before are there as they were.
std::map<std::string, std::string> Kept(const fs::path& file, const std::map<std::string, std::string>& before) {
  const std::string text = Text(file);
  const auto now = Entries(text);
  if (!text.empty()) {
    EXPECT_EQ(json::parse(text)["benchmarks"].size(), now.size());
  }
  for (const auto& [name, entry] : before) EXPECT_EQ(now.count(name) != 0 ? now.at(name) : "lost", entry);
  return now;
}

// Kills the study `kills` times, at random moments of its start and of its cells, and lets it end.
void LongRun::KillAndResume(int kills, unsigned seed) {
  const fs::path file = dir_ / "killed.json", err = dir_ / "err";
  const Whole whole = Uninterrupted();
  const size_t cells = whole.cells();
  std::mt19937 random(seed);
  std::map<std::string, std::string> before;
  std::vector<size_t> there;  // cells after each kill
  int in_start_up = 0, studies = 1, parts = 0;
  while (there.size() < static_cast<size_t>(kills)) {
    const unsigned kind = random() % 5;
    fs::remove(file.string() + ".part");  // that another kill left: kind 1 waits for a new one
    Running run(Study(file), err);
    if (kind == 0) {  // before its first cell
      Wait(random, whole.start_up);
    } else {  // in its cells: by number, so that the kills spread over the study at any speed
      run.WaitForStart(1 + random() % std::max<size_t>(cells * 4 / 5 / static_cast<size_t>(kills), 1));
      Wait(random, whole.a_cell());
    }
    if (kind == 1) {  // and while the file is written
      while (!run.Ended() && !fs::exists(file.string() + ".part")) {
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
    }
    if (!run.Kill()) {  // the study has ended before: another one takes the kills that are left
      EXPECT_EQ(run.Wait(), 0) << "wait status " << run.status() << ": " << Text(err);
      ExpectEqual(file, whole.results);
      fs::remove(file);
      before.clear();
      ++studies;
      continue;
    }
    parts += kind == 1 && fs::exists(file.string() + ".part");
    const size_t started = run.Started();
    in_start_up += started == 0;
    const auto now = Kept(file, before);
    // All that it began but the last, which may have ended.
    EXPECT_GE(now.size() + 1, before.size() + started);
    EXPECT_LE(now.size(), before.size() + started);
    before = now;
    there.push_back(now.size());
  }
  const Outcome last = Execute(Study(file));
  EXPECT_EQ(last.code, 0) << last.err;
  ExpectEqual(file, whole.results);
  EXPECT_FALSE(fs::exists(file.string() + ".part"));
  EXPECT_FALSE(fs::exists(file.string() + ".lock"));
  size_t fields = 0;
  const json compared = Deterministic(whole.results);
  for (const json& run : compared["benchmarks"]) fields += run.size();
  std::cout << kills << " kills of a study of " << cells << " cells (" << whole.all << " s, " << whole.start_up
            << " s until its first cell), " << in_start_up << " before a cell began, " << parts
            << " while the file was written; cells there after each:";
  for (const size_t count : there) std::cout << " " << count;
  std::cout << "; " << fields << " fields compared in " << studies << " studies\n";
}

TEST_F(LongRun, KilledAndResumedEqualsUninterrupted) { KillAndResume(3, 1); }

using LongRunSlow = LongRun;
TEST_F(LongRunSlow, ManyKills) { KillAndResume(Count("KVQ_KILLS", 20), Count("KVQ_SEED", 2)); }

// A disk that something else fills at random moments of a study, and frees again: what was there stays, and the same
// command goes on.
TEST_F(LongRunSlow, DiskFullAtRandomMoments) {
  const char* disk = std::getenv("KVQ_SMALL_DISK");
  if (disk == nullptr) GTEST_SKIP() << "accuracy/hardening.sh mounts the disk that this fills";
  const int fills = Count("KVQ_FILLS", 20);
  const fs::path file = fs::path(disk) / "out.json", ballast = fs::path(disk) / "ballast", err = dir_ / "err";
  const Whole whole = Uninterrupted();
  std::mt19937 random(Count("KVQ_SEED", 2));
  std::map<std::string, std::string> before;
  int full = 0, at_start = 0, studies = 1;
  for (int tries = 0; full < fills; ++tries) {
    ASSERT_LT(tries, 4 * fills) << "the disk is hardly ever full when something is written";
    const auto fill = [&] {  // but for a rest that a file may fit or not
      const uintmax_t rest = random() % 3 == 0 ? 0 : random() % (2 * Text(dir_ / "whole.json").size());
      const uintmax_t free = fs::space(disk).available;
      std::ofstream(ballast) << std::string(free > rest ? free - rest : 0, 'x');
    };
    const bool first = random() % 8 == 0;
    if (first) fill();
    Running run(Study(file), err);
    if (!first) {
      run.WaitForStart(random() % 4);
      Wait(random, whole.a_cell());
      fill();
    }
    const int code = run.Wait();
    EXPECT_FALSE(fs::exists(file.string() + ".part"));
    EXPECT_FALSE(fs::exists(file.string() + ".lock"));
    before = Kept(file, before);
    fs::remove(ballast);
    if (code == 0) {
      ExpectEqual(file, whole.results);
      fs::remove(file);
      before.clear();
      ++studies;
      continue;
    }
    EXPECT_EQ(code, 2);
    EXPECT_NE(Text(err).find("kvqbench: --benchmark_out: cannot write " + file.string() + ": No space left on device"),
              std::string::npos)
        << Text(err);
    ++full;
    at_start += first;
  }
  const Outcome last = Execute(Study(file));
  EXPECT_EQ(last.code, 0) << last.err;
  ExpectEqual(file, whole.results);
  std::cout << fills << " times the disk was full, " << at_start << " of them before the start, in " << studies
            << " studies of " << whole.cells() << " cells\n";
}

// Two runs of different seeds begin on one file at nearly the same time: one is refused, the file is the other's.
TEST_F(LongRunSlow, TwoWriters) {
  const int rounds = Count("KVQ_WRITERS", 4);
  const fs::path file = dir_ / "out.json";
  std::mt19937 random(Count("KVQ_SEED", 2));
  const std::string seeds[] = {"--seed=42", "--seed=7"};
  json expected[2];
  double all = 0;
  for (const int i : {0, 1}) {
    const auto begin = Clock::now();
    ASSERT_EQ(Execute(Small(file, seeds[i])).code, 0);
    all = Seconds(begin);
    expected[i] = json::parse(Text(file));
    fs::remove(file);
  }
  int second_won = 0, late = 0;
  for (int round = 0; round < rounds; ++round) {
    const fs::path errs[] = {dir_ / "err0", dir_ / "err1"};
    Running one(Small(file, seeds[0]), errs[0]);
    Wait(random, random() % 2 == 0 ? 0.003 : all / 2);
    Running other(Small(file, seeds[1]), errs[1]);
    const pid_t pids[] = {one.pid(), other.pid()};
    const int codes[] = {one.Wait(), other.Wait()};
    const int winner = codes[0] == 0 ? 0 : 1, loser = 1 - winner;
    EXPECT_EQ(codes[winner], 0) << Text(errs[0]) << Text(errs[1]);
    EXPECT_EQ(codes[loser], 2) << Text(errs[loser]);
    const std::string said = Text(errs[loser]);
    EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
    // Where it came when the first had ended, its seed is another one.
    late += said.find("are never mixed") != std::string::npos;
    EXPECT_TRUE(said.find("the two are never mixed") != std::string::npos ||
                said.find(StrCat(file.string(), " is being written by another kvqbench (pid ", pids[winner])) !=
                    std::string::npos ||
                said.find(file.string() + " is being written by another kvqbench (it has just started") != std::string::npos)
        << said;
    ExpectEqual(file, expected[winner]);
    EXPECT_FALSE(json::parse(Text(file)).contains("history"));
    EXPECT_FALSE(fs::exists(file.string() + ".lock"));
    EXPECT_FALSE(fs::exists(file.string() + ".part"));
    second_won += winner;
    fs::remove(file);
  }
  EXPECT_LE(late, rounds / 2);
  std::cout << rounds << " times two writers: " << rounds - late << " refused while the other wrote, " << late
            << " when it had ended; the second to start won " << second_won << "\n";
}

TEST_F(LongRun, SameCommandMeasuresOnlyWhatIsMissingOrFailed) {
  const fs::path file = dir_ / "out.json", summary = dir_ / "summary.txt";
  ASSERT_EQ(Execute(Small(file)).code, 0);
  const std::string first = Text(file);
  const auto entries = Entries(first);
  ASSERT_EQ(entries.size(), 8u);

  const Outcome again = Execute(Small(file, "--summary-file=" + summary.string()));
  EXPECT_EQ(again.code, 0);
  EXPECT_EQ(again.out, "");
  EXPECT_NE(again.err.find("8 of 8 benchmarks; nothing to do"), std::string::npos) << again.err;
  EXPECT_EQ(Text(file), first);
  EXPECT_NE(Text(summary).find(
                "8 benchmarks: 8 done, 0 failed, 0 skipped, 0 not run\n8 of them were there"),
            std::string::npos)
      << Text(summary);

  // One cell failed, one is not there.
  json planted = json::parse(first);
  planted["benchmarks"][2]["error_occurred"] = true;
  planted["benchmarks"][2]["error_message"] = "failed: planted";
  planted["benchmarks"].erase(5);
  std::ofstream(file) << planted.dump(1);
  const Outcome mended = Execute(Small(file));
  EXPECT_EQ(mended.code, 0) << mended.err;
  EXPECT_NE(mended.err.find("has 6 of 8 benchmarks"), std::string::npos) << mended.err;
  EXPECT_EQ(std::count(mended.err.begin(), mended.err.end(), '['), 2) << mended.err;
  const json now = json::parse(Text(file)), was = json::parse(first);
  ASSERT_EQ(now["benchmarks"].size(), 8u);
  EXPECT_EQ(now["benchmarks"][2]["name"], was["benchmarks"][2]["name"]) << "in place";
  EXPECT_EQ(now["benchmarks"][7]["name"], was["benchmarks"][5]["name"]) << "at the end";
  EXPECT_EQ(now["history"].size(), 1u);
  EXPECT_EQ(now["history"][0]["resumed_after"], 7);

  // Further specs and contexts are added to the file.
  const Outcome more = Execute(Small(file, "--contexts=32"));
  EXPECT_EQ(more.code, 0) << more.err;
  EXPECT_EQ(json::parse(Text(file))["benchmarks"].size(), 12u);
}

// What --dtype=auto was settled to is not what somebody has named.
TEST_F(LongRun, AnotherMachineGoesOnWithWhatAutoWas) {
  const fs::path file = dir_ / "out.json";
  const auto run = [&](const char* contexts) {
    const Outcome outcome = Execute(Tiny() + " --schemes=none --benchmark_filter=^kv_size/ --contexts=" + contexts +
                                    " --benchmark_out=" + file.string());
    EXPECT_EQ(outcome.code, 0) << outcome.err;
  };
  run("48");
  json there = json::parse(Text(file));
  there["context"]["dtype"] = "Float";  // whatever it was here
  std::ofstream(file) << there.dump(2);
  run("48,64");
  const json all = json::parse(Text(file));
  EXPECT_EQ(all["context"]["dtype"], "Float");
  EXPECT_EQ(all["context"]["kv_dtype tiny"], "BFloat16");
  ASSERT_EQ(all["benchmarks"].size(), 2u);
  for (const auto& entry : all["benchmarks"]) EXPECT_EQ(entry["bits_per_element"], 16);
  // A build before --kv-dtype stored what it computed in.
  json old = all;
  old["context"].erase("kv_dtype tiny");
  old["context"]["kvqbench_commit"] = "0123456789ab";
  std::ofstream(file) << old.dump(2);
  ExpectRefused(Execute(Tiny() + " --schemes=none --contexts=48,64 --patch=kv_size --benchmark_out=" + file.string()),
                {"kv_dtype tiny=Float", "kv_dtype tiny=BFloat16"});
}

TEST_F(LongRun, ResultsOfAnotherKindAreNeverMixed) {
  const fs::path file = dir_ / "out.json";
  ASSERT_EQ(Execute(Small(file)).code, 0);
  const std::string first = Text(file);
  const auto refused = [&](const std::string& more, const std::vector<std::string>& words) {
    ExpectRefused(Execute(Small(file, more)), words);
    EXPECT_EQ(Text(file), first);
  };
  refused("--seed=7", {file.string(), "seed=42", "seed=7"});
  refused("--windows=3", {"windows=2", "windows=3"});
  refused("--runs=9", {"runs=3", "runs=9"});
  refused("--protocol=study", {"protocol=decode", "protocol=study"});
  refused("--dtype=bfloat16", {"dtype=Float", "dtype=BFloat16"});
  refused("--kv-dtype=float16", {"kv_dtype tiny=Float", "kv_dtype tiny=Half"});
  refused("--benchmark_repetitions=2", {"no benchmark_flags", "--benchmark_repetitions=2"});
  // Tokens of another tokenizer are another text.
  const std::string tokenizer = Text(dir_ / "tiny/tokenizer.json");
  json without_merges = json::parse(tokenizer);
  without_merges["model"]["merges"] = json::array();
  std::ofstream(dir_ / "tiny/tokenizer.json") << without_merges;
  refused("", {"model_tokenizer tiny=sha256:"});
  std::ofstream(dir_ / "tiny/tokenizer.json") << tokenizer;
  std::ofstream(dir_ / "text.txt", std::ios::app) << "Another text.";
  refused("", {"corpus_sha256="});
  TinyModel::SetUp();  // another model under the same name; the results are gone with the folder
  std::ofstream(file) << first;
  refused("--schemes=none", {"model"});
  // Another build, which only a patch may come from.
  json other = json::parse(first);
  other["context"]["kvqbench_commit"] = "0123456789ab";
  other["context"]["kvqbench_sha256"] = "0";
  WidenHeads(dir_ / "tiny");
  std::ofstream(file) << other.dump(2);
  ExpectRefused(Execute(Small(file)), {"kvqbench_commit=0123456789ab"});
  EXPECT_EQ(Execute(Small(file, "--patch=kv_size")).code, 0);
}

TEST_F(LongRun, WhatIsNotOursOrCutOffIsRefusedAndKept) {
  const fs::path file = dir_ / "out.json";
  ASSERT_EQ(Execute(Small(file)).code, 0);
  const std::string whole = Text(file);
  for (const std::string& text :
       {whole.substr(0, whole.size() / 2), whole.substr(0, whole.size() - 3),
        std::string("notes\n"), std::string("[]"),
        std::string("{\"context\": {}, \"benchmarks\": []}")}) {
    std::ofstream(file) << text;
    ExpectRefused(Execute(Small(file)), {file.string(), "cut off"});
    EXPECT_EQ(Text(file), text);
    EXPECT_FALSE(fs::exists(file.string() + ".lock"));
  }
  ExpectRefused(Execute(Small(dir_)), {"is a folder"});
  std::ofstream(file, std::ios::trunc).close();  // as mktemp leaves it
  EXPECT_EQ(Execute(Small(file)).code, 0);
  EXPECT_EQ(Entries(Text(file)).size(), 8u);
}

TEST_F(LongRun, PatchChangesTheNamedBenchmarksAndNothingElse) {
  const fs::path file = dir_ / "out.json", backup = dir_ / "out.json.bak";
  ExpectRefused(Execute(Small(file, "--patch=kv_size")),
                {"--patch", file.string(), "is not there"});
  ASSERT_EQ(Execute(Small(file)).code, 0);
  // Numbers that are not ours, so that what was measured again shows.
  json planted = json::parse(Text(file));
  for (json& run : planted["benchmarks"]) run[run.contains("ppl") ? "ppl" : "kv_bytes"] = -1;
  std::ofstream(file) << planted.dump(7);
  const std::string first = Text(file);
  const Outcome outcome = Execute(Small(file, "--patch=kv_size/.*/ctx:64"));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(Text(backup), first);
  const std::string second = Text(file);
  const json now = json::parse(second);
  ASSERT_EQ(now["benchmarks"].size(), 8u);
  EXPECT_EQ(now["context"], planted["context"]);
  EXPECT_EQ(now["history"].size(), 1u);
  EXPECT_EQ(now["history"][0]["patched"], "kv_size/.*/ctx:64");
  EXPECT_EQ(now["history"][0]["benchmarks"], 2);
  EXPECT_FALSE(now["history"][0].contains("left"));
  for (size_t i = 0; i < 8; ++i) {
    const json &was = planted["benchmarks"][i], &is = now["benchmarks"][i];
    EXPECT_EQ(is["name"], was["name"]);
    const std::string name = is["name"];
    if (name.find("kv_size") == 0 && name.find("ctx:64") != std::string::npos) {
      EXPECT_GT(is["kv_bytes"].get<double>(), 0);
      continue;
    }
    // Byte for byte: the whole text of the entry, in its strange indentation.
    const size_t begin = first.find(StrCat("\"name\": \"", name)), end = first.find("}", begin);
    EXPECT_NE(second.find(first.substr(begin, end - begin)), std::string::npos) << name;
  }
  fs::remove(backup);
  EXPECT_EQ(Execute(Small(file, "--patch=perplexity --no-backup")).code, 0);
  EXPECT_FALSE(fs::exists(backup));
  EXPECT_EQ(json::parse(Text(file))["history"].size(), 2u);

  const std::string third = Text(file);
  ExpectRefused(Execute(Small(file, "--patch=needle")), {"--patch", "needle", "matches none"});
  ExpectRefused(Execute(Small(file, "--patch='('")), {"--patch", "regular expression"});
  ExpectRefused(Execute(Small(file, "--patch=. --contexts=64")),
                {"--patch", "ctx:48", "do not name"});
  ExpectRefused(Execute(Small(file, "--patch=. --seed=3")), {"seed=42", "seed=3"});
  ExpectRefused(Execute(Tiny() + " --patch=."), {"--patch", "--benchmark_out"});
  ExpectRefused(Execute(Small(file, "--no-backup")), {"--no-backup", "--patch"});
  EXPECT_EQ(Text(file), third);
}

TEST_F(LongRun, InterruptedPatchGoesOn) {
  const fs::path file = dir_ / "out.json", backup = dir_ / "out.json.bak";
  ASSERT_EQ(Execute(Small(file)).code, 0);
  const std::string first = Text(file);
  {
    Running run(Small(file, "--patch=."), dir_ / "err");
    run.WaitForStart(4);
    ASSERT_TRUE(run.Kill());
  }
  EXPECT_EQ(Text(backup), first);
  const json half = json::parse(Text(file));
  const size_t left = half["history"][0]["left"].size();
  EXPECT_GE(left, 4u);
  EXPECT_LE(left, 5u);
  ExpectRefused(Execute(Small(file)), {"interrupted --patch=."});
  ExpectRefused(Execute(Small(file, "--patch=kv_size")), {"interrupted --patch=."});
  const Outcome rest = Execute(Small(file, "--patch=."));
  EXPECT_EQ(rest.code, 0) << rest.err;
  EXPECT_EQ(static_cast<size_t>(std::count(rest.err.begin(), rest.err.end(), '[')), left)
      << rest.err;
  EXPECT_EQ(Text(backup), first) << "what was there before the patch began";
  const json done = json::parse(Text(file));
  EXPECT_FALSE(done["history"][0].contains("left"));
  EXPECT_EQ(Deterministic(done), Deterministic(json::parse(first)));
}

TEST_F(LongRun, TwoRunsDoNotShareAFile) {
  const fs::path file = dir_ / "out.json";
  Running first(Study(file), dir_ / "err");
  first.WaitForStart(2);
  ASSERT_FALSE(first.Ended()) << Text(dir_ / "err");
  kill(first.pid(), SIGSTOP);  // so that it does not end before the others were here
  ExpectRefused(Execute(Study(file)),
                {file.string(), "another kvqbench", StrCat("pid ", first.pid(), " on ")});
  fs::create_symlink(file, dir_ / "link.json");
  ExpectRefused(Execute(Study(dir_ / "link.json")), {StrCat("pid ", first.pid())});
  kill(first.pid(), SIGCONT);
  EXPECT_EQ(first.Wait(), 0) << Text(dir_ / "err");
  EXPECT_FALSE(fs::exists(file.string() + ".lock"));
  EXPECT_EQ(Execute(Study(dir_ / "link.json")).code, 0) << "there is nothing left to do";
  EXPECT_TRUE(fs::is_symlink(dir_ / "link.json"));
}

// A limit on the size of files is what a full disk is, for one process.
TEST_F(LongRun, FullDiskKeepsWhatWasThere) {
  const fs::path file = dir_ / "out.json";
  ASSERT_EQ(Execute(Small(file)).code, 0);
  const std::string first = Text(file);
  const Outcome outcome = Execute(Small(file, "--contexts=32"), "trap '' XFSZ; ulimit -f 8;");
  EXPECT_EQ(outcome.code, 2) << outcome.err;
  EXPECT_NE(outcome.err.find("cannot write " + file.string() + ": File too large"),
            std::string::npos)
      << outcome.err;
  EXPECT_EQ(Text(file), first);
  EXPECT_FALSE(fs::exists(file.string() + ".part"));
  EXPECT_EQ(Execute(Small(file, "--contexts=32")).code, 0);
}

// NaN in the last norm's weights: the logits are no numbers, the cache is.
TEST_F(LongRun, FailedCellIsRecordedAndTriedAgain) {
  const fs::path file = dir_ / "out.json", summary = dir_ / "summary.txt";
  Overwrite(dir_ / "tiny", "model.norm.weight", NAN);
  const std::string flags =
      StrCat(Tiny(), " --schemes=none --contexts=64 --windows=2 --dtype=float32"
             " --benchmark_filter='perplexity|error|kv_size' --benchmark_out=",
             file.string(), " --summary-file=", summary.string());
  const std::string name = "perplexity/tiny/sdpa/none/ctx:64/batch:1";
  for (const size_t there : {0, 2}) {
    const Outcome outcome = Execute(flags);
    EXPECT_EQ(outcome.code, 1) << outcome.err;
    EXPECT_NE(outcome.err.find("1 of 3 benchmarks failed"), std::string::npos) << outcome.err;
    EXPECT_EQ(static_cast<size_t>(std::count(outcome.err.begin(), outcome.err.end(), '[')),
              3 - there);
    const auto runs = ByName(Text(file));
    ASSERT_EQ(runs.size(), 3u);
    EXPECT_EQ(runs.at(name)["error_occurred"], true);
    const std::string message = runs.at(name)["error_message"];
    EXPECT_EQ(message.find("failed: "), 0u) << message;
    const std::string skipped = "error/tiny/sdpa/none/ctx:64/batch:1";
    EXPECT_EQ(runs.at(skipped)["error_message"], "skipped: nothing is encoded");
    const std::string text = Text(summary);
    for (const std::string& part :
         {std::string("3 benchmarks: 1 done, 1 failed, 1 skipped, 0 not run\n"),
          StrCat(there, " of them were there"),
          StrCat("failed\n  ", name, ": ", message.substr(8), "\n"),
          StrCat("skipped\n  ", skipped, ": nothing is encoded\n")}) {
      EXPECT_NE(text.find(part), std::string::npos) << part << " in\n" << text;
    }
  }
}

TEST(Progress, TimeLeftIsThatOfSimilarCells) {
  const Measurement decode{.name = "decode", .what = "", .run = nullptr};
  const Measurement prefill{.name = "prefill", .what = "", .run = nullptr};
  const Options options;
  Progress progress(options, 5, false);
  EXPECT_FALSE(progress.left().has_value());
  const Cell short_cell{"m", "sdpa", "none", 1024, 1}, long_cell{"m", "sdpa", "none", 4096, 1};
  progress.Took(decode, short_cell, 10);
  progress.Took(decode, short_cell, 14);
  progress.Took(decode, long_cell, 60);
  progress.Expect(decode, {"m", "sdpa", "int4-hqq", 1024, 1});
  EXPECT_DOUBLE_EQ(*progress.left(), 12);
  progress.Expect(decode, {"m", "sdpa", "int4-hqq", 8192, 1});  // none like it: by decode's rate
  constexpr double kRate = (10 + 14 + 60) / (1024 + 1024 + 4096.0);
  EXPECT_DOUBLE_EQ(*progress.left(), 12 + 8192 * kRate);
  progress.Expect(prefill, {"m", "sdpa", "int4-hqq", 1024, 1});  // none like it: by the rate of the slowest
  EXPECT_DOUBLE_EQ(*progress.left(), 12 + 8192 * kRate + 1024 * kRate);
  progress.Done("decode/m/sdpa/int4-hqq/ctx:8192/batch:1");
  EXPECT_DOUBLE_EQ(*progress.left(), 12 + 1024 * kRate);
  const Measurement quick{.name = "quick", .what = "", .like_tokens = [](const Options&, double tokens) { return 50 * tokens; }, .run = nullptr};
  const Measurement tiny{.name = "tiny", .what = "", .like_tokens = [](const Options&, double) { return 1.0; }, .run = nullptr};
  progress.Took(quick, short_cell, 30);  // much of the time, at a higher rate
  progress.Took(tiny, short_cell, 1);    // a second a token, but next to nothing of the time
  EXPECT_DOUBLE_EQ(*progress.left(), 12 + 1024 * kRate);
  // The first of a group counts as three, done or not.
  const Measurement shares{.name = "shares", .what = "", .first = [](const Options&) { return 3.0; }, .like_tokens = [](const Options&, double tokens) { return tokens; }, .run = nullptr};
  Progress sharing(options, 4, false);
  sharing.Took(shares, short_cell, 30);
  sharing.Expect(shares, {"m", "sdpa", "int4-hqq", 1024, 1});
  EXPECT_DOUBLE_EQ(*sharing.left(), 10);
  sharing.Took(shares, {"m", "sdpa", "int8-hqq", 1024, 1}, 14);
  EXPECT_DOUBLE_EQ(*sharing.left(), 11);
  for (const char* spec : {"none", "int4-hqq"}) sharing.Expect(shares, {"m", "sdpa", spec, 4096, 1});
  EXPECT_DOUBLE_EQ(*sharing.left(), 11 + (3 + 1) * 4 * 11);
  EXPECT_EQ(DurationText(34.4), "34 s");
  EXPECT_EQ(DurationText(720), "12 min");
  EXPECT_EQ(DurationText(19260), "5 h 21 min");
}

}  // namespace
}  // namespace kvq
