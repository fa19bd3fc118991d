// A kernel that is nothing but memory traffic: what its rate is, nothing that is bound by reading exceeds.
#pragma once

#include <cstdint>

namespace kvq {

// StreamingRead takes multiples of this.
inline constexpr int64_t kStreamingReadBytes = 32768;

// Reads `bytes` of GPU memory once, in order, and folds their 32-bit words by exclusive or into the word
// at `folded` (GPU memory): nothing is left out unnoticed. On `stream` (a cudaStream_t), asynchronous.
// Throws std::runtime_error when the launch fails.
void StreamingRead(const void* data, int64_t bytes, uint32_t* folded, void* stream);

}  // namespace kvq
