#include "kernels/device/step.h"

#include <algorithm>

#include "kernels/device/step_kernels.cuh"
#include "kernels/error.h"
#include "kernels/runtime/launch.h"

namespace kvq {

bool AddNormFits(int64_t size) { return size % 8 == 0 ? size <= 16384 : size <= 2048; }
bool HeadsFit(int64_t head_dim) { return head_dim % 4 == 0 && head_dim <= 256; }

namespace {

using namespace step;

// What the kernels take as their first argument: whether numbers are bfloat16.
bool IsBFloat16(DType dtype) {
  if (dtype == DType::kFloat32) throw std::runtime_error("kernels of a step take float16 and bfloat16");
  return dtype == DType::kBFloat16;
}

KernelLaunch KernelOf(const std::string& name, dim3 grid, int threads) {
  return {.instance = {{"kernels/device/step_kernels.cuh"}, name}, .grid = grid, .threads = threads};
}

template <bool kAppend>
void LaunchHeads(const AppendArgs& a, void* qkv, void* stream) {
  const int64_t worked = a.of.rows * (a.of.heads + (kAppend ? 2 : 1) * a.of.kv_heads);
  Launch("heads", KernelOf(InstanceName("kvq::step::HeadsKernel", IsBFloat16(a.of.dtype), kAppend), GridFor(worked, 4), 128),
         stream, a, static_cast<uint16_t*>(qkv));
}

}  // namespace

void AddNorm(const AddNormArgs& a, void* stream) {
  const bool wide = a.size % 8 == 0;
  const int64_t accesses = wide ? a.size / 8 : a.size;
  const int threads = static_cast<int>(std::min<int64_t>((accesses + 31) / 32 * 32, kNormThreads));
  const int held = wide && accesses <= kNormThreads ? 1 : kNormHeld;
  Launch("norm",
         KernelOf(InstanceName("kvq::step::AddNormKernel", IsBFloat16(a.dtype), wide ? 8 : 1, held),
                  static_cast<unsigned>(a.rows), threads),
         stream, a);
}

void TurnHeads(const HeadsArgs& args, void* qkv, void* stream) {
  AppendArgs in_place;
  in_place.of = args;
  LaunchHeads<false>(in_place, qkv, stream);
}

void AppendHeads(const AppendArgs& args, const void* qkv, void* stream) {
  LaunchHeads<true>(args, const_cast<void*>(qkv), stream);
}

void GateUp(const GateArgs& a, const void* up, void* stream) {
  const int wide = a.size % 8 == 0 ? 8 : 1;
  Launch("gate",
         KernelOf(InstanceName("kvq::step::GateKernel", IsBFloat16(a.dtype), wide), GridFor(a.rows * a.size / wide), 256),
         stream, a, up);
}

void MergeAttention(const MergeArgs& a, void* stream) {
  const int64_t threads = a.batch * a.tokens * a.heads * (a.head_dim / 8);
  Launch("merge", KernelOf(InstanceName("kvq::step::MergeKernel", IsBFloat16(a.dtype)), GridFor(threads), 256), stream, a);
}

void StartSteps(const StepState& state, int64_t batch, const int64_t* first, SequenceLength dense,
                SequenceLength append, void* stream) {
  Launch("start", KernelOf("kvq::step::StartKernel", 1, 256), stream, state, static_cast<int>(batch), first, dense, append);
}

void BeginStep(const BeginArgs& a, void* stream) {
  Launch("begin",
         KernelOf(InstanceName("kvq::step::BeginKernel", IsBFloat16(a.dtype)), static_cast<unsigned>(a.batch), kBeginThreads),
         stream, a);
}

void PickTokens(const PickArgs& a, void* stream) {
  Launch("pick",
         KernelOf(InstanceName("kvq::step::PickKernel", IsBFloat16(a.dtype)),
                  dim3(kPickBlocks, static_cast<unsigned>(a.batch)), kPickThreads),
         stream, a);
}

}  // namespace kvq
