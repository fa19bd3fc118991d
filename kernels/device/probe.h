// What a GPU can do just now: a kernel that is nothing but memory traffic, whose rate nothing that is bound by reading exceeds, and one
// that counts the clock.
#pragma once

#include <cstdint>

namespace kvq {

// StreamingRead takes multiples of this.
inline constexpr int64_t kStreamingReadBytes = 32768;

// Reads `bytes` of GPU memory once, in order, and folds their 32-bit words by exclusive or into the word
// at `folded` (GPU memory): nothing is left out unnoticed. On `stream` (a cudaStream_t), asynchronous.
// Throws std::runtime_error when the launch fails.
void StreamingRead(const void* data, int64_t bytes, uint32_t* folded, void* stream);

// Counts for 20 us on one multiprocessor: its cycles into counted[0], the nanoseconds of the GPU's own timer into counted[1] (memory
// that the GPU reaches). The driver's clock (NVML) is one of some time ago, and says a card's highest in moments in which it runs at four
// fifths of it. On `stream`, asynchronous. Throws std::runtime_error when the launch fails.
void CountClock(uint64_t* counted, void* stream);

}  // namespace kvq
