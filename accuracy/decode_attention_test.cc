// Fused decode attention of every pair of schemes against attention in float64 over the tokens as the CPU decodes them.
#include <algorithm>
#include <cmath>

#include "accuracy/encoded.h"
#include "fixtures/cache/spec.h"
#include "fixtures/machine/device.h"
#include "kernels/device/attention.h"
#include "kernels/device/step.h"
#include "kernels/error.h"
#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

using at::Tensor;

struct AttentionCase {
  std::string spec;  // keys' scheme, or keys' and values'
  int64_t head_dim, group, ratio;
  std::vector<SequenceLength> lengths;  // of each sequence
  at::ScalarType dtype = at::kHalf;
  int32_t window = 0;
  std::vector<int32_t> values_encoded = {};  // of each sequence, where other values are encoded than keys
  bool ring = false;                         // the values' residual is one
  double cap = 0;      // of logits
  bool sinks = false;  // a logit a head without a value

  std::vector<SequenceLength> LengthsOf(bool values) const {
    std::vector<SequenceLength> of = lengths;
    for (size_t b = 0; values && b < values_encoded.size(); ++b) {
      of[b].residual += of[b].encoded - values_encoded[b], of[b].encoded = values_encoded[b];
    }
    return of;
  }
  int64_t capacity() const {
    int64_t most = 32;
    for (const bool values : {false, true}) {
      for (const SequenceLength& length : LengthsOf(values)) most = std::max<int64_t>(most, (length.encoded + 39) / 32 * 32);
    }
    return most;
  }
};

constexpr int64_t kKvHeads = 2, kSinks = 8, kResidual = 192;

// One side: tokens as they are before and behind the encoded ones, the encoded ones, and what the kernel should see,
// [batch, heads, capacity, head_dim]. `weight` bounds what a rounded probability is multiplied with.
struct Side {
  Tensor sinks, residual, dense;
  EncodedTensors encoded;
  Tensor decoded, weight;
  CodecParams params;
  Turn turn;
};

CodecParams ParamsOf(const Codec& codec, const AttentionCase& c) {
  const bool choice = codec.device.plain == nullptr && std::ranges::count(codec.groups, c.group) > 0;
  return {.group_size = choice ? c.group : codec.default_group};
}

// `other_dense`: of the other side.
Side MakeSide(const Codec& codec, bool other_dense, const AttentionCase& c, const std::vector<SequenceLength>& lengths,
              int64_t capacity) {
  const int64_t batch = static_cast<int64_t>(c.lengths.size());
  const bool dense = codec.encode == nullptr;
  const auto normal = [&](int64_t tokens) {
    return at::randn({batch, kKvHeads, tokens, c.head_dim}, at::kCPU).to(c.dtype);
  };
  Side side;
  side.sinks = normal(kSinks), side.residual = normal(kResidual);
  const Tensor tokens = normal(capacity);
  side.decoded = tokens.to(at::kDouble), side.weight = side.decoded.abs();
  if (dense) {
    // What lies behind the length must not be seen. Beside an encoded side the residual stands there.
    side.dense = at::cat({tokens, normal(kResidual)}, 2);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t encoded = lengths[b].encoded;
      side.dense[b].narrow(1, encoded, side.dense.size(2) - encoded).fill_(NAN);
      if (!other_dense) side.dense[b].narrow(1, encoded, kResidual).copy_(side.residual[b]);
    }
    side.dense = side.dense.cuda();
  } else {
    const CodecParams params = side.params = ParamsOf(codec, c);
    side.turn = TurnOf(codec, {}, c.head_dim);
    EncodedTensors on_cpu = Encode(codec, params, tokens, codec.min_block_tokens);
    Tensor decoded = at::empty({batch, kKvHeads, capacity, c.head_dim}, at::kFloat);
    DecodeTensor(codec, params, on_cpu, 0, decoded);
    side.decoded = decoded.to(at::kDouble);
    if (codec.device.plain != nullptr) {
      // What a code times its scale is at most, twice the largest magnitude of a token; where it is turned, about four times
      // the mean, and the errors of all channels join in each.
      side.weight = codec.turned ? 24 * side.decoded.norm(2, 3, /*keepdim=*/true) / std::sqrt(static_cast<double>(c.head_dim))
                                 : 2 * side.decoded.abs().amax(3, /*keepdim=*/true);
      side.weight = side.weight.expand_as(side.decoded).contiguous();
      for (size_t plane = 1; plane < on_cpu.planes.size(); ++plane) {
        const Tensor bytes = on_cpu.planes[plane].view({batch, kKvHeads, capacity, -1});
        for (int64_t b = 0; b < batch; ++b) {
          const int64_t first = lengths[b].encoded;
          bytes[b].narrow(1, first, capacity - first).fill_(0xFF);
        }
      }
      side.encoded = on_cpu;
      for (Tensor& plane : side.encoded.planes) plane = plane.cuda();
      return side;
    }
    if (codec.min_block_tokens > 1) {  // keys, whose groups lie over tokens
      side.encoded = on_cpu;
      for (Tensor& plane : side.encoded.planes) plane = plane.cuda();
      return side;
    }
    // p scale is rounded and meets a code: at most 2^bits - 1 of them.
    side.weight = on_cpu.planes[1].view(at::kHalf).to(at::kDouble).abs().mul((1 << codec.bits) - 1)
                      .view({batch, kKvHeads, capacity, c.head_dim / c.group})
                      .repeat_interleave(c.group, 3);
    const int64_t groups = c.head_dim / c.group;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t first = lengths[b].encoded;
      for (int plane = 1; plane < 3; ++plane) {
        on_cpu.planes[plane].view(at::kHalf).view({batch, kKvHeads, capacity * groups})[b]
            .narrow(1, first * groups, (capacity - first) * groups).fill_(NAN);
      }
    }
    side.encoded = on_cpu;
    for (Tensor& plane : side.encoded.planes) plane = plane.cuda();
  }
  return side;
}

void ExpectWithin(const Tensor& out, const Tensor& expected, const Tensor& allowed, int launch) {
  const Tensor error = (out.cpu().to(at::kDouble) - expected).abs();
  EXPECT_TRUE(error.le(allowed + 1e-30).all().item<bool>())
      << "launch " << launch << ": " << (error / (allowed + 1e-30)).max().item<double>() << " of what is allowed";
}

