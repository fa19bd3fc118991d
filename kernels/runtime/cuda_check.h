// What every call of the CUDA runtime goes through.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "kernels/error.h"

namespace kvq {

// Throws std::runtime_error, naming what was tried.
inline void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(StrCat("CUDA: ", what, ": ", cudaGetErrorString(error)));
  }
}

}  // namespace kvq
