// The host's kernels of a decoding step against float64.
#include <array>
#include <cmath>
#include <optional>

#include "accuracy/encoded.h"
#include "accuracy/mixture.h"
#include "accuracy/relative_error.h"
#include "fixtures/cache/spec.h"
#include "kernels/error.h"
#include "kernels/host/experts.h"
#include "kernels/host/step.h"

namespace kvq {
namespace {

using at::Tensor;

// A sum of n products in float32 is off by at most n roundoffs of the sum of their magnitudes.
TEST(Host, ProductsEqualFloat64) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  at::manual_seed(3);
  for (const at::ScalarType type : {at::kFloat, at::kHalf, at::kBFloat16}) {
    for (const auto& [out, in] : std::vector<std::pair<int64_t, int64_t>>{{1, 8}, {33, 64}, {100, 1000}, {67, 577}, {40, 4096}}) {
      const Tensor weight = at::randn({out, in}).to(type);
      for (const int64_t rows : {1, 2, 3, 4, 5, 8, 9, 17, 250}) {
        const Tensor x = at::randn({rows, in}).to(type);
        const Tensor w64 = weight.to(at::kDouble), x64 = x.to(at::kDouble);
        const Tensor exact = at::matmul(x64, w64.t());
        const Tensor allowed = exact.abs() * Roundoff(type) +
                               at::matmul(x64.abs(), w64.abs().t()) * (static_cast<double>(in) * 0x1p-24);
        Tensor stored = at::full({rows, out}, NAN, x.options());
        ProductArgs args;
        args.dtype = DTypeOf(type), args.rows = rows, args.in = in, args.out = out;
        args.weight = weight.data_ptr(), args.x = x.data_ptr(), args.stored = stored.data_ptr();
        host::Product(args);
        EXPECT_TRUE((stored.to(at::kDouble) - exact).abs().le(allowed).all().item<bool>())
            << type << " " << out << " x " << in << ", " << rows << " rows";
      }
    }
  }
}

// As StepGpu's (accuracy/step_test.cc); of float32 the sums' own error is seen.
TEST(Host, ExpertsEqualFloat64) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  at::manual_seed(19);
  for (const at::ScalarType type : {at::kFloat, at::kHalf, at::kBFloat16}) {
    for (const auto& [rows, hidden, size, experts, per_token] :
         std::vector<std::array<int64_t, 5>>{{1, 128, 64, 16, 3}, {3, 512, 192, 40, 6}, {11, 36, 20, 5, 2}, {2, 64, 128, 1, 1}}) {
      for (const auto& [normalized, biases] : {std::pair(false, false), std::pair(true, false), std::pair(true, true)}) {
        Mixture mixture(rows, hidden, size, experts, per_token, normalized, at::TensorOptions(type));
        if (biases) mixture.WithBiases();
        if (rows == 3 && !biases) mixture.logits[1].zero_(), mixture.logits[2].narrow(0, 30, 5).fill_(-0.0);
        Tensor out = at::full({rows, hidden}, NAN, mixture.x.options());
        host::Experts(mixture.args(), out.data_ptr());
        const Tensor exact = mixture.Exact();
        const double error = ((out.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
        EXPECT_LT(error, type == at::kFloat ? 1e-6 : (4 + 4 * 1.13) * Roundoff(type)) << type << " " << rows << " rows of " << hidden;
        EXPECT_TRUE(mixture.chosen.to(at::kLong).equal(mixture.Chosen()));
        EXPECT_EQ(mixture.reads.item<int64_t>(), std::get<0>(at::_unique(mixture.Chosen())).numel());
      }
    }
  }
}

// The first of the largest, NaN above all, wherever it is among some thousand; a cap is written for all of them.
TEST(Host, PicksTheLargestLogit) {
  constexpr int64_t kVocabulary = 2500;
  const auto pick = [&](const std::vector<std::pair<int64_t, float>>& numbers, float rest, float cap) {
    std::vector<float> logits(kVocabulary, rest), capped(kVocabulary, -7);
    for (const auto& [at, number] : numbers) logits[static_cast<size_t>(at)] = number;
    int64_t token = -1, history = -1;
    int32_t step = 1;
    host::PickTokens({.dtype = DType::kFloat32, .state = {.tokens = &token, .history = &history, .step = &step}, .batch = 1,
                      .vocabulary = kVocabulary, .logits = logits.data(), .cap = cap, .capped = capped.data()});
    EXPECT_EQ(history, token);
    for (size_t i = 0; cap > 0 && i < capped.size(); ++i) {
      if (!std::isnan(logits[i])) EXPECT_NEAR(capped[i], cap * std::tanh(logits[i] / cap), 1e-6) << i;
    }
    return token;
  };
  for (const float cap : {0.0f, 3.0f}) {
    EXPECT_EQ(pick({{1023, 2}, {1024, 2}, {2499, 2}}, -1, cap), 1023);
    EXPECT_EQ(pick({{5, 1}, {2499, 2}}, -1, cap), 2499);
    EXPECT_EQ(pick({{5, 2}, {1500, NAN}, {1600, NAN}, {2499, 9}}, -1, cap), 1500);
    EXPECT_EQ(pick({{0, NAN}, {2000, 9}}, -1, cap), 0);
    EXPECT_EQ(pick({}, -INFINITY, cap), 0);
  }
}

struct Side {
  Tensor sinks, residual, dense;  // dense: all tokens where the side is, else undefined
  EncodedTensors encoded;
  Tensor decoded;  // what attention should see of the encoded ones, float64
};

constexpr int64_t kKvHeads = 2, kSinks = 8, kResidual = 40;

// `beside`: the type of sinks and residual.
Side MakeSide(const Codec& codec, bool other_dense, int64_t group, int64_t dim, at::ScalarType type, at::ScalarType beside,
              const SequenceLength& length) {
  const int64_t block = codec.block_wide ? std::max<int64_t>(64, codec.min_block_tokens) : 1;
  const int64_t capacity = (length.encoded + 128) / 128 * 128;
  const auto normal = [&](int64_t tokens) { return at::randn({2, kKvHeads, tokens, dim}).to(type); };
  Side side;
  side.sinks = normal(kSinks).to(beside), side.residual = normal(kResidual).to(beside);
  const Tensor tokens = normal(capacity);
  if (codec.encode == nullptr) {
    side.decoded = tokens.to(at::kDouble);
    side.dense = at::cat({tokens, normal(kResidual)}, 2);
    side.dense.narrow(2, length.encoded, side.dense.size(2) - length.encoded).fill_(NAN);
    if (!other_dense) side.dense.narrow(2, length.encoded, kResidual).copy_(side.residual);
    return side;
  }
  const CodecParams params{.group_size = group};
  side.encoded = Encode(codec, params, tokens, block);
  Tensor decoded = at::empty(tokens.sizes(), at::kFloat);
  DecodeTensor(codec, params, side.encoded, 0, decoded);
  side.decoded = decoded.to(at::kDouble);
  return side;
}

void CheckAttention(const std::string& spec, int64_t dim, int64_t group, int64_t ratio, at::ScalarType type,
                    const SequenceLength& length, int32_t window, double cap = 0, bool sinks = false, int64_t value_group = 0,
                    std::optional<at::ScalarType> beside = std::nullopt) {
  const SchemePair pair = ParseSpec(spec).schemes;
  const Codec &key_codec = pair.keys->keys, &value_codec = pair.values->values;
  if (value_group == 0) value_group = group;
  for (const auto& [codec, size] : {std::pair(&key_codec, group), std::pair(&value_codec, value_group)}) {
    if (codec->planes == nullptr) continue;
    try {
      codec->planes(kKvHeads, dim, {.group_size = size});
    } catch (const InputError&) {
      return;  // a shape that the scheme refuses
    }
  }
  const bool keys_dense = key_codec.encode == nullptr, values_dense = value_codec.encode == nullptr;
  const Side keys = MakeSide(key_codec, values_dense, group, dim, type, beside.value_or(type), length);
  const Side values = MakeSide(value_codec, keys_dense, value_group, dim, type, beside.value_or(type), length);
  const Tensor queries = at::randn({2, kKvHeads, ratio, dim}).to(type);
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  const int64_t tokens = length.sinks + length.encoded + length.residual;
  const int64_t hidden = window > 0 ? std::max<int64_t>(tokens - window, 0) : 0;
  const auto all = [&](const Side& side) {
    return at::cat({side.sinks.narrow(2, 0, length.sinks).to(at::kDouble), side.decoded.narrow(2, 0, length.encoded),
                    side.residual.narrow(2, 0, length.residual).to(at::kDouble)}, 2)
        .narrow(2, hidden, tokens - hidden);
  };
  const Tensor sink_logits = at::randn({kKvHeads * ratio}) * 2;
  Tensor expected = at::zeros({2, kKvHeads, ratio, dim}, at::kDouble), allowed = at::zeros_like(expected);
  if (tokens > 0) {
    Tensor logits = at::matmul(queries.to(at::kDouble), all(keys).transpose(2, 3)) * scale;
    if (cap > 0) logits = at::tanh(logits / cap) * cap;
    if (sinks) logits = at::cat({logits, sink_logits.to(at::kDouble).view({1, kKvHeads, ratio, 1}).expand({2, -1, -1, 1})}, 3);
    const Tensor p = at::softmax(logits, -1).narrow(3, 0, tokens - hidden);
    expected = at::matmul(p, all(values));
    // A logit is a float32 sum of dim products (some roundoffs of their magnitudes, in powers of two), and what it is off by
    // is a share of p; so is the 2e-7 of Exponentials, of p and of its sum, and what the order of some hundred
    // tokens does to that, 6e-7; a cap is off by some of its roundoffs; the output is a float32 sum, and rounded once.
    const Tensor magnitudes = at::matmul(queries.to(at::kDouble).abs(), all(keys).abs().transpose(2, 3)) * scale;
    const Tensor share = magnitudes.max() * (static_cast<double>(dim) * 0x1p-23) + 1e-6 * (1 + cap);
    allowed = expected.abs() * Roundoff(type) + at::matmul(p, all(values).abs()) * share * 2;
  }
  const Tensor lengths = at::tensor({length.sinks, length.encoded, length.residual}, at::kInt).repeat({2, 1});
  const auto view = [&](const Side& side) {
    if (!side.dense.defined()) return side.encoded.view();
    KvView v;
    v.batch = 2, v.heads = kKvHeads, v.head_dim = dim, v.capacity = side.dense.size(2);
    v.planes[0] = static_cast<std::byte*>(side.dense.data_ptr());
    v.plane_stride[0] = side.dense.stride(1) * side.dense.element_size();
    return v;
  };
  const auto residual = [&](const Side& side, bool other_dense) {
    return ViewOf(side.dense.defined() && !other_dense ? side.dense : side.residual);
  };
  Tensor out = at::full(queries.sizes(), NAN, queries.options());
    host::DecodeAttention(key_codec, value_codec,
                          {.dtype = DTypeOf(type), .query_heads = kKvHeads * ratio, .queries = queries.data_ptr(),
                           .out = out.data_ptr(), .scale = static_cast<float>(scale), .softcap = static_cast<float>(cap),
                           .sink_logits = sinks ? sink_logits.data_ptr<float>() : nullptr, .keys = view(keys),
                           .values = view(values), .key_params = {.group_size = group},
                           .value_params = {.group_size = value_group}, .sink_keys = ViewOf(keys.sinks),
                           .sink_values = ViewOf(values.sinks), .residual_keys = residual(keys, values_dense),
                           .residual_values = residual(values, keys_dense), .window = window,
                           .lengths = reinterpret_cast<const SequenceLength*>(lengths.data_ptr())},
                          DTypeOf(type));
    const Tensor error = (out.to(at::kDouble) - expected).abs();
    EXPECT_TRUE(error.le(allowed + 1e-30).all().item<bool>())
        << spec << " head_dim " << dim << " group " << group << " ratio " << ratio << " " << type << " tokens "
        << length.sinks << "/" << length.encoded << "/" << length.residual << " window " << window << ": " << (error / (allowed + 1e-30)).max().item<double>() << " of what is allowed";
}

// A cap on logits, which are up to four or so here, and a logit a head that has no value: Gemma 2's and gpt-oss's attention.
TEST(Host, AttentionCapsLogitsAndCountsSinkLogits) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  at::manual_seed(6);
  for (const char* spec : {"none", "int4-hqq", "int8-hqq+none", "int4-hqq-kivi"}) {
    for (const auto& [cap, sinks] : {std::pair(1.5, false), std::pair(0.0, true), std::pair(2.0, true), std::pair(50.0, false)}) {
      CheckAttention(spec, 64, 64, 8, at::kHalf, {4, 257, 40}, 0, cap, sinks);
      CheckAttention(spec, 128, 64, 3, at::kFloat, {0, 520, 7}, 100, cap, sinks);
    }
  }
}

TEST(Host, AttentionEqualsFloat64OverDecodedTokens) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  at::manual_seed(5);
  std::vector<std::string> schemes = {"none", "int8-hqq", "int4-hqq", "int2-hqq", "int4-quanto", "int2-quanto"};
  for (const std::string& scheme : schemes) {
    for (const int64_t dim : {64, 80, 96, 128, 256}) {
      for (const int64_t group : {32, 64, 128}) {
        int i = 0;
        for (const SequenceLength& length : std::vector<SequenceLength>{{0, 0, 1}, {3, 0, 0}, {0, 1, 5}, {4, 257, 40}, {0, 520, 7}}) {
          const at::ScalarType type = std::array{at::kFloat, at::kHalf, at::kBFloat16}[(i + dim / 16) % 3];
          CheckAttention(scheme, dim, group, std::array{1, 3, 4, 8}[++i % 4], type, length, 0);
        }
        CheckAttention(scheme, dim, group, 2, at::kHalf, {4, 257, 40}, 100);
        CheckAttention(scheme, dim, group, 2, at::kFloat, {4, 257, 40}, 30);
      }
    }
  }
  schemes.push_back("int4-hqq-kivi");  // groups that span heads and tokens: by its codec, a block at a time
  for (const std::string& keys : schemes) {
    for (const std::string& values : schemes) {
      CheckAttention(keys + "+" + values, 128, 64, 3, at::kFloat, {4, 257, 40}, 0);
      CheckAttention(keys + "+" + values, 64, 64, 3, at::kBFloat16, {4, 257, 40}, 120);
    }
  }
}

