#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "accuracy/ruler_generator.h"
#include "benchmarks/measurement.h"
#include "kernels/error.h"

namespace kvq {
namespace ruler {
namespace {

// qa.py
class Questions : public Generator {
 public:
  Questions(const RulerTask& task, int64_t context, int64_t seed, const Tokens& tokens, const RulerData& data)
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

}  // namespace

std::unique_ptr<Generator> MakeQuestions(const RulerTask& task, int64_t context, int64_t seed, const Tokens& tokens,
                                         const RulerData& data) {
  return std::make_unique<Questions>(task, context, seed, tokens, data);
}

}  // namespace ruler

}  // namespace kvq
