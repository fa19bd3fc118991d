#include "kernels/rotation.h"

#include <array>

#include "kernels/error.h"
#include "kernels/scheme.h"

namespace kvq {
namespace {

constexpr std::array<float, kMostSigns> kSignsOf = [] {
  std::array<float, kMostSigns> signs{};
  for (int64_t i = 0; i < kMostSigns; ++i) signs[i] = kKeepsSign[i / 64] >> i % 64 & 1 ? 1.0f : -1.0f;
  return signs;
}();

void Hadamard(int64_t block, int64_t dim, float* x) {
  plain::Hadamard(x, static_cast<int>(dim), static_cast<int>(block), plain::Alone{});
}

void Sign(int64_t dim, float* x) {
  for (int64_t i = 0; i < dim; ++i) x[i] *= kSignsOf[i];
}

}  // namespace

void CheckRotation(const Rotation& rotation, int64_t head_dim) {
  if (rotation.block > 0 && head_dim % rotation.block != 0) {
    throw InputError("rotate wants a block that divides head_dim, and ", rotation.block, " does not divide ", head_dim);
  }
  if (rotation.kind == Rotation::kSigns && RotationSigns(head_dim) == nullptr) {
    throw InputError("rotate=signs knows a head_dim of up to ", kMostSigns, ", not ", head_dim);
  }
}

const float* RotationSigns(int64_t head_dim) { return head_dim <= kMostSigns ? kSignsOf.data() : nullptr; }

Turn TurnOf(const Codec& codec, const Rotation& rotation, int64_t head_dim) {
  if (rotation) return {static_cast<int32_t>(rotation.Block(head_dim)), rotation.kind == Rotation::kSigns};
  if (codec.turned) return {static_cast<int32_t>(codec.turn_block > 0 ? codec.turn_block : head_dim)};
  return {};
}

void Rotate(const Rotation& rotation, int64_t head_dim, float* x) {
  if (!rotation) return;
  if (rotation.kind == Rotation::kSigns) Sign(head_dim, x);
  Hadamard(rotation.Block(head_dim), head_dim, x);
}

void Unrotate(const Rotation& rotation, int64_t head_dim, float* x) {
  if (!rotation) return;
  Hadamard(rotation.Block(head_dim), head_dim, x);
  if (rotation.kind == Rotation::kSigns) Sign(head_dim, x);
}

}  // namespace kvq
