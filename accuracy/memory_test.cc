// Running out of memory: that it is recognized, that nothing stays behind, and that what fits does not depend on what
// ran before.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "accuracy/golden.h"
#include "accuracy/tiny_model.h"
#include "fixtures/machine/gpu_memory.h"
#include "fixtures/machine/host_memory.h"
#include "fixtures/machine/out_of_memory.h"
#include "kernels/error.h"
#include "kernels/runtime/scratch.h"
#include "kernels/runtime/cuda_check.h"

namespace kvq {
namespace {

// ---- how it shows

TEST(OutOfMemoryErrors, AreKnownByTheirTypes) {
  EXPECT_TRUE(IsOutOfMemory(std::bad_alloc()));
  EXPECT_TRUE(IsOutOfMemory(OutOfMemory("no room")));
  EXPECT_TRUE(IsOutOfMemory(c10::OutOfMemoryError({"", "", 0}, "")));
  EXPECT_TRUE(IsOutOfMemory(c10::AcceleratorError({"", "", 0}, 2, "")));
  EXPECT_FALSE(IsOutOfMemory(c10::AcceleratorError({"", "", 0}, 700, "an illegal memory access")));
  EXPECT_FALSE(IsOutOfMemory(std::runtime_error("CUDA: launch: an illegal memory access was encountered")));
  EXPECT_THROW(Check(cudaErrorMemoryAllocation, "graph"), OutOfMemory);
  EXPECT_THROW(Check(cudaErrorIllegalAddress, "graph"), std::runtime_error);
}

TEST(OutOfMemoryErrors, AreKnownByWordsWhereThereIsNoType) {
  for (const char* text : {"CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                           "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
                           "CUDA: events: out of memory"}) {
    EXPECT_TRUE(IsOutOfMemory(std::runtime_error(text))) << text;
  }
  EXPECT_FALSE(IsOutOfMemory(std::runtime_error("CUBLAS_STATUS_EXECUTION_FAILED")));
}

TEST(OutOfMemoryErrors, OfLibtorchsCpuAllocatorSayWhatWasAskedFor) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer ends the process where an allocation is too large";
#endif
  try {
    at::empty({int64_t{1} << 50}, at::kByte);
    FAIL() << "a petabyte was had";
  } catch (const std::exception& error) {
    EXPECT_TRUE(IsOutOfMemory(error)) << error.what();
    const std::string text = OutOfMemoryText(error, kCpu);
    EXPECT_EQ(text.find("another 1048576.00 GiB did not fit; this process may have "), 0u) << text;
    EXPECT_EQ(text.find('\n'), std::string::npos);
  }
  EXPECT_EQ(OutOfMemoryText(OutOfMemory("CUDA: upload of the graph: out of memory"), kCpu)
                .find("CUDA: upload of the graph: out of memory; this process may have "), 0u);
}

// ---- the process's own memory

TEST(HostMemory, OfLargeTensorsIsKeptForTheNextAndGoesBackWhole) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer looks after its own memory only";
#endif
  constexpr int64_t kMiB = 1 << 20;
  KeepFreedMemory();
  ReleaseFreedHostMemory();
  const auto bytes = [](int64_t n) { return at::empty({n}, at::kByte); };
  const void* first = bytes(4 * kMiB).data_ptr();
  EXPECT_EQ(KeptHostBytes(), 4 * kMiB);
  {
    const at::Tensor same = bytes(4 * kMiB - 5000), smaller = bytes(2 * kMiB), small = bytes(1000);
    EXPECT_EQ(same.data_ptr(), first);
    EXPECT_EQ(KeptHostBytes(), 0);
  }
  EXPECT_EQ(KeptHostBytes(), 6 * kMiB);
  bytes(5 * kMiB);  // neither is large enough
  EXPECT_EQ(KeptHostBytes(), 11 * kMiB);
  bytes(64 * kMiB);  // too large to be kept
  EXPECT_EQ(KeptHostBytes(), 11 * kMiB);
  ReleaseFreedHostMemory();
  EXPECT_EQ(KeptHostBytes(), 0);

