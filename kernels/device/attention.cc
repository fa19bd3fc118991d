// The host's half of attention.cuh: which kernel a pair of codecs gets on a card, and in what tiles.
#include "kernels/device/attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/device/attention.cuh"
#include "kernels/error.h"
#include "kernels/runtime/launch.h"
#include "kernels/scheme.h"

namespace kvq {
namespace {

using decode_attention::kMostSplits;
using decode_attention::LayOut;

// What is chosen for a launch.
struct Plan {
  KernelInstance instance;
  std::string tile_text;
  int threads = 0, splits = 1;
  int64_t pairs = 0, heads = 0;  // of the workspace: what a block works on, and its query heads
  int64_t shared_bytes = 0;
  int cluster = 1;
};

// How many of a pair's blocks share its heads in the end. These wait for the others, so all have to run at once; fewer than half of the
// multiprocessors wait, so that there is room for one more such launch on another stream.
constexpr int kMostSharing = 8;
int Combiners(const Plan& plan) {
  const int64_t share = std::min(plan.splits / 2, kMostSharing);
  if (share <= 1 || plan.pairs * plan.splits > CurrentDevice().multiprocessors) return 1;
  const int64_t each = (plan.heads + share - 1) / share, combiners = (plan.heads + each - 1) / each;
  return 2 * plan.pairs * combiners < CurrentDevice().multiprocessors ? static_cast<int>(combiners) : 1;
}

// Whether values have lengths of their own, or a ring.
bool IsApart(const DecodeAttentionArgs& args) { return args.value_lengths != nullptr || args.values_in_ring; }

// Bytes of a tile of so many tokens on one side: whole groups of those that share metadata.
int64_t TileBytes(const Codec& codec, const CodecParams& params, const KvView& view, int tile) {
  if (codec.planes == nullptr) return tile * 2 * view.head_dim;
  int64_t bytes = 0;
  for (const Plane& plane : codec.planes(view.heads, view.head_dim, params)) {
    bytes += plane.bytes * std::max<int64_t>(tile / plane.tokens, 1);
  }
  return bytes;
}

// Head_dims that are read by tiles.
bool HasTiles(int64_t head_dim) { return head_dim == 64 || head_dim == 128 || head_dim == 256; }

int64_t RatioOf(const DecodeAttentionArgs& args) {
  const int64_t heads = args.keys.heads;
  if (heads < 1 || args.query_heads < heads || args.query_heads % heads != 0) {
    throw InputError("decode attention wants a whole number of query heads a KV head, not ", args.query_heads, " for ",
                     heads);
  }
  return args.query_heads / heads;
}

// Tokens that a launch may have to read.
int64_t TokensInSight(const DecodeAttentionArgs& args) {
  const int64_t all = IsApart(args) ? std::max(args.keys.capacity, args.values.capacity) : args.keys.capacity;
  return args.window > 0 ? std::min<int64_t>(all, args.window) : all;
}

// Blocks for each KV head of a sequence: as few rounds of the whole GPU as possible, and no more than the tokens
// can feed. A round costs what starting, ending and combining take, about 4 us on an H200, besides its bytes.
int Splits(int64_t all_pairs, int64_t tokens, int tile, int warps, int64_t tile_bytes) {
  const double multiprocessors = CurrentDevice().multiprocessors;
  const double pairs = static_cast<double>(all_pairs);
  const int64_t tiles = tokens / tile + 1;
  const double round = 4e-6 * 4.6e12 / multiprocessors / static_cast<double>(tile_bytes);  // in tiles at the memory's rate
  const int most = static_cast<int>(std::clamp<int64_t>(tiles / warps, 1, kMostSplits));
  int best = 1;
  double least = 1e30;
  for (int splits = 1; splits <= most; ++splits) {
    const double rounds = std::ceil(pairs * splits / multiprocessors);
    const double cost = rounds * (static_cast<double>(tiles) / splits + round);
    if (cost < least * 0.999) best = splits, least = cost;
  }
  return best;
}

// One block an SM, its shared memory rings of three tiles a warp, where that much is there. Latency times bandwidth is
// 40 KB an SM; with some 110 KB in flight a call is fastest, with twice that warps get their data so unevenly that the
// last one is late (seen on an H200).
Plan PlanTiles(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args, int64_t ratio) {
  constexpr int64_t kInFlight = 112 << 10, kStatic = 512;
  const int64_t dim = args.keys.head_dim, room = CurrentDevice().block_shared - kStatic;
  const auto up = [](int64_t bytes) { return (bytes + 127) / 128 * 128; };
  const auto tile_bytes = [&](int tile) {
    return up(TileBytes(keys, args.key_params, args.keys, tile) + TileBytes(values, args.value_params, args.values, tile));
  };
  const bool dense = keys.planes == nullptr || values.planes == nullptr;
  // Eight query heads share what a block reads, or sixteen where registers hold so many; more are dealt to several blocks.
  const int most_heads = dim == 64 || (dim == 128 && keys.planes == nullptr && values.planes == nullptr) ? 16 : 8;
  const bool turns_keys = args.key_turn.block > 0, turns_values = args.value_turn.block > 0;
  int64_t parts = 1;
  while (ratio % parts != 0 || ratio / parts > most_heads) ++parts;
  const int head_tiles = ratio / parts <= 8 ? 1 : 2;
  const auto merge_bytes = [&](int warps) { return 8 * head_tiles * (warps * (dim + 4 + 2) * 4 + 8); };
  const bool shelf = values.planes != nullptr && (dim > 128 || head_tiles > 1);  // Config::kShelf
  const int64_t queries_bytes = 8 * head_tiles * (turns_keys ? dim : dim / 2) * 4 + (args.made_of != nullptr ? 2 * dim * 2 : 0);
  const auto shared_bytes = [&](int warps, int stages, int tile) {
    return std::max<int64_t>(warps * stages * tile_bytes(tile), up(merge_bytes(warps))) +
           (shelf ? warps * 8 * head_tiles * dim * 4 : 0) + queries_bytes;
  };
  int warps = 0, stages = 0;
  for (const auto& [with_warps, with_stages] : {std::pair(8, 3), std::pair(4, 3), std::pair(4, 2), std::pair(2, 3), std::pair(2, 2)}) {
    if (shared_bytes(with_warps, with_stages, 16) > room) continue;
    warps = with_warps, stages = with_stages;
    break;
  }
  if (warps == 0) throw InputError("decode attention: tiles of ", tile_bytes(16), " bytes do not fit into ", room, " bytes of shared memory");
  const auto groups = [&](const Codec& codec, const CodecParams& params) {
    return codec.planes == nullptr ? 0 : params.group_size == 0 || codec.min_block_tokens > 1 ? 1 : dim / params.group_size;
  };
  const int64_t key_groups = groups(keys, args.key_params), value_groups = groups(values, args.value_params);
  // Each group of a token wants registers; where tokens share a channel's scale, a tile wants as many as share it.
  const bool narrow = std::max(key_groups, value_groups) > 2 && !(keys.min_block_tokens > 1 && value_groups <= 4);
  const int tile =
      !dense && !narrow && warps * stages * tile_bytes(32) <= kInFlight && shared_bytes(warps, stages, 32) <= room ? 32 : 16;
  // What leaves 64 registers a thread for a block of the product that follows, which then fetches its weights meanwhile. Where it would
  // be too few for the kernel, which EveryCard tells, it gets what there is.
  const bool few = warps == 8 && head_tiles == 1 && parts == 1 && dim <= 128 && value_groups * values.bits <= 16 &&
                   !keys.device.keys_alone;
  const int registers = few ? 192 : 255;
  Plan plan;
  plan.pairs = args.keys.batch * args.keys.heads * parts, plan.heads = ratio / parts;
  plan.splits = Splits(plan.pairs, TokensInSight(args), tile, warps, tile_bytes(tile));
  // Up to eight blocks that have little to do are one cluster, where a third of the multiprocessors or more work then: they read as
  // fast, and the product that follows fetches its weights on the others. On an H200 a step of Mistral-7B behind 4k tokens gains 1 to
  // 2 % by it; behind 8k it loses 2 % in 16 bits and 1 in iq4_nl, and gains 1 in q8_0. The card takes 15 clusters of eight at once, so
  // that sixteen would be two rounds: 120 of its 132 multiprocessors, and seven eighths are taken at most.
  constexpr int64_t kMostTokens = 576, kMostBytes = 512 << 10;  // of a block
  const int64_t blocks = std::min(plan.splits, decode_attention::kMostCluster), tokens = TokensInSight(args);
  const int64_t busy = plan.pairs * blocks, all = CurrentDevice().multiprocessors;
  const bool clusters = CurrentDevice().arch >= 90 && blocks > 1 && 3 * busy >= all && 8 * busy <= 7 * all;
  if (clusters && tokens <= blocks * kMostTokens && tokens * tile_bytes(tile) / tile <= blocks * kMostBytes) {
    plan.splits = plan.cluster = static_cast<int>(blocks);
  }
  const bool asks_first = args.made_of != nullptr && args.window == 0 && TokensInSight(args) > 2 * plan.splits * warps * tile;
  plan.instance = {{"kernels/device/attention.cuh", keys.device.source, values.device.source},
                   InstanceName("kvq::decode_attention::Kernel",
                                InstanceName("kvq::decode_attention::Config", keys.device.type(args.key_params, dim),
                                             values.device.type(args.value_params, dim), dim, parts, head_tiles, warps, stages,
                                             tile, registers, plan.cluster, args.window > 0,
                                             turns_keys + 2 * turns_values + 4 * IsApart(args) + 8 * (args.softcap > 0) +
                                                 16 * (args.newest_keys != nullptr) + 32 * (args.newest_values != nullptr) + 64 * (args.dtype == DType::kBFloat16) +
                                                 128 * (args.made_of != nullptr) + 256 * asks_first))};
  plan.tile_text = StrCat(warps, " warps x ", stages, " x ", tile, " tokens");
  plan.threads = 32 * warps;
  plan.shared_bytes = shared_bytes(warps, stages, tile);
  // A cluster's blocks each have a multiprocessor of their own. Two of codes would find room on one, and then all wait for these
  // (ci/baselines/h200-encode, read_once).
  if (plan.cluster > 1) plan.shared_bytes = std::max<int64_t>(plan.shared_bytes, CurrentDevice().shared / 2);
  return plan;
}

// One token a warp at a time, where there are no tiles.
Plan PlanAny(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args, int64_t ratio) {
  constexpr int kWarps = 4, kBlocksPerSm = 4;
  const int64_t dim = args.keys.head_dim;
  int heads = dim <= 128 ? 4 : 2;
  while (ratio % heads != 0) --heads;
  Plan plan;
  plan.instance = {{"kernels/device/attention_any.cuh", keys.device.source, values.device.source},
                   InstanceName("kvq::decode_attention::AnyKernel",
                                InstanceName("kvq::decode_attention::AnyConfig", keys.device.type(args.key_params, dim),
                                             values.device.type(args.value_params, dim), dim, heads),
                                args.dtype == DType::kBFloat16)};
  plan.tile_text = StrCat(kWarps, " warps, token by token");
  plan.threads = 32 * kWarps;
  plan.pairs = args.keys.batch * args.query_heads / heads, plan.heads = heads;
  const int64_t wanted = CurrentDevice().multiprocessors * kBlocksPerSm / std::max<int64_t>(plan.pairs, 1);
  plan.splits = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::clamp<int64_t>(TokensInSight(args) / 64, 1, kMostSplits)));
  return plan;
}

