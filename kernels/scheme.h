// What a scheme is: how a block of keys or values becomes bytes, and the table of all schemes.
// A scheme knows shapes, nothing of models; which tokens are encoded when is a policy's business
// (fixtures/cache/kv_cache.h). Adding one is adding one file kernels/schemes/<scheme>.cc that ends in a row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvq {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16 };
inline int64_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Keys or values of one layer as plain numbers: [batch, heads, tokens, head_dim], channels contiguous,
// the other strides in elements. Pointers are to host memory for the CPU functions of a codec and to
// device memory for their CUDA twins.
struct DenseView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, tokens = 0, head_dim = 0;
  int64_t batch_stride = 0, head_stride = 0, token_stride = 0;
};

// One kind of bytes an encoded block consists of (codes, scales, zero points): `bytes` for every
// `tokens` tokens of one KV head. A shape with a `bytes` that is no whole number is refused.
struct Plane {
  const char* name;
  int64_t bytes;
  int64_t tokens = 1;
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

// What a spec may change about a scheme (`@group=32`).
struct CodecParams {
  int64_t group_size = 0;  // elements that share a scale
};

// How one side (keys or values) is encoded.
struct Codec {
  int bits = 16;                // of a code
  int64_t default_group = 0;    // elements that share a scale; 0: no groups
  const char* grouping = "";    // in words, for tables and --help
  int64_t min_block_tokens = 1; // a block holds a multiple of these
  bool block_wide = false;      // groups span heads and tokens of a block: its size matters

  // The planes of a (heads, head_dim) shape, in the order of KvView::planes. Throws InputError where
  // the shape cannot be encoded, saying why.
  std::vector<Plane> (*planes)(int64_t heads, int64_t head_dim, const CodecParams&) = nullptr;

  // Encodes all tokens of `x` into the slots from first_token on. x.tokens and first_token are
  // multiples of out.block_tokens; every block of every sequence is encoded by itself, so that the
  // bytes do not depend on how many come in one call. Uses all OpenMP threads.
  void (*encode)(const CodecParams&, const DenseView& x, int64_t first_token, const KvView& out) =
      nullptr;

  // Decodes out.tokens tokens from the slots from first_token on, with the same alignment.
  void (*decode)(const CodecParams&, const KvView& in, int64_t first_token, const DenseView& out) =
      nullptr;

  // The CUDA twins: the same bits, on `stream` (a cudaStream_t), asynchronous; null in a CPU-only
  // build. They throw std::runtime_error when a launch fails.
  void (*encode_cuda)(const CodecParams&, const DenseView& x, int64_t first_token,
                      const KvView& out, void* stream) = nullptr;
  void (*decode_cuda)(const CodecParams&, const KvView& in, int64_t first_token,
                      const DenseView& out, void* stream) = nullptr;

  // Error budget: nmse on independent standard-normal values, and where the number comes from.
  double nmse_budget = 0;
  const char* budget_source = "";
};

struct DecodeAttentionArgs;  // kernels/device/attention.h

// A scheme's fused kernel: attention of one new token that reads the codes of keys and values directly.
// Asynchronous, one launch on `stream` (a cudaStream_t).
struct DecodeAttention {
  const char* name = nullptr;  // of the kernel, for results
  // Bytes of workspace for these shapes on the current device; reads no pointer.
  int64_t (*workspace_bytes)(const DecodeAttentionArgs&) = nullptr;
  // Throws InputError for shapes the kernel does not know, std::runtime_error when the launch fails.
  void (*run)(const DecodeAttentionArgs&, void* stream) = nullptr;
};

// A row of the table. `none` is the row without functions: its tokens stay in the model's own type.
struct Scheme {
  std::string name;
  std::string source;   // paper, repository
  Codec keys, values;
  std::string refused;  // not empty: the name is known, it cannot run, and this is why
  // For keys and values both of this scheme; empty where there is none, and in a CPU-only build.
  DecodeAttention decode_attention = {};

  bool stores_dense() const { return keys.encode == nullptr && values.encode == nullptr; }
};

// All rows, sorted by name.
const std::vector<Scheme>& Schemes();

// The row of that name. Throws InputError for an unknown name (listing the known ones) and for a
// refused one (with the reason).
const Scheme& FindScheme(const std::string& name);

// A file-scope `static const RegisterScheme row{...};` adds a row before main().
struct RegisterScheme {
  explicit RegisterScheme(Scheme scheme);
};

// Bytes of `tokens` encoded tokens of one layer's keys or values, all planes, batch sequences.
int64_t EncodedBytes(const Codec&, const CodecParams&, int64_t batch, int64_t heads,
                     int64_t head_dim, int64_t tokens);

}  // namespace kvq
