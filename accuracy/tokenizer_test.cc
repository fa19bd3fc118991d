// Tokenizers against Hugging Face `tokenizers`, transformers and sentencepiece: golden files of
// make_golden.py and make_golden_tokenizers.py.
#include <algorithm>
#include <ctime>
#include <filesystem>
#include <fstream>

#include "accuracy/golden.h"
#include "fixtures/dataset.h"
#include "kernels/sha256.h"
#include "fixtures/tokenizer/tokenizer.h"
#include "fixtures/tokenizer/unicode.h"
#include "kernels/error.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Ids = std::vector<int32_t>;

std::string FromHex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

std::string FileText(const std::string& name) {
  std::ifstream file(GoldenPath(name), std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void Compare(const Tokenizer& tokenizer, const json& golden) {
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
    EXPECT_EQ(tokenizer.Encode(FromHex(c["hex"]), false), c["ids"].get<Ids>()) << c["hex"];
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
  if (!fs::exists(SmolLm2())) GTEST_SKIP() << SmolLm2() << " is not there; run datasets/fetch smollm2-135m";
  const Tokenizer tokenizer = Tokenizer::Load(SmolLm2());
  Compare(tokenizer, Golden("tokenizer-smollm2.json"));
  EXPECT_FALSE(tokenizer.adds_bos());
  EXPECT_EQ(tokenizer.vocab_size(), 49152);
}

// Number and hash of ids, as the generators write them.
json Digest(const Ids& ids) {
  std::string joined;
  for (const int32_t id : ids) joined += std::to_string(id) + " ";
  return {{"count", ids.size()}, {"sha256", Sha256(joined)}};
}

constexpr const char* kWikiText = "wiki.test.raw";

// The text of a digest; empty where it is not here.
std::string WholeText(const std::string& name) {
  if (name != kWikiText) return LoadCorpus(name, "").text;
  const char* shared = std::getenv("KVQ_SHARED");
  const std::string path = std::string(shared ? shared : std::string(KVQ_SOURCE_DIR) + "/../shared") + "/datasets/" + name;
  return fs::exists(path) ? LoadCorpus("", path).text : "";
}

// By Hugging Face `tokenizers` 0.22.2.
TEST(TokenizerParity, WholeTexts) {
  if (!fs::exists(SmolLm2())) GTEST_SKIP() << SmolLm2() << " is not there; run datasets/fetch smollm2-135m";
  const Tokenizer tokenizer = Tokenizer::Load(SmolLm2());
  const json digests = {
      {"pride-and-prejudice", {{"count", 167892}, {"sha256", "738ed18aa4744594239d494061cf14e082339ee54d3cf4409ea89b898c2c2dfb"}}},
      {kWikiText, {{"count", 304978}, {"sha256", "295a1753250c0097b9d88a93a0686c7ea60b6063ca56098e2be25ebd1959cdb2"}}}};
  for (const auto& [name, digest] : digests.items()) {
    const std::string text = WholeText(name);
    if (text.empty()) GTEST_SKIP() << name << " is not part of the project; set KVQ_SHARED";
    const Ids ids = tokenizer.Encode(text, false);
    EXPECT_EQ(Digest(ids), digest) << name;
    EXPECT_EQ(tokenizer.Decode(ids), text) << "decoding gives the text back";
  }
}

std::string Utf8(uint32_t code) {
  const auto lead = [&](int mark, int shift) { return static_cast<char>(mark | code >> shift); };
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | (code >> shift & 0x3F)); };
  if (code < 0x80) return {lead(0, 0)};
  if (code < 0x800) return {lead(0xC0, 6), tail(0)};
  if (code < 0x10000) return {lead(0xE0, 12), tail(6), tail(0)};
  return {lead(0xF0, 18), tail(12), tail(6), tail(0)};
}

