// none: keys and values as the model computes them. Bytes: 4 or 2 per element, the model's type.
#include "kernels/scheme.h"

namespace kvq {
namespace {

Codec Dense() {
  Codec codec;
  codec.device = {.label = "16bit", .type = [](const CodecParams&, int64_t) -> std::string { return "kvq::Dense16"; }};
  return codec;
}

const RegisterScheme kNone{
    {.name = "none", .source = "the model itself", .keys = Dense(), .values = Dense(), .refused = ""}};

}  // namespace
}  // namespace kvq
