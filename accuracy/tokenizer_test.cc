// The tokenizer against Hugging Face `tokenizers`.
#include <filesystem>

#include "accuracy/golden.h"
#include "fixtures/dataset.h"
#include "fixtures/sha256.h"
#include "fixtures/tokenizer.h"
#include "kernels/error.h"

namespace kvq {
namespace {

void Compare(const Tokenizer& tokenizer, const nlohmann::json& golden) {
  for (const auto& c : golden["texts"]) {
    const std::vector<int32_t> ids = c["ids"];
    EXPECT_EQ(tokenizer.Encode(c["text"].get<std::string>(), false), ids) << c["text"];
    EXPECT_EQ(tokenizer.Decode(ids), c["decoded"].get<std::string>());
    EXPECT_EQ(tokenizer.Decode(ids, false), c["with_special"].get<std::string>());
  }
  for (const auto& c : golden["cuts"]) {
    EXPECT_EQ(tokenizer.Decode(c["ids"].get<std::vector<int32_t>>()), c["decoded"].get<std::string>()) << c["ids"];
  }
  for (const auto& c : golden["invalid"]) {
    std::string bytes;
    const std::string hex = c["hex"];
    for (size_t i = 0; i < hex.size(); i += 2) bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    EXPECT_EQ(tokenizer.Encode(bytes, false), c["ids"].get<std::vector<int32_t>>()) << hex;
  }
}

TEST(TokenizerParity, TrainedTinyOne) {
  const Tokenizer tokenizer = Tokenizer::Load(GoldenPath("tokenizer"));
  Compare(tokenizer, Golden("tokenizer.json"));
  EXPECT_TRUE(tokenizer.adds_bos());
  EXPECT_EQ(tokenizer.Encode("", true), std::vector<int32_t>{*tokenizer.bos_id()});
  EXPECT_NE(tokenizer.bos_id(), tokenizer.eos_id());
  EXPECT_THROW(tokenizer.Decode(std::vector<int32_t>{-1}), InputError);
  EXPECT_THROW(tokenizer.Decode(std::vector<int32_t>{1 << 20}), InputError);
}

std::string SmolLm2() { return CacheDir() + "/models/smollm2-135m"; }

TEST(TokenizerParity, SmolLm2) {
  if (!std::filesystem::exists(SmolLm2())) GTEST_SKIP() << SmolLm2() << " is not there; run datasets/fetch smollm2-135m";
  const Tokenizer tokenizer = Tokenizer::Load(SmolLm2());
  Compare(tokenizer, Golden("tokenizer-smollm2.json"));
  EXPECT_FALSE(tokenizer.adds_bos());
  EXPECT_EQ(tokenizer.vocab_size(), 49152);
}

// Number and hash of all ids of a book and of WikiText-2, by Hugging Face `tokenizers` 0.22.2.
TEST(TokenizerParity, WholeTexts) {
  if (!std::filesystem::exists(SmolLm2())) GTEST_SKIP() << SmolLm2() << " is not there; run datasets/fetch smollm2-135m";
  const Tokenizer tokenizer = Tokenizer::Load(SmolLm2());
  const auto digest = [&](const std::string& text, size_t& count) {
    const std::vector<int32_t> ids = tokenizer.Encode(text, false);
    count = ids.size();
    EXPECT_EQ(tokenizer.Decode(ids), text) << "decoding gives the text back";
    std::string joined;
    for (const int32_t id : ids) joined += std::to_string(id) + " ";
    return Sha256(joined);
  };
  size_t count = 0;
  EXPECT_EQ(digest(LoadCorpus("pride-and-prejudice", "").text, count),
            "738ed18aa4744594239d494061cf14e082339ee54d3cf4409ea89b898c2c2dfb");
  EXPECT_EQ(count, 167892u);
  const char* shared = std::getenv("KVQ_SHARED");
  const std::string raw = std::string(shared ? shared : std::string(KVQ_SOURCE_DIR) + "/../shared") + "/datasets/wiki.test.raw";
  if (!std::filesystem::exists(raw)) GTEST_SKIP() << raw << " is not part of the project; set KVQ_SHARED";
  EXPECT_EQ(digest(LoadCorpus("", raw).text, count), "295a1753250c0097b9d88a93a0686c7ea60b6063ca56098e2be25ebd1959cdb2");
  EXPECT_EQ(count, 304978u);
}

TEST(Tokenizer, RefusesByName) {
  std::ifstream file(GoldenPath("tokenizer/tokenizer.json"));
  const nlohmann::json good = nlohmann::json::parse(file);
  const auto message = [](const nlohmann::json& tokenizer, const std::string& config = "") {
    try {
      Tokenizer::Parse(tokenizer.dump(), config, "T");
    } catch (const InputError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const auto with = [&](const std::string& pointer, const nlohmann::json& value) {
    nlohmann::json changed = good;
    changed[nlohmann::json::json_pointer(pointer)] = value;
    return message(changed);
  };
  EXPECT_EQ(message(good), "no error");
  EXPECT_EQ(message("text"), "T: not a JSON object");
  EXPECT_NE(with("/normalizer", {{"type", "NFC"}}).find("NFC"), std::string::npos);
  EXPECT_NE(with("/model/type", "Unigram").find("Unigram"), std::string::npos);
  EXPECT_NE(with("/model/byte_fallback", true).find("byte_fallback"), std::string::npos);
  EXPECT_NE(with("/model/vocab", nlohmann::json::object()).find("vocab"), std::string::npos);
  EXPECT_NE(with("/model/vocab/a", -1).find("token id"), std::string::npos);
  EXPECT_NE(with("/model/vocab/a", 4'000'000'000).find("token id"), std::string::npos);
  EXPECT_NE(with("/model/vocab/a", good["model"]["vocab"]["b"]).find("two tokens with id"), std::string::npos);
  EXPECT_NE(with("/model/merges", 3).find("merges"), std::string::npos);
  EXPECT_NE(with("/model/merges/0", "nospace").find("no pair"), std::string::npos);
  EXPECT_NE(with("/pre_tokenizer", {{"type", "Metaspace"}}).find("Metaspace"), std::string::npos);
  EXPECT_NE(with("/pre_tokenizer/pretokenizers/1/use_regex", false).find("use_regex"), std::string::npos);
  EXPECT_NE(with("/pre_tokenizer/pretokenizers/1/add_prefix_space", true).find("add_prefix_space"), std::string::npos);
  EXPECT_NE(with("/decoder", {{"type", "WordPiece"}}).find("WordPiece"), std::string::npos);
  EXPECT_NE(with("/added_tokens/0/lstrip", true).find("lstrip"), std::string::npos);
  EXPECT_NE(with("/post_processor", {{"type", "BertProcessing"}}).find("BertProcessing"), std::string::npos);
  EXPECT_NE(message(good, "[]").find("tokenizer_config.json"), std::string::npos);
  EXPECT_NE(message(good, R"({"bos_token":"<nope>"})").find("<nope>"), std::string::npos);
  EXPECT_NE(message(good, R"({"add_bos_token":true})").find("without a bos_token"), std::string::npos);
  EXPECT_THROW(Tokenizer::Load("/no/such/dir"), InputError);
}

// "a b" loads as no merge in the library: pairs and strings must give the same ids.
TEST(Tokenizer, MergesAsStringsAreMerges) {
  std::ifstream file(GoldenPath("tokenizer/tokenizer.json"));
  nlohmann::json tokenizer = nlohmann::json::parse(file);
  const std::string text = "The capital of France is Paris.";
  const auto pairs = Tokenizer::Parse(tokenizer.dump(), "", "T").Encode(text, false);
  for (auto& merge : tokenizer["model"]["merges"]) {
    if (merge.is_array()) merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  }
  EXPECT_EQ(Tokenizer::Parse(tokenizer.dump(), "", "T").Encode(text, false), pairs);
  EXPECT_LT(pairs.size(), text.size() / 2);
}

}  // namespace
}  // namespace kvq
