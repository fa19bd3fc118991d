// What the generators of RULER's tasks share (accuracy/ruler_tasks.h): its templates, strings as Python's methods make them,
// and the search for the size of a haystack. One file a script: ruler_niah.cc, ruler_variables.cc, ruler_words.cc,
// ruler_questions.cc.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "accuracy/python_random.h"
#include "accuracy/ruler_tasks.h"

namespace kvq::ruler {

inline constexpr char kNoise[] = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

// scripts/data/synthetic/constants.py
struct Template {
  std::string text, prefix;
};
const Template& TemplateOf(RulerTask::Kind kind);

std::string Replaced(std::string text, const std::string& from, const std::string& to);
// str.format with these fields, the context last: it may hold braces.
std::string Format(std::string text, const std::vector<std::pair<std::string, std::string>>& fields);
std::string Joined(const std::vector<std::string>& parts, const std::string& between);
std::vector<std::string> SplitAtBlanks(const std::string& text);
// The first `size` of a list that repeats.
std::vector<std::string> Repeated(const std::vector<std::string>& list, int64_t size);

using Tokens = std::function<int64_t(const std::string&)>;

// Two generators with one seed, and the search for the size of a haystack.
class Generator {
 public:
  Generator(const RulerTask& task, int64_t context, int64_t seed, const Tokens& tokens)
      : task_(task),
        context_(context),
        seed_(static_cast<uint64_t>(seed)),
        tokens_(tokens),
        random_(seed_),
        numpy_(static_cast<uint32_t>(seed)) {}
  virtual ~Generator() = default;

  std::vector<RulerSample> Samples(int64_t count);

 protected:
  // A sample with a haystack of this size. Throws std::length_error where so small a one has not enough places.
  virtual RulerSample Make(int64_t index, int64_t size) = 0;
  // What RULER calls incremental: the smallest size, and the step down where a sample became too long.
  virtual int64_t step() const = 0;
  // A size that is surely too large.
  virtual int64_t Most();
  // The last sample's example apart (vt).
  virtual void Finish(RulerSample&) {}
  virtual int64_t extra_tokens() const { return task_.new_tokens; }

  // The largest size that fits, by bisection with one sample a step.
  virtual int64_t FindSize();

  // A sample that fits: a step smaller while it does not.
  virtual RulerSample Fitting(int64_t index, int64_t size);

  static constexpr int kTries = 50;  // at the smallest size, with new words each time; RULER: for ever
  const RulerTask& task_;
  const int64_t context_;
  const uint64_t seed_;
  const Tokens& tokens_;
  PythonRandom random_;
  NumpyRandom numpy_;
};

using Maker = std::unique_ptr<Generator>(const RulerTask& task, int64_t context, int64_t seed, const Tokens& tokens,
                                         const RulerData& data);
Maker MakeNiah, MakeVariables, MakeCommonWords, MakeFrequentWords, MakeQuestions;

}  // namespace kvq::ruler
