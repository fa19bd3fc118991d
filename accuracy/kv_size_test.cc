// Bytes of the cache against those that the reference study published for its five models.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <sstream>

#include "accuracy/families.h"
#include "accuracy/golden.h"
#include "fixtures/model.h"
#include "kernels/error.h"

namespace kvq {
namespace {

using Row = std::map<std::string, std::string>;

// Rows of a CSV file without quotes, by their headings.
std::vector<Row> ReadCsv(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file) << path;
  const auto split = [](const std::string& line) {
    std::vector<std::string> cells;
    std::istringstream stream(line);
    for (std::string cell; std::getline(stream, cell, ',');) cells.push_back(cell);
    return cells;
  };
  std::string line;
  std::getline(file, line);
  const std::vector<std::string> headings = split(line);
  std::vector<Row> rows;
  while (std::getline(file, line)) {
    const std::vector<std::string> cells = split(line);
    for (size_t i = 0; i < cells.size(); ++i) {
      if (i == 0) rows.emplace_back();
      rows.back()[headings[i]] = cells[i];
    }
  }
  return rows;
}

// kv_cache_mb (MiB, rounded to one decimal, Gemma's to two) of model, spec and context.
std::vector<Row> Published() { return ReadCsv(GoldenPath("study_kv_cache_mb.csv")); }

TEST(KvSizeParity, EqualsTheStudysInAllHundredRows) {
  const std::vector<Row> rows = Published();
  ASSERT_EQ(rows.size(), 100u);
  std::map<std::string, int> of_model;
  for (const Row& row : rows) {
    const PublishedShape* shape = FindPublishedShape(row.at("model"));
    ASSERT_NE(shape, nullptr) << row.at("model");
    const CacheShape cache = CacheShapeOf(ParseModelConfig(shape->config, shape->name), 1);
    // Measured after the prefill, when the study's library has encoded everything.
    const Spec spec = ParseSpec(row.at("spec") + "@policy=hf");
    const int64_t bytes = KvBytes(spec, cache, std::stoll(row.at("context")), at::kHalf);
    const std::string& published = row.at("kv_cache_mb");
    const double decimals = static_cast<double>(published.size() - published.find('.') - 1);
    // Rounded by at most half a unit of the last decimal, ties (14.875 became 14.88) by just that.
    EXPECT_NEAR(static_cast<double>(bytes) / (1 << 20), std::stod(published), 0.5 * std::pow(10, -decimals) * (1 + 1e-9))
        << row.at("model") << " " << row.at("spec") << " " << row.at("context");
    ++of_model[row.at("model")];
  }
  EXPECT_EQ(of_model, (std::map<std::string, int>{{"gemma-4-e4b", 20},
                                                  {"mistral-7b", 20},
                                                  {"qwen2-7b", 20},
                                                  {"qwen3-8b", 20},
                                                  {"yi-1.5-9b", 20}}));
}

// By hand, in 16 bits: sides, layers, KV heads, head_dim and bytes multiplied; layers of another kind are another term. And what
// layers of linear attention keep at any length: layers, value heads, key_dim, value_dim and 4 bytes; layers, channels of the
// convolution, tokens that it looks back and 2 bytes.
TEST(KvSize, OfPublishedShapesIsWhatOneMultiplies) {
  std::map<std::string, int64_t> by_hand, states;
  for (const Family& family : Families()) {
    for (auto [key, sums] : {std::pair("kv_bytes_a_token", &by_hand), std::pair("state_bytes", &states)}) {
      const nlohmann::json shapes = family.says.value(key, nlohmann::json::object());
      for (const auto& [name, terms] : shapes.items()) {
        for (const std::vector<int64_t> factors : terms) {
          int64_t product = 1;
          for (const int64_t factor : factors) product *= factor;
          (*sums)[name] += product;
        }
      }
    }
  }
  for (const PublishedShape& shape : PublishedShapes()) {
    ASSERT_TRUE(by_hand.contains(shape.name)) << shape.name << ": its bytes are missing in accuracy/families/";
    const ModelConfig config = ParseModelConfig(shape.config, shape.name);
    const auto linear = std::count_if(config.layers.begin(), config.layers.end(), [](const LayerConfig& layer) { return layer.linear; });
    EXPECT_EQ(linear * StateBytesOf(config, 1, at::kHalf), states[shape.name]) << shape.name;
    const CacheShape cache = CacheShapeOf(config, 1);
    EXPECT_EQ(KvBytes(ParseSpec("none"), cache, 4096, at::kHalf), 4096 * by_hand[shape.name]) << shape.name;
  }
  EXPECT_EQ(by_hand.size(), PublishedShapes().size());
}

// The committed figures are a copy of the study's own files, where those are at hand.
TEST(KvSizeParity, TheCopyOfTheStudysFiguresIsTrue) {
  const char* shared = std::getenv("KVQ_SHARED");
  const std::string study =
      StrCat(shared != nullptr ? shared : KVQ_SOURCE_DIR "/../shared", "/reference-study");
  if (!std::filesystem::exists(study)) GTEST_SKIP() << study << " is not there; set KVQ_SHARED";
  const std::map<std::string, std::string> models = {{"Mistral-7B", "mistral-7b"},
                                                     {"Qwen2-7B", "qwen2-7b"},
                                                     {"Qwen3-8B", "qwen3-8b"},
                                                     {"Yi-1.5-9B", "yi-1.5-9b"}};
  const std::map<std::string, std::string> specs = {{"FP16", "none"},
                                                    {"INT8", "int8-hqq"},
                                                    {"INT4", "int4-hqq"},
                                                    {"INT2", "int2-hqq"},
                                                    {"INT2-KIVI", "int2-hqq-kivi"}};
  std::map<std::string, double> theirs, copy;
  const auto key = [](const std::string& model, const std::string& spec,
                      const std::string& context) {
    return StrCat(model, " ", spec, " ", context);
  };
  for (const Row& row : ReadCsv(study + "/data/tables/phase_b_long_context.csv")) {
    theirs[key(models.at(row.at("model")), specs.at(row.at("kv_quant")), row.at("context_len"))] =
        std::stod(row.at("kv_cache_mb"));
  }
  for (const Row& row : ReadCsv(study + "/headline.csv")) {
    if (row.at("phase") != "long_context" || row.at("model") != "google/gemma-4-E4B") continue;
    theirs[key("gemma-4-e4b", row.at("spec"), row.at("context"))] = std::stod(row.at("kv_mb"));
  }
  for (const Row& row : Published()) {
    copy[key(row.at("model"), row.at("spec"), row.at("context"))] =
        std::stod(row.at("kv_cache_mb"));
  }
  EXPECT_EQ(copy, theirs);
}

}  // namespace
}  // namespace kvq
