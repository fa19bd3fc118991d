#include <algorithm>
#include <cmath>

#include "accuracy/ruler_generator.h"
#include "benchmarks/measurement.h"
#include "kernels/error.h"

namespace kvq {
namespace ruler {
namespace {

const std::string kUpper = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

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

}  // namespace

std::unique_ptr<Generator> MakeVariables(const RulerTask& task, int64_t context, int64_t seed, const Tokens& tokens,
                                         const RulerData&) {
  return std::make_unique<Variables>(task, context, seed, tokens);
}

}  // namespace ruler

}  // namespace kvq