// StartSteps writes `length` into all of `lengths`, some 20 us after it has let the next kernel begin: it waits for a row of kernels of
// one small block, of which each begins early, too, and waits for the one before.
void ChangeLengthsLate(const Tensor& lengths, SequenceLength length) {
  const int64_t batch = lengths.numel() / 3;
  const auto room = [&](int64_t bytes) { return at::zeros({bytes}, lengths.options().dtype(at::kByte)); };
  static Tensor row, weight, tokens, others;  // that live as long as the kernels do
  row = at::ones({8192}, lengths.options().dtype(at::kHalf)), weight = at::ones({8192}, lengths.options().dtype(at::kFloat));
  tokens = room(batch * 8), others = room(64 + batch * 32);
  std::byte* at = static_cast<std::byte*>(others.data_ptr());
  StepState state;
  state.tokens = static_cast<int64_t*>(tokens.data_ptr()), state.append = reinterpret_cast<SequenceLength*>(lengths.data_ptr());
  state.step = reinterpret_cast<int32_t*>(at), state.best = reinterpret_cast<unsigned long long*>(at + 64);
  state.arrived = reinterpret_cast<uint32_t*>(at + 64 + batch * 8), state.dense = reinterpret_cast<SequenceLength*>(at + 64 + batch * 12);
  Synchronize(lengths.device());
  for (int i = 0; i < 16; ++i) {
    AddNorm({.dtype = DType::kFloat16, .rows = 1, .size = 8192, .x = row.data_ptr(), .weight = weight.data_ptr<float>(), .eps = 1,
             .out = row.data_ptr()}, nullptr);
  }
  StartSteps(state, batch, static_cast<const int64_t*>(tokens.data_ptr()), {}, length, nullptr);
}

// A launch leaves its workspace as it found it.
void ExpectZero(const Tensor& workspace) { EXPECT_FALSE(workspace.any().item<bool>()); }

void Check(const AttentionCase& c) {
  SCOPED_TRACE(StrCat(c.spec, " head_dim ", c.head_dim, " group ", c.group, " ratio ", c.ratio, " lengths ",
                      c.lengths[0].sinks, "/", c.lengths[0].encoded, "/", c.lengths[0].residual, " of ",
                      c.lengths.size(), " ", c.dtype, " window ", c.window, c.values_encoded.empty() ? "" : " values apart", c.ring ? " ring" : ""));
  const SchemePair pair = ParseSpec(c.spec).schemes;
  const Codec &key_codec = pair.keys->keys, &value_codec = pair.values->values;
  const bool keys_dense = key_codec.encode == nullptr, values_dense = value_codec.encode == nullptr;
  const int64_t batch = static_cast<int64_t>(c.lengths.size());
  const int64_t capacity = c.capacity();
  const std::vector<SequenceLength> key_lengths = c.LengthsOf(false), value_lengths = c.LengthsOf(true);
  Side keys = MakeSide(key_codec, values_dense, c, key_lengths, capacity);
  Side values = MakeSide(value_codec, keys_dense, c, value_lengths, capacity);
  const Tensor queries = at::randn({batch, kKvHeads, c.ratio, c.head_dim}).to(c.dtype), sink_logits = at::randn({kKvHeads * c.ratio}) * 2;
  const double scale = 1 / std::sqrt(static_cast<double>(c.head_dim));

  // What is right, and how far off rounding may leave it: the output once, the weight p scale of each token once
  // (and for 16-bit tokens p itself), all to 11 bits, or 8 for bfloat16 numbers.
  const double half = std::ldexp(1, -11), roundoff = c.dtype == at::kHalf ? half : std::ldexp(1, -8);
  Tensor expected = at::zeros({batch, kKvHeads, c.ratio, c.head_dim}, at::kDouble), allowed = at::zeros_like(expected);
  for (int64_t b = 0; b < batch; ++b) {
    const SequenceLength& length = c.lengths[b];
    const int64_t all_tokens = length.sinks + length.encoded + length.residual;
    if (all_tokens == 0) continue;
    const int64_t hidden = c.window > 0 ? std::max<int64_t>(all_tokens - c.window, 0) : 0;
    const auto all = [&](const Side& side, const Tensor& encoded) {
      const SequenceLength& of = (&side == &keys ? key_lengths : value_lengths)[static_cast<size_t>(b)];
      return at::cat({side.sinks[b].narrow(1, 0, of.sinks).to(at::kDouble), encoded[b].narrow(1, 0, of.encoded),
                      side.residual[b].narrow(1, 0, of.residual).to(at::kDouble)}, 1)
          .narrow(1, hidden, all_tokens - hidden);
    };
    Tensor logits = at::matmul(queries[b].to(at::kDouble), all(keys, keys.decoded).transpose(1, 2)) * scale;
    const int64_t seen = logits.size(-1);
    if (c.cap > 0) logits = at::tanh(logits / c.cap) * c.cap;
    if (c.sinks) logits = at::cat({logits, sink_logits.to(at::kDouble).view({kKvHeads, c.ratio, 1})}, -1);
    const Tensor p = at::softmax(logits, -1).narrow(-1, 0, seen);
    expected[b].copy_(at::matmul(p, all(values, values.decoded)));
    const Tensor in_codes = all(values, values.weight).abs(), as_are = all(values, at::zeros_like(values.weight)).abs();
    // Turned queries are rounded to float16, so are a table's elements, and queries times scales of channels, which meet codes of
    // up to the distance from a group's minimum; and tokens that one side alone has encoded are rounded when they are decoded.
    // What that may change of a weight; of those values, once more.
    const bool apart = !c.values_encoded.empty();
    const double of_logits = ((keys.turn.block > 0 || key_codec.min_block_tokens > 1 ? 4 * half : 0) + (apart ? roundoff : 0)) * scale *
                             (queries[b].norm(2, -1).max() * all(keys, keys.decoded).norm(2, -1).max()).item<double>();
    allowed[b].copy_((of_logits + (apart ? roundoff : 0)) * at::matmul(p, all(values, values.decoded).abs()) + roundoff * expected[b].abs() + (values_dense ? roundoff : half) * at::matmul(p, in_codes) +
                     (values_dense ? 0 : roundoff) * at::matmul(p, as_are));
  }

  const auto on_device = [](const std::vector<SequenceLength>& of) {
    std::vector<int32_t> counts;
    for (const SequenceLength& length : of) counts.insert(counts.end(), {length.sinks, length.encoded, length.residual});
    return at::tensor(counts, at::kInt).cuda();
  };
  const Tensor lengths = on_device(key_lengths), of_values = on_device(value_lengths), on_gpu = queries.cuda(), sinks_on_gpu = sink_logits.cuda();
  for (int64_t b = 0; c.ring && b < batch; ++b) {  // number i goes to slot (encoded + i) mod them
    values.residual[b] = values.residual[b].roll({value_lengths[static_cast<size_t>(b)].encoded % kResidual}, {1}).clone();
  }
  for (Side* side : {&keys, &values}) side->sinks = side->sinks.cuda(), side->residual = side->residual.cuda();
  const auto view = [&](const Side& side) {
    if (!side.dense.defined()) return side.encoded.view();
    KvView v;
    v.batch = batch, v.heads = kKvHeads, v.head_dim = c.head_dim, v.capacity = capacity;
    v.planes[0] = static_cast<std::byte*>(side.dense.data_ptr());
    v.plane_stride[0] = side.dense.stride(1) * 2;
    return v;
  };
  const auto residual = [&](const Side& side, bool other_dense) {
    return ViewOf(side.dense.defined() && !other_dense ? side.dense : side.residual);
  };
  Tensor out = at::full(queries.sizes(), NAN, on_gpu.options());
  DecodeAttentionArgs args{.dtype = DTypeOf(c.dtype),
                           .query_heads = kKvHeads * c.ratio,
                           .queries = on_gpu.data_ptr(),
                           .out = out.data_ptr(),
                           .scale = static_cast<float>(scale),
                           .softcap = static_cast<float>(c.cap),
                           .sink_logits = c.sinks ? sinks_on_gpu.data_ptr<float>() : nullptr,
                           .keys = view(keys),
                           .values = view(values),
                           .key_params = keys.params,
                           .value_params = values.params,
                           .sink_keys = ViewOf(keys.sinks),
                           .sink_values = ViewOf(values.sinks),
                           .residual_keys = residual(keys, values_dense),
                           .residual_values = residual(values, keys_dense),
                           .key_turn = keys.turn,
                           .value_turn = values.turn,
                           .window = c.window,
                           .lengths = reinterpret_cast<const SequenceLength*>(lengths.data_ptr()),
                           .value_lengths = c.values_encoded.empty() ? nullptr : reinterpret_cast<const SequenceLength*>(of_values.data_ptr()),
                           .values_in_ring = c.ring};
  const Tensor workspace =
      at::zeros({DecodeAttentionWorkspace(key_codec, value_codec, args)}, on_gpu.options().dtype(at::kByte));
  args.workspace = workspace.data_ptr();
  // A workspace serves again; and early, behind a kernel that changes the lengths, at last one that lets attention begin before it does.
  const bool alike = c.values_encoded.empty() && std::ranges::all_of(c.lengths, [&](const SequenceLength& of) {
    return of.sinks == c.lengths[0].sinks && of.encoded == c.lengths[0].encoded && of.residual == c.lengths[0].residual;
  });
  for (int launch = 0; launch < (alike ? 4 : 3); ++launch) {
    out.fill_(NAN);
    args.early = launch >= 2;
    if (launch == 3) {
      lengths.copy_(at::bitwise_and(lengths, 0x7FFFFF80));
      ChangeLengthsLate(lengths, c.lengths[0]);
      DecodeAttention(key_codec, value_codec, args, nullptr);
      ExpectWithin(out, expected, allowed, launch);
      continue;
    }
    const Tensor late = at::bitwise_and(lengths, 0x7FFFFF80), late_values = at::bitwise_and(of_values, 0x7FFFFF80);
    if (args.early) {  // keys' and values' lengths that do not fit together must not lead astray, either
      lengths.sub_(late), of_values.sub_(late_values);
      Synchronize(lengths.device());
      of_values.add_(late_values), lengths.add_(late);
    }
    DecodeAttention(key_codec, value_codec, args, nullptr);
    ExpectWithin(out, expected, allowed, launch);
  }
  ExpectZero(workspace);
}

