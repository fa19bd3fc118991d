// Tensor maps: ptx::CopyBoxes (kernels/device/ptx.cuh) copies by them.
#pragma once

#include <cstdint>

#include "kernels/device/tensor_map.h"

namespace kvq {

// Rows of 16-bit numbers, [batch, rows, channels], channels contiguous, the other strides in elements; everything aligned to 16 bytes. A copy
// brings `box_rows` rows, all of their channels, in boxes of 64 one behind the other: 128 bytes of each row, whose granules of 16 are at
// (granule ^ row) % 8. Zeros where there is no row. Throws std::runtime_error where the driver refuses it.
TensorMap MapRows(const void* data, int64_t batch, int64_t rows, int64_t channels, int64_t batch_stride, int64_t row_stride, int box_rows);

}  // namespace kvq
