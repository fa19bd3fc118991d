// The needle prompt of the reference study: one sentence with a magic number, hidden at a depth of
// RULER's noise sentences (Hsieh et al. 2024, arXiv:2404.06654), and the question for it.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace kvq {

struct NeedlePrompt {
  std::vector<int32_t> ids;  // at most the context, cut on the right
  std::string text;
};

// Tokens of a text, with the tokenizer's default specials where `special`.
using EncodeText = std::function<std::vector<int32_t>(const std::string& text, bool special)>;

// The filler is as many sentences as fit into context - question - 10 tokens less the needle, by their
// mean length, at least one; the needle goes before sentence int(depth * count).
NeedlePrompt MakeNeedlePrompt(const EncodeText& encode, int64_t context, double depth,
                              const std::string& number);

}  // namespace kvq
