// What kvqserve says of the model and the cache that it serves.
#pragma once

#include <string>
#include <vector>

#include "accuracy/openai.h"
#include "accuracy/server/flags.h"
#include "fixtures/dataset.h"

namespace kvq {

// With which tokens the model ends a text: the tokenizer's, and what config.json and generation_config.json say.
std::vector<int32_t> EndIds(const ModelFiles& files, const Tokenizer& tokenizer);

// The answers to GET /v1/models and /tokenizer_info.
struct Description {
  OrderedJson models, tokenizer_info;
};
// Sets what of `served` is said of the cache and the chat template.
Description Describe(const ModelFiles& files, const Spec& spec, const Model& model, const CompletionEngine& engine,
                     const Flags& flags, bool cuda, const std::string& commit, Served& served);

}  // namespace kvq