// All kernels first, as many at a time as there are processors; one by one they would take minutes.
void CheckAll(const std::vector<AttentionCase>& cases) {
  Prepare([&] {
    for (const AttentionCase& c : cases) {
      const SchemePair pair = ParseSpec(c.spec).schemes;
      DecodeAttentionArgs args;
      args.dtype = DTypeOf(c.dtype), args.query_heads = kKvHeads * c.ratio, args.window = c.window;
      args.keys.batch = static_cast<int64_t>(c.lengths.size()), args.keys.heads = kKvHeads, args.keys.head_dim = c.head_dim;
      args.keys.capacity = c.capacity(), args.values = args.keys, args.softcap = static_cast<float>(c.cap);
      args.key_params = ParamsOf(pair.keys->keys, c), args.value_params = ParamsOf(pair.values->values, c);
      args.value_lengths = c.values_encoded.empty() ? nullptr : c.lengths.data(), args.values_in_ring = c.ring;
      args.key_turn = TurnOf(pair.keys->keys, {}, c.head_dim), args.value_turn = TurnOf(pair.values->values, {}, c.head_dim);
      DecodeAttention(pair.keys->keys, pair.values->values, args, nullptr);
    }
  });
  for (const AttentionCase& c : cases) Check(c);
}

const std::vector<std::string> kSchemes = {"none", "int8-hqq", "int4-hqq", "int2-hqq", "int4-quanto", "int2-quanto"};

TEST(DecodeAttentionGpu, EqualsAttentionOverDecodedTokens) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(7);
  std::vector<AttentionCase> cases;
  for (const std::string& scheme : kSchemes) {
    const bool dense = FindScheme(scheme).stores_dense();
    for (const int64_t dim : {64, 128, 256}) {
      for (const int64_t group : {32, 64, 128}) {
        if (group > dim || (dense && group != 32)) continue;
        int32_t i = 0;
        for (const int64_t ratio : {1, 2, 3, 4, 7, 8, 16}) {
          ++i;
          for (const int32_t encoded : {0, 1, 63, 64, 129, 1000}) {
            if ((encoded + i) % 3 != 0 && (dim != 128 || group != 64)) continue;
            const std::vector<SequenceLength> one = {{encoded % 3, encoded, encoded == 0 ? 5 : (encoded * 7 + i) % 129}};
            cases.push_back({scheme, dim, group, ratio, one});
          }
        }
        cases.push_back({scheme, dim, group, 7, {{0, 4097, 17}, {4, 100, 128}, {0, 0, 0}}});
        cases.push_back({scheme, dim, group, 4, {{4, 1500, 100}, {0, 33, 0}}, at::kBFloat16});
      }
    }
  }
  CheckAll(cases);
}

