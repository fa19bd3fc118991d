// The host's half of experts.cuh: which kernel a mixture gets on a card.
#include "kernels/device/experts.cuh"

#include <algorithm>
#include <stdexcept>

#include "kernels/error.h"
#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

using namespace step;

struct ExpertsPlan {
  int warps = 0, groups = 1, stages = 0;  // no stages: none of these
  int64_t blocks = 0, shared_bytes = 0;
};

// For so many rows of x that share what is read: two blocks a multiprocessor, or one of what else fits. None where sizes are no
// multiples of a unit.
ExpertsPlan Plan(const ExpertsArgs& a, int64_t rows, bool down) {
  if (a.hidden % kUnit != 0 || a.size % kUnit != 0 || a.hidden > (1 << 18) || a.size > (1 << 18)) return {};
  constexpr int64_t kStatic = 11 << 10, kColumns = kDeep * kUnit;  // kStatic: of the kernel, the choice
  constexpr int64_t kFewestStages = 4, kMostStages = 6;
  const int64_t tiles = down ? a.hidden / kTileRows : std::min(a.experts, rows * a.per_token) * (a.size / 4);
  const int64_t of_tile = down ? a.per_token * ((a.size + kColumns - 1) / kColumns) : (a.hidden + kColumns - 1) / kColumns;
  if (tiles >= 1 << 20) return {};  // Quotient
  const int64_t stage_bytes = ExpertStageBytes(static_cast<int>(rows));
  for (const int64_t blocks_per_sm : {2, 1}) {
    const int64_t room = std::min<int64_t>(CurrentDevice().block_shared, CurrentDevice().shared / blocks_per_sm - 1024) - kStatic;
    const int64_t blocks = std::min(CurrentDevice().multiprocessors * blocks_per_sm, tiles);
    const int64_t of_block = (tiles + blocks - 1) / blocks;
    for (const int64_t most : {8, 4}) {  // warps
      // As many groups as make the last round full, and of these the most.
      int64_t groups = 1, members = 0, slots = 0;
      for (int64_t some = 1; some <= most; ++some) {
        const int64_t taken = (of_block + some - 1) / some * some;
        if (slots > 0 && taken > slots) continue;
        groups = some, members = std::min(most / some, of_tile), slots = taken;
      }
      const int64_t warps = groups * members, sums = SumBytes(static_cast<int>(warps), rows);
      const int64_t stages = std::min((room - sums) / (warps * stage_bytes), kMostStages);
      const int64_t bytes = std::max(warps * stages * stage_bytes + sums,
                                     ChoiceBytes(static_cast<int>(rows), static_cast<int>(a.experts), static_cast<int>(a.per_token)));
      if (stages < kFewestStages || bytes > room) continue;
      return {static_cast<int>(warps), static_cast<int>(groups), static_cast<int>(stages), blocks, bytes};
    }
  }
  return {};
}

void LaunchExperts(const ExpertsArgs& a, bool down, void* stream) {
  if (!ExpertsFit(a)) throw std::runtime_error("experts that ExpertsFit refuses");
  if (a.dtype == DType::kFloat32) throw std::runtime_error("kernels of a step take float16 and bfloat16");
  const bool bfloat16 = a.dtype == DType::kBFloat16;
  const std::vector<std::string> sources = {"kernels/device/experts.cuh"};
  const int64_t together = std::min<int64_t>(a.rows, kExpertRows);
  // Both or none, as the second takes over from the first.
  if (Plan(a, together, false).stages == 0 || Plan(a, together, true).stages == 0) {
    const int64_t outs = down ? a.hidden : a.per_token * a.size;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((outs + 7) / 8, 8 * CurrentDevice().multiprocessors));
    Launch("experts", {.instance = {sources, InstanceName("kvq::step::AnyExpertsKernel", bfloat16, down)},
                       .grid = dim3(blocks, static_cast<unsigned>(a.rows)), .threads = 256},
           stream, a);
    return;
  }
  for (int64_t row = 0; row < a.rows; row += kExpertRows) {
    const ExpertsPlan plan = Plan(a, std::min(a.rows - row, together), down);
    const bool whole = (down ? a.size : a.hidden) % (kUnit * kDeep) == 0;
    Launch("experts", {.instance = {sources, InstanceName("kvq::step::ExpertsKernel", bfloat16, plan.stages, whole, down)},
                       .grid = static_cast<unsigned>(plan.blocks),
                       .threads = plan.warps * 32, .shared_bytes = static_cast<size_t>(plan.shared_bytes)},
           stream, a, row, plan.groups);
  }
}

}  // namespace

bool ExpertsFit(const ExpertsArgs& a) {
  return a.experts >= 1 && a.experts <= kMostExperts && a.per_token >= 1 && a.per_token <= std::min<int64_t>(kMostPerToken, a.experts);
}

void ExpertsUp(const ExpertsArgs& args, void* stream) { LaunchExperts(args, /*down=*/false, stream); }
void ExpertsDown(const ExpertsArgs& args, void* stream) { LaunchExperts(args, /*down=*/true, stream); }

}  // namespace kvq
