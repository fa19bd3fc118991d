#include "kernels/runtime/compiler.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "kernels/error.h"
#include "kernels/runtime/cache_dir.h"
#include "kernels/runtime/sources.h"
#include "kernels/sha256.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;

// ---- NVRTC, by the names of its C interface (nvrtc.h): nothing links to it

using Program = void*;

struct Nvrtc {
  int (*version)(int*, int*);
  const char* (*error_string)(int);
  int (*create)(Program*, const char*, const char*, int, const char* const*, const char* const*);
  int (*destroy)(Program*);
  int (*compile)(Program, int, const char* const*);
  int (*add_name)(Program, const char*);
  int (*lowered_name)(Program, const char*, const char**);
  int (*log_size)(Program, size_t*);
  int (*log)(Program, char*);
  int (*cubin_size)(Program, size_t*);
  int (*cubin)(Program, char*);
  std::string version_text, build;  // build: tells one patch from another
};

Nvrtc LoadNvrtc() {
  const std::string file = "libnvrtc.so.13";
  void* library = nullptr;
  std::string why;
  for (const std::string& path : {file, "/usr/local/cuda/lib64/" + file, CacheDir() + "/nvidia/cu13/lib/" + file}) {
    library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    if (why.empty()) why = dlerror();
  }
  if (library == nullptr) {
    throw InputError("kernels are compiled by NVRTC, which does not load (", why,
                     "): the CUDA Toolkit 13 has it, or ci/setup brings it (without a GPU: ci/setup --nvrtc)");
  }
  Nvrtc n;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) throw InputError(file, ": has no ", name, "; NVRTC of CUDA 13 would be right");
  };
  find(n.version, "nvrtcVersion");
  find(n.error_string, "nvrtcGetErrorString");
  find(n.create, "nvrtcCreateProgram");
  find(n.destroy, "nvrtcDestroyProgram");
  find(n.compile, "nvrtcCompileProgram");
  find(n.add_name, "nvrtcAddNameExpression");
  find(n.lowered_name, "nvrtcGetLoweredName");
  find(n.log_size, "nvrtcGetProgramLogSize");
  find(n.log, "nvrtcGetProgramLog");
  find(n.cubin_size, "nvrtcGetCUBINSize");
  find(n.cubin, "nvrtcGetCUBIN");
  int major = 0, minor = 0;
  n.version(&major, &minor);
  n.version_text = StrCat(major, ".", minor);
  // The interface has no number of a patch.
  Dl_info info;
  std::error_code error;
  n.build = n.version_text;
  if (dladdr(reinterpret_cast<void*>(n.compile), &info) != 0) n.build += StrCat(" ", fs::file_size(info.dli_fname, error));
  return n;
}

const Nvrtc& TheNvrtc() {
  static const Nvrtc nvrtc = LoadNvrtc();
  return nvrtc;
}

void Check(int error, const char* what) {
  if (error != 0) throw std::runtime_error(StrCat("NVRTC: ", what, ": ", TheNvrtc().error_string(error)));
}

// ---- sources

// Standard headers that device code includes: standard.h stands for them.
constexpr const char* kStandardHeaders[] = {"algorithm", "cmath", "cstddef", "cstdint", "cstring", "type_traits", "utility"};

const std::map<std::string, std::string, std::less<>>& Sources() {
  static const std::map<std::string, std::string, std::less<>> sources = [] {
    std::map<std::string, std::string, std::less<>> all;
    for (const EmbeddedSource& source : EmbeddedSources()) all.emplace(source.path, source.text);
    return all;
  }();
  return sources;
}

const std::string& SourceText(const std::string& path) {
  const auto found = Sources().find(path);
  if (found == Sources().end()) throw std::logic_error(StrCat(path, ": is not among the embedded sources"));
  return found->second;
}

// `path` and all that it includes of this project, each once.
void AddClosure(const std::string& path, std::set<std::string>& closure) {
  if (Sources().find(path) == Sources().end()) return;  // not ours
  if (!closure.insert(path).second) return;
  std::istringstream lines(SourceText(path));
  for (std::string line; std::getline(lines, line);) {
    constexpr std::string_view kInclude = "#include \"kernels/";
    if (!line.starts_with(kInclude)) continue;
    const size_t begin = kInclude.size() - std::string_view("kernels/").size();
    AddClosure(line.substr(begin, line.find('"', begin) - begin), closure);
  }
}

std::vector<std::string> Options(int arch) {
  // No fused multiply-adds but where the code says fma: codes are compared bit for bit with the CPU's.
  return {StrCat("--gpu-architecture=sm_", arch), "--std=c++20", "--fmad=false", "--device-as-default-execution-space",
          "--ptxas-options=--verbose"};
}