TEST(DecodeAttentionGpu, EveryPairOfSchemes) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(9);
  std::vector<AttentionCase> cases;
  for (const std::string& keys : kSchemes) {
    for (const std::string& values : kSchemes) {
      if (keys == values) continue;
      const std::string spec = keys + "+" + values;
      cases.push_back({spec, 128, 64, 4, {{3, 1000, 40}, {0, 0, 5}, {8, 129, 0}}});
      cases.push_back({spec, 128, 64, 16, {{0, 700, 128}}, at::kBFloat16});
      cases.push_back({spec, 64, 64, 7, {{5, 97, 77}}});
      cases.push_back({spec, 256, 128, 2, {{0, 333, 1}}});
      cases.push_back({spec, 512, 64, 4, {{1, 200, 9}}});
    }
  }
  CheckAll(cases);
}

// Keys in groups of tokens; keys and values of which other tokens are encoded; and a ring of values.
std::vector<AttentionCase> ApartCases(const std::vector<int64_t>& dims) {
  std::vector<AttentionCase> cases;
  for (const int64_t dim : dims) {
    for (const char* spec : {"kivi-4", "kivi-2", "kivi-2+q8_0", "kivi-4+none", "kivi-2+int4-hqq"}) {
      cases.push_back({spec, dim, 64, 4, {{3, 992, 40}, {0, 0, 5}, {8, 128, 0}, {0, 32, 0}}});
      cases.push_back({spec, dim, 64, 7, {{0, 992, 100}}, at::kBFloat16, 700});
      cases.push_back({spec, dim, 64, 16, {{0, 704, 128}}, at::kBFloat16});
    }
    for (const char* spec : {"kivi-4", "kivi-2"}) {  // KIVI's own lengths
      cases.push_back({spec, dim, 64, 4, {{0, 1024, 41}, {0, 0, 65}, {0, 128, 1}}, at::kHalf, 0, {936, 0, 0}, true});
      cases.push_back({spec, dim, 64, 16, {{0, 256, 128}, {0, 128, 127}}, at::kBFloat16, 0, {255, 126}, true});
    }
    for (const char* spec : {"int4-hqq", "q4_0", "int8-hqq+q5_1", "nvfp4+int2-quanto"}) {
      cases.push_back({spec, dim, 64, 4, {{2, 500, 40}, {0, 64, 33}}, at::kBFloat16, 0, {540, 97}});
      cases.push_back({spec, dim, 64, 7, {{0, 420, 20}}, at::kHalf, 300, {401}});
    }
    for (const char* spec : {"none+int4-hqq", "none+kivi-2"}) {
      cases.push_back({spec, dim, 64, 4, {{0, 500, 40}, {0, 77, 120}}, at::kHalf, 0, {}, true});
    }
  }
  return cases;
}

TEST(DecodeAttentionGpu, TokensThatOneSideAloneHasEncoded) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(15);
  CheckAll(ApartCases({64, 128, 256}));
}
TEST(DecodeAttentionGpu, AFewShapesOfTokensThatOneSideAloneHasEncoded) {  // under a sanitizer
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(16);
  CheckAll(ApartCases({128}));
}

// Plain schemes, each with itself where it knows keys and values.
std::vector<std::string> PlainSpecs() {
  std::vector<std::string> specs = {"turboquant-k4+turboquant-v4", "turboquant-k3+turboquant-v3", "turboquant-k3-raw+q8_0",
                                    "q8_0+q4_0", "fp8-e4m3+turboquant-v4", "none+q5_1", "nvfp4+none", "int8-hqq+q4_0",
                                    "mxfp4+int4-quanto"};
  for (const Scheme& scheme : Schemes()) {
    if (scheme.keys.device.plain != nullptr && HasDecodeAttention(scheme.keys, scheme.values)) specs.push_back(scheme.name);
  }
  return specs;
}

// Of a shape that a scheme refuses, nothing.
void AddCase(std::vector<AttentionCase>& cases, AttentionCase c) {
  const SchemePair pair = ParseSpec(c.spec).schemes;
  for (const Codec* codec : {&pair.keys->keys, &pair.values->values}) {
    if (codec->planes == nullptr) continue;
    try {
      codec->planes(kKvHeads, c.head_dim, ParamsOf(*codec, c));
    } catch (const InputError&) {
      return;
    }
    if (codec->turned && c.head_dim != 64 && c.head_dim != 128 && c.head_dim != 256) return;
  }
  if (pair.values->values.turned) {
    for (SequenceLength& length : c.lengths) length = {0, length.encoded + length.residual, 0};
  }
  cases.push_back(std::move(c));
}

TEST(DecodeAttentionGpu, EveryPlainScheme) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(12);
  std::vector<AttentionCase> cases;
  for (const std::string& spec : PlainSpecs()) {
    AddCase(cases, {spec, 128, 64, 4, {{3, 1000, 40}, {0, 0, 5}, {8, 129, 0}, {0, 1, 0}}});
    AddCase(cases, {spec, 128, 64, 4, {{0, 1000, 100}}, at::kBFloat16, 700});
    AddCase(cases, {spec, 128, 64, 16, {{0, 700, 128}}, at::kBFloat16});
    AddCase(cases, {spec, 64, 64, 7, {{5, 97, 77}}});
    AddCase(cases, {spec, 256, 64, 2, {{0, 333, 1}}});
    AddCase(cases, {spec, 96, 32, 3, {{2, 300, 50}, {0, 0, 0}}, at::kBFloat16});
  }
  CheckAll(cases);
}

