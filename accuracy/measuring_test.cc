// How the measurements repeat, and how they count a CPU's energy.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "accuracy/golden.h"
#include "accuracy/statistics.h"
#include "benchmarks/options.h"
#include "fixtures/machine/host_load.h"
#include "fixtures/machine/rapl.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;

// Ranks of the interval of a median as tables of the sign test have them (Conover 1999, Practical Nonparametric
// Statistics, table A3: the largest r with a binomial sum of at most 0.025).
TEST(Measuring, MedianIntervalHasTheRanksOfTheTables) {
  const auto ranks = [](size_t n) {
    std::vector<double> values;
    for (size_t i = n; i > 0; --i) values.push_back(static_cast<double>(i));  // the rank is the value
    return MedianInterval(values);
  };
  for (const size_t n : {1, 2, 5}) EXPECT_FALSE(ranks(n)) << n;
  for (const auto& [n, j] : std::vector<std::pair<size_t, int>>{{6, 1}, {8, 1}, {9, 2}, {10, 2}, {12, 3}, {15, 4}, {20, 6}, {30, 10}}) {
    EXPECT_EQ(ranks(n)->low, j) << n;
    EXPECT_EQ(ranks(n)->high, static_cast<double>(n) + 1 - j) << n;
  }
  // The sum of the binomial distribution and the normal one meet.
  EXPECT_NEAR(ranks(500)->low, 228, 1);
  EXPECT_NEAR(ranks(502)->low, 229, 1);
}

// Repeats a made-up time through Google Benchmark as a cell does.
std::vector<double> Repeat(const std::vector<std::string>& flags, const std::function<double(size_t)>& time,
                           benchmark::UserCounters& counters) {
  Session session(ParseCommandLine(flags).options);
  std::vector<double> seconds;
  class Quiet : public benchmark::BenchmarkReporter {
   public:
    bool ReportContext(const Context&) override { return true; }
    void ReportRuns(const std::vector<Run>& runs) override { last = runs.back().counters; }
    benchmark::UserCounters last;
  } quiet;
  benchmark::ClearRegisteredBenchmarks();
  benchmark::RegisterBenchmark("repeat", [&](benchmark::State& state) {
    size_t i = 0;
    seconds = Samples(session, state, [&] { return time(i++); });
  })->Iterations(1)->UseManualTime();
  benchmark::RunSpecifiedBenchmarks(&quiet, "repeat");
  benchmark::ClearRegisteredBenchmarks();
  counters = quiet.last;
  return seconds;
}

TEST(Measuring, RepeatsUntilTheMedianIsSure) {
  benchmark::UserCounters counters;
  // All the same: six make an interval, and it is none.
  EXPECT_EQ(Repeat({"--runs=3"}, [](size_t) { return 2.0; }, counters).size(), 6u);
  EXPECT_EQ(counters["samples"], 6);
  EXPECT_EQ(counters["ci95_fraction"], 0);
  // 1 and 1.1 in turn are never known to 1 %.
  EXPECT_EQ(Repeat({"--runs=3", "--max-runs=12"}, [](size_t i) { return 1 + 0.1 * (i % 2); }, counters).size(), 12u);
  EXPECT_NEAR(counters["ci95_fraction"], 0.05 / 1.05, 1e-9);
  // No time for more, and too few for an interval.
  EXPECT_EQ(Repeat({"--runs=3", "--max-seconds=0"}, [](size_t) { return 2.0; }, counters).size(), 3u);
  EXPECT_EQ(counters.count("ci95_fraction"), 0u);
  // --runs is the least, whatever the rest says.
  EXPECT_EQ(Repeat({"--runs=8", "--max-runs=1", "--max-seconds=0"}, [](size_t) { return 2.0; }, counters).size(), 8u);
}

TEST(Measuring, ReadsWhatProcessorsDid) {
  EXPECT_EQ(BusySeconds("cpu  100 20 30 4000 500 6 7 8 9 0\ncpu0 1 2 3\n", 100), 1.71);
  EXPECT_EQ(BusySeconds("", 100), std::nullopt);
  EXPECT_EQ(BusySeconds("intr 1 2 3 4 5 6 7 8 9", 100), std::nullopt);
}

// Others that take all processors, for as long as this lives.
class Neighbours {
 public:
  Neighbours() {
    for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
      const pid_t child = fork();
      if (child == 0) {
        for (volatile int spin = 0;; spin = spin + 1) {
          if (getppid() == 1) _exit(0);
        }
      }
      children_.push_back(child);
    }
  }
  ~Neighbours() {
    for (const pid_t child : children_) kill(child, SIGKILL), waitpid(child, nullptr, 0);
  }

 private:
  std::vector<pid_t> children_;
};

