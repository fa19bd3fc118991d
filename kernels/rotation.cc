#include "kernels/rotation.h"

#include <array>
#include <cmath>

#include "kernels/error.h"

namespace kvq {
namespace {

constexpr int64_t kMostSigns = 512;

// Bit i of the words says whether channel i keeps its sign. A shorter vector of that generator is a longer one's beginning.
constexpr uint64_t kKeepsSign[kMostSigns / 64] = {0x808035b16573590d, 0x6b7f5438a6443d6c, 0xabafc4414aa48b81, 0xfa2043a0320b9848,
                                                  0xa8a9c7cb4d6e1c33, 0x9803b3591b951dda, 0xcd26200e3038796e, 0x8a9dacb9c9a02476};
constexpr std::array<float, kMostSigns> kSignsOf = [] {
  std::array<float, kMostSigns> signs{};
  for (int64_t i = 0; i < kMostSigns; ++i) signs[i] = kKeepsSign[i / 64] >> i % 64 & 1 ? 1.0f : -1.0f;
  return signs;
}();

void Hadamard(int64_t block, int64_t dim, float* x) {
  const float factor = 1 / std::sqrt(static_cast<float>(block));
  for (int64_t i = 0; i < dim; ++i) x[i] *= factor;
  for (int64_t h = 1; h < block; h *= 2) {
    for (int64_t first = 0; first < dim; first += 2 * h) {
      for (int64_t i = first; i < first + h; ++i) {
        const float u = x[i], v = x[i + h];
        x[i] = u + v, x[i + h] = u - v;
      }
    }
  }
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