  const at::Tensor ones = at::ones({3 * kMiB}, at::kByte);
  EXPECT_TRUE(ones.clone().equal(ones));
  at::Tensor grows = bytes(100);
  grows.fill_(1).resize_({2 * kMiB}).narrow(0, 100, kMiB).fill_(2);
  grows.resize_({3 * kMiB});
  EXPECT_EQ(grows.narrow(0, 0, 100 + kMiB).sum().item<int64_t>(), 100 + 2 * kMiB);
  c10::Allocator& allocator = *c10::GetAllocator(at::kCPU);
  for (const size_t size : {size_t{0}, size_t{10}, size_t{2} << 20}) {
    allocator.raw_deallocate(allocator.raw_allocate(size));
  }
}

// What a heap cannot do: a block that lies above what is freed, and stays, keeps nothing.
TEST(HostMemory, BelowABlockThatStaysGoesBackToo) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer looks after its own memory only";
#endif
  KeepFreedMemory();
  const auto virtual_bytes = [] {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
      if (line.rfind("VmData:", 0) == 0) return std::stoll(line.substr(7)) << 10;
    }
    return 0LL;
  };
  at::zeros({20 << 20}, at::kByte);  // starts the threads, whose stacks stay
  ReleaseFreedHostMemory();
  const int64_t before = virtual_bytes();
  std::vector<at::Tensor> tensors;
  std::vector<std::unique_ptr<char[]>> stay;
  for (int i = 0; i < 20; ++i) {
    tensors.push_back(at::zeros({20 << 20}, at::kByte));
    stay.push_back(std::make_unique<char[]>(100));
  }
  EXPECT_GE(virtual_bytes() - before, int64_t{400} << 20);
  tensors.clear();
  ReleaseFreedHostMemory();
  EXPECT_LT(virtual_bytes() - before, int64_t{2} << 20);
}

// ---- scratch memory

// An allocator that gives out numbers for addresses and keeps books.
struct Books {
  std::map<void*, int64_t> live;
  int allocations = 0;
};
Books* books = nullptr;

class ScratchMemory : public testing::Test {
 protected:
  void SetUp() override {
    books = &books_;
    before_ = SetScratchAllocator({.allocate =
                                       [](int64_t bytes, void*) {
                                         if (bytes > 1000) throw OutOfMemory("the books end at 1000");
                                         void* memory = reinterpret_cast<void*>(intptr_t{++books->allocations} * 4096);
                                         books->live[memory] = bytes;
                                         return memory;
                                       },
                                   .free = [](void* memory) { EXPECT_EQ(books->live.erase(memory), 1u); }});
  }
  void TearDown() override { SetScratchAllocator(before_); }

  Books books_;
  ScratchAllocator before_;
  int streams_[2];
  void* const one_ = &streams_[0];
  void* const other_ = &streams_[1];
};

TEST_F(ScratchMemory, GoesWithTheCall) {
  {
    const Scratch scratch(10, one_);
    EXPECT_EQ(books_.live, (std::map<void*, int64_t>{{scratch.data(), 10}}));
  }
  EXPECT_TRUE(books_.live.empty());
  EXPECT_THROW(Scratch(2000, one_), OutOfMemory);
}

