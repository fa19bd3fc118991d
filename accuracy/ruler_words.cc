#include <algorithm>
#include <cmath>
#include <set>

#include "accuracy/ruler_generator.h"
#include "benchmarks/measurement.h"
#include "kernels/error.h"

namespace kvq {
namespace ruler {
namespace {

const std::string kLower = "abcdefghijklmnopqrstuvwxyz";

// common_words_extraction.py
class CommonWords : public Generator {
 public:
  CommonWords(const RulerTask& task, int64_t context, int64_t seed, const Tokens& tokens, const RulerData& data)
      : Generator(task, context, seed, tokens) {
    std::set<std::string> words(data.nouns.begin(), data.nouns.end());
    words.insert(data.adjectives.begin(), data.adjectives.end());
    words.insert(data.verbs.begin(), data.verbs.end());
    words_.assign(words.begin(), words.end());
    PythonRandom(seed_).Shuffle(words_);
  }

 protected:
  int64_t step() const override { return 10; }
  int64_t Most() override {
    const double each = static_cast<double>(tokens_(Make(0, 4096).prompt)) / 4096;
    return static_cast<int64_t>(std::floor(static_cast<double>(context_) / each)) * 2;
  }
  RulerSample Make(int64_t, int64_t size) override {
    const bool small = context_ < 4096;
    RulerSample example, sample;
    AddList(example, small ? 20 : 40, small ? 3 : 10, small ? 1 : 3);
    AddList(sample, size, small ? 6 : 30, small ? 1 : 3);
    const Template& of = TemplateOf(task_.kind);
    const auto ask = [&](const RulerSample& about) { return Format(of.text + of.prefix, {{"context", about.prompt}}); };
    sample.prompt = ask(example) + " " + Numbered(example.references) + "\n" + ask(sample);
    return sample;
  }

 private:
  static std::string Numbered(const std::vector<std::string>& words) {
    std::string text;
    for (size_t i = 0; i < words.size(); ++i) text += StrCat(i > 0 ? " " : "", i + 1, ". ", words[i]);
    return text;
  }
  void AddList(RulerSample& sample, int64_t size, int64_t common, int64_t uncommon) {
    constexpr int64_t kCommon = 10;
    if (size < kCommon) throw std::length_error("fewer words than are asked for");
    if (size > static_cast<int64_t>(words_.size())) {
      throw Skip(StrCat(task_.name, " at ", context_, " tokens wants ", size, " words; wonderwords has ", words_.size(),
                        ", and RULER's longer list is not here"));
    }
    std::vector<std::string> words, list;
    for (const int64_t i : random_.Sample(static_cast<int64_t>(words_.size()), size))
      words.push_back(words_[static_cast<size_t>(i)]);
    sample.references.assign(words.begin(), words.begin() + kCommon);
    sample.distractors.assign(words.begin() + kCommon, words.end());
    for (int64_t i = 0; i < common; ++i) list.insert(list.end(), sample.references.begin(), sample.references.end());
    for (int64_t i = 0; i < uncommon; ++i)
      list.insert(list.end(), sample.distractors.begin(), sample.distractors.end());
    PythonRandom(seed_).Shuffle(list);
    sample.prompt = Numbered(list);
  }

  std::vector<std::string> words_;
};

// freq_words_extraction.py: no bisection; words are added until they no longer fit, once, and later samples take steps back.
class FrequentWords : public Generator {
 public:
  using Generator::Generator;

 protected:
  int64_t step() const override { return room() / 32; }
  int64_t FindSize() override {
    if (room() < 50 * 5) throw Skip(StrCat(task_.name, " wants more than ", context_, " tokens"));
    const std::vector<std::string> words = Vocabulary();
    int64_t size = room() / kLetters;
    while (tokens_(Text(words, size)) < room()) size += step();
    return size - step();
  }
  RulerSample Fitting(int64_t, int64_t size) override {
    RulerSample sample;
    const std::vector<std::string> words = Vocabulary();
    while (tokens_(sample.prompt = Text(words, size)) > room()) {
      size -= step();
      if (size <= 0) throw Skip(StrCat(task_.name, " does not fit into ", context_, " tokens"));
    }
    sample.length = tokens_(sample.prompt) + task_.new_tokens;
    sample.prefix = sample.prompt.rfind(TemplateOf(task_.kind).prefix.substr(0, 10));
    sample.references.assign(words.begin() + 1, words.begin() + 4);
    for (size_t rank = 4; rank < words.size() && Count(rank, size) > 0; ++rank)
      sample.distractors.push_back(words[rank]);
    return sample;
  }
  RulerSample Make(int64_t, int64_t) override { return {}; }

 private:
  static constexpr int64_t kLetters = 6;
  int64_t room() const { return context_ - task_.new_tokens; }

  std::vector<std::string> Vocabulary() {
    const size_t size = static_cast<size_t>(room() / 50);
    std::set<std::string> words;
    for (size_t drawn = 0; drawn < size || words.size() < size; ++drawn)
      words.insert(random_.Letters(kLower, kLetters));
    std::vector<std::string> list(words.begin(), words.end());
    PythonRandom(seed_).Shuffle(list);
    list[0] = "...";  // the commonest one is noise
    return list;
  }
  // How often the word of a rank, from 0, comes among `words`: zeta's distribution with alpha 2.
  static int64_t Count(size_t rank, int64_t words) {
    constexpr double kZeta2 = 1.6449340668482264;
    return static_cast<int64_t>(static_cast<double>(words) * std::pow(static_cast<double>(rank + 1), -2.0) / kZeta2);
  }
  std::string Text(const std::vector<std::string>& words, int64_t count) const {
    std::vector<std::string> list;
    for (size_t rank = 0; rank < words.size(); ++rank)
      list.insert(list.end(), static_cast<size_t>(Count(rank, count)), words[rank]);
    PythonRandom(seed_).Shuffle(list);
    const Template& of = TemplateOf(task_.kind);
    return Format(of.text + of.prefix, {{"context", Joined(list, " ")}});
  }
};

}  // namespace

std::unique_ptr<Generator> MakeCommonWords(const RulerTask& task, int64_t context, int64_t seed, const Tokens& tokens,
                                           const RulerData& data) {
  return std::make_unique<CommonWords>(task, context, seed, tokens, data);
}

std::unique_ptr<Generator> MakeFrequentWords(const RulerTask& task, int64_t context, int64_t seed, const Tokens& tokens,
                                             const RulerData&) {
  return std::make_unique<FrequentWords>(task, context, seed, tokens);
}

}  // namespace ruler

}  // namespace kvq