// Dense tokens of several types: of bfloat16 their even and odd ones are read, all others are brought into that order.
TEST(Host, AttentionOverTokensOfSeveralTypes) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  at::manual_seed(8);
  for (const char* spec : {"none", "int4-hqq", "int4-hqq+none", "none+int4-hqq"}) {
    for (const auto& [type, beside] : {std::pair(at::kBFloat16, at::kFloat), std::pair(at::kFloat, at::kBFloat16), std::pair(at::kHalf, at::kBFloat16)}) {
      CheckAttention(spec, 64, 64, 3, type, {4, 257, 40}, 0, 0, false, 0, beside);
      CheckAttention(spec, 96, 32, 5, type, {4, 257, 40}, 0, 0, false, 0, beside);
    }
  }
}

// Tokens enough that a head's are several pieces, with blocks that none cuts, a window that begins within one, and sink logits.
TEST(Host, AttentionOfSeveralPieces) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  at::manual_seed(12);
  for (const char* spec : {"none", "int4-hqq", "int4-hqq-kivi", "kivi-2", "int8-hqq+none"}) {
    const int64_t group = std::string(spec) == "kivi-2" ? 32 : 64;
    for (const int64_t tokens : {2100, 4500}) {
      CheckAttention(spec, 64, group, 3, at::kBFloat16, {4, tokens, 40}, 0);
      CheckAttention(spec, 64, group, 1, at::kFloat, {0, tokens, 7}, 1500);
      CheckAttention(spec, 64, group, 5, at::kHalf, {8, tokens, 1}, 0, 0, /*sinks=*/true);
    }
  }
}

