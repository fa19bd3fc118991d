// What kvqserve computes, without a server: kept prompts, drawing, text as it becomes certain, chat templates.
#include "accuracy/completions.h"

#include <deque>
#include <optional>
#include <set>

#include "accuracy/chat_templates.h"
#include "accuracy/text_windows.h"
#include "accuracy/tiny_model.h"
#include "kernels/file.h"

namespace kvq {
namespace {

using nlohmann::json;

class CompletionTest : public TinyModel {
 protected:
  void SetUp() override {
    TinyModel::SetUp();
    WidenHeads(dir_ / "tiny");
    Options options;
    options.dtype = "float32", options.kv_dtype = "bfloat16";
    session_ = std::make_unique<Session>(options);
  }
  CompletionEngine Engine(const Spec& spec, bool reuse, const std::string& backend = "sdpa", int64_t context = 128) {
    const std::string name = (dir_ / "tiny").string();
    return CompletionEngine(*session_, session_->model(name), session_->tokenizer(name), FindBackend(backend), spec, context, {2}, reuse);
  }
  // Under these backends and specs.
  void ExpectKeptPromptsAreAsNew(const std::vector<std::pair<const char*, const char*>>& cases);
  std::unique_ptr<Session> session_;
};

void ExpectSame(const std::vector<ScoredToken>& a, const std::vector<ScoredToken>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].chosen.id, b[i].chosen.id);
    EXPECT_EQ(a[i].chosen.logprob, b[i].chosen.logprob) << i;
    ASSERT_EQ(a[i].top.size(), b[i].top.size());
    for (size_t k = 0; k < a[i].top.size(); ++k) {
      EXPECT_EQ(a[i].top[k].id, b[i].top[k].id);
      EXPECT_EQ(a[i].top[k].logprob, b[i].top[k].logprob);
    }
  }
}

// Prompts that share beginnings of all kinds: longer, shorter, the same, another in the middle, none; with scores and
// without, with more of the likeliest than were kept.
void CompletionTest::ExpectKeptPromptsAreAsNew(const std::vector<std::pair<const char*, const char*>>& cases) {
  const c10::InferenceMode no_gradients;
  std::mt19937_64 random(7);
  std::vector<int32_t> text(300);
  for (int32_t& id : text) id = static_cast<int32_t>(3 + random() % 400);
  for (const auto& [backend, spec_text] : cases) {
    SCOPED_TRACE(StrCat(backend, " ", spec_text));
    const Spec spec = ParseSpec(spec_text);
    // With no residual a call has 128 tokens: of longer prompts some are whole.
    const size_t times = spec.keys.residual_length == 0 ? 3 : 1;
    CompletionEngine kept = Engine(spec, true, backend, 384), anew = Engine(spec, false, backend, 384);
    EXPECT_EQ(kept.ran().find("sdpa, tokens") == 0, std::string(backend) == "fused") << kept.ran();
    int64_t reused = 0;
    for (const auto& [length, changed, top, scored] : std::vector<std::tuple<size_t, size_t, int64_t, bool>>{
             {90, 99, 1, true}, {95, 89, 1, true}, {60, 55, 1, true}, {60, 60, 1, true}, {90, 99, 2, true}, {90, 99, 0, false},
             {90, 99, 1, true}, {97, 99, 1, true}, {40, 0, 1, true}, {97, 99, 2, true}, {97, 99, 2, true}, {5, 99, 1, true}, {1, 99, 1, true}}) {
      CompletionQuery query;
      query.prompt = {text.begin(), text.begin() + static_cast<int64_t>(length * times)};
      if (changed < length) query.prompt[changed * times] = 2;
      query.score_prompt = scored, query.logprobs = true, query.top = top, query.max_tokens = 20, query.ignore_eos = true;
      query.sampling.temperature = 0;
      const Completion with = kept.Complete(query), without = anew.Complete(query);
      ExpectSame(with.prompt, without.prompt);
      ExpectSame(with.tokens, without.tokens);
      EXPECT_EQ(with.text, without.text);
      EXPECT_EQ(with.kv_bytes, without.kv_bytes);
      EXPECT_EQ(without.reused, 0);
      reused += with.reused;
    }
    if (spec.policy == Policy::kHf) {
      EXPECT_EQ(reused, 0);
    } else {
      EXPECT_GT(reused, 300);
    }
  }
}