Plan PlanOf(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args) {
  const int64_t dim = args.keys.head_dim, ratio = RatioOf(args);
  if (HasTiles(dim)) return PlanTiles(keys, values, args, ratio);
  if (args.key_turn.block > 0 || args.value_turn.block > 0) {
    throw InputError("decode attention turns keys and values with head_dims of 64, 128 and 256, not ", dim);
  }
  if (IsApart(args) || keys.min_block_tokens > 1) {
    throw InputError("decode attention reads groups of tokens, and unlike lengths of keys and values, with head_dims of 64, 128 and 256, not ",
                     dim);
  }
  if (dim % 8 != 0 || dim > 512) {
    throw InputError("decode attention wants a head_dim that is a multiple of 8 up to 512, not ", dim);
  }
  return PlanAny(keys, values, args, ratio);
}

void CheckArgs(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args) {
  if (args.dtype == DType::kFloat32) throw InputError("decode attention wants float16 or bfloat16");
  const auto aligned = [](const void* p, int64_t bytes) { return (reinterpret_cast<uintptr_t>(p) | bytes) % 16 == 0; };
  bool all = aligned(args.queries, 0) && aligned(args.out, 0) && aligned(args.workspace, 0);
  for (const auto& [codec, view] : {std::pair(&keys, &args.keys), std::pair(&values, &args.values)}) {
    for (int p = 0; p < kMaxPlanes; ++p) all &= aligned(view->planes[p], view->plane_stride[p]);
  }
  for (const DenseView* view : {&args.sink_keys, &args.sink_values, &args.residual_keys, &args.residual_values}) {
    all &= aligned(view->data, (view->batch_stride | view->head_stride | view->token_stride) * 2);
  }
  all &= aligned(args.newest_keys, 0) && aligned(args.newest_values, 0) && aligned(args.made_of, 0);
  if (!all) throw InputError("decode attention wants all rows and planes aligned to 16 bytes");
  for (const auto& [codec, newest] : {std::pair(&keys, args.newest_keys), std::pair(&values, args.newest_values)}) {
    if (newest == nullptr) continue;
    if (!DecodeAttentionEncodes(*codec, args.keys.head_dim) || IsApart(args) || !args.newest_is_encoded) {
      throw std::logic_error("decode attention cannot encode the newest token");
    }
  }
  const HeadsArgs& of = args.heads;
  if (args.made_of != nullptr && (!DecodeAttentionMakesHeads(keys, values, args.keys.head_dim) || IsApart(args) ||
                                  of.heads != args.query_heads || of.kv_heads != args.keys.heads || of.head_dim != args.keys.head_dim)) {
    throw std::logic_error("decode attention cannot make these heads");
  }
}

}  // namespace

