// The tables, every scheme of them, and the arithmetic that all stand on. What is asked of a scheme is in contract.h.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <map>

#include "accuracy/contract.h"
#include "accuracy/encoded.h"
#include "benchmarks/measurement.h"
#include "kernels/error.h"
#include "kernels/half.h"
#include "kernels/plain.h"
#include "kernels/small_float.h"

namespace kvq {
namespace {

TEST(Tables, HaveTheirRows) {
  for (const char* name : {"none", "int8-hqq", "int4-hqq", "int2-hqq", "int4-hqq-kivi", "int2-hqq-kivi",
                           "int4-quanto", "int2-quanto", "q8_0"}) {
    EXPECT_NO_THROW(FindScheme(name)) << name;
  }
  for (const Scheme& scheme : Schemes()) EXPECT_FALSE(scheme.source.empty()) << scheme.name;
  for (const char* name : {"int8-quanto", "int8-quanto-kivi", "int4-quanto-kivi", "int2-quanto-kivi", "int5"}) {
    EXPECT_THROW(FindScheme(name), InputError) << name;
  }
  EXPECT_TRUE(std::is_sorted(Schemes().begin(), Schemes().end(),
                             [](const Scheme& a, const Scheme& b) { return a.name < b.name; }));
  std::string names;
  for (const Measurement& measurement : Measurements()) names += measurement.name + " ";
  EXPECT_EQ(names, "decode error kv_size prefill "
                   "capacity dequantize distribution kernel_attention kernel_decode kernel_encode kernel_flush memory power quantize "
                   "drift needle perplexity reuse ruler_cwe ruler_fwe ruler_niah_keys_2 ruler_niah_keys_4 ruler_niah_keys_8 "
                   "ruler_niah_multikey_1 ruler_niah_multikey_2 ruler_niah_multikey_3 ruler_niah_multiquery ruler_niah_multivalue "
                   "ruler_niah_single_1 ruler_niah_single_2 ruler_niah_single_3 ruler_qa_1 ruler_qa_2 ruler_vt ruler_vt_hops_1 "
                   "ruler_vt_hops_2 ruler_vt_hops_3 sensitivity ");
}

// ---- every scheme

// Keys' and values' codecs of a scheme, once where they are one.
std::vector<std::pair<const char*, const Codec*>> CodecsOf(const Scheme& scheme) {
  std::vector<std::pair<const char*, const Codec*>> codecs = {{"keys", &scheme.keys}};
  if (scheme.keys.encode != scheme.values.encode || scheme.keys.planes != scheme.values.planes) codecs.emplace_back("values", &scheme.values);
  std::erase_if(codecs, [](const auto& codec) { return codec.second->encode == nullptr; });
  return codecs;
}

std::vector<std::string> NamesOfSchemes() {
  std::vector<std::string> names;
  for (const Scheme& scheme : Schemes()) {
    if (scheme.refused.empty() && !scheme.stores_dense()) names.push_back(scheme.name);
  }
  return names;
}

std::string TestName(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::replace_if(name.begin(), name.end(), [](char c) { return std::isalnum(static_cast<unsigned char>(c)) == 0; }, '_');
  return name;
}

class EveryScheme : public testing::TestWithParam<std::string> {
 protected:
  void Expect(std::initializer_list<std::string (*)(const Codec&)> checks) {
    for (const auto& [side, codec] : CodecsOf(FindScheme(GetParam()))) {
      for (const auto check : checks) EXPECT_EQ(check(*codec), "") << side;
    }
  }
};

TEST_P(EveryScheme, IsWhatItsRowSays) { Expect({contract::CheckRow, contract::CheckShapes}); }
TEST_P(EveryScheme, WritesEveryByteOfItsSlotsAndNoOther) { Expect({contract::CheckSizes}); }
TEST_P(EveryScheme, BytesDoNotDependOnHowTokensArrive) { Expect({contract::CheckCalls}); }
TEST_P(EveryScheme, ReadsAndWritesEveryType) { Expect({contract::CheckTypes}); }
TEST_P(EveryScheme, NotANumberStaysInItsGroup) { Expect({contract::CheckNotFinite}); }
TEST_P(EveryScheme, UnusualNumbersStayNumbers) { Expect({contract::CheckUnusual}); }
TEST_P(EveryScheme, ErrorIsWhatItsRowSays) { Expect({contract::CheckError}); }

class EverySchemeParity : public EveryScheme {};

TEST_P(EverySchemeParity, EqualsItsGoldenFile) { Expect({contract::CheckGolden}); }

// Its kernels give the CPU's bits.
void ExpectSameBitsOnGpu(const Codec& codec, const std::vector<Case>& cases, const std::vector<std::string>& kinds) {
  for (const Case& some : cases) {
    for (const int64_t group : contract::GroupsOf(codec)) {
      Case c = some;
      c.head_dim = contract::HeadDim(codec, group, c.head_dim);
      c.tokens = contract::UpTo(c.tokens, codec.min_block_tokens), c.block = contract::UpTo(c.block, codec.min_block_tokens);
      if (c.tokens % c.block != 0) c.block = c.tokens;
      for (const std::string& kind : kinds) {
        const CodecParams params{.group_size = group};
        const at::Tensor numbers = Input(GoldenNumbers(2 * c.heads * c.tokens * c.head_dim, 9, kind), c, 2);
        if (kind == "not finite") {
          const float bad[] = {NAN, INFINITY, -INFINITY, 1e5f, -1e5f, 2e6f, -0.0f};
          const at::Tensor flat = numbers.flatten();
          for (int64_t i = 0; i < 7; ++i) flat[i * (flat.numel() - 1) / 6] = bad[i];
        }
        if (kind == "one large") {  // of each token
          const at::Tensor rows = numbers.view({-1, c.head_dim});
          const at::Tensor at = at::arange(rows.size(0)).remainder(c.head_dim).unsqueeze(1);
          rows.scatter_(1, at, rows.gather(1, at).mul(20000).clamp(-60000, 60000));
        }
        if (kind == "zeros") numbers.mul_(0);  // of both signs
        if (kind == "squares overflow") numbers.mul_(1e25);
        if (kind == "squares vanish") numbers.mul_(1e-27);
        for (const at::ScalarType type : {at::kFloat, at::kHalf, at::kBFloat16}) {
          SCOPED_TRACE(StrCat(numbers.sizes(), " group ", group, " ", kind, " ", type));
          const at::Tensor x = numbers.to(type);
          const EncodedTensors cpu = Encode(codec, params, x, c.block);
          at::Tensor there = x.cuda();
          if (kind == "one large") there = there.transpose(1, 2).contiguous().transpose(1, 2);
          const EncodedTensors gpu = Encode(codec, params, there, c.block);
          for (size_t p = 0; p < cpu.planes.size(); ++p) {
            ASSERT_TRUE(cpu.planes[p].equal(gpu.planes[p].cpu())) << "plane " << p;
          }
          for (const at::ScalarType to : {at::kFloat, at::kHalf, at::kBFloat16}) {
            at::Tensor a = at::empty(x.sizes(), to), b = at::empty(x.sizes(), a.options().device(at::kCUDA));
            DecodeTensor(codec, params, cpu, 0, a);
            DecodeTensor(codec, params, gpu, 0, b);
            ASSERT_TRUE(at::allclose(a, b.cpu(), 0, 0, /*equal_nan=*/true)) << "decoded to " << to;
          }
        }
      }
    }
  }
}

// Bytes of a token and head in head_dim 64 and 128, all metadata counted, as the engines' sources lay them out.
TEST(SchemeParity, BytesAreTheEngines) {
  const std::map<std::string, std::array<int64_t, 2>> bytes = {
      {"q8_0", {68, 136}}, {"q5_1", {48, 96}}, {"q5_0", {44, 88}}, {"q4_1", {40, 80}}, {"q4_0", {36, 72}}, {"iq4_nl", {36, 72}},
      {"kivi-4", {40, 80}}, {"kivi-2", {24, 48}}, {"fp8-e4m3", {64, 128}}, {"fp8-e5m2", {64, 128}}, {"int8-token", {68, 132}},
      {"fp8-e4m3-token", {68, 132}}, {"int4-token", {36, 68}}, {"turboquant-k4", {34, 66}}, {"turboquant-k3", {26, 50}},
      {"turboquant-v4", {36, 68}}, {"turboquant-v3", {28, 52}}, {"nvfp4", {36, 72}}, {"nvfp4-4over6", {36, 72}},
      {"mxfp4", {34, 68}}, {"mxfp8", {66, 132}}, {"lmdeploy-8", {68, 132}}, {"lmdeploy-4", {36, 68}}, {"mlx-4", {36, 72}},
      {"mlx-8", {68, 136}}, {"sglang-fp4", {36, 72}}, {"quarot-4", {36, 68}}, {"exl3-4", {36, 72}}};
  for (const auto& [name, expected] : bytes) {
    for (const auto& [side, codec] : CodecsOf(FindScheme(name))) {
      for (const size_t i : {0, 1}) {
        const int64_t tokens = 128;
        EXPECT_EQ(EncodedBytes(*codec, {.group_size = codec->default_group}, 1, 1, 64 << i, tokens), expected[i] * tokens)
            << name << ", " << side << ", head_dim " << (64 << i);
      }
    }
  }
}

class EverySchemeGpu : public testing::TestWithParam<std::string> {};

TEST_P(EverySchemeGpu, SameBitsAsTheCpu) {
  KVQ_NEEDS_CUDA();
  for (const auto& [side, codec] : CodecsOf(FindScheme(GetParam()))) {
    SCOPED_TRACE(side);
    ExpectSameBitsOnGpu(*codec, {{1, 1, 64, 1}, {2, 40, 80, 8}, {3, 256, 64, 128}, {8, 65, 128, 65}, {2, 96, 256, 32}, {4, 1000, 128, 1000}},
                        {"normal", "outliers", "constant", "tiny", "offset", "ties", "not finite"});
  }
}

// Where a shorter way to a number, or one by a bound, would show; the first kind lies in memory token by token.
TEST_P(EverySchemeGpu, TokensOfUnlikeNumbers) {
  KVQ_NEEDS_CUDA();
  for (const auto& [side, codec] : CodecsOf(FindScheme(GetParam()))) {
    SCOPED_TRACE(side);
    ExpectSameBitsOnGpu(*codec, {{2, 1000, 64, 1000}, {2, 1000, 128, 1000}}, {"one large", "zeros", "squares overflow", "squares vanish"});
  }
}

// What fits under a sanitizer.
TEST_P(EverySchemeGpu, AFewShapes) {
  KVQ_NEEDS_CUDA();
  for (const auto& [side, codec] : CodecsOf(FindScheme(GetParam()))) {
    ExpectSameBitsOnGpu(*codec, {{1, 1, 64, 1}, {3, 96, 128, 32}}, {"outliers", "not finite"});
  }
}

// Many tokens in one launch, which kernels may deal out otherwise, as in launches of few.
TEST_P(EverySchemeGpu, ManyTokensAsFew) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(6);
  for (const auto& [side, codec] : CodecsOf(FindScheme(GetParam()))) {
    SCOPED_TRACE(side);
    const int64_t block = contract::UpTo(32, codec->min_block_tokens), head_dim = contract::HeadDim(*codec, codec->default_group, 128);
    const int64_t tokens = contract::UpTo(12341, codec->min_block_tokens), few = contract::UpTo(992, codec->min_block_tokens);
    const CodecParams params{.group_size = codec->default_group};
    const at::Tensor x = at::randn({2, 8, tokens, head_dim}, at::dtype(at::kHalf).device(at::kCUDA));
    const auto none_yet = [&] {
      EncodedTensors encoded = AllocateEncoded(*codec, params, 2, 8, head_dim, contract::UpTo(tokens, block), block, at::kCUDA);
      for (at::Tensor& plane : encoded.planes) plane.fill_(0xA5);
      return encoded;
    };
    const EncodedTensors expected = none_yet(), found = none_yet();
    for (int64_t first = 0; first < tokens; first += few) {
      EncodeTensor(*codec, params, x.narrow(2, first, std::min(few, tokens - first)), first, expected);
    }
    EncodeTensor(*codec, params, x, 0, found);
    for (size_t p = 0; p < found.planes.size(); ++p) EXPECT_TRUE(found.planes[p].equal(expected.planes[p])) << p;
  }
}

// A captured graph encodes to where a number in device memory says.
TEST_P(EverySchemeGpu, AFewShapesGoWhereTheDeviceSays) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(5);
  for (const auto& [side, codec] : CodecsOf(FindScheme(GetParam()))) {
    SCOPED_TRACE(side);
    const int64_t block = contract::UpTo(32, codec->min_block_tokens), head_dim = contract::HeadDim(*codec, codec->default_group, 128);
    const CodecParams params{.group_size = codec->default_group};
    const at::Tensor x = at::randn({2, 3, block, head_dim}, at::dtype(at::kHalf).device(at::kCUDA));
    const at::Tensor base = at::tensor({static_cast<int>(block)}, at::kInt).cuda();
    const auto three_blocks = [&] {
      EncodedTensors blocks = AllocateEncoded(*codec, params, 2, 3, head_dim, 3 * block, block, at::kCUDA);
      for (at::Tensor& plane : blocks.planes) plane.fill_(0xA5);
      return blocks;
    };
    const EncodedTensors expected = three_blocks(), found = three_blocks();
    EncodeTensor(*codec, params, x, block, expected);
    KvView to = found.view();
    to.token_base = base.data_ptr<int>();
    EncodeTensor(*codec, params, x, 0, to);
    for (size_t p = 0; p < found.planes.size(); ++p) EXPECT_TRUE(found.planes[p].equal(expected.planes[p])) << p;
  }
}

