// What `reuse` (accuracy/reuse.cc) asks: one context, five questions about it.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "accuracy/needle.h"

namespace kvq {

struct Talk {
  struct Turn {
    std::string question;             // ends where the answer begins
    std::vector<std::string> wanted;  // what an answer is to contain
    std::string gold;                 // the right answer
    std::string after;                // closes an answer in the history
  };
  std::string context;
  std::vector<Turn> turns;
  char stop;  // an answer ends before it
};

inline constexpr int64_t kTurns = 5;

// A JSON object of random keys and values, as many as `context` tokens hold; each turn asks for one value (as SCBench's
// Retr.KV, arXiv:2412.10319, and Liu et al. 2023, arXiv:2307.03172).
Talk KeyValueTalk(const EncodeText& encode, int64_t context, std::mt19937_64& random);

// Five chains of three variables each, hidden in RULER's noise (Hsieh et al. 2024, arXiv:2404.06654); each turn asks for
// all variables of one value.
Talk VariableTalk(const EncodeText& encode, int64_t context, std::mt19937_64& random);

// The share of `wanted` that the answer contains up to `stop`, in any case of letters: RULER's string_match_all of one
// sample.
double MatchAll(const std::string& answer, const std::vector<std::string>& wanted, char stop);

}  // namespace kvq
