// What a memory of a given size has room for: bytes by formula, and the search for the largest that fits.
#pragma once

#include <cstdint>
#include <functional>

#include "fixtures/cache/kv_cache.h"

namespace kvq {

// Bytes of all tensors that a cache makes which holds `capacity` tokens and hands them over in `computes`: KvBytesReserved
// and the scratch, each tensor as `block` says what an allocator takes for it (nothing: its own bytes).
int64_t CacheTensorBytes(const Spec& spec, const CacheShape& shape, int64_t capacity, at::ScalarType dtype,
                         at::ScalarType computes, int64_t (*block)(int64_t bytes) = nullptr);

// The largest n from 1 to `most` of which bytes(n), which does not fall with n, is at most `memory`; 0 where there is none.
int64_t LargestThatFits(const std::function<double(int64_t)>& bytes, double memory, int64_t most);

}  // namespace kvq
