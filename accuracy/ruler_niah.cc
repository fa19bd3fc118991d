#include <algorithm>
#include <cmath>
#include <optional>

#include "accuracy/ruler_generator.h"
#include "kernels/error.h"

namespace kvq {
namespace ruler {
namespace {

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

// niah.py
class Niah : public Generator {
 public:
  Niah(const RulerTask& task, int64_t context, int64_t seed, const Tokens& tokens,
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

}  // namespace

std::unique_ptr<Generator> MakeNiah(const RulerTask& task, int64_t context, int64_t seed, const Tokens& tokens,
                                    const RulerData& data) {
  return std::make_unique<Niah>(task, context, seed, tokens, data);
}

}  // namespace ruler

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