TEST_F(CompletionTest, AKeptPromptGivesTheBitsOfANewOne) {
  ExpectKeptPromptsAreAsNew({{"sdpa", "none@residual=16"}, {"sdpa", "int4-hqq@residual=16"}, {"sdpa", "int2-hqq-kivi@residual=32@sinks=4@group=32"},
                             {"sdpa", "q8_0@residual=0"}, {"sdpa", "int4-hqq@residual=16@prefill=raw"}, {"sdpa", "kivi-2@policy=kivi@residual=32@group=32"},
                             {"sdpa", "int4-hqq@residual=8@policy=hf"}, {"fused", "none@residual=16"}, {"fused", "int4-hqq@residual=16@sinks=2"}});
}

// Where what is kept of a prompt is a window, the tokens that an answer has pushed out of it are there again.
TEST_F(CompletionTest, AKeptPromptOfAWindowGivesTheBitsOfANewOne) {
  json config = json::parse(std::ifstream(dir_ / "tiny" / "config.json"));
  config["model_type"] = "mistral", config["sliding_window"] = 24;
  for (const char* key : {"attention_bias", "mlp_bias", "architectures", "pretraining_tp"}) config.erase(key);
  std::ofstream(dir_ / "tiny" / "config.json") << config;
  ExpectKeptPromptsAreAsNew({{"sdpa", "none@residual=16@window-cache=window"}, {"sdpa", "int4-hqq@residual=16@window-cache=window"},
                             {"sdpa", "q8_0@residual=0@window-cache=window"}, {"sdpa", "kivi-2@policy=kivi@residual=32@group=32@window-cache=window"},
                             {"fused", "none@residual=16@window-cache=window"}, {"fused", "int8-hqq@residual=0@window-cache=window"}});
}

// The prompt's scores against the calls that measurements make, and a softmax in float64.
TEST_F(CompletionTest, ScoresAPromptAsDecodingReadsIt) {
  const c10::InferenceMode no_gradients;
  const Spec spec = ParseSpec("int2-hqq@residual=16");
  const Model& model = session_->model((dir_ / "tiny").string());
  CompletionQuery query;
  for (int32_t id = 10; id < 100; ++id) query.prompt.push_back(id * 31 % 400);
  query.score_prompt = true, query.top = 3;
  const Completion answer = Engine(spec, true).Complete(query);
  ASSERT_EQ(answer.prompt.size(), query.prompt.size() - 1);
  EXPECT_EQ(answer.stored, 90);
  EXPECT_EQ(answer.encoded, 80);
  KvCache cache = model.NewCache(spec, 1, 128);
  const at::Tensor ids = IdTensor(query.prompt, 1, at::kCPU);
  FeedAsDecoding(model, FindBackend("sdpa"), spec, ids, cache, [&](int64_t begin, const at::Tensor& hidden) {
    const at::Tensor exact = at::log_softmax(model.Logits(hidden).to(at::kDouble), -1)[0];
    for (int64_t i = 0; i < exact.size(0) && begin + i + 1 < ids.size(1); ++i) {
      const ScoredToken& token = answer.prompt[static_cast<size_t>(begin + i)];
      const auto [values, order] = at::topk(exact[i], 3);
      // Logits of a call that is cut elsewhere are sums in another order.
      EXPECT_NEAR(token.chosen.logprob, exact[i][token.chosen.id].item<double>(), 1e-5);
      for (int64_t k = 0; k < 3; ++k) {
        EXPECT_EQ(token.top[static_cast<size_t>(k)].id, order[k].item<int64_t>());
        EXPECT_NEAR(token.top[static_cast<size_t>(k)].logprob, values[k].item<double>(), 1e-5);
      }
    }
  });
}

