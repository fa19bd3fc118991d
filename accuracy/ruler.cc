// ruler_*: RULER's tasks (accuracy/ruler_tasks.h), one measurement each, and easier rungs that find where a model has
// headroom. The context is what RULER calls its length: tokens of the prompt, without special ones, and of the answer.
//
// Prompts are fed in calls of Spec::CallTokens, so that also the first answered token reads encoded history (protocol
// `study`: in one call). Then, from that state:
// - the answer, greedy, up to the task's number of new tokens, EOS, or until all references are in it (of qa: any),
// which cannot change its score. `score` is RULER's, in percent: string_match_all, of qa string_match_part.
// - `gold_nll`: nats a token of the right answer, all references as the prompt asks for them, their own tokens alone
// (neither commas nor numbers of a list).
// - `margin`: log-probability of a reference as the first answer, of the likeliest where there are several, less that
// of the likeliest of at most eight distractors, other values of the same kind that stand in the context, at even
// distances where it has more. `rank1` is the share of samples where it is above 0. Tasks without distractors have
// neither.
// Scores of yes or no have Wilson's interval, others Student's over samples, 95 %. Each sample stands in the samples
// file.
//
// A batch is prompts with the same number of tokens, side by side: nothing is padded.
#include "accuracy/ruler_tasks.h"

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "accuracy/statistics.h"
#include "accuracy/stepper.h"
#include "accuracy/text_windows.h"
#include "benchmarks/measurement.h"
#include "fixtures/finite.h"
#include "kernels/error.h"
#include "kernels/file.h"
#include "kernels/sha256.h"