TEST(DecodeAttentionGpu, AFewShapesOfPlainSchemes) {  // under a sanitizer
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(14);
  std::vector<AttentionCase> cases;
  for (const char* spec : {"q8_0", "q5_1", "turboquant-k3+turboquant-v3", "iq4_nl", "fp8-e4m3", "nvfp4", "mxfp4", "int4-token",
                           "exl3-4", "q5_0+none", "int8-hqq+exl3-3"}) {
    AddCase(cases, {spec, 128, 64, 4, {{3, 200, 40}, {0, 0, 5}}});
    AddCase(cases, {spec, 64, 32, 7, {{0, 129, 0}}, at::kBFloat16, 90});
    AddCase(cases, {spec, 256, 128, 16, {{0, 100, 128}}});
    AddCase(cases, {spec, 96, 32, 4, {{3, 100, 40}}});
  }
  CheckAll(cases);
}

// The newest token of each sequence encoded by attention: the bytes that the codec writes, those that a GPU's twin of it writes, and so
// attention's output, too. `rotation`: of sides that encode and are not turned by their scheme.
struct NewestCase {
  std::string spec;
  int64_t head_dim;
  at::ScalarType dtype = at::kHalf;
  Rotation rotation = {};
  int64_t ratio = 4;
  int32_t window = 0;
};

constexpr int64_t kNewestSequences = 4, kNewestCapacity = 832;

void CheckNewest(const NewestCase& c) {
  SCOPED_TRACE(StrCat(c.spec, " head_dim ", c.head_dim, " ", c.dtype, " ratio ", c.ratio, " window ", c.window, c.rotation ? " rotated" : ""));
  const SchemePair pair = ParseSpec(c.spec).schemes;
  const Codec* codecs[] = {&pair.keys->keys, &pair.values->values};
  // Turned tokens have no sinks beside them. Of the last sequence nothing is encoded yet: a sink is the newest.
  const int32_t sink = c.rotation || codecs[0]->turned || codecs[1]->turned ? 0 : 1;
  const std::vector<SequenceLength> counts = {{0, 1, 0}, {2 * sink, 301, 0}, {0, 800, 0}, {sink, 0, 0}};
  const int64_t batch = kNewestSequences, capacity = kNewestCapacity;
  std::vector<int32_t> numbers;
  for (const SequenceLength& length : counts) numbers.insert(numbers.end(), {length.sinks, length.encoded, length.residual});
  const Tensor lengths = at::tensor(numbers, at::kInt).cuda();
  const auto normal = [&](int64_t tokens) { return at::randn({batch, kKvHeads, tokens, c.head_dim}).to(c.dtype); };
  const Tensor queries = at::randn({batch, kKvHeads, c.ratio, c.head_dim}).to(c.dtype).cuda(), sinks = normal(kSinks).cuda();
  Tensor out = at::full_like(queries, NAN);
  DecodeAttentionArgs args{.dtype = DTypeOf(c.dtype), .query_heads = kKvHeads * c.ratio, .queries = queries.data_ptr(), .out = out.data_ptr(),
                           .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(c.head_dim))), .sink_keys = ViewOf(sinks),
                           .sink_values = ViewOf(sinks), .window = c.window, .lengths = reinterpret_cast<const SequenceLength*>(lengths.data_ptr()),
                           .newest_is_encoded = true};
  KvView* const views[] = {&args.keys, &args.values};
  Turn* const turns[] = {&args.key_turn, &args.value_turn};
  CodecParams* const params[] = {&args.key_params, &args.value_params};
  Tensor tokens[2], newest[2];
  EncodedTensors whole[2], found[2];
  for (int side = 0; side < 2; ++side) {
    const Codec& codec = *codecs[side];
    // Whole numbers, in which the largest magnitude is there several times, with both signs; and others.
    tokens[side] = at::cat({normal(capacity / 2), at::randint(-3, 4, {batch, kKvHeads, capacity / 2, c.head_dim}).to(c.dtype)}, 2);
    tokens[side][1].select(1, counts[1].encoded - 1).narrow(1, 0, c.head_dim / 2).zero_();  // a newest one with groups of zeros
    if (codec.encode == nullptr) {
      tokens[side] = tokens[side].cuda();
      views[side]->batch = batch, views[side]->heads = kKvHeads, views[side]->head_dim = c.head_dim, views[side]->capacity = capacity;
      views[side]->planes[0] = static_cast<std::byte*>(tokens[side].data_ptr());
      views[side]->plane_stride[0] = tokens[side].stride(1) * 2;
      continue;
    }
    // Values are turned otherwise than keys: one encoder's instructions serve both.
    const Rotation rotation = codec.turned || !c.rotation ? Rotation() : side == 0 ? c.rotation : Rotation{Rotation::kHadamard, 32};
    *params[side] = {.group_size = codec.default_group}, *turns[side] = TurnOf(codec, rotation, c.head_dim);
    const auto allocate = [&](at::Device device) {
      return AllocateEncoded(codec, *params[side], batch, kKvHeads, c.head_dim, capacity, codec.min_block_tokens, device);
    };
    EncodedTensors on_cpu = allocate(at::kCPU);
    EncodeRotated(codec, *params[side], rotation, tokens[side], 0, on_cpu.view());
    whole[side] = on_cpu, found[side] = on_cpu;
    for (Tensor& plane : whole[side].planes) plane = plane.cuda();
    for (Tensor& plane : found[side].planes) plane = plane.cuda();
    *views[side] = whole[side].view();
    if (!DecodeAttentionEncodes(codec, c.head_dim)) continue;
    newest[side] = normal(1);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t slot = counts[static_cast<size_t>(b)].encoded - 1;
      if (slot < 0) continue;
      newest[side][b].copy_(tokens[side][b].narrow(1, slot, 1));
      for (Tensor& plane : found[side].planes) plane.view({batch, kKvHeads, capacity, -1})[b].select(1, slot).fill_(0xA5);
    }
    newest[side] = newest[side].cuda();
  }
  const Tensor workspace = at::zeros({DecodeAttentionWorkspace(*codecs[0], *codecs[1], args)}, queries.options().dtype(at::kByte));
  args.workspace = workspace.data_ptr();
  const auto read = [&](const EncodedTensors (&from)[2], bool encodes) {
    for (int side = 0; side < 2; ++side) {
      if (codecs[side]->encode != nullptr) *views[side] = from[side].view();
    }
    args.newest_keys = encodes && newest[0].defined() ? newest[0].data_ptr() : nullptr;
    args.newest_values = encodes && newest[1].defined() ? newest[1].data_ptr() : nullptr;
    out.fill_(NAN);
    DecodeAttention(*codecs[0], *codecs[1], args, nullptr);
    return out.cpu();
  };
  const Tensor expected = read(whole, false);
  EXPECT_FALSE(expected.isnan().any().item<bool>());
  for (const bool early : {false, true}) {
    args.early = early;
    EXPECT_TRUE(read(found, true).equal(expected)) << "early " << early;
    for (int side = 0; side < 2; ++side) {
      for (size_t p = 0; p < found[side].planes.size(); ++p) {
        EXPECT_TRUE(found[side].planes[p].equal(whole[side].planes[p])) << "early " << early << " side " << side << " plane " << p;
      }
      if (!newest[side].defined()) continue;
      for (int64_t b = 0; b < batch; ++b) {  // not there any more
        const int64_t slot = counts[static_cast<size_t>(b)].encoded - 1;
        for (Tensor& plane : found[side].planes) {
          if (slot >= 0) plane.view({batch, kKvHeads, capacity, -1})[b].select(1, slot).fill_(0x5A);
        }
      }
    }
  }
  ExpectZero(workspace);
}

