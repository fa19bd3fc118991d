// reuse: its questions and its metric, and a kept cache against one that is filled anew.
#include "accuracy/reuse.h"

#include "accuracy/tiny_model.h"
#include "fixtures/model.h"
#include "kernels/file.h"

namespace kvq {
namespace {

using nlohmann::json;

// A token a character: what fits is easily counted.
std::vector<int32_t> Characters(const std::string& text, bool) { return {text.begin(), text.end()}; }

size_t Count(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; ++at) ++count;
  return count;
}

TEST(Reuse, AsksForValuesThatStandInTheContextOnce) {
  std::mt19937_64 random(42);
  const Talk talk = KeyValueTalk(Characters, 2000, random);
  EXPECT_LE(talk.context.size(), 2000u);
  EXPECT_GT(talk.context.size(), 1900u);
  ASSERT_EQ(talk.turns.size(), 5u);
  const json object = json::parse(talk.context.substr(talk.context.find('{')));
  std::set<std::string> asked;
  for (const Talk::Turn& turn : talk.turns) {
    const std::string key = turn.question.substr(turn.question.find('"') + 1, 5);
    EXPECT_EQ(turn.question, "\nKey: \"" + key + "\"\nValue: \"");
    EXPECT_EQ(object.at(key), turn.gold);
    EXPECT_EQ(Count(talk.context, turn.gold), 1u);
    EXPECT_TRUE(asked.insert(key).second);
    EXPECT_EQ(MatchAll(turn.gold + "\"", turn.wanted, talk.stop), 1);
  }
  std::mt19937_64 again(42), other(43);
  EXPECT_EQ(KeyValueTalk(Characters, 2000, again).context, talk.context);
  EXPECT_NE(KeyValueTalk(Characters, 2000, other).context, talk.context);
}

TEST(Reuse, ChainsLeadFromTheirValueToTheirVariables) {
  std::mt19937_64 random(42);
  const Talk talk = VariableTalk(Characters, 4000, random);
  EXPECT_LE(talk.context.size(), 4000u);
  EXPECT_GT(talk.context.size(), 3900u);
  EXPECT_EQ(Count(talk.context, "VAR "), 5u * 5u);
  for (const Talk::Turn& turn : talk.turns) {
    // By reading the text: whoever is said to be what is known is known.
    const std::string value = turn.question.substr(turn.question.find_first_of("0123456789"), 5);
    std::set<std::string> known = {value}, found;
    std::istringstream lines(talk.context);
    for (std::string line; std::getline(lines, line);) {
      if (line.rfind("VAR ", 0) != 0) continue;
      const std::string of = line.substr(line.find("= ") + 2);
      if (known.count(of.substr(of.rfind(' ') + 1, 5)) == 0 && known.count(of.substr(0, 5)) == 0) continue;
      known.insert(line.substr(4, 5));
      found.insert(line.substr(4, 5));
    }
    EXPECT_EQ(found, std::set<std::string>(turn.wanted.begin(), turn.wanted.end()));
    EXPECT_EQ(MatchAll(turn.gold, turn.wanted, talk.stop), 1);
  }
}

TEST(Reuse, AnswersAreMatchedUpToTheirEnd) {
  EXPECT_EQ(MatchAll("ABCDE, fghij\nKLMNO", {"ABCDE", "FGHIJ", "KLMNO"}, '\n'), 2.0 / 3);
  EXPECT_EQ(MatchAll("12345", {"12345"}, '"'), 1);
  EXPECT_EQ(MatchAll("1234\"12345", {"12345"}, '"'), 0);
}

class ReuseOfTinyModel : public TinyModel {
 protected:
  void SetUp() override {
    TinyModel::SetUp();
    WidenHeads(dir_ / "tiny");
    // Positions for a conversation: rotary ones have no end of their own.
    json config = json::parse(ReadFile(dir_ / "tiny/config.json"));
    config["max_position_embeddings"] = 4096;
    std::ofstream(dir_ / "tiny/config.json") << config;
  }
};

TEST_F(ReuseOfTinyModel, CountsWhatItsItemsSay) {
  const std::string file = dir_ / "reuse.json";
  const Outcome outcome = Execute(Tiny() + " --benchmark_filter=^reuse/ --dtype=float32 --contexts=600 --windows=2 "
      "--schemes=none,int4-hqq@residual=16,int2-hqq@policy=hf@residual=16 --benchmark_out=" + file);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto runs = ByName(ReadFile(file));
  std::map<std::string, std::vector<json>> items;
  std::istringstream lines(ReadFile(file + ".samples.jsonl"));
  for (std::string text; std::getline(lines, text);) {
    const json line = json::parse(text);
    items[line.at("benchmark")].push_back(line);
  }
  ASSERT_EQ(items.size(), 3u);
  for (const auto& [name, of] : items) {
    EXPECT_EQ(of.size(), 2u * 2 * 2 * 5);  // contexts, tasks, histories, questions
    std::set<std::string> clusters;
    double right = 0, nll = 0;
    for (const json& line : of) {
      clusters.insert(line.at("cluster"));
      if (line.at("sample").get<std::string>().find("vt:") != 0 || line.at("sample").get<std::string>().find(":gold:") == std::string::npos) continue;
      right += line.at("right").get<double>() / 10;
      nll += line.at("nll").get<double>() / 10;
    }
    EXPECT_EQ(clusters, (std::set<std::string>{"kv:0", "kv:1", "vt:0", "vt:1"}));
    EXPECT_NEAR(runs.at(name).at("vt_gold").get<double>(), right, 1e-12);
    EXPECT_NEAR(runs.at(name).at("nll_vt_gold").get<double>(), nll, 1e-9);
    EXPECT_EQ(runs.at(name).at("questions"), 40.0);
  }
  const auto kld = [&](const std::string& spec) {
    return runs.at("reuse/tiny/sdpa/" + spec + "/ctx:600/batch:1").at("reprefill_kld_nats").get<double>();
  };
  EXPECT_LT(std::abs(kld("none")), 1e-5);
  EXPECT_LT(std::abs(kld("int4-hqq@residual=16")), 1e-5);
  EXPECT_GT(kld("int2-hqq@policy=hf@residual=16"), 1e-3);
  EXPECT_EQ(runs.at("reuse/tiny/sdpa/none/ctx:600/batch:1").at("encoded_share"), 0.0);
  EXPECT_GT(runs.at("reuse/tiny/sdpa/int4-hqq@residual=16/ctx:600/batch:1").at("encoded_share"), 0.9);

  ExpectRefused(Execute(Tiny() + " --benchmark_filter=^reuse/ --batch=0"), {"--batch"});
}

// What a chat leaves behind, with all the going back and forth of questions and answers that are tried, is what one
// gets who is fed the same tokens for the first time: the same logits, bit for bit, where nothing is encoded twice. Not
// so under policy hf, if its calls end elsewhere.
TEST_F(ReuseOfTinyModel, AKeptCacheIsTheSameAsANewOneBitForBit) {
  const auto model = LoadModel(dir_ / "tiny", at::kFloat, at::Device(at::kCPU));
  const c10::InferenceMode no_gradients;
  at::manual_seed(5);
  const at::Tensor context = at::randint(0, 60, {1, 70}, at::kLong), other = at::randint(0, 60, {1, 40}, at::kLong);
  const Backend& backend = FindBackend("eager");
  for (const char* text : {"none", "int4-hqq@residual=16", "int2-hqq-kivi@residual=32@sinks=4", "q8_0+q4_0@residual=0", "kivi-2@policy=kivi@residual=32"}) {
    const Spec spec = ParseSpec(text);
    const auto step = [&](KvCache& cache, const at::Tensor& ids) {
      at::Tensor hidden;
      for (int64_t i = 0; i < ids.size(1); ++i) hidden = model->Forward(ids.narrow(1, i, 1), cache, backend);
      return model->Logits(hidden);
    };
    KvCache kept = model->NewCache(spec, 1, 512), anew = model->NewCache(spec, 1, 512);
    Feed(*model, context, kept, backend, spec.CallTokens(), spec.sink_tokens + spec.CallTokens());
    const auto behind_context = kept.Save();
    step(kept, other.narrow(1, 3, 30));  // another conversation about the same
    behind_context();
    std::vector<at::Tensor> history;
    for (int64_t turn = 0; turn < 5; ++turn) {
      const at::Tensor question = other.narrow(1, 4 * turn, 7), answer = other.narrow(1, 20 + turn, 9);
      const at::Tensor logits = step(kept, question);
      history.push_back(question);
      anew.Clear();
      Feed(*model, context, anew, backend, spec.CallTokens(), spec.sink_tokens + spec.CallTokens());
      EXPECT_TRUE(at::equal(step(anew, at::cat(history, 1)), logits)) << text << ", turn " << turn;
      const auto behind_question = kept.Save();
      for (const int64_t tried : {5, 17, 1}) {  // longer and shorter than a block
        step(kept, other.narrow(1, tried, 20));
        behind_question();
        model->Forward(other.narrow(1, tried, 23), kept, backend);  // in one call
        behind_question();
      }
      step(kept, answer);
      history.push_back(answer);
    }
  }
}

// The same with all of it in calls of residual_length tokens, as a server would fill a cache anew: products of another
// size add in another order, so this is float32's rounding and no more under append; and far more under hf.
TEST_F(ReuseOfTinyModel, WhatIsFilledAnewInOtherCallsDiffersByRoundingAloneUnderAppend) {
  const auto model = LoadModel(dir_ / "tiny", at::kFloat, at::Device(at::kCPU));
  const c10::InferenceMode no_gradients;
  at::manual_seed(6);
  const at::Tensor ids = at::randint(0, 60, {1, 203}, at::kLong);
  const Backend& backend = FindBackend("eager");
  const auto difference = [&](const char* text) {
    const Spec spec = ParseSpec(text);
    KvCache kept = model->NewCache(spec, 1, 256), anew = model->NewCache(spec, 1, 256);
    Feed(*model, ids.narrow(1, 0, 100), kept, backend, spec.CallTokens());
    at::Tensor hidden;
    for (int64_t i = 100; i < ids.size(1); ++i) hidden = model->Forward(ids.narrow(1, i, 1), kept, backend);
    const at::Tensor theirs = Feed(*model, ids, anew, backend, spec.CallTokens());
    const at::Tensor a = model->Logits(hidden).flatten(), b = model->Logits(theirs.narrow(1, theirs.size(1) - 1, 1)).flatten();
    return ((a - b).norm() / b.norm()).item<double>();
  };
  EXPECT_LT(difference("int4-hqq@residual=16"), 1e-4);  // codes at an edge may fall on the other side
  EXPECT_GT(difference("int2-hqq@policy=hf@residual=16"), 1e-2);
}

}  // namespace
}  // namespace kvq