std::string ProgramText(const KernelInstance& instance) {
  std::string text;
  std::set<std::string> included;  // a scheme's source, which keys and values may both name, is no header
  for (const std::string& source : instance.sources) {
    if (included.insert(source).second) text += "#include \"" + source + "\"\n";
  }
  return text;
}

// ---- the folder

std::string KeyOf(const KernelInstance& instance, int arch) {
  std::set<std::string> closure = {"kernels/runtime/standard.h"};
  for (const std::string& source : instance.sources) AddClosure(source, closure);
  std::string all = StrCat("2\n", TheNvrtc().build, "\n", instance.name, "\n", ProgramText(instance));
  for (const std::string& option : Options(arch)) all += option + "\n";
  for (const std::string& path : closure) all += StrCat(path, "\n", SourceText(path).size(), "\n", SourceText(path));
  return Sha256(all);
}

// A file: one line with the hash of what follows; a line of symbol, registers, local bytes, shared bytes; the machine code.
std::string Pack(const CompiledKernel& kernel) {
  const std::string rest = StrCat(kernel.symbol, " ", kernel.registers, " ", kernel.local_bytes, " ",
                                  kernel.shared_bytes, "\n", kernel.cubin);
  return StrCat(Sha256(rest), "\n", rest);
}

bool Unpack(const std::string& file, CompiledKernel& kernel) {
  const size_t first = file.find('\n'), second = file.find('\n', first + 1);
  if (first == std::string::npos || second == std::string::npos) return false;
  if (Sha256(std::string_view(file).substr(first + 1)) != file.substr(0, first)) return false;
  std::istringstream facts(file.substr(first + 1, second - first - 1));
  facts >> kernel.symbol >> kernel.registers >> kernel.local_bytes >> kernel.shared_bytes;
  kernel.cubin = file.substr(second + 1);
  return !facts.fail();
}

bool ReadFile(const fs::path& path, std::string& text) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return false;
  text.assign(std::istreambuf_iterator<char>(in), {});
  return true;
}

// A folder that cannot be written costs time, not correctness.
void Store(const fs::path& path, const std::string& text) {
  std::error_code error;
  fs::create_directories(path.parent_path(), error);
  static std::atomic<int> number{0};
  const fs::path part = StrCat(path.string(), ".part-", getpid(), "-", number++);
  {
    std::ofstream out(part, std::ios::binary);
    out << text;
    out.flush();
    if (!out) {
      out.close();
      fs::remove(part, error);
      return;
    }
  }
  fs::rename(part, path, error);
  if (error) fs::remove(part, error);
  // The folder's bound.
  struct File {
    fs::file_time_type time;
    int64_t bytes;
    fs::path path;
  };
  std::vector<File> files;
  int64_t total = 0;
  for (fs::directory_iterator i(path.parent_path(), error), end; !error && i != end; i.increment(error)) {
    std::error_code gone;
    const auto bytes = static_cast<int64_t>(i->file_size(gone));
    const auto time = i->last_write_time(gone);
    if (gone) continue;
    files.push_back({time, bytes, i->path()});
    total += bytes;
  }
  if (total <= kCacheBytes) return;
  std::sort(files.begin(), files.end(), [](const File& a, const File& b) { return a.time < b.time; });
  for (const File& file : files) {
    if (total <= kCacheBytes * 3 / 4) break;
    if (file.path == path) continue;
    fs::remove(file.path, error);
    total -= file.bytes;
  }
}

// ---- compiling

std::atomic<int64_t> compiled_count{0};

std::mutex say_mutex;
std::function<void(const std::string&)> say = [](const std::string& line) { fprintf(stderr, "kvqbench: %s\n", line.c_str()); };

// The number before `what` in ptxas' report of resources.
int64_t NumberBefore(const std::string& log, const std::string& what) {
  int64_t sum = 0;
  for (size_t at = log.find(what); at != std::string::npos; at = log.find(what, at + 1)) {
    size_t begin = at;
    while (begin > 0 && isdigit(static_cast<unsigned char>(log[begin - 1]))) --begin;
    int64_t number = 0;
    std::from_chars(log.data() + begin, log.data() + at, number);
    sum += number;
  }
  return sum;
}