// Of a shape that a scheme refuses, nothing; all kernels first.
void CheckAllNewest(const std::vector<NewestCase>& cases) {
  std::vector<NewestCase> known;
  for (const NewestCase& c : cases) {
    const SchemePair pair = ParseSpec(c.spec).schemes;
    try {
      for (const Codec* codec : {&pair.keys->keys, &pair.values->values}) {
        if (codec->planes != nullptr) codec->planes(kKvHeads, c.head_dim, {.group_size = codec->default_group});
      }
      known.push_back(c);
    } catch (const InputError&) {
    }
  }
  ASSERT_FALSE(known.empty());
  alignas(16) static const float there[4] = {};
  Prepare([&] {
    for (const NewestCase& c : known) {
      const SchemePair pair = ParseSpec(c.spec).schemes;
      const Codec &keys = pair.keys->keys, &values = pair.values->values;
      DecodeAttentionArgs args;
      args.dtype = DTypeOf(c.dtype), args.query_heads = kKvHeads * c.ratio, args.window = c.window, args.newest_is_encoded = true;
      args.keys.batch = kNewestSequences, args.keys.heads = kKvHeads, args.keys.head_dim = c.head_dim;
      args.keys.capacity = kNewestCapacity, args.values = args.keys;
      args.key_params.group_size = keys.default_group, args.value_params.group_size = values.default_group;
      if (keys.encode != nullptr) args.key_turn = TurnOf(keys, keys.turned ? Rotation() : c.rotation, c.head_dim);
      if (values.encode != nullptr) args.value_turn = TurnOf(values, values.turned ? Rotation() : c.rotation, c.head_dim);
      DecodeAttention(keys, values, args, nullptr);
      if (DecodeAttentionEncodes(keys, c.head_dim)) args.newest_keys = there;
      if (DecodeAttentionEncodes(values, c.head_dim)) args.newest_values = there;
      DecodeAttention(keys, values, args, nullptr);
    }
  });
  for (const NewestCase& c : known) CheckNewest(c);
}

TEST(DecodeAttentionGpu, EncodesTheNewestToken) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(17);
  std::vector<NewestCase> cases;
  for (const std::string& spec : PlainSpecs()) {
    cases.push_back({spec, 128});
    cases.push_back({spec, 128, at::kBFloat16, {}, 7});
    for (const int64_t dim : {64, 256}) cases.push_back({spec, dim, dim == 64 ? at::kHalf : at::kBFloat16, {}, 1});
  }
  for (const char* spec : {"q4_0", "none+q8_0", "int4-token+none", "iq4_nl"}) {
    cases.push_back({spec, 128, at::kHalf, {Rotation::kHadamard}, 16});
    cases.push_back({spec, 64, at::kBFloat16, {Rotation::kSigns}, 4, 200});
  }
  CheckAllNewest(cases);
}

TEST(DecodeAttentionGpu, EncodesTheNewestTokenOfAFewShapes) {  // under a sanitizer
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(18);
  std::vector<NewestCase> cases;
  for (const char* spec : {"q8_0", "turboquant-k3+turboquant-v3", "none+iq4_nl", "exl3-4"}) cases.push_back({spec, 128});
  cases.push_back({"q4_0", 64, at::kBFloat16, {Rotation::kHadamard}, 7});
  cases.push_back({"iq4_nl", 64});  // two groups, of a warp that has lanes for four
  CheckAllNewest(cases);
}

