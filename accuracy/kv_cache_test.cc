// Cache policies, token by token, and policy hf against transformers.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include "accuracy/golden.h"
#include "fixtures/cache/codec_tensors.h"
#include "fixtures/cache/kv_cache.h"
#include "kernels/error.h"

namespace kvq {
namespace {

const CacheShape kShape = CacheShape::Uniform(/*layers=*/2, /*batch=*/1, /*kv_heads=*/3, /*head_dim=*/64);

at::Tensor Tokens(int64_t count, uint64_t seed, const CacheShape& shape = kShape) {
  const KvShape& of = shape.layers[0];
  return at::tensor(GoldenNumbers(shape.batch * of.kv_heads * count * of.head_dim, seed, "outliers"))
      .view({shape.batch, of.kv_heads, count, of.head_dim});
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

// ---- policy append

TEST(KvCache, EncodedTokensFollowTheRule) {
  const Spec spec = ParseSpec("int4-hqq@residual=4@sinks=2");
  // Sinks 2, then blocks of 4; the newest 1 to 4 tokens stay.
  const std::vector<int64_t> expected = {0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 8};
  for (size_t length = 0; length < expected.size(); ++length) {
    EXPECT_EQ(EncodedTokens(spec, static_cast<int64_t>(length)), expected[length]) << length;
  }
  EXPECT_EQ(EncodedTokens(ParseSpec("int4-hqq@residual=0"), 7), 7);
  const Spec apart = ParseSpec("int4-hqq@residual=4+0@sinks=2");
  EXPECT_EQ(EncodedTokens(apart, apart.keys, 7), 4);
  EXPECT_EQ(EncodedTokens(apart, apart.values, 7), 5);
  EXPECT_EQ(EncodedTokens(apart, 7), 5);
  // KIVI: keys in blocks as soon as they are full, of values all but the newest R.
  const Spec kivi = ParseSpec("int4-hqq@policy=kivi@residual=4");
  const std::vector<int64_t> keys = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8}, values = {0, 0, 0, 0, 0, 1, 2, 3, 4, 5};
  for (size_t length = 0; length < keys.size(); ++length) {
    EXPECT_EQ(EncodedTokens(kivi, kivi.keys, static_cast<int64_t>(length)), keys[length]) << length;
    EXPECT_EQ(EncodedTokens(kivi, kivi.values, static_cast<int64_t>(length)), values[length]) << length;
  }
}

TEST(KvCache, WhatIsReadDoesNotDependOnTheCalls) {
  const at::Tensor keys = Tokens(23, 1);
  for (const char* spec : {"none", "int4-hqq@residual=4", "int4-hqq@residual=4@sinks=3", "int2-hqq@residual=0",
                           "int2-hqq-kivi@residual=8", "int4-hqq@residual=32", "none+int4-hqq@residual=4",
                           "int4-hqq@residual=4@layers=1-1:none", "int4-quanto@residual=4", "int2-quanto@residual=0",
                           "int2-hqq@residual=0@sinks=3", "int4-hqq@residual=4@rotate=hadamard", "int4-hqq@residual=0@rotate=signs",
                           "int4-hqq@residual=4@dense=1+0"}) {
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
                           "int4-hqq+none", "int4-hqq@layers=0-0:none", "int4-hqq@group=32", "int2-quanto", "int4-hqq@dense=1+0",
                           "int4-hqq@residual=128+0", "int4-hqq-kivi+int4-hqq@residual=32+0@sinks=4", "int4-hqq@policy=kivi",
                           "int2-hqq-kivi+int2-hqq@policy=kivi@residual=4", "none+int4-hqq@policy=kivi@residual=128+4",
                           "int4-hqq@rotate=hadamard@prefill=raw"}) {
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
  // KIVI-2's size at 1024 tokens and R = 128, 2-bit codes in groups of 32: 3 bits a key, 4.625 a value.
  const auto bits = [&](const char* text) {
    return static_cast<double>(KvBytes(ParseSpec(text), shape, 1024, at::kHalf)) * 8 / (1024 * 64);
  };
  EXPECT_EQ(bits("int2-hqq@group=32@policy=kivi"), 3 + 4.625);
  EXPECT_EQ(bits("int2-hqq+none@group=32@policy=kivi"), 3 + 16);
  EXPECT_EQ(bits("int4-hqq@residual=128+0"), (896 * 4.5 + 128 * 16) / 1024 + 4.5);
  const CacheShape five = CacheShape::Uniform(5, 1, 1, 64);
  EXPECT_EQ(KvBytes(ParseSpec("int4-hqq@residual=0@dense=2"), five, 1024, at::kHalf), 2 * 64 * 1024 * (4 * 16 + 9 / 2.0) / 8);
  EXPECT_EQ(EncodedShare(ParseSpec("int4-hqq@residual=0@dense=2"), five, 1024), 0.2);
  EXPECT_EQ(EncodedShare(ParseSpec("int2-hqq@policy=kivi"), shape, 1024), (1024 + 896) / 2048.0);
  EXPECT_EQ(EncodedShare(ParseSpec("int2-hqq@policy=hf"), shape, 1024), 1);
  EXPECT_EQ(EncodedShare(ParseSpec("none"), shape, 1024), 0);
  // Of 4 sinks, 384 encoded and 124 residual tokens, what windows show.
  const auto seen = [&](const std::string& text, int64_t window) {
    return KvLayerBytesSeen(ParseSpec(text), shape, 0, 512, window, at::kBFloat16);
  };
  EXPECT_EQ(seen("int4-hqq@sinks=4", 100), 2 * 64 * 100 * 2);
  EXPECT_EQ(seen("int4-hqq@sinks=4", 140), 2 * 64 * (16 * 9 / 16 + 124 * 2));
  EXPECT_EQ(seen("int4-hqq@sinks=4", 510), 2 * 64 * (384 * 9 / 16 + 126 * 2));
  EXPECT_EQ(seen("int4-hqq+none@sinks=4", 140), 64 * (16 * 9 / 16 + 124 * 2 + 140 * 2));
  EXPECT_EQ(seen("int4-hqq@residual=128+0", 140), 64 * (12 * 9) / 16 + 64 * 128 * 2 + 64 * 140 * 9 / 16);
  EXPECT_EQ(seen("int4-hqq@policy=kivi@residual=128", 100), 64 * 100 * 9 / 16 + 64 * 100 * 2);
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
              const int64_t bytes = mine.encoded->planes[p].size(1) / std::max<int64_t>(mine.encoded->tokens, 1) * encoded;
              EXPECT_TRUE(mine.encoded->planes[p].narrow(1, 0, bytes).equal(right.encoded->planes[p].narrow(1, 0, bytes))) << p;
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

// ---- residuals apart, prefill raw, dense layers

// x through a scheme, in blocks of so many tokens, rotated in between where that is wanted.
at::Tensor Decoded(const Codec& codec, const at::Tensor& x, int64_t block, const Rotation& rotation = {}) {
  const CodecParams params{.group_size = codec.default_group};
  at::Tensor decoded = at::empty(x.sizes(), x.options());
  if (x.size(2) == 0) return decoded;
  EncodedTensors encoded = AllocateEncoded(codec, params, x.size(0), x.size(1), x.size(3), x.size(2), block, at::kCPU);
  EncodeTensor(codec, params, Rotated(rotation, x.contiguous()), 0, encoded);
  DecodeTensor(codec, params, encoded, 0, decoded);
  return Unrotated(rotation, decoded);
}

TEST(KvCache, KeysAndValuesKeepResidualsOfTheirOwn) {
  const at::Tensor keys = Tokens(23, 12), values = Tokens(23, 13);
  const Codec &of_keys = FindScheme("int2-hqq-kivi").keys, &of_values = FindScheme("int4-hqq").values;
  KvCache cache(ParseSpec("int2-hqq-kivi+int4-hqq@residual=8+0"), kShape, 23, at::kFloat, at::kCPU);
  for (int64_t t = 0; t < 23; ++t) {
    const auto read = cache.Update(0, keys.narrow(2, t, 1), values.narrow(2, t, 1));
    // Keys: blocks of 8 whose successor is there. Values: every one, a token's own among them.
    const int64_t blocks = t / 8 * 8;
    ASSERT_TRUE(read.first.equal(at::cat({Decoded(of_keys, keys.narrow(2, 0, blocks), 8), keys.narrow(2, blocks, t + 1 - blocks)}, 2))) << t;
    ASSERT_TRUE(read.second.equal(Decoded(of_values, values.narrow(2, 0, t + 1), 1))) << t;
    cache.Update(1, keys.narrow(2, t, 1), values.narrow(2, t, 1));
  }
}

TEST(KvCache, ARawPrefillReadsTheOriginalsAndStoresTheSame) {
  const at::Tensor keys = Tokens(23, 14), values = Tokens(23, 15);
  for (const char* text : {"int4-hqq@residual=4@sinks=3", "int4-hqq@residual=0", "none+int4-hqq@residual=4+0", "int2-hqq-kivi@residual=8"}) {
    KvCache stored(ParseSpec(text), kShape, 23, at::kBFloat16, at::kCPU, at::kFloat);
    KvCache raw(ParseSpec(StrCat(text, "@prefill=raw")), kShape, 23, at::kBFloat16, at::kCPU, at::kFloat);
    for (int round = 0; round < 2; ++round) {  // an empty cache is one that was cleared, too
      int64_t at = 0;
      for (const int64_t n : {10, 1, 12}) {
        for (int64_t layer = 0; layer < 2; ++layer) {
          const at::Tensor k = keys.narrow(2, at, n), v = values.narrow(2, at, n);
          const auto theirs = stored.Update(layer, k, v), ours = raw.Update(layer, k, v);
          EXPECT_EQ(at == 0, ours.first.equal(keys.narrow(2, 0, at + n))) << text << " call at " << at;
          EXPECT_EQ(at == 0, ours.second.equal(values.narrow(2, 0, at + n))) << text << " call at " << at;
          if (at == 0) continue;
          EXPECT_TRUE(ours.first.equal(theirs.first)) << text << " call at " << at;
          EXPECT_TRUE(ours.second.equal(theirs.second)) << text << " call at " << at;
        }
        at += n;
      }
      EXPECT_TRUE(ReadsEncoded(ParseSpec("int4-hqq@residual=4"), 10, 10));
      EXPECT_FALSE(ReadsEncoded(raw.spec(), 10, 10));
      EXPECT_TRUE(ReadsEncoded(raw.spec(), 23, 12));
      stored.Clear(), raw.Clear();
    }
  }
}

// ---- policy kivi

// What models/llama_kivi.py of jy-yuan/KIVI (876b4d2) does with one layer's keys and values: what is encoded stands as it
// is decoded in `quant`, what is not in `full`.
class LlamaKivi {
 public:
  LlamaKivi(const Codec& keys, const Codec& values, int64_t residual) : keys_(keys), values_(values), r_(residual) {}

  // Both return what attention reads.
  std::pair<at::Tensor, at::Tensor> Prefill(const at::Tensor& k, const at::Tensor& v) {
    const int64_t n = k.size(2);
    if (n % r_ != 0) {
      if (n < r_) {
        k_full_ = k;
      } else {
        k_quant_ = Decoded(keys_, k.narrow(2, 0, n - n % r_), r_), k_full_ = k.narrow(2, n - n % r_, n % r_);
      }
    } else {
      k_quant_ = Decoded(keys_, k, r_);
    }
    if (n <= r_) {
      v_full_ = v;
    } else {
      v_quant_ = Decoded(values_, v.narrow(2, 0, n - r_), 1), v_full_ = v.narrow(2, n - r_, r_);
    }
    return {k, v};
  }
  std::pair<at::Tensor, at::Tensor> Decode(const at::Tensor& k, const at::Tensor& v) {
    k_full_ = Behind(k_full_, k);
    const at::Tensor keys = Behind(k_quant_, k_full_);
    if (k_full_.size(2) == r_) {
      k_quant_ = Behind(k_quant_, Decoded(keys_, k_full_, r_));
      k_full_.reset();
    }
    v_full_ = Behind(v_full_, v);
    const at::Tensor values = Behind(v_quant_, v_full_);
    if (v_full_.size(2) > r_) {
      EXPECT_EQ(v_full_.size(2), r_ + 1);
      v_quant_ = Behind(v_quant_, Decoded(values_, v_full_.narrow(2, 0, 1), 1));
      v_full_ = v_full_.narrow(2, 1, r_);
    }
    return {keys, values};
  }
  int64_t dense_keys() const { return k_full_.defined() ? k_full_.size(2) : 0; }
  int64_t dense_values() const { return v_full_.size(2); }

 private:
  static at::Tensor Behind(const at::Tensor& first, const at::Tensor& second) {
    return first.defined() ? at::cat({first, second}, 2) : second;
  }
  const Codec &keys_, &values_;
  int64_t r_;
  at::Tensor k_quant_, k_full_, v_quant_, v_full_;
};

TEST(KvCache, PolicyKiviReadsAndKeepsWhatKivisCodeDoes) {
  constexpr int64_t kResidual = 8, kSteps = 21;
  const CacheShape shape = CacheShape::Uniform(1, 1, 3, 64);
  for (const auto& [keys, values] : {std::pair("int2-hqq-kivi", "int2-hqq"), std::pair("int4-hqq", "int4-quanto")}) {
    const Spec spec = ParseSpec(StrCat(keys, "+", values, "@policy=kivi@residual=", kResidual));
    for (const int64_t prompt : {kResidual - 1, kResidual, kResidual + 1, 2 * kResidual, int64_t{1}, int64_t{30}}) {
      SCOPED_TRACE(StrCat(spec.text, " prompt ", prompt));
      LlamaKivi theirs(FindScheme(keys).keys, FindScheme(values).values, kResidual);
      KvCache ours(spec, shape, prompt + kSteps, at::kFloat, at::kCPU);
      const at::Tensor k = Tokens(prompt + kSteps, 20), v = Tokens(prompt + kSteps, 21);
      for (int64_t length = 0; length < prompt + kSteps;) {
        const int64_t n = length == 0 ? prompt : 1;
        const at::Tensor new_k = k.narrow(2, length, n), new_v = v.narrow(2, length, n);
        const auto expected = length == 0 ? theirs.Prefill(new_k, new_v) : theirs.Decode(new_k, new_v);
        const auto read = ours.Update(0, new_k, new_v);
        ASSERT_TRUE(read.first.equal(expected.first)) << length;
        ASSERT_TRUE(read.second.equal(expected.second)) << length;
        length += n;
        EXPECT_EQ(length - EncodedTokens(spec, spec.keys, length), theirs.dense_keys()) << length;
        EXPECT_EQ(length - EncodedTokens(spec, spec.values, length), theirs.dense_values()) << length;
      }
    }
  }
}

// The bytes of all tokens, dense ones in the order in which they came.
std::vector<at::Tensor> BytesOf(const KvCache& cache) {
  const Spec& spec = cache.spec();
  std::vector<at::Tensor> bytes;
  for (int64_t layer = 0; layer < cache.shape().count(); ++layer) {
    const auto [keys, values] = cache.storage(layer);
    for (const auto& [side, rule] : {std::pair(&keys, &spec.keys), std::pair(&values, &spec.values)}) {
      if (side->encoded == nullptr) {
        bytes.push_back(side->tokens.narrow(2, 0, cache.length()).clone());
        continue;
      }
      const int64_t encoded = EncodedTokens(spec, *rule, cache.length()), sinks = std::min(cache.length(), spec.sink_tokens);
      for (const at::Tensor& plane : side->encoded->planes) {
        bytes.push_back(plane.narrow(1, 0, side->encoded->tokens == 0 ? 0 : plane.size(1) / side->encoded->tokens * encoded).clone());
      }
      bytes.push_back(side->sinks.narrow(2, 0, sinks).clone());
      const bool ring = spec.policy == Policy::kKivi && rule->values;
      for (int64_t t = sinks + encoded; t < cache.length(); ++t) {
        bytes.push_back(side->residual.select(2, ring ? t % side->residual.size(2) : t - sinks - encoded).clone());
      }
    }
  }
  return bytes;
}
bool Same(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const at::Tensor& x, const at::Tensor& y) { return x.equal(y); });
}

const std::vector<std::string>& AllPolicies() {
  static const std::vector<std::string> specs = {
      "none", "int4-hqq@residual=4@sinks=3", "int2-hqq@residual=0", "int2-hqq@residual=0@sinks=3", "int4-hqq@residual=8+0",
      "int4-hqq@residual=0+4@sinks=3", "int2-hqq-kivi+int4-hqq@residual=8+2", "none+int4-hqq@residual=4+0", "int4-hqq@residual=32+0",
      "int4-hqq@residual=4@prefill=raw", "int4-hqq@policy=kivi@residual=4", "int2-hqq-kivi+int4-hqq@policy=kivi@residual=8+4",
      "int4-hqq@policy=kivi@residual=1", "int4-hqq@policy=kivi@residual=32", "none+int4-hqq@policy=kivi@residual=4",
      "int4-hqq@policy=kivi@residual=4@rotate=hadamard", "int4-hqq@residual=4@rotate=signs+none@dense=1+0"};
  return specs;
}

TEST(KvCache, WhatIsStoredDoesNotDependOnTheCalls) {
  const at::Tensor keys = Tokens(23, 1), values = Tokens(23, 2);
  const auto stored = [&](const std::string& spec, const std::vector<int64_t>& calls) {
    KvCache cache(ParseSpec(spec), kShape, 25, at::kFloat, at::kCPU);
    int64_t at = 0;
    for (const int64_t n : calls) {
      for (int64_t layer = 0; layer < 2; ++layer) cache.Update(layer, keys.narrow(2, at, n), values.narrow(2, at, n));
      at += n;
    }
    EXPECT_EQ(at, 23);
    return BytesOf(cache);
  };
  for (const std::string& spec : AllPolicies()) {
    const auto one = stored(spec, {23});
    EXPECT_TRUE(Same(one, stored(spec, std::vector<int64_t>(23, 1)))) << spec;
    EXPECT_TRUE(Same(one, stored(spec, {4, 4, 4, 4, 4, 3}))) << spec;
    EXPECT_TRUE(Same(one, stored(spec, {1, 2, 11, 5, 4}))) << spec;
    EXPECT_TRUE(Same(one, stored(spec, {3, 20}))) << spec;
  }
}

TEST(KvCache, GoesBackToWhereItWasUnderEveryPolicy) {
  const at::Tensor keys = Tokens(23, 1), values = Tokens(23, 2), other = Tokens(23, 3);
  for (const std::string& spec : AllPolicies()) {
    for (const int64_t saved : {2, 4, 9, 13}) {
      KvCache cache(ParseSpec(spec), kShape, 23, at::kFloat, at::kCPU), straight(ParseSpec(spec), kShape, 23, at::kFloat, at::kCPU);
      const auto feed = [&](KvCache& to, const at::Tensor& k, const at::Tensor& v, int64_t from, int64_t n) {
        std::pair<at::Tensor, at::Tensor> last;
        for (int64_t layer = 0; layer < 2; ++layer) {
          const auto read = to.Update(layer, k.narrow(2, from, n), v.narrow(2, from, n));
          last = {read.first.clone(), read.second.clone()};
        }
        return last;
      };
      feed(cache, keys, values, 0, saved), feed(straight, keys, values, 0, saved);
      const std::function<void()> back = cache.Save();
      const auto next = feed(straight, keys, values, saved, 3);
      for (const int64_t n : {1, 10, 5}) {
        feed(cache, other, other, saved, n);
        back();
        EXPECT_EQ(cache.length(), saved);
      }
      const auto again = feed(cache, keys, values, saved, 3);
      EXPECT_TRUE(again.first.equal(next.first) && again.second.equal(next.second)) << spec << " after " << saved;
      EXPECT_TRUE(Same(BytesOf(cache), BytesOf(straight))) << spec << " after " << saved;
    }
  }
}

// ---- rotation

// Against the matrix, in float64, and to the bit against the same operations on tensors, which a GPU does.
TEST(Rotation, IsSylvestersMatrix) {
  const auto sylvester = [](int64_t n) {
    at::Tensor h = at::empty({n, n}, at::kDouble);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) h[i][j] = (__builtin_popcountll(static_cast<unsigned long long>(i & j)) % 2 == 0 ? 1 : -1) / std::sqrt(static_cast<double>(n));
    }
    return h;
  };
  for (const auto& [dim, block, size] : std::vector<std::array<int64_t, 3>>{{64, 0, 64}, {128, 0, 128}, {128, 64, 64}, {96, 0, 32}, {256, 64, 64}}) {
    const at::Tensor x = Tokens(5, 30, CacheShape::Uniform(1, 2, 3, dim));
    const at::Tensor signs = at::bernoulli(at::full({dim}, 0.5), at::detail::createCPUGenerator(0x9E3779B9)) * 2 - 1;
    for (const Rotation::Kind kind : {Rotation::kHadamard, Rotation::kSigns}) {
      const Rotation rotation{kind, block};
      at::Tensor turned = kind == Rotation::kSigns ? x * signs : x;  // vLLM's signs, of the generator that it asks
      const at::Tensor exact = at::matmul(turned.to(at::kDouble).view({2, 3, 5, dim / size, size}), sylvester(size)).view(x.sizes());
      // Multiplications and log2(n) additions, each off by at most a roundoff of numbers of this size.
      const double roundoffs = (2 + std::log2(static_cast<double>(size))) * 0x1p-24 * std::sqrt(static_cast<double>(size));
      EXPECT_LE((Rotated(rotation, x) - exact).abs().max().item<double>(), roundoffs * x.abs().max().item<double>());
      turned = turned * (1 / std::sqrt(static_cast<float>(size)));
      for (int64_t h = 1; h < size; h *= 2) {
        const at::Tensor pairs = turned.reshape({-1, 2, h});
        turned = at::cat({pairs.narrow(1, 0, 1) + pairs.narrow(1, 1, 1), pairs.narrow(1, 0, 1) - pairs.narrow(1, 1, 1)}, 1).view(x.sizes());
      }
      EXPECT_TRUE(Rotated(rotation, x).equal(turned)) << dim << " in " << block;
      EXPECT_LE((Unrotated(rotation, Rotated(rotation, x)) - x).abs().max().item<double>(), 2 * roundoffs * x.abs().max().item<double>());
      EXPECT_TRUE(Rotated(rotation, x.transpose(1, 2)).equal(turned.transpose(1, 2))) << "strides are no matter";
    }
  }
  const at::Tensor x = Tokens(5, 30);
  EXPECT_TRUE(Rotated({}, x).is_same(x));
}

