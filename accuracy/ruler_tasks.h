// RULER's tasks (Hsieh et al. 2024, arXiv:2404.06654) as its scripts make them: NVIDIA/RULER at c3f5e3b,
// scripts/data/synthetic/*.py, scripts/synthetic.yaml, scripts/eval/synthetic/constants.py, template `base`. With a
// tokenizer's counts and a seed the prompts are those of RULER byte for byte, save for what is drawn from data that
// cannot be had here: essays are the catalogue's text, split into sentences by a rule of our own. Beside the 13 tasks
// easier rungs, which the same scripts make: niah_keys_K, K needles of one key each in noise of which one is asked for,
// and vt_hops_H.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace kvq {

struct RulerTask {
  enum Kind { kNiah, kVariables, kCommonWords, kFrequentWords, kQuestions };
  enum Haystack { kNoise, kEssay, kNeedles };
  std::string name;
  std::string what;  // one line for --help
  Kind kind = kNiah;
  int64_t new_tokens = 128;
  Haystack haystack = kNoise;
  bool uuid_keys = false, uuid_values = false;  // otherwise words and numbers
  int64_t keys = 1, values = 1, queries = 1;
  int64_t hops = 4;
  bool squad = false;  // otherwise HotpotQA

  bool words() const { return (kind == kNiah && !uuid_keys) || kind == kCommonWords; }  // of wonderwords
  bool part() const { return kind == kQuestions; }  // any reference is enough (MatchPart)
};

const std::vector<RulerTask>& RulerTasks();

struct RulerSample {
  std::string prompt;  // RULER's `input` and `answer_prefix`
  size_t prefix = 0;   // where the latter begins
  int64_t length = 0;  // tokens of the prompt, no special ones among them, and new ones
  std::vector<std::string> references;
  // What the context offers beside them as an answer of the same kind, in its order: values of other keys, the
  // variables of vt's example, words that are less common. RULER does not list them; nothing is drawn for them.
  std::vector<std::string> distractors;
};

// A continuation of a prompt in pieces; those with `value` are scored, what lies between them is form.
struct AnswerPiece {
  std::string text;
  bool value;
};
// All references one after the other, as the prompt's own words ask for them; and one of them alone, as the first.
std::vector<AnswerPiece> WholeAnswer(const RulerTask& task, const std::vector<std::string>& references);
std::vector<AnswerPiece> FirstAnswer(const RulerTask& task, const std::string& reference);

// What the tasks are made of; each task wants a part of it only.
struct RulerData {
  std::vector<std::string> nouns, adjectives, verbs;  // wonderwords 3.0.1
  std::string essay;                                  // any text
  std::string questions;                              // SQuAD's or HotpotQA's JSON
  std::string questions_name;                         // its file, for errors
};

// The first `count` samples of at most `context` tokens. `tokens` counts those of a text, without special ones. Throws
// InputError for data that are not what they should be, and Skip (benchmarks/measurement.h) where the task does not fit
// into the context: RULER's scripts would try for ever.
std::vector<RulerSample> MakeRulerSamples(const RulerTask& task, int64_t context, int64_t count, int64_t seed,
                                          const std::function<int64_t(const std::string& text)>& tokens,
                                          const RulerData& data);

// An answer as RULER's evaluation reads it: stripped, control characters as line ends, stripped again.
std::string RulerAnswer(const std::string& text);
// Which of the references are in an answer, upper and lower case the same (of ASCII's letters; RULER: of all).
std::vector<bool> FoundReferences(const std::string& answer, const std::vector<std::string>& references);
// string_match_all and string_match_part of one sample, from 0 to 1: the share of references found; whether any was.
double MatchAll(const std::vector<bool>& found);
double MatchPart(const std::vector<bool>& found);

// The k-th of all `adjective-noun` in order, without duplicates; six million of them, none of which is kept.
class WordPairs {
 public:
  WordPairs(std::vector<std::string> adjectives, std::vector<std::string> nouns);
  int64_t size() const { return size_; }
  std::string operator[](int64_t k) const;

 private:
  // Words that begin with one adjective, or, where one adjective begins as another ("blue", "blue-eyed"), with any of
  // them.
  struct Block {
    std::string prefix;
    std::vector<std::string> words;  // empty: prefix and every noun
    int64_t end;                     // the number of words up to here
  };
  std::vector<std::string> nouns_;
  std::vector<Block> blocks_;
  int64_t size_ = 0;
};

}  // namespace kvq