// Heads that attention norms and turns itself are those of AppendHeads, and so is all that comes of them, bit for bit.
TEST(DecodeAttentionGpu, MakesHeadsOfAFewShapes) {  // under a sanitizer
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(23);
  const Codec& codec = FindScheme("none").keys;
  struct Case {
    int64_t dim, ratio;
    at::ScalarType dtype;
    bool has_bias, norms_values;
    int64_t turned;  // 0: all
    int32_t window;
    int32_t tokens = 2100;  // of the first sequence: blocks in clusters, of many they are not
  };
  const std::vector<Case> cases = {{128, 8, at::kHalf, false, false, 0, 0}, {128, 4, at::kBFloat16, true, true, 64, 0},
                                   {64, 1, at::kHalf, true, false, 0, 0},   {64, 16, at::kBFloat16, false, true, 32, 100},
                                   {256, 2, at::kBFloat16, false, true, 0, 300}, {128, 24, at::kHalf, false, false, 0, 0},
                                   {256, 8, at::kHalf, true, false, 128, 0}, {128, 8, at::kHalf, false, false, 0, 0, 9000},
                                   // Too few for blocks to ask for tiles before they know the lengths.
                                   {128, 8, at::kHalf, false, false, 0, 0, 600}, {256, 2, at::kBFloat16, false, true, 0, 0, 300}};
  constexpr int64_t batch = 3;
  const auto arguments = [&](const Case& c) {
    DecodeAttentionArgs args;
    args.dtype = DTypeOf(c.dtype), args.query_heads = kKvHeads * c.ratio, args.window = c.window, args.scale = 0.1f;
    args.keys.batch = batch, args.keys.heads = kKvHeads, args.keys.head_dim = c.dim, args.keys.capacity = c.tokens + 12;
    args.values = args.keys;
    args.heads = {.dtype = args.dtype, .rows = batch, .heads = args.query_heads, .kv_heads = kKvHeads, .head_dim = c.dim, .eps = 1e-6f,
                  .turned = c.turned};
    return args;
  };
  Prepare([&] {
    alignas(16) static const float there[4] = {};
    for (const Case& c : cases) {
      DecodeAttentionArgs args = arguments(c);
      DecodeAttention(codec, codec, args, nullptr);
      args.made_of = there;
      DecodeAttention(codec, codec, args, nullptr);
    }
  });
  for (const Case& c : cases) {
    SCOPED_TRACE(StrCat("head_dim ", c.dim, ", ", c.ratio, " heads a KV head, window ", c.window, ", ", c.tokens, " tokens, ", c.dtype));
    const at::TensorOptions options = at::TensorOptions(c.dtype).device(at::kCUDA), floats = options.dtype(at::kFloat);
    const int64_t heads = kKvHeads * c.ratio, all = heads + 2 * kKvHeads;
    const Tensor made_of = at::randn({batch, all, c.dim}, options) * 3, bias = at::randn({all, c.dim}, options);
    const Tensor q_norm = at::rand({c.dim}, floats), k_norm = at::rand({c.dim}, floats), v_norm = at::rand({c.dim}, floats);
    const Tensor angles = at::randn({c.dim / 2}, floats), cos = angles.cos(), sin = angles.sin();
    const Tensor queries = at::full({batch, heads, c.dim}, NAN, options), out = at::full_like(queries, NAN);
    DecodeAttentionArgs args = arguments(c);
    const Tensor before = at::randn({2, batch, kKvHeads, args.keys.capacity, c.dim}, options);
    const std::vector<int32_t> counts = {c.tokens, 1, 129};
    // What is read ahead of the lengths is anything behind the tokens.
    for (int64_t b = 0; b < batch; ++b) before.select(1, b).narrow(2, counts[b], args.keys.capacity - counts[b]).fill_(NAN);
    const Tensor there = at::tensor({0, counts[0], 0, 0, counts[1], 0, 0, counts[2], 0}, at::kInt).cuda();
    args.lengths = static_cast<const SequenceLength*>(there.data_ptr()), args.out = out.data_ptr();
    args.heads.bias = c.has_bias ? bias.data_ptr() : nullptr, args.heads.cos = cos.data_ptr<float>(), args.heads.sin = sin.data_ptr<float>();
    args.heads.q_norm = q_norm.data_ptr<float>(), args.heads.k_norm = k_norm.data_ptr<float>();
    args.heads.v_norm = c.norms_values ? v_norm.data_ptr<float>() : nullptr;
    args.made_of = made_of.data_ptr();
    const Tensor workspace = at::zeros({DecodeAttentionWorkspace(codec, codec, args)}, options.dtype(at::kByte));
    args.workspace = workspace.data_ptr();
    const auto read = [&](const Tensor& tokens, bool makes, bool early) {
      for (const auto& [view, side] : {std::pair(&args.keys, tokens[0]), std::pair(&args.values, tokens[1])}) {
        view->planes[0] = static_cast<std::byte*>(side.data_ptr()), view->plane_stride[0] = view->capacity * c.dim * 2;
      }
      args.early = early, args.queries = makes ? nullptr : queries.data_ptr(), args.made_of = makes ? made_of.data_ptr() : nullptr;
      out.fill_(NAN);
      DecodeAttention(codec, codec, args, nullptr);
      return out.clone();
    };
    const Tensor appended = before.clone();
    const auto token = [&](const Tensor& tokens) {
      return NewToken{.sinks = {}, .tail = ViewOf(tokens), .dense = true, .lengths = args.lengths};
    };
    AppendHeads({.of = args.heads, .queries = queries.data_ptr(), .keys = token(appended[0]), .values = token(appended[1])},
                made_of.data_ptr(), nullptr);
    EXPECT_FALSE(appended.equal(before));
    const Tensor expected = read(appended, false, false);
    EXPECT_FALSE(expected.isnan().any().item<bool>());
    for (const bool early : {false, true}) {
      const Tensor found = before.clone();
      EXPECT_TRUE(read(found, true, early).equal(expected)) << "early " << early;
      EXPECT_TRUE(found.nan_to_num(7).equal(appended.nan_to_num(7))) << "early " << early;
    }
    ExpectZero(workspace);
  }
}

// A token whose numbers are not finite makes what reads it NaN, also where its codes alone say so.
TEST(DecodeAttentionGpu, WhatIsNotANumberStaysSo) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(13);
  for (const char* name : {"fp8-e4m3", "fp8-e5m2", "q8_0", "nvfp4", "mxfp4", "lmdeploy-4", "int4-token", "turboquant-v4"}) {
    const Codec& codec = FindScheme(name).values;
    const AttentionCase c{name, 128, 64, 4, {}};
    for (const int64_t broken : {-1, 0, 77, 198}) {
      const CodecParams params = ParamsOf(codec, c);
      Tensor tokens = at::randn({1, kKvHeads, 200, 128}, at::kCPU).to(at::kHalf);
      if (broken >= 0) tokens[0][1][broken][5] = NAN;
      EncodedTensors encoded = Encode(codec, params, tokens, 1);
      for (Tensor& plane : encoded.planes) plane = plane.cuda();
      const Tensor queries = at::randn({1, kKvHeads, 4, 128}).to(at::kHalf).cuda();
      Tensor out = at::full_like(queries, 7);
      const Tensor lengths = at::tensor({0, 199, 0}, at::kInt).cuda();
      DecodeAttentionArgs args{.dtype = DType::kFloat16, .query_heads = kKvHeads * 4, .queries = queries.data_ptr(),
                               .out = out.data_ptr(), .keys = encoded.view(), .values = encoded.view(),
                               .key_params = params, .value_params = params,
                               .lengths = reinterpret_cast<const SequenceLength*>(lengths.data_ptr())};
      const Tensor workspace = at::zeros({DecodeAttentionWorkspace(codec, codec, args)}, queries.options().dtype(at::kByte));
      args.workspace = workspace.data_ptr();
      DecodeAttention(codec, codec, args, nullptr);
      const Tensor nan = out.isnan().cpu();
      EXPECT_FALSE(nan[0][0].any().item<bool>()) << name << ", " << broken;
      EXPECT_EQ(nan[0][1].any().item<bool>(), broken >= 0) << name << ", token " << broken;
      ExpectZero(workspace);
    }
  }
}

