// reuse: a cache that is kept while it is asked again and again. One generated context of --contexts tokens, --windows of
// them, and five questions about it, two tasks: kv (a JSON object, one value each) and vt (variable tracking: chains of
// three variables, all that have a value). Two histories: _own, in which the model reads its own answers, as in a chat,
// so that errors feed on; and _gold, in which it reads the right ones (SCBench's default). The context is fed in calls of
// Spec::CallTokens; questions and answers token by token, and the cache is kept: what decoding a long chat does.
//
// kv_own, kv_gold, vt_own, vt_gold: share of right answers (of vt the share of the variables), greedy, up to 24 tokens;
// by question /turn:N. nll_... of the right answer, nats a token, which is read whatever the model answers; margin_..., its
// log-probability over the likeliest of the other turns' answers; rank1_..., the share in which it is the likeliest. All
// are means of the contexts' means, with Student's interval over contexts: questions of one are not independent.
//
// reprefill_kld_nats: behind the last question with own answers, against a new cache into which all of it was fed at once
// in calls of Spec::CallTokens: what is kept and what is computed anew are the same under policy append, up to the
// rounding of products in calls of another size; policy hf has encoded the kept one again and again.
#include "accuracy/reuse.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <set>

#include "accuracy/scoring.h"
#include "accuracy/stepper.h"
#include "accuracy/text_windows.h"
#include "fixtures/finite.h"
#include "kernels/error.h"

namespace kvq {
namespace {

constexpr int64_t kAnswerTokens = 24;
constexpr int64_t kTurnTokens = 160;  // a question, an answer: at most, in small vocabularies

std::string Letters(std::mt19937_64& random, int64_t count, char first, std::set<std::string>& taken) {
  for (;;) {
    std::string word;
    for (int64_t i = 0; i < count; ++i) word += static_cast<char>(first + static_cast<char>(random() % 26));
    if (taken.insert(word).second) return word;
  }
}

std::string Digits(std::mt19937_64& random, std::set<std::string>& taken) {
  for (;;) {
    const std::string number = std::to_string(10000 + random() % 90000);
    if (taken.insert(number).second) return number;
  }
}

std::vector<size_t> Choose(size_t count, size_t among, std::mt19937_64& random) {
  std::set<size_t> chosen;
  while (chosen.size() < count) chosen.insert(random() % among);
  std::vector<size_t> order(chosen.begin(), chosen.end());
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  return order;
}

// What was seen of one question.
struct Answered {
  double right = 0, nll = 0, margin = 0, encoded_share = 0;
  std::string text;
};

// One conversation through one cache.
class Conversation {
 public:
  Conversation(Session& session, const Cell& cell, const Model& model, const Spec& spec, const Talk& talk)
      : session_(session), model_(model), backend_(FindBackend(cell.backend)), spec_(spec), talk_(talk),
        tokenizer_(session.tokenizer(cell.model)), context_(tokenizer_.Encode(talk.context, true)),
        stepper_(session, model, backend_, spec, 1, static_cast<int64_t>(context_.size()) + TurnTokens()) {
    stepper_.Prompt(IdTensor(context_, 1, model.device()), spec.CallTokens());
    behind_context_ = stepper_.cache().Save();
  }

  // All five, from the context on.
  std::vector<Answered> Ask(bool own) {
    behind_context_();
    history_ = context_;
    std::vector<Answered> all;
    for (const Talk::Turn& turn : talk_.turns) all.push_back(AskOne(turn, own));
    return all;
  }

  // KL(re-prefilled || kept) behind the last question, whose history must be that of the last Ask.
  double ReprefillKld() const {
    KvCache cache = model_.NewCache(spec_, 1, static_cast<int64_t>(asked_.size()));
    const int64_t call = spec_.CallTokens();
    const at::Tensor ids = IdTensor(asked_, 1, model_.device());
    const at::Tensor hidden = Feed(model_, ids, cache, backend_, call, spec_.sink_tokens + call);
    const at::Tensor anew = model_.Logits(hidden.narrow(1, hidden.size(1) - 1, 1));
    return ScoreTokens(anew, asked_logits_, at::zeros({1, 1}, anew.options().dtype(at::kLong)))[0][0][2].item<double>();
  }

  std::string Sha256OfPrompt(size_t turn) const {  // without the history, which differs
    std::vector<int32_t> ids = context_;
    const std::vector<int32_t> question = tokenizer_.Encode(talk_.turns[turn].question, false);
    ids.insert(ids.end(), question.begin(), question.end());
    return PromptSha256(ids);
  }

