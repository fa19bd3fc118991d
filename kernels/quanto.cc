// Specs of the reference study that its library parses and then refuses (transformers,
// cache_utils.py, QuantoQuantizedLayer): known by name, so that the reason can be given.
#include "kernels/scheme.h"

namespace kvq {
namespace {

Scheme Refused(const char* name, const char* why) {
  return {.name = name, .source = "huggingface/optimum-quanto", .keys = {}, .values = {}, .refused = why};
}

constexpr char kBits[] = "quanto's KV cache has 2 and 4 bits only";
constexpr char kAxis[] = "quanto's KV cache groups along axis 0 or -1 only, kivi wants 0 and 1";

const RegisterScheme kInt8{Refused("int8-quanto", kBits)};
const RegisterScheme kInt8Kivi{Refused("int8-quanto-kivi", kBits)};
const RegisterScheme kInt4Kivi{Refused("int4-quanto-kivi", kAxis)};
const RegisterScheme kInt2Kivi{Refused("int2-quanto-kivi", kAxis)};

}  // namespace
}  // namespace kvq