namespace kvq {
namespace {

constexpr size_t kDistractors = 8;

// Tokens of a continuation, and which of them count.
struct Continuation {
  std::vector<int32_t> ids;
  std::vector<bool> scored;
};

struct Question {
  RulerSample sample;
  std::vector<int32_t> ids;
  Continuation gold;
  // References and distractors as the first answer; none of both where there are no distractors.
  std::vector<Continuation> first, wrong;
};

// Tokens of the pieces behind a text, piece by piece, so that what counts is known. Where a token would reach over the
// beginning of a piece the pieces are encoded by themselves. Blanks alone do not count.
Continuation Continue(const Tokenizer& tokenizer, const std::string& behind, const std::vector<AnswerPiece>& pieces) {
  std::string text = behind;
  std::vector<int32_t> before = tokenizer.Encode(text, false);
  const size_t begin = before.size();
  Continuation all;
  for (const AnswerPiece& piece : pieces) {
    text += piece.text;
    std::vector<int32_t> now = tokenizer.Encode(text, false);
    const bool extends = now.size() > before.size() && std::equal(before.begin(), before.end(), now.begin());
    std::vector<int32_t> ids =
        extends ? std::vector<int32_t>(now.begin() + static_cast<std::ptrdiff_t>(before.size()), now.end())
                : tokenizer.Encode(piece.text, false);
    if (!extends) now = before, now.insert(now.end(), ids.begin(), ids.end());
    for (const int32_t id : ids) {
      all.ids.push_back(id);
      all.scored.push_back(piece.value && tokenizer.Decode(std::array{id}).find_first_not_of(' ') != std::string::npos);
    }
    before = std::move(now);
  }
  if (before.size() != begin + all.ids.size()) throw std::logic_error("tokens of an answer were lost");
  return all;
}

std::string QuestionsFile(const RulerTask& task, const Options& options) {
  if (task.kind != RulerTask::kQuestions) return "";
  const char* flag = task.squad ? "--squad-file" : "--hotpotqa-file";
  const std::string& file = task.squad ? options.squad_file : options.hotpotqa_file;
  if (file.empty()) {
    throw Skip(StrCat("its data can be fetched from no package registry; name ",
                      task.squad ? "SQuAD's dev-v2.0.json" : "HotpotQA's hotpot_dev_distractor_v1.json", " by ", flag));
  }
  return file;
}

// The questions of a cell, the same for every spec: of the last cell only.
const std::vector<Question>& Questions(Session& session, const Cell& cell, const RulerTask& task) {
  static std::pair<std::string, std::vector<Question>> known;
  const Options& options = session.options();
  const std::string file = QuestionsFile(task, options);
  const bool essay = task.haystack == RulerTask::kEssay;
  const std::string key = StrCat(cell.model, "/", task.name, "/", cell.context, "/", options.ruler_samples, "/",
                                 options.seed, "/", file, "/", essay ? session.corpus().sha256 : "");
  if (known.first == key) return known.second;
  RulerData data;
  try {
    if (task.words()) {
      data.nouns = LoadWords("wonderwords", "nounlist.txt");
      data.adjectives = LoadWords("wonderwords", "adjectivelist.txt");
      data.verbs = LoadWords("wonderwords", "verblist.txt");
    }
  } catch (const InputError& error) {  // the others can be had
    throw Skip(error.what());
  }
  if (essay) data.essay = session.corpus().text;
  if (!file.empty()) data.questions = ReadFile(file), data.questions_name = file;
  const Tokenizer& tokenizer = session.tokenizer(cell.model);
  const auto tokens = [&](const std::string& text) {
    return static_cast<int64_t>(tokenizer.Encode(text, false).size());
  };
  std::vector<Question> questions;
  for (RulerSample& sample : MakeRulerSamples(task, cell.context, options.ruler_samples, options.seed, tokens, data)) {
    Question question{std::move(sample), {}, {}, {}, {}};
    const RulerSample& of = question.sample;
    question.ids = tokenizer.Encode(of.prompt, true);
    const std::string behind = of.prompt.substr(of.prefix);
    question.gold = Continue(tokenizer, behind, WholeAnswer(task, of.references));
    const size_t wrong = std::min(of.distractors.size(), kDistractors);
    for (size_t i = 0; i < wrong; ++i) {
      question.wrong.push_back(
          Continue(tokenizer, behind, FirstAnswer(task, of.distractors[i * of.distractors.size() / wrong])));
    }
    for (const std::string& reference : of.references) {
      if (wrong > 0) question.first.push_back(Continue(tokenizer, behind, FirstAnswer(task, reference)));
    }
    questions.push_back(std::move(question));
  }
  known = {key, std::move(questions)};
  return known.second;
}

// What came out for one question.
struct Result {
  std::vector<int32_t> answer;
  std::string text;
  double score = 0, nll = 0, encoded_share = 0;
  std::optional<double> margin;
  bool truncated = false;  // the number of new tokens ended it
};

// Questions with prompts of one length, side by side in one cache.
class Batch {
 public:
  Batch(Session& session, const Cell& cell, const RulerTask& task, const Spec& spec, int64_t batch, int64_t capacity)
      : task_(task),
        spec_(spec),
        model_(session.model(cell.model)),
        backend_(FindBackend(cell.backend)),
        tokenizer_(session.tokenizer(cell.model)),
        first_call_(session.options().protocol == "study" ? capacity : spec.sink_tokens + spec.CallTokens()),
        chunk_(session.options().protocol == "study" ? capacity : spec.CallTokens()),
        stepper_(session, model_, backend_, spec, batch, capacity, "answers") {}
  int64_t batch() const { return cache().shape().batch; }

