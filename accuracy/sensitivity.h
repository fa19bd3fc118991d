// Which part of a cache a spec encodes: what the sensitivity profile varies.
#pragma once

#include <cstdint>
#include <string>

#include "fixtures/cache/spec.h"

namespace kvq {

// `spec` where it encodes layers first to last, of them only the keys, only the values, or both,
// and `none` everywhere else, with the same other keys: `int4-hqq@sinks=4`
// of layer 2's keys is `none@sinks=4@layers=2-2:int4-hqq+none`. Empty where nothing would be
// encoded. `layers`: how many the cache has, which matters where @dense counts from its end.
std::string PartOfSpec(const Spec& spec, int64_t first, int64_t last, bool keys, bool values, int64_t layers = INT64_MAX);

}  // namespace kvq
