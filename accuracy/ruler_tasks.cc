#include "accuracy/ruler_tasks.h"

#include <algorithm>
#include <stdexcept>

#include "accuracy/ruler_generator.h"
#include "benchmarks/measurement.h"
#include "kernels/error.h"

namespace kvq {
namespace {

std::string Stripped(const std::string& text) {
  constexpr char kBlank[] = " \t\n\v\f\r\x1c\x1d\x1e\x1f";
  const size_t begin = text.find_first_not_of(kBlank);
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(kBlank) - begin + 1);
}

std::string Lower(std::string text) {
  for (char& c : text) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return text;
}

std::vector<RulerTask> AllTasks() {
  using T = RulerTask;
  std::vector<RulerTask> tasks = {
      {.name = "niah_single_1", .what = "RULER: one number in noise"},
      {.name = "niah_single_2", .what = "RULER: one number in a text", .haystack = T::kEssay},
      {.name = "niah_single_3", .what = "RULER: one uuid in a text", .haystack = T::kEssay, .uuid_values = true},
      {.name = "niah_multikey_1", .what = "RULER: one of four numbers in a text", .haystack = T::kEssay, .keys = 4},
      {.name = "niah_multikey_2", .what = "RULER: one number among lines of others", .haystack = T::kNeedles},
      {.name = "niah_multikey_3",
       .what = "RULER: one uuid among lines of others, by a uuid",
       .haystack = T::kNeedles,
       .uuid_keys = true,
       .uuid_values = true},
      {.name = "niah_multivalue",
       .what = "RULER: four numbers of one key in a text",
       .haystack = T::kEssay,
       .values = 4},
      {.name = "niah_multiquery",
       .what = "RULER: the numbers of four keys in a text",
       .haystack = T::kEssay,
       .queries = 4},
      {.name = "cwe", .what = "RULER: the ten commonest of many words", .kind = T::kCommonWords, .new_tokens = 120},
      {.name = "fwe",
       .what = "RULER: the three commonest of many coded words",
       .kind = T::kFrequentWords,
       .new_tokens = 50},
      {.name = "qa_1",
       .what = "RULER: questions of SQuAD among documents (--squad-file)",
       .kind = T::kQuestions,
       .new_tokens = 32,
       .squad = true},
      {.name = "qa_2",
       .what = "RULER: questions of HotpotQA among documents (--hotpotqa-file)",
       .kind = T::kQuestions,
       .new_tokens = 32},
      {.name = "vt",
       .what = "RULER: five variables of one value, over four hops",
       .kind = T::kVariables,
       .new_tokens = 30}};
  for (const int64_t keys : {2, 4, 8}) {
    tasks.push_back({.name = StrCat("niah_keys_", keys),
                     .what = StrCat("easier: one of ", keys, " numbers in noise"),
                     .keys = keys});
  }
  for (const int64_t hops : {1, 2, 3}) {
    tasks.push_back({.name = StrCat("vt_hops_", hops),
                     .what = StrCat("easier: vt over ", hops, hops > 1 ? " hops" : " hop"),
                     .kind = T::kVariables,
                     .new_tokens = 30,
                     .hops = hops});
  }
  return tasks;
}

}  // namespace

const std::vector<RulerTask>& RulerTasks() {
  static const std::vector<RulerTask> tasks = AllTasks();
  return tasks;
}

std::vector<RulerSample> MakeRulerSamples(const RulerTask& task, int64_t context, int64_t count, int64_t seed,
                                          const std::function<int64_t(const std::string& text)>& tokens,
                                          const RulerData& data) {
  const auto samples = [&](ruler::Maker& make) {
    try {
      return make(task, context, seed, tokens, data)->Samples(count);
    } catch (const std::length_error& error) {  // while its size was looked for, where RULER ends with an error
      throw Skip(StrCat(task.name, " at ", context, " tokens: ", error.what()));
    }
  };
  switch (task.kind) {
    case RulerTask::kNiah:
      return samples(ruler::MakeNiah);
    case RulerTask::kVariables:
      return samples(ruler::MakeVariables);
    case RulerTask::kCommonWords:
      return samples(ruler::MakeCommonWords);
    case RulerTask::kFrequentWords:
      return samples(ruler::MakeFrequentWords);
    case RulerTask::kQuestions:
      return samples(ruler::MakeQuestions);
  }
  throw std::logic_error("no such kind of task");
}

std::vector<AnswerPiece> FirstAnswer(const RulerTask& task, const std::string& reference) {
  if (task.kind == RulerTask::kVariables) return {{reference, true}};  // the prompt ends with a blank
  if (task.kind == RulerTask::kCommonWords) return {{" 1.", false}, {" " + reference, true}};
  return {{" " + reference, true}};
}

std::vector<AnswerPiece> WholeAnswer(const RulerTask& task, const std::vector<std::string>& references) {
  std::vector<AnswerPiece> pieces = FirstAnswer(task, references.front());
  for (size_t i = 1; i < references.size() && !task.part(); ++i) {
    if (task.kind == RulerTask::kCommonWords) {
      pieces.push_back({StrCat(" ", i + 1, "."), false});
    } else if (task.kind != RulerTask::kVariables) {
      const bool last = task.kind == RulerTask::kNiah && i + 1 == references.size();
      pieces.push_back({last ? ", and" : ",", false});
    }
    pieces.push_back({" " + references[i], true});
  }
  return pieces;
}

std::string RulerAnswer(const std::string& text) {
  std::string answer = Stripped(text);
  for (char& c : answer) c = static_cast<unsigned char>(c) < 0x20 ? '\n' : c;
  return Stripped(answer);
}

std::vector<bool> FoundReferences(const std::string& answer, const std::vector<std::string>& references) {
  const std::string in = Lower(answer);
  std::vector<bool> found;
  for (const std::string& reference : references) found.push_back(in.find(Lower(reference)) != std::string::npos);
  return found;
}

double MatchAll(const std::vector<bool>& found) {
  return static_cast<double>(std::count(found.begin(), found.end(), true)) / static_cast<double>(found.size());
}

double MatchPart(const std::vector<bool>& found) { return std::count(found.begin(), found.end(), true) > 0 ? 1 : 0; }

}  // namespace kvq
