#include "accuracy/ruler_tasks.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <set>

#include "accuracy/python_random.h"
#include "benchmarks/measurement.h"
#include "kernels/error.h"

namespace kvq {
namespace {

constexpr char kNoise[] = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
const std::string kUpper = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", kLower = "abcdefghijklmnopqrstuvwxyz";

// scripts/data/synthetic/constants.py
struct Template {
  std::string text, prefix;
};
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

// str.format with these fields, the context last: it may hold braces.
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

// In place of NLTK's sent_tokenize: a sentence ends at a blank behind . ! or ?, or one of them and a quotation mark or
// bracket, but not behind a title.
std::vector<std::string> Sentences(const std::string& text) {
  std::vector<std::string> sentences;
  size_t begin = 0;
  for (size_t blank = text.find(' '); blank != std::string::npos; blank = text.find(' ', blank + 1)) {
    const auto is = [&](size_t back, const char* any) {
      return blank >= back && std::string_view(any).find(text[blank - back]) != std::string_view::npos;
    };
    const auto behind = [&](std::string_view word) {
      return blank >= word.size() && text.compare(blank - word.size(), word.size(), word) == 0;
    };
    if (!is(1, ".!?") && !(is(1, "\"')") && is(2, ".!?"))) continue;
    if (behind("Mr.") || behind("Mrs.") || behind("Dr.") || behind("St.")) continue;
    sentences.push_back(text.substr(begin, blank - begin));
    begin = blank + 1;
  }
  sentences.push_back(text.substr(begin));
  return sentences;
}

// The first `size` of a list that repeats.
std::vector<std::string> Repeated(const std::vector<std::string>& list, int64_t size) {
  std::vector<std::string> repeated(static_cast<size_t>(size));
  for (size_t i = 0; i < repeated.size(); ++i) repeated[i] = list[i % list.size()];
  return repeated;
}

// What the scripts share: two generators with one seed, and the search for the size of a haystack.
class Generator {
 public:
  Generator(const RulerTask& task, int64_t context, int64_t seed,
            const std::function<int64_t(const std::string&)>& tokens)
      : task_(task),
        context_(context),
        seed_(static_cast<uint64_t>(seed)),
        tokens_(tokens),
        random_(seed_),
        numpy_(static_cast<uint32_t>(seed)) {}
  virtual ~Generator() = default;

  std::vector<RulerSample> Samples(int64_t count) {
    const int64_t size = FindSize();
    std::vector<RulerSample> samples;
    for (int64_t i = 0; i < count; ++i) samples.push_back(Fitting(i, size));
    return samples;
  }

 protected:
  // A sample with a haystack of this size. Throws std::length_error where so small a one has not enough places.
  virtual RulerSample Make(int64_t index, int64_t size) = 0;
  // What RULER calls incremental: the smallest size, and the step down where a sample became too long.
  virtual int64_t step() const = 0;
  // A size that is surely too large.
  virtual int64_t Most() {
    const double each = static_cast<double>(tokens_(Make(0, step()).prompt)) / static_cast<double>(step());
    return static_cast<int64_t>(static_cast<double>(context_) / each * 3);
  }
  // The last sample's example apart (vt).
  virtual void Finish(RulerSample&) {}
  virtual int64_t extra_tokens() const { return task_.new_tokens; }

