// none: keys and values as the model computes them. Bytes: 4 or 2 per element, the model's type.
#include "kernels/scheme.h"

namespace kvq {
namespace {

const RegisterScheme kNone{{.name = "none", .source = "the model itself", .keys = {}, .values = {}, .refused = ""}};

}  // namespace
}  // namespace kvq