CompiledKernel CompileNow(const KernelInstance& instance, int arch) {
  const Nvrtc& nvrtc = TheNvrtc();
  std::vector<const char*> names, texts;
  for (const auto& [path, text] : Sources()) {
    if (path == "kernels/runtime/standard.h") continue;
    names.push_back(path.c_str());
    texts.push_back(text.c_str());
  }
  for (const char* name : kStandardHeaders) {
    names.push_back(name);
    texts.push_back(SourceText("kernels/runtime/standard.h").c_str());
  }
  const std::string text = ProgramText(instance);
  Program program = nullptr;
  Check(nvrtc.create(&program, text.c_str(), "kernel.cu", static_cast<int>(names.size()), texts.data(), names.data()),
        "program");
  struct Destroy {
    const Nvrtc& nvrtc;
    Program& program;
    ~Destroy() { nvrtc.destroy(&program); }
  } destroy{nvrtc, program};
  Check(nvrtc.add_name(program, instance.name.c_str()), instance.name.c_str());
  const std::vector<std::string> options = Options(arch);
  std::vector<const char*> words;
  for (const std::string& option : options) words.push_back(option.c_str());
  const int error = nvrtc.compile(program, static_cast<int>(words.size()), words.data());
  size_t size = 0;
  nvrtc.log_size(program, &size);
  std::string log(size, '\0');
  nvrtc.log(program, log.data());
  while (!log.empty() && log.back() == '\0') log.pop_back();
  if (error != 0) {
    const size_t at = log.find("error");
    const size_t begin = at == std::string::npos ? 0 : log.rfind('\n', at) + 1;
    throw std::runtime_error(StrCat(instance.name, " for sm_", arch, " does not compile: ", nvrtc.error_string(error), ": ",
                                    log.substr(begin, log.find('\n', begin) - begin)));
  }
  CompiledKernel kernel;
  const char* lowered = nullptr;
  Check(nvrtc.lowered_name(program, instance.name.c_str(), &lowered), "name");
  kernel.symbol = lowered;
  Check(nvrtc.cubin_size(program, &size), "machine code");
  kernel.cubin.resize(size);
  Check(nvrtc.cubin(program, kernel.cubin.data()), "machine code");
  // ptxas reports all kernels of the program; this one's part ends where the next begins.
  log = log.substr(std::min(log.find("'" + kernel.symbol + "'"), log.size()));
  log = log.substr(0, log.find("Compiling entry function"));
  kernel.registers = static_cast<int>(NumberBefore(log, " registers"));
  kernel.local_bytes = static_cast<int>(NumberBefore(log, " bytes stack frame"));
  kernel.shared_bytes = NumberBefore(log, " bytes smem");
  return kernel;
}

// From the folder; false where it is not there as it was written.
bool Find(const fs::path& path, CompiledKernel& kernel) {
  std::string text;
  if (!ReadFile(path, text) || !Unpack(text, kernel)) return false;
  std::error_code error;
  fs::last_write_time(path, fs::file_time_type::clock::now(), error);  // of the last use
  return true;
}

}  // namespace

std::string JoinInstance(const std::string& name, const std::vector<std::string>& arguments) {
  std::string text = name;
  for (size_t i = 0; i < arguments.size(); ++i) text += (i == 0 ? "<" : ", ") + arguments[i];
  return text + (arguments.empty() ? "" : ">");
}

std::vector<CompiledKernel> CompileKernels(const std::vector<KernelInstance>& instances, int arch) {
  std::vector<CompiledKernel> kernels(instances.size());
  std::vector<fs::path> paths;
  std::vector<size_t> missing;
  for (size_t i = 0; i < instances.size(); ++i) {
    paths.push_back(fs::path(CacheDir()) / "kernels" / KeyOf(instances[i], arch));
    if (!Find(paths[i], kernels[i])) missing.push_back(i);
  }
  if (missing.empty()) return kernels;
  {
    const std::lock_guard lock(say_mutex);
    say(StrCat("compiling ", missing.size(), missing.size() == 1 ? " kernel" : " kernels", " for sm_", arch, " (",
               instances[missing.front()].name, missing.size() == 1 ? ")" : ", ...)"));
  }
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto work = [&] {
    for (size_t i = next++; i < missing.size(); i = next++) {
      try {
        kernels[missing[i]] = CompileNow(instances[missing[i]], arch);
        ++compiled_count;
        Store(paths[missing[i]], Pack(kernels[missing[i]]));
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!failure) failure = std::current_exception();
      }
    }
  };
  const size_t threads = std::min<size_t>(missing.size(), std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> pool;
  try {
    for (size_t i = 1; i < threads; ++i) pool.emplace_back(work);
  } catch (const std::system_error&) {  // by those that there are
  }
  work();
  for (std::thread& thread : pool) thread.join();
  if (failure) std::rethrow_exception(failure);
  return kernels;
}

CompiledKernel CompileKernel(const KernelInstance& instance, int arch) { return CompileKernels({instance}, arch).front(); }

int64_t CompiledCount() { return compiled_count; }

std::string NvrtcVersion() { return TheNvrtc().version_text; }

void OnCompiling(std::function<void(const std::string&)> to) {
  const std::lock_guard lock(say_mutex);
  say = std::move(to);
}

}  // namespace kvq
