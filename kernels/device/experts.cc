// The host's half of experts.cuh: which kernel a mixture gets on a card.
#include "kernels/device/experts.cuh"

#include <algorithm>
#include <stdexcept>

#include "kernels/error.h"
#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

using namespace step;

// As product.cc's: blocks of eight warps, two a multiprocessor, or of what else fits. None where sizes are no multiples of a
// unit.
ExpertsPlan Plan(const ExpertsArgs& a) {
  ExpertsPlan plan;
  if (a.hidden % kUnit != 0 || a.size % kUnit != 0 || a.hidden > (1 << 24) || a.size > (1 << 22)) return plan;
  const int64_t rows = std::min<int64_t>(a.rows, kExpertRows);
  for (const auto& [warps, stages, blocks] : {std::tuple(8, 12, 2), std::tuple(8, 8, 2), std::tuple(8, 4, 2), std::tuple(8, 4, 1)}) {
    plan.shared_bytes = warps * stages * kUnitBytes + SumBytes(warps, kExpertRows) + ChoiceBytes(rows, a.experts);
    if (plan.shared_bytes > std::min(CurrentDevice().block_shared, CurrentDevice().shared / blocks - 1024)) continue;
    plan.warps = warps, plan.stages = stages, plan.blocks_per_sm = blocks;
    return plan;
  }
  return plan;
}

void LaunchExperts(const ExpertsArgs& a, bool down, void* stream) {
  if (!ExpertsFit(a)) throw std::runtime_error("experts that ExpertsFit refuses");
  if (a.dtype == DType::kFloat32) throw std::runtime_error("kernels of a step take float16 and bfloat16");
  const bool bfloat16 = a.dtype == DType::kBFloat16;
  const ExpertsPlan plan = Plan(a);
  const int64_t multiprocessors = CurrentDevice().multiprocessors;
  const std::vector<std::string> sources = {"kernels/device/experts.cuh"};
  if (plan.stages == 0) {
    const int64_t outs = down ? a.hidden : a.per_token * a.size;
    const auto blocks = static_cast<unsigned>(std::min((outs + 7) / 8, 8 * multiprocessors));
    Launch("experts", {.instance = {sources, InstanceName("kvq::step::AnyExpertsKernel", bfloat16, down)},
                       .grid = dim3(blocks, static_cast<unsigned>(a.rows)), .threads = 256,
                       .shared_bytes = static_cast<size_t>(ChoiceBytes(1, a.experts))},
           stream, a);
    return;
  }
  for (int64_t row = 0; row < a.rows; row += kExpertRows) {
    const int64_t rows = std::min<int64_t>(a.rows - row, kExpertRows);
    const int64_t tiles = down ? a.hidden / kTileRows : std::min(a.experts, rows * a.per_token) * (a.size / 4);
    Launch("experts", {.instance = {sources, InstanceName("kvq::step::ExpertsKernel", bfloat16, plan.warps, plan.stages, down)},
                       .grid = static_cast<unsigned>(std::min(multiprocessors * plan.blocks_per_sm, tiles)),
                       .threads = plan.warps * 32, .shared_bytes = static_cast<size_t>(plan.shared_bytes)},
           stream, a, row);
  }
}

}  // namespace

bool ExpertsFit(const ExpertsArgs& a) {
  return a.experts >= 1 && a.experts <= kMostExperts && a.per_token >= 1 && a.per_token <= std::min<int64_t>(kMostPerToken, a.experts);
}

void ExpertsUp(const ExpertsArgs& args, void* stream) { LaunchExperts(args, /*down=*/false, stream); }
void ExpertsDown(const ExpertsArgs& args, void* stream) { LaunchExperts(args, /*down=*/true, stream); }

}  // namespace kvq
