// Streaming statistics against NumPy, against what is known of distributions, and against
// themselves in other splits of the tokens.
#include "accuracy/distribution.h"

#include <cmath>

#include "accuracy/golden.h"
#include "fixtures/model.h"

namespace kvq {
namespace {

// x [batch, heads, tokens, head_dim] in calls of these numbers of tokens, the last one repeated.
Distribution Measured(const at::Tensor& x, const std::vector<int64_t>& calls) {
  Distribution result;
  for (const auto pass : {&Distribution::Add, &Distribution::Count}) {
    size_t call = 0;
    for (int64_t at = 0; at < x.size(2); ++call) {
      const int64_t n = std::min(calls[std::min(call, calls.size() - 1)], x.size(2) - at);
      (result.*pass)(x.narrow(2, at, n));
      at += n;
    }
  }
  return result;
}

// Every number within `bound` of its scale; what is counted exactly.
void ExpectEqual(const Distribution& ours, const nlohmann::json& theirs, double bound) {
  struct Statistic {
    const char* name;
    double value, scale;
  };
  const std::vector<double> expected = theirs["statistics"];
  const double std = expected[1], variance = std * std;
  const std::vector<Statistic> statistics = {
      {"mean", ours.mean(), std},
      {"std", ours.std(), std},
      {"min", ours.min(), std},
      {"max", ours.max(), std},
      {"kurtosis", ours.kurtosis(), 3 + std::abs(expected[4])},
      {"beyond_3sigma", ours.beyond_3sigma(), 0},
      {"beyond_6sigma", ours.beyond_6sigma(), 0},
      {"max_over_mean", ours.max_over_mean(), expected[7]},
      {"per_channel_var", ours.per_channel_var(), variance},
      {"per_token_var", ours.per_token_var(), variance},
  };
  ASSERT_EQ(statistics.size(), expected.size());
  for (size_t i = 0; i < statistics.size(); ++i) {
    const Statistic& of = statistics[i];
    EXPECT_NEAR(of.value, expected[i], bound * of.scale) << of.name;
  }
  EXPECT_EQ(ours.outlier_channels(), theirs["outlier_channels"].get<int64_t>());
  const std::vector<double> largest = ours.channel_max(), density = ours.density();
  ASSERT_EQ(largest.size(), theirs["channel_max"].size());
  for (size_t i = 0; i < largest.size(); ++i) {
    EXPECT_NEAR(largest[i], theirs["channel_max"][i].get<double>(), bound * std) << "channel " << i;
  }
  const std::vector<int64_t> counts = theirs["histogram"];
  ASSERT_EQ(density.size(), counts.size());
  int64_t all = 0;
  for (const int64_t count : counts) all += count;
  for (size_t i = 0; i < counts.size(); ++i) {
    EXPECT_NEAR(density[i] * 0.06 * static_cast<double>(all), counts[i], 1e-9) << "bin " << i;
  }
}

at::Tensor Numbers(const nlohmann::json& of) {
  const std::vector<int64_t> shape = of["shape"];
  const int64_t count = shape[0] * shape[1] * shape[2] * shape[3];
  return at::tensor(GoldenNumbers(count, of["seed"], of["kind"])).view(shape);
}

// The same numbers, both in float64: sums of some thousand terms lose less than 1e-12.
TEST(DistributionParity, EqualsNumPyInAnySplit) {
  const nlohmann::json golden = Golden("distribution.json")["numbers"];
  ASSERT_EQ(golden.size(), 6u);
  for (const auto& of : golden) {
    for (const std::vector<int64_t>& calls :
         std::vector<std::vector<int64_t>>{{1000}, {1}, {7}, {1, 2, 11, 5}}) {
      SCOPED_TRACE(of["kind"].get<std::string>() + " in calls of " + std::to_string(calls[0]));
      ExpectEqual(Measured(Numbers(of), calls), of, 1e-12);
    }
  }
}

// Keys, keys before their rotation and values as transformers computes them. Ours differ by float32
// rounding in the layers before: every statistic was seen within 1.6e-6 of its scale, bit for bit
// in the first layer.
TEST(DistributionParity, OfTinyModelsEqualsNumPyOnTransformersCaches) {
  const c10::InferenceMode guard;
  const nlohmann::json golden = Golden("distribution.json")["models"];
  ASSERT_EQ(golden.size(), 5u);
  for (const auto& [name, of_model] : golden.items()) {
    const nlohmann::json& layers = of_model["layers"];
    const std::unique_ptr<Model> model =
        LoadModel(GoldenPath("models/" + name), at::kFloat, at::kCPU);
    std::vector<std::map<std::string, Distribution>> ours(layers.size());
    for (const auto pass : {&Distribution::Add, &Distribution::Count}) {
      KvCache cache(ParseSpec("none"), model->cache_shape(1), 64, at::kFloat, at::kCPU);
      ASSERT_EQ(cache.shape().layers.size(), layers.size());
      Feed(*model, IdTensor(of_model["ids"], 1, at::kCPU), cache, FindBackend("sdpa"), 16, 0,
           [&](const LayerView& view) {
             std::map<std::string, Distribution>& layer = ours[view.cached_layer];
             (layer["k"].*pass)(view.keys);
             (layer["k_pre_rope"].*pass)(view.keys_before_rotation);
             (layer["v"].*pass)(view.values);
           });
    }
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      for (const auto& [side, theirs] : layers[layer].items()) {
        SCOPED_TRACE(name + " layer " + std::to_string(layer) + " " + side);
        ExpectEqual(ours[layer][side], theirs, 1e-5);
      }
    }
  }
}

// A million numbers of distributions whose moments are known. Tolerances are six standard errors:
// of a share p, sqrt(p / n); of the kurtosis, 4.9 / sqrt(n) for a normal and some 50 / sqrt(n) for
// a Laplace distribution.
TEST(Distribution, KnowsNormalAndHeavyTails) {
  at::manual_seed(5);
  const int64_t n = 1 << 20;
  const double root = std::sqrt(static_cast<double>(n));
  const Distribution normal = Measured(at::randn({1, 4, n / 256, 64}) * 3 + 1000, {1024});
  EXPECT_NEAR(normal.mean(), 1000, 6 * 3 / root);
  EXPECT_NEAR(normal.std(), 3, 6 * 3 / (root * M_SQRT2));
  EXPECT_NEAR(normal.kurtosis(), 0, 6 * 4.9 / root);
  EXPECT_EQ(normal.beyond_3sigma(), 1) << "shares are not centred: all numbers are near 1000";
  EXPECT_NEAR(normal.per_channel_var() / normal.per_token_var(), 1, 1e-2);
  const std::vector<double> density = normal.density();
  for (size_t i = 0; i < density.size(); ++i) {
    const double z = -6 + 0.06 * (static_cast<double>(i) + 0.5);
    const double expected = std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
    EXPECT_NEAR(density[i], expected, 6 * std::sqrt((expected + 1e-6) / 0.06) / root + 1e-4) << z;
  }
  const Distribution centred = Measured(at::randn({1, 4, n / 256, 64}), {1024});
  const double beyond_3 = std::erfc(3 / M_SQRT2);
  EXPECT_NEAR(centred.beyond_3sigma(), beyond_3, 6 * std::sqrt(beyond_3) / root);
  EXPECT_LT(centred.beyond_6sigma(), 6 / root / root);

  const at::Tensor uniform = at::rand({1, 4, n / 256, 64}, at::kDouble) * 2 - 1;
  const Distribution laplace = Measured(-uniform.sign() * at::log1p(-uniform.abs()), {1024});
  EXPECT_NEAR(laplace.kurtosis(), 3, 6 * 50 / root);
  EXPECT_NEAR(laplace.beyond_3sigma(), std::exp(-3 * M_SQRT2), 6 * std::exp(-1.5 * M_SQRT2) / root);
  EXPECT_NEAR(laplace.beyond_6sigma(), std::exp(-6 * M_SQRT2), 6 * std::exp(-3 * M_SQRT2) / root);
}

TEST(Distribution, FindsOutlierChannelsAndWhatVaries) {
  at::manual_seed(6);
  at::Tensor x = at::randn({1, 2, 500, 64});
  EXPECT_EQ(Measured(x, {100}).outlier_channels(), 0);
  // Head 1, channel 5: always near 9, where others are near 0.
  x.select(1, 1).select(2, 5).mul_(0.1).add_(9);
  const Distribution of = Measured(x, {100});
  EXPECT_EQ(of.outlier_channels(), 1);
  const std::vector<double> largest = of.channel_max();
  EXPECT_EQ(std::max_element(largest.begin(), largest.end()) - largest.begin(), 64 + 5);
  EXPECT_LT(of.per_channel_var(), 1.02);
  // Half of all tokens have one channel of 64 at 9: 81 (1 / 64 - 1 / 64^2) 64 / 63 = 1.27 more.
  EXPECT_NEAR(of.per_token_var(), 1 + 1.27 / 2, 0.03);
}

TEST(Distribution, OfEqualNumbersHasNoShape) {
  const Distribution of = Measured(at::full({1, 1, 10, 8}, 0.5), {4});
  EXPECT_EQ(of.mean(), 0.5);
  EXPECT_EQ(of.std(), 0);
  EXPECT_TRUE(std::isnan(of.kurtosis()));
  EXPECT_TRUE(std::isnan(of.beyond_3sigma()));
  EXPECT_TRUE(of.density().empty());
  EXPECT_EQ(of.max_over_mean(), 1);
}

TEST(DistributionGpu, EqualsTheCpus) {
  KVQ_NEEDS_CUDA();
  const nlohmann::json golden = Golden("distribution.json")["numbers"];
  for (const auto& of : golden) {
    ExpectEqual(Measured(Numbers(of).cuda(), {7}), of, 1e-12);
  }
}

}  // namespace
}  // namespace kvq
