// kernel_encode, kernel_flush, kernel_decode, kernel_attention: single kernels of a scheme on the shapes of a model's
// first layer, on a GPU. No weights are needed. Timed as replays of a CUDA graph of 32 calls or more, over buffers in
// turn that together exceed the L2 cache; the time is that of one call, at the clock of a GPU that nothing holds down.
// As in a decoding step, attention may begin to fetch while the call before ends; libtorch's beside it does not.
//
// Limits: for attention the bytes of the stored cache over the read bandwidth measured in the same run
// (peak_fraction), beside libtorch's flash and cuDNN attention on the same tokens in 16 bits (flash_us, cudnn_us), and
// the speed-up over the faster of them divided by the ratio of bytes (speedup_per_byte_ratio: 1 is all that fewer
// bytes can give). For the others the bytes of the 16-bit numbers and of the codes, read or written.
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "benchmarks/measurement.h"
#include "fixtures/attention.h"
#include "fixtures/cache/codec_tensors.h"
#include "fixtures/cache/kv_cache.h"
#include "kernels/device/attention.h"
#include "kernels/device/latent_attention.h"
#include "kernels/error.h"
#include "kernels/runtime/captured_graph.h"
#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

using at::Tensor;

// Microseconds of a call in a replayed graph of many, kRepeats times. It is timed behind a replay that still runs, so that what the host
// takes to launch it does not count; the clock is counted right behind it, and where something held that down it is taken again after a
// rest. call(i, stream) enqueues one on buffers number i.
class GraphTimer {
 public:
  struct Timed {
    std::vector<double> microseconds;
    double lowest_mhz = std::numeric_limits<double>::infinity();
    bool held_back = false;  // clocks of some, even after rests
  };

  explicit GraphTimer(at::Device device)
      : device_(device), aten_stream_(GraphStream(device)), stream_(static_cast<cudaStream_t>(aten_stream_.native_handle())) {}

  template <typename Call>
  Timed Measure(int buffers, const Call& call) const {
    constexpr int kCalls = 32;
    const int calls = (kCalls + buffers - 1) / buffers * buffers;
    const auto enqueue = [&](int count) {
      for (int i = 0; i < count; ++i) call(i % buffers, stream_);
    };
    const c10::StreamGuard guard(aten_stream_);
    Check(cudaDeviceSynchronize(), "timing of a kernel");
    CapturedGraph graph;
    graph.Rehearse([&] { enqueue(buffers); });  // warm-up; libraries allocate what they need
    Check(cudaStreamSynchronize(stream_), "timing of a kernel");
    graph.Capture(stream_, [&] { enqueue(calls); });
    c10::Event begin(aten_stream_.device_type(), c10::EventFlag::BACKEND_DEFAULT);  // one that keeps the time
    c10::Event end(aten_stream_.device_type(), c10::EventFlag::BACKEND_DEFAULT);
    Timed timed;
    AwaitFullClock(device_);
    constexpr size_t kRests = 2 * kRepeats;
    size_t rests = 0;
    for (bool first = true; timed.microseconds.size() < kRepeats; first = false) {
      graph.Launch();
      begin.record(aten_stream_);
      graph.Launch();
      end.record(aten_stream_);
      const double mhz = CountedClock(device_, stream_);
      if (first) continue;
      const bool full = IsFullClock(device_, mhz);
      if (!full && rests++ < kRests && AwaitFullClock(device_)) continue;
      timed.microseconds.push_back(begin.elapsedTime(end) * 1e3 / calls);
      timed.lowest_mhz = std::min(timed.lowest_mhz, mhz);
      timed.held_back |= !full;
    }
    return timed;
  }

 private:
  static constexpr size_t kRepeats = 9;

  at::Device device_;
  c10::Stream aten_stream_;
  cudaStream_t stream_;
};

// Copies of something that many bytes large such that together they exceed any L2 cache.
int Copies(double bytes) {
  constexpr double kBeyondL2 = 256e6;
  return static_cast<int>(std::clamp(std::ceil(kBeyondL2 / bytes), 2.0, 64.0));
}

struct Shape {
  int64_t batch, heads, kv_heads, head_dim, context;
};

// The model's config, where single kernels can be timed at all.
ModelConfig ConfigOf(const Cell& cell, Session& session) {
  if (!session.device().is_cuda()) throw Skip("single kernels are timed with --device=cuda; quantize and dequantize time a CPU's");
  if (session.dtype() == at::kFloat) throw Skip("kernels are timed on 16-bit numbers");
  if (session.kv_dtype(cell.model) != session.dtype()) {
    throw Skip(StrCat("these kernels read dense tokens in the type they compute in, ", session.dtype(), ", and --kv-dtype is ",
                      session.kv_dtype(cell.model)));
  }
  return FindModel(cell.model).config();
}

