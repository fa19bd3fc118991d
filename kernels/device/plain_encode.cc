#include "kernels/plain.h"

namespace kvq::plain {

// Of head_dims that instances are worth compiling for: 16-bit numbers and rows of codes aligned to 16 bytes (of odd bits to 4).
bool EncodesOwn(const DenseView& x, int64_t group, const KvView& out, bool odd) {
  const auto aligned = [&](int plane, uint64_t bytes) {
    return (reinterpret_cast<uintptr_t>(out.planes[plane]) | static_cast<uint64_t>(out.plane_stride[plane])) % bytes == 0;
  };
  return (x.head_dim == 64 || x.head_dim == 128) && (group & (group - 1)) == 0 && x.dtype != DType::kFloat32 && IsWide(x) &&
         aligned(0, 16) && (!odd || aligned(1, 4));
}

KernelLaunch EncodeOwnLaunch(const char* file, const char* scheme, const DenseView& x, int64_t group, int own) {
  const int tokens = kWarps * 32 * own / static_cast<int>(x.head_dim);  // of a block
  return {.instance = {{file}, InstanceName("kvq::plain::EncodeOwnKernel", scheme, TypeName(x.dtype), x.head_dim, group, own)},
          .grid = {GridFor(x.tokens, tokens), static_cast<unsigned>(x.heads), static_cast<unsigned>(x.batch)},
          .threads = 32 * kWarps};
}

KernelLaunch EncodeTurnedLaunch(const char* file, const char* scheme, const DenseView& x) {
  constexpr int kTokens = 32;  // of a block, which is one warp
  return {.instance = {{file}, InstanceName("kvq::plain::EncodeTurnedKernel", scheme, TypeName(x.dtype), x.head_dim)},
          .grid = {GridFor(x.tokens, kTokens), static_cast<unsigned>(x.heads), static_cast<unsigned>(x.batch)},
          .threads = 32};
}

}  // namespace kvq::plain
