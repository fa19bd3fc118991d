// The tables, and the arithmetic that every scheme stands on.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "benchmarks/measurement.h"
#include "kernels/error.h"
#include "kernels/half.h"

namespace kvq {
namespace {

TEST(Tables, HaveTheirRows) {
  for (const char* name : {"none", "int8-hqq", "int4-hqq", "int2-hqq", "int4-hqq-kivi", "int2-hqq-kivi",
                           "int4-quanto", "int2-quanto"}) {
    const Scheme& scheme = FindScheme(name);
    EXPECT_FALSE(scheme.source.empty()) << name;
    if (scheme.stores_dense()) continue;
    for (const Codec* codec : {&scheme.keys, &scheme.values}) {
      EXPECT_NE(codec->decode, nullptr) << name;
      EXPECT_GT(codec->nmse_budget, 0) << name;
      EXPECT_NE(codec->encode_cuda, nullptr) << name;
      EXPECT_NE(codec->decode_cuda, nullptr) << name;
    }
  }
  for (const char* name : {"int8-quanto", "int8-quanto-kivi", "int4-quanto-kivi", "int2-quanto-kivi", "int5"}) {
    EXPECT_THROW(FindScheme(name), InputError) << name;
  }
  EXPECT_TRUE(std::is_sorted(Schemes().begin(), Schemes().end(),
                             [](const Scheme& a, const Scheme& b) { return a.name < b.name; }));
  std::string names;
  for (const Measurement& measurement : Measurements()) names += measurement.name + " ";
  EXPECT_EQ(names, "decode error kv_size prefill "
                   "dequantize distribution kernel_attention kernel_decode kernel_encode kernel_flush memory power quantize "
                   "needle perplexity sensitivity ");
  names.clear();
  for (const PublishedShape& shape : PublishedShapes()) names += shape.name + " ";
  EXPECT_EQ(names, "gemma-4-e4b gpt2 llama-2-7b llama-3.1-8b mistral-7b mistral-7b-v0.1 qwen2-0.5b qwen2-7b qwen3-8b yi-1.5-9b ");
}

// All 65536 halves, and the neighbourhood of every border between two of them, against libtorch.
TEST(Half, ConversionsEqualLibtorchs) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto h = static_cast<uint16_t>(bits);
    const float half = static_cast<float>(c10::Half(h, c10::Half::from_bits()));
    const float bfloat = static_cast<float>(c10::BFloat16(h, c10::BFloat16::from_bits()));
    if (std::isnan(half)) {
      EXPECT_TRUE(std::isnan(HalfToFloat(h)));
      EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(half))));
    } else {
      EXPECT_EQ(FloatBits(HalfToFloat(h)), FloatBits(half)) << bits;
      EXPECT_EQ(FloatToHalf(half), h);
      for (const float x : {half * 1.0001f, half * 1.00048828125f, half * 0.9997f, half * 1.000244140625f}) {
        EXPECT_EQ(FloatToHalf(x), c10::Half(x).x) << x;
      }
    }
    if (std::isnan(bfloat)) {
      EXPECT_TRUE(std::isnan(BFloat16ToFloat(h)));
      EXPECT_TRUE(std::isnan(BFloat16ToFloat(FloatToBFloat16(bfloat))));
    } else {
      EXPECT_EQ(FloatBits(BFloat16ToFloat(h)), FloatBits(bfloat));
      for (const float x : {bfloat, bfloat * 1.00390625f, bfloat * 1.002f, bfloat * 0.998f}) {
        if (!std::isnan(x)) {
          EXPECT_EQ(FloatToBFloat16(x), c10::BFloat16(x).x) << x;
        }
      }
    }
  }
}

TEST(VectorMath, StaysWithinItsStatedError) {
  double worst_exp = 0, worst_exp2 = 0;
  for (int i = -85993; i <= 88000; i += 7) {
    const float x = static_cast<float>(i) * 1e-3f;
    worst_exp = std::max(worst_exp, std::abs(Exp(x) / std::exp(static_cast<double>(x)) - 1));
  }
  for (int i = -125000; i <= 127000; i += 7) {
    const float y = static_cast<float>(i) * 1e-3f;
    worst_exp2 = std::max(worst_exp2, std::abs(Exp2(y) / std::exp2(static_cast<double>(y)) - 1));
  }
  EXPECT_LT(worst_exp, 2e-7);
  EXPECT_LT(worst_exp2, 2e-7);
  EXPECT_EQ(Exp(0), 1);
  EXPECT_EQ(Exp(-100), 0);
  EXPECT_EQ(Exp(-INFINITY), 0);
  EXPECT_EQ(RoundToEven(2.5f), 2);
  EXPECT_EQ(RoundToEven(3.5f), 4);
  EXPECT_EQ(RoundToEven(-0.5f), 0);
}

}  // namespace
}  // namespace kvq
