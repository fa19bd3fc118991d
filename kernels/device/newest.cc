#include "kernels/device/newest.h"

#include <algorithm>
#include <cstring>

#include "kernels/error.h"
#include "kernels/plain.h"

namespace kvq {
namespace {

plain::NewestSide SideOf(const NewestToken& token) {
  const Codec& codec = *token.codec;
  if (!EncodesNewest(codec)) throw std::logic_error("EncodeNewest takes plain schemes");
  if (token.x.head_dim > plain::kTile) throw InputError(codec.device.plain, ": a head_dim of ", token.x.head_dim, " is too large for a GPU");
  const int low = codec.bits == 8 ? 8 : codec.bits >= 4 ? 4 : 2;
  return {token.x, token.out, plain::Split(token.x.head_dim, GroupOf(token.params, token.x.head_dim), low), token.turn};
}

}  // namespace

void EncodeNewest(const NewestToken* keys, const NewestToken* values, void* stream) {
  if (keys == nullptr && values == nullptr) return;
  const NewestToken &first = keys != nullptr ? *keys : *values, &second = values != nullptr ? *values : *keys;
  const KernelLaunch launch = {
      .instance = {{first.codec->device.source, second.codec->device.source},
                   InstanceName("kvq::plain::EncodeNewestKernel", first.codec->device.plain, second.codec->device.plain,
                                TypeName(first.x.dtype))},
      .grid = {static_cast<unsigned>(std::max(first.x.heads, second.x.heads)), static_cast<unsigned>(first.x.batch),
               keys != nullptr && values != nullptr ? 2u : 1u},
      .threads = plain::kThreads};
  Launch("the newest token's encoding", launch, stream, SideOf(first), SideOf(second));
}

int64_t NewestSideBytes() { return sizeof(plain::NewestSide); }
void DescribeNewest(const NewestToken& token, std::byte* to) {
  const plain::NewestSide side = SideOf(token);
  std::memcpy(to, &side, sizeof side);
}
void EncodeNewest(const NewestToken& first, const std::byte* sides, int64_t count, void* stream) {
  const KernelLaunch launch = {.instance = {{first.codec->device.source},
                                            InstanceName("kvq::plain::EncodeEachKernel", first.codec->device.plain, TypeName(first.x.dtype))},
                               .grid = {static_cast<unsigned>(first.x.heads), static_cast<unsigned>(first.x.batch), static_cast<unsigned>(count)},
                               .threads = plain::kThreads};
  Launch("windows' encoding", launch, stream, reinterpret_cast<const plain::NewestSide*>(sides));
}

}  // namespace kvq
