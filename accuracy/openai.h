// The requests and answers of OpenAI's API as vLLM gives them (vllm/entrypoints/openai, of 2026), with nothing of HTTP and
// nothing of the model: JSON in, queries out; completions in, JSON out. Fields that are not known are ignored; those that
// are known to change an answer and are not supported are refused by name.
#pragma once

#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "accuracy/chat_templates.h"
#include "accuracy/completions.h"

namespace kvq {

using OrderedJson = nlohmann::ordered_json;

// An answer that is none: its HTTP status and what OpenAI's clients show.
struct ApiError : std::runtime_error {
  ApiError(int status, const std::string& message, std::string param = "")
      : std::runtime_error(message), status(status), param(std::move(param)) {}
  int status;
  std::string param;  // the field that is to blame
};

// {"error": {message, type, param, code}}.
std::string ErrorJson(int status, const std::string& message, const std::string& param = "");

// What the server serves, as far as requests and answers depend on it.
struct Served {
  std::string name;        // what `model` of a request must be
  std::string other_name;  // or this
  int64_t context = 0;     // tokens of prompt and answer together
  int64_t vocab = 0;       // the model's, which may be larger than the tokenizer's
  const Tokenizer* tokenizer = nullptr;
  const ChatTemplate* chat = nullptr;
  std::string no_chat;        // why there is none
  std::string bos, eos;       // what the template calls so
  OrderedJson kv;             // what is said of the cache in every answer, before its numbers

  // A tokenizer remembers pieces of text: one at a time.
  std::vector<int32_t> Encode(const std::string& text, bool special) const;

 private:
  mutable std::mutex mutex_;
};

// Code points of a text so far whose bytes come token by token, as it is shown: what is no UTF-8 is U+FFFD in it.
class TextOffset {
 public:
  explicit TextOffset(size_t begin = 0) : whole_(begin) {}
  void Add(const std::string& bytes);
  size_t Now() const;

 private:
  size_t whole_;
  std::string half_;  // of a character: what it is to be is not known
};

struct ApiQuery {
  bool chat = false, stream = false, include_usage = false, echo = false;
  bool logprobs = false;
  struct Prompt {
    CompletionQuery query;
    std::string text;              // what echo gives back
    std::vector<std::string> pieces;  // what each token adds to it, as bytes
  };
  std::vector<Prompt> prompts;
  int64_t work = 0;  // of all prompts: tokens of prompt and answer, times the scores that are wanted of each
  std::string id;
  int64_t created = 0;
};

// Throw ApiError where the request is wrong.
ApiQuery ParseCompletion(const std::string& body, const Served& served);
ApiQuery ParseChat(const std::string& body, const Served& served);

// The whole answer; of every prompt its completion.
OrderedJson CompletionJson(const ApiQuery& query, const Served& served, const std::vector<Completion>& answers);

// Events of a stream, each `data: {json}` and a blank line.
class CompletionEvents {
 public:
  CompletionEvents(const ApiQuery& query, const Served& served) : query_(query), served_(served) {}
  std::string Part(size_t prompt, const Completion& answer, const CompletionPart& part);
  // What is left of a prompt's answer, and why it ended.
  std::string End(size_t prompt, const Completion& answer);
  // Usage, if it was asked for, and [DONE].
  std::string Done(const std::vector<Completion>& answers) const;

 private:
  OrderedJson Choice(size_t prompt, const Completion& answer, const CompletionPart& part, std::string& before);
  OrderedJson Chunk(OrderedJson choices) const;

  const ApiQuery& query_;
  const Served& served_;
  std::optional<size_t> open_;  // the prompt whose answer has begun
  TextOffset offset_;           // of it
};

// /tokenize, /detokenize, /tokenizer_info.
OrderedJson TokenizeJson(const std::string& body, const Served& served);
OrderedJson DetokenizeJson(const std::string& body, const Served& served);
// `config`: tokenizer_config.json, or an empty object.
OrderedJson TokenizerInfoJson(const OrderedJson& config, const Tokenizer& tokenizer);

}  // namespace kvq