TEST_F(CompletionTest, StopsWhenTheClientIsGone) {
  const c10::InferenceMode no_gradients;
  const Spec spec = ParseSpec("none@residual=16");
  CompletionEngine engine = Engine(spec, true), other = Engine(spec, false);
  CompletionQuery query;
  for (int32_t id = 0; id < 60; ++id) query.prompt.push_back(3 + id);
  query.max_tokens = 60, query.ignore_eos = true, query.sampling.temperature = 0;
  for (const int asked : {0, 1, 3, 5, 30}) {  // in the prompt, and behind it
    int left = asked;
    EXPECT_THROW(engine.Complete(query, [&] { return left-- > 0; }), Cancelled);
  }
  EXPECT_EQ(engine.Complete(query).text, other.Complete(query).text);
}

// Engines that take turns, and one that is left in the middle: every answer has the bits of one alone, and says of itself
// alone what ran.
TEST_F(CompletionTest, InTurnsAnswersAreThoseOfOneAlone) {
  const c10::InferenceMode no_gradients;
  for (const auto& [backend, spec_text] : std::vector<std::pair<const char*, const char*>>{
           {"sdpa", "int4-hqq@residual=16"}, {"fused", "int4-hqq@residual=16@sinks=2"}, {"sage", "q8_0@residual=0"},
           {"sdpa", "kivi-2@policy=kivi@residual=32@group=32"}, {"sdpa", "int4-hqq@residual=8@policy=hf"}}) {
    SCOPED_TRACE(StrCat(backend, " ", spec_text));
    const Spec spec = ParseSpec(spec_text);
    std::vector<CompletionQuery> queries(4);
    std::deque<CompletionEngine> engines;
    for (size_t i = 0; i < queries.size(); ++i) {
      const std::string name = (dir_ / "tiny").string();
      engines.emplace_back(*session_, session_->model(name), session_->tokenizer(name), FindBackend(backend), spec, 384, std::vector<int32_t>{2}, true);
      for (size_t id = 0; id < 20 + 97 * i; ++id) queries[i].prompt.push_back(static_cast<int32_t>(3 + id * (31 + i) % 400));
      queries[i].logprobs = true, queries[i].top = 2, queries[i].score_prompt = i % 2 == 0;
      queries[i].max_tokens = 25 - static_cast<int64_t>(5 * i), queries[i].ignore_eos = true;
      queries[i].sampling.temperature = i == 1 ? 1 : 0, queries[i].sampling.seed = 7;
    }
    for (const bool again : {false, true}) {  // on a kept cache, too
      std::vector<std::optional<Completion>> answers(queries.size());
      for (size_t i = 0; i < queries.size(); ++i) engines[i].Begin(queries[i]);
      for (int turn = 0, left = 4; left > (again ? 0 : 1); ++turn) {
        for (size_t i = 0; i < queries.size(); ++i) {
          if (answers[i] || (i == 0 && !again && turn > 3) || !engines[i].Step()) continue;
          answers[i] = engines[i].End();
          --left;
        }
      }
      EXPECT_EQ(answers[0].has_value(), again) << "it was left";
      for (size_t i = 0; i < queries.size(); ++i) {
        if (!answers[i]) continue;
        const Completion alone = Engine(spec, true, backend, 384).Complete(queries[i]);
        ExpectSame(answers[i]->prompt, alone.prompt);
        ExpectSame(answers[i]->tokens, alone.tokens);
        EXPECT_EQ(answers[i]->text, alone.text);
        if (answers[i]->reused == 0) {  // else there were fewer calls
          EXPECT_EQ(answers[i]->ran, alone.ran);
        }
        EXPECT_EQ(answers[i]->stored, alone.stored);
        EXPECT_EQ(answers[i]->kv_bytes, alone.kv_bytes);
      }
    }
  }
}