// The codes of two numbers at once, in float16's arithmetic: of groups of numbers up to `largest`, with all numbers that are at least
// that over `reach`, in both types and with both signs where there are two.
void ExpectAllQuotientsOnGpu(const Codec& codec, const std::vector<float>& largest, float reach, bool both_signs) {
  const int64_t n = codec.default_group;
  for (const at::ScalarType type : {at::kHalf, at::kBFloat16}) {
    std::vector<float> numbers;
    for (const float most : largest) {
      const auto value = [&](uint32_t bits) {
        const auto h = static_cast<uint16_t>(bits);
        return type == at::kHalf ? HalfToFloat(h) : BFloat16ToFloat(h);
      };
      uint32_t bits = type == at::kHalf ? FloatToHalf(most / reach) : FloatToBFloat16(most / reach);
      while (value(bits) <= most) {
        numbers.push_back(most);  // a group's first one
        numbers.push_back(both_signs ? -most : 0);
        for (int64_t i = 2; i < n; ++i, ++bits) {
          const float sign = both_signs && bits % 3 == 0 ? -1.0f : 1.0f;
          numbers.push_back(value(bits) <= most ? sign * value(bits) : 0);
        }
      }
    }
    numbers.resize((numbers.size() + 127) / 128 * 128);
    const at::Tensor x = at::tensor(numbers).view({1, 1, -1, 128}).to(type);
    const EncodedTensors cpu = Encode(codec, {.group_size = n}, x, 1), gpu = Encode(codec, {.group_size = n}, x.cuda(), 1);
    for (size_t p = 0; p < cpu.planes.size(); ++p) EXPECT_TRUE(cpu.planes[p].equal(gpu.planes[p].cpu())) << type << " plane " << p;
  }
}
TEST(QuotientsGpu, OfNvfp4) {
  KVQ_NEEDS_CUDA();
  std::vector<float> largest;  // of each scale's group
  for (uint32_t scale = 1; scale <= 0x7E; ++scale) largest.push_back(6 * E4M3::Value(scale));
  ExpectAllQuotientsOnGpu(FindScheme("nvfp4").values, largest, 32, true);
}
TEST(QuotientsGpu, OfKivi) {
  KVQ_NEEDS_CUDA();
  std::vector<float> largest;
  for (uint32_t bits = 0; bits < 1024; ++bits) largest.push_back(HalfToFloat(static_cast<uint16_t>(0x4000 + bits)));
  for (const char* name : {"kivi-4", "kivi-2"}) ExpectAllQuotientsOnGpu(FindScheme(name).values, largest, 40, false);
}