 private:
  at::Tensor Token(int32_t id) const { return at::full({1}, static_cast<int64_t>(id), at::TensorOptions(at::kLong).device(model_.device())); }

  // Feeds a text token by token; the state behind it. `log` becomes its log-probability, if `state` is that before it.
  at::Tensor Read(const std::vector<int32_t>& ids, at::Tensor state = {}, double* log = nullptr) {
    for (const int32_t id : ids) {
      if (log != nullptr) {
        const at::Tensor logits = stepper_.Logits(state);
        *log += at::log_softmax(logits, -1)[0][0][id].item<double>();
      }
      state = stepper_.Step(Token(id));
      history_.push_back(id);
    }
    return state;
  }

  Answered AskOne(const Talk::Turn& turn, bool own) {
    at::Tensor state = Read(tokenizer_.Encode(turn.question, false));
    const at::Tensor logits = stepper_.Logits(state);
    CheckFinite(logits, model_, IdTensor(history_, 1, model_.device()), spec_, backend_);
    asked_ = history_;
    asked_logits_ = logits;
    const std::function<void()> behind_question = stepper_.cache().Save();
    Answered answered;

    // The likeliest of all turns' answers, each in one call, the right one too.
    double right = 0, best_other = -INFINITY;
    for (const Talk::Turn& other : talk_.turns) {
      const std::vector<int32_t> ids = tokenizer_.Encode(other.gold, false);
      double log = at::log_softmax(logits, -1)[0][0][ids[0]].item<double>();
      if (ids.size() > 1) {
        const at::Tensor hidden = stepper_.Feed(IdTensor({ids.begin(), ids.end() - 1}, 1, model_.device()), static_cast<int64_t>(ids.size()));
        const at::Tensor next = at::log_softmax(model_.Logits(hidden), -1);
        for (size_t i = 1; i < ids.size(); ++i) log += next[0][static_cast<int64_t>(i) - 1][ids[i]].item<double>();
        behind_question();
      }
      if (&other == &turn) {
        right = log;
      } else {
        best_other = std::max(best_other, log);
      }
    }
    answered.margin = right - best_other;

    const auto write = [&] {
      std::vector<int32_t> ids;
      at::Tensor at = state;
      while (static_cast<int64_t>(ids.size()) < kAnswerTokens) {
        const at::Tensor next = stepper_.Logits(at);
        CheckFinite(next, model_, IdTensor(history_, 1, model_.device()), spec_, backend_);
        const auto id = static_cast<int32_t>(next.argmax(-1).item<int64_t>());
        if (tokenizer_.eos_id() == id) break;
        ids.push_back(id);
        answered.text = tokenizer_.Decode(ids);
        if (answered.text.find(talk_.stop) != std::string::npos) {
          ids.pop_back();  // the history closes every answer in the same way
          break;
        }
        at = stepper_.Step(Token(id));
        history_.push_back(id);
      }
      answered.text = answered.text.substr(0, answered.text.find(talk_.stop));
      answered.right = MatchAll(answered.text, turn.wanted, talk_.stop);
    };
    const auto read = [&] {
      const std::vector<int32_t> gold = tokenizer_.Encode(turn.gold, false);
      double log = 0;
      const auto begin = static_cast<int64_t>(history_.size());
      Read(gold, state, &log);
      answered.nll = -log / static_cast<double>(gold.size());
      answered.encoded_share = EncodedShareRead(spec_, model_.cache_shape(1), FirstCall(), begin - 1,
                                                begin - 1 + static_cast<int64_t>(gold.size()));
    };
    const auto back = [&] {
      behind_question();
      history_ = asked_;
    };
    if (own) {
      read();
      back();
      write();
    } else {
      write();
      back();
      read();
    }
    Read(tokenizer_.Encode(turn.after, false));
    return answered;
  }

  // At most, of all turns; of answers the longest that are read, written or tried.
  int64_t TurnTokens() const {
    size_t all = 0, longest = static_cast<size_t>(kAnswerTokens);
    for (const Talk::Turn& turn : talk_.turns) longest = std::max(longest, tokenizer_.Encode(turn.gold, false).size());
    for (const Talk::Turn& turn : talk_.turns) {
      all += tokenizer_.Encode(turn.question, false).size() + longest + tokenizer_.Encode(turn.after, false).size();
    }
    if (all > static_cast<size_t>(kTurns * kTurnTokens)) {
      throw Skip(StrCat("five questions and answers have ", all, " tokens in this model's vocabulary, more than ", kTurns * kTurnTokens));
    }
    return static_cast<int64_t>(all);
  }