  std::vector<Result> Ask(const std::vector<const Question*>& questions) {
    std::vector<at::Tensor> rows;
    for (const Question* question : questions) rows.push_back(IdTensor(question->ids, 1, model_.device()));
    const at::Tensor ids = at::cat(rows, 0);
    cache().Clear();
    prompt_ = stepper_.Logits(stepper_.Prompt(ids, chunk_));
    CheckFinite(prompt_, model_, ids, spec_, backend_);
    restore_ = cache().Save();

    std::vector<Result> results(questions.size());
    const std::vector<double> gold = LogProbabilities(questions, [](const Question& q) { return &q.gold; });
    size_t first = 0, wrong = 0;
    for (const Question* question : questions) {
      first = std::max(first, question->first.size());
      wrong = std::max(wrong, question->wrong.size());
    }
    const auto best = [&](auto list, size_t count) {
      std::vector<double> most(questions.size(), -INFINITY);
      for (size_t i = 0; i < count; ++i) {
        const auto at = [&](const Question& q) { return &(q.*list)[std::min(i, (q.*list).size() - 1)]; };
        const std::vector<double> one = LogProbabilities(questions, at);
        for (size_t b = 0; b < one.size(); ++b) most[b] = std::max(most[b], one[b]);
      }
      return most;
    };
    const std::vector<double> right = best(&Question::first, first), other = best(&Question::wrong, wrong);
    const int64_t length = ids.size(1);
    for (size_t b = 0; b < results.size(); ++b) {
      const Continuation& of = questions[b]->gold;
      results[b].nll = -gold[b] / static_cast<double>(std::count(of.scored.begin(), of.scored.end(), true));
      if (wrong > 0) results[b].margin = right[b] - other[b];
      // The prompt's last token predicts the answer's first one.
      results[b].encoded_share = EncodedShareRead(spec_, cache().shape(), std::min(first_call_, length), length - 1,
                                                  length - 1 + static_cast<int64_t>(of.ids.size()));
    }
    restore_();
    Answer(questions, ids, results);
    return results;
  }

 private:
  KvCache& cache() { return stepper_.cache(); }
  const KvCache& cache() const { return stepper_.cache(); }

  // The log-probability of each question's continuation behind its prompt, scored tokens alone. The questions have
  // continuations of the same kind, or the shorter ones are followed by anything, which they do not see.
  template <typename Get>
  std::vector<double> LogProbabilities(const std::vector<const Question*>& questions, const Get& get) {
    restore_();
    size_t length = 0;
    for (const Question* question : questions) length = std::max(length, get(*question)->ids.size());
    std::vector<at::Tensor> rows;
    for (const Question* question : questions) {
      std::vector<int32_t> ids = get(*question)->ids;
      ids.resize(length, ids.back());
      rows.push_back(IdTensor(ids, 1, model_.device()));
    }
    const at::Tensor ids = at::cat(rows, 0);
    std::vector<at::Tensor> logits = {prompt_};
    for (int64_t at = 0, last = static_cast<int64_t>(length) - 1; at < last;) {
      // Calls end where those of a longer prompt would.
      const int64_t stored = cache().length(), behind = stored - first_call_;
      const int64_t end = stored < first_call_ ? first_call_ : first_call_ + (behind / chunk_ + 1) * chunk_;
      const int64_t n = std::min(end - stored, last - at);
      logits.push_back(model_.Logits(stepper_.Feed(ids.narrow(1, at, n), n)));
      at += n;
    }
    const at::Tensor all = at::log_softmax(at::cat(logits, 1), -1);
    const at::Tensor of_ids = all.gather(-1, ids.to(all.device()).unsqueeze(-1)).squeeze(-1).to(at::kDouble).cpu();
    CheckFinite(of_ids, model_, ids, spec_, backend_);
    std::vector<double> sums;
    for (size_t b = 0; b < questions.size(); ++b) {
      const Continuation& of = *get(*questions[b]);
      const double* row = of_ids[static_cast<int64_t>(b)].const_data_ptr<double>();
      double sum = 0;
      for (size_t i = 0; i < of.ids.size(); ++i) sum += of.scored[i] ? row[i] : 0;
      sums.push_back(sum);
    }
    return sums;
  }

