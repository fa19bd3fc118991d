// What a decoder does between its products and attention, and the products of a decoding step, as
// CUDA kernels. Asynchronous on `stream` (a cudaStream_t), fit for captured graphs: what changes
// from step to step is in device memory. They round where fixtures/decoder.cc rounds.
//
// A decoding step reads every weight once: its limit is those bytes over memory bandwidth. So
// nothing may keep the memory idle between two products: where the GPU can (sm_90) all kernels here
// are launched before their predecessor has finished (programmatic dependent launch), and a product
// fetches weights, which depend on nothing, until shared memory is full before it waits for its
// input.
//
// All functions throw std::runtime_error when a launch fails. dtype is float16 or bfloat16.
#pragma once

#include <cstdint>

#include "kernels/device/attention.h"
#include "kernels/device/heads.h"
#include "kernels/side_count.h"
#include "kernels/vector_math.h"

namespace kvq {

// sum = x + delta, out = norm(sum), row by row. One block a row. Bytes: x, delta and the weight in, sum
// and out out.
inline constexpr int kMaxSplits = 4;
struct AddNormArgs {
  DType dtype = DType::kFloat16;  // of all but partial and weight
  int64_t rows = 0, size = 0;
  const void* x = nullptr;  // [rows, size]
  // What is added: delta [rows, size], or the sum of partial [splits, rows, size]. Without both
  // there is no sum to write.
  const void* delta = nullptr;
  const float* partial = nullptr;
  int64_t splits = 0;             // at most kMaxSplits
  const void* bias = nullptr;     // [size], of delta; or null
  void* sum = nullptr;            // [rows, size]; AddNorm takes x itself, too
  const float* weight = nullptr;  // [size]
  float eps = 0;
  void* out = nullptr;  // [rows, size]
  // [size]. Without it the norm is sum / rms(sum) * weight; with it LayerNorm, (sum - mean(sum)) /
  // deviation(sum) * weight + shift.
  const float* shift = nullptr;
};
void AddNorm(const AddNormArgs& args, void* stream);
// Rows are held in registers: at most 16384 elements, in eights where there are more than 2048.
bool AddNormFits(int64_t size);

// The same where what is added has a norm of its own: sum = (x + norm(delta)) * scale, rounded after each of
// the three, out = norm(sum). Both norms are RMS norms. One launch, a block a row, two reductions.
struct AddNormedArgs {
  AddNormArgs next;                     // with a delta; without weight and out there is no second norm
  const float* delta_weight = nullptr;  // [size]
  float scale = 1;
};
void AddNormed(const AddNormedArgs& args, void* stream);

// Heads of multiples of 4, at most 512.
bool HeadsFit(int64_t head_dim, int64_t turned = 0);

// qkv [rows, heads + 2 kv_heads, head_dim] in place; the bias is in it, values stay as they are.
void TurnHeads(const HeadsArgs& args, void* qkv, void* stream);

// Where the newest token of every sequence goes, in the keys or values of a cache. `lengths` count
// it already.
struct NewToken {
  DenseView sinks, tail;  // tail: the residual, or where `dense` all tokens
  bool dense = false;     // nothing is encoded: the token is number lengths.encoded - 1 of tail
  const SequenceLength* lengths = nullptr;  // [batch]
};

// One token a sequence: queries leave as [batch, heads, head_dim], keys and values into the cache.
struct AppendArgs {
  HeadsArgs of;
  void* queries = nullptr;
  NewToken keys, values;
};
void AppendHeads(const AppendArgs& args, const void* qkv, void* stream);

// GateUp: out = activation(gate) * up of up [rows, gate and up, size]. Activate: out = activation(gate)
// of gate [rows, size], times `factor` where there is one. kClamped (gpt-oss): activation(g) = g sigmoid(1.702 g), where g is at
// most 7, and in place of what it is multiplied by that plus one, which is at most 7 away from 0 before.
enum class Gate : uint8_t { kSilu, kGeluTanh, kClamped };
struct GateArgs {
  DType dtype = DType::kFloat16;
  int64_t rows = 0, size = 0;
  Gate activation = Gate::kSilu;
  const void* bias = nullptr;    // [2, size], of Activate [size]; or null
  void* out = nullptr;           // [rows, size]
  const void* factor = nullptr;  // [rows, size], of Activate; or null
};
void GateUp(const GateArgs& args, const void* up, void* stream);
void Activate(const GateArgs& args, const void* gate, void* stream);

// x W^T for up to eight rows of x on tensor cores, float32 sums in an order that depends on the
// shape alone. What happens to the sums:
enum class ProductEnd : uint8_t {
  kPartial,   // written in float32, for AddNorm
  kStore,     // rounded and written
  kGate,      // GateUp of them
  kAppend,    // AppendHeads of them; without norms
  kActivate,  // Activate of them
};
struct ProductArgs {
  DType dtype = DType::kFloat16;
  int64_t rows = 0;         // of x: 1 to 8
  int64_t in = 0, out = 0;  // the weight's shape is [out, in]
  const void* weight = nullptr;
  const void* x = nullptr;  // [rows, in]
  // x is AddNorm of `norm` instead, of one row and without a shift: norm.out is not written, unless
  // writes_normed, norm.sum is, and is not norm.x. Not with kPartial.
  bool normalizes = false, writes_normed = false;
  AddNormArgs norm;
  ProductEnd end = ProductEnd::kStore;
  float* partial = nullptr;  // kPartial: [ProductSplits, rows, out]
  void* stored = nullptr;    // kStore: [rows, out]
  GateArgs gate;             // kGate: out is [2, size]; kActivate: [size]
  AppendArgs append;         // kAppend: out is [heads + 2 kv_heads, head_dim]
};
// Whether these shapes can run on the current device; looks at no pointer but the weight's.
bool ProductFits(const ProductArgs& args);
int64_t ProductSplits(const ProductArgs& args);
void Product(const ProductArgs& args, void* stream);

// Attention over two sets of tokens from attention over each: out (in place of `first`) = the
// average of first and second, weighted by how much probability each set has. [batch, tokens,
// heads, head_dim], any strides but of channels, the same for both; log_sums [batch, heads, tokens]
// are the logarithms of the sums of e^logit.
struct MergeArgs {
  DType dtype = DType::kFloat16;
  int64_t batch = 0, tokens = 0, heads = 0, head_dim = 0;  // head_dim: a multiple of 8
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
  void* first = nullptr;
  const void* second = nullptr;
  const float *first_log_sums = nullptr, *second_log_sums = nullptr;
};
void MergeAttention(const MergeArgs& args, void* stream);

// What a sequence of steps keeps in device memory.
struct StepState {
  int64_t* tokens = nullptr;   // [batch]: what the next step reads, what the last one picked
  int64_t* history = nullptr;  // [steps, batch]: what all of them picked
  int32_t* step = nullptr;     // steps begun
  // [batch]: for layers that encode nothing, where all tokens count as encoded; for the others, where CountSides does not count.
  SequenceLength *dense = nullptr, *append = nullptr;
  // [batch], or null: as `append`, but its residual counts as encoded. For caches that encode every token as it comes:
  // the step's own is a residual of one token until it is encoded behind the others, and then attention reads this.
  SequenceLength* read = nullptr;
  unsigned long long* best = nullptr;  // [batch], of PickTokens; 0 in between
  uint32_t* arrived = nullptr;         // [batch], likewise
};
// Before a run of steps: tokens from `first` [batch], the same lengths for all sequences, no step
// yet.
void StartSteps(const StepState& state, int64_t batch, const int64_t* first, SequenceLength dense,
                SequenceLength append, void* stream);

// The beginning of a step: counts its token into the lengths (a full residual has been encoded
// before), looks up its embedding, and the rotation of its position.
inline constexpr int kMaxRopes = 2;
struct BeginArgs {
  DType dtype = DType::kFloat16;
  StepState state;
  int64_t batch = 0, hidden = 0;
  int64_t sink_tokens = 0, residual_length = 0;  // 1 where every token is encoded as it comes
  const void* embedding = nullptr;  // [vocabulary, hidden]
  float scale = 1;                  // of embeddings
  void* x = nullptr;                // [batch, hidden]
  struct Rope {
    const float* frequency = nullptr;  // [pairs]
    float factor = 1;                  // of cos and sin
    int64_t pairs = 0;
    float *cos = nullptr, *sin = nullptr;
  } ropes[kMaxRopes];
  const void* positions = nullptr;  // [positions, hidden], learned: added to the embedding; or null
};
void BeginStep(const BeginArgs& args, void* stream);

// Behind BeginStep, where keys have other tokens encoded than values: each side's lengths during the step (SideCount), where its
// token goes and what attention reads.
struct CountArgs {
  int64_t batch = 0;
  const SequenceLength* dense = nullptr;  // StepState's
  struct Side {
    SideCount count;
    SequenceLength *to = nullptr, *read = nullptr;  // [batch]
  } keys, values;
};
void CountSides(const CountArgs& args, void* stream);

// What every layer mixes in of its own: out = (norm(projected / divisor) + embedding * scale) / sqrt(2),
// the embedding that of the token, rounded after each operation. The norm is an RMS norm over a layer's elements.
// One launch, a warp a sequence and layer.
inline constexpr int64_t kMaxLayerInput = 512;
struct LayerInputsArgs {
  DType dtype = DType::kFloat16;
  const int64_t* tokens = nullptr;          // [batch]
  int64_t batch = 0, layers = 0, size = 0;  // size: at most kMaxLayerInput
  const void* embedding = nullptr;          // [vocabulary, layers, size]
  const void* projected = nullptr;          // [batch, layers, size]
  const float* weight = nullptr;            // [size]
  float eps = 0, scale = 1, divisor = 1;
  void* out = nullptr;                      // [layers, batch, size]
};
void LayerInputs(const LayerInputsArgs& args, void* stream);

// The end of a step: the token with the largest logit of logits [batch, vocabulary], of several the
// first, as at::argmax; NaN counts as the largest.
struct PickArgs {
  DType dtype = DType::kFloat16;
  StepState state;
  int64_t batch = 0, vocabulary = 0;
  const void* logits = nullptr;
  // Where it is above 0, cap * tanh(logit / cap) stands for each logit, in float32, and is written to `capped`
  // [batch, vocabulary].
  float cap = 0;
  float* capped = nullptr;
};
void PickTokens(const PickArgs& args, void* stream);

}  // namespace kvq
