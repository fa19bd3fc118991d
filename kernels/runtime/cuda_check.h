// What every call of the CUDA runtime goes through.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "kernels/error.h"

namespace kvq {

// Throws OutOfMemory or std::runtime_error, naming what was tried. The runtime remembers an error until it is asked for
// it, and a library that asks later would take it for its own: so it is asked here.
inline void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  const std::string text = StrCat("CUDA: ", what, ": ", cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) throw OutOfMemory(text);
  throw std::runtime_error(text);
}

}  // namespace kvq
