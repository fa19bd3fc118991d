// Keys and values as kernels see them, on the CPU and on the GPU: plain data, which device code that is compiled at run
// time reads, too (kernels/runtime/).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvq {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16 };
constexpr int64_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Keys or values of one layer as plain numbers: [batch, heads, tokens, head_dim], channels contiguous,
// the other strides in elements. Pointers are to host memory for the CPU functions of a codec and to
// device memory for their CUDA twins.
struct DenseView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, tokens = 0, head_dim = 0;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};

inline constexpr int kMaxPlanes = 4;

// Encoded keys or values of one layer. Plane p of sequence b and head h starts at
// planes[p] + (b * heads + h) * plane_stride[p] and holds `capacity` tokens, in order: contiguous per
// sequence and head, preallocated. Tokens [i * block_tokens, (i + 1) * block_tokens) were encoded
// together: where a group spans a block, nothing can be read without knowing its borders.
struct KvView {
  int64_t batch = 0, heads = 0, head_dim = 0;
  int64_t capacity = 0;
  int64_t block_tokens = 1;
  std::byte* planes[kMaxPlanes] = {};
  int64_t plane_stride[kMaxPlanes] = {};  // bytes
  // For `encode_cuda` alone: a number in device memory that is added to `first_token`, so that a captured graph finds
  // anew every time where to encode to; nullptr: 0.
  const int32_t* token_base = nullptr;
};

// What a code becomes: what a zero point is taken from.
enum class Zero : uint8_t {
  kOfCodes,   // (code - zero) scale
  kOfValues,  // scale code - zero
};

// What a code is (kernels/plain.h): itself, a small float, an entry of a table.
enum class Element : uint8_t { kNumber, kE4M3, kE5M2, kE2M1, kTable, kBytes };

// What a spec may change about a scheme (`@group=32`).
struct CodecParams {
  int64_t group_size = 0;  // elements that share a scale
};
// Of a scheme that takes no size of groups, all channels.
inline int64_t GroupOf(const CodecParams& params, int64_t head_dim) {
  return params.group_size != 0 ? params.group_size : head_dim;
}

}  // namespace kvq