  int64_t FirstCall() const {
    return std::min<int64_t>(spec_.sink_tokens + spec_.CallTokens(), static_cast<int64_t>(context_.size()));
  }

  Session& session_;
  const Model& model_;
  const Backend& backend_;
  const Spec& spec_;
  const Talk& talk_;
  const Tokenizer& tokenizer_;
  const std::vector<int32_t> context_;
  Stepper stepper_;
  std::function<void()> behind_context_;
  std::vector<int32_t> history_, asked_;  // what the cache holds; the same behind the last question
  at::Tensor asked_logits_;
};

Counters Reuse(Session& session, const Cell& cell, benchmark::State& state) {
  const Spec spec = ParseSpec(cell.spec);
  if (cell.batch != 1) throw Skip("conversations differ in length; reuse runs at batch 1");
  const Model& model = session.model(cell.model);
  const Tokenizer& tokenizer = session.tokenizer(cell.model);
  const EncodeText encode = [&](const std::string& text, bool special) { return tokenizer.Encode(text, special); };
  const int64_t contexts = session.options().windows;
  struct Seen {
    std::vector<double> right, nll, margin, rank1;  // a context each
    std::vector<std::vector<double>> by_turn = std::vector<std::vector<double>>(kTurns);
  };
  std::map<std::string, Seen> seen;  // by task and history
  std::vector<double> reprefill, share;
  for (auto _ : state) {
    state.SetIterationTime(Time(session.devices(), [&] {
      std::mt19937_64 random(static_cast<uint64_t>(session.options().seed));
      for (int64_t i = 0; i < contexts; ++i) {
        for (const bool kv : {true, false}) {
          const Talk talk = kv ? KeyValueTalk(encode, cell.context, random) : VariableTalk(encode, cell.context, random);
          Conversation conversation(session, cell, model, spec, talk);
          for (const bool own : {false, true}) {
            const std::vector<Answered> all = conversation.Ask(own);
            Seen& of = seen[StrCat(kv ? "kv" : "vt", own ? "_own" : "_gold")];
            std::vector<double> right, nll, margin, rank1;
            for (size_t turn = 0; turn < all.size(); ++turn) {
              const Answered& answered = all[turn];
              right.push_back(answered.right);
              nll.push_back(answered.nll);
              margin.push_back(answered.margin);
              rank1.push_back(answered.margin > 0);
              share.push_back(answered.encoded_share);
              of.by_turn[turn].push_back(answered.right);
              const std::string cluster = StrCat(kv ? "kv:" : "vt:", i);
              session.samples.push_back({.id = StrCat(cluster, own ? ":own:" : ":gold:", turn + 1), .cluster = cluster,
                                         .prompt_sha256 = conversation.Sha256OfPrompt(turn), .right = answered.right,
                                         .nll = answered.nll, .margin = answered.margin,
                                         .encoded_share = answered.encoded_share, .answer = answered.text});
            }
            of.right.push_back(Mean(right));
            of.nll.push_back(Mean(nll));
            of.margin.push_back(Mean(margin));
            of.rank1.push_back(Mean(rank1));
          }
          reprefill.push_back(conversation.ReprefillKld());
        }
      }
    }));
  }
  Counters counters;
  const auto add = [&](const std::string& name, const std::vector<double>& values, double least = -INFINITY, double most = INFINITY,
                       const std::string& suffix = "") {
    AddInterval(counters, name, Mean(values), MeanInterval(values), least, most, suffix);
  };
  for (const auto& [name, of] : seen) add(name, of.right, 0, 1);
  for (const auto& [name, of] : seen) add("nll_" + name, of.nll, 0);
  for (const auto& [name, of] : seen) add("margin_" + name, of.margin);
  for (const auto& [name, of] : seen) add("rank1_" + name, of.rank1, 0, 1);
  counters.emplace_back("reprefill_kld_nats", Mean(reprefill));
  counters.emplace_back("encoded_share", Mean(share));
  counters.emplace_back("contexts", static_cast<double>(contexts));
  counters.emplace_back("questions", static_cast<double>(session.samples.size()));
  for (const auto& [name, of] : seen) {
    for (int64_t turn = 0; turn < kTurns; ++turn) add(name, of.by_turn[static_cast<size_t>(turn)], 0, 1, StrCat("/turn:", turn + 1));
  }
  return counters;
}

const RegisterMeasurement kReuse{
    {.name = "reuse",
     .what = "of a kept cache: five questions to one context, own and right answers; only if the filter names it",
     .quality = true, .on_request = true, .turn = 2,
     .like_tokens = [](const Options& o, double tokens) { return static_cast<double>(o.windows) * (4 * tokens + 20000); },
     .new_tokens = [](const Options&) { return kTurns * kTurnTokens; }, .run = Reuse}};

// Items until `context` tokens are full, those of `fixed` among them.
int64_t CountThatFits(const EncodeText& encode, int64_t context, const std::function<std::string(int64_t)>& text, int64_t least) {
  const auto tokens = [&](int64_t count) { return static_cast<int64_t>(encode(text(count), true).size()); };
  if (tokens(least) > context) {
    throw Skip(StrCat("the shortest context of reuse has ", tokens(least), " tokens; choose --contexts of so many or more"));
  }
  int64_t low = least, high = least + 1;
  while (tokens(high) <= context) high *= 2;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (tokens(middle) <= context ? low : high) = middle;
  }
  return low;
}

}  // namespace