TEST(Measuring, ADisturbedTimeSaysSo) {
  benchmark::UserCounters counters;
  const Neighbours neighbours;
  const auto work = [](size_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    return 2.0;  // always the same, as a time is that a steady neighbour makes longer
  };
  EXPECT_EQ(Repeat({"--runs=3", "--max-runs=8"}, work, counters).size(), 8u) << "taken again as often as it may be";
  EXPECT_EQ(counters["disturbed"], 1);
  EXPECT_GT(counters["foreign_processors"], MostForeignProcessors());
  EXPECT_EQ(counters.count("ci95_fraction"), 0u) << "never certain";
}

// What is stored, where --dtype=auto has been settled one way or the other.
TEST(Measuring, TheTypeOfTheCacheIsNotThatOfTheMachine) {
  const std::string shape = "mistral-7b", model = GoldenPath("models/llama-mha");  // names no type; in float32
  for (const char* settled : {"float32", "bfloat16"}) {
    const auto options = [](const std::vector<std::string>& flags) { return ParseCommandLine(flags).options; };
    Session by_default(options({}), settled), named(options({"--dtype=float32"}), settled),
        stored(options({"--kv-dtype=float16"}), settled),
        both(options({"--dtype=float32", "--kv-dtype=bfloat16"}), settled);
    EXPECT_EQ(by_default.dtype(), ParseDType("--dtype", settled));
    EXPECT_EQ(by_default.kv_dtype(shape), at::kHalf);
    EXPECT_EQ(by_default.kv_dtype(model), at::kBFloat16);
    EXPECT_EQ(by_default.model(model).kv_dtype(), at::kBFloat16);
    EXPECT_EQ(named.kv_dtype(shape), at::kFloat);
    EXPECT_EQ(stored.kv_dtype(model), at::kHalf);
    EXPECT_EQ(both.kv_dtype(model), at::kBFloat16);
    EXPECT_EQ(KvBytes(ParseSpec("none"), CacheShapeOf(FindModel(shape).config(), 1), 4096, by_default.kv_dtype(shape)), 536870912);
  }
}

// What ci/report warns of (ci/page.py), and a reader sees in the label.
TEST(Measuring, AThrottledCellSaysWhy) {
  Session session{Options{}};
  GpuSummary seen;
  Counters counters;
  AddGpuState(session, seen, counters);
  EXPECT_TRUE(counters.empty()) << "nothing was read";
  seen.readings = 2, seen.sm_clock_mhz = 1980, seen.clock_reasons = 0x1 | 0x2;
  AddGpuState(session, seen, counters);
  EXPECT_EQ(counters, (Counters{{"sm_clock_mhz", 1980}, {"throttled", 0}})) << "no temperature: none was reported";
  EXPECT_EQ(session.note, "");
  counters.clear();
  session.AddNote("something else");
  seen.temperature_c = 88, seen.clock_reasons = 0x4 | 0x40;
  AddGpuState(session, seen, counters);
  EXPECT_EQ(counters, (Counters{{"sm_clock_mhz", 1980}, {"temperature_c", 88}, {"throttled", 1}}));
  EXPECT_EQ(session.note, "something else; throttled: sw_power_cap, hw_thermal_slowdown");
}

class RaplFiles : public testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::path(testing::TempDir()) / TestName();
    fs::remove_all(root_);
    fs::create_directories(root_);
  }
  void Zone(const std::string& zone, const std::string& name, int64_t microjoules) {
    fs::create_directories(root_ / zone);
    std::ofstream(root_ / zone / "name") << name << "\n";
    std::ofstream(root_ / zone / "energy_uj") << microjoules << "\n";
    std::ofstream(root_ / zone / "max_energy_range_uj") << 1000000000 << "\n";
  }
  fs::path root_;
};

TEST_F(RaplFiles, AddsUpPackagesAndWrapsAround) {
  Zone("intel-rapl:0", "package-0", 5000000);
  Zone("intel-rapl:1", "package-1", 999000000);
  Zone("intel-rapl:0:0", "core", 1);  // in package-0 already
  Zone("intel-rapl:2", "psys", 1);    // the packages are in it
  Zone("intel-rapl-mmio:0", "package-0", 1);
  Rapl rapl(root_);
  EXPECT_EQ(rapl.Joules(), 0);
  Zone("intel-rapl:0", "package-0", 8000000);
  Zone("intel-rapl:1", "package-1", 1000000);
  Zone("intel-rapl:0:0", "core", 77000000);
  EXPECT_DOUBLE_EQ(rapl.Joules(), 3 + 2);
  EXPECT_DOUBLE_EQ(rapl.Joules(), 5) << "nothing since";
}

TEST_F(RaplFiles, SaysWhyThereIsNone) {
  EXPECT_THROW(Rapl{root_.string()}, std::runtime_error);
  EXPECT_THROW(Rapl{(root_ / "missing").string()}, std::runtime_error);
  Zone("intel-rapl:0", "package-0", 5);
  fs::remove(root_ / "intel-rapl:0/energy_uj");
  try {
    Rapl rapl(root_);
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("energy_uj may not be read"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace kvq