// A window that ends within the residual, the encoded tokens and the sinks, and one that hides nothing.
TEST(DecodeAttentionGpu, SlidingWindows) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(10);
  std::vector<AttentionCase> cases;
  for (const char* spec : {"none", "int4-hqq", "int8-hqq+int2-hqq", "none+int4-quanto", "int4-hqq+none"}) {
    for (const int32_t window : {1, 37, 40, 41, 128, 500, 1038, 1041, 1043, 5000}) {
      for (const int64_t dim : {64, 128, 256, 512}) {
        if (dim != 128 && window % 2 == 0) continue;
        cases.push_back(
            {spec, dim, 64, 4, {{3, 1000, 40}, {0, 20, 3}}, window % 3 == 0 ? at::kHalf : at::kBFloat16, window});
      }
    }
  }
  CheckAll(cases);
}

// A cap on logits, which are up to four or so here, and a logit a head that has no value: Gemma 2's and gpt-oss's attention.
TEST(DecodeAttentionGpu, CapsLogitsAndCountsSinkLogits) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(16);
  std::vector<AttentionCase> cases;
  for (const char* spec : {"none", "int8-hqq", "int4-hqq", "none+int4-quanto", "int4-hqq+none", "q8_0", "kivi-2"}) {
    for (const int64_t dim : {64, 128, 256, 96}) {
      for (const auto& [cap, sinks] : {std::pair(1.5, false), std::pair(0.0, true), std::pair(2.0, true)}) {
        if (dim == 96 && std::string(spec) == "kivi-2") continue;
        AttentionCase c{spec, dim, 32, 8, {{3, 960, 40}, {0, 0, 5}, {0, 0, 0}}, at::kHalf, dim == 64 ? 128 : 0};
        c.cap = cap, c.sinks = sinks;
        cases.push_back(c);
        c.ratio = 2, c.dtype = at::kBFloat16, c.lengths = {{0, 96, 0}};
        cases.push_back(c);
      }
    }
  }
  CheckAll(cases);
}

// What has no tiles of its own: other head_dims; and more query heads a KV head than a block takes.
TEST(DecodeAttentionGpu, AnyShape) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(11);
  std::vector<AttentionCase> cases;
  for (const std::string& scheme : kSchemes) {
    const bool dense = scheme == "none", two_bits = scheme.starts_with("int2");
    for (const int64_t dim : {32, 80, 96, 192, 320, 512}) {
      if (!dense && (dim % 32 != 0 || (two_bits && dim % 64 != 0))) continue;
      for (const int64_t ratio : {1, 3, 4, 8}) {
        cases.push_back(
            {scheme, dim, 32, ratio, {{2, 300, 50}, {0, 0, 0}, {8, 1, 128}}, ratio == 3 ? at::kBFloat16 : at::kHalf});
      }
    }
    cases.push_back({scheme, 128, 64, 24, {{0, 1000, 100}}});
    cases.push_back({scheme, 64, 32, 34, {{4, 50, 0}}});
  }
  CheckAll(cases);
}

// Every kind of code and every path once: what fits under a sanitizer.
TEST(DecodeAttentionGpu, AFewShapes) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(8);
  std::vector<AttentionCase> cases;
  for (const char* spec : {"none", "int8-hqq", "int4-hqq", "int2-hqq", "int4-quanto", "int8-hqq+int4-hqq",
                           "none+int4-quanto", "int2-hqq+none"}) {
    cases.push_back({spec, 128, 64, 4, {{3, 200, 40}, {0, 0, 5}}});
    cases.push_back({spec, 64, 32, 7, {{0, 129, 0}}, at::kBFloat16});
    cases.push_back({spec, 256, 128, 16, {{0, 100, 128}}});
    cases.push_back({spec, 128, 64, 4, {{3, 200, 40}}, at::kHalf, 90});
    cases.push_back({spec, 512, 64, 4, {{3, 100, 40}}, at::kHalf, 90});
  }
  CheckAll(cases);
}

// So many tokens that blocks share the heads in the end, one each and two; and sequences whose blocks are clusters.
TEST(DecodeAttentionGpu, AFewShapesOfManyBlocks) {  // under a sanitizer
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(19);
  std::vector<AttentionCase> cases;
  for (const char* spec : {"none", "q8_0", "turboquant-k4+turboquant-v4"}) {
    for (const bool sinks : {false, true}) {
      for (AttentionCase c : {AttentionCase{spec, 128, 64, 7, {{3, 5200, 40}}}, AttentionCase{spec, 64, 64, 16, {{0, 5300, 0}}, at::kBFloat16},
                              AttentionCase{spec, 128, 64, 4, {{3, 1000, 40}, {0, 0, 5}, {0, 129, 0}, {0, 1, 0}}}}) {
        c.sinks = sinks;
        AddCase(cases, c);
      }
    }
  }
  CheckAll(cases);
}

TEST(DecodeAttention, RefusesWhatItDoesNotKnow) {
  const Codec& codec = FindScheme("int4-hqq").keys;
  DecodeAttentionArgs args;
  args.query_heads = 33;
  args.keys.batch = 1, args.keys.heads = 2, args.keys.head_dim = 128, args.keys.capacity = 100;
  args.values = args.keys, args.key_params = args.value_params = k64;
  const DeviceShape h100{132, 90, 232448, 233472};
  const auto bytes = [&] {
    int64_t result = 0;
    Gather(h100, [&] { result = DecodeAttentionWorkspace(codec, codec, args); });
    return result;
  };
  EXPECT_THROW(bytes(), InputError);  // 33 query heads for 2 KV heads
  args.query_heads = 8;
  EXPECT_GT(bytes(), 0);
  args.keys.head_dim = args.values.head_dim = 1024;
  EXPECT_THROW(bytes(), InputError);
  args.keys.head_dim = args.values.head_dim = 100;  // not in eights
  EXPECT_THROW(bytes(), InputError);
}

}  // namespace
}  // namespace kvq
