// The quanto schemes against the package, by itself and in transformers' cache.
#include <ATen/ATen.h>

#include <cmath>

#include "accuracy/encoded.h"
#include "fixtures/cache/kv_cache.h"
#include "kernels/error.h"

namespace kvq {
namespace {

const Codec& KeysOf(int bits) { return FindScheme(StrCat("int", bits, "-quanto")).keys; }

at::ScalarType TypeNamed(const std::string& name) {
  return name == "float32" ? at::kFloat : name == "float16" ? at::kHalf : at::kBFloat16;
}

// raw() of make_golden.py: numbers of that type, bit for bit, as hexadecimal digits.
std::vector<float> Numbers(const std::string& text, at::ScalarType type) {
  const size_t digits = 2 * c10::elementSize(type);
  std::vector<float> numbers;
  for (size_t i = 0; i < text.size(); i += digits) {
    const auto bits = static_cast<uint32_t>(std::stoul(text.substr(i, digits), nullptr, 16));
    numbers.push_back(type == at::kFloat  ? BitsFloat(bits)
                      : type == at::kHalf ? HalfToFloat(static_cast<uint16_t>(bits))
                                          : BFloat16ToFloat(static_cast<uint16_t>(bits)));
  }
  return numbers;
}

// fp16 is off by at most half a unit in the last of its 11 bits, or half a subnormal step of 2^-24.
double HalfError(double x) {
  return std::max(std::abs(x) * std::ldexp(1.0, -11), std::ldexp(1.0, -25));
}

// ---- against the package

// Codes are equal without exception. The package's scales and shifts, in the type of the input, are ours in
// fp16; where that loses nothing, 16-bit inputs also decode to the same bits.
TEST(QuantoParity, CodesScalesShiftsAndDecodedNumbersEqualThePackage) {
  int64_t codes = 0, equal = 0, bounded = 0;
  for (const auto& c : Golden("quanto.json")) {
    const int bits = c["bits"];
    const int64_t group = c["group"];
    const at::ScalarType type = TypeNamed(c["dtype"]);
    const Case shape{c["heads"], c["tokens"], c["head_dim"], c["tokens"]};
    SCOPED_TRACE(StrCat("int", bits, " ", c["dtype"], " ", c["kind"], " ", shape.heads, "x", shape.tokens,
                        "x", shape.head_dim, " group ", group));
    const int64_t count = shape.heads * shape.tokens * shape.head_dim;
    const at::Tensor x = Input(GoldenNumbers(count, c["seed"], c["kind"]), shape).to(type);
    const CodecParams params{.group_size = group};
    const EncodedTensors encoded = Encode(KeysOf(bits), params, x, shape.block);
    const Plain ours = TakeApart(encoded, bits, group, PlaceInRow);

    const std::string text = c["codes"];
    ASSERT_EQ(text.size(), ours.codes.size());
    for (size_t i = 0; i < text.size(); ++i) {
      ASSERT_EQ(ours.codes[i], std::stoi(text.substr(i, 1), nullptr, 16)) << "element " << i;
    }
    codes += count;

    const std::vector<float> scales = Numbers(c["scale"], type), shifts = Numbers(c["shift"], type);
    ASSERT_EQ(scales.size(), static_cast<size_t>(count / group));
    std::vector<bool> exact(scales.size());
    for (size_t g = 0; g < scales.size(); ++g) {
      const float scale = HalfToFloat(ours.scales[g]), shift = HalfToFloat(ours.zeros[g]);
      ASSERT_EQ(scale, HalfToFloat(FloatToHalf(scales[g]))) << "group " << g;
      ASSERT_EQ(shift, HalfToFloat(FloatToHalf(shifts[g]))) << "group " << g;
      exact[g] = type != at::kFloat && scale == scales[g] && shift == shifts[g];
      if (type == at::kHalf || (type == at::kBFloat16 && scales[g] >= std::ldexp(1.0, -17))) {
        EXPECT_EQ(scale, scales[g]) << "group " << g;
      }
    }

    at::Tensor decoded = at::empty_like(x);
    DecodeTensor(KeysOf(bits), params, encoded, 0, decoded);
    const at::Tensor flat = decoded.to(at::kFloat).flatten();
    const std::vector<float> theirs = Numbers(c["decoded"], type);
    for (size_t i = 0; i < theirs.size(); ++i) {
      const int64_t at = static_cast<int64_t>(29 * i);
      const float mine = flat[at].item<float>();
      const double scaled = ours.codes[at] * static_cast<double>(scales[at / group]);
      if (exact[at / group]) {
        ASSERT_EQ(mine, theirs[i]) << "element " << at;
        ++equal;
        continue;
      }
      // Scale and shift in fp16, and both sides round a product and a difference to 24 (float32) or 8 bits.
      const double rounding =
          std::ldexp(1.0, type == at::kFloat ? -23 : -7) * (scaled + std::abs(theirs[i]));
      const double bound = ours.codes[at] * HalfError(scales[at / group]) +
                           HalfError(shifts[at / group]) + rounding;
      ASSERT_NEAR(mine, theirs[i], bound) << "element " << at;
      ++bounded;
    }
  }
  std::printf("%ld codes equal; of decoded numbers %ld are equal, %ld within the bound of fp16 metadata\n",
              codes, equal, bounded);
  EXPECT_GT(codes, 100000);
  EXPECT_GT(equal, 2500);
}

// Every call's output against transformers' QuantizedCache. In 16 bits bit for bit. In float32 its scales
// and shifts are float32, so that a decoded number is off by 2^-11 (|scale q| + |shift|) <= 2^-11 3 max|x|.
// Encoded again it keeps its code (it is much closer than half a step), so each encoding adds as much.
TEST(QuantoParity, PolicyHfEqualsTransformersQuantizedCache) {
  for (const auto& c : Golden("quanto_cache.json")) {
    const at::ScalarType type = TypeNamed(c["dtype"]);
    const int64_t heads = c["heads"], head_dim = c["head_dim"], limit = c["residual"];
    const std::string spec = StrCat("int", c["bits"], "-quanto@policy=hf@residual=", limit);
    KvCache cache(ParseSpec(spec), CacheShape::Uniform(1, 1, heads, head_dim), 64, type, at::kCPU);
    uint64_t call = 0;
    int64_t encodings = 0, residual = 0;
    double largest = 0;
    for (const auto& expected : c["calls"]) {
      const int64_t tokens = expected["tokens"];
      const auto input = [&](uint64_t seed) {
        const std::vector<float> numbers = GoldenNumbers(heads * tokens * head_dim, seed, "outliers");
        return Input(numbers, {heads, tokens, head_dim, 1}).to(type);
      };
      const at::Tensor keys = input(100 + 2 * call), values = input(101 + 2 * call);
      largest = std::max({largest, keys.abs().max().item<double>(), values.abs().max().item<double>()});
      const auto [k, v] = cache.Update(0, keys, values);
      for (const auto& [name, ours] : {std::pair("keys", k), std::pair("values", v)}) {
        const at::Tensor flat = ours.to(at::kFloat).contiguous().flatten();
        const std::vector<float> theirs = Numbers(expected[name], type);
        ASSERT_EQ(theirs.size(), static_cast<size_t>((flat.numel() + 28) / 29));
        const double bound =
            type == at::kFloat ? std::ldexp(3 * largest, -11) * static_cast<double>(encodings) : 0;
        for (size_t i = 0; i < theirs.size(); ++i) {
          ASSERT_NEAR(flat[static_cast<int64_t>(29 * i)].item<float>(), theirs[i], bound)
              << spec << " " << c["dtype"] << " call " << call << " " << name << " " << 29 * i;
        }
      }
      const bool flushes = residual > 0 && residual + 1 >= limit;
      encodings += call == 0 || flushes;
      residual = call == 0 || flushes ? 0 : residual + tokens;
      ++call;
    }
    EXPECT_GE(encodings, 3) << "two flushes";
  }
}

// ---- shapes, sizes, calls

TEST(Quanto, BytesAreExactlyBitsOverEightPlusFourOverGroup) {
  for (const int bits : {4, 2}) {
    for (const int64_t group : {32, 64, 128}) {
      const int64_t elements = 2 * 3 * 128 * 5;
      EXPECT_EQ(EncodedBytes(KeysOf(bits), {.group_size = group}, 2, 3, 128, 5),
                elements * bits / 8 + elements * 4 / group);
    }
  }
}

// No element is off by more than half a step, and what scale and shift lose in fp16. The planes are full of
// poison before, the output of NaN: what is not written shows.
TEST(Quanto, EveryEdgeSizeIsWithinHalfAStep) {
  for (const int bits : {4, 2}) {
    for (const int64_t heads : {1, 2, 3}) {
      for (const int64_t tokens : {1, 2, 63, 64, 65, 128}) {
        for (const int64_t head_dim : {64, 128, 256}) {
          for (const int64_t group : {32, 64, 128}) {
            if (head_dim % group != 0) continue;
            const Case shape{heads, tokens, head_dim, tokens};
            const at::Tensor x = Input(GoldenNumbers(heads * tokens * head_dim, 1, "outliers"), shape);
            const at::Tensor out = RoundTrip(KeysOf(bits), {.group_size = group}, x, tokens);
            const at::Tensor groups = x.view({-1, group});
            const at::Tensor low = groups.amin(1, true), range = groups.amax(1, true) - low;
            const at::Tensor bound = range / ((1 << bits) - 1) / 2 * (1 + 1e-6) +
                                     (range + low.abs()) * std::ldexp(1.0, -11);
            EXPECT_TRUE(((out.view({-1, group}) - groups).abs() <= bound).all().item<bool>())
                << bits << " bits " << x.sizes() << " group " << group;
          }
        }
      }
    }
  }
}

TEST(Quanto, ATokensBytesDependOnItsHeadsNumbersAlone) {
  const at::Tensor x = Input(GoldenNumbers(2 * 3 * 96 * 128, 2, "outliers"), {3, 96, 128, 1}, 2);
  for (const int bits : {4, 2}) {
    const Codec& codec = KeysOf(bits);
    const EncodedTensors whole = Encode(codec, k64, x, 32);
    // Block size, call and slot, a batch, and strides as attention hands them over.
    EncodedTensors parts = AllocateEncoded(codec, k64, 2, 3, 128, 96, 1, at::kCPU);
    EncodeTensor(codec, k64, x.narrow(2, 0, 31), 0, parts);
    EncodeTensor(codec, k64, x.narrow(2, 31, 1), 31, parts);
    EncodeTensor(codec, k64, x.narrow(2, 32, 64), 32, parts);
    const EncodedTensors second = Encode(codec, k64, x.narrow(0, 1, 1), 32);
    const EncodedTensors strided = Encode(codec, k64, x.transpose(1, 2).contiguous().transpose(1, 2), 32);
    for (size_t p = 0; p < whole.planes.size(); ++p) {
      EXPECT_TRUE(whole.planes[p].equal(parts.planes[p]));
      EXPECT_TRUE(whole.planes[p].narrow(0, 3, 3).equal(second.planes[p]));
      EXPECT_TRUE(whole.planes[p].equal(strided.planes[p]));
    }
    at::Tensor all = at::empty_like(x), some = at::empty({2, 3, 7, 128});
    DecodeTensor(codec, k64, whole, 0, all);
    DecodeTensor(codec, k64, whole, 59, some);
    EXPECT_TRUE(all.narrow(2, 59, 7).equal(some));
  }
}

// 0 / 0 in the package: code 0, decoded to the shift.
TEST(Quanto, ConstantGroupsDecodeToThemselvesInHalfPrecision) {
  for (const float value : {0.0f, 0.75f, -3.0f, 1000.0f}) {
    for (const at::ScalarType type : {at::kFloat, at::kHalf, at::kBFloat16}) {
      const at::Tensor x = at::full({1, 1, 2, 64}, value, type);
      EXPECT_TRUE(RoundTrip(KeysOf(4), k64, x, 2).equal(x)) << value;
    }
  }
}

TEST(Quanto, NotANumberAndWhatFp16CannotHoldStayInTheirGroupAndShow) {
  for (const at::ScalarType type : {at::kFloat, at::kHalf, at::kBFloat16}) {
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      for (const int64_t place : {0, 5, 63}) {
        at::Tensor x = Input(GoldenNumbers(4 * 64, 4, "normal"), {1, 4, 64, 4}).to(type);
        x[0][0][1][place] = bad;
        const Plain stored = TakeApart(Encode(KeysOf(4), k64, x, 4), 4, 64, PlaceInRow);
        EXPECT_EQ(stored.scales[1], 0x7E00) << "the one NaN that CPU and GPU agree on";
        EXPECT_EQ(stored.zeros[1], 0x7E00);
        const at::Tensor out = RoundTrip(KeysOf(4), k64, x, 4);
        EXPECT_TRUE(out[0][0][1].isnan().all().item<bool>()) << type << bad;
        EXPECT_TRUE(out[0][0][0].isfinite().all().item<bool>());
        EXPECT_TRUE(out[0][0][2].isfinite().all().item<bool>());
      }
    }
    if (type == at::kHalf) continue;
    for (const float large : {-1e5f, 2e6f}) {  // a shift, a scale beyond 65504
      at::Tensor x = Input(GoldenNumbers(4 * 64, 4, "normal"), {1, 4, 64, 4}).to(type);
      x[0][0][1][5] = large;
      const at::Tensor out = RoundTrip(KeysOf(4), k64, x, 4);
      EXPECT_FALSE(out[0][0][1].isfinite().any().item<bool>()) << type << large;
      EXPECT_TRUE(out[0][0][2].isfinite().all().item<bool>());
    }
  }
}

TEST(Quanto, RefusesWhatItCannotEncodeAndWhatTheLibraryRefuses) {
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const InputError& error) {
      return error.what();
    }
    return "";
  };
  for (const int64_t head_dim : {80, 96, 32}) {
    EXPECT_NE(message([&] { KeysOf(4).planes(3, head_dim, k64); }).find(StrCat("not ", head_dim)),
              std::string::npos);
  }
  EXPECT_NE(message([&] { KeysOf(2).planes(3, 64, {.group_size = 48}); }).find("32, 64 or 128"),
            std::string::npos);
  EXPECT_NO_THROW(KeysOf(4).planes(3, 96, {.group_size = 32}));
  EXPECT_NE(message([&] { KeysOf(2).planes(3, 96, {.group_size = 32}); }).find("runs of 64 channels"), std::string::npos);
  for (const char* name : {"int8-quanto", "int8-quanto-kivi"}) {
    EXPECT_NE(message([&] { FindScheme(name); }).find("2 and 4 bits"), std::string::npos) << name;
  }
  for (const char* name : {"int4-quanto-kivi", "int2-quanto-kivi"}) {
    EXPECT_NE(message([&] { FindScheme(name); }).find("axis 0 or -1"), std::string::npos) << name;
  }
}

}  // namespace
}  // namespace kvq
