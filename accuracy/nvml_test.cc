// fixtures/machine/nvml.cc against a library with NVML's functions (accuracy/fake_nvml.cc), and against the driver's where
// there is a GPU.
#include "fixtures/machine/nvml.h"

#include <dlfcn.h>
#include <unistd.h>

#include <map>
#include <memory>

#include "accuracy/fake_nvml.h"
#include "accuracy/golden.h"

namespace kvq {
namespace {

using namespace std::chrono_literals;

constexpr char kBusId[] = "0000:0f:00.0";

class NvmlLibrary : public testing::Test {
 protected:
  void SetUp() override {
    library_ = dlopen(KVQ_FAKE_NVML, RTLD_NOW);
    ASSERT_NE(library_, nullptr) << dlerror();
    gpu_ = static_cast<FakeGpu*>(dlsym(library_, "fake_gpu"));
    ASSERT_NE(gpu_, nullptr);
  }
  void TearDown() override {
    EXPECT_EQ(gpu_->started, 0) << "every start is followed by a shutdown";
    dlclose(library_);  // the next test opens it afresh
  }
  std::unique_ptr<Nvml> Open() { return std::make_unique<Nvml>(kBusId, KVQ_FAKE_NVML); }
  static std::map<std::string, std::string> Facts(Nvml& nvml) {
    const auto facts = nvml.Facts();
    return {facts.begin(), facts.end()};
  }