bool HasDecodeAttention(const Codec& keys, const Codec& values) {
  return keys.device.label != nullptr && values.device.label != nullptr && !values.device.keys_alone;
}

bool DecodeAttentionEncodes(const Codec& codec, int64_t head_dim) { return codec.device.plain != nullptr && HasTiles(head_dim); }

bool DecodeAttentionMakesHeads(const Codec& keys, const Codec& values, int64_t head_dim) {
  return keys.planes == nullptr && values.planes == nullptr && HasTiles(head_dim);
}

std::string DecodeAttentionName(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args) {
  const std::string k = keys.device.label, v = values.device.label;
  return StrCat("fused_decode_", k, k == v ? "" : "+" + v, " (sm_", CurrentDevice().arch, ": ",
                PlanOf(keys, values, args).tile_text, ")");
}

int64_t DecodeAttentionWorkspace(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args) {
  const Plan plan = PlanOf(keys, values, args);
  return plan.pairs > 0 ? LayOut(nullptr, plan.pairs, plan.splits, plan.heads, args.keys.head_dim).bytes : 0;
}

void DecodeAttention(const Codec& keys, const Codec& values, const DecodeAttentionArgs& args, void* stream) {
  CheckArgs(keys, values, args);
  const Plan plan = PlanOf(keys, values, args);
  Launch("decode attention",
         {.instance = plan.instance,
          .grid = static_cast<unsigned>(plan.pairs * plan.splits),
          .threads = plan.threads,
          .shared_bytes = static_cast<size_t>(plan.shared_bytes),
          .cluster = plan.cluster},
         stream, args, plan.splits, Combiners(plan));
}

}  // namespace kvq
