#include "kernels/runtime/tensor_map.h"

#include <cuda.h>

#include <algorithm>

#include "kernels/runtime/cuda_check.h"

namespace kvq {

TensorMap MapRows(const void* data, int64_t batch, int64_t rows, int64_t channels, int64_t batch_stride, int64_t row_stride, int box_rows) {
  static const auto encode = [] {  // of the driver, which nothing is linked to
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    Check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found), "tensor maps");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("CUDA: this driver knows no tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= 64);
  constexpr cuuint32_t kBox = 64;
  const auto count = [](int64_t n) { return static_cast<cuuint64_t>(std::max<int64_t>(n, 1)); };
  const cuuint64_t sizes[] = {kBox, count(rows), count(channels / kBox), count(batch)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride * 2), kBox * 2, static_cast<cuuint64_t>(batch_stride * 2)};
  const cuuint32_t box[] = {kBox, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(channels / kBox), 1}, steps[] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error(StrCat("CUDA: a tensor map of ", rows, " rows: error ", static_cast<int>(result)));
  return map;
}

}  // namespace kvq