TEST_F(ScratchMemory, OfACaptureStaysWithItsKeeper) {
  {
    ScratchKeeper keeper;
    std::vector<void*> first, second;
    const auto work = [&](std::vector<void*>& seen) {
      for (void* stream : {one_, one_, other_, one_}) {  // call after call
        const Scratch scratch(10, stream);
        seen.push_back(scratch.data());
      }
      const Scratch a(10, one_), b(20, one_);  // at the same time
      seen.push_back(a.data()), seen.push_back(b.data());
    };
    keeper.Keep([&] { work(first); });
    EXPECT_EQ(first[0], first[1]) << "calls on a stream take turns";
    EXPECT_EQ(first[0], first[3]);
    EXPECT_NE(first[0], first[2]) << "streams run side by side";
    EXPECT_NE(first[4], first[5]);
    EXPECT_EQ(books_.live.size(), 3u) << "nothing went back";
    EXPECT_EQ(keeper.bytes(), 10 + 10 + 20);
    const int allocations = books_.allocations;
    {
      const Scratch stranger(10, one_);
      EXPECT_EQ(std::count(first.begin(), first.end(), stranger.data()), 0);
    }
    keeper.Keep([&] { work(second); });
    EXPECT_EQ(first, second);
    EXPECT_EQ(books_.allocations, allocations + 1) << "the second time there is no allocation but the stranger's";
  }
  EXPECT_TRUE(books_.live.empty());
}

TEST_F(ScratchMemory, OfWorkThatThrowsIsThereForTheNext) {
  ScratchKeeper keeper;
  EXPECT_THROW(keeper.Keep([&] {
    const Scratch fits(10, one_), too_large(2000, one_);
  }), OutOfMemory);
  keeper.Keep([&] { const Scratch scratch(10, one_); });
  EXPECT_EQ(books_.allocations, 1);
  const Scratch outside(10, one_);
  EXPECT_EQ(books_.allocations, 2) << "the keeper keeps what is taken in Keep alone";
}

// ---- cells in any order

// name: "measured", or why not.
std::map<std::string, std::string> Fates(const Outcome& outcome) {
  std::map<std::string, std::string> fates;
  for (const auto& [name, run] : ByName(outcome.out)) {
    const std::string why = run.value("error_message", run.value("skip_message", ""));
    fates[name] = why.empty() ? "measured" : why.substr(0, why.find(':', why.find(':') + 1));
  }
  return fates;
}

class MemoryOfCells : public TinyModel {};

TEST_F(MemoryOfCells, DoesNotDependOnTheirOrder) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer reserves more memory than any limit";
#endif
  WidenHeads(dir_ / "tiny");
  // A sequence of 64 tokens has 2 sides, 2 layers, 4 heads of 64 channels of 4 bytes: 256 KiB. The libraries and the
  // code take some 120 MiB of the 1400. `error` over 1400 sequences keeps the cache it captured, 350 MiB, beside
  // which the 1100 MiB of 4400 sequences, for kv_size, do not fit; alone they do. 8000 sequences have 2000 MiB and
  // never fit.
  const auto run = [&](const std::string& batches) {
    return Execute(Tiny() + " --schemes=none,int4-quanto@residual=16 --contexts=64 --dtype=float32 --prefill-chunk=16 "
                   "--memory-limit=1400 --benchmark_filter='^(error/.*/int4.*/batch:(1400|8000)|kv_size/.*/none/)' "
                   "--benchmark_format=json --batch=" + batches, "export OMP_NUM_THREADS=2;");
  };
  const auto name = [](const char* measurement, const char* spec, int batch) {
    return StrCat(measurement, "/tiny/sdpa/", spec, "/ctx:64/batch:", batch);
  };
  const std::map<std::string, std::string> expected = {
      {name("error", "int4-quanto@residual=16", 1400), "measured"},
      {name("error", "int4-quanto@residual=16", 8000), "skipped: out of memory"},
      {name("kv_size", "none", 1400), "measured"},
      {name("kv_size", "none", 4400), "measured"},
      {name("kv_size", "none", 8000), "skipped: out of memory"}};
  for (const std::string batches : {"4400,8000,1400", "1400,4400,8000", "8000,4400,1400"}) {
    SCOPED_TRACE(batches);
    const Outcome outcome = run(batches);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_EQ(Fates(outcome), expected) << outcome.out;
    if (batches != "4400,8000,1400") continue;
    EXPECT_NE(outcome.err.find(name("kv_size", "none", 4400) + " ran out of memory"), std::string::npos)
        << "it fitted beside what was held: the limit is too large\n" << outcome.err;
  }
}

