// The HQQ schemes against their definition and against the package.
#include <ATen/ATen.h>

#include <cmath>

#include "accuracy/encoded.h"
#include "kernels/error.h"

namespace kvq {
namespace {

const Codec& KeysOf(int bits, bool kivi) {
  return FindScheme("int" + std::to_string(bits) + (kivi ? "-hqq-kivi" : "-hqq")).keys;
}

// ---- against the package

TEST(HqqParity, CodesScalesZerosEqualThePackage) {
  int64_t codes = 0, differing = 0, metadata = 0, one_ulp = 0;
  for (const auto& c : Golden("hqq.json")) {
    const int bits = c["bits"];
    const bool kivi = c["axis"] == 0;
    if (bits == 8 && kivi) continue;  // no such scheme
    const Case shape{c["heads"], c["tokens"], c["head_dim"], c["tokens"]};
    const std::vector<float> values =
        GoldenNumbers(shape.heads * shape.tokens * shape.head_dim, c["seed"], c["kind"]);
    const Codec& codec = KeysOf(bits, kivi);
    const Plain ours = TakeApart(Encode(codec, k64, Input(values, shape), shape.block), bits, 64, PlaceInRow);
    const int64_t step = c.value("step", 1), groups = static_cast<int64_t>(values.size()) / 64;
    const std::string text = c["codes"];
    const int width = bits == 8 ? 2 : 1;
    SCOPED_TRACE(StrCat("int", bits, kivi ? " kivi " : " ", c["kind"], " ", shape.heads, "x", shape.tokens,
                        "x", shape.head_dim));
    const auto near = [&](uint16_t mine, float theirs) {
      const int distance = std::abs(mine - FloatToHalf(theirs));
      ++metadata;
      one_ulp += distance;
      return distance <= 1;
    };
    for (size_t i = 0; i < c["scale"].size(); ++i) {
      ASSERT_TRUE(near(ours.scales[i * step], c["scale"][i].get<float>())) << "scale of group " << i * step;
      ASSERT_TRUE(near(ours.zeros[i * step], c["zero"][i].get<float>()))
          << "zero of group " << i * step << ": " << HalfToFloat(ours.zeros[i * step]) << " and " << c["zero"][i];
    }
    for (size_t i = 0; i < text.size() / width; ++i) {
      const int theirs = std::stoi(text.substr(i * width, width), nullptr, 16);
      const int64_t flat = static_cast<int64_t>(i) * step;
      ++codes;
      if (ours.codes[flat] == theirs) continue;
      ++differing;
      // Two codes are equally near if x s + z lies at the border between them, but for the rounding
      // of z: a mean of 64 numbers up to |z| + 2^bits in float32, in another order of summation.
      ASSERT_EQ(std::abs(ours.codes[flat] - theirs), 1);
      const int64_t group = kivi ? flat % groups : flat / 64;
      ASSERT_EQ(group % step, 0) << "its scale is not in the golden file";
      const double s = 1 / c["scale"][group / step].get<double>(), z = c["zero"][group / step];
      const double border = values[flat] * s + z - std::min(theirs, ours.codes[flat]) - 0.5;
      EXPECT_LT(std::abs(border), (std::abs(z) + (1 << bits)) * 64 * std::ldexp(1.0, -24));
    }
  }
  RecordProperty("codes", static_cast<int>(codes));
  RecordProperty("codes_equally_near", static_cast<int>(differing));
  RecordProperty("metadata_off_by_one_fp16_ulp", static_cast<int>(one_ulp));
  std::printf("%ld codes, %ld equally near two; of %ld fp16 scales and zeros %ld are one ulp off\n", codes,
              differing, metadata, one_ulp);
  EXPECT_GT(codes, 50000);
  EXPECT_LE(differing, codes / 5000);
  EXPECT_LE(one_ulp, metadata / 200);
}

// ---- against the definition, written down once more in double precision

// Decoded values of one group, by the formula in hqq.cc with a fixed number of iterations.
std::vector<double> Reference(const std::vector<double>& x, int bits, int iterations, double& error_sum) {
  const double m = (1 << bits) - 1;
  const double low = *std::min_element(x.begin(), x.end()), high = *std::max_element(x.begin(), x.end());
  const double s = high - low <= 1e-4 ? 1 : std::min(m / (high - low), 2e4);
  double z = -low * s;
  const auto code = [&](double v) { return std::nearbyint(std::clamp(v * s + z, 0.0, m)); };
  for (int i = 0; i < iterations; ++i) {
    double sum = 0;
    error_sum = 0;
    for (const double v : x) {
      const double d = v - (code(v) - z) / s;
      error_sum += std::abs(d);
      const double shrunk = std::max(std::abs(d) - 0.1 * std::pow(std::abs(d), -0.3), 0.0);
      sum += code(v) - (v - std::copysign(shrunk, d)) * s;
    }
    z = sum / static_cast<double>(x.size());
  }
  std::vector<double> out;
  for (const double v : x) out.push_back((code(v) - z) / s);
  return out;
}

// One group, so that the whole-block stop is this group's: iterate until the error no longer falls. Where as many
// elements lie above their codes as below, the error is the same before and after in exact arithmetic, and the
// rounding of float32 decides: then stopping and going on are both right.
std::vector<std::vector<double>> ReferenceGroup(const std::vector<double>& x, int bits) {
  // x s + z, up to m, is rounded by 2^-24 m at most, against a mean error of 0.25 codes: 4 m 2^-24 each, of random sign
  // over 32 elements or more, so 11 * 2^-24 of the mean for 4 bits; a tree of 128 adds 7 roundings, on both sides 14.
  constexpr double kRounding = 32 * 0x1p-24;
  std::vector<std::vector<double>> right;
  double best = INFINITY;
  for (int iterations = 1; iterations <= 20; ++iterations) {
    double error = 0;
    std::vector<double> out = Reference(x, bits, iterations, error);
    const bool falls = error < best * (1 - kRounding), rises = error > best * (1 + kRounding);
    if (!falls || iterations == 20) right.push_back(std::move(out));
    if (rises) break;
    best = error;
  }
  return right;
}

TEST(Hqq, MatchesItsDefinitionInDoublePrecision) {
  for (const int bits : {8, 4, 2}) {
    for (const int64_t group : {32, 64, 128}) {
      for (uint64_t seed = 0; seed < 8; ++seed) {
        const std::vector<float> values = GoldenNumbers(group, seed, seed % 2 ? "outliers" : "normal");
        // Twice, as 32 channels are too few for a row of 2-bit codes.
        const at::Tensor x = Input(values, {1, 1, group, 1}).repeat({1, 1, 1, 2});
        const at::Tensor out = RoundTrip(KeysOf(bits, false), {.group_size = group}, x, 1);
        const float range = (x.max() - x.min()).item<float>();
        double nearest = INFINITY;  // the largest difference from the reference that is nearest
        for (const auto& expected : ReferenceGroup(std::vector<double>(values.begin(), values.end()), bits)) {
          double largest = 0;
          for (int64_t i = 0; i < group; ++i) {
            largest = std::max(largest, std::abs(out.flatten()[i].item<float>() - expected[i]));
          }
          nearest = std::min(nearest, largest);
        }
        // fp16 scale (2^-11 of |q| / s <= range) and zero (2^-11 |z| / s <= range for data around 0), and
        // one code where a border is hit.
        EXPECT_LE(nearest, range * 2.5e-3) << "bits " << bits << " group " << group << " seed " << seed;
      }
    }
  }
}

// ---- shapes, sizes, calls

TEST(Hqq, BytesAreExactlyBitsOverEightPlusFourOverGroup) {
  for (const int bits : {8, 4, 2}) {
    for (const int64_t group : {32, 64, 128}) {
      const Codec& codec = KeysOf(bits, false);
      const int64_t elements = 2 * 3 * 128 * 5;
      EXPECT_EQ(EncodedBytes(codec, {.group_size = group}, 2, 3, 128, 5),
                elements * bits / 8 + elements * 4 / group);
    }
  }
}

TEST(Hqq, ConstantGroupsDecodeToThemselvesInHalfPrecision) {
  for (const float value : {0.0f, 0.75f, -3.0f, 1000.0f}) {
    const at::Tensor x = at::full({1, 1, 2, 64}, value);
    EXPECT_TRUE(RoundTrip(KeysOf(4, false), k64, x, 2).equal(x)) << value;
  }
}

TEST(Hqq, GroupsFarFromZeroKeepTheirValueAndNotANumberFillsItsGroup) {
  // (max - min) = 0.002 at -20: z would be 20 * 15 / 0.002 = 150000, past fp16.
  at::Tensor far = at::full({1, 1, 1, 64}, -20.0f);
  far[0][0][0].narrow(0, 0, 32).fill_(-20.002f);
  EXPECT_LT((RoundTrip(KeysOf(4, false), k64, far, 1) - far).abs().max().item<float>(), 20 * 1e-3);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    at::Tensor x = Input(GoldenNumbers(4 * 64, 4, "normal"), {1, 4, 64, 4});
    x[0][0][1][5] = bad;
    const at::Tensor out = RoundTrip(KeysOf(4, false), k64, x, 4);
    EXPECT_TRUE(out[0][0][1].isnan().all().item<bool>());
    EXPECT_FALSE(out[0][0][0].isnan().any().item<bool>());
  }
}

TEST(Hqq, RefusesShapesItCannotEncode) {
  for (const char* name : {"int4-hqq", "int2-hqq-kivi"}) {
    const Codec& codec = FindScheme(name).keys;
    for (const int64_t head_dim : {80, 96, 32}) EXPECT_THROW(codec.planes(3, head_dim, k64), InputError);
    EXPECT_THROW(codec.planes(3, 64, {.group_size = 48}), InputError);
    EXPECT_NO_THROW(codec.planes(3, 64, {.group_size = 32}));
  }
  // Codes come in whole words of each of four chunks.
  EXPECT_NO_THROW(KeysOf(4, false).planes(3, 96, {.group_size = 32}));
  EXPECT_THROW(KeysOf(2, false).planes(3, 96, {.group_size = 32}), InputError);
}

}  // namespace
}  // namespace kvq
