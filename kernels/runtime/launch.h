// What the host needs to launch a kernel that is compiled at run time: the device's shape, the launch, and what a piece
// of work would launch. In a run without a GPU none of it does anything but say so.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/runtime/compiler.h"
#include "kernels/runtime/cuda_check.h"
#include "kernels/views.h"

namespace kvq {

// Blocks for so many threads.
inline unsigned GridFor(int64_t threads, int of_block = 256) {
  return static_cast<unsigned>((threads + of_block - 1) / of_block);
}

// What tiles and grids are chosen by.
struct DeviceShape {
  int multiprocessors = 0;
  int arch = 0;                      // 90: sm_90
  int block_shared = 0, shared = 0;  // bytes of shared memory: a block's limit, a multiprocessor's
};

// Of the current device, whose kind all GPUs of a machine are taken to be. KVQ_SHARED_LIMIT=BYTES makes it a card with
// that limit of a block. Throws InputError where the variable is not what ParseSharedLimit takes, or the device is older
// than sm_80.
const DeviceShape& CurrentDevice();

// The value of KVQ_SHARED_LIMIT: bytes, 96 KiB or more (no card from sm_80 on has less); nothing where it is empty or null.
std::optional<int> ParseSharedLimit(const char* text);

// One launch, as it is asked for.
struct KernelLaunch {
  KernelInstance instance;
  dim3 grid;
  int threads = 0;
  size_t shared_bytes = 0;  // dynamic
  // It may begin before its predecessor on the stream has ended, and calls WaitForPredecessors() (device/ptx.cuh) before it
  // reads what they write, or writes what they read. (Decode attention, of latents too, reads its lengths before, and
  // again after, and copies old tokens before: `early` in device/attention.h.)
  bool early = true;
  int cluster = 1;  // so many neighbouring blocks run at the same time and see each other's shared memory; above 1 from sm_90 on
};

// What kernels were compiled by and for, for results: "NVRTC 13.0, sm_90"; of a limit that was set, too.
std::string KernelsText();

// What `work` would launch on such a device; nothing is launched. The functions of kernels/ that launch look at no
// pointer's target, so that shapes are enough.
std::vector<KernelLaunch> Gather(const DeviceShape& device, const std::function<void()>& work);

// Whether that is going on in this thread: then memory is not taken, either.
bool Gathering();

// Compiles and loads what `work` would launch on the current device, all at once: one at a time takes longer.
void Prepare(const std::function<void()>& work);

// How many kernels this process has loaded: whoever times something makes sure that it has not grown meanwhile.
int64_t LoadedCount();

// Arguments are copied as they are, so they must have the kernel's types to the byte; their sizes are checked at the first
// launch. Compiles where that has not been done. Throws std::runtime_error or OutOfMemory, naming `what`, where the launch
// fails, and what CurrentDevice and CompileKernel throw.
void LaunchRaw(const char* what, const KernelLaunch& launch, void* stream, const std::vector<size_t>& sizes, void** arguments);

template <typename... Arguments>
void Launch(const char* what, const KernelLaunch& launch, void* stream, const Arguments&... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  LaunchRaw(what, launch, stream, {sizeof(Arguments)...}, pointers);
}

// A type of tokens as device code names it.
inline const char* TypeName(DType type) {
  return type == DType::kFloat32   ? "kvq::DType::kFloat32"
         : type == DType::kFloat16 ? "kvq::DType::kFloat16"
                                   : "kvq::DType::kBFloat16";
}

}  // namespace kvq
