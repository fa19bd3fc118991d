// What the tensor memory accelerator (from sm_90 on) copies rows by: made by the host (kernels/runtime/tensor_map.h), passed to a kernel as
// a __grid_constant__ argument.
#pragma once

#include <cstdint>

namespace kvq {

struct alignas(64) TensorMap {
  uint64_t words[16] = {};
};

}  // namespace kvq
