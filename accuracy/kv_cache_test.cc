// Specs and cache policies, token by token, and policy hf against transformers.
#include <ATen/ATen.h>

#include "accuracy/golden.h"
#include "fixtures/cache/codec_tensors.h"
#include "fixtures/cache/kv_cache.h"
#include "kernels/error.h"

namespace kvq {
namespace {

const CacheShape kShape = CacheShape::Uniform(/*layers=*/2, /*batch=*/1, /*kv_heads=*/3, /*head_dim=*/64);

at::Tensor Tokens(int64_t count, uint64_t seed, const CacheShape& shape = kShape) {
  const auto [kv_heads, head_dim] = shape.layers[0];
  return at::tensor(GoldenNumbers(shape.batch * kv_heads * count * head_dim, seed, "outliers"))
      .view({shape.batch, kv_heads, count, head_dim});
}

// All tokens in calls of the given sizes; what the last call returns for keys of the last layer.
at::Tensor Replay(const std::string& spec, const at::Tensor& keys, const std::vector<int64_t>& calls,
                  int64_t* bytes = nullptr) {
  KvCache cache(ParseSpec(spec), kShape, keys.size(2), keys.scalar_type(), at::kCPU);
  at::Tensor last;
  int64_t at = 0;
  for (const int64_t n : calls) {
    for (int64_t layer = 0; layer < 2; ++layer) {
      last = cache.Update(layer, keys.narrow(2, at, n), keys.narrow(2, at, n)).first;
    }
    at += n;
  }
  EXPECT_EQ(at, keys.size(2));
  if (bytes != nullptr) *bytes = cache.AllocatedBytes();
  return last.clone();
}

// ---- specs

TEST(Spec, ParsesEveryPart) {
  const Spec spec = ParseSpec("int2-hqq-kivi+int4-hqq@group=32@residual=64@sinks=4@layers=0-1:none");
  EXPECT_EQ(spec.schemes.keys->name, "int2-hqq-kivi");
  EXPECT_EQ(spec.schemes.values->name, "int4-hqq");
  EXPECT_EQ(spec.group_size, 32);
  EXPECT_EQ(spec.residual_length, 64);
  EXPECT_EQ(spec.sink_tokens, 4);
  EXPECT_EQ(spec.policy, Policy::kAppend);
  EXPECT_TRUE(spec.At(1).keys->stores_dense());
  EXPECT_EQ(spec.At(2).keys->name, "int2-hqq-kivi");
  EXPECT_EQ(ParseSpec("int4-hqq@policy=hf").policy, Policy::kHf);
  EXPECT_EQ(ParseSpec("int4-hqq").residual_length, 128);
  EXPECT_TRUE(ParseSpec("none").stores_dense());
  EXPECT_FALSE(ParseSpec("none+int4-hqq").stores_dense());
}

TEST(Spec, RefusesWithTheReason) {
  const auto message = [](const std::string& spec) {
    try {
      ParseSpec(spec);
    } catch (const InputError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(message("").find("empty"), std::string::npos);
  EXPECT_NE(message("int5-hqq").find("int4-hqq"), std::string::npos) << "lists the known ones";
  EXPECT_NE(message("int8-quanto").find("2 and 4 bits"), std::string::npos);
  EXPECT_NE(message("int4-quanto-kivi").find("axis"), std::string::npos);
  EXPECT_NE(message("int4-hqq@").find("@key=value"), std::string::npos);
  EXPECT_NE(message("int4-hqq@residual").find("@key=value"), std::string::npos);
  EXPECT_NE(message("int4-hqq@residual=-1").find("whole number"), std::string::npos);
  EXPECT_NE(message("int4-hqq@residual=1x").find("whole number"), std::string::npos);
  EXPECT_NE(message("int4-hqq@bits=4").find("no key"), std::string::npos);
  EXPECT_NE(message("int4-hqq@policy=lazy").find("append or hf"), std::string::npos);
  EXPECT_NE(message("int4-hqq@policy=hf@sinks=4").find("sink"), std::string::npos);
  EXPECT_NE(message("int4-hqq-kivi@residual=0").find("residual"), std::string::npos);
  EXPECT_NE(message("none@group=32").find("nothing is encoded"), std::string::npos);
  EXPECT_NE(message("int4-hqq@layers=3-1:none").find("ends before"), std::string::npos);
  EXPECT_NE(message("int4-hqq@layers=3").find("FIRST-LAST"), std::string::npos);
  for (const char* key : {"residual=16", "group=32", "sinks=4", "policy=hf"}) {
    const std::string once = StrCat("@", key);
    EXPECT_NE(message("int4-hqq" + once + once).find(once.substr(0, once.find('=')) + " is given twice"), std::string::npos) << key;
  }
  EXPECT_NE(message("int4-hqq@layers=0-3:none@layers=3-5:int8-hqq").find("layer 3 is given twice"), std::string::npos);
  EXPECT_EQ(ParseSpec("int4-hqq@layers=0-2:none@layers=3-5:int8-hqq").layers.size(), 2u);
  EXPECT_NE(message("int4-hqq+").find("scheme"), std::string::npos);
  EXPECT_NE(message("a/b").find("slash"), std::string::npos);
  EXPECT_THROW(CheckSpec(ParseSpec("int4-hqq"), CacheShape::Uniform(2, 1, 3, 80)), InputError);
  EXPECT_THROW(CheckSpec(ParseSpec("int4-hqq@layers=2-2:none"), CacheShape::Uniform(2, 1, 3, 64)), InputError);
  EXPECT_NO_THROW(CheckSpec(ParseSpec("none"), CacheShape::Uniform(2, 1, 3, 80)));
}

// ---- policy append

TEST(KvCache, EncodedTokensFollowTheRule) {
  const Spec spec = ParseSpec("int4-hqq@residual=4@sinks=2");
  // Sinks 2, then blocks of 4; the newest 1 to 4 tokens stay.
  const std::vector<int64_t> expected = {0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 8};
  for (size_t length = 0; length < expected.size(); ++length) {
    EXPECT_EQ(EncodedTokens(spec, static_cast<int64_t>(length)), expected[length]) << length;
  }
  EXPECT_EQ(EncodedTokens(ParseSpec("int4-hqq@residual=0"), 7), 7);
}

TEST(KvCache, WhatIsReadDoesNotDependOnTheCalls) {
  const at::Tensor keys = Tokens(23, 1);
  for (const char* spec : {"none", "int4-hqq@residual=4", "int4-hqq@residual=4@sinks=3", "int2-hqq@residual=0",
                           "int2-hqq-kivi@residual=8", "int4-hqq@residual=32", "none+int4-hqq@residual=4",
                           "int4-hqq@residual=4@layers=1-1:none", "int4-quanto@residual=4", "int2-quanto@residual=0"}) {
    const at::Tensor one = Replay(spec, keys, {23});
    const at::Tensor each = Replay(spec, keys, std::vector<int64_t>(23, 1));
    EXPECT_TRUE(one.equal(each)) << spec;
    EXPECT_TRUE(one.equal(Replay(spec, keys, {4, 4, 4, 4, 4, 3}))) << spec;
    EXPECT_TRUE(one.equal(Replay(spec, keys, {1, 2, 11, 5, 4}))) << spec;
  }
}

TEST(KvCache, SinksAndResidualStayExactAndTheRestIsEncodedOnce) {
  const at::Tensor keys = Tokens(23, 2);
  const at::Tensor read = Replay("int2-hqq@residual=4@sinks=3", keys, {10, 13});
  // 3 sinks, EncodedTokens = (20 - 1) / 4 * 4 = 16, residual 4.
  EXPECT_TRUE(read.narrow(2, 0, 3).equal(keys.narrow(2, 0, 3)));
  EXPECT_TRUE(read.narrow(2, 19, 4).equal(keys.narrow(2, 19, 4)));
  const Codec& codec = FindScheme("int2-hqq").keys;
  const CodecParams params{.group_size = 64};
  for (int64_t t = 3; t < 19; t += 4) {  // each block by itself, from the originals
    const at::Tensor block = keys.narrow(2, t, 4).contiguous();
    EncodedTensors encoded = AllocateEncoded(codec, params, 1, 3, 64, 4, 4, at::kCPU);
    EncodeTensor(codec, params, block, 0, encoded);
    at::Tensor decoded = at::empty_like(block);
    DecodeTensor(codec, params, encoded, 0, decoded);
    EXPECT_TRUE(read.narrow(2, t, 4).equal(decoded)) << t;
  }
}

TEST(KvCache, FormulaAndAllocationAgreeToTheByte) {
  for (const char* text : {"none", "int8-hqq", "int4-hqq@residual=16", "int2-hqq@residual=0", "int4-hqq-kivi@sinks=4",
                           "int4-hqq+none", "int4-hqq@layers=0-0:none", "int4-hqq@group=32", "int2-quanto"}) {
    const Spec spec = ParseSpec(text);
    for (const int64_t capacity : {1, 4, 5, 127, 128, 129, 133, 512}) {
      for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
        const CacheShape shape = CacheShape::Uniform(2, 2, 3, 64);
        const KvCache cache(spec, shape, capacity, type, at::kCPU);
        EXPECT_EQ(cache.AllocatedBytes(), KvBytesReserved(spec, shape, capacity, type)) << text << capacity;
        EXPECT_LE(KvBytes(spec, shape, capacity, type), KvBytesReserved(spec, shape, capacity, type));
      }
    }
  }
  // int4 at 512 tokens: 384 encoded at 4.5 bits, 128 in 16.
  const CacheShape shape = CacheShape::Uniform(1, 1, 1, 64);
  EXPECT_EQ(KvBytes(ParseSpec("int4-hqq"), shape, 512, at::kBFloat16), 2 * 64 * (384 * 9 / 16 + 128 * 2));
  // Of 4 sinks, 384 encoded and 124 residual tokens, what windows show.
  const auto seen = [&](const std::string& text, int64_t window) {
    return KvLayerBytesSeen(ParseSpec(text), shape, 0, 512, window, at::kBFloat16);
  };
  EXPECT_EQ(seen("int4-hqq@sinks=4", 100), 2 * 64 * 100 * 2);
  EXPECT_EQ(seen("int4-hqq@sinks=4", 140), 2 * 64 * (16 * 9 / 16 + 124 * 2));
  EXPECT_EQ(seen("int4-hqq@sinks=4", 510), 2 * 64 * (384 * 9 / 16 + 126 * 2));
  EXPECT_EQ(seen("int4-hqq+none@sinks=4", 140), 64 * (16 * 9 / 16 + 124 * 2 + 140 * 2));
  for (const int64_t window : {0, 512, 1000}) {
    EXPECT_EQ(seen("int4-hqq", window), KvLayerBytes(ParseSpec("int4-hqq"), shape, 0, 512, at::kBFloat16));
  }
}

TEST(KvCache, HoldsWhatItWasAskedForAndNoMore) {
  KvCache cache(ParseSpec("int4-hqq"), kShape, 8, at::kFloat, at::kCPU);
  cache.Update(0, Tokens(8, 3), Tokens(8, 4));
  EXPECT_THROW(cache.Update(0, Tokens(1, 5), Tokens(1, 5)), std::length_error);
  cache.Clear();
  EXPECT_EQ(cache.length(), 0);
  EXPECT_TRUE(cache.Update(0, Tokens(2, 5), Tokens(2, 5)).first.equal(Tokens(2, 5)));
  EXPECT_THROW(KvCache(ParseSpec("int4-hqq"), CacheShape::Uniform(2, 1, 3, 80), 8, at::kFloat, at::kCPU), InputError);
}

TEST(KvCache, CountsItsWork) {
  KvCache cache(ParseSpec("int4-hqq@residual=4"), kShape, 16, at::kFloat, at::kCPU);
  cache.CountTime(true);
  cache.Update(0, Tokens(12, 3), Tokens(12, 4));  // 8 encoded of each
  EXPECT_EQ(cache.work().encoded_elements, 2 * 3 * 8 * 64);
  EXPECT_EQ(cache.work().decoded_elements, 2 * 3 * 8 * 64);
  EXPECT_GT(cache.work().encode_s, 0);
  EXPECT_GT(cache.work().decode_s, 0);
}

// A model in float32 whose cache is of 16 bits: dense tokens and codes are those of a model that computes in the cache's
// type, and what attention reads are they, in the model's.
TEST(KvCache, HoldsTheSameWhateverTheModelComputesIn) {
  const at::Tensor keys = Tokens(23, 8), values = Tokens(23, 9);
  for (const at::ScalarType stored : {at::kHalf, at::kBFloat16}) {
    for (const at::ScalarType computed : {at::kFloat, at::kHalf, at::kBFloat16}) {
      for (const char* text : {"none", "int4-hqq@residual=4@sinks=3", "int2-hqq-kivi@residual=8", "int2-hqq@residual=0",
                               "int4-quanto@residual=4", "none+int8-hqq@residual=4", "int4-hqq@residual=32",
                               "int4-hqq@residual=4@layers=1-1:none", "int4-hqq@policy=hf@residual=4",
                               "int4-hqq@policy=hf@residual=4@layers=1-1:none"}) {
        SCOPED_TRACE(StrCat(text, " ", stored, " under ", computed));
        const Spec spec = ParseSpec(text);
        // A flush of hf encodes decoded numbers again, which two 16-bit types round in turn: codes may differ.
        if (spec.policy == Policy::kHf && computed != at::kFloat) continue;
        // What the model computed, and what it would have in the cache's type.
        const at::Tensor k = keys.to(stored).to(computed), v = values.to(stored).to(computed);
        KvCache own(spec, kShape, 23, stored, at::kCPU), other(spec, kShape, 23, stored, at::kCPU, computed);
        int64_t at = 0;
        for (const int64_t n : {10, 1, 1, 6, 3, 2}) {
          for (int64_t layer = 0; layer < 2; ++layer) {
            const auto part = [&](const at::Tensor& x) { return x.narrow(2, at, n); };
            const auto theirs = own.Update(layer, part(k).to(stored), part(v).to(stored));
            const auto ours = other.Update(layer, part(k), part(v));
            for (const auto& [mine, right] : {std::pair(ours.first, theirs.first), std::pair(ours.second, theirs.second)}) {
              ASSERT_EQ(mine.scalar_type(), computed);
              ASSERT_EQ(mine.sizes(), right.sizes());
              // Decoded numbers are rounded once or twice, or not at all.
              const at::Tensor error = (mine.to(at::kDouble) - right.to(at::kDouble)).abs();
              EXPECT_TRUE((error <= 0x1p-6 * right.to(at::kDouble).abs() + 0x1p-6 * right.abs().max()).all().item<bool>());
            }
            if (spec.stores_dense()) {
              EXPECT_TRUE(ours.first.equal(k.narrow(2, 0, at + n).to(stored).to(computed)));
            }
          }
          at += n;
        }
        EXPECT_EQ(own.AllocatedBytes(), other.AllocatedBytes());
        EXPECT_EQ(other.dtype(), stored);
        if (spec.policy == Policy::kHf) continue;
        const int64_t sinks = spec.sink_tokens, encoded = EncodedTokens(spec, 23);
        for (int64_t layer = 0; layer < 2; ++layer) {
          const auto theirs = own.storage(layer), ours = other.storage(layer);
          for (const auto& [mine, right] : {std::pair(ours.first, theirs.first), std::pair(ours.second, theirs.second)}) {
            if (mine.encoded == nullptr) {
              EXPECT_TRUE(mine.tokens.equal(right.tokens));
              continue;
            }
            for (size_t p = 0; p < mine.encoded->planes.size(); ++p) {
              EXPECT_TRUE(mine.encoded->planes[p].equal(right.encoded->planes[p])) << p;
            }
            EXPECT_TRUE(mine.sinks.equal(right.sinks));
            const int64_t residual = 23 - sinks - encoded;
            EXPECT_TRUE(mine.residual.narrow(2, 0, residual).equal(right.residual.narrow(2, 0, residual)));
          }
        }
      }
    }
  }
}

// ---- policy hf

TEST(KvCache, PolicyHfReturnsOriginalsFirstAndEncodesAgainOnAFlush) {
  KvCache cache(ParseSpec("int2-hqq-kivi@policy=hf@residual=4"), kShape, 32, at::kFloat, at::kCPU);
  const at::Tensor prompt = Tokens(8, 6), token = Tokens(1, 7);
  EXPECT_TRUE(cache.Update(0, prompt, prompt).first.equal(prompt));
  const at::Tensor second = cache.Update(0, token, token).first;
  EXPECT_FALSE(second.narrow(2, 0, 8).equal(prompt));
  EXPECT_TRUE(second.narrow(2, 8, 1).equal(token));
  const int64_t before = cache.AllocatedBytes();
  cache.Update(0, token, token);
  cache.Update(0, token, token);                                          // residual 3
  const at::Tensor flushing = cache.Update(0, token, token).first;        // 3 + 1 >= 4: encode all 12
  const at::Tensor after = cache.Update(0, token, token).first;
  EXPECT_TRUE(flushing.narrow(2, 0, 8).equal(second.narrow(2, 0, 8)));
  EXPECT_FALSE(after.narrow(2, 0, 8).equal(second.narrow(2, 0, 8))) << "encoded a second time";
  EXPECT_FALSE(after.narrow(2, 11, 1).equal(token)) << "the flushed residual is encoded";
  EXPECT_GT(cache.AllocatedBytes(), before);
}

// Every call's output against transformers' QuantizedCache in float32. It keeps scales and zeros in float32,
// kvqbench in fp16: a scale is off by up to 2^-12 of itself, a zero by 2^-12 of itself, both in numbers no
// larger than the range: 1e-3 of the values' norm covers both. A flush encodes what was decoded and adds as
// much again.
TEST(KvCacheParity, PolicyHfEqualsTransformersQuantizedCache) {
  for (const auto& c : Golden("hf_cache.json")) {
    const std::string scheme =
        StrCat("int", c["bits"].get<int>(), "-hqq", c["kivi"].get<bool>() ? "-kivi" : "", "@policy=hf@residual=",
               c["residual"].get<int>());
    const CacheShape shape = CacheShape::Uniform(1, 1, c["heads"], c["head_dim"]);
    KvCache cache(ParseSpec(scheme), shape, 64, at::kFloat, at::kCPU);
    uint64_t call = 0, encodings = 0, residual = 0;
    for (const auto& expected : c["calls"]) {
      const int64_t tokens = expected["tokens"];
      const auto [k, v] = cache.Update(0, Tokens(tokens, 100 + 2 * call, shape), Tokens(tokens, 101 + 2 * call, shape));
      for (const auto& [name, ours] : {std::pair("keys", k), std::pair("values", v)}) {
        const at::Tensor flat = ours.contiguous().view({-1});
        double error = 0, squares = 0;
        for (size_t i = 0; i < expected[name].size(); ++i) {
          const double theirs = expected[name][i];
          const double mine = flat[static_cast<int64_t>(29 * i)].item<float>();
          error += (mine - theirs) * (mine - theirs);
          squares += theirs * theirs;
        }
        EXPECT_LT(std::sqrt(error / squares), call == 0 ? 1e-7 : 1e-3 * encodings) << scheme << " call " << call << " " << name;
      }
      const bool flushes = residual > 0 && residual + 1 >= c["residual"].get<uint64_t>();
      encodings += call == 0 || flushes;
      residual = call == 0 || flushes ? 0 : residual + tokens;
      ++call;
    }
  }
}

// Tokens that a kernel stores itself, by the same rules as fixtures/decode_graph.cc, and then counts.
TEST(KvCache, CountsWhatWasStoredFromOutside) {
  for (const char* text : {"none", "int4-hqq@residual=16@sinks=4", "int2-hqq-kivi@residual=32", "int8-hqq@residual=16"}) {
    const Spec spec = ParseSpec(text);
    KvCache updated(spec, kShape, 100, at::kFloat, at::kCPU), stored(spec, kShape, 100, at::kFloat, at::kCPU);
    for (int64_t length = 0; length < 99; ++length) {
      const at::Tensor x = Tokens(1, static_cast<uint64_t>(length));
      const int64_t encoded = EncodedTokens(spec, length), after = EncodedTokens(spec, length + 1);
      for (int64_t layer = 0; layer < 2; ++layer) {
        updated.Update(layer, x, -x);
        const auto [keys, values] = stored.storage(layer);
        for (const auto& [side, token] : {std::pair(keys, x), std::pair(values, -x)}) {
          if (side.encoded != nullptr && after > encoded) {
            EncodeTensor(*side.codec, side.params, side.residual, encoded, *side.encoded);
          }
          const at::Tensor& to = side.encoded == nullptr          ? side.tokens
                                 : length < spec.sink_tokens ? side.sinks
                                                             : side.residual;
          const bool counted_behind = side.encoded != nullptr && length >= spec.sink_tokens;
          to.narrow(2, counted_behind ? length - spec.sink_tokens - after : length, 1).copy_(token);
        }
      }
      stored.Advance(1);
    }
    for (int64_t layer = 0; layer < 2; ++layer) {
      const at::Tensor x = Tokens(1, 99);
      const auto theirs = updated.Update(layer, x, -x), ours = stored.Update(layer, x, -x);
      EXPECT_TRUE(theirs.first.equal(ours.first)) << text;
      EXPECT_TRUE(theirs.second.equal(ours.second)) << text;
    }
    EXPECT_THROW(stored.Advance(1), std::length_error);
  }
  KvCache hf(ParseSpec("int4-hqq@policy=hf"), kShape, 100, at::kFloat, at::kCPU);
  EXPECT_THROW(hf.Advance(1), std::logic_error);
}

TEST(KvCacheGpu, ReadsTheSameBitsAsOnTheCpu) {
  KVQ_NEEDS_CUDA();
  for (const char* text : {"none", "int8-hqq@residual=16", "int4-hqq@residual=16@sinks=4", "int2-hqq-kivi@residual=32",
                           "int4-hqq@policy=hf@residual=16", "int4-quanto@residual=16"}) {
    KvCache cpu(ParseSpec(text), kShape, 100, at::kHalf, at::kCPU);
    KvCache gpu(ParseSpec(text), kShape, 100, at::kHalf, at::kCUDA);
    for (const int64_t n : {40, 1, 1, 30, 28}) {
      const at::Tensor x = Tokens(n, static_cast<uint64_t>(n)).to(at::kHalf);
      for (int64_t layer = 0; layer < 2; ++layer) {
        const auto a = cpu.Update(layer, x, x), b = gpu.Update(layer, x.cuda(), x.cuda());
        EXPECT_TRUE(a.first.equal(b.first.cpu())) << text;
        EXPECT_TRUE(a.second.equal(b.second.cpu())) << text;
      }
    }
    EXPECT_EQ(cpu.AllocatedBytes(), gpu.AllocatedBytes());
  }
}

}  // namespace
}  // namespace kvq
