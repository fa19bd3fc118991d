// The probes and the stopwatch of fixtures/machine/device.h, and the streaming read of kernels/device/probe.h.
#include "fixtures/machine/device.h"

#include "accuracy/golden.h"
#include "fixtures/machine/nvml.h"
#include "kernels/device/probe.h"

namespace kvq {
namespace {

TEST(Device, TheStopwatchKeepsTheTimeOfACpu) {
  const timespec wait = {0, 20'000'000};
  const double seconds = Time(at::Device(at::kCPU), [&] { nanosleep(&wait, nullptr); });
  EXPECT_GE(seconds, 0.02);
  EXPECT_LT(seconds, 2) << "a loaded machine wakes late, but not that late";
}

// Each word is folded in once: a word that is left out, or read twice, shows in its bits.
TEST(DeviceGpu, TheStreamingReadReadsEveryWordOnce) {
  KVQ_NEEDS_CUDA();
  for (const int64_t steps : {1, 7, 1055, 1057, 5000}) {  // below, beside and above the blocks of an H200
    const int64_t words = steps * kStreamingReadBytes / 4;
    at::manual_seed(steps);
    const at::Tensor data = at::randint(-(int64_t{1} << 31), int64_t{1} << 31, {words}, at::kLong).to(at::kInt);
    uint32_t expected = 0;
    for (int64_t i = 0; i < words; ++i) expected ^= static_cast<uint32_t>(data.data_ptr<int>()[i]);
    const at::Tensor device = data.to(at::kCUDA), folded = at::zeros({1}, device.options());
    StreamingRead(device.data_ptr(), words * 4, static_cast<uint32_t*>(folded.data_ptr()), nullptr);
    EXPECT_EQ(static_cast<uint32_t>(folded.item<int>()), expected) << steps << " steps";
  }
  EXPECT_THROW(StreamingRead(nullptr, 100, nullptr, nullptr), std::logic_error);
}

// A device that copies or sums faster than it streams would make every peak_fraction too high.
TEST(DeviceGpu, NothingReadsFasterThanTheProbe) {
  KVQ_NEEDS_CUDA();
  const at::Device cuda(at::kCUDA, 0);
  EXPECT_LT(CopyBandwidth(cuda), ReadBandwidth(cuda));  // 4.23 and 4.65 TB/s on an H200
  const at::Tensor data = at::ones({256, 1 << 22}, at::TensorOptions().device(cuda));
  double best = 1e30;
  for (int i = 0; i < 5; ++i) best = std::min(best, Time(cuda, [&] { at::sum(data, 1); }));
  EXPECT_LT(static_cast<double>(data.nbytes()) / best, ReadBandwidth(cuda));
  EXPECT_GT(ReadBandwidth(cuda), 1e11) << "the slowest GPU from sm_80 on reads 0.2 TB/s";
}

// By the driver's own limit; cards of the time have 0.2 GHz at rest and less than 4 in all.
TEST(DeviceGpu, CountsTheClock) {
  KVQ_NEEDS_CUDA();
  const at::Device cuda(at::kCUDA, 0);
  double highest = 0;
  for (int i = 0; i < 2000; ++i) highest = std::max(highest, CountedClock(cuda));
  double limit = 4000;
  try {
    for (const auto& [name, value] : Nvml(PciBusId(0)).Facts()) {
      if (name == "gpu_sm_clock_max_mhz") limit = std::stod(value);
    }
  } catch (const std::runtime_error&) {  // no NVML
  }
  EXPECT_LT(highest, 1.01 * limit);
  EXPECT_GT(highest, 0.5 * std::min(limit, 2000.0));
  EXPECT_TRUE(IsFullClock(cuda, highest));
  EXPECT_FALSE(IsFullClock(cuda, 0.96 * highest));
  EXPECT_TRUE(AwaitFullClock(cuda));
}

// Events see what the GPU does, not when the host comes back from enqueueing it, and a stream that ATen's
// stream waits for is inside.
TEST(DeviceGpu, TheStopwatchSeesWhatWasOnlyEnqueued) {
  KVQ_NEEDS_CUDA();
  const at::Device cuda(at::kCUDA, 0);
  const at::Tensor a = at::randn({4096, 4096}, at::TensorOptions().device(cuda));
  const auto seconds = [&](int products) {
    return Time(cuda, [&] {
      for (int i = 0; i < products; ++i) at::matmul(a, a);
    });
  };
  seconds(2);  // warm-up
  const double few = seconds(10), many = seconds(40);
  EXPECT_NEAR(many / few, 4, 1) << "clocks change, but not by a quarter";
}

}  // namespace
}  // namespace kvq
