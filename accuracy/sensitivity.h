// Which part of a cache a spec encodes: what the sensitivity profile varies.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "fixtures/cache/spec.h"

namespace kvq {

// `spec` where it encodes only those sides of layers that `encodes` names, and `none` everywhere else, with the same other
// keys: `int4-hqq@sinks=4` of layer 2's keys is `none@sinks=4@layers=2-2:int4-hqq+none`. Empty where nothing would be
// encoded. Of a cache of latents `values` are the rotary keys.
std::string PartOfSpec(const Spec& spec, const CacheShape& shape,
                       const std::function<bool(int64_t layer, bool values)>& encodes);

}  // namespace kvq
