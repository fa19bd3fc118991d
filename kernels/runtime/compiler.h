// Compiles device code when it is first wanted, by NVRTC, for one architecture; and keeps what came out.
//
// A fused kernel is one template over codecs, head_dim, query heads, tile: its instances number in the thousands, a run
// needs a dozen, and cards differ in what a block may hold. So nothing is compiled ahead. The sources are those of this
// build (embedded as text); NVRTC is loaded when a kernel is wanted, from wherever the loader finds it, from the CUDA
// Toolkit, or from PyPI's package (ci/setup). It needs neither a GPU nor a driver.
//
// The folder is $KVQ_CACHE/kernels, one file an instance and architecture, named by a hash of everything that went into
// it: the sources it includes, the options, the architecture, NVRTC's build. Files are written beside and renamed; one
// that does not have the bytes it was written with is compiled anew; the least recently used ones go where together they
// are larger than kCacheBytes.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace kvq {

// An instance of a kernel template: the sources that its program includes, by their paths in the repository, and its
// name in C++, e.g. "kvq::step::AddNormKernel<true, 8, 1>".
struct KernelInstance {
  std::vector<std::string> sources;
  std::string name;
};

// `name<arguments...>`: numbers, bools and names of types, as C++ spells them.
template <typename... Arguments>
std::string InstanceName(const std::string& name, const Arguments&... arguments);

// Machine code for one architecture.
struct CompiledKernel {
  std::string cubin;
  std::string symbol;     // of the kernel in it
  int registers = 0;      // a thread
  int local_bytes = 0;    // of a thread's own memory: registers that did not fit, what is indexed as it runs
  int64_t shared_bytes = 0;  // static
};

inline constexpr int64_t kCacheBytes = int64_t{512} << 20;

// For sm_<arch>, e.g. 90. From the folder, or compiled. Throws std::runtime_error with the compiler's first error, and
// InputError where NVRTC is not there, with what would bring it.
CompiledKernel CompileKernel(const KernelInstance& instance, int arch);

// The same for several, on as many threads as there are processors.
std::vector<CompiledKernel> CompileKernels(const std::vector<KernelInstance>& instances, int arch);

// How many this process has compiled so far; the others came from the folder.
int64_t CompiledCount();

// "13.0"; throws as CompileKernel does.
std::string NvrtcVersion();

// Called with one line before a batch is compiled, "compiling 3 kernels for sm_90"; by default it goes to stderr.
void OnCompiling(std::function<void(const std::string&)> say);

// ---- details

std::string JoinInstance(const std::string& name, const std::vector<std::string>& arguments);
inline std::string InstanceArgument(bool x) { return x ? "true" : "false"; }
inline std::string InstanceArgument(int64_t x) { return std::to_string(x); }
inline std::string InstanceArgument(int x) { return std::to_string(x); }
inline std::string InstanceArgument(const std::string& x) { return x; }
inline std::string InstanceArgument(const char* x) { return x; }

template <typename... Arguments>
std::string InstanceName(const std::string& name, const Arguments&... arguments) {
  return JoinInstance(name, {InstanceArgument(arguments)...});
}

}  // namespace kvq
