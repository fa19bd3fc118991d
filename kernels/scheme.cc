#include "kernels/scheme.h"

#include <algorithm>

#include "kernels/error.h"

namespace kvq {
namespace {

std::vector<Scheme>& Table() {
  static std::vector<Scheme> table;
  return table;
}

}  // namespace

const std::vector<Scheme>& Schemes() { return Table(); }

RegisterScheme::RegisterScheme(Scheme scheme) {
  // Files register in no particular order; the table is kept sorted.
  const auto at = std::lower_bound(Table().begin(), Table().end(), scheme,
                                   [](const Scheme& a, const Scheme& b) { return a.name < b.name; });
  Table().insert(at, std::move(scheme));
}

const Scheme& FindScheme(const std::string& name) {
  std::string known;
  for (const Scheme& scheme : Schemes()) {
    if (scheme.name == name) {
      if (!scheme.refused.empty()) throw InputError("scheme '", name, "' cannot run: ", scheme.refused);
      return scheme;
    }
    if (scheme.refused.empty()) known += (known.empty() ? "" : ", ") + scheme.name;
  }
  throw InputError("--schemes: no scheme '", name, "'; there are ", known);
}

int64_t EncodedBytes(const Codec& codec, const CodecParams& params, int64_t batch, int64_t heads,
                     int64_t head_dim, int64_t tokens) {
  int64_t per_head = 0;
  for (const Plane& plane : codec.planes(heads, head_dim, params)) {
    per_head += tokens / plane.tokens * plane.bytes;
  }
  return batch * heads * per_head;
}

}  // namespace kvq
