// Which tokens of one side of a cache, keys or values, are encoded when: a policy's arithmetic (fixtures/cache/kv_cache.h says
// what they are), for whoever counts, on the CPU and on the GPU.
#pragma once

#include "kernels/device/attention.h"
#include "kernels/vector_math.h"

namespace kvq {

struct SideCount {
  int64_t sinks = 0, residual_length = 0;
  bool kivi = false;    // policy kivi; else append
  bool slides = false;  // and of it the values: a window from which they leave one by one
  int64_t ring = 0;     // places of the newest tokens, the only ones that are kept, all encoded or all dense; 0: all are kept

  // Whether a step encodes its own token.
  KVQ_HD bool encodes_each() const { return !kivi && residual_length == 0; }
  // Of a window, of which token t has the slot t mod them: one more than it has tokens, since the newest is stored before the
  // oldest is encoded.
  KVQ_HD int64_t slots() const { return residual_length + 1; }

  // After `length` tokens.
  KVQ_HD int64_t Encoded(int64_t length) const {
    const int64_t behind = length - sinks;
    if (behind <= 0) return 0;
    if (slides) return behind > residual_length ? behind - residual_length : 0;
    if (kivi) return behind / residual_length * residual_length;
    return residual_length == 0 ? behind : (behind - 1) / residual_length * residual_length;
  }
  KVQ_HD SequenceLength At(int64_t length) const {
    const int64_t first = length < sinks ? length : sinks, encoded = Encoded(length);
    return {static_cast<int32_t>(first), static_cast<int32_t>(encoded), static_cast<int32_t>(length - first - encoded)};
  }
  // During the step that brings token number `after`: what attention reads, and where the token goes, number `residual` of the
  // dense ones.
  KVQ_HD SequenceLength Read(int64_t after) const {
    if (ring > 0) return {0, static_cast<int32_t>(after < ring ? after : ring), 0};
    if (!kivi) return At(after);
    SequenceLength read = At(after - 1);  // what is stored before, and the step's own
    ++read.residual;
    return read;
  }
  KVQ_HD SequenceLength To(int64_t after) const {
    if (ring > 0) {  // of dense ones it is the last of so many
      const int32_t place = static_cast<int32_t>((after - 1) % ring);
      return encodes_each() ? SequenceLength{0, place, 1} : SequenceLength{0, place + 1, 0};
    }
    SequenceLength to = Read(after);
    if (encodes_each()) {
      const int32_t first = to.sinks;
      to = At(after - 1), to.sinks = first, to.residual = after > sinks ? 1 : 0;
    } else if (slides) {
      to.residual = static_cast<int32_t>((after - 1) % slots() + 1);
    }
    return to;
  }
};

}  // namespace kvq
