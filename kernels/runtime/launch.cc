#include "kernels/runtime/launch.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "kernels/error.h"

namespace kvq {
namespace {

thread_local const DeviceShape* pretended = nullptr;
thread_local std::vector<KernelLaunch>* gathered = nullptr;

DeviceShape ReadShape() {
  DeviceShape s;
  int device = 0, major = 0, minor = 0;
  Check(cudaGetDevice(&device), "current device");
  for (const auto& [value, attribute] :
       {std::pair(&s.multiprocessors, cudaDevAttrMultiProcessorCount), std::pair(&major, cudaDevAttrComputeCapabilityMajor),
        std::pair(&minor, cudaDevAttrComputeCapabilityMinor),
        std::pair(&s.block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin),
        std::pair(&s.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor)}) {
    Check(cudaDeviceGetAttribute(value, attribute, device), "attributes of the device");
  }
  s.arch = 10 * major + minor;
  if (s.arch < 80) throw InputError("kernels want a GPU of compute capability 8.0 (sm_80) or later, this one has ", major, ".", minor);
  if (const auto limit = ParseSharedLimit(std::getenv("KVQ_SHARED_LIMIT"))) {
    s.block_shared = std::min(s.block_shared, *limit);
    s.shared = std::min(s.shared, *limit + 1024);  // the driver keeps 1 KiB a block
  }
  return s;
}

// A kernel in the driver, for all devices of its kind.
struct Loaded {
  cudaKernel_t kernel = nullptr;
  std::map<int, size_t> allowed;  // dynamic shared memory, by device
  bool checked = false;           // the arguments' sizes
};

std::mutex loaded_mutex;
std::atomic<int64_t> loaded_count{0};

std::map<std::string, Loaded>& LoadedKernels() {
  static auto* const loaded = new std::map<std::string, Loaded>;  // the driver may end before static objects do
  return *loaded;
}

void Load(const KernelInstance& instance, const CompiledKernel& compiled) {
  cudaLibrary_t library = nullptr;
  Check(cudaLibraryLoadData(&library, compiled.cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0), instance.name.c_str());
  Loaded loaded;
  Check(cudaLibraryGetKernel(&loaded.kernel, library, compiled.symbol.c_str()), instance.name.c_str());
  LoadedKernels().emplace(instance.name, loaded);
  ++loaded_count;
}

// With loaded_mutex held.
Loaded& Find(const KernelInstance& instance) {
  auto found = LoadedKernels().find(instance.name);
  if (found == LoadedKernels().end()) {
    Load(instance, CompileKernel(instance, CurrentDevice().arch));
    found = LoadedKernels().find(instance.name);
  }
  return found->second;
}

void CheckArguments(cudaKernel_t kernel, const std::string& name, const std::vector<size_t>& sizes) {
  for (size_t i = 0; i < sizes.size(); ++i) {
    size_t offset = 0, size = 0;
    Check(cudaFuncGetParamInfo(reinterpret_cast<const void*>(kernel), i, &offset, &size), name.c_str());
    if (size != sizes[i]) throw std::logic_error(StrCat(name, ": argument ", i, " has ", size, " bytes, not ", sizes[i]));
  }
}

}  // namespace

const DeviceShape& CurrentDevice() {
  if (pretended != nullptr) return *pretended;
  static const DeviceShape shape = ReadShape();
  return shape;
}

std::optional<int> ParseSharedLimit(const char* text) {
  if (text == nullptr || *text == '\0') return std::nullopt;
  int limit = 0;
  const char* end = text + std::strlen(text);
  const auto [at, error] = std::from_chars(text, end, limit);
  if (error != std::errc() || at != end || limit < 96 << 10) {
    throw InputError("KVQ_SHARED_LIMIT: '", text, "' is no number of bytes from 98304 on; 101376 is an RTX 4090's limit");
  }
  return limit;
}

int64_t LoadedCount() { return loaded_count; }

std::string KernelsText() {
  const char* limit = std::getenv("KVQ_SHARED_LIMIT");
  return StrCat("NVRTC ", NvrtcVersion(), ", sm_", CurrentDevice().arch,
                limit != nullptr && *limit != '\0' ? StrCat(", ", CurrentDevice().block_shared, " bytes of shared memory a block") : "");
}

std::vector<KernelLaunch> Gather(const DeviceShape& device, const std::function<void()>& work) {
  std::vector<KernelLaunch> launches;
  struct Restore {
    const DeviceShape* device = pretended;
    std::vector<KernelLaunch>* launches = gathered;
    ~Restore() { pretended = device, gathered = launches; }
  } restore;
  pretended = &device, gathered = &launches;
  work();
  return launches;
}

bool Gathering() { return gathered != nullptr; }

void Prepare(const std::function<void()>& work) {
  if (Gathering()) return work();
  std::vector<KernelInstance> missing;
  const std::vector<KernelLaunch> launches = Gather(CurrentDevice(), work);
  const std::lock_guard lock(loaded_mutex);
  for (const KernelLaunch& launch : launches) {
    const auto same = [&](const KernelInstance& one) { return one.name == launch.instance.name; };
    if (!LoadedKernels().contains(launch.instance.name) && std::none_of(missing.begin(), missing.end(), same)) {
      missing.push_back(launch.instance);
    }
  }
  const std::vector<CompiledKernel> compiled = CompileKernels(missing, CurrentDevice().arch);
  for (size_t i = 0; i < missing.size(); ++i) Load(missing[i], compiled[i]);
}

void LaunchRaw(const char* what, const KernelLaunch& launch, void* stream, const std::vector<size_t>& sizes,
               void** arguments) {
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) return;
  if (gathered != nullptr) return gathered->push_back(launch);
  cudaKernel_t kernel = nullptr;
  {
    const std::lock_guard lock(loaded_mutex);
    Loaded& loaded = Find(launch.instance);
    kernel = loaded.kernel;
    if (!loaded.checked) CheckArguments(kernel, launch.instance.name, sizes), loaded.checked = true;
    if (launch.shared_bytes > 32 << 10) {  // with what a kernel declares, 48 KiB may be passed
      int device = 0;
      Check(cudaGetDevice(&device), what);
      size_t& allowed = loaded.allowed[device];
      if (allowed < launch.shared_bytes) {
        Check(cudaKernelSetAttributeForDevice(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(launch.shared_bytes), device),
              what);
        allowed = launch.shared_bytes;
      }
    }
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (launch.early && CurrentDevice().arch >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (launch.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(launch.cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  Check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), what);
}

}  // namespace kvq