  // The largest size that fits, by bisection with one sample a step.
  virtual int64_t FindSize() {
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

  // A sample that fits: a step smaller while it does not.
  virtual RulerSample Fitting(int64_t index, int64_t size) {
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

  static constexpr int kTries = 50;  // at the smallest size, with new words each time; RULER: for ever
  const RulerTask& task_;
  const int64_t context_;
  const uint64_t seed_;
  const std::function<int64_t(const std::string&)>& tokens_;
  PythonRandom random_;
  NumpyRandom numpy_;
};

// niah.py
class Niah : public Generator {
 public:
  Niah(const RulerTask& task, int64_t context, int64_t seed, const std::function<int64_t(const std::string&)>& tokens,
       const RulerData& data)
      : Generator(task, context, seed, tokens), keys_(std::max(task.keys, task.queries)) {
    if (task.words()) words_.emplace(data.adjectives, data.nouns);
    if (task.haystack == RulerTask::kEssay) {
      essay_ = SplitAtBlanks(data.essay);
      if (essay_.empty() || data.essay.back() != essay_.back().back())
        essay_.emplace_back();  // re.split has one behind the last blank
    }
    for (int i = 0; i < 40; ++i) depths_.push_back(std::llround(i * (100.0 / 39)));
  }

 protected:
  int64_t step() const override {
    if (task_.haystack == RulerTask::kEssay) return 500;
    return context_ < 4096 ? std::max<int64_t>(5, keys_ * task_.values)
                           : 25;  // RULER: 5, where eight needles have no room
  }

  RulerSample Make(int64_t, int64_t size) override {
    RulerSample sample;
    std::vector<std::string> keys, needles;
    std::vector<std::vector<std::string>> values;
    for (int64_t i = 0; i < keys_; ++i) {
      keys.push_back(Draw(task_.uuid_keys, /*key=*/true));
      values.emplace_back();
      for (int64_t v = 0; v < task_.values; ++v) {
        values.back().push_back(Draw(task_.uuid_values, /*key=*/false));
        needles.push_back(Needle(keys.back(), values.back().back()));
      }
    }
    PythonRandom(seed_).Shuffle(needles);

    std::string context;
    if (task_.haystack == RulerTask::kEssay) {
      const std::vector<std::string> sentences = Sentences(Joined(Repeated(essay_, size), " "));
      std::vector<size_t> places = {0};
      for (const int64_t i : random_.Sample(40, static_cast<int64_t>(needles.size()))) {
        places.push_back(static_cast<size_t>(static_cast<double>(sentences.size()) *
                                             (static_cast<double>(depths_[static_cast<size_t>(i)]) / 100)));
      }
      std::sort(places.begin(), places.end());
      places.push_back(sentences.size());
      std::vector<std::string> parts;
      for (size_t i = 1; i < places.size(); ++i) {
        const auto at = [&](size_t place) { return sentences.begin() + static_cast<std::ptrdiff_t>(place); };
        parts.push_back(Joined({at(places[i - 1]), at(places[i])}, " "));
        if (i - 1 < needles.size()) parts.push_back(needles[i - 1]);
      }
      context = Joined(parts, " ");
    } else {
      std::vector<std::string> lines(static_cast<size_t>(size), kNoise);
      if (task_.haystack == RulerTask::kNeedles) {
        for (std::string& line : lines) {
          const std::string key = Draw(task_.uuid_keys, /*key=*/true), value = Draw(task_.uuid_values, /*key=*/false);
          line = Needle(key, value);
          sample.distractors.push_back(value);
        }
      }
      std::vector<int64_t> places = random_.Sample(size, static_cast<int64_t>(needles.size()));
      std::sort(places.rbegin(), places.rend());
      for (size_t i = 0; i < needles.size(); ++i) lines.insert(lines.begin() + places[i], needles[i]);
      context = Joined(lines, "\n");
    }

    const std::vector<int64_t> asked = random_.Sample(keys_, task_.queries);
    std::vector<std::string> queries;
    for (const int64_t i : asked) {
      queries.push_back(keys[static_cast<size_t>(i)]);
      const std::vector<std::string>& answers = values[static_cast<size_t>(i)];
      sample.references.insert(sample.references.end(), answers.begin(), answers.end());
    }
    for (size_t i = 0; i < keys.size(); ++i) {
      if (std::find(asked.begin(), asked.end(), static_cast<int64_t>(i)) != asked.end()) continue;
      sample.distractors.insert(sample.distractors.end(), values[i].begin(), values[i].end());
    }
    std::string query = queries.back();
    if (queries.size() > 1) query = Joined({queries.begin(), queries.end() - 1}, ", ") + ", and " + query;

    std::string text = TemplateOf(task_.kind).text + TemplateOf(task_.kind).prefix, type = Type(task_.uuid_values);
    if (task_.queries * task_.values == 1) {
      text = Replaced(std::move(text), "Some", "A");
      text = Replaced(std::move(text), "are all", "is");
      text = Replaced(std::move(text), "are", "is");
      text = Replaced(std::move(text), "answers", "answer");
      type.pop_back();
    }
    sample.prompt = Format(std::move(text), {{"type_needle_v", type}, {"query", query}, {"context", context}});
    return sample;
  }

 private:
  static std::string Type(bool uuid) { return uuid ? "uuids" : "numbers"; }
  std::string Draw(bool uuid, bool key) {
    if (uuid) return random_.Uuid4();
    return key ? (*words_)[random_.Below(words_->size())] : std::to_string(random_.Int(1000000, 9999999));
  }
  std::string Needle(const std::string& key, const std::string& value) const {
    return StrCat("One of the special magic ", Type(task_.uuid_values), " for ", key, " is: ", value, ".");
  }

  const int64_t keys_;
  std::optional<WordPairs> words_;
  std::vector<std::string> essay_;
  std::vector<int64_t> depths_;
};

// variable_tracking.py: first an example of at most 500 tokens, then the samples.
class Variables : public Generator {
 public:
  using Generator::Generator;

 protected:
  int64_t step() const override { return making_example_ || context_ < 4096 ? 5 : 10; }
  int64_t extra_tokens() const override { return making_example_ ? 0 : example_tokens_ + task_.new_tokens; }
  int64_t Most() override {
    const double each = static_cast<double>(tokens_(Make(0, step()).prompt)) / static_cast<double>(step());
    return static_cast<int64_t>(static_cast<double>(making_example_ ? kExample : context_) / each * 3);
  }

  int64_t FindSize() override {
    making_example_ = true;
    int64_t low = step(), high = std::max(Most(), step() * 2), best = step();
    while (low <= high) {
      const int64_t middle = (low + high) / 2;
      if (tokens_(Make(0, middle).prompt) <= kExample) {
        best = middle, low = middle + 1;
      } else {
        high = middle - 1;
      }
    }
    RulerSample example = Make(0, best);
    for (int tries = 0; tokens_(example.prompt) > kExample; tries += best == step()) {
      if (tries == kTries)
        throw Skip(StrCat(task_.name, ": its example does not fit into ", kExample, " tokens of this tokenizer"));
      if (best > step()) best -= step();
      example = Make(0, best);
    }
    example_ = example.prompt + " " + Joined(example.references, " ") + "\n";
    making_example_ = false;
    example_tokens_ = tokens_(example_);
    return Generator::FindSize();
  }

  RulerSample Make(int64_t, int64_t size) override {
    const int64_t letters = making_example_ ? 3 : 5,
                  hops = making_example_ ? std::min<int64_t>(10, task_.hops) : task_.hops;
    std::vector<std::string> names;
    for (int64_t i = 0; i <= hops; ++i) names.push_back(random_.Letters(kUpper, letters));
    while (std::set(names.begin(), names.end()).size() < static_cast<size_t>(hops + 1))
      names.push_back(random_.Letters(kUpper, letters));
    std::string value;
    for (size_t begin = 0; begin < names.size(); begin += static_cast<size_t>(hops + 1)) {
      const std::string one = making_example_ ? "12345" : std::to_string(numpy_.Int(10000, 99999));
      if (begin == 0) value = one;
    }
    // A name drawn twice leaves a chain without its end, at which RULER tries again.
    if (names.size() > static_cast<size_t>(hops + 1)) throw std::length_error("a name was drawn twice");
    std::vector<std::string> lines(static_cast<size_t>(size), kNoise);
    std::vector<int64_t> places = random_.Sample(size, hops + 1);
    std::sort(places.begin(), places.end());
    for (int64_t i = 0; i <= hops; ++i) {
      const std::string& name = names[static_cast<size_t>(i)];
      lines.insert(lines.begin() + places[static_cast<size_t>(i)] + i,
                   i == 0 ? StrCat("VAR ", name, " = ", value)
                          : StrCat("VAR ", name, " = VAR ", names[static_cast<size_t>(i - 1)], " "));
    }
    const Template& of = TemplateOf(task_.kind);
    RulerSample sample;
    sample.prompt = Format(of.text + of.prefix, {{"query", value},
                                                 {"num_v", std::to_string(hops + 1)},
                                                 {"context", Replaced(Joined(lines, "\n"), ". \n", ".\n")}});
    sample.references = names;
    return sample;
  }

  // The example, with other names and another value, goes before the prompt.
  void Finish(RulerSample& sample) override {
    std::string example = example_;
    const std::vector<std::string> words = SplitAtBlanks(example);
    for (auto name = words.end() - task_.hops - 1; name != words.end(); ++name) {
      const std::string other = random_.Letters(kUpper, static_cast<int64_t>(name->size()));
      example = Replaced(std::move(example), *name, other);
      sample.distractors.push_back(other);
    }
    example = Replaced(std::move(example), "12345", std::to_string(numpy_.Int(10000, 99999)));
    sample.prompt = example + "\n" + sample.prompt;
  }

 private:
  static constexpr int64_t kExample = 500;
  bool making_example_ = false;
  std::string example_;
  int64_t example_tokens_ = 0;
};

// common_words_extraction.py
class CommonWords : public Generator {
 public:
  CommonWords(const RulerTask& task, int64_t context, int64_t seed,
              const std::function<int64_t(const std::string&)>& tokens, const RulerData& data)
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

// qa.py
class Questions : public Generator {
 public:
  Questions(const RulerTask& task, int64_t context, int64_t seed,
            const std::function<int64_t(const std::string&)>& tokens, const RulerData& data)
      : Generator(task, context, seed, tokens) {
    try {
      const nlohmann::json root = nlohmann::json::parse(data.questions);
      task.squad ? ReadSquad(root) : ReadHotpot(root);
    } catch (const nlohmann::json::exception& error) {
      throw InputError(data.questions_name, ": not ", task.squad ? "SQuAD's" : "HotpotQA's", " JSON: ", error.what());
    }
    if (questions_.empty()) throw InputError(data.questions_name, ": no question that can be answered");
  }

 protected:
  int64_t step() const override { return 10; }
  RulerSample Make(int64_t index, int64_t size) override {
    if (index >= static_cast<int64_t>(questions_.size())) {
      throw Skip(StrCat("the file has ", questions_.size(), " questions; ask for fewer samples"));
    }
    const Question& question = questions_[static_cast<size_t>(index)];
    std::vector<int64_t> of = question.own;
    const int64_t own = static_cast<int64_t>(of.size()), more = static_cast<int64_t>(question.more.size());
    std::vector<std::string> texts;
    if (size < static_cast<int64_t>(documents_.size())) {
      if (size - own > more) {
        std::vector<int64_t> others;
        std::set<int64_t> taken(question.own.begin(), question.own.end());
        taken.insert(question.more.begin(), question.more.end());
        for (int64_t i = 0; i < static_cast<int64_t>(documents_.size()); ++i) {
          if (taken.count(i) == 0) others.push_back(i);
        }
        of.insert(of.end(), question.more.begin(), question.more.end());
        const int64_t wanted = std::max<int64_t>(0, size - own - more);
        for (const int64_t i : random_.Sample(static_cast<int64_t>(others.size()), wanted))
          of.push_back(others[static_cast<size_t>(i)]);
      } else {
        for (const int64_t i : random_.Sample(more, size - own)) of.push_back(question.more[static_cast<size_t>(i)]);
      }
      for (const int64_t i : of) texts.push_back(documents_[static_cast<size_t>(i)]);
    } else {
      texts = Repeated(documents_, size);
    }
    PythonRandom(seed_).Shuffle(texts);
    for (size_t i = 0; i < texts.size(); ++i) texts[i] = StrCat("Document ", i + 1, ":\n", texts[i]);
    const Template& format = TemplateOf(task_.kind);
    RulerSample sample;
    sample.prompt = Format(format.text + format.prefix, {{"query", question.text}, {"context", Joined(texts, "\n\n")}});
    sample.references = question.answers;
    return sample;
  }

 private:
  struct Question {
    std::string text;
    std::vector<std::string> answers;
    std::vector<int64_t> own, more;  // documents: those of the question, others of the same article
  };

  // The documents in order, without duplicates; returns the number of each.
  std::map<std::string, int64_t> Number(const std::set<std::string>& texts) {
    documents_.assign(texts.begin(), texts.end());
    std::map<std::string, int64_t> numbers;
    for (const std::string& text : documents_) numbers.emplace(text, static_cast<int64_t>(numbers.size()));
    return numbers;
  }
  void ReadSquad(const nlohmann::json& root) {
    std::set<std::string> texts;
    for (const auto& article : root.at("data")) {
      for (const auto& paragraph : article.at("paragraphs")) texts.insert(paragraph.at("context").get<std::string>());
    }
    const std::map<std::string, int64_t> numbers = Number(texts);
    for (const auto& article : root.at("data")) {
      for (const auto& paragraph : article.at("paragraphs")) {
        const int64_t own = numbers.at(paragraph.at("context").get<std::string>());
        for (const auto& asked : paragraph.at("qas")) {
          if (asked.value("is_impossible", false)) continue;
          Question question{asked.at("question").get<std::string>(), {}, {own}, {}};
          for (const auto& answer : asked.at("answers"))
            question.answers.push_back(answer.at("text").get<std::string>());
          for (const auto& other : article.at("paragraphs")) {
            const int64_t number = numbers.at(other.at("context").get<std::string>());
            if (number != own) question.more.push_back(number);
          }
          if (!question.answers.empty()) questions_.push_back(std::move(question));
        }
      }
    }
  }
  static std::string Page(const nlohmann::json& page) {
    std::string text = page.at(0).get<std::string>() + "\n";
    for (const auto& sentence : page.at(1)) text += sentence.get<std::string>();
    return text;
  }
  void ReadHotpot(const nlohmann::json& root) {
    std::set<std::string> texts;
    for (const auto& asked : root) {
      for (const auto& page : asked.at("context")) texts.insert(Page(page));
    }
    const std::map<std::string, int64_t> numbers = Number(texts);
    for (const auto& asked : root) {
      Question question{asked.at("question").get<std::string>(), {asked.at("answer").get<std::string>()}, {}, {}};
      for (const auto& page : asked.at("context")) question.own.push_back(numbers.at(Page(page)));
      questions_.push_back(std::move(question));
    }
  }

  std::vector<std::string> documents_;
  std::vector<Question> questions_;
};

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
  const auto samples = [&](auto&& generator) {
    try {
      return generator.Samples(count);
    } catch (const std::length_error& error) {  // while its size was looked for, where RULER ends with an error
      throw Skip(StrCat(task.name, " at ", context, " tokens: ", error.what()));
    }
  };
  switch (task.kind) {
    case RulerTask::kNiah:
      return samples(Niah(task, context, seed, tokens, data));
    case RulerTask::kVariables:
      return samples(Variables(task, context, seed, tokens));
    case RulerTask::kCommonWords:
      return samples(CommonWords(task, context, seed, tokens, data));
    case RulerTask::kFrequentWords:
      return samples(FrequentWords(task, context, seed, tokens));
    case RulerTask::kQuestions:
      return samples(Questions(task, context, seed, tokens, data));
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

WordPairs::WordPairs(std::vector<std::string> adjectives, std::vector<std::string> nouns) : nouns_(std::move(nouns)) {
  const auto unique = [](std::vector<std::string>& list) {
    std::sort(list.begin(), list.end());
    list.erase(std::unique(list.begin(), list.end()), list.end());
  };
  unique(nouns_);
  for (std::string& adjective : adjectives) adjective += '-';
  unique(adjectives);
  for (size_t i = 0; i < adjectives.size();) {
    size_t end = i + 1;  // what begins as adjectives[i] comes right behind it
    while (end < adjectives.size() && adjectives[end].starts_with(adjectives[i])) ++end;
    Block block{adjectives[i], {}, 0};
    if (end > i + 1) {
      for (; i < end; ++i) {
        for (const std::string& noun : nouns_) block.words.push_back(adjectives[i] + noun);
      }
      unique(block.words);
    } else {
      ++i;
    }
    size_ += static_cast<int64_t>(block.words.empty() ? nouns_.size() : block.words.size());
    block.end = size_;
    blocks_.push_back(std::move(block));
  }
}

std::string WordPairs::operator[](int64_t k) const {
  const auto block =
      std::upper_bound(blocks_.begin(), blocks_.end(), k, [](int64_t at, const Block& b) { return at < b.end; });
  const int64_t begin = block == blocks_.begin() ? 0 : std::prev(block)->end;
  const size_t i = static_cast<size_t>(k - begin);
  return block->words.empty() ? block->prefix + nouns_[i] : block->words[i];
}

}  // namespace kvq