// Sage computes nothing of fewer than 128 queries at once: what ran is what its calls were, not its name.
TEST_F(CompletionTest, SaysWhatRan) {
  const c10::InferenceMode no_gradients;
  const Spec spec = ParseSpec("int4-hqq@residual=16");
  CompletionQuery query;
  query.prompt = {5, 6, 7}, query.max_tokens = 2;
  CompletionEngine sage = Engine(spec, true, "sage");
  EXPECT_EQ(sage.Complete(query).ran, "sdpa (fewer than 128 tokens) on decoded tokens");
  EXPECT_EQ(Engine(spec, true).Complete(query).ran, "sdpa on decoded tokens");
}

// Of equal logits the chances are equal to the bit, whichever came.
TEST(Likeliest, GivesEqualsWhatTheTokenThatCameHas) {
  std::mt19937 random(3);
  for (int i = 0; i < 1000; ++i) {
    const float most = std::uniform_real_distribution<float>(-30, 30)(random);
    const std::vector<float> row = {most - 1, most, most - 2, most};
    double sum = 0;
    for (const float logit : row) sum += std::exp(double{logit} - most);
    for (const int32_t came : {1, 3}) {
      const std::vector<TokenChance> top = Likeliest(row.data(), 4, 3, {came, -std::log(sum)});
      ASSERT_EQ(top.size(), 3u);
      EXPECT_EQ(std::make_pair(top[0].id, top[1].id), std::make_pair(1, 3));
      EXPECT_EQ(top[0].logprob, -std::log(sum));
      EXPECT_EQ(top[1].logprob, -std::log(sum));
      EXPECT_NEAR(top[2].logprob, -1 - std::log(sum), 1e-5);
    }
  }
}

TEST(Draw, TakesTheLowestIdOfEqualsAtTemperatureZero) {
  std::mt19937_64 random(1);
  const std::vector<float> logits = {0, 3, 3, 1};
  EXPECT_EQ(Draw(logits.data(), 4, {.temperature = 0}, random), 1);
}

// Shares of many draws against the probabilities that remain: within 4 standard deviations of a binomial share.
TEST(Draw, FollowsTheProbabilitiesThatRemain) {
  const std::vector<double> p = {0.1, 0.4, 0.25, 0.15, 0.1};
  std::vector<float> logits;
  for (const double one : p) logits.push_back(static_cast<float>(2 * std::log(one)));  // at temperature 2
  const auto expect = [&](Sampling sampling, const std::vector<double>& weights) {
    sampling.temperature = 2;
    double all = 0;
    for (const double weight : weights) all += weight;
    std::mt19937_64 random(5);
    std::vector<double> seen(p.size());
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) seen[static_cast<size_t>(Draw(logits.data(), 5, sampling, random))] += 1.0 / kDraws;
    for (size_t i = 0; i < p.size(); ++i) {
      const double share = weights[i] / all;
      EXPECT_NEAR(seen[i], share, 4 * std::sqrt(share * (1 - share) / kDraws) + 1e-12) << i;
    }
  };
  expect({}, p);
  expect({.top_k = 2}, {0, 0.4, 0.25, 0, 0});
  expect({.top_p = 0.7}, {0, 0.4, 0.25, 0.15, 0});
  expect({.top_p = 0.6}, {0, 0.4, 0.25, 0, 0});
  expect({.top_p = 1e-9}, {0, 1, 0, 0, 0});
  expect({.min_p = 0.3}, {0, 0.4, 0.25, 0.15, 0});
  expect({.top_p = 0.6, .top_k = 2}, {0, 0.4, 0, 0, 0});  // 0.4 is 62 % of the two that top_k leaves
}