// A logit that is no number, or infinite, whatever its sign is, leaves no number.
TEST(Host, AttentionGivesNanWhereALogitIsInfinite) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  at::manual_seed(13);
  constexpr int64_t kDim = 64, kTokens = 150;  // of several tiles
  const Codec& none = FindScheme("none").keys;
  const Tensor keys = at::randn({1, 1, kTokens, kDim}), values = at::randn({1, 1, kTokens, kDim}), none_left = at::empty({1, 1, 0, kDim});
  const Tensor queries = at::randn({1, 1, 3, kDim}), out = at::empty_like(queries);
  queries[0][0][0][7] = 1, queries[0][0][1][7] = -1;
  for (const int64_t token : {0, 33, 70, 149}) {
    for (const float value : {INFINITY, -INFINITY, NAN}) {
      Tensor broken = keys.clone();
      broken[0][0][token][7] = value;
      const auto view = [&](const Tensor& x) {
        KvView v;
        v.batch = 1, v.heads = 1, v.head_dim = kDim, v.capacity = kTokens;
        v.planes[0] = static_cast<std::byte*>(x.data_ptr()), v.plane_stride[0] = kTokens * kDim * 4;
        return v;
      };
      const SequenceLength length{0, kTokens, 0};
      const DenseView empty = ViewOf(none_left);
      host::DecodeAttention(none, none,
                            {.dtype = DType::kFloat32, .query_heads = 3, .queries = queries.data_ptr(), .out = out.data_ptr(),
                             .scale = 0.1f, .keys = view(broken), .values = view(values), .sink_keys = empty, .sink_values = empty,
                             .residual_keys = empty, .residual_values = empty, .lengths = &length},
                            DType::kFloat32);
      EXPECT_TRUE(out.isnan().all().item<bool>()) << "token " << token << " " << value;
    }
  }
}

