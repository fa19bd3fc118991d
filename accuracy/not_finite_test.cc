// What is not finite is no measurement.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "accuracy/scoring.h"
#include "accuracy/tiny_model.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;

class NotFinite : public TinyModel {
 protected:
  // error_message of every cell, "" of one that was measured.
  std::map<std::string, std::string> Errors(const std::string& more, int code) const {
    const fs::path file = dir_ / "not_finite.json";
    fs::remove(file);
    const Outcome outcome = Execute(
        Tiny() + " --schemes=none,int4-hqq@residual=16 --contexts=64 --windows=2 --runs=1 --max-runs=1 --decode-tokens=2 "
        "--benchmark_filter='perplexity|needle|sensitivity|distribution|error|prefill|decode|memory|quantize' "
        "--benchmark_out=" + file.string() + more);
    EXPECT_EQ(outcome.code, code) << outcome.err;
    std::ifstream in(file);
    std::map<std::string, std::string> errors;
    for (const auto& [name, run] : ByName(std::string((std::istreambuf_iterator<char>(in)), {}))) {
      const std::string error = run.value("error_message", "");
      if (error.find("Release") == std::string::npos && error.find("nothing is encoded") == std::string::npos) {
        errors[name] = error;
      }
    }
    return errors;
  }
};

TEST_F(NotFinite, LogitsFailEveryCellThatReadsThem) {
  WidenHeads(dir_ / "tiny");
  Overwrite(dir_ / "tiny", "model.norm.weight", NAN);
  for (const char* protocol : {" --dtype=float32", " --dtype=float32 --protocol=study"}) {
    const auto errors = Errors(protocol, 1);
    EXPECT_GE(errors.size(), 9u);
    for (const auto& [name, error] : errors) {
      const bool reads_logits = name.find("error/") != 0 && name.find("distribution/") != 0;
      EXPECT_EQ(error, reads_logits ? "failed: the logits are not finite in float32, and no --dtype reaches further; "
                                      "weights of the model are not finite themselves" : "") << name;
    }
  }
}

TEST_F(NotFinite, TheFirstLayerIsNamedAndTheTypeThatReachesFurther) {
  WidenHeads(dir_ / "tiny");
  Overwrite(dir_ / "tiny", "model.layers.0.mlp.down_proj.weight", 3e4);
  for (const auto& [name, error] : Errors(" --dtype=float16", 1)) {
    EXPECT_EQ(error, "failed: layer 0 is the first that is not finite in float16; try --dtype=bfloat16 or --dtype=float32")
        << name;
  }
  for (const auto& [name, error] : Errors(" --dtype=bfloat16", 0)) EXPECT_EQ(error, "") << name;
}

TEST_F(NotFinite, NothingAgreesWithWhatIsNoNumber) {
  const at::Tensor plain = at::arange(0, 24, at::kFloat).view({1, 2, 12}), targets = at::zeros({1, 2}, at::kLong);
  EXPECT_EQ(ScoreTokens(plain, plain, targets)[0][0][3].item<double>(), 1);
  for (const float value : {NAN, INFINITY, -INFINITY}) {
    at::Tensor broken = plain.clone();
    broken[0][0][5] = value;
    const at::Tensor scores = ScoreTokens(broken, broken, targets)[0];
    EXPECT_FALSE(std::isfinite(scores[0][2].item<double>())) << value;
    EXPECT_TRUE(std::isnan(scores[0][3].item<double>())) << value;
    EXPECT_EQ(scores[1][3].item<double>(), 1) << "the next token's are whole";
  }
}

}  // namespace
}  // namespace kvq
