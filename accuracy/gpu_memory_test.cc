// fixtures/machine/gpu_memory.h: tensors of known sizes.
#include "fixtures/machine/gpu_memory.h"

#include "accuracy/golden.h"

namespace kvq {
namespace {

constexpr int64_t kBytes = int64_t{256} << 20;  // the allocator rounds large blocks to 2 MiB: this is exact

TEST(GpuMemoryGpu, CountsTensorsAndTheirPeak) {
  KVQ_NEEDS_CUDA();
  const at::Device cuda(at::kCUDA, 0);
  const auto options = at::TensorOptions(at::kByte).device(cuda);
  at::zeros({1}, options);  // CUDA's context
  ReleaseFreedMemory(cuda);
  ResetGpuPeaks(cuda);
  const GpuMemory before = ReadGpuMemory(cuda);
  EXPECT_EQ(before.peak_allocated, before.allocated);
  EXPECT_GT(before.device_total, kBytes);
  const at::Tensor kept = at::empty({kBytes}, options);
  { const at::Tensor freed = at::empty({2 * kBytes}, options); }
  const GpuMemory after = ReadGpuMemory(cuda);
  EXPECT_EQ(after.allocated - before.allocated, kBytes);
  EXPECT_EQ(after.peak_allocated - before.allocated, 3 * kBytes);
  EXPECT_GE(after.peak_reserved, after.peak_allocated);
  ReleaseFreedMemory(cuda);
  ResetGpuPeaks(cuda);
  EXPECT_EQ(ReadGpuMemory(cuda).peak_allocated, after.allocated);
  EXPECT_LT(ReadGpuMemory(cuda).peak_reserved, after.peak_reserved) << "what was freed has gone back";
}

TEST(GpuMemoryGpu, ListsTheLargestBlocksFirst) {
  KVQ_NEEDS_CUDA();
  const at::Device cuda(at::kCUDA, 0);
  const auto options = at::TensorOptions(at::kByte).device(cuda);
  const at::Tensor one = at::empty({8 * kBytes}, options);
  const std::vector<at::Tensor> more = {at::empty({kBytes}, options), at::empty({kBytes}, options)};
  EXPECT_EQ(LargestBlocks(cuda, 2), "1 x 2048.00 MiB\n2 x 256.00 MiB\n");
}

}  // namespace
}  // namespace kvq