// Codes that are read as they lie (HostCodec::lines), and others, which their codec decodes.
TEST(Host, AttentionOfEveryPlainScheme) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  at::manual_seed(8);
  int read = 0;
  for (const Scheme& scheme : Schemes()) {
    if (scheme.keys.device.plain == nullptr || scheme.values.device.plain == nullptr || !scheme.refused.empty()) continue;
    SCOPED_TRACE(scheme.name);
    for (const Codec* codec : {&scheme.keys, &scheme.values}) {  // without it all would pass, decoded
      EXPECT_EQ(codec->host.lines != nullptr, codec->device.label != nullptr);
      read += codec->host.lines != nullptr;
    }
    std::vector<int64_t> groups(scheme.keys.groups.begin(), scheme.keys.groups.end());
    if (groups.empty()) groups.push_back(scheme.keys.default_group);
    for (const int64_t group : groups) {
      for (const int64_t dim : {64, 80, 96, 128, 256, 512}) {
        CheckAttention(scheme.name, dim, group, 3, at::kFloat, {4, 257, 40}, 0);
        CheckAttention(scheme.name, dim, group, 4, at::kBFloat16, {0, 520, 7}, 100);
        CheckAttention(scheme.name + "+int4-hqq", dim, group, 2, at::kHalf, {0, 33, 1}, 0, 0, false, dim % 64 == 0 ? 64 : 32);
        CheckAttention("none+" + scheme.name, dim, group, 1, at::kHalf, {3, 150, 0}, 0);
      }
    }
  }
  EXPECT_GE(read, 60);
}