TEST(TextStream, HoldsBackWhatIsNotCertain) {
  TextStream text({"STOP", "世界"});
  std::string said;
  const auto add = [&](const std::string& bytes, const std::string& sure) {
    EXPECT_FALSE(text.Add(bytes));
    EXPECT_EQ(text.Take(false), sure) << bytes;
    said += sure;
  };
  add("an ", "an ");
  add("S", "");          // may begin a stop string
  add("T", "");
  add("A", "STA");
  add("\xc3", "");       // half a character
  add("\xbc", "ü");
  add("\xe4\xb8", "");   // of one that begins a stop string
  add("\x96", "");
  add("\xe4", "世");     // the stop string goes on otherwise
  add("\xb8\x80", "一");
  add("\xff!", "\uFFFD!");  // never UTF-8
  add("SST", "S");
  EXPECT_TRUE(text.Add("OP and more"));
  EXPECT_EQ(text.stopped_by(), "STOP");
  EXPECT_EQ(text.Take(true), "");
  TextStream cut({});
  cut.Add("a\xe4\xb8");
  EXPECT_EQ(cut.Take(false), "a");
  EXPECT_EQ(cut.Take(true), "\uFFFD");
  TextStream first({"b", "ab"});  // the one that begins first
  EXPECT_TRUE(first.Add("xab"));
  EXPECT_EQ(first.stopped_by(), "ab");
  EXPECT_EQ(first.Take(true), "x");
}

// Of tokenizers of bytes as letters, and of SentencePiece's, whose first token has a blank that is none of the text's.
TEST(TokenBytes, JoinToTheText) {
  const std::string text = "The capital of France: Grüße, 世界 \xF0\x9F\x8E\x89!";
  for (const char* family : {"gemma", "gpt2", "llama-3", "mistral", "mistral-v0.3", "qwen", "yi"}) {
    SCOPED_TRACE(family);
    const Tokenizer tokenizer = Tokenizer::Load(GoldenPath(StrCat("tokenizers/", family)));
    const std::vector<int32_t> ids = tokenizer.Encode(text, false);
    std::string joined;
    for (const int32_t id : ids) joined += tokenizer.Bytes(id);
    EXPECT_EQ(joined.substr(joined.starts_with(' ')), tokenizer.Decode(ids, false));
  }
}

// Against jinja2 (accuracy/make_golden_chat_templates.py).
TEST(ChatTemplates, AreWrittenAsJinjaRendersThem) {
  const json golden = json::parse(ReadFile(GoldenPath("chat_templates.json")));
  std::set<std::string> seen;
  for (const json& one : golden["templates"]) {
    SCOPED_TRACE(one["name"]);
    const ChatTemplate* chat = nullptr;
    for (const ChatTemplate& row : ChatTemplates()) {
      if (row.sha256 == one["sha256"]) chat = &row;
    }
    ASSERT_NE(chat, nullptr);
    seen.insert(chat->sha256);
    for (size_t i = 0; i < golden["conversations"].size(); ++i) {
      std::vector<ChatMessage> messages;
      for (const json& message : golden["conversations"][i]) messages.push_back({message["role"], message["content"]});
      if (one["rendered"][i].is_null()) {
        EXPECT_THROW(RenderChat(*chat, messages, golden["bos"], golden["eos"]), InputError) << i;
      } else {
        EXPECT_EQ(RenderChat(*chat, messages, golden["bos"], golden["eos"]), one["rendered"][i].get<std::string>()) << i;
      }
    }
  }
  EXPECT_EQ(seen.size(), ChatTemplates().size()) << "a template without golden texts";
}

TEST(ChatTemplates, AreKnownByTheirText) {
  const std::string chatml = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
                             "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
  ASSERT_NE(FindChatTemplate(chatml), nullptr);
  EXPECT_EQ(FindChatTemplate(chatml)->name, "ChatML");
  EXPECT_EQ(FindChatTemplate(chatml + "\n")->name, "ChatML");
  EXPECT_EQ(FindChatTemplate(chatml + "x"), nullptr);
  EXPECT_EQ(FindChatTemplate(""), nullptr);
}

}  // namespace
}  // namespace kvq