  void Answer(const std::vector<const Question*>& questions, const at::Tensor& ids, std::vector<Result>& results) {
    std::vector<bool> done(questions.size());
    at::Tensor token = prompt_.argmax(-1);
    for (int64_t i = 0;; ++i) {
      const at::Tensor now = token.cpu();
      for (size_t b = 0; b < results.size(); ++b) {
        if (done[b]) continue;
        Result& result = results[b];
        result.answer.push_back(static_cast<int32_t>(now[static_cast<int64_t>(b)][0].item<int64_t>()));
        const bool ended = tokenizer_.eos_id() == result.answer.back();
        result.text = RulerAnswer(tokenizer_.Decode(result.answer));
        const std::vector<bool> found = FoundReferences(result.text, questions[b]->sample.references);
        result.score = task_.part() ? MatchPart(found) : MatchAll(found);
        result.truncated = !ended && result.score < 1 && i + 1 == task_.new_tokens;
        done[b] = ended || result.score == 1;
      }
      if (i + 1 == task_.new_tokens || std::all_of(done.begin(), done.end(), [](bool one) { return one; })) return;
      const at::Tensor logits = stepper_.Logits(stepper_.Step(token.squeeze(1)));
      CheckFinite(logits, model_, ids, spec_, backend_);
      token = logits.argmax(-1);
    }
  }

