// The host's half of latent_attention.cuh: which kernel a pair of codecs gets on a card, and in what tiles.
#include "kernels/device/latent_attention.h"

#include <algorithm>
#include <initializer_list>

#include "kernels/device/latent_attention.cuh"
#include "kernels/error.h"
#include "kernels/runtime/launch.h"
#include "kernels/runtime/tensor_map.h"
#include "kernels/scheme.h"

namespace kvq {
namespace {

using namespace latent_attention;

// Tokens of a tile, tiles in shared memory, blocks on a multiprocessor; and whether a warp of its own asks for tiles, in boxes.
struct Tiling {
  int tokens = 0, stages = 0, blocks = 0;
  bool boxes = false;
};

constexpr int64_t kFewCodes = 1024, kFewNumbers = 2048;  // tokens of a multiprocessor: PlanOf

// What is chosen for a launch.
struct Plan {
  Tiling tiling;
  int head_tiles = 0;         // of sixteen heads, of a block
  int parts = 1, splits = 1;  // of the heads; of a sequence's tokens
  int64_t shared_bytes = 0;
};

int64_t Up(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// Bytes of a tile of one part of a token, as it is stored: Part::kStored.
int64_t StoredBytes(const Codec& codec, const CodecParams& params, int64_t channels, int tokens) {
  if (codec.planes == nullptr) return tokens * NumberStride(static_cast<int>(channels), /*copied=*/true);
  int64_t bytes = 0;
  for (const Plane& plane : codec.planes(1, channels, params)) {
    bytes += (tokens * Stride(static_cast<int>(plane.bytes)) + 15) / 16 * 16;
  }
  return bytes;
}

// Config::kSharedBytes.
int64_t SharedBytes(const Codec& latents, const Codec& rotary_keys, const LatentAttentionArgs& args, int head_tiles,
                    const Tiling& tiling) {
  const int64_t tokens = tiling.tokens, heads = 16 * head_tiles;
  const int rank = static_cast<int>(args.rank), turned = static_cast<int>(args.turned);
  const int64_t stage = Up(StoredBytes(latents, args.latents.params, rank, tiling.tokens)) +
                        Up(StoredBytes(rotary_keys, args.rotary_keys.params, args.turned, tiling.tokens));
  const int64_t numbers = (latents.planes == nullptr ? 0 : Up(tokens * NumberStride(rank))) +
                          (rotary_keys.planes == nullptr ? 0 : Up(tokens * NumberStride(turned)));
  const int64_t queries = heads * QueryStride(rank + Padded(turned), tiling.boxes);
  return tiling.stages * stage + numbers + kShares * heads * (tokens + 8) * 4 + heads * NumberStride(tiling.tokens) +
         Up(heads * 8) + (tiling.boxes ? queries + kBarrierBytes : head_tiles <= 2 ? 0 : queries);
}

// Blocks for each sequence and part of its heads: as many as run at a time, and no more than there are tiles.
int Splits(const LatentAttentionArgs& args, int parts, const Tiling& tiling) {
  const int64_t at_a_time = int64_t{CurrentDevice().multiprocessors} * tiling.blocks;
  const int64_t tiles = args.capacity / tiling.tokens + 1;
  const int64_t each = at_a_time / std::max<int64_t>(args.batch * parts, 1);
  return static_cast<int>(std::clamp<int64_t>(std::min(each, tiles), 1, kMostSplits));
}

Plan PlanOf(const Codec& latents, const Codec& rotary_keys, const LatentAttentionArgs& args) {
  if (args.heads < 1) throw InputError("attention over latents wants query heads");
  if (args.dtype == DType::kFloat32) throw InputError("attention over latents wants float16 or bfloat16");
  if (args.rank % 16 != 0 || args.rank < 16 || args.rank > 512) {
    throw InputError("attention over latents wants a rank that is a multiple of 16 up to 512, not ", args.rank);
  }
  if (args.turned % 8 != 0 || args.turned < 8 || args.turned > 128) {
    throw InputError("attention over latents wants rotary keys of a multiple of 8 channels up to 128, not ", args.turned);
  }
  const bool encodes[2] = {latents.planes != nullptr, rotary_keys.planes != nullptr};
  const int low_bits = latents.bits == 8 ? 8 : latents.bits >= 4 ? 4 : 2;
  const auto two_to = [](int64_t n) { return (n & (n - 1)) == 0; };
  // A warp decodes whole words of codes, a quarter of a latent's.
  if ((encodes[0] || encodes[1]) && (!two_to(args.rank) || args.rank < 64 || args.turned % 64 != 0)) {
    throw InputError("attention over encoded latents or rotary keys wants a rank of 64, 128, 256 or 512 and rotary keys of 64 or ",
                     "128 channels, not ", args.rank, " and ", args.turned);
  }
  if (encodes[0] && args.rank * low_bits % 512 != 0) {
    throw InputError("attention over latents of ", latents.bits, " bits wants a rank that is a multiple of ", 512 / low_bits,
                     ", not ", args.rank);
  }
  // Sixteen heads are one tile of rows. Where a block's registers hold no more accumulators than those of 64, more are dealt to
  // several blocks, whose tokens then come from the L2 cache but once.
  const int64_t room = CurrentDevice().block_shared, of_all = CurrentDevice().shared;
  const int arch = CurrentDevice().arch;
  Plan plan;
  const auto take = [&](int head_tiles, std::initializer_list<Tiling> tilings) {
    for (const Tiling& tiling : tilings) {
      const int64_t bytes = SharedBytes(latents, rotary_keys, args, head_tiles, tiling);
      if (plan.head_tiles > 0 || bytes > room || tiling.blocks * (bytes + 1024) > of_all) continue;
      // Registers are too few then, which EveryCard tells.
      const bool crowded = arch < 90 || (encodes[0] && (arch >= 100 || latents.bits != low_bits));
      if (crowded && tiling.blocks > 1) continue;
      if (arch == 100 && latents.bits == 3 && head_tiles > 2) continue;
      plan.head_tiles = head_tiles, plan.tiling = tiling, plan.shared_bytes = bytes;
    }
  };
  // A block of larger tiles, alone on a multiprocessor, takes longer for a token and less for a launch (beside two there are no registers
  // for one of the next kernel's to wait): on an H200 one sequence of 32k tokens took 23 us instead of 32 in 16 bits, 25 instead of 37
  // in q8_0; eight 79 instead of 84 in 16 bits, but 116 instead of 105 in fp8 (ci/baselines/h200-latents has today's).
  const bool few = args.batch * args.capacity <= (encodes[0] || encodes[1] ? kFewCodes : kFewNumbers) * CurrentDevice().multiprocessors;
  if (args.heads <= 16 && few && arch >= 90) {
    // Boxes are known from a card for these, DeepSeek's and GLM's, alone.
    if (!encodes[0] && !encodes[1] && args.rank == 512 && args.turned == 64) take(1, {{32, 4, 1, /*boxes=*/true}});
    // A third stage, where it leaves room for a block of the second kernel: else the next launch's tiles could not come early.
    constexpr Tiling kThree = {64, 3, 1};
    constexpr int64_t kBeside = 8 << 10;  // what the second kernel has beside (MergeKernel), and 1 KiB that each block takes
    const bool fits = SharedBytes(latents, rotary_keys, args, 1, kThree) + kMergeShared + kBeside <= of_all;
    take(1, {fits ? kThree : Tiling{64, 2, 1}});
  }
  if (args.heads <= 16) take(1, {{32, 3, 2}, {32, 2, 2}, {64, 3, 1}, {64, 2, 1}, {32, 3, 1}, {32, 2, 1}});
  if (args.heads > 32) take(4, {{64, 3, 1}, {64, 2, 1}, {32, 3, 1}, {32, 2, 1}});
  if (args.heads > 16) take(2, {{64, 3, 1}, {64, 2, 1}, {32, 3, 1}, {32, 2, 1}});
  take(1, {{32, 2, 1}});
  if (plan.head_tiles == 0) {
    throw InputError("attention over latents: two tiles of 32 tokens do not fit into ", room, " bytes of shared memory");
  }
  plan.parts = static_cast<int>((args.heads + 16 * plan.head_tiles - 1) / (16 * plan.head_tiles));
  plan.splits = Splits(args, plan.parts, plan.tiling);
  return plan;
}

// Channels that a block of the second kernel adds up: as many as still let its threads ask for all rows at once.
int MergedChannels(int splits) {
  int channels = 256;
  while (channels > 32 && splits > kMergeBatch * kThreads * 4 / channels) channels /= 2;
  return channels;
}

// What the tiles of such a launch, and its queries, are copied by.
TensorMaps MapsOf(const LatentAttentionArgs& args, const Plan& plan) {
  TensorMaps maps;
  if (!plan.tiling.boxes || Gathering()) return maps;
  const auto of_side = [&](const DenseView& view, int64_t channels) {
    return MapRows(view.data, args.batch, view.tokens, channels, view.batch_stride, view.token_stride, plan.tiling.tokens);
  };
  const int64_t channels = args.rank + args.turned;
  return {of_side(args.latents.tokens, args.rank), of_side(args.rotary_keys.tokens, args.turned),
          MapRows(args.queries, args.batch, args.heads, channels, args.heads * channels, channels, 16)};
}

void CheckArgs(const LatentAttentionArgs& args) {
  const auto aligned = [](const void* p, int64_t bytes, int64_t to) {
    return (static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) | bytes) % to == 0;
  };
  bool all = aligned(args.queries, 0, 16) && aligned(args.out, 0, 8) && aligned(args.workspace, 0, 256);
  for (const LatentSide* side : {&args.latents, &args.rotary_keys}) {
    for (int p = 0; p < kMaxPlanes; ++p) all &= aligned(side->codes.planes[p], side->codes.plane_stride[p], 16);
    for (const DenseView* view : {&side->tokens, &side->sinks, &side->residual}) {
      all &= aligned(view->data, (view->batch_stride | view->token_stride) * 2, 16);
    }
  }
  if (!all) throw InputError("attention over latents wants queries, rows and planes aligned to 16 bytes");
}

}  // namespace

bool HasLatentAttention(const Codec& latents, const Codec& rotary_keys) {
  const auto reads = [](const Codec& codec) {
    return codec.device.label != nullptr && !codec.device.keys_alone && !codec.turned && codec.min_block_tokens == 1;
  };
  return reads(latents) && reads(rotary_keys);
}

std::string LatentAttentionName(const Codec& latents, const Codec& rotary_keys, const LatentAttentionArgs& args) {
  const Plan plan = PlanOf(latents, rotary_keys, args);
  const std::string first = latents.device.label, second = rotary_keys.device.label;
  return StrCat("fused_latent_", first, first == second ? "" : "+" + second, " (sm_", CurrentDevice().arch, ": ",
                plan.tiling.blocks, plan.tiling.boxes ? " x 9 warps x " : " x 8 warps x ", plan.tiling.stages, " x ", plan.tiling.tokens, " tokens)");
}

int64_t LatentAttentionWorkspace(const Codec& latents, const Codec& rotary_keys, const LatentAttentionArgs& args) {
  return LayOut(nullptr, args.batch, PlanOf(latents, rotary_keys, args).splits, args.heads, args.rank).bytes;
}

void LatentAttention(const Codec& latents, const Codec& rotary_keys, const LatentAttentionArgs& args, void* stream) {
  CheckArgs(args);
  const Plan plan = PlanOf(latents, rotary_keys, args);
  const bool bfloat16 = args.dtype == DType::kBFloat16;
  const std::string config =
      InstanceName("kvq::latent_attention::Config", latents.device.type(args.latents.params, args.rank),
                   rotary_keys.device.type(args.rotary_keys.params, args.turned), args.rank, args.turned, plan.head_tiles,
                   plan.tiling.tokens, plan.tiling.stages, plan.tiling.blocks, plan.tiling.boxes);
  const Workspace workspace = LayOut(args.workspace, args.batch, plan.splits, args.heads, args.rank);
  Launch("attention over latents",
         {.instance = {{"kernels/device/latent_attention.cuh", latents.device.source, rotary_keys.device.source},
                       InstanceName("kvq::latent_attention::Kernel", config, bfloat16)},
          .grid = static_cast<unsigned>(args.batch * plan.parts * plan.splits),
          .threads = plan.tiling.boxes ? kThreads + 32 : kThreads,
          .shared_bytes = static_cast<size_t>(plan.shared_bytes)},
         stream, args, plan.parts, plan.splits, MapsOf(args, plan), workspace);
  const int merged = MergedChannels(plan.splits);
  const int64_t chunks = (args.rank + merged - 1) / merged;
  Launch("attention over latents",
         {.instance = {{"kernels/device/latent_attention.cuh"},
                       InstanceName("kvq::latent_attention::MergeKernel", args.rank, merged, bfloat16)},
          .grid = static_cast<unsigned>(args.batch * args.heads * chunks),
          .threads = kThreads,
          .shared_bytes = plan.tiling.boxes ? kMergeSharedOfBoxes : kMergeShared},
         stream, args, plan.splits, workspace);
}

}  // namespace kvq