Talk KeyValueTalk(const EncodeText& encode, int64_t context, std::mt19937_64& random) {
  std::set<std::string> taken;
  std::vector<std::pair<std::string, std::string>> pairs;
  const auto text = [&](int64_t count) {
    while (static_cast<int64_t>(pairs.size()) < count) {
      const std::string key = Letters(random, 5, 'a', taken);
      pairs.emplace_back(key, Digits(random, taken));
    }
    std::string json = "Below is a JSON object. Give the value of the key that is asked for.\n\n{";
    for (int64_t i = 0; i < count; ++i) {
      const auto& [key, value] = pairs[static_cast<size_t>(i)];
      json += StrCat(i == 0 ? "" : ",\n ", "\"", key, "\": \"", value, "\"");
    }
    return json + "}\n";
  };
  const int64_t count = CountThatFits(encode, context, text, kTurns);
  Talk talk{.context = text(count), .turns = {}, .stop = '"'};
  for (const size_t i : Choose(kTurns, static_cast<size_t>(count), random)) {
    const auto& [key, value] = pairs[i];
    talk.turns.push_back({StrCat("\nKey: \"", key, "\"\nValue: \""), {value}, value, "\"\n"});
  }
  return talk;
}

Talk VariableTalk(const EncodeText& encode, int64_t context, std::mt19937_64& random) {
  constexpr size_t kNames = 3;
  std::set<std::string> taken;
  std::vector<std::string> values;
  std::vector<std::vector<std::string>> names;
  for (int64_t chain = 0; chain < kTurns; ++chain) {
    values.push_back(Digits(random, taken));
    names.emplace_back();
    for (size_t i = 0; i < kNames; ++i) names.back().push_back(Letters(random, 5, 'A', taken));
  }
  // Where each line goes, as a share of the noise; a chain's lines in their order.
  std::vector<std::pair<double, std::string>> places;
  for (size_t chain = 0; chain < names.size(); ++chain) {
    std::vector<double> at;
    for (size_t i = 0; i < kNames; ++i) at.push_back(static_cast<double>(random() >> 11) / 9007199254740992.0);
    std::sort(at.begin(), at.end());
    for (size_t i = 0; i < kNames; ++i) {
      places.emplace_back(at[i], StrCat("VAR ", names[chain][i], " = ", i == 0 ? values[chain] : StrCat("VAR ", names[chain][i - 1])));
    }
  }
  std::sort(places.begin(), places.end());
  const auto text = [&](int64_t noise) {
    std::string lines = "Memorize the variable assignments that are hidden in the following text.\n\n";
    size_t next = 0;
    for (int64_t i = 0; i <= noise; ++i) {
      for (; next < places.size() && (i == noise || places[next].first * static_cast<double>(noise) < static_cast<double>(i)); ++next) {
        lines += places[next].second + ".\n";
      }
      if (i < noise) lines += "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n";
    }
    return lines;
  };
  Talk talk{.context = text(CountThatFits(encode, context, text, 0)), .turns = {}, .stop = '\n'};
  for (size_t chain = 0; chain < names.size(); ++chain) {
    std::string gold;
    for (const std::string& name : names[chain]) gold += (gold.empty() ? "" : ", ") + name;
    talk.turns.push_back({StrCat("\nQuestion: Which variables have the value ", values[chain], "?\nAnswer: VAR "), names[chain], gold, "\n"});
  }
  return talk;
}

double MatchAll(const std::string& answer, const std::vector<std::string>& wanted, char stop) {
  const auto lower = [](std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return text;
  };
  const std::string text = lower(answer.substr(0, answer.find(stop)));
  double found = 0;
  for (const std::string& one : wanted) found += text.find(lower(one)) != std::string::npos;
  return found / static_cast<double>(wanted.size());
}

}  // namespace kvq
