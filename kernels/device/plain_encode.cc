#include "kernels/plain.h"

#include <algorithm>

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
  // Of a block, which is one warp, 32 tokens; sixteen of all, where all blocks run together, else of the last three a multiprocessor.
  // 20 of a multiprocessor run together: EncodeTurnedKernel's bounds. A launch takes up to two million tokens, the grid's height.
  const int64_t tiles = GridFor(x.tokens, 32), of_tokens = x.heads * x.batch;
  const int64_t together = int64_t{20} * CurrentDevice().multiprocessors, last = int64_t{3} * CurrentDevice().multiprocessors;
  const int64_t halved = tiles * of_tokens <= together ? tiles : std::min(tiles, last / of_tokens);
  return {.instance = {{file}, InstanceName("kvq::plain::EncodeTurnedKernel", scheme, TypeName(x.dtype), x.head_dim)},
          .grid = {static_cast<unsigned>(x.heads), static_cast<unsigned>(tiles + halved), static_cast<unsigned>(x.batch)},
          .threads = 32};
}

}  // namespace kvq::plain
