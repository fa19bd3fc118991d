#include "accuracy/ruler_generator.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "benchmarks/measurement.h"
#include "kernels/error.h"

namespace kvq::ruler {

const Template& TemplateOf(RulerTask::Kind kind) {
  static const std::map<RulerTask::Kind, Template> kTemplates = {
      {RulerTask::kNiah,
       {"Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will "
        "quiz you about "
        "the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} "
        "mentioned in the "
        "provided text?",
        " The special magic {type_needle_v} for {query} mentioned in the provided text are"}},
      {RulerTask::kVariables,
       {"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
        "Find all "
        "variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned "
        "the value "
        "{query}, they are: "}},
      {RulerTask::kCommonWords,
       {"Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most "
        "often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:"}},
      {RulerTask::kFrequentWords,
       {"Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded "
        "words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
        "most "
        "frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:"}},
      {RulerTask::kQuestions,
       {"Answer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\nThe "
        "following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
        "the answer "
        "and do not output any other words.\n\nQuestion: {query}",
        " Answer:"}}};
  return kTemplates.at(kind);
}

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
  return text;
}

std::string Format(std::string text, const std::vector<std::pair<std::string, std::string>>& fields) {
  for (const auto& [name, value] : fields) text = Replaced(std::move(text), "{" + name + "}", value);
  return text;
}

std::string Joined(const std::vector<std::string>& parts, const std::string& between) {
  std::string text;
  for (size_t i = 0; i < parts.size(); ++i) text += (i > 0 ? between : "") + parts[i];
  return text;
}

std::vector<std::string> SplitAtBlanks(const std::string& text) {
  std::vector<std::string> words;
  for (size_t at = 0; (at = text.find_first_not_of(" \t\n\v\f\r", at)) != std::string::npos;) {
    const size_t end = std::min(text.find_first_of(" \t\n\v\f\r", at), text.size());
    words.push_back(text.substr(at, end - at));
    at = end;
  }
  return words;
}

std::vector<std::string> Repeated(const std::vector<std::string>& list, int64_t size) {
  std::vector<std::string> repeated(static_cast<size_t>(size));
  for (size_t i = 0; i < repeated.size(); ++i) repeated[i] = list[i % list.size()];
  return repeated;
}

std::vector<RulerSample> Generator::Samples(int64_t count) {
  const int64_t size = FindSize();
  std::vector<RulerSample> samples;
  for (int64_t i = 0; i < count; ++i) samples.push_back(Fitting(i, size));
  return samples;
}

int64_t Generator::Most() {
  const double each = static_cast<double>(tokens_(Make(0, step()).prompt)) / static_cast<double>(step());
  return static_cast<int64_t>(static_cast<double>(context_) / each * 3);
}

int64_t Generator::FindSize() {
  int64_t low = step(), high = std::max(Most(), step() * 2), best = step();
  while (low <= high) {
    const int64_t middle = (low + high) / 2;
    if (tokens_(Make(0, middle).prompt) + extra_tokens() <= context_) {
      best = middle, low = middle + 1;
    } else {
      high = middle - 1;
    }
  }
  return best;
}

RulerSample Generator::Fitting(int64_t index, int64_t size) {
  for (int tries = 0; tries < kTries;) {
    try {
      RulerSample sample = Make(index, size);
      Finish(sample);
      sample.length = tokens_(sample.prompt) + task_.new_tokens;
      if (sample.length <= context_) {
        sample.prefix = sample.prompt.rfind(TemplateOf(task_.kind).prefix.substr(0, 10));
        return sample;
      }
    } catch (const std::length_error&) {
    }
    if (size > step()) {
      size -= step();
    } else {
      ++tries;
    }
  }
  throw Skip(
      StrCat(task_.name, " does not fit into ", context_, " tokens, ", task_.new_tokens, " of them for the answer"));
}

}  // namespace kvq::ruler
