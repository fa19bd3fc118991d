// The host's half of product.cuh: which shape of blocks a product gets on a card.
#include "kernels/device/product.cuh"

#include <algorithm>
#include <stdexcept>

#include "kernels/error.h"
#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

using namespace step;

// Blocks of eight warps, two a multiprocessor, where x is small; of sixteen where it is not.
struct Shape {
  int warps, stages, blocks_per_sm;
};
constexpr Shape kShapes[] = {{8, 6, 2}, {8, 4, 2}, {16, 4, 1}, {16, 2, 1}};

// Of a small matrix, where kernels wait for each other more than for memory, a multiprocessor gets one of two blocks; beside it is one
// of the next kernel, which fetches its weights while this one works. That takes blocks for which there is no room twice: else two come
// to share a multiprocessor, others have none, and each kernel behind them finds it so. (Where tiles are few, as a router's, others have
// none anyway, and blocks are as small as they can be.) On an H200 a step of Qwen3-30B-A3B behind 4k
// tokens takes 2.41 ms for 2.48 (ci/baselines/h200-families); larger matrices are slower so. Returns whether there is to be no room for
// a second one.
bool TakeOneBlock(const ProductArgs& a, ProductPlan& plan) {
  const DeviceShape& device = CurrentDevice();
  const int64_t bytes = a.out * a.in * 2, all_shared = int64_t{device.multiprocessors} * device.shared;
  if (plan.blocks_per_sm != 2 || bytes > all_shared * 4 / 5) return false;
  plan.blocks_per_sm = 1, plan.paced = true;
  if (plan.tiles <= device.multiprocessors && a.in <= 2 * kDeep * kUnit * plan.warps) {
    plan.shared_bytes -= plan.warps * (plan.stages - 3) * kStageBytes, plan.stages = 3;  // each is filled once
    return false;
  }
  return true;
}

// As many of a block's tiles end together as their sums find room.
void HoldSums(const ProductArgs& a, ProductPlan& plan) {
  const DeviceShape& device = CurrentDevice();
  const int64_t room = std::min<int64_t>(device.block_shared, device.shared / plan.blocks_per_sm - 1024);
  const int64_t blocks = int64_t{device.multiprocessors} * plan.blocks_per_sm / plan.splits, bytes = SumBytes(plan.warps, a.rows);
  while (plan.held < kMostHeld && plan.held * blocks < plan.tiles && plan.shared_bytes + plan.held * bytes <= room) {
    plan.shared_bytes += plan.held * bytes, plan.held *= 2;
  }
}

ProductPlan Plan(const ProductArgs& a) {
  ProductPlan plan;
  if (a.rows < 1 || a.rows > 8 || a.in % kUnit != 0 || a.out % kTileRows != 0 || a.in > (1 << 24) ||
      a.out > (1 << 22) || reinterpret_cast<uintptr_t>(a.weight) % 16 != 0) {
    return plan;
  }
  if (a.normalizes && (a.rows > 1 || a.in > kMostNormHeld * 8 * 8 * 32 || a.end == ProductEnd::kPartial ||
                       a.norm.shift != nullptr)) {
    return plan;
  }
  if (a.end == ProductEnd::kGate) {
    if (a.gate.size % 4 != 0 || a.out != 2 * a.gate.size) return plan;
    plan.apart = static_cast<int>(a.gate.size);
  }
  if (a.end == ProductEnd::kActivate && a.out != a.gate.size) return plan;
  if (a.end == ProductEnd::kAppend) {
    const HeadsArgs& of = a.append.of;
    if (of.head_dim % 8 != 0 || of.turned % 8 != 0 || of.q_norm != nullptr || of.v_norm != nullptr ||
        a.out != (of.heads + 2 * of.kv_heads) * of.head_dim)
      return plan;
    plan.of_head = static_cast<int>(of.head_dim / 8), plan.turned = of.pairs() / 4;
  }
  plan.tiles = static_cast<int>(a.out / kTileRows);
  const int64_t units = a.in / kUnit;
  for (const Shape& shape : kShapes) {
    if (shape.warps == 8 && a.rows > 2) continue;  // each block keeps its own copy of x
    if (shape.warps == 16 && a.normalizes) continue;
    const int64_t room =
        std::min(CurrentDevice().block_shared, CurrentDevice().shared / shape.blocks_per_sm - 1024);
    for (const int splits :
         {1, 2, 4}) {  // of the columns, where x leaves no room otherwise and somebody adds up
      if (splits > 1 && (a.end != ProductEnd::kPartial || splits > units)) break;
      plan.x_bytes = (units + splits - 1) / splits * kUnit * 2 * a.rows;
      plan.shared_bytes =
          shape.warps * shape.stages * kStageBytes + plan.x_bytes + SumBytes(shape.warps, a.rows);
      if (plan.shared_bytes > room) continue;
      plan.warps = shape.warps, plan.stages = shape.stages,
      plan.blocks_per_sm = shape.blocks_per_sm;
      plan.splits = splits;
      const bool alone = TakeOneBlock(a, plan);
      HoldSums(a, plan);
      if (alone) plan.shared_bytes = std::max<int64_t>(plan.shared_bytes, CurrentDevice().shared / 2);
      return plan;
    }
  }
  return plan;
}

}  // namespace

bool ProductFits(const ProductArgs& args) { return Plan(args).stages > 0; }
int64_t ProductSplits(const ProductArgs& args) { return Plan(args).splits; }

void Product(const ProductArgs& a, void* stream) {
  const ProductPlan plan = Plan(a);
  if (plan.stages == 0) throw std::runtime_error("a product of shapes that ProductFits refuses");
  const int room = CurrentDevice().multiprocessors * plan.blocks_per_sm / plan.splits;
  const int norm_held = a.normalizes ? static_cast<int>((a.in + plan.warps * 32 * 8 - 1) / (plan.warps * 32 * 8)) : 0;
  const bool whole = a.in % (int64_t{kUnit} * kDeep * plan.warps * plan.splits) == 0;
  // Of one row and short ones, which end a tile every second stage.
  const bool holds_x = whole && a.rows == 1 && plan.splits == 1 && a.in == 2 * kUnit * kDeep * plan.warps && a.end != ProductEnd::kPartial;
  const std::string end = StrCat("kvq::ProductEnd(", static_cast<int>(a.end), ")");
  Launch("product",
         {.instance = {{"kernels/device/product.cuh"},
                       InstanceName("kvq::step::ProductKernel", a.dtype == DType::kBFloat16, plan.warps, plan.stages, whole,
                                    holds_x ? 2 : 0, end, norm_held)},
          .grid = static_cast<unsigned>(std::min(room, plan.tiles) * plan.splits),
          .threads = plan.warps * 32,
          .shared_bytes = static_cast<size_t>(plan.shared_bytes)},
         stream, a, plan);
}

}  // namespace kvq