  const RulerTask& task_;
  const Spec& spec_;
  const Model& model_;
  const Backend& backend_;
  const Tokenizer& tokenizer_;
  const int64_t first_call_, chunk_;
  Stepper stepper_;
  at::Tensor prompt_;              // logits behind the prompt, [batch, 1, vocab_size]
  std::function<void()> restore_;  // brings the cache there
};

// Places of the questions, those of one length in a row, at most `batch` in a group.
std::vector<std::vector<size_t>> Groups(const std::vector<Question>& questions, int64_t batch) {
  std::map<size_t, std::vector<size_t>> by_length;
  for (size_t i = 0; i < questions.size(); ++i) by_length[questions[i].ids.size()].push_back(i);
  std::vector<std::vector<size_t>> groups;
  for (const auto& [length, places] : by_length) {
    for (size_t at = 0; at < places.size(); at += static_cast<size_t>(batch)) {
      const size_t end = std::min(at + static_cast<size_t>(batch), places.size());
      groups.emplace_back(places.begin() + static_cast<std::ptrdiff_t>(at),
                          places.begin() + static_cast<std::ptrdiff_t>(end));
    }
  }
  // A cache serves groups of one size.
  std::stable_sort(groups.begin(), groups.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
  return groups;
}

Counters Summary(const std::vector<Question>& questions, const std::vector<Result>& results) {
  std::vector<double> scores, nll, margins, shares, lengths;
  int64_t empty = 0, truncated = 0, first = 0, new_tokens = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& result = results[i];
    scores.push_back(result.score);
    nll.push_back(result.nll);
    shares.push_back(result.encoded_share);
    lengths.push_back(static_cast<double>(questions[i].ids.size()));
    if (result.margin) margins.push_back(*result.margin), first += *result.margin > 0;
    empty += result.text.empty();
    truncated += result.truncated;
    new_tokens += static_cast<int64_t>(result.answer.size());
  }
  const int64_t n = static_cast<int64_t>(results.size());
  const auto share = [&](int64_t count) { return static_cast<double>(count) / static_cast<double>(n); };
  Counters counters;
  // Equal fractions have no spread that could be seen; a yes or no varies more than any fraction of the same mean.
  const bool fractions = std::any_of(scores.begin(), scores.end(), [&](double s) { return s != 0 && s != 1; });
  const double mean = Mean(scores);
  std::optional<Interval> interval = MeanInterval(scores);
  if (!fractions || !interval || interval->low == interval->high) {
    interval = WilsonInterval(std::llround(mean * static_cast<double>(n)), n);
  }
  AddInterval(counters, "score", 100 * mean, Interval{100 * interval->low, 100 * interval->high}, 0, 100);
  AddInterval(counters, "gold_nll", Mean(nll), MeanInterval(nll), 0);
  if (!margins.empty()) {
    AddInterval(counters, "margin", Mean(margins), MeanInterval(margins));
    AddInterval(counters, "rank1", share(first), WilsonInterval(first, n), 0, 1);
  }
  counters.emplace_back("encoded_share", Mean(shares));
  counters.emplace_back("ruler_samples", static_cast<double>(n));
  counters.emplace_back("truncated_share", share(truncated));
  counters.emplace_back("empty_share", share(empty));
  AddSpread(counters, "prompt_tokens", lengths);
  counters.emplace_back("answer_tokens", share(new_tokens));
  return counters;
}

Counters Ruler(Session& session, const Cell& cell, benchmark::State& state, const RulerTask& task) {
  const Spec spec = ParseSpec(cell.spec);
  Counters counters;
  for (auto _ : state) {
    const std::vector<Question>& questions = Questions(session, cell, task);
    std::vector<Result> results(questions.size());
    size_t longest = 0, behind = static_cast<size_t>(task.new_tokens);
    for (const Question& question : questions) {
      longest = std::max(longest, question.ids.size());
      behind = std::max(behind, question.gold.ids.size());
      for (const auto* list : {&question.first, &question.wrong}) {
        for (const Continuation& one : *list) behind = std::max(behind, one.ids.size());
      }
    }
    std::optional<Batch> batch;
    state.SetIterationTime(Time(session.devices(), [&] {
      for (const std::vector<size_t>& group : Groups(questions, cell.batch)) {
        const int64_t size = static_cast<int64_t>(group.size());
        if (!batch || batch->batch() != size) {
          batch.reset();  // there may not be room for two
          batch.emplace(session, cell, task, spec, size, static_cast<int64_t>(longest + behind));
        }
        std::vector<const Question*> asked;
        for (const size_t i : group) asked.push_back(&questions[i]);
        std::vector<Result> answered = batch->Ask(asked);
        for (size_t b = 0; b < group.size(); ++b) results[group[b]] = std::move(answered[b]);
      }
    }));
    counters = Summary(questions, results);
    for (size_t i = 0; i < results.size(); ++i) {
      const Result& result = results[i];
      session.samples.push_back({.id = std::to_string(i),
                                 .cluster = std::to_string(i),
                                 .prompt_sha256 = PromptSha256(questions[i].ids),
                                 .right = result.score,
                                 .nll = result.nll,
                                 .margin = result.margin,
                                 .encoded_share = result.encoded_share,
                                 .answer = result.text,
                                 .numbers = {{"prompt_tokens", static_cast<double>(questions[i].ids.size())},
                                             {"answer_tokens", static_cast<double>(result.answer.size())},
                                             {"truncated", result.truncated ? 1.0 : 0.0}}});
    }
  }
  if (task.haystack == RulerTask::kEssay) session.AddNote(StrCat("essay: ", session.corpus().name, ", not RULER's"));
  return counters;
}

// One row a task: what a row runs knows its task by its place in the table.
constexpr size_t kTasks = 19;
template <size_t kTask>
Counters RulerOf(Session& session, const Cell& cell, benchmark::State& state) {
  return Ruler(session, cell, state, RulerTasks()[kTask]);
}

template <size_t... kTask>
bool Register(std::index_sequence<kTask...>) {
  if (RulerTasks().size() != kTasks) throw std::logic_error("kTasks is not the number of RULER's tasks");
  (RegisterMeasurement(
       {.name = "ruler_" + RulerTasks()[kTask].name,
        .what = RulerTasks()[kTask].what,
        .quality = true,
        .on_request = true,
        .turn = 2,
        .like_tokens = [](const Options& o,
                          double tokens) { return 2.0 * static_cast<double>(o.ruler_samples) * tokens; },
        .run = RulerOf<kTask>}),
   ...);
  return true;
}

const bool kRegistered = Register(std::make_index_sequence<kTasks>());

}  // namespace
}  // namespace kvq