  void* library_ = nullptr;
  FakeGpu* gpu_ = nullptr;
};

// Bits as the NVML API Reference Guide numbers them.
TEST(Nvml, ReasonsAreWordsAndIdlenessIsNone) {
  EXPECT_TRUE(ThrottleReasons(0).empty());
  EXPECT_TRUE(ThrottleReasons(0x1 | 0x2 | 0x100).empty()) << "idle, application clocks, display clocks";
  EXPECT_EQ(ThrottleReasons(0x4), std::vector<std::string>{"sw_power_cap"});
  EXPECT_EQ(ThrottleReasons(0x1 | 0x8 | 0x20 | 0x40 | 0x80),
            (std::vector<std::string>{"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown",
                                      "hw_power_brake_slowdown"}));
}

TEST(Nvml, AMissingLibraryIsAReason) {
  try {
    Nvml(kBusId, "/no/such/libnvidia-ml.so.1");
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("/no/such/libnvidia-ml.so.1"), std::string::npos) << error.what();
  }
}

TEST_F(NvmlLibrary, AnUnknownGpuIsAReason) {
  EXPECT_THROW(Nvml("0000:ff:00.0", KVQ_FAKE_NVML), std::runtime_error);
}

TEST_F(NvmlLibrary, ReadsWhatTheDriverSays) {
  gpu_->clock_reasons = 0x4 | 0x1;
  const auto nvml = Open();
  const GpuReading reading = nvml->Read();
  EXPECT_EQ(reading.sm_clock_mhz, 1980);
  EXPECT_EQ(reading.memory_clock_mhz, 3201);
  EXPECT_EQ(reading.temperature_c, 40);
  EXPECT_EQ(reading.watts, 700);
  EXPECT_EQ(reading.clock_reasons, 5u);
  EXPECT_EQ(nvml->Joules(), 5);
  EXPECT_EQ(nvml->MemoryUsedBytes(), int64_t{1} << 30);
  const auto facts = Facts(*nvml);
  EXPECT_EQ(facts.at("gpu_driver"), "580.95.05");
  EXPECT_EQ(facts.at("gpu_throttled"), "sw_power_cap");
  EXPECT_EQ(facts.at("gpu_ecc"), "on");
  EXPECT_EQ(facts.at("gpu_sm_clock_max_mhz"), "1980");
  EXPECT_EQ(facts.at("gpu_power_limit_watts"), "700");
  EXPECT_EQ(facts.count("gpu_persistence"), 0u) << "this library does not have the function";
}

TEST_F(NvmlLibrary, WhatIsNotSupportedIsAbsent) {
  gpu_->has_energy = gpu_->has_power = gpu_->has_event_reasons = gpu_->has_processes = false;
  const auto nvml = Open();
  EXPECT_EQ(nvml->Read().watts, std::nullopt);
  EXPECT_EQ(nvml->Read().clock_reasons, std::nullopt);
  EXPECT_EQ(nvml->Read().sm_clock_mhz, 1980);
  EXPECT_EQ(nvml->Joules(), std::nullopt);
  EXPECT_EQ(nvml->ForeignProcesses(), std::nullopt);
  const auto facts = Facts(*nvml);
  for (const char* fact : {"gpu_watts", "gpu_throttled", "gpu_foreign_processes"}) EXPECT_EQ(facts.count(fact), 0u);
}

TEST_F(NvmlLibrary, TellsOthersFromItself) {
  const auto self = static_cast<unsigned>(getpid());
  gpu_->processes = {{17, 512ull << 20}};
  const auto nvml = Open();
  gpu_->processes = {{17, 512ull << 20}, {self, 1}, {18, ~0ull}};
  const auto others = nvml->ForeignProcesses();
  ASSERT_TRUE(others);
  EXPECT_EQ(ProcessText(*others), "pid 17: 512 MiB, pid 18");
  EXPECT_EQ(Facts(*nvml).at("gpu_foreign_processes"), "pid 17: 512 MiB, pid 18");
}

// Where NVML has the pids of another namespace, the one that came after the start is this process.
TEST_F(NvmlLibrary, TellsOthersFromItselfUnderForeignPids) {
  const auto far = static_cast<unsigned>(getpid()) + 100000;
  gpu_->processes = {{far + 1, 1}};
  const auto nvml = Open();
  EXPECT_EQ(nvml->ForeignProcesses()->size(), 1u) << "before this one uses the GPU";
  gpu_->processes = {{far + 1, 1}, {far + 2, 1}};
  EXPECT_EQ(ProcessText(*nvml->ForeignProcesses()), ProcessText({{far + 1, 0}}));
  gpu_->processes = {{far + 2, 1}, {far + 3, 1}};
  EXPECT_EQ(ProcessText(*nvml->ForeignProcesses()), ProcessText({{far + 3, 0}}));
  gpu_->processes = {{far + 2, 1}};
  EXPECT_TRUE(nvml->ForeignProcesses()->empty());
  EXPECT_EQ(Facts(*nvml).at("gpu_foreign_processes"), "none");
}

TEST_F(NvmlLibrary, WatchesOnlyItsIntervals) {
  const auto nvml = Open();
  GpuWatch watch(*nvml, 1ms);
  gpu_->sm_clock = 100, gpu_->temperature = 99, gpu_->clock_reasons = 0x40, gpu_->millijoules = 1000;
  std::this_thread::sleep_for(20ms);
  gpu_->sm_clock = 1500, gpu_->temperature = 60, gpu_->clock_reasons = 0x4;
  watch.Begin();
  std::this_thread::sleep_for(60ms);
  gpu_->sm_clock = 1400, gpu_->temperature = 50, gpu_->clock_reasons = 0x8, gpu_->millijoules = 4000;
  std::this_thread::sleep_for(60ms);
  watch.End();
  gpu_->sm_clock = 100, gpu_->temperature = 99, gpu_->clock_reasons = 0x40, gpu_->millijoules = 9000;
  std::this_thread::sleep_for(20ms);
  const GpuSummary seen = watch.Take();
  EXPECT_GE(seen.readings, 2);
  EXPECT_EQ(seen.sm_clock_mhz, 1400);
  EXPECT_EQ(seen.temperature_c, 60);
  EXPECT_EQ(seen.clock_reasons, 0x4u | 0x8u);
  EXPECT_TRUE(seen.energy_counter);
  EXPECT_EQ(seen.joules, 3);
  EXPECT_GE(seen.seconds, 0.12);
  EXPECT_EQ(watch.Take().readings, 0) << "what was taken is gone";
}

// However short, an interval has a reading; energies of intervals add up.
TEST_F(NvmlLibrary, ShortIntervalsHaveAReadingEach) {
  const auto nvml = Open();
  GpuWatch watch(*nvml, 1s);
  for (int i = 0; i < 3; ++i) {
    watch.Begin();
    gpu_->millijoules += 2000;
    watch.End();
    gpu_->millijoules += 500;  // between the intervals
  }
  const GpuSummary seen = watch.Take();
  EXPECT_EQ(seen.readings, 3);
  EXPECT_EQ(seen.joules, 6);
}

TEST_F(NvmlLibrary, WithoutACounterEnergyIsPowerTimesSeconds) {
  gpu_->has_energy = false;
  const auto nvml = Open();
  GpuWatch watch(*nvml, 1ms);
  gpu_->milliwatts = 300000;
  watch.Begin();
  std::this_thread::sleep_for(30ms);
  watch.End();
  GpuSummary seen = watch.Take();
  EXPECT_FALSE(seen.energy_counter);
  ASSERT_TRUE(seen.joules);
  EXPECT_DOUBLE_EQ(*seen.joules, 300 * seen.seconds);
  gpu_->has_power = false;
  watch.Begin();
  watch.End();
  EXPECT_EQ(watch.Take().joules, std::nullopt);
}

}  // namespace
}  // namespace kvq
