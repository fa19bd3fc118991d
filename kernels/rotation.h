// Orthogonal changes of the channels of one token and KV head, before it is encoded and undone after it is decoded: what
// lies far out in one channel is spread over all. No scheme knows of them; attention over rotated keys rotates the query,
// and over rotated values its output.
//
// Hadamard: H x in blocks of `block` consecutive channels, H[i][j] = (-1)^popcount(i & j) / sqrt(block) (Sylvester's order,
// orthonormal, symmetric, its own inverse). In float32: each channel times 1 / sqrt(block) first, then butterflies (u + v,
// u - v) over 1, 2, 4, ... channels, as llama.cpp does (ggml_compute_forward_fwht_impl).
// Signs: the same of sgn * x; undone by sgn * H x. sgn is one fixed vector of a head_dim, vLLM's of int4_per_token_head
// (2 bernoulli(0.5) - 1 of torch's CPU generator with the seed 0x9E3779B9). vLLM's own matrix is not normalized and what it
// gives is rounded to the model's type; here it is neither.
#pragma once

#include <cstdint>

#include "kernels/turn.h"

namespace kvq {

struct Codec;  // scheme.h

struct Rotation {
  enum Kind : uint8_t { kNone, kHadamard, kSigns };
  Kind kind = kNone;
  int64_t block = 0;  // channels that are mixed, a power of two; 0: the largest that divides head_dim

  explicit operator bool() const { return kind != kNone; }
  bool operator==(const Rotation&) const = default;

  int64_t Block(int64_t head_dim) const { return block > 0 ? block : head_dim & -head_dim; }
};

// Throws InputError where the rotation does not know the head_dim.
void CheckRotation(const Rotation& rotation, int64_t head_dim);

// +1 and -1 of each channel, for Rotation::kSigns; null where there are none for the head_dim.
const float* RotationSigns(int64_t head_dim);

// By which attention turns queries of encoded keys, and back what it gives of encoded values: the rotation, or where there is
// none the scheme's own.
Turn TurnOf(const Codec& codec, const Rotation& rotation, int64_t head_dim);

// One token and head in place, and back.
void Rotate(const Rotation& rotation, int64_t head_dim, float* x);
void Unrotate(const Rotation& rotation, int64_t head_dim, float* x);

}  // namespace kvq
