// What the tests of codecs share: inputs, round trips, and encoded tokens taken apart.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <utility>
#include <vector>

#include "accuracy/golden.h"
#include "fixtures/cache/codec_tensors.h"

namespace kvq {

inline constexpr CodecParams k64{.group_size = 64};

struct Case {
  int64_t heads, tokens, head_dim, block;
};

// Encoded tokens taken apart again: packed codes, and two planes of fp16 numbers for the groups, as hqq.cc and
// quanto.cc document them.
struct Plain {
  std::vector<int> codes;               // by head, token, channel
  std::vector<uint16_t> scales, zeros;  // planes 1 and 2, by block, then slot
};

inline at::Tensor Input(const std::vector<float>& values, const Case& c, int64_t batch = 1) {
  return at::tensor(values).view({batch, c.heads, c.tokens, c.head_dim});
}

inline EncodedTensors Encode(const Codec& codec, const CodecParams& params, const at::Tensor& x, int64_t block) {
  EncodedTensors encoded = AllocateEncoded(codec, params, x.size(0), x.size(1), x.size(3), x.size(2),
                                           block, x.device());
  for (at::Tensor& plane : encoded.planes) plane.fill_(0xA5);  // what is not written shows
  EncodeTensor(codec, params, x, 0, encoded);
  return encoded;
}

inline at::Tensor RoundTrip(const Codec& codec, const CodecParams& params, const at::Tensor& x, int64_t block) {
  at::Tensor out = at::full(x.sizes(), NAN, x.options());
  DecodeTensor(codec, params, Encode(codec, params, x, block), 0, out);
  return out;
}

// Where the code of channel d is in a token's row: the byte and the lowest bit in it.
using CodePlace = std::pair<int64_t, int64_t> (*)(int64_t d, int64_t head_dim, int bits, int64_t group);

// In chunks of words, see code_row.h.
inline std::pair<int64_t, int64_t> PlaceInRow(int64_t d, int64_t head_dim, int bits, int64_t /*group*/) {
  const int64_t step = d / 16, half = d % 16 / 8, chunk = d % 8 / 2, side = d % 2;
  const int64_t word_steps = 8 / bits, words = head_dim * bits / 128;
  const int64_t bit = 16 * side + (step % word_steps * 2 + half) * bits;
  return {(chunk * words + step / word_steps) * 4 + bit / 8, bit % 8};
}

inline Plain TakeApart(const EncodedTensors& encoded, int bits, int64_t group, CodePlace place) {
  Plain plain;
  const KvView view = encoded.view();
  for (int64_t h = 0; h < view.heads; ++h) {
    for (int64_t t = 0; t < view.capacity; ++t) {
      for (int64_t d = 0; d < view.head_dim; ++d) {
        const auto* row = reinterpret_cast<const uint8_t*>(view.planes[0]) + h * view.plane_stride[0] +
                          t * view.head_dim * bits / 8;
        const auto [byte, bit] = place(d, view.head_dim, bits, group);
        plain.codes.push_back(row[byte] >> bit & ((1 << bits) - 1));
      }
    }
  }
  const int64_t per_token = view.head_dim / group;
  for (int64_t first = 0; first < view.capacity; first += view.block_tokens) {
    for (int64_t h = 0; h < view.heads; ++h) {
      for (int64_t i = 0; i < view.block_tokens * per_token; ++i) {
        const auto at = [&](int plane) {
          return reinterpret_cast<const uint16_t*>(view.planes[plane] + h * view.plane_stride[plane])
              [first * per_token + i];
        };
        plain.scales.push_back(at(1));
        plain.zeros.push_back(at(2));
      }
    }
  }
  return plain;
}

}  // namespace kvq