// code_points() of make_golden_tokenizers.py: every character of the planes in use, beside letters, marks,
// digits, apostrophes and added tokens.
std::string CodePoints() {
  std::string text;
  const auto add = [&](uint32_t begin, uint32_t end, uint32_t step) {
    for (uint32_t code = begin; code < end; code += step) {
      const std::string c = Utf8(code);
      text += "x'" + c + "e " + c + "\u0334a" + c + " 1" + c + "cut word" + c + "\n";
    }
  };
  add(0, 0xD800, 1);
  add(0xE000, 0x20000, 1);
  add(0x20000, 0x33480, 61);
  add(0xE0000, 0xE0200, 1);
  return text;
}

// Texts of the generator, the ones that are no UTF-8 last.
std::vector<std::string> Texts(const json& golden) {
  std::vector<std::string> texts = golden["texts"];
  for (const std::string hex : golden["invalid"]) texts.push_back(FromHex(hex));
  return texts;
}

std::vector<std::string> FamilyNames() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(GoldenPath("tokenizers"))) {
    if (entry.is_directory()) names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

TEST(TokenizerParity, EveryKindOfFile) {
  const json shared = Golden("tokenizers/texts.json");
  const std::vector<std::string> texts = Texts(shared);
  EXPECT_GE(FamilyNames().size(), 12u);
  for (const std::string& family : FamilyNames()) {
    SCOPED_TRACE(family);
    const Tokenizer tokenizer = Tokenizer::Load(GoldenPath("tokenizers/" + family));
    const json golden = Golden("tokenizers/" + family + "/golden.json");
    ASSERT_EQ(golden["ids"].size(), texts.size());
    for (size_t i = 0; i < texts.size(); ++i) {
      const Ids ids = golden["ids"][i];
      EXPECT_EQ(tokenizer.Encode(texts[i], false), ids) << texts[i];
      // Only what is not the text itself stands in the file.
      const std::string key = std::to_string(i);
      const std::string decoded = golden["decoded"].value(key, ReplaceInvalidUtf8(texts[i]));
      EXPECT_EQ(tokenizer.Decode(ids), decoded);
      EXPECT_EQ(tokenizer.Decode(ids, false), golden["with_special"].value(key, decoded));
    }
    const Ids whole = golden["ids"][shared["cut"].get<size_t>()];
    EXPECT_GT(golden["cuts"].size(), 20u);
    for (const json& cut : golden["cuts"]) {
      const size_t begin = cut[0], end = std::min(cut[1].get<size_t>(), whole.size());
      EXPECT_EQ(tokenizer.Decode(Ids(whole.begin() + begin, whole.begin() + end)), cut[2].get<std::string>()) << cut;
    }
    EXPECT_EQ(tokenizer.Encode("", true), golden["with_bos"][0].get<Ids>());
    EXPECT_EQ(tokenizer.Encode("Hello", true), golden["with_bos"][1].get<Ids>());
    EXPECT_EQ(tokenizer.adds_bos(), !golden["with_bos"][0].empty());
    EXPECT_EQ(tokenizer.bos_id() ? json(*tokenizer.bos_id()) : json(), golden["bos"]);
    EXPECT_EQ(tokenizer.eos_id() ? json(*tokenizer.eos_id()) : json(), golden["eos"]);
  }
}

TEST(TokenizerParity, EveryKindOfFileOnWholeTexts) {
  const std::string code_points = CodePoints();
  std::map<std::string, std::string> texts;
  int with_code_points = 0;
  for (const std::string& family : FamilyNames()) {
    SCOPED_TRACE(family);
    const Tokenizer tokenizer = Tokenizer::Load(GoldenPath("tokenizers/" + family));
    const json golden = Golden("tokenizers/" + family + "/golden.json");
    if (golden.contains("code_points")) {  // where regular expressions, normalization or flags are at work
      EXPECT_EQ(Digest(tokenizer.Encode(code_points, false)), golden["code_points"]);
      ++with_code_points;
    }
    for (const auto& [name, digest] : golden["whole"].items()) {
      if (!texts.contains(name)) texts[name] = WholeText(name);
      if (texts[name].empty()) continue;  // WikiText-2 is not part of the project
      EXPECT_EQ(Digest(tokenizer.Encode(texts[name], false)), digest) << name;
    }
  }
  EXPECT_GE(with_code_points, 4);
}

// The vocabularies that the models of the study have, which ci/live-parity brings.
TEST(TokenizerParity, RealVocabularies) {
  const std::vector<std::string> texts = Texts(Golden("tokenizers/texts.json"));
  const std::string folder = CacheDir() + "/tokenizers/";
  if (!fs::exists(folder)) GTEST_SKIP() << folder << " is not there; run ci/live-parity";
  const json golden = Golden("tokenizers/real.json");
  EXPECT_GE(golden.size(), 5u);
  for (const auto& [family, digests] : golden.items()) {
    SCOPED_TRACE(family);
    const Tokenizer tokenizer = Tokenizer::Load(folder + family);
    for (const auto& [name, digest] : digests.items()) {
      std::string text;
      if (name == "texts") {
        for (const json& i : digest["of"]) text += texts[i] + "\n";
      } else {
        text = WholeText(name);
      }
      if (text.empty()) continue;
      const json made = Digest(tokenizer.Encode(text, false));
      EXPECT_EQ(made["count"], digest["count"]) << name;
      EXPECT_EQ(made["sha256"], digest["sha256"]) << name;
    }
  }
}

// Qwen2's tokenizer.json, taken apart into the two files.
TEST(TokenizerParity, Qwen2FromVocabAndMerges) {
  const std::string source = GoldenPath("tokenizers/qwen");
  const fs::path dir = fs::path(testing::TempDir()) / "kvq_qwen2_files";
  fs::create_directories(dir);
  fs::copy(source + "/tokenizer_config.json", dir, fs::copy_options::overwrite_existing);
  const json model = json::parse(FileText("tokenizers/qwen/tokenizer.json"))["model"];
  std::ofstream(dir / "vocab.json") << model["vocab"];
  std::ofstream merges(dir / "merges.txt");
  merges << "#version: 0.2\n";
  for (const json& merge : model["merges"]) merges << merge[0].get<std::string>() << " " << merge[1].get<std::string>() << "\n";
  merges.close();
  const Tokenizer tokenizer = Tokenizer::Load(dir);
  const std::vector<std::string> texts = Texts(Golden("tokenizers/texts.json"));
  const json golden = Golden("tokenizers/qwen/golden.json");
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(tokenizer.Encode(texts[i], false), golden["ids"][i].get<Ids>()) << texts[i];
  }
  fs::remove_all(dir);
}