// Groups over tokens, which their codec decodes; kvarn's without turning them back.
TEST(Host, AttentionOfBlocksOfTokens) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  at::manual_seed(10);
  for (const auto& [scheme, group] : {std::pair<std::string, int64_t>("kivi-2", 32), {"kivi-4", 32}, {"kvarn-2", 0}, {"kvarn-4", 0}}) {
    EXPECT_EQ(FindScheme(scheme).keys.host.decode_turned != nullptr, FindScheme(scheme).keys.turned);
    for (const int64_t dim : {64, 128, 256}) {
      CheckAttention(scheme, dim, group, 3, at::kFloat, {4, 257, 40}, 0);
      CheckAttention(scheme, dim, group, 4, at::kBFloat16, {0, 520, 7}, 100);
      CheckAttention(scheme + "+none", dim, group, 2, at::kHalf, {0, 33, 1}, 0);
      CheckAttention("none+" + scheme, dim, group, 1, at::kHalf, {3, 150, 0}, 0);
    }
  }
}

// Of a value its channels, of a key all: a logit that is NaN leaves no sum.
TEST(Host, AttentionGivesNanWhereATokenDecodesToIt) {
  if (!host::HasAvx2()) GTEST_SKIP() << host::kWantsAvx2;
  const c10::InferenceMode guard;
  at::manual_seed(9);
  const Codec& none = FindScheme("none").keys;
  const auto check = [&](const Codec& codec, const CodecParams& params, int64_t dim, bool of_keys) {
    constexpr int64_t kTokens = 150;  // of several tiles
    const Tensor dense = at::randn({1, 1, kTokens, dim}), numbers = at::randn({1, 1, kTokens, dim}), none_left = at::empty({1, 1, 0, dim});
    numbers[0][0][69][41] = NAN;
    const EncodedTensors encoded = Encode(codec, params, numbers, 1);
    Tensor decoded = at::empty_like(numbers);
    const Tensor queries = at::randn({1, 1, 2, dim}), out = at::empty_like(queries);
    DecodeTensor(codec, params, encoded, 0, decoded);
    KvView dense_view;
    dense_view.batch = 1, dense_view.heads = 1, dense_view.head_dim = dim, dense_view.capacity = kTokens;
    dense_view.planes[0] = static_cast<std::byte*>(dense.data_ptr()), dense_view.plane_stride[0] = kTokens * dim * 4;
    const SequenceLength length{0, kTokens, 0};
    const DenseView none_dense = ViewOf(none_left);
    const DecodeAttentionArgs args = {
        .dtype = DType::kFloat32, .query_heads = 2, .queries = queries.data_ptr(), .out = out.data_ptr(), .scale = 0.1f,
        .keys = of_keys ? encoded.view() : dense_view, .values = of_keys ? dense_view : encoded.view(), .key_params = params,
        .value_params = params, .sink_keys = none_dense, .sink_values = none_dense, .residual_keys = none_dense,
        .residual_values = none_dense, .lengths = &length};
    host::DecodeAttention(of_keys ? codec : none, of_keys ? none : codec, args, DType::kFloat32);
    Tensor expected = decoded.isnan().any(2, /*keepdim=*/true);
    EXPECT_TRUE(expected.any().item<bool>());
    if (of_keys) expected = expected.any();
    EXPECT_TRUE(out.isnan().equal(expected.expand_as(out))) << out.isnan() << expected;
  };
  int read = 0;
  for (const Scheme& scheme : Schemes()) {
    for (const bool of_keys : {false, true}) {
      const Codec& codec = of_keys ? scheme.keys : scheme.values;
      if (codec.host.lines == nullptr) continue;
      for (const int64_t dim : {64, 80, 96, 128}) {
        SCOPED_TRACE(scheme.name + (of_keys ? " keys" : " values") + ", head_dim " + std::to_string(dim));
        const CodecParams params{.group_size = codec.default_group};
        try {
          codec.planes(1, dim, params);
        } catch (const InputError&) {
          continue;  // a shape that the scheme refuses
        }
        check(codec, params, dim, of_keys);
        ++read;
      }
    }
  }
  EXPECT_GE(read, 180);
}

}  // namespace
}  // namespace kvq
