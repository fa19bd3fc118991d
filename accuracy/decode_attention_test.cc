// The fused decode attention of every scheme against attention in float64 over the tokens as the CPU decodes them.
#include <cmath>

#include "accuracy/encoded.h"
#include "fixtures/machine/device.h"
#include "kernels/device/attention.h"
#include "kernels/error.h"

namespace kvq {
namespace {

using at::Tensor;

struct AttentionCase {
  const char* scheme;
  int64_t head_dim, group, ratio;
  std::vector<SequenceLength> lengths;  // of each sequence
  at::ScalarType dtype = at::kHalf;
};

constexpr int64_t kKvHeads = 2, kSinks = 8, kResidual = 128;

// One side: tokens as they are before and behind the encoded ones, the encoded ones, and what the kernel should see,
// [batch, heads, capacity, head_dim]. `weight` bounds what a rounded probability is multiplied with.
struct Side {
  Tensor sinks, residual, dense;
  EncodedTensors encoded;
  Tensor decoded, weight;
};

Side MakeSide(const Codec& codec, bool dense, const AttentionCase& c, int64_t capacity) {
  const int64_t batch = static_cast<int64_t>(c.lengths.size());
  const auto normal = [&](int64_t tokens) {
    return at::randn({batch, kKvHeads, tokens, c.head_dim}, at::kCPU).to(c.dtype);
  };
  Side side;
  side.sinks = normal(kSinks), side.residual = normal(kResidual);
  const Tensor tokens = normal(capacity);
  side.decoded = tokens.to(at::kDouble), side.weight = side.decoded.abs();
  if (dense) {
    side.dense = tokens.cuda();
    for (int64_t b = 0; b < batch; ++b) {  // what lies behind the length must not be seen
      side.dense[b].narrow(1, c.lengths[b].encoded, capacity - c.lengths[b].encoded).fill_(NAN);
    }
  } else {
    const CodecParams params{.group_size = c.group};
    EncodedTensors on_cpu = Encode(codec, params, tokens, 1);
    Tensor decoded = at::empty({batch, kKvHeads, capacity, c.head_dim}, at::kFloat);
    DecodeTensor(codec, params, on_cpu, 0, decoded);
    side.decoded = decoded.to(at::kDouble);
    // p scale is rounded and meets a code: at most 2^bits - 1 of them.
    side.weight = on_cpu.planes[1].view(at::kHalf).to(at::kDouble).abs().mul((1 << codec.bits) - 1)
                      .view({batch, kKvHeads, capacity, c.head_dim / c.group})
                      .repeat_interleave(c.group, 3);
    const int64_t groups = c.head_dim / c.group;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t first = c.lengths[b].encoded;
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

void Check(const AttentionCase& c) {
  SCOPED_TRACE(StrCat(c.scheme, " head_dim ", c.head_dim, " group ", c.group, " ratio ", c.ratio, " lengths ",
                      c.lengths[0].sinks, "/", c.lengths[0].encoded, "/", c.lengths[0].residual, " of ",
                      c.lengths.size(), " ", c.dtype));
  const Scheme& scheme = FindScheme(c.scheme);
  const bool dense = scheme.stores_dense();
  const int64_t batch = static_cast<int64_t>(c.lengths.size());
  int64_t capacity = 8;
  for (const SequenceLength& length : c.lengths) capacity = std::max<int64_t>(capacity, (length.encoded + 15) / 8 * 8);
  Side keys = MakeSide(scheme.keys, dense, c, capacity), values = MakeSide(scheme.values, dense, c, capacity);
  const Tensor queries = at::randn({batch, kKvHeads, c.ratio, c.head_dim}).to(c.dtype);
  const double scale = 1 / std::sqrt(static_cast<double>(c.head_dim));

  // What is right, and how far off rounding may leave it: the output once, the weight p scale of each token once
  // (and for 16-bit tokens p itself), all to 11 bits, or 8 for bfloat16 numbers.
  const double half = std::ldexp(1, -11), roundoff = c.dtype == at::kHalf ? half : std::ldexp(1, -8);
  Tensor expected = at::zeros({batch, kKvHeads, c.ratio, c.head_dim}, at::kDouble), allowed = at::zeros_like(expected);
  for (int64_t b = 0; b < batch; ++b) {
    const SequenceLength& length = c.lengths[b];
    const auto all = [&](const Side& side, const Tensor& encoded) {
      return at::cat({side.sinks[b].narrow(1, 0, length.sinks).to(at::kDouble), encoded[b].narrow(1, 0, length.encoded),
                      side.residual[b].narrow(1, 0, length.residual).to(at::kDouble)}, 1);
    };
    if (length.sinks + length.encoded + length.residual == 0) continue;
    const Tensor p = at::softmax(
        at::matmul(queries[b].to(at::kDouble), all(keys, keys.decoded).transpose(1, 2)) * scale, -1);
    expected[b].copy_(at::matmul(p, all(values, values.decoded)));
    const Tensor in_codes = all(values, values.weight).abs(), as_are = all(values, at::zeros_like(values.weight)).abs();
    allowed[b].copy_(roundoff * expected[b].abs() + (dense ? roundoff : half) * at::matmul(p, in_codes) +
                     (dense ? 0 : roundoff) * at::matmul(p, as_are));
  }

  std::vector<int32_t> counts;
  for (const SequenceLength& length : c.lengths) {
    counts.insert(counts.end(), {length.sinks, length.encoded, length.residual});
  }
  const Tensor lengths = at::tensor(counts, at::kInt).cuda(), on_gpu = queries.cuda();
  for (Side* side : {&keys, &values}) side->sinks = side->sinks.cuda(), side->residual = side->residual.cuda();
  const auto view = [&](const Side& side) {
    if (!dense) return side.encoded.view();
    KvView v;
    v.batch = batch, v.heads = kKvHeads, v.head_dim = c.head_dim, v.capacity = capacity;
    v.planes[0] = static_cast<std::byte*>(side.dense.data_ptr());
    v.plane_stride[0] = side.dense.stride(1) * 2;
    return v;
  };
  Tensor out = at::full(queries.sizes(), NAN, on_gpu.options());
  DecodeAttentionArgs args{.dtype = DTypeOf(c.dtype),
                           .query_heads = kKvHeads * c.ratio,
                           .queries = on_gpu.data_ptr(),
                           .out = out.data_ptr(),
                           .scale = static_cast<float>(scale),
                           .keys = view(keys),
                           .values = view(values),
                           .key_params = {.group_size = c.group},
                           .value_params = {.group_size = c.group},
                           .sink_keys = ViewOf(keys.sinks),
                           .sink_values = ViewOf(values.sinks),
                           .residual_keys = ViewOf(keys.residual),
                           .residual_values = ViewOf(values.residual),
                           .lengths = reinterpret_cast<const SequenceLength*>(lengths.data_ptr())};
  const DecodeAttention& attention = scheme.decode_attention;
  const Tensor workspace = at::zeros({attention.workspace_bytes(args)}, on_gpu.options().dtype(at::kByte));
  args.workspace = workspace.data_ptr();
  // A workspace serves again; and early, behind a kernel that changes the lengths.
  for (int launch = 0; launch < 3; ++launch) {
    out.fill_(NAN);
    args.early = launch == 2;
    const Tensor late = at::bitwise_and(lengths, 0x7FFFFF80);
    if (args.early) {
      lengths.sub_(late);
      Synchronize(lengths.device());
      lengths.add_(late);
    }
    attention.run(args, nullptr);
    const Tensor error = (out.cpu().to(at::kDouble) - expected).abs();
    EXPECT_TRUE(error.le(allowed + 1e-30).all().item<bool>())
        << "launch " << launch << ": " << (error / (allowed + 1e-30)).max().item<double>() << " of what is allowed";
  }
}

TEST(DecodeAttentionGpu, EqualsAttentionOverDecodedTokens) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(7);
  for (const char* scheme : {"none", "int8-hqq", "int4-hqq", "int2-hqq"}) {
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
            Check({scheme, dim, group, ratio, one});
          }
        }
        Check({scheme, dim, group, 7, {{0, 4097, 17}, {4, 100, 128}, {0, 0, 0}}});
        Check({scheme, dim, group, 4, {{4, 1500, 100}, {0, 33, 0}}, at::kBFloat16});
      }
    }
  }
}

// Every kind of code and every path once: what fits under a sanitizer.
TEST(DecodeAttentionGpu, AFewShapes) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(8);
  for (const char* scheme : {"none", "int8-hqq", "int4-hqq", "int2-hqq"}) {
    Check({scheme, 128, 64, 4, {{3, 200, 40}, {0, 0, 5}}});
    Check({scheme, 64, 32, 7, {{0, 129, 0}}, at::kBFloat16});
    Check({scheme, 256, 128, 16, {{0, 100, 128}}});
  }
}

TEST(DecodeAttentionGpu, RefusesWhatItDoesNotKnow) {
  KVQ_NEEDS_CUDA();
  const DecodeAttention& attention = FindScheme("int4-hqq").decode_attention;
  DecodeAttentionArgs args{.query_heads = 34};
  args.keys.batch = args.keys.heads = 1, args.keys.head_dim = 128, args.key_params = args.value_params = k64;
  EXPECT_THROW(attention.workspace_bytes(args), InputError);  // 34 query heads a KV head
  args.query_heads = 4, args.keys.head_dim = 80;
  EXPECT_THROW(attention.workspace_bytes(args), InputError);
}

}  // namespace
}  // namespace kvq