TEST(RotationGpu, IsTheSameToTheBit) {
  KVQ_NEEDS_CUDA();
  for (const int64_t dim : {64, 96, 128, 256}) {
    const at::Tensor x = Tokens(5, 31, CacheShape::Uniform(1, 2, 3, dim));
    for (const Rotation& rotation : {Rotation{Rotation::kHadamard, 0}, Rotation{Rotation::kSigns, 32}}) {
      EXPECT_TRUE(Rotated(rotation, x.cuda()).cpu().equal(Rotated(rotation, x))) << dim;
      EXPECT_TRUE(Unrotated(rotation, x.cuda()).cpu().equal(Unrotated(rotation, x))) << dim;
    }
  }
}

TEST(KvCache, RotatesEncodedTokensAndNoOthers) {
  const at::Tensor keys = Tokens(23, 32), values = Tokens(23, 33);
  KvCache cache(ParseSpec("int4-hqq@residual=4@sinks=3@rotate=hadamard+signs:32"), kShape, 23, at::kFloat, at::kCPU);
  const auto read = cache.Update(0, keys, values);
  const Codec& codec = FindScheme("int4-hqq").keys;
  for (const auto& [plain, found, rotation] : {std::tuple(keys, read.first, Rotation{Rotation::kHadamard, 64}),
                                               std::tuple(values, read.second, Rotation{Rotation::kSigns, 32})}) {
    const at::Tensor middle = plain.narrow(2, 3, 16);
    EXPECT_TRUE(found.equal(at::cat({plain.narrow(2, 0, 3), Decoded(codec, middle, 4, rotation), plain.narrow(2, 19, 4)}, 2)));
    EXPECT_FALSE(Decoded(codec, middle, 4, rotation).equal(Decoded(codec, middle, 4)));
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

// Tokens that a kernel stores itself, by the same rules as fixtures/decode_step.cc, and then counts.
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
                           "int4-hqq@policy=hf@residual=16", "int4-quanto@residual=16", "int4-hqq@residual=16+0",
                           "int4-hqq@policy=kivi@residual=16", "int4-hqq@residual=16@rotate=hadamard+signs"}) {
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
