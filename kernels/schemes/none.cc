// none: keys and values as the model computes them. Bytes: 4 or 2 per element, the model's type.
#include "kernels/device/attention.cuh"
#include "kernels/scheme.h"

namespace kvq {
namespace {

Scheme None() {
  Scheme scheme{.name = "none", .source = "the model itself", .keys = {}, .values = {}, .refused = ""};
#ifdef __CUDACC__
  scheme.decode_attention = decode_attention::Make<16>("fused_decode_16bit");
#endif
  return scheme;
}

const RegisterScheme kNone{None()};

}  // namespace
}  // namespace kvq