INSTANTIATE_TEST_SUITE_P(Table, EveryScheme, testing::ValuesIn(NamesOfSchemes()), TestName);
INSTANTIATE_TEST_SUITE_P(Table, EverySchemeParity, testing::ValuesIn(NamesOfSchemes()), TestName);
INSTANTIATE_TEST_SUITE_P(Table, EverySchemeGpu, testing::ValuesIn(NamesOfSchemes()), TestName);

// ---- arithmetic

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

// In the range where it is taken; of numbers of 11 bits by one in 997 of all divisors (by all of them once, without a failure).
TEST(ShortQuotient, IsTheQuotient) {
  int64_t wrong = 0;
  for (uint32_t bits = 0x3F800000; bits < 0x40000000; bits += 997) {
    const float d = BitsFloat(bits), inverse = 1 / d;
    for (int x = 1024; x < 2048; ++x) wrong += plain::ShortQuotient(static_cast<float>(x), d, inverse) != static_cast<float>(x) / d;
  }
  EXPECT_EQ(wrong, 0);
  for (const float d : {3.0f, 4.0f, 6.0f, 7.0f, 15.0f, 255.0f, 448.0f}) {
    for (uint32_t bits = 0x3F800000; bits < 0x40000000; ++bits) {
      wrong += plain::ShortQuotient(BitsFloat(bits), d, 1 / d) != BitsFloat(bits) / d;
    }
    EXPECT_EQ(wrong, 0) << d;
  }
  // The least of a number above 0, where it is taken, leaves a rest that is one.
  EXPECT_EQ(plain::ShortQuotient(1e-28f, 448, 1 / 448.0f), 1e-28f / 448);
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
