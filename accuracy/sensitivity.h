// Which part of a cache a spec encodes: what the sensitivity profile varies.
#pragma once

#include <string>

#include "fixtures/cache/spec.h"

namespace kvq {

// `spec` where it encodes layers first to last, of them only the keys, only the values, or both,
// and `none` everywhere else, with the same group, residual, sinks and policy: `int4-hqq@sinks=4`
// of layer 2's keys is `none@sinks=4@layers=2-2:int4-hqq+none`. Empty where nothing would be
// encoded.
std::string PartOfSpec(const Spec& spec, int64_t first, int64_t last, bool keys, bool values);

}  // namespace kvq
