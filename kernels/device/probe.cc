#include "kernels/device/probe.h"

#include <stdexcept>

#include "kernels/device/probe.cuh"
#include "kernels/runtime/launch.h"

namespace kvq {

void StreamingRead(const void* data, int64_t bytes, uint32_t* folded, void* stream) {
  if (bytes <= 0 || bytes % kStreamingReadBytes != 0) {
    throw std::logic_error("StreamingRead takes multiples of kStreamingReadBytes");
  }
  Launch("streaming read",
         {.instance = {{"kernels/device/probe.cuh"}, "kvq::probe::StreamingReadKernel"},
          .grid = static_cast<unsigned>(CurrentDevice().multiprocessors * probe::kBlocksPerSm),
          .threads = probe::kThreads,
          .early = false},
         stream, data, bytes / kStreamingReadBytes, folded);
}

void CountClock(uint64_t* counted, void* stream) {
  Launch("count of the clock",
         {.instance = {{"kernels/device/probe.cuh"}, "kvq::probe::ClockKernel"}, .grid = 1, .threads = 1, .early = false}, stream, counted);
}

}  // namespace kvq