TEST_F(MemoryOfCells, IsRefusedALimitThatLeavesNothing) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer reserves more memory than any limit";
#endif
  const Outcome outcome = Execute(Tiny() + " --schemes=none --contexts=32 --benchmark_filter=kv_size --memory-limit=1");
  EXPECT_EQ(outcome.code, 2);
  EXPECT_NE(outcome.err.find("--memory-limit"), std::string::npos) << outcome.err;
}

// ---- GPUs

const at::Device kCuda(at::kCUDA, 0);

at::Tensor Bytes(int64_t bytes) { return at::empty({bytes}, at::TensorOptions(at::kByte).device(kCuda)); }

// Whatever a test does, the next one has the whole GPU.
class GpuMemoryLimitGpu : public testing::Test {
 protected:
  void TearDown() override {
    if (WhyNoCuda().empty()) LimitGpuMemory(kCuda, INT64_MAX);
  }
};

TEST_F(GpuMemoryLimitGpu, HoldsAndIsSaid) {
  KVQ_NEEDS_CUDA();
  Bytes(1);  // CUDA's context
  GiveBackMemory(kCuda);
  LimitGpuMemory(kCuda, int64_t{1} << 30);
  EXPECT_NEAR(static_cast<double>(GpuMemoryLimit(kCuda)), 0x1p30, 4096);
  Bytes(int64_t{512} << 20);
  try {
    Bytes(int64_t{2} << 30);
    FAIL() << "more than the limit was had";
  } catch (const std::exception& error) {
    EXPECT_TRUE(IsOutOfMemory(error)) << error.what();
    EXPECT_EQ(OutOfMemoryText(error, kCuda), "another 2.00 GiB did not fit; cuda:0 has 1.00 GiB");
  }
  Bytes(int64_t{768} << 20);  // the 512 MiB in the allocator's cache are in nobody's way
  LimitGpuMemory(kCuda, INT64_MAX);
  EXPECT_EQ(GpuMemoryLimit(kCuda), ReadGpuMemory(kCuda).device_total);
}

