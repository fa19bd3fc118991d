// What a memory of a given size has room for: bytes by formula, and the search for the largest that fits.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "fixtures/cache/kv_cache.h"

namespace kvq {

// Bytes of each tensor that a cache makes which holds `capacity` tokens and hands them over in `computes`, its scratch first; under
// policy hf, which makes them as tokens come, KvBytesReserved as one.
std::vector<int64_t> CacheTensors(const Spec& spec, const CacheShape& shape, int64_t capacity, at::ScalarType dtype, at::ScalarType computes);
// Of all: KvBytesReserved and the scratch.
int64_t CacheTensorBytes(const Spec& spec, const CacheShape& shape, int64_t capacity, at::ScalarType dtype, at::ScalarType computes);

// The largest n from 1 to `most` of which bytes(n) is at most `memory`; 0 where there is none. Where bytes(n) falls with n here and
// there, as an allocator's pieces do (three tensors of 7 MiB take 40, of 10 MiB 30), one that fits, and a larger one may, too.
int64_t LargestThatFits(const std::function<double(int64_t)>& bytes, double memory, int64_t most);

}  // namespace kvq
