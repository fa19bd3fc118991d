#include "kernels/device/step.h"

#include <algorithm>

#include "kernels/device/step_kernels.cuh"
#include "kernels/error.h"
#include "kernels/runtime/launch.h"

namespace kvq {

bool AddNormFits(int64_t size) { return size % 8 == 0 ? size <= 16384 : size <= 2048; }
bool HeadsFit(int64_t head_dim, int64_t turned) { return head_dim % 4 == 0 && head_dim <= 512 && turned % 4 == 0; }

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
  const int steps = a.of.head_dim <= 256 ? 2 : 4;
  Launch("heads",
         KernelOf(InstanceName("kvq::step::HeadsKernel", IsBFloat16(a.of.dtype), kAppend, steps,
                               kAppend && a.of.v_norm != nullptr),
                  GridFor(worked, 4), 128),
         stream, a, static_cast<uint16_t*>(qkv));
}

// A kernel of a norm over the rows of `a`.
KernelLaunch NormOf(const char* name, const AddNormArgs& a) {
  const bool wide = a.size % 8 == 0;
  const int64_t accesses = wide ? a.size / 8 : a.size;
  const int threads = static_cast<int>(std::min<int64_t>((accesses + 31) / 32 * 32, kNormThreads));
  const int held = wide && accesses <= kNormThreads ? 1 : kNormHeld;
  return KernelOf(InstanceName(name, IsBFloat16(a.dtype), wide ? 8 : 1, held), static_cast<unsigned>(a.rows), threads);
}

}  // namespace

void AddNorm(const AddNormArgs& a, void* stream) {
  const char* kernel = a.shift == nullptr ? "kvq::step::AddNormKernel" : "kvq::step::AddLayerNormKernel";
  Launch("norm", NormOf(kernel, a), stream, a);
}

void AddNormed(const AddNormedArgs& a, void* stream) {
  Launch("two norms", NormOf("kvq::step::AddNormedKernel", a.next), stream, a);
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

void Activate(const GateArgs& a, const void* gate, void* stream) {
  const int wide = a.size % 8 == 0 ? 8 : 1;
  Launch("activation",
         KernelOf(InstanceName("kvq::step::ActivateKernel", IsBFloat16(a.dtype), wide), GridFor(a.rows * a.size / wide), 256),
         stream, a, gate);
}

void LayerInputs(const LayerInputsArgs& a, void* stream) {
  if (a.size > kMaxLayerInput) throw std::runtime_error("a layer's input of more elements than the kernel holds");
  Launch("inputs of layers",
         KernelOf(InstanceName("kvq::step::LayerInputsKernel", IsBFloat16(a.dtype)), GridFor(a.batch * a.layers, 4), 128),
         stream, a);
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
         KernelOf(InstanceName("kvq::step::BeginKernel", IsBFloat16(a.dtype), a.positions != nullptr),
                  static_cast<unsigned>(a.batch), kBeginThreads),
         stream, a);
}

void CountSides(const CountArgs& a, void* stream) {
  Launch("count", KernelOf("kvq::step::CountKernel", 1, 32), stream, a);
}

void PickTokens(const PickArgs& a, void* stream) {
  Launch("pick",
         KernelOf(InstanceName("kvq::step::PickKernel", IsBFloat16(a.dtype), a.cap > 0),
                  dim3(kPickBlocks, static_cast<unsigned>(a.batch)), kPickThreads),
         stream, a);
}

}  // namespace kvq