TEST(OutOfMemoryErrorsGpu, AreForgottenOnceReported) {
  KVQ_NEEDS_CUDA();
  void* memory = nullptr;
  EXPECT_THROW(Check(cudaMalloc(&memory, size_t{1} << 50), "a petabyte"), OutOfMemory);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(GpuMemoryLimitGpu, NothingIsLeftWhenAllIsGivenBack) {
  KVQ_NEEDS_CUDA();
  Bytes(1);
  GiveBackMemory(kCuda);
  const int64_t before = ReadGpuMemory(kCuda).allocated;
  {
    const at::Tensor a = at::randn({2048, 2048}, at::TensorOptions(at::kHalf).device(kCuda));
    at::matmul(a, a);
    const c10::StreamGuard guard(GraphStream(kCuda));
    at::matmul(a, a);
  }
  EXPECT_GT(ReadGpuMemory(kCuda).allocated, before) << "cuBLAS keeps no workspace any more: GiveBackGpuMemory may go";
  GiveBackMemory(kCuda);
  EXPECT_EQ(ReadGpuMemory(kCuda).allocated, before);
  ResetGpuPeaks(kCuda);
  EXPECT_LE(ReadGpuMemory(kCuda).peak_reserved, before + (2 << 20));
}

TEST(ScratchMemoryGpu, IsLibtorchs) {
  KVQ_NEEDS_CUDA();
  Bytes(1);
  GiveBackMemory(kCuda);
  const int64_t before = ReadGpuMemory(kCuda).allocated, bytes = int64_t{64} << 20;
  void* first = nullptr;
  {
    const Scratch scratch(bytes, nullptr);
    EXPECT_EQ(ReadGpuMemory(kCuda).allocated, before + bytes);
    first = scratch.data();
  }
  EXPECT_EQ(ReadGpuMemory(kCuda).allocated, before);
  EXPECT_EQ(Bytes(bytes).data_ptr(), first) << "a tensor has what the scratch had";
  EXPECT_THROW(Scratch(bytes, GraphStream(kCuda).native_handle()), std::logic_error);
  const c10::StreamGuard guard(GraphStream(kCuda));
  const Scratch scratch(bytes, GraphStream(kCuda).native_handle());
  EXPECT_NE(scratch.data(), first) << "memory of another stream may still be in use there";
}

class MemoryOfCellsGpu : public testing::Test {};

TEST_F(MemoryOfCellsGpu, DoesNotDependOnTheirOrder) {
  KVQ_NEEDS_CUDA();
  Bytes(1);
  if (ReadGpuMemory(kCuda).device_total < int64_t{6} << 30) GTEST_SKIP() << "a GPU of less than 6 GiB";
  GiveBackMemory(kCuda);
  // In 4000 MiB (4.2 GB). Weights have 1.0 GB. A token of the cache has 12 KiB in 16 bits; a sequence of 4104 is 50
  // MB, or with int2-hqq 9 MB and 2 for what is decoded of it; a prefill's temporaries are some 0.5 GB. So 16
  // sequences fit, 80 are 4.0 GB or 0.9, and 512 do not fit either way. Attention alone over 800 sequences has two
  // copies of 1.7 GB: they fit when the weights that `decode` leaves are given back.
  const auto run = [&](const std::string& schemes, const std::string& batches) {
    return Execute(
        "--device=cuda --models=qwen2-0.5b --backends=fused --contexts=4096 --decode-tokens=8 --runs=1 --max-runs=1 "
        "--memory-limit=4000 --benchmark_format=json --benchmark_filter="
        "'^(decode/.*/batch:16$|kernel_attention/.*/none/.*/batch:800$|memory/.*/batch:(16|80|512)$)' "
        "--schemes=" + schemes + " --batch=" + batches);
  };
  const auto name = [](const char* measurement, const char* spec, int batch) {
    return StrCat(measurement, "/qwen2-0.5b/fused/", spec, "/ctx:4096/batch:", batch);
  };
  const bool timed = std::string(KVQ_BUILD_TYPE) == "Release";
  std::map<std::string, std::string> expected = {
      {name("memory", "none", 16), "measured"},
      {name("memory", "none", 80), "skipped: out of memory"},
      {name("memory", "none", 512), "skipped: out of memory"},
      {name("memory", "int2-hqq", 16), "measured"},
      {name("memory", "int2-hqq", 80), "measured"},
      {name("memory", "int2-hqq", 512), "skipped: out of memory"}};
  for (const auto& [measurement, spec, batch] :
       {std::tuple("decode", "none", 16), std::tuple("decode", "int2-hqq", 16),
        std::tuple("kernel_attention", "none", 800)}) {
    expected[name(measurement, spec, batch)] =
        timed ? "measured" : "skipped: times are measured in Release builds only, this is " KVQ_BUILD_TYPE;
  }
  for (const auto& [schemes, batches] :
       {std::pair("none,int2-hqq", "16,80,512,800"), std::pair("int2-hqq,none", "800,512,80,16"),
        std::pair("none,int2-hqq", "80,800,16,512")}) {
    SCOPED_TRACE(StrCat(schemes, " ", batches));
    const Outcome outcome = run(schemes, batches);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_EQ(Fates(outcome), expected) << outcome.out;
    if (!timed) continue;
    EXPECT_NE(outcome.err.find(name("kernel_attention", "none", 800) + " ran out of memory"), std::string::npos)
        << "it fitted beside the weights: the limit is too large\n" << outcome.err;
  }
}

}  // namespace
}  // namespace kvq
