// Lines of single items beside a results file: what is kept, replaced, dropped and refused; and the share of what is read
// that is encoded.
#include "accuracy/samples.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "fixtures/cache/kv_cache.h"
#include "kernels/error.h"
#include "kernels/file.h"

namespace kvq {
namespace {

class SamplesOnDisk : public testing::Test {
 protected:
  void SetUp() override {
    const std::string test = testing::UnitTest::GetInstance()->current_test_info()->name();
    dir_ = std::filesystem::path(testing::TempDir()) / ("kvqbench_samples_" + test);
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  std::string results() const { return dir_ / "r.json"; }
  std::string lines() const { return results() + ".samples.jsonl"; }
  std::filesystem::path dir_;
};

Sample One(const std::string& id, double right) {
  return {.id = id, .cluster = "c", .prompt_sha256 = PromptSha256({1, 2}), .right = right, .nll = 0.1, .answer = "a \xE2\x82",
          .numbers = {{"hops", 3}}};
}

TEST_F(SamplesOnDisk, CellsAreReplacedAndThoseWithoutAResultGo) {
  {
    SamplesFile file(results());
    file.Put("b/cell", {One("0", 1), One("1", 0)});
    file.Put("a/cell", {One("0", 0.25)});
    file.Save({"a/cell", "b/cell"});
  }
  SamplesFile file(results());
  EXPECT_EQ(file.Text("b/cell") + "", ReadFile(lines()).substr(file.Text("a/cell").size()));
  const auto line = nlohmann::json::parse(file.Text("a/cell"));
  EXPECT_EQ(line, nlohmann::json::parse(R"({"benchmark": "a/cell", "sample": "0", "cluster": "c", "right": 0.25, "nll": 0.1,
      "prompt_sha256": "34fb5c825de7ca4aea6e712f19d439c1da0c92c37b423936c5f618545ca4fa1f",
      "hops": 3.0, "answer": "a �"})"));
  file.Put("b/cell", {One("2", 1)});
  file.Save({"b/cell"});  // of a/cell there is no result
  const std::string text = ReadFile(lines());
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  EXPECT_NE(text.find("\"sample\":\"2\""), std::string::npos);
  file.Backup();
  EXPECT_EQ(ReadFile(lines() + ".bak"), text);
}

TEST_F(SamplesOnDisk, NoItemsMakeNoFile) {
  SamplesFile file(results());
  file.Put("a/cell", {});
  file.Save({"a/cell"});
  EXPECT_FALSE(std::filesystem::exists(lines()));
}

TEST_F(SamplesOnDisk, RefusesWhatIsNone) {
  for (const char* text : {"no\n", "{\"sample\": \"0\"}\n", "{\"benchmark\": 1, \"sample\": \"0\"}\n", "[]\n"}) {
    std::ofstream(lines()) << R"({"benchmark": "a", "sample": "0"})" << "\n" << text;
    try {
      SamplesFile file(results());
      FAIL() << text;
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find(lines() + ": line 2"), std::string::npos) << error.what();
    }
  }
  EXPECT_THROW(CheckSamples({One("0", 1), One("0", 0)}), std::logic_error);
  EXPECT_THROW(CheckSamples({One("0", NAN)}), std::runtime_error);
}

// python3 -c "import hashlib, struct; print(hashlib.sha256(struct.pack('<2i', 1, 2)).hexdigest())"
TEST(SamplesPrompt, IsKnownByItsTokens) {
  EXPECT_EQ(PromptSha256({1, 2}), "34fb5c825de7ca4aea6e712f19d439c1da0c92c37b423936c5f618545ca4fa1f");
}

TEST(SamplesShare, IsWhatCachesHandOut) {
  const CacheShape shape = CacheShape::Uniform(1, 1, 1, 64);
  // By hand. Blocks of 4 behind one sink: position 9 has 10 tokens, 8 = (10 - 1 - 1) / 4 * 4 of them encoded.
  EXPECT_EQ(EncodedShareRead(ParseSpec("int4-hqq@residual=4@sinks=1"), shape, 1, 9, 10), 0.8);
  EXPECT_EQ(EncodedShareRead(ParseSpec("int4-hqq@residual=4@sinks=1"), shape, 1, 0, 5), 0);
  EXPECT_EQ(EncodedShareRead(ParseSpec("int4-hqq+none@residual=4@sinks=1"), shape, 1, 9, 10), 0.4);
  EXPECT_EQ(EncodedShareRead(ParseSpec("int4-hqq@residual=0"), shape, 1, 0, 8), 1);
  EXPECT_EQ(EncodedShareRead(ParseSpec("int4-hqq@residual=0@prefill=raw"), shape, 4, 0, 8), 0.5);
  EXPECT_EQ(EncodedShareRead(ParseSpec("none"), shape, 1, 0, 8), 0);
  EXPECT_EQ(EncodedShareRead(ParseSpec("int2-hqq@policy=kivi@residual=32"), shape, 32, 64, 65), (64 + 32) / 130.0);

  // Policy hf, token by token behind a call of 5: what is handed out and is not what went in is encoded.
  const Spec hf = ParseSpec("int2-hqq@policy=hf@residual=4");
  KvCache cache(hf, shape, 64, at::kFloat, at::kCPU);
  at::manual_seed(1);
  const at::Tensor keys = at::randn({1, 1, 40, 64}), values = at::randn({1, 1, 40, 64});
  cache.Update(0, keys.narrow(2, 0, 5), values.narrow(2, 0, 5));
  for (int64_t at = 5; at < 40; ++at) {
    const auto [read, _] = cache.Update(0, keys.narrow(2, at, 1), values.narrow(2, at, 1));
    const at::Tensor same = read.eq(keys.narrow(2, 0, at + 1)).all(-1);
    const double dense = static_cast<double>(same.sum().item<int64_t>());
    EXPECT_NEAR(EncodedShareRead(hf, shape, 5, at, at + 1), 1 - dense / static_cast<double>(at + 1), 1e-12) << at;
  }
  EXPECT_EQ(EncodedShareRead(hf, shape, 5, 0, 5), 0);
}

}  // namespace
}  // namespace kvq
