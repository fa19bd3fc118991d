// A GPU that is not there: the state behind accuracy/fake_nvml.cc, a library with NVML's functions. A test
// opens the library, looks up `fake_gpu`, and sets what the functions are to say.
#pragma once

#include <atomic>
#include <vector>

namespace kvq {

struct FakeProcess {
  unsigned pid;
  unsigned long long bytes;  // all ones: not known, as NVML has it
};

struct FakeGpu {
  std::atomic<unsigned> sm_clock{1980}, temperature{40}, milliwatts{700000};
  std::atomic<unsigned long long> clock_reasons{0}, millijoules{5000};
  std::atomic<bool> has_energy{true}, has_power{true}, has_event_reasons{true}, has_processes{true};
  std::atomic<int> started{0};  // nvmlInit_v2 less nvmlShutdown
  std::vector<FakeProcess> processes;
};

}  // namespace kvq