// SentencePiece's BPE takes a text for one piece. Four times the text must not take 16 times as long.
TEST(Tokenizer, LongPiecesTakeNoSquareOfTheirLength) {
  const Tokenizer tokenizer = Tokenizer::Load(GoldenPath("tokenizers/mistral"));
  const auto seconds = [&](size_t repeats) {
    std::string text;
    for (size_t i = 0; i < repeats; ++i) text += "the quick brown fox " + std::to_string(i);
    const std::clock_t start = std::clock();
    tokenizer.Encode(text, false);
    return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  };
  seconds(1000);
  // 4 log(4 n) / log(n) is 4.5; 4.0 to 6.2 were seen in 80 runs on a busy machine.
  EXPECT_LT(seconds(20000), 10 * seconds(5000));
}

TEST(Tokenizer, RefusesByName) {
  const json good = json::parse(FileText("tokenizer/tokenizer.json"));
  const auto message = [](const json& tokenizer, const std::string& config = "") {
    try {
      Tokenizer::Parse(tokenizer.dump(), config, "T");
    } catch (const InputError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const auto with = [&](const std::string& pointer, const json& value) {
    json changed = good;
    changed[json::json_pointer(pointer)] = value;
    return message(changed);
  };
  EXPECT_EQ(message(good), "no error");
  EXPECT_EQ(message("text"), "T: not a JSON object");
  // Where, what, and what the error must name.
  const json metaspace = {{"type", "Metaspace"}, {"replacement", "_"}};
  const json split = {{"type", "Split"}, {"pattern", {{"String", "x"}}}, {"behavior", "Isolated"}, {"invert", false}};
  const auto changed = [](json stage, const char* key, const json& value) { return stage[key] = value, stage; };
  const json byte_level = good["pre_tokenizer"]["pretokenizers"][1];
  const std::vector<std::tuple<std::string, json, std::vector<std::string>>> cases = {
      {"/normalizer", {{"type", "NFKC"}}, {"T: normalizer", "NFKC"}},
      {"/normalizer", {{"type", "Precompiled"}}, {"normalizer", "Precompiled"}},
      {"/normalizer", {{"type", "Sequence"}}, {"normalizer", "normalizers"}},
      {"/normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "Lowercase"}}}}}, {"normalizer", "Lowercase"}},
      {"/normalizer", {{"type", "Prepend"}}, {"normalizer", "prepend"}},
      {"/normalizer", {{"type", "Replace"}, {"pattern", {{"Regex", "a"}}}, {"content", "b"}}, {"normalizer", "Replace", "Regex"}},
      {"/normalizer", {{"type", "Replace"}, {"pattern", {{"String", ""}}}, {"content", "b"}}, {"normalizer", "Replace", "String"}},
      {"/normalizer", 3, {"normalizer", "type"}},
      {"/model/type", "Unigram", {"T: model", "Unigram"}},
      {"/model/type", "WordPiece", {"model", "WordPiece"}},
      {"/model/dropout", 0.1, {"model", "dropout", "0.1"}},
      {"/model/continuing_subword_prefix", "##", {"continuing_subword_prefix", "##"}},
      {"/model/end_of_word_suffix", "</w>", {"end_of_word_suffix", "</w>"}},
      {"/model/byte_fallback", "yes", {"byte_fallback", "yes"}},
      {"/model/unk_token", "<nope>", {"unk_token", "<nope>"}},
      {"/model/merge_ranks", {1}, {"merge_ranks"}},
      {"/model/vocab", json::object(), {"vocab"}},
      {"/model/vocab/a", -1, {"token id"}},
      {"/model/vocab/a", 4'000'000'000, {"token id"}},
      {"/model/vocab/a", good["model"]["vocab"]["b"], {"two tokens with id"}},
      {"/model/merges", 3, {"merges"}},
      {"/model/merges/0", "nospace", {"no pair"}},
      {"/model/merges/0", {"a", "\u00ff\u00ff"}, {"no token of the vocabulary"}},
      {"/pre_tokenizer", {{"type", "Whitespace"}}, {"T: pre_tokenizer", "Whitespace"}},
      {"/pre_tokenizer", changed(metaspace, "replacement", "__"), {"Metaspace", "replacement", "one character"}},
      {"/pre_tokenizer", changed(metaspace, "prepend_scheme", "last"), {"Metaspace", "prepend_scheme", "last"}},
      {"/pre_tokenizer", changed(metaspace, "add_prefix_space", false), {"Metaspace", "add_prefix_space", "always"}},
      {"/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {split, changed(metaspace, "prepend_scheme", "first")}}}, {"prepend_scheme first"}},
      {"/pre_tokenizer", changed(split, "behavior", "Removed"), {"Split", "behavior", "Removed"}},
      {"/pre_tokenizer", changed(split, "invert", true), {"Split", "invert"}},
      {"/pre_tokenizer", changed(split, "pattern", {{"Regex", "(a"}}), {"Split", "(a", "parenthesis"}},
      {"/pre_tokenizer", changed(split, "pattern", "x"), {"Split", "pattern"}},
      {"/pre_tokenizer", changed(byte_level, "use_regex", 3), {"ByteLevel", "use_regex"}},
      {"/pre_tokenizer", changed(byte_level, "add_prefix_space", nullptr), {"ByteLevel", "add_prefix_space"}},
      {"/pre_tokenizer/pretokenizers/0/individual_digits", false, {"Digits", "individual_digits"}},
      {"/decoder", {{"type", "WordPiece"}}, {"T: decoder", "WordPiece"}},
      {"/decoder", nullptr, {"decoder is missing"}},
      {"/decoder", {{"type", "Strip"}, {"content", " "}, {"start", -1}, {"stop", 0}}, {"decoder", "Strip", "start"}},
      {"/decoder", {{"type", "Replace"}, {"pattern", {{"Regex", "a"}}}, {"content", "b"}}, {"decoder", "Replace", "Regex"}},
      {"/added_tokens", 3, {"added_tokens"}},
      {"/added_tokens/0/lstrip", 1, {"added_tokens", "lstrip"}},
      {"/added_tokens/0/content", "", {"added_tokens", "content"}},
      {"/added_tokens/0/id", 7, {"added_tokens", "has id 7", "with id 0"}},
      {"/added_tokens/0", {{"content", "<new>"}, {"id", 1000}}, {"<new>", "has id 1000", "420"}},
      {"/added_tokens/0", good["added_tokens"][1], {"there twice"}},
      {"/post_processor", {{"type", "BertProcessing"}}, {"T: post_processor", "BertProcessing"}},
      {"/post_processor", {{"type", "TemplateProcessing"}, {"single", json::array()}}, {"post_processor", "without a text"}},
      {"/post_processor", {{"type", "TemplateProcessing"}, {"single", {{{"SpecialToken", {{"id", "<x>"}}}}}}}, {"post_processor", "<x>"}},
      {"/post_processor",
       {{"type", "TemplateProcessing"}, {"single", {{{"Sequence", {{"id", "A"}}}}, {{"Sequence", {{"id", "A"}}}}}}},
       {"post_processor", "is not supported"}},
  };
  for (const auto& [pointer, value, words] : cases) {
    const std::string error = with(pointer, value);
    EXPECT_TRUE(error.starts_with("T: ")) << error;
    for (const std::string& word : words) EXPECT_NE(error.find(word), std::string::npos) << error << "\n  lacks " << word;
  }
  EXPECT_NE(message(good, "[]").find("tokenizer_config.json"), std::string::npos);
  EXPECT_NE(message(good, R"({"bos_token":"<nope>"})").find("<nope>"), std::string::npos);
  EXPECT_NE(message(good, R"({"add_bos_token":true})").find("without a bos_token"), std::string::npos);
  EXPECT_NE(message(good, R"({"add_eos_token":1})").find("add_eos_token"), std::string::npos);
  EXPECT_NE(message(good, R"({"added_tokens_decoder":{"9999":{"content":"<new>"}}})").find("has id 9999"), std::string::npos);
  EXPECT_THROW(Tokenizer::Load("/no/such/dir"), InputError);
}

// A model directory with these files; `bytes` by name.
std::string ErrorOf(const std::map<std::string, std::string>& files) {
  const fs::path dir = fs::path(testing::TempDir()) / TestName();
  fs::remove_all(dir);
  fs::create_directories(dir);
  for (const auto& [name, bytes] : files) std::ofstream(dir / name, std::ios::binary) << bytes;
  try {
    Tokenizer::Load(dir);
  } catch (const InputError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Tokenizer, RefusesSentencePieceByName) {
  const std::string model = FileText("tokenizers/model-llama/tokenizer.model");
  const auto expect = [](const std::map<std::string, std::string>& files, const std::string& words) {
    const std::string error = ErrorOf(files);
    EXPECT_NE(error.find(words), std::string::npos) << error << "\n  lacks " << words;
  };
  expect({{"tokenizer.model", model}}, "no error");
  expect({{"tokenizer.model", ""}}, "no SentencePiece model");
  expect({{"tokenizer.model", "IQ== 0\nIg== 1\n"}}, "no SentencePiece model");  // tiktoken's, Llama-3's original
  for (size_t size = 1; size < model.size(); size += 97) {
    EXPECT_NE(ErrorOf({{"tokenizer.model", model.substr(0, size)}}), "") << "no crash";
  }
  // Later fields of a message replace earlier ones: trainer_spec (2) and normalizer_spec (3) once more.
  const auto field = [](int message, const std::string& inner) {
    return static_cast<char>(message << 3 | 2) + (static_cast<char>(inner.size()) + inner);
  };
  expect({{"tokenizer.model", model + field(2, "\x18\x01")}}, "model_type Unigram");
  expect({{"tokenizer.model", model + field(2, "\xC0\x01\x01")}}, "treat_whitespace_as_suffix");
  expect({{"tokenizer.model", model + field(3, "\x12\x02zz")}}, "precompiled_charsmap");
  expect({{"tokenizer.model", model + field(3, "\x20\x01")}}, "remove_extra_whitespaces");
  expect({{"tokenizer.model", model + field(3, std::string("\x28\0", 2))}}, "escape_whitespaces");
  expect({{"tokenizer.model", model + field(1, "\x0A\x01" "a")}}, "piece 'a' is there twice");
  expect({{"tokenizer.model", model + field(1, "\x0A\x03new\x18\x05")}}, "type 5 of piece 'new'");
  expect({{"tokenizer.model", model + field(1, "\x0A\x01\xFF")}}, "no UTF-8");
  expect({{"tokenizer.model", model}, {"tokenizer_config.json", R"({"tokenizer_class":"T5Tokenizer"})"}}, "T5Tokenizer");
  expect({{"tokenizer.model", model}, {"tokenizer_config.json", R"({"legacy":3})"}}, "legacy");
}

TEST(Tokenizer, RefusesVocabAndMergesByName) {
  const std::string vocab = FileText("tokenizers/gpt2/vocab.json"), merges = FileText("tokenizers/gpt2/merges.txt");
  const std::string gpt2 = R"({"tokenizer_class":"GPT2Tokenizer"})";
  const auto expect = [](const std::map<std::string, std::string>& files, const std::string& words) {
    const std::string error = ErrorOf(files);
    EXPECT_NE(error.find(words), std::string::npos) << error << "\n  lacks " << words;
  };
  expect({{"vocab.json", vocab}, {"merges.txt", merges}, {"tokenizer_config.json", gpt2}}, "no error");
  expect({{"vocab.json", vocab}}, "nor vocab.json with merges.txt");
  expect({{"vocab.json", vocab}, {"merges.txt", merges}}, "tokenizer_class null");
  expect({{"vocab.json", vocab}, {"merges.txt", merges}, {"config.json", R"({"model_type":"bart"})"}}, "tokenizer_class \"\"");
  expect({{"vocab.json", vocab}, {"merges.txt", merges + "a b c\n"}, {"tokenizer_config.json", gpt2}}, "'a b c' is no pair");
  expect({{"vocab.json", "[]"}, {"merges.txt", merges}, {"tokenizer_config.json", gpt2}}, "not a JSON object");
}

// "a b" loads as no merge in the library: pairs and strings must give the same ids.
TEST(Tokenizer, MergesAsStringsAreMerges) {
  json tokenizer = json::parse(FileText("tokenizer/tokenizer.json"));
  const std::string text = "The capital of France is Paris.";
  const auto pairs = Tokenizer::Parse(tokenizer.dump(), "", "T").Encode(text, false);
  for (json& merge : tokenizer["model"]["merges"]) {
    if (merge.is_array()) merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  }
  EXPECT_EQ(Tokenizer::Parse(tokenizer.dump(), "", "T").Encode(text, false), pairs);
  EXPECT_LT(pairs.size(), text.size() / 2);
}

}  // namespace
}  // namespace kvq