Shape ShapeOf(const Cell& cell, Session& session) {
  const ModelConfig config = ConfigOf(cell, session);
  if (config.latent.rank > 0) throw Skip("these kernels read keys and values; this model's cache keeps latents");
  const LayerConfig& layer = config.layers.front();
  return {cell.batch, config.num_heads, layer.num_kv_heads, layer.head_dim, cell.context};
}

Tensor Normal(Session& session, std::vector<int64_t> shape) {
  return at::randn(shape, at::TensorOptions().dtype(session.dtype()).device(session.device()));
}

// Tokens of one side and their codes.
struct Side {
  const Codec* codec;
  CodecParams params;
  Tensor plain;
  EncodedTensors encoded;

  double moved() const { return static_cast<double>(plain.numel() * plain.element_size() + encoded.nbytes()); }
};

// So many times tokens (of keys, of values) of random numbers, encoded as the spec has keys and values in turn.
std::vector<Side> Sides(Session& session, const Spec& spec, const Shape& shape, const std::array<int64_t, 2>& tokens,
                        int count) {
  const SchemePair& pair = spec.schemes;
  std::vector<Side> sides;
  for (int i = 0; i < count; ++i) {
    const Codec& codec = i % 2 == 0 ? pair.keys->keys : pair.values->values;
    const SideRule& rule = i % 2 == 0 ? spec.keys : spec.values;
    const int64_t of_side = tokens[static_cast<size_t>(i % 2)];
    if (codec.encode == nullptr) throw Skip("one side is not encoded");
    const CodecParams params = spec.Params(codec);
    const Tensor plain = Normal(session, {shape.batch, shape.kv_heads, of_side, shape.head_dim});
    sides.push_back({&codec, params, plain,
                     AllocateEncoded(codec, params, shape.batch, shape.kv_heads, shape.head_dim, of_side,
                                     BlockTokens(spec, rule, codec), session.device())});
    EncodeTensor(codec, params, plain, 0, sides.back().encoded);
  }
  return sides;
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// The work of `timed` once per iteration of the state.
GraphTimer::Timed Iterate(Session& session, benchmark::State& state, const std::function<GraphTimer::Timed()>& timed) {
  GraphTimer::Timed all;
  for (auto _ : state) {
    GraphTimer::Timed some;
    session.Time([&] { some = timed(); });  // the GPU's state is watched meanwhile
    state.SetIterationTime(Median(some.microseconds) / 1e6);
    all.microseconds.insert(all.microseconds.end(), some.microseconds.begin(), some.microseconds.end());
    all.lowest_mhz = std::min(all.lowest_mhz, some.lowest_mhz);
    all.held_back |= some.held_back;
  }
  return all;
}

// What a kernel took that moves so many bytes once, and its share of the memory's rate; returns the median in microseconds.
double AddMoved(Session& session, Counters& counters, const GraphTimer::Timed& timed, double bytes) {
  AddSpread(counters, "us", timed.microseconds);
  const double us = counters.front().second;
  counters.emplace_back("bytes", bytes);
  counters.emplace_back("gb_per_s", bytes / us / 1e3);
  counters.emplace_back("peak_fraction", bytes / us * 1e6 / ReadBandwidth(session.device()));
  // Of the clock what was counted says more than what the driver says.
  GpuSummary seen = session.TakeWatch();
  seen.readings = std::max<int64_t>(seen.readings, 1);
  seen.sm_clock_mhz = std::llround(timed.lowest_mhz);
  seen.clock_reasons.reset();
  AddGpuState(session, seen, counters);
  counters.emplace_back("throttled", timed.held_back);
  if (timed.held_back) session.AddNote(StrCat("throttled: the clock was counted at ", std::llround(timed.lowest_mhz), " MHz"));
  return us;
}

Counters Codecs(Session& session, const Cell& cell, benchmark::State& state, bool encodes, bool one_block) {
  const Shape shape = ShapeOf(cell, session);
  const Spec spec = ParseSpec(cell.spec);
  const auto tokens_of = [&](const SideRule& rule, const Codec& codec) {
    return one_block ? BlockTokens(spec, rule, codec) : EncodedTokens(spec, rule, cell.context);
  };
  const std::array<int64_t, 2> tokens = {tokens_of(spec.keys, spec.schemes.keys->keys),
                                         tokens_of(spec.values, spec.schemes.values->values)};
  if (tokens[0] == 0 || tokens[1] == 0) throw Skip("all tokens fit into the residual; nothing is encoded");
  const double elements = static_cast<double>(shape.batch * shape.kv_heads * (tokens[0] + tokens[1]) * shape.head_dim);
  const int count = Copies(elements) + Copies(elements) % 2;
  const std::vector<Side> sides = Sides(session, spec, shape, tokens, count);
  const auto one = [&](const Side& side, cudaStream_t stream) {
    const DenseView plain = ViewOf(side.plain);
    if (encodes) {
      side.codec->encode_cuda(side.params, plain, 0, side.encoded.view(), stream);
    } else {
      side.codec->decode_cuda(side.params, side.encoded.view(), 0, plain, stream);
    }
  };
  const GraphTimer timer(session.device());
  const GraphTimer::Timed timed = Iterate(session, state, [&] {
    return timer.Measure(count, [&](int i, cudaStream_t stream) { one(sides[i], stream); });
  });
  session.ran = StrCat(cell.spec, encodes ? " encode" : " decode");
  Counters counters;
  AddMoved(session, counters, timed, (sides[0].moved() + sides[1].moved()) / 2);
  return counters;
}

// One side of what decode attention reads in one call: tokens as they are, or codes.
struct AttentionSide {
  Tensor dense;
  EncodedTensors encoded;
  KvView view;
  CodecParams params;
};

struct AttentionJob {
  Tensor queries, out, workspace;
  AttentionSide sides[2];  // keys, values
  DecodeAttentionArgs args;
};

// Of latents, which all heads share: beside it what libtorch takes for the same tokens in 16 bits.
Counters LatentsAttention(Session& session, const Cell& cell, benchmark::State& state, const ModelConfig& config) {
  const Spec spec = ParseSpec(cell.spec);
  const int64_t rank = config.latent.rank, turned = config.latent.rotary_dim, heads = config.num_heads;
  const std::array<LayerSide, 2> sides = SidesOf(spec, CacheShapeOf(config, cell.batch), 0);
  const Codec &first = *sides[0].codec, &second = *sides[1].codec;
  if (!HasLatentAttention(first, second)) throw Skip(StrCat("no fused attention over latents as ", cell.spec, " stores them"));
  const double scale = config.layers.front().attention_scale;
  const bool newest_is_encoded =  // as in a step
      std::ranges::any_of(sides, [](const LayerSide& side) { return side.encodes() && side.rule->residual_length == 0; });
  struct Job {
    Tensor both, queries, out, workspace;
    std::array<EncodedTensors, 2> encoded;
    LatentAttentionArgs args;
  };
  double bytes = 0;
  std::vector<Job> jobs;
  for (int i = 0, copies = 1; i < copies; ++i) {
    Job job;
    job.both = Normal(session, {cell.batch, 1, cell.context, rank + turned});
    job.queries = Normal(session, {cell.batch, heads, 1, rank + turned});
    job.out = at::empty({cell.batch, heads, 1, rank}, job.queries.options());
    job.args = {.dtype = DTypeOf(session.dtype()), .batch = cell.batch, .heads = heads, .rank = rank, .turned = turned,
                .queries = job.queries.data_ptr(), .out = job.out.data_ptr(), .scale = static_cast<float>(scale), .capacity = cell.context,
                .length = {0, static_cast<int32_t>(cell.context), 0}, .early = true, .newest_is_encoded = newest_is_encoded};
    for (size_t side = 0; side < 2; ++side) {
      const Codec& codec = *sides[side].codec;
      LatentSide& to = side == 0 ? job.args.latents : job.args.rotary_keys;
      const Tensor tokens = side == 0 ? job.both.narrow(3, 0, rank) : job.both.narrow(3, rank, turned);
      if (sides[side].encodes()) {
        to.params = spec.Params(codec);
        EncodedTensors& encoded = job.encoded[side];
        encoded = AllocateEncoded(codec, to.params, cell.batch, 1, tokens.size(3), cell.context, BlockTokens(spec, *sides[side].rule, codec),
                                  session.device());
        EncodeTensor(codec, to.params, tokens.contiguous(), 0, encoded);
        to.codes = encoded.view();
      } else {
        to.tokens = ViewOf(tokens);
      }
    }
    if (sides[0].encodes() != sides[1].encodes()) {  // a side that is not encoded stands alone
      LatentSide& dense = sides[0].encodes() ? job.args.rotary_keys : job.args.latents;
      job.both = (sides[0].encodes() ? job.both.narrow(3, rank, turned) : job.both.narrow(3, 0, rank)).contiguous();
      dense.tokens = ViewOf(job.both);
    } else if (sides[0].encodes()) {
      job.both.reset();
    }
    job.workspace = at::empty({LatentAttentionWorkspace(first, second, job.args)}, job.queries.options().dtype(at::kByte));
    job.args.workspace = job.workspace.data_ptr();
    if (i == 0) {
      bytes = static_cast<double>(job.encoded[0].nbytes() + job.encoded[1].nbytes() + (job.both.defined() ? static_cast<int64_t>(job.both.nbytes()) : 0));
      copies = Copies(bytes);
    }
    jobs.push_back(std::move(job));
  }
  const int copies = static_cast<int>(jobs.size());
  const GraphTimer timer(session.device());
  const GraphTimer::Timed timed = Iterate(session, state, [&] {
    return timer.Measure(copies, [&](int i, cudaStream_t stream) { LatentAttention(first, second, jobs[i].args, stream); });
  });
  session.ran = LatentAttentionName(first, second, jobs.front().args);
  jobs.clear();

  const Tensor dense = Normal(session, {cell.batch, 1, cell.context, rank + turned}), queries = Normal(session, {cell.batch, heads, 1, rank + turned});
  const double unfused = Median(timer.Measure(2, [&](int, cudaStream_t) {
    FindBackend("sdpa").attend(queries, dense, dense.narrow(3, 0, rank), {scale, 0, 0});
  }).microseconds);
  Counters counters;
  const double us = AddMoved(session, counters, timed, bytes);
  counters.emplace_back("tflop_per_s", 2.0 * static_cast<double>(cell.batch * heads * cell.context * (2 * rank + turned)) / us / 1e6);
  counters.emplace_back("sdpa_us", unfused);
  counters.emplace_back("speedup", unfused / us);
  return counters;
}

Counters Attention(Session& session, const Cell& cell, benchmark::State& state) {
  if (const ModelConfig config = ConfigOf(cell, session); config.latent.rank > 0) return LatentsAttention(session, cell, state, config);
  const Shape shape = ShapeOf(cell, session);
  const Spec spec = ParseSpec(cell.spec);
  const SchemePair& pair = spec.schemes;
  const Codec* codecs[2] = {&pair.keys->keys, &pair.values->values};
  if (!HasDecodeAttention(*codecs[0], *codecs[1])) {
    throw Skip(StrCat("no fused attention for keys ", pair.keys->name, " and values ", pair.values->name));
  }
  for (const Codec* codec : codecs) {
    if (shape.context % codec->min_block_tokens != 0) {
      throw Skip(StrCat("groups of ", codec->min_block_tokens, " tokens, and a context of ", shape.context));
    }
  }
  const auto cache_shape = [&](int64_t heads) {
    return std::vector<int64_t>{shape.batch, heads, shape.context, shape.head_dim};
  };
  const double dense_bytes = 4.0 * static_cast<double>(shape.batch * shape.kv_heads * shape.context * shape.head_dim);
  const Tensor lengths = at::tensor({0, static_cast<int>(shape.context), 0}, at::kInt).repeat({shape.batch, 1})
                             .to(session.device());
  const double scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));

  // The whole context encoded: blocks of a residual, whatever its length here.
  const auto make_side = [&](const Codec& codec, const SideRule& rule) {
    AttentionSide side;
    const Tensor plain = Normal(session, cache_shape(shape.kv_heads));
    if (codec.encode == nullptr) {
      side.dense = plain;
      side.view.batch = shape.batch, side.view.heads = shape.kv_heads, side.view.head_dim = shape.head_dim;
      side.view.capacity = shape.context;
      side.view.planes[0] = static_cast<std::byte*>(plain.data_ptr());
      side.view.plane_stride[0] = plain.stride(1) * plain.element_size();
      return side;
    }
    side.params = spec.Params(codec);
    side.encoded = AllocateEncoded(codec, side.params, shape.batch, shape.kv_heads, shape.head_dim, shape.context,
                                   BlockTokens(spec, rule, codec), session.device());
    EncodeTensor(codec, side.params, plain, 0, side.encoded);
    side.view = side.encoded.view();
    return side;
  };
  double bytes = 0;
  std::vector<AttentionJob> jobs;
  for (int i = 0, copies = 1; i < copies; ++i) {
    AttentionJob job;
    job.queries = Normal(session, {shape.batch, shape.heads, 1, shape.head_dim});
    job.out = at::empty_like(job.queries);
    for (int side = 0; side < 2; ++side) job.sides[side] = make_side(*codecs[side], side == 0 ? spec.keys : spec.values);
    DecodeAttentionArgs& args = job.args;
    args.dtype = DTypeOf(session.dtype()), args.query_heads = shape.heads;
    args.queries = job.queries.data_ptr(), args.out = job.out.data_ptr();
    args.scale = static_cast<float>(scale);
    args.keys = job.sides[0].view, args.values = job.sides[1].view;
    args.key_params = job.sides[0].params, args.value_params = job.sides[1].params;
    args.key_turn = TurnOf(*codecs[0], spec.keys.rotation, shape.head_dim);
    args.value_turn = TurnOf(*codecs[1], spec.values.rotation, shape.head_dim);
    args.lengths = reinterpret_cast<const SequenceLength*>(lengths.data_ptr());
    job.workspace = at::zeros({DecodeAttentionWorkspace(*codecs[0], *codecs[1], args)}, job.queries.options().dtype(at::kByte));
    args.workspace = job.workspace.data_ptr();
    args.early = true;
    args.newest_is_encoded = (spec.keys.residual_length == 0 && codecs[0]->encode != nullptr) ||
                             (spec.values.residual_length == 0 && codecs[1]->encode != nullptr);
    if (i == 0) {
      for (const AttentionSide& side : job.sides) {
        bytes += static_cast<double>(side.dense.defined() ? static_cast<int64_t>(side.dense.nbytes()) : side.encoded.nbytes());
      }
      copies = Copies(bytes);
    }
    jobs.push_back(std::move(job));
  }
  const int copies = static_cast<int>(jobs.size());
  const GraphTimer timer(session.device());
  const GraphTimer::Timed timed = Iterate(session, state, [&] {
    return timer.Measure(copies, [&](int i, cudaStream_t stream) {
      DecodeAttention(*codecs[0], *codecs[1], jobs[i].args, stream);
    });
  });
  session.ran = DecodeAttentionName(*codecs[0], *codecs[1], jobs.front().args);
  jobs.clear();

  // The same tokens in 16 bits through libtorch.
  std::vector<std::array<Tensor, 3>> plain;
  for (int i = 0; i < Copies(dense_bytes); ++i) {
    plain.push_back({Normal(session, {shape.batch, shape.heads, 1, shape.head_dim}),
                     Normal(session, cache_shape(shape.kv_heads)), Normal(session, cache_shape(shape.kv_heads))});
  }
  const auto time = [&](const auto& attend) {
    return Median(timer.Measure(static_cast<int>(plain.size()), [&](int i, cudaStream_t) { attend(plain[i]); }).microseconds);
  };
  const double flash = time([&](const std::array<Tensor, 3>& x) {
    at::_flash_attention_forward(x[0].transpose(1, 2), x[1].transpose(1, 2), x[2].transpose(1, 2), {}, {}, 1,
                                 shape.context, 0.0, false, false, scale);
  });
  const double cudnn = time([&](const std::array<Tensor, 3>& x) {
    at::_cudnn_attention_forward(x[0], x[1], x[2], {}, {}, {}, 1, shape.context, false, 0.0, false, false, scale);
  });
  Counters counters;
  const double us = AddMoved(session, counters, timed, bytes);
  counters.emplace_back("flash_us", flash);
  counters.emplace_back("cudnn_us", cudnn);
  counters.emplace_back("speedup", std::min(flash, cudnn) / us);
  counters.emplace_back("speedup_per_byte_ratio", std::min(flash, cudnn) / us * bytes / dense_bytes);
  return counters;
}

template <bool kEncodes, bool kOneBlock>
Counters OneCodec(Session& session, const Cell& cell, benchmark::State& state) {
  return Codecs(session, cell, state, kEncodes, kOneBlock);
}

const RegisterMeasurement kEncode{{.name = "kernel_encode", .what = "us of encoding one side of one layer (GPU)",
                                   .timed = true, .needs_encoding = true, .on_request = true,
                                   .run = OneCodec<true, false>}};
const RegisterMeasurement kFlush{{.name = "kernel_flush", .what = "us of encoding one full residual of one side (GPU)",
                                  .timed = true, .needs_encoding = true, .on_request = true,
                                  .run = OneCodec<true, true>}};
const RegisterMeasurement kDecodeSide{{.name = "kernel_decode", .what = "us of decoding one side of one layer (GPU)",
                                   .timed = true, .needs_encoding = true, .on_request = true,
                                   .run = OneCodec<false, false>}};
const RegisterMeasurement kAttention{{.name = "kernel_attention",
                                      .what = "us of one layer's decode attention, beside flash and cuDNN (GPU)",
                                      .timed = true, .on_request = true, .run = Attention}};

}  // namespace
}  // namespace kvq
