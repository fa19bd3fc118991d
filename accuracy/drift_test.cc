// drift: its arithmetic against published or NumPy's numbers, and the measurement on a tiny model, run as users run it.
#include "accuracy/drift.h"

#include "accuracy/tiny_model.h"
#include "kernels/file.h"

namespace kvq {
namespace {

using nlohmann::json;

// Remission times in weeks of the placebo and the 6-MP arm of Freireich et al. 1963 (Blood 21:699), whose medians every
// text on survival gives: 8 and 23.
TEST(Drift, MedianOfSurvivalIsThePublishedOne) {
  std::vector<Survival> placebo, treated;
  for (const double t : {1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23}) placebo.push_back({t, true});
  for (const double t : {6, 6, 6, 7, 10, 13, 16, 22, 23}) treated.push_back({t, true});
  for (const double t : {6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35}) treated.push_back({t, false});
  EXPECT_EQ(KaplanMeierMedian(placebo), 8);
  EXPECT_EQ(KaplanMeierMedian(treated), 23);
  EXPECT_EQ(KaplanMeierMedian({{1, true}, {2, false}, {3, false}}), std::nullopt);
  EXPECT_EQ(KaplanMeierMedian({{1, true}, {2, true}, {3, true}, {4, true}}), 2);
}

TEST(Drift, RepetitionIsTheShareOfFourGramsSeenBefore) {
  EXPECT_EQ(RepetitionRate({1, 2, 3, 4}), 0);
  EXPECT_EQ(RepetitionRate({1, 2, 3, 4, 5, 6, 7}), 0);
  EXPECT_EQ(RepetitionRate({1, 1, 1, 1, 1, 1, 1, 1}), 0.8);              // four of five
  EXPECT_EQ(RepetitionRate({1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3}), 0.5);  // four of eight
}

// numpy.polyfit(range(5), y, 1)[0], numpy.quantile(y, q) for y = [0.5, 0.1, 2, 3.5, 1]
TEST(Drift, SlopeAndQuantileAreNumPys) {
  const std::vector<double> y = {0.5, 0.1, 2, 3.5, 1};
  EXPECT_NEAR(*Slope(y), 0.44, 1e-15);
  EXPECT_EQ(Slope({1}), std::nullopt);
  EXPECT_NEAR(Quantile(y, 0.99), 3.44, 1e-15);
  EXPECT_NEAR(Quantile(y, 0.1), 0.26, 1e-15);
  EXPECT_EQ(Quantile(y, 0.5), 1);
}

class DriftOfTinyModel : public TinyModel {
 protected:
  void SetUp() override {
    TinyModel::SetUp();
    WidenHeads(dir_ / "tiny");
  }
  std::map<std::string, json> Run(const std::string& specs, const std::string& more = "") {
    const Outcome outcome = Execute(Tiny() + " --benchmark_filter=^drift/ --dtype=float32 --contexts=24 --windows=3 "
        "--decode-tokens=70 --schemes=" + specs + " --benchmark_out=" + file().string() + " " + more);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return ByName(ReadFile(file()));
  }
  std::filesystem::path file() const { return dir_ / "drift.json"; }
  std::vector<json> Lines() const {
    std::vector<json> lines;
    std::istringstream text(ReadFile(file().string() + ".samples.jsonl"));
    for (std::string line; std::getline(text, line);) lines.push_back(json::parse(line));
    return lines;
  }
};

TEST_F(DriftOfTinyModel, OfTheUnquantizedModelIsNothingBitForBit) {
  for (const char* backend : {"sdpa", "eager", "fused"}) {
    const auto runs = Run("none", StrCat("--batch=1,2 --backends=", backend));
    for (const int batch : {1, 2}) {
      const json& none = runs.at(StrCat("drift/tiny/", backend, "/none/ctx:24/batch:", batch));
      for (const char* zero : {"kld_nats", "kld_p99_nats", "delta_nll", "delta_own_nll", "kld_slope_nats_per_1k", "delta_repetition",
                               "encoded_share", "kld_nats/from:1", "kld_nats/from:64", "delta_nll/from:32"}) {
        EXPECT_EQ(none.at(zero), 0.0) << backend << " " << zero;
      }
      for (const char* one : {"top1_agreement", "identical_64", "top1_agreement/from:16"}) EXPECT_EQ(none.at(one), 1.0) << one;
      for (const char* missing : {"divergence_median", "identical_256", "divergence_gap_nats"}) EXPECT_FALSE(none.contains(missing));
      EXPECT_EQ(none.at("own_nll"), none.at("own_nll_reference"));
      EXPECT_EQ(none.at("prompts"), 3.0);
    }
  }
  EXPECT_EQ(Lines().size(), 18u);
}

TEST_F(DriftOfTinyModel, SaysWhatTwoBitsDoAndItsLinesSayTheSame) {
  const std::string name = "drift/tiny/sdpa/int2-hqq@residual=16/ctx:24/batch:2";
  const auto runs = Run("int2-hqq@residual=16", "--batch=2");
  const json& two = runs.at(name);
  EXPECT_GT(two.at("kld_nats"), 100 * two.at("kld_floor_nats").get<double>());
  EXPECT_LT(two.at("top1_agreement"), 1.0);
  EXPECT_LT(two.at("divergence_median"), 64.0);
  // Position 24 - 1 + i reads 24 + i tokens, 16 of them encoded from the 17th on, 32 from the 33rd on, and so forth.
  double share = 0;
  std::vector<double> kld, own, divergence;
  const std::vector<json> lines = Lines();
  ASSERT_EQ(lines.size(), 3u);
  for (const json& line : lines) {
    EXPECT_EQ(line.at("benchmark"), name);
    kld.push_back(line.at("kld_nats"));
    own.push_back(line.at("own_nll"));
    divergence.push_back(line.at("divergence"));
    EXPECT_EQ(line.at("length"), 70.0);  // random weights: EOS does not come
    double sum = 0;
    for (int length = 24; length < 94; ++length) sum += (length - 1) / 16 * 16 / static_cast<double>(length);
    EXPECT_NEAR(line.at("encoded_share").get<double>(), sum / 70, 1e-12);
    share += line.at("encoded_share").get<double>() / 3;
  }
  EXPECT_NEAR(two.at("encoded_share").get<double>(), share, 1e-12);
  EXPECT_NEAR(two.at("kld_nats").get<double>(), (kld[0] + kld[1] + kld[2]) / 3, 1e-12);
  EXPECT_NEAR(two.at("own_nll").get<double>(), (own[0] + own[1] + own[2]) / 3, 1e-12);
  std::sort(divergence.begin(), divergence.end());
  EXPECT_EQ(two.at("divergence_median"), divergence[1]);
  // The mean of all is that of the parts, by how many positions each has: 1, 2, 4, ..., 7 of 64 to 70.
  double sum = 0;
  for (const int from : {1, 2, 4, 8, 16, 32, 64}) {
    sum += (from == 64 ? 7 : from) * two.at(StrCat("kld_nats/from:", from)).get<double>();
  }
  EXPECT_NEAR(sum / 70, two.at("kld_nats").get<double>(), 1e-9);
}

// The same items one by one and side by side: what is free, forked and restored does not depend on neighbours.
TEST_F(DriftOfTinyModel, DoesNotDependOnWhoRunsBeside) {
  const auto runs = Run("int4-hqq@residual=16", "--batch=1,3");
  const json& alone = runs.at("drift/tiny/sdpa/int4-hqq@residual=16/ctx:24/batch:1");
  const json& beside = runs.at("drift/tiny/sdpa/int4-hqq@residual=16/ctx:24/batch:3");
  EXPECT_NEAR(alone.at("kld_nats").get<double>(), beside.at("kld_nats").get<double>(), 1e-4 * alone.at("kld_nats").get<double>());
  // Of 210 tokens some may be ties.
  EXPECT_NEAR(alone.at("top1_agreement").get<double>(), beside.at("top1_agreement").get<double>(), 3 / 210.0);
  const std::vector<json> lines = Lines();
  ASSERT_EQ(lines.size(), 6u);
  for (int i = 0; i < 3; ++i) {
    for (const char* same : {"sample", "prompt_sha256", "divergence", "length", "answer"}) EXPECT_EQ(lines[i][same], lines[i + 3][same]) << same;
  }
}

// Lines are there when the cell is, stay when another is added, and are replaced by a patch, which keeps a copy.
TEST_F(DriftOfTinyModel, LinesAreTakenUpAndPatchedWithTheirCells) {
  Run("none");
  const std::string first = ReadFile(file().string() + ".samples.jsonl");
  Run("none,int4-hqq@residual=16");
  const std::vector<json> both = Lines();
  EXPECT_EQ(both.size(), 6u);
  const std::string text = ReadFile(file().string() + ".samples.jsonl");
  EXPECT_NE(text.find(first), std::string::npos);
  std::filesystem::remove(file().string() + ".samples.jsonl");
  Run("none,int4-hqq@residual=16", "--patch=none");
  EXPECT_EQ(ReadFile(file().string() + ".samples.jsonl"), first);  // what nobody measured again is not made up
  Run("none,int4-hqq@residual=16", "--patch=int4");
  EXPECT_EQ(ReadFile(file().string() + ".samples.jsonl"), text);
  EXPECT_EQ(ReadFile(file().string() + ".samples.jsonl.bak"), first);
}

TEST_F(DriftOfTinyModel, RunsOnlyWhereItIsNamed) {
  const Outcome all = Execute(Tiny() + " --benchmark_list_tests"), named = Execute(Tiny() + " --benchmark_list_tests --benchmark_filter=drift");
  EXPECT_EQ(all.out.find("drift/"), std::string::npos);
  EXPECT_NE(named.out.find("drift/tiny/sdpa/int4-hqq/ctx:1024/batch:1"), std::string::npos);
}

}  // namespace
}  // namespace kvq
