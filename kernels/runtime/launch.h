// What every kernel's launch needs: the device's shape, and launches that may begin before their predecessor has ended
// (programmatic dependent launch), also in a captured graph.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "kernels/runtime/cuda_check.h"

namespace kvq {

// Blocks for so many threads.
inline unsigned GridFor(int64_t threads, int of_block = 256) {
  return static_cast<unsigned>((threads + of_block - 1) / of_block);
}

// n / divisor and what is left, for n < 2^31, by a multiplication: a GPU divides in some twenty instructions.
// Granlund & Montgomery, "Division by invariant integers using multiplication" (1994): with 2^shift >= divisor and
// the factor ceil(2^(31 + shift) / divisor), the product's error stays below 1 / divisor.
struct Divisor {
  uint32_t divisor, factor, shift;
  struct Result {
    uint32_t quotient, rest;
  };
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)), factor(0), shift(0) {
    while (uint64_t{1} << shift < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ Result Of(uint32_t n) const {
    const auto quotient = static_cast<uint32_t>((uint64_t{n} * factor) >> 31 >> shift);
    return {quotient, n - quotient * divisor};
  }
};

struct DeviceShape {
  int multiprocessors = 0, major = 0;
  int block_shared = 0, shared = 0;  // bytes of shared memory: a block's limit, a multiprocessor's
};
inline const DeviceShape& CurrentDevice() {
  static const DeviceShape shape = [] {  // all GPUs of a machine are taken to be alike
    DeviceShape s;
    int device = 0;
    Check(cudaGetDevice(&device), "current device");
    for (const auto& [value, attribute] :
         {std::pair(&s.multiprocessors, cudaDevAttrMultiProcessorCount),
          std::pair(&s.major, cudaDevAttrComputeCapabilityMajor),
          std::pair(&s.block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin),
          std::pair(&s.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor)}) {
      Check(cudaDeviceGetAttribute(value, attribute, device), "attributes of the device");
    }
    return s;
  }();
  return shape;
}

// Launches a kernel that may begin before its predecessor on the stream has ended: it calls
// WaitForPredecessors() before it reads what they write, or writes what they read. (Decode attention reads its lengths
// before, and again after: attention.h, `early`.)
template <typename... Parameters, typename... Arguments>
void LaunchEarly(const char* what, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                 void* stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = CurrentDevice().major >= 9 ? 1 : 0;
  Check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

// Lets the successor begin once all blocks have come here; it still waits for this kernel's end before it reads.
__device__ __forceinline__ void LaunchDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until all that was launched before has ended, and sees what it wrote. What it wrote is read past the L1
// cache (__ldcg): there could be older lines.
__device__ __forceinline__ void WaitForPredecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace kvq
#endif  // __CUDACC__
