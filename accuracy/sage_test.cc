// SageAttention's recipe (kernels/device/sage.h): the CPU against an implementation written from the paper and against
// attention in float64, CUDA against the CPU.
#include "kernels/device/sage.h"

#include <cmath>

#include "accuracy/golden.h"
#include "accuracy/relative_error.h"
#include "fixtures/attention.h"
#include "fixtures/cache/codec_tensors.h"
#include "kernels/error.h"

namespace kvq {
namespace {

using at::Tensor;

struct Shape {
  int64_t batch, heads, kv_heads, n, length, head_dim;
};

double ScaleFor(const Tensor& queries) { return 1 / std::sqrt(static_cast<double>(queries.size(3))); }

struct Result {
  Tensor out, workspace, query_codes, key_codes, query_scales, key_scales;
};

Result Attend(const Tensor& queries, const Tensor& keys, const Tensor& values) {
  Result r;
  r.out = at::empty_like(queries, at::MemoryFormat::Contiguous);
  SageArgs args{.queries = ViewOf(queries), .keys = ViewOf(keys), .values = ViewOf(values), .out = ViewOf(r.out),
                .scale = ScaleFor(queries)};
  r.workspace = at::zeros({LayOutSage(args).bytes}, queries.options().dtype(at::kByte));
  args.workspace = r.workspace.data_ptr();
  queries.is_cuda() ? SageAttentionCuda(args, nullptr) : SageAttention(args);
  const SageWorkspace w = LayOutSage(args);
  const auto part = [&](auto* data, const Tensor& x, int64_t block, bool codes) {
    const int64_t blocks = (x.size(2) + block - 1) / block;
    std::vector<int64_t> shape = {x.size(0), x.size(1), blocks};
    if (codes) shape[2] *= block, shape.push_back(x.size(3));
    return at::from_blob(data, shape, x.options().dtype(codes ? at::kChar : at::kFloat)).clone();
  };
  r.query_codes = part(w.query_codes, queries, kSageQueries, true);
  r.key_codes = part(w.key_codes, keys, kSageKeys, true);
  r.query_scales = part(w.query_scales, queries, kSageQueries, false);
  r.key_scales = part(w.key_scales, keys, kSageKeys, false);
  return r;
}

Tensor PerQueryHead(const Tensor& x, const Tensor& queries) {
  return x.to(at::kDouble).repeat_interleave(queries.size(1) / x.size(1), 1);
}

// Logits base 2 of all pairs, -inf where hidden; and attention from them.
Tensor Logits(const Tensor& queries, const Tensor& keys) {
  const Tensor all = at::matmul(queries.to(at::kDouble), PerQueryHead(keys, queries).transpose(2, 3)) *
                     (ScaleFor(queries) * M_LOG2E);
  const int64_t n = queries.size(2), length = keys.size(2);
  return all.masked_fill(at::ones({n, length}, at::kBool).triu(length - n + 1), -INFINITY);
}
Tensor WeightsOf(const Tensor& logits) { return at::softmax(logits * M_LN2, -1); }

// The sequence of one head that a scale of a block stands for: [.., tokens, 1].
Tensor PerToken(const Tensor& scales, int64_t block, int64_t tokens) {
  return scales.to(at::kDouble).repeat_interleave(block, 2).narrow(2, 0, tokens).unsqueeze(3);
}

struct Inputs {
  Tensor queries, keys, values;
};
Inputs Normal(const Shape& s, at::ScalarType type) {
  return {at::randn({s.batch, s.heads, s.n, s.head_dim}).to(type),
          at::randn({s.batch, s.kv_heads, s.length, s.head_dim}).to(type),
          at::randn({s.batch, s.kv_heads, s.length, s.head_dim}).to(type)};
}

// ---- against NumPy

Tensor Coarse(const nlohmann::json& c, const char* heads, const char* tokens, int64_t plus, const char* kind) {
  const std::vector<int64_t> shape = {1, c[heads], c[tokens], c["head_dim"]};
  std::vector<float> x = GoldenNumbers(shape[1] * shape[2] * shape[3], c["seed"].get<uint64_t>() + plus, kind);
  for (float& one : x) one = std::nearbyint(one * 32) / 32;
  const at::ScalarType type = c["dtype"] == "float16" ? at::kHalf : c["dtype"] == "bfloat16" ? at::kBFloat16 : at::kFloat;
  return at::tensor(x).view(shape).to(type);
}

std::string Hexadecimal(const Tensor& codes) {
  std::string text;
  const Tensor flat = codes.contiguous();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const uint8_t code = static_cast<uint8_t>(flat.data_ptr<int8_t>()[i]);
    for (const int digit : {code >> 4, code & 15}) text += "0123456789abcdef"[digit];
  }
  return text;
}

TEST(SageParity, CodesScalesAndOutputsAreThoseOfThePaper) {
  for (const auto& c : Golden("sage.json")) {
    SCOPED_TRACE(c["dtype"]);
    const Tensor queries = Coarse(c, "heads", "queries", 0, "normal"), keys = Coarse(c, "kv_heads", "tokens", 1, "outliers"),
                 values = Coarse(c, "kv_heads", "tokens", 2, "normal");
    const Result ours = Attend(queries, keys, values);
    const auto compare = [&](const char* side, const Tensor& x, const Tensor& codes, const Tensor& scales) {
      for (int64_t head = 0; head < x.size(1); ++head) {
        const Tensor stored = codes[0][head];
        EXPECT_EQ(Hexadecimal(stored.narrow(0, 0, x.size(2))), c[StrCat(side, "_codes")][head].get<std::string>());
        EXPECT_FALSE(stored.narrow(0, x.size(2), stored.size(0) - x.size(2)).any().item<bool>()) << "padding";
        const auto expected = c[StrCat(side, "_scales")][head].get<std::vector<float>>();
        ASSERT_EQ(static_cast<int64_t>(expected.size()), scales.size(2));
        for (size_t i = 0; i < expected.size(); ++i) EXPECT_EQ(scales[0][head][i].item<float>(), expected[i]);
      }
    };
    compare("query", queries, ours.query_codes, ours.query_scales);
    compare("key", keys, ours.key_codes, ours.key_scales);
    // Weights are rounded, then the output: each by at most the roundoff u, relative, of a weighted mean of |v|. In
    // float32 the sum of some 130 products and of as many weights adds a few u; in 16 bits weights below 2^-14 may
    // be off by 2^-25.
    const double u = Roundoff(values.scalar_type());
    const Tensor bound = at::matmul(WeightsOf(Logits(queries, keys)), PerQueryHead(values, queries).abs()) *
                             (values.scalar_type() == at::kFloat ? 32 * u : 2 * u) * 1.5 +
                         0x1p-25 * static_cast<double>(keys.size(2)) * 4;
    const Tensor out = ours.out.to(at::kDouble).flatten(), allowed = bound.flatten();
    for (size_t i = 0; i < c["out"].size(); ++i) {
      const int64_t at = static_cast<int64_t>(i) * 13;
      EXPECT_NEAR(out[at].item<double>(), c["out"][i].get<double>(), allowed[at].item<double>());
    }
  }
}

// ---- against float64

// q' = scale log2(e) q and k (without its mean) are off by at most half a step, d_q / 2 and d_k / 2 in each channel, so
// a logit by at most e = d_k / 2 |q'|_1 + d_q / 2 |k_codes|_1. With E the largest e of a query, each weight changes by a
// factor within 2^-2E ... 2^2E, and as the weights' changes add up to 0, the output by at most
// (2^2E - 1) sum w |v - out|. Steps that are evenly spread within have a variance of d^2 / 12: to first order
// the squared error is ln^2(2) sum w^2 (d_k^2 |q'|_2^2 + d_q^2 |k|_2^2) / 12 (v - out)^2.
TEST(Sage, ErrorIsWhatTheStepsOfTheCodesMakeIt) {
  at::manual_seed(1);
  for (const at::ScalarType type : {at::kFloat, at::kHalf, at::kBFloat16}) {
    for (const Shape& s : {Shape{1, 4, 2, 200, 200, 64}, Shape{2, 2, 1, 130, 300, 128}}) {
      SCOPED_TRACE(StrCat(type, " ", s.n, " of ", s.length, " dim ", s.head_dim));
      const auto [queries, keys, values] = Normal(s, type);
      const Result ours = Attend(queries, keys, values);
      const Tensor weights = WeightsOf(Logits(queries, keys)), v = PerQueryHead(values, queries);
      const Tensor exact = at::matmul(weights, v);
      const Tensor q = queries.to(at::kDouble) * (ScaleFor(queries) * M_LOG2E);
      const Tensor d_q = PerToken(ours.query_scales, kSageQueries, s.n);
      const Tensor d_k = PerToken(PerQueryHead(ours.key_scales, queries), kSageKeys, s.length);
      const Tensor k = PerQueryHead(ours.key_codes.narrow(2, 0, s.length), queries) * d_k;
      const auto of_pairs = [&](const Tensor& of_q, const Tensor& q_step, const Tensor& of_k, const Tensor& k_step) {
        return at::matmul(of_q, k_step.transpose(2, 3)) + at::matmul(q_step, of_k.transpose(2, 3));
      };
      const Tensor e = of_pairs(q.abs().sum(3, true), d_q, k.abs().sum(3, true), d_k) / 2;
      const Tensor largest = at::where(weights > 0, e, 0).amax(3, true);
      const Tensor apart = (v.unsqueeze(2) - exact.unsqueeze(3));  // [batch, heads, n, length, head_dim]
      const Tensor w = weights.unsqueeze(4);
      const double u = Roundoff(type);
      const Tensor bound = (at::exp2(2 * largest) - 1) * (w * apart.abs()).sum(3) +
                           3 * u * at::matmul(weights, v.abs()) + u * exact.abs() + 1e-6;
      const Tensor error = (ours.out.to(at::kDouble) - exact).abs();
      EXPECT_TRUE((error <= bound).all().item<bool>()) << (error / bound).max().item<double>();
      const Tensor variance = of_pairs(q.square().sum(3, true), d_q.square(), k.square().sum(3, true), d_k.square()) / 12;
      const Tensor rounding = (2 * u * u / 3) * at::matmul(weights.square(), v.square());
      const Tensor expected = (w.square() * variance.unsqueeze(4) * apart.square()).sum(3) * (M_LN2 * M_LN2) + rounding;
      const double ratio = (error.square().sum() / expected.sum()).item<double>();
      // Seen: 0.94 to 1.08. Truncation, or a logit off by 3 %, makes it more than 5.
      EXPECT_GT(ratio, 0.8);
      EXPECT_LT(ratio, 1.25);
    }
  }
}

// What smoothing is for: channels of keys with a mean far from 0 take up the codes' range.
TEST(Sage, AnOffsetOfKeysCostsNothingBecauseItIsTakenOff) {
  at::manual_seed(2);
  const auto [queries, plain, values] = Normal({1, 4, 2, 256, 256, 64}, at::kFloat);
  Tensor keys = plain.clone();
  keys.slice(3, 0, 64, 16) += 16;  // as the keys of many models have it
  const auto error = [&, queries = queries, values = values](const Tensor& out, const Tensor& of) {
    const Tensor exact = at::matmul(WeightsOf(Logits(queries, of)), PerQueryHead(values, queries));
    return ((out.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
  };
  const double without = error(Attend(queries, plain, values).out, plain);
  const double with = error(Attend(queries, keys, values).out, keys);
  EXPECT_NEAR(with, without, 0.02 * without);
  const auto rounded = [](const Tensor& x, int64_t block) {  // the same codes, but of K itself
    const Tensor blocks = x.view({x.size(0), x.size(1), -1, block, x.size(3)});
    const Tensor scale = blocks.abs().amax({3, 4}, true) / 127;
    return ((blocks / scale).round() * scale).view(x.sizes());
  };
  const Tensor unsmoothed = at::matmul(WeightsOf(Logits(rounded(queries, kSageQueries), rounded(keys, kSageKeys))),
                                       PerQueryHead(values, queries));
  // d_k is some 20 / 127 instead of 4 / 127, of which the queries' steps have none: seen 3.4 times.
  EXPECT_GT(error(unsmoothed, keys), 2.5 * with);
}

TEST(Sage, WhatIsNotFiniteShowsAndZerosAreFine) {
  at::manual_seed(3);
  const Shape shape{1, 2, 2, 256, 256, 64};
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    auto [queries, keys, values] = Normal(shape, at::kHalf);
    queries[0][0][130][5] = bad;
    const Tensor out = Attend(queries, keys, values).out;
    EXPECT_TRUE(out[0][0].narrow(0, 128, 128).isnan().all().item<bool>()) << "its block";
    EXPECT_TRUE(out[0][0].narrow(0, 0, 128).isfinite().all().item<bool>());
    EXPECT_TRUE(out[0][1].isfinite().all().item<bool>());
    auto [q, k, v] = Normal(shape, at::kBFloat16);
    k[0][1][200][0] = bad;  // its mean goes into all keys of the head
    const Tensor of_key = Attend(q, k, v).out;
    EXPECT_TRUE(of_key[0][1].isnan().all().item<bool>());
    EXPECT_TRUE(of_key[0][0].isfinite().all().item<bool>());
  }
  const auto [queries, keys, values] = Normal(shape, at::kFloat);
  for (const Tensor& k : {at::zeros_like(keys), at::full_like(keys, 3.0)}) {  // all keys alike: a plain mean
    const Tensor mean = values.to(at::kDouble).cumsum(2) / at::arange(1, 257, at::kDouble).view({256, 1});
    EXPECT_TRUE(Attend(queries, k, values).out.to(at::kDouble).allclose(mean, 1e-5, 1e-6));
  }
}

TEST(Sage, RefusesWhatItDoesNotKnow) {
  const auto attend = [](const Shape& s, at::ScalarType type) {
    const auto [queries, keys, values] = Normal(s, type);
    Attend(queries, keys, values);
  };
  EXPECT_THROW(attend({1, 2, 1, 4, 4, 96}, at::kFloat), InputError);
  EXPECT_THROW(attend({1, 3, 2, 4, 4, 64}, at::kFloat), InputError);
  EXPECT_THROW(attend({1, 2, 1, 5, 4, 64}, at::kFloat), InputError);
}

TEST(Sage, TheBackendSaysWhichWayItWent) {
  const Backend& sage = FindBackend("sage");
  sage.ran();
  const auto attend = [&](const Shape& s, int64_t window) {
    const auto [queries, keys, values] = Normal(s, at::kFloat);
    const Tensor out = sage.attend(queries, keys, values, {ScaleFor(queries), window});
    EXPECT_EQ(out.sizes(), queries.sizes());
    return std::pair(out, Attend(queries, keys, values).out);
  };
  const auto [ours, kernel] = attend({1, 4, 2, 128, 140, 64}, 0);
  EXPECT_TRUE(ours.equal(kernel));
  EXPECT_EQ(sage.ran(), "sage_int8_qk reference");
  EXPECT_EQ(sage.ran(), "");
  attend({1, 4, 2, 130, 130, 128}, 130);
  attend({1, 4, 2, 1, 131, 128}, 0);
  attend({1, 4, 2, 1, 132, 128}, 0);
  EXPECT_EQ(sage.ran(), "sage_int8_qk reference, sdpa (fewer than 128 tokens)");
  attend({1, 4, 2, 130, 130, 128}, 129);
  EXPECT_EQ(sage.ran(), "sdpa (a sliding window)");
}

// ---- CUDA gives the CPU's codes

// Outputs: both round weights to 16 bits, and may round one differently where exponentials differ in their last bits;
// then the output. Each at most one step, 2 u, of a weighted mean of |v|; few do.
void ExpectWhatTheCpuSays(const std::vector<Shape>& shapes) {
  const c10::InferenceMode guard;
  at::manual_seed(4);
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    const double u = Roundoff(type);
    for (const Shape& s : shapes) {
      SCOPED_TRACE(StrCat(type, " ", s.n, " of ", s.length, " heads ", s.heads, "/", s.kv_heads, " dim ", s.head_dim,
                          " batch ", s.batch));
      auto [queries, keys, values] = Normal(s, type);
      keys.slice(3, 0, s.head_dim, 16) += 8;
      // Queries as the decoder has them, a part of a larger tensor; keys and values with room behind them that must
      // not be seen.
      const Tensor wide = at::full({s.batch, s.n, s.heads + 3, s.head_dim}, NAN, at::TensorOptions(type).device(at::kCUDA));
      const Tensor gpu_queries = wide.narrow(2, 0, s.heads).transpose(1, 2);
      gpu_queries.copy_(queries);
      const auto roomy = [&](const Tensor& x) {
        const Tensor room = at::full({s.batch, s.kv_heads, s.length + 9, s.head_dim}, NAN, wide.options());
        const Tensor used = room.narrow(2, 0, s.length);
        used.copy_(x);
        return used;
      };
      const Tensor gpu_keys = roomy(keys), gpu_values = roomy(values);
      const Result cpu = Attend(queries, keys, values), gpu = Attend(gpu_queries, gpu_keys, gpu_values);
      EXPECT_TRUE(gpu.query_codes.cpu().equal(cpu.query_codes));
      EXPECT_TRUE(gpu.key_codes.cpu().equal(cpu.key_codes));
      EXPECT_TRUE(gpu.workspace.cpu().equal(cpu.workspace)) << "scales, sums, means";
      const Tensor ours = gpu.out.cpu().to(at::kDouble), theirs = cpu.out.to(at::kDouble);
      const Tensor spread = Attend(queries, keys, values.abs()).out.to(at::kDouble);
      EXPECT_TRUE(((ours - theirs).abs() <= 2 * u * (theirs.abs() + spread)).all().item<bool>());
      EXPECT_LT(((ours - theirs).norm() / theirs.norm()).item<double>(), u / 4);  // 1e-5 in an emulation
      if (s.n < kSageQueries) continue;
      const Backend& sage = FindBackend("sage");
      sage.ran();
      const Tensor attended = sage.attend(gpu_queries, gpu_keys, gpu_values, {ScaleFor(queries), 0});
      EXPECT_TRUE(attended.equal(gpu.out));
      EXPECT_EQ(sage.ran(), "sage_int8_qk");
    }
  }
}

TEST(SageGpu, CodesAreTheCpusAndOutputsWithinRounding) {
  KVQ_NEEDS_CUDA();
  ExpectWhatTheCpuSays({{1, 2, 1, 128, 128, 64},
                        {1, 8, 2, 37, 37, 128},
                        {2, 4, 2, 130, 200, 64},
                        {1, 2, 2, 1, 65, 128},
                        {1, 7, 1, 150, 421, 128},
                        {2, 3, 3, 257, 257, 64},
                        {1, 8, 2, 1000, 3000, 128},
                        {1, 4, 1, 512, 512, 128}});
}

// What fits under a sanitizer.
TEST(SageGpu, AFewShapes) {
  KVQ_NEEDS_CUDA();
  ExpectWhatTheCpuSays({{1, 8, 2, 37, 37, 128}, {2, 4, 2, 130, 200, 64}});
}

TEST(SageGpu, WhatIsNotFiniteShows) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  for (const float bad : {NAN, INFINITY}) {
    auto [queries, keys, values] = Normal({1, 2, 2, 256, 256, 128}, at::kHalf);
    queries[0][0][130][5] = bad;
    keys[0][1][200][0] = bad;
    const Tensor out = Attend(queries.cuda(), keys.cuda(), values.cuda()).out.cpu();
    EXPECT_TRUE(out[0][0].narrow(0, 128, 128).isnan().all().item<bool>());
    EXPECT_TRUE(out[0][0].narrow(0, 0, 128).isfinite().all().item<bool>());
    EXPECT_TRUE(out[0][1].isnan().all().item<bool>());
  }
}

TEST(SageGpu, RefusesFloat32AndCrookedRows) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  const Tensor x = at::randn({1, 1, 130, 64}, at::kCUDA);
  EXPECT_THROW(Attend(x, x, x), InputError);
  const Tensor crooked = at::randn({1, 1, 130, 66}, at::kCUDA).to(at::kHalf).narrow(3, 1, 64);
  EXPECT_THROW(Attend(crooked, crooked, crooked), InputError);
}

}  // namespace
}  // namespace kvq
