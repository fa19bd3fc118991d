// What a scheme is: how a block of keys or values becomes bytes, and the table of all schemes.
// A scheme knows shapes, nothing of models; which tokens are encoded when is a policy's business
// (fixtures/cache/kv_cache.h). Adding one is adding one file kernels/schemes/<scheme>.cc that ends in a row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/views.h"

namespace kvq {

// One kind of bytes an encoded block consists of (codes, scales, zero points): `bytes` for every
// `tokens` tokens of one KV head. A shape with a `bytes` that is no whole number is refused.
struct Plane {
  const char* name;
  int64_t bytes;
  int64_t tokens = 1;
};

// How device code reads a codec's planes: a struct of kernels/device/codecs.cuh, or of a source of its own.
struct DeviceCodec {
  const char* label = nullptr;  // in the names of kernels, "int4"; null: fused attention cannot read it
  const char* source = "kernels/device/codecs.cuh";
  std::string (*type)(const CodecParams&, int64_t head_dim) = nullptr;  // its name in C++
  bool keys_alone = false;  // it reads keys only
  const char* plain = nullptr;  // of a plain scheme its own name, by which EncodeNewest (device/newest.h) finds it
};

// How attention on the host reads codes that lie as code_row.h says: number = scale element + shift. Or how else.
struct HostCodec {
  // Scales and shifts of `tokens` tokens of a head from slot `first` on, [tokens, groups] both.
  void (*lines)(const CodecParams&, const KvView& in, int64_t b, int64_t h, int64_t first, int64_t tokens, float* scales,
                float* shifts) = nullptr;
  Element element = Element::kNumber;                // what a code is
  float (*entry)(int code, int head_dim) = nullptr;  // of 4 and 3 bits, where that is an entry of a table
  bool normed = false;                               // whether a token's elements are divided by their norm
  // Where there are no lines: Codec::decode of a scheme that turns tokens, but for turning them back.
  void (*decode_turned)(const CodecParams&, const KvView& in, int64_t first_token, const DenseView& out) = nullptr;
};

// How one side (keys or values) is encoded.
struct Codec {
  int bits = 16;                // of a code
  int64_t default_group = 0;    // elements that share a scale; 0: all channels of a token, or no scales
  std::span<const int64_t> groups;  // what @group may ask for, the default among them; empty: there is no choice
  int64_t head_dim_multiple = 1;    // a head_dim is a multiple of this and of the group; no other is refused, but where
  std::span<const int64_t> head_dims;  // names the only ones it takes
  std::string grouping;         // in words, for tables and --help
  int64_t min_block_tokens = 1; // a block holds a multiple of these
  bool block_wide = false;      // groups span heads and tokens of a block: its size matters
  bool vector_wide = false;     // groups of a token share more than their own scale: NaN in one may reach all
  bool turned = false;          // a token's numbers are turned (Hadamard) before they are coded: an error of one is spread
  int64_t turn_block = 0;       // where `turned`, in blocks of so many channels, for fused attention; 0: all
  bool typed = false;           // computes in the type of its input, as its source does: bytes depend on the type
  bool one_sign_saturates = false;  // its codes always reach zero: numbers of one sign, far from it, are cut off

  // The planes of a (heads, head_dim) shape, in the order of KvView::planes. Throws InputError where
  // the shape cannot be encoded, saying why.
  std::vector<Plane> (*planes)(int64_t heads, int64_t head_dim, const CodecParams&) = nullptr;

  // Encodes all tokens of `x` into the slots from first_token on. x.tokens and first_token are
  // multiples of out.block_tokens; every block of every sequence is encoded by itself, so that the
  // bytes do not depend on how many come in one call. Every byte of the slots is written, and no other. A NaN decodes to
  // NaN; it and infinity reach no other group. Uses all OpenMP threads.
  void (*encode)(const CodecParams&, const DenseView& x, int64_t first_token, const KvView& out) =
      nullptr;

  // Decodes out.tokens tokens from the slots from first_token on, with the same alignment.
  void (*decode)(const CodecParams&, const KvView& in, int64_t first_token, const DenseView& out) =
      nullptr;

  // The CUDA twins: the same bits, on `stream` (a cudaStream_t), asynchronous. They throw std::runtime_error when a
  // launch fails.
  void (*encode_cuda)(const CodecParams&, const DenseView& x, int64_t first_token,
                      const KvView& out, void* stream) = nullptr;
  void (*decode_cuda)(const CodecParams&, const KvView& in, int64_t first_token,
                      const DenseView& out, void* stream) = nullptr;

  // What fused attention reads it with.
  DeviceCodec device;
  HostCodec host;

  // nmse on independent standard-normal values in the default groups, head_dim 128 (or as near as can be), which the tests
  // hold it to, both ways; by how much it may be off, as a share; and where the number comes from: not this code.
  double nmse = 0, nmse_tolerance = 0.02;
  const char* nmse_source = "";

  // What it is compared with, bit for bit, that we did not write: a file under accuracy/golden/schemes/ (contract.h says
  // what is in it); or why there is none.
  const char* golden = nullptr;
  const char* no_golden = nullptr;
};

// A row of the table. `none` is the row without functions: its tokens stay in the model's own type.
struct Scheme {
  std::string name;
  std::string source;   // paper, repository
  Codec keys, values;
  std::string refused;  // not empty: the name is known, it cannot run, and this is why

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
