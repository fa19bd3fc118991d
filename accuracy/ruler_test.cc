// RULER's tasks: Python's and numpy's random numbers, prompts against those that RULER's own scripts wrote
// (golden/ruler.json, make_golden_ruler.py), and its two metrics on cases made by hand.
#include "accuracy/ruler_tasks.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <set>

#include "accuracy/golden.h"
#include "accuracy/python_random.h"
#include "accuracy/tiny_model.h"
#include "benchmarks/measurement.h"
#include "fixtures/dataset.h"
#include "kernels/file.h"
#include "kernels/sha256.h"

namespace kvq {
namespace {

// Printed by CPython 3.11.7 and numpy 2.4.6, seed 42.
TEST(PythonRandom, DrawsWhatPythonDraws) {
  PythonRandom random(42);
  EXPECT_EQ(random.Random(), 0.6394267984578837);
  EXPECT_EQ(random.Bits(32), 107420369u);
  EXPECT_EQ(random.Int(1000000, 9999999), 5614226);
  EXPECT_EQ(random.Letters("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5), "GDCTO");
  EXPECT_EQ(random.Uuid4(), "07a0ca6e-0822-48f3-ac03-1199972a8469");
  EXPECT_EQ(random.Sample(30, 8), (std::vector<int64_t>{2, 6, 7, 16, 19, 0, 17, 28}));  // of a list of 30
  EXPECT_EQ(random.Sample(1000, 5), (std::vector<int64_t>{733, 665, 718, 558, 429}));   // of a set
  std::vector<int> list = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  random.Shuffle(list);
  EXPECT_EQ(list, (std::vector<int>{5, 2, 8, 9, 1, 0, 6, 4, 7, 3}));
  EXPECT_EQ(random.Below(1), 0);
  EXPECT_EQ(random.Bits(32), 924765563u);
  EXPECT_THROW(random.Sample(3, 4), std::length_error);
  EXPECT_EQ(PythonRandom(uint64_t{1} << 40 | 7).Bits(32), 2635837658u);  // a seed of two words
}

TEST(PythonRandom, DrawsWhatNumpyDraws) {
  NumpyRandom random(42);
  std::vector<int64_t> drawn;
  for (int i = 0; i < 6; ++i) drawn.push_back(random.Int(10000, 99999));
  EXPECT_EQ(drawn, (std::vector<int64_t>{25795, 10860, 86820, 64886, 16265, 92386}));
}

TEST(WordPairs, AreThoseThatSortingThemGives) {
  const std::vector<std::string> adjectives = {"old", "blue-eyed", "blue", "bluest", "old", "x"};
  const std::vector<std::string> nouns = {"zebra", "art", "eyed-cat", "egg"};
  std::vector<std::string> all;
  for (const std::string& adjective : adjectives) {
    for (const std::string& noun : nouns) all.push_back(adjective + "-" + noun);
  }
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  const WordPairs pairs(adjectives, nouns);
  ASSERT_EQ(pairs.size(), static_cast<int64_t>(all.size()));
  for (int64_t k = 0; k < pairs.size(); ++k) EXPECT_EQ(pairs[k], all[static_cast<size_t>(k)]);
}

// What scripts/eval/evaluate.py and constants.py make of these, times 100 and over all samples.
TEST(Ruler, MetricsAreThoseOfItsEvaluation) {
  EXPECT_EQ(RulerAnswer("\n\t 12\x01"
                        "34 \x1f\n"),
            "12\n34");
  EXPECT_EQ(RulerAnswer(" \n "), "");
  const auto all = [](const std::string& answer, const std::vector<std::string>& references) {
    return MatchAll(FoundReferences(RulerAnswer(answer), references));
  };
  const auto part = [](const std::string& answer, const std::vector<std::string>& references) {
    return MatchPart(FoundReferences(RulerAnswer(answer), references));
  };
  EXPECT_EQ(all("it is 1234567, I think", {"1234567"}), 1);
  EXPECT_EQ(all("it is 123456", {"1234567"}), 0);
  EXPECT_EQ(all("b d", {"a", "b", "c", "d"}), 0.5);
  EXPECT_EQ(all("WXYZA wxyza", {"wxyza"}), 1) << "case does not count";
  EXPECT_EQ(all("catalogue", {"cat", "log"}), 1) << "parts of words do";
  EXPECT_EQ(all("12\n34", {"1234"}), 0);
  EXPECT_EQ(all("", {"1"}), 0);
  EXPECT_EQ(part("In Ghent.", {"Paris", "ghent"}), 1);
  EXPECT_EQ(part("In Lund.", {"Paris", "ghent"}), 0);
}

TEST(Ruler, AnswersAreWrittenAsTheirPromptsAskForThem) {
  const auto whole = [](const std::string& name, const std::vector<std::string>& references) {
    for (const RulerTask& task : RulerTasks()) {
      if (task.name != name) continue;
      std::string text, values;
      for (const AnswerPiece& piece : WholeAnswer(task, references)) {
        text += piece.text;
        if (piece.value) values += piece.text;
      }
      return text + "|" + values;
    }
    return std::string("no such task");
  };
  EXPECT_EQ(whole("niah_single_1", {"1"}), " 1| 1");
  EXPECT_EQ(whole("niah_multivalue", {"1", "2", "3"}), " 1, 2, and 3| 1 2 3");
  EXPECT_EQ(whole("vt", {"AB", "CD"}), "AB CD|AB CD");
  EXPECT_EQ(whole("cwe", {"cat", "dog"}), " 1. cat 2. dog| cat dog");
  EXPECT_EQ(whole("fwe", {"ab", "cd", "ef"}), " ab, cd, ef| ab cd ef");
  EXPECT_EQ(whole("qa_1", {"Ghent", "in Ghent"}), " Ghent| Ghent");
}

// Byte for byte what RULER's own scripts wrote for SmolLM2's tokenizer, and their answers.
TEST(RulerParity, PromptsAreRulers) {
  const std::string dir = CacheDir() + "/models/smollm2-135m", words = CacheDir() + "/words/wonderwords";
  for (const std::string& needed : {dir, words}) {
    if (!std::filesystem::exists(needed))
      GTEST_SKIP() << needed << " is not there; run datasets/fetch smollm2-135m wonderwords";
  }
  const Tokenizer tokenizer = Tokenizer::Load(dir);
  const auto tokens = [&](const std::string& text) {
    return static_cast<int64_t>(tokenizer.Encode(text, false).size());
  };
  const nlohmann::json golden = Golden("ruler.json");
  RulerData data{LoadWords("wonderwords", "nounlist.txt"),
                 LoadWords("wonderwords", "adjectivelist.txt"),
                 LoadWords("wonderwords", "verblist.txt"),
                 LoadCorpus("pride-and-prejudice", "").text,
                 "",
                 ""};
  std::set<std::string> compared;
  for (const RulerTask& task : RulerTasks()) {
    if (task.kind == RulerTask::kQuestions)
      data.questions = ReadFile(GoldenPath(task.squad ? "ruler/squad.json" : "ruler/hotpotqa.json"));
    for (const int64_t context : {1024, 2048, 4096}) {
      const std::string name = StrCat(task.name, "/", context);
      if (!golden.contains(name)) continue;
      SCOPED_TRACE(name);
      const nlohmann::json& expected = golden[name];
      const std::vector<RulerSample> samples =
          MakeRulerSamples(task, context, static_cast<int64_t>(expected.size()), 42, tokens, data);
      ASSERT_EQ(samples.size(), expected.size());
      for (size_t i = 0; i < samples.size(); ++i) {
        EXPECT_EQ(Sha256(samples[i].prompt), expected[i]["sha256"]) << i << "\n" << samples[i].prompt;
        EXPECT_EQ(samples[i].references, expected[i]["outputs"]);
        EXPECT_EQ(samples[i].length, expected[i]["length"]);
      }
      compared.insert(name);
    }
  }
  EXPECT_EQ(compared.size(), golden.size()) << "every case of the golden file";
}

// A distractor is what the prompt offers, and never an answer.
TEST(Ruler, DistractorsStandInThePrompt) {
  const auto tokens = [](const std::string& text) { return static_cast<int64_t>(text.size() / 4); };
  const RulerData data{{"cat", "dog", "egg", "ant"}, {"old", "new", "red", "sad"}, {}, "", "", ""};
  int tasks = 0;
  for (const RulerTask& task : RulerTasks()) {
    if (task.haystack == RulerTask::kEssay || task.kind == RulerTask::kQuestions ||
        task.kind == RulerTask::kCommonWords)
      continue;
    for (const RulerSample& sample : MakeRulerSamples(task, 1024, 3, 42, tokens, data)) {
      SCOPED_TRACE(task.name);
      EXPECT_EQ(sample.distractors.empty(), task.name == "niah_single_1");
      for (const std::string& distractor : sample.distractors) {
        EXPECT_NE(sample.prompt.find(distractor), std::string::npos) << distractor;
        EXPECT_EQ(std::count(sample.references.begin(), sample.references.end(), distractor), 0) << distractor;
      }
      EXPECT_EQ(sample.prompt.substr(sample.prefix, 5), task.kind == RulerTask::kNiah ? " The " : " Answ");
    }
    ++tasks;
  }
  EXPECT_EQ(tasks, 11);
}

// RULER's scripts would draw for ever.
TEST(Ruler, WhatDoesNotFitIsSkipped) {
  const auto tokens = [](const std::string& text) { return static_cast<int64_t>(text.size() / 4); };
  for (const RulerTask& task : RulerTasks()) {
    if (task.words() || task.haystack == RulerTask::kEssay || task.kind == RulerTask::kQuestions) continue;
    EXPECT_THROW(MakeRulerSamples(task, 64, 1, 42, tokens, {}), Skip) << task.name;
    if (task.kind != RulerTask::kVariables) continue;
    const auto letters = [](const std::string& text) { return static_cast<int64_t>(text.size()); };
    EXPECT_THROW(MakeRulerSamples(task, 4096, 1, 42, letters, {}), Skip) << "its example has 500 tokens at most";
  }
}

// The command, on a tiny model of random weights, whose answers are never right: tasks that need no words.
class RulerCommand : public TinyModel {
 protected:
  void SetUp() override {
    TinyModel::SetUp();
    WidenHeads(dir_ / "tiny");
    nlohmann::json config = nlohmann::json::parse(std::ifstream(dir_ / "tiny" / "config.json"));
    config["max_position_embeddings"] = 8192;
    std::ofstream(dir_ / "config.json") << config;
    std::filesystem::rename(dir_ / "config.json", dir_ / "tiny" / "config.json");
  }
  std::string Flags(const std::string& tasks) const {
    return StrCat(Tiny(), " --dtype=float32 --contexts=1536 --ruler-samples=5 --benchmark_filter='^ruler_(", tasks,
                  ")/'", " --benchmark_out=", (dir_ / "out.json").string());
  }
  // Lines of the samples file by benchmark.
  std::map<std::string, std::vector<nlohmann::json>> Lines() const {
    std::map<std::string, std::vector<nlohmann::json>> lines;
    std::ifstream file(dir_ / "out.json.samples.jsonl");
    for (std::string line; std::getline(file, line);) {
      const nlohmann::json one = nlohmann::json::parse(line);
      lines[one["benchmark"].get<std::string>()].push_back(one);
    }
    return lines;
  }
  std::map<std::string, nlohmann::json> Results() const { return ByName(ReadFile((dir_ / "out.json").string())); }
};

// One pass over prompt and answer, and nothing else of what the measurement does.
TEST_F(RulerCommand, NllAndMarginAreThoseOfAPlainPass) {
  ASSERT_EQ(Execute(Flags("niah_multikey_3") + " --schemes=none").code, 0);
  const std::unique_ptr<Model> model = LoadModel((dir_ / "tiny").string(), at::kFloat, at::kCPU);
  const Tokenizer tokenizer = Tokenizer::Load((dir_ / "tiny").string());
  const auto tokens = [&](const std::string& text) {
    return static_cast<int64_t>(tokenizer.Encode(text, false).size());
  };
  const auto task =
      std::find_if(RulerTasks().begin(), RulerTasks().end(), [](const auto& t) { return t.name == "niah_multikey_3"; });
  const std::vector<RulerSample> samples = MakeRulerSamples(*task, 1536, 5, 42, tokens, {});
  const std::vector<nlohmann::json> lines = Lines().at("ruler_niah_multikey_3/tiny/sdpa/none/ctx:1536/batch:1");
  ASSERT_EQ(lines.size(), samples.size());
  for (size_t i = 0; i < samples.size(); ++i) {
    const std::vector<int32_t> prompt = tokenizer.Encode(samples[i].prompt, true);
    int64_t scored = 0;
    const auto log_probability = [&](const std::string& value) {
      const std::vector<int32_t> ids = tokenizer.Encode(samples[i].prompt + " " + value, true);
      KvCache cache = model->NewCache(ParseSpec("none"), 1, static_cast<int64_t>(ids.size()));
      const at::Tensor log =
          at::log_softmax(model->Logits(model->Forward(IdTensor(ids, 1, at::kCPU), cache, FindBackend("eager"))), -1);
      double sum = 0;
      scored = 0;
      for (size_t at = prompt.size(); at < ids.size(); ++at) {
        if (tokenizer.Decode(std::array{ids[at]}) == " ") continue;
        sum += log[0][static_cast<int64_t>(at) - 1][ids[at]].item<double>();
        ++scored;
      }
      return sum;
    };
    double wrong = -INFINITY;
    for (size_t d = 0; d < 8; ++d)
      wrong = std::max(wrong, log_probability(samples[i].distractors[d * samples[i].distractors.size() / 8]));
    const double right = log_probability(samples[i].references[0]);
    EXPECT_EQ(lines[i]["prompt_sha256"], PromptSha256(prompt));
    EXPECT_NEAR(lines[i]["nll"].get<double>(), -right / static_cast<double>(scored), 1e-4);
    EXPECT_NEAR(lines[i]["margin"].get<double>(), right - wrong, 2e-3);  // of some 200 nats
  }
}

TEST_F(RulerCommand, ABatchIsItsPrompts) {
  const Outcome outcome = Execute(Flags("fwe|niah_multikey_3") + " --schemes=none,int4-hqq@residual=16 --batch=1,3");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto results = Results();
  const auto lines = Lines();
  ASSERT_EQ(results.size(), 8u);
  for (const auto& [name, run] : results) {
    SCOPED_TRACE(name);
    EXPECT_EQ(run["ruler_samples"], 5);
    EXPECT_EQ(run["score"], 0);
    EXPECT_GT(run["answer_tokens"], 1);
    const double share = run["encoded_share"];
    EXPECT_TRUE(name.find("/none/") != std::string::npos ? share == 0 : share > 0.95) << share;
    const std::string one = name.substr(0, name.rfind(':') + 1) + "1";
    ASSERT_EQ(lines.at(name).size(), 5u);
    for (size_t i = 0; i < 5; ++i) {
      const nlohmann::json &mine = lines.at(name)[i], &alone = lines.at(one)[i];
      for (const char* same : {"prompt_sha256", "answer", "right", "answer_tokens"})
        EXPECT_EQ(mine[same], alone[same]) << same << i;
      for (const char* near : {"nll", "margin"})
        EXPECT_NEAR(mine[near].get<double>(), alone[near].get<double>(), 1e-3) << near << i;
    }
  }
}

TEST_F(RulerCommand, QuestionsComeFromAFileAndAFinishedRunStays) {
  const std::string flags = Flags("qa_1") + " --schemes=none", file = " --squad-file=" + GoldenPath("ruler/squad.json");
  ASSERT_EQ(Execute(flags).code, 0);
  const std::string name = "ruler_qa_1/tiny/sdpa/none/ctx:1536/batch:1";
  EXPECT_NE(Results().at(name)["error_message"].get<std::string>().find("--squad-file"), std::string::npos);
  EXPECT_EQ(Lines().count(name), 0u);
  std::filesystem::remove(dir_ / "out.json");
  ASSERT_EQ(Execute(flags + file).code, 0);
  EXPECT_EQ(Lines().at(name).size(), 5u);
  EXPECT_FALSE(Results().at(name).contains("margin"));
  const std::string before = ReadFile((dir_ / "out.json").string());
  ASSERT_EQ(Execute(flags + file).code, 0);
  EXPECT_EQ(Results().at(name), ByName(before).at(name));
  ExpectRefused(Execute(flags + file + " --ruler-samples=4"), {"ruler_samples"});
  std::ofstream(dir_ / "no.json") << "{}";
  ExpectRefused(Execute(Flags("qa_2") + " --schemes=none --hotpotqa-file=/no/such.json"), {"/no/such.json"});
}

}  // namespace
}  // namespace kvq
