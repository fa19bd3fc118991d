#include "accuracy/openai.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <functional>
#include <limits>
#include <random>
#include <set>

#include "fixtures/tokenizer/tokenizer_json.h"
#include "fixtures/tokenizer/unicode.h"
#include "kernels/error.h"

namespace kvq {
namespace {

using nlohmann::json;

constexpr int64_t kMostTop = 20;      // as OpenAI's and vLLM's
constexpr size_t kMostPrompts = 1024;
constexpr size_t kMostStops = 64;
constexpr size_t kMostStopBytes = 1024;   // of each
constexpr size_t kMostStopIds = 1024;
constexpr int64_t kMostWork = 4'000'000;  // ApiQuery::work
constexpr int kMostDepth = 64;        // of lists and objects in a request: nlohmann's copies and texts of them recurse
constexpr size_t kMostShown = 100;    // bytes of a wrong value that an error repeats

const char* TypeOf(int status) {
  switch (status) {
    case 400: return "BadRequestError";
    case 404: return "NotFoundError";
    case 413: return "RequestEntityTooLargeError";
    case 503: return "ServiceUnavailableError";
    default: return "InternalServerError";
  }
}

// The field, or null where it is missing.
const json& Field(const json& request, const char* key) { return Member(request, key); }

// A wrong value as an error repeats it: its beginning, cut between characters.
std::string Excerpt(const json& value) {
  std::string text = value.dump();
  if (text.size() <= kMostShown) return text;
  size_t end = kMostShown;
  while ((text[end] & 0xC0) == 0x80) --end;
  return text.substr(0, end) + "...";
}

double Number(const json& request, const char* key, double otherwise, double least, double most) {
  const json& value = Field(request, key);
  if (value.is_null()) return otherwise;
  if (!value.is_number()) throw ApiError(400, StrCat(key, " must be a number, not ", Excerpt(value)), key);
  const double number = value.get<double>();
  if (!(number >= least && number <= most)) {
    throw ApiError(400, StrCat(key, " must be from ", least, " to ", most, ", not ", Excerpt(value)), key);
  }
  return number;
}

std::optional<int64_t> Whole(const json& request, const char* key, int64_t least, int64_t most) {
  const json& value = Field(request, key);
  if (value.is_null()) return std::nullopt;
  const bool whole = value.is_number_integer() &&
                     !(value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()});
  if (!whole || value.get<int64_t>() < least || value.get<int64_t>() > most) {
    throw ApiError(400, StrCat(key, " must be a whole number from ", least, " to ", most, ", not ", Excerpt(value)), key);
  }
  return value.get<int64_t>();
}

bool Switch(const json& request, const char* key, bool otherwise) {
  const json& value = Field(request, key);
  if (value.is_null()) return otherwise;
  if (!value.is_boolean()) throw ApiError(400, StrCat(key, " must be true or false, not ", Excerpt(value)), key);
  return value.get<bool>();
}

json ParseBody(const std::string& body) {
  const auto check_depth = [](int depth, json::parse_event_t, const json&) {
    if (depth > kMostDepth) throw ApiError(400, StrCat("the body has lists or objects more than ", kMostDepth, " deep"));
    return true;
  };
  json request = json::parse(body, check_depth, /*allow_exceptions=*/false);
  if (!request.is_object()) throw ApiError(400, "the body must be a JSON object");
  return request;
}

// What would change an answer and is not supported, with the values that change nothing.
void RefuseUnsupported(const json& request) {
  static const std::vector<std::pair<const char*, std::vector<json>>> known = {
      {"n", {1}}, {"best_of", {1}}, {"suffix", {""}}, {"tools", {json::array()}}, {"tool_choice", {"none", "auto"}},
      {"functions", {json::array()}}, {"function_call", {"none", "auto"}}, {"response_format", {{{"type", "text"}}}},
      {"modalities", {{"text"}}}, {"audio", {}}, {"presence_penalty", {0}}, {"frequency_penalty", {0}},
      {"repetition_penalty", {1}}, {"logit_bias", {json::object()}}, {"min_tokens", {0}}, {"use_beam_search", {false}},
      {"length_penalty", {1}}, {"bad_words", {json::array()}}, {"allowed_token_ids", {}}, {"prompt_logprobs", {}},
      {"prompt_embeds", {}}, {"include_stop_str_in_output", {false}}, {"skip_special_tokens", {true}},
      {"truncate_prompt_tokens", {}}, {"guided_json", {}}, {"guided_regex", {}}, {"guided_choice", {}},
      {"guided_grammar", {}}, {"structured_outputs", {}}, {"chat_template", {}}, {"chat_template_kwargs", {json::object()}},
      {"documents", {json::array()}}};
  for (const auto& [key, neutral] : known) {
    const json& value = Field(request, key);
    if (value.is_null() || std::find(neutral.begin(), neutral.end(), value) != neutral.end()) continue;
    throw ApiError(400, StrCat(key, " is not supported", neutral.empty() ? "" : "; it may be left out, or " + neutral[0].dump()), key);
  }
}

void CheckModel(const json& request, const Served& served) {
  const json& model = Field(request, "model");
  if (model.is_null() || model == served.name || model == served.other_name) return;
  throw ApiError(404, StrCat("The model ", Excerpt(model), " does not exist; this server has ", served.name), "model");
}

std::vector<int32_t> ReadIds(const json& list, const Served& served, const char* key) {
  std::vector<int32_t> ids;
  for (const json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(served.vocab)) {
      throw ApiError(400, StrCat(key, ": ", Excerpt(id), " is no token id of a vocabulary of ", served.vocab), key);
    }
    ids.push_back(static_cast<int32_t>(id.get<uint64_t>()));
  }
  return ids;
}

// What each token adds to the text in front of an answer. The first of a text loses the blank that a tokenizer puts before
// every text; those that the tokenizer adds around a text, `before` and `behind` of them, add nothing.
std::vector<std::string> Pieces(const std::vector<int32_t>& ids, size_t before, size_t behind, const Tokenizer& tokenizer) {
  std::vector<std::string> pieces;
  for (size_t i = 0; i < ids.size(); ++i) {
    const bool added = i < before || i + behind >= ids.size();
    pieces.push_back(added ? "" : tokenizer.Bytes(ids[i]));
    if (i == before && pieces.back().starts_with(' ')) {
      if (tokenizer.Decode(std::span(&ids[i], 1), false) == pieces.back().substr(1)) pieces.back().erase(0, 1);
    }
  }
  return pieces;
}

std::string Joined(const std::vector<std::string>& pieces) {
  std::string all;
  for (const std::string& piece : pieces) all += piece;
  return all;
}

ApiQuery::Prompt TextPrompt(const std::string& text, bool special, bool echo, const Served& served) {
  ApiQuery::Prompt prompt;
  prompt.query.prompt = served.Encode(text, special);
  if (!echo) return prompt;
  const size_t added = prompt.query.prompt.size() - served.Encode(text, false).size();
  const size_t before = added > 0 && served.tokenizer->adds_bos() ? 1 : 0;
  prompt.text = text;
  prompt.pieces = Pieces(prompt.query.prompt, before, added - before, *served.tokenizer);
  return prompt;
}

ApiQuery::Prompt IdPrompt(const json& list, bool echo, const Served& served) {
  ApiQuery::Prompt prompt;
  prompt.query.prompt = ReadIds(list, served, "prompt");
  if (!echo) return prompt;
  prompt.pieces = Pieces(prompt.query.prompt, 0, 0, *served.tokenizer);
  prompt.text = ReplaceInvalidUtf8(Joined(prompt.pieces));
  return prompt;
}

// Hands each on before the next is read: what it refuses, it refuses early.
void ReadPrompts(const json& request, bool echo, const Served& served, const std::function<void(ApiQuery::Prompt)>& add) {
  const json& prompt = Field(request, "prompt");
  const bool special = Switch(request, "add_special_tokens", true);
  const auto all = [&](const auto& is) { return std::all_of(prompt.begin(), prompt.end(), is); };
  if (prompt.is_string()) {
    add(TextPrompt(prompt.get<std::string>(), special, echo, served));
  } else if (prompt.is_array() && !prompt.empty() && all([](const json& one) { return one.is_number(); })) {
    add(IdPrompt(prompt, echo, served));
  } else if (prompt.is_array() && !prompt.empty() && prompt.size() <= kMostPrompts &&
             (all([](const json& one) { return one.is_string(); }) || all([](const json& one) { return one.is_array(); }))) {
    for (const json& one : prompt) {
      add(one.is_string() ? TextPrompt(one.get<std::string>(), special, echo, served) : IdPrompt(one, echo, served));
    }
  } else {
    throw ApiError(400, StrCat("prompt must be a text, a list of texts, a list of token ids, or a list of such lists, of up to ",
                               kMostPrompts), "prompt");
  }
}

std::vector<std::string> ReadStops(const json& request) {
  const json& stop = Field(request, "stop");
  std::vector<std::string> stops;
  if (stop.is_null()) return stops;
  const auto add = [&](const json& one) {
    if (!one.is_string()) throw ApiError(400, StrCat("stop must be a text or a list of up to ", kMostStops, " texts"), "stop");
    const std::string& text = one.get_ref<const std::string&>();
    if (text.size() > kMostStopBytes) throw ApiError(400, StrCat("stop: texts of up to ", kMostStopBytes, " bytes"), "stop");
    if (!text.empty()) stops.push_back(text);
  };
  if (!stop.is_array()) {
    add(stop);
    return stops;
  }
  if (stop.size() > kMostStops) throw ApiError(400, StrCat("stop: at most ", kMostStops, " texts, not ", stop.size()), "stop");
  for (const json& one : stop) add(one);
  return stops;
}

// Of all prompts alike: what is drawn and what ends it.
CompletionQuery ReadSettings(const json& request, const Served& served) {
  CompletionQuery query;
  Sampling& sampling = query.sampling;
  sampling.temperature = Number(request, "temperature", 1, 0, 1000);
  sampling.top_p = Number(request, "top_p", 1, 0, 1);
  if (sampling.top_p == 0) throw ApiError(400, "top_p must be above 0", "top_p");
  sampling.min_p = Number(request, "min_p", 0, 0, 1);
  sampling.top_k = std::max<int64_t>(Whole(request, "top_k", -1, std::numeric_limits<int32_t>::max()).value_or(0), 0);
  if (const auto seed = Whole(request, "seed", std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max())) {
    sampling.seed = static_cast<uint64_t>(*seed);
  }
  query.stops = ReadStops(request);
  if (const json& ids = Field(request, "stop_token_ids"); !ids.is_null()) {
    if (!ids.is_array() || ids.size() > kMostStopIds) {
      throw ApiError(400, StrCat("stop_token_ids must be a list of up to ", kMostStopIds, " token ids"), "stop_token_ids");
    }
    query.stop_ids = ReadIds(ids, served, "stop_token_ids");
  }
  query.ignore_eos = Switch(request, "ignore_eos", false);
  return query;
}

void ReadStream(const json& request, ApiQuery& query) {
  query.stream = Switch(request, "stream", false);
  const json& options = Field(request, "stream_options");
  if (options.is_null()) return;
  if (!options.is_object()) throw ApiError(400, "stream_options must be an object", "stream_options");
  query.include_usage = query.stream && Switch(options, "include_usage", false);
}

// Adds a prompt with its settings and its answer's length; refuses what does not fit.
void Settle(ApiQuery& query, ApiQuery::Prompt prompt, const CompletionQuery& settings, std::optional<int64_t> max_tokens, const char* key,
            const Served& served) {
  std::vector<int32_t> ids = std::move(prompt.query.prompt);
  prompt.query = settings;
  prompt.query.prompt = std::move(ids);
  const auto length = static_cast<int64_t>(prompt.query.prompt.size());
  if (length == 0) throw ApiError(400, "the prompt has no tokens", "prompt");
  const int64_t left = served.context - length;
  prompt.query.max_tokens = max_tokens.value_or(std::max<int64_t>(left, 1));
  if (left < prompt.query.max_tokens) {
    throw ApiError(400, StrCat("This model's maximum context length is ", served.context, " tokens; the prompt has ", length,
                               " and ", prompt.query.max_tokens, " are asked for"), key);
  }
  query.work += (length + prompt.query.max_tokens) * (1 + settings.top);
  if (query.work > kMostWork) {
    throw ApiError(400, StrCat("tokens of prompts and answers, times 1 + the logprobs wanted of each, are more than ", kMostWork,
                               "; send fewer prompts at once"), key);
  }
  query.prompts.push_back(std::move(prompt));
}

// A message's text: as it is, or in parts, which vLLM joins by line feeds.
std::string ReadContent(const json& message) {
  const json& content = Field(message, "content");
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) throw ApiError(400, "a message's content must be a text, or a list of parts", "messages");
  std::string text;
  for (const json& part : content) {
    const json& type = Field(part, "type");
    if (type != "text") throw ApiError(400, StrCat("messages: parts of type ", Excerpt(type), " are not supported; text is"), "messages");
    const json& words = Field(part, "text");
    if (!words.is_string()) throw ApiError(400, "a part of type text must have a text", "messages");
    text += (text.empty() ? "" : "\n") + words.get<std::string>();
  }
  return text;
}

// The prompt that the model's chat template makes of `messages`.
std::string ReadMessages(const json& request, const Served& served) {
  if (served.chat == nullptr) throw ApiError(400, served.no_chat, "messages");
  const json& list = Field(request, "messages");
  if (!list.is_array() || list.empty()) throw ApiError(400, "messages must be a list of messages", "messages");
  std::vector<ChatMessage> messages;
  for (const json& message : list) {
    const json& role = Field(message, "role");
    if (role != "system" && role != "user" && role != "assistant") {
      throw ApiError(400, StrCat("messages: role ", Excerpt(role), " is not supported; system, user and assistant are"), "messages");
    }
    for (const char* key : {"tool_calls", "function_call", "reasoning_content", "reasoning", "audio"}) {
      if (const json& value = Field(message, key); !value.is_null() && !value.empty() && value != "") {
        throw ApiError(400, StrCat("messages: ", key, " is not supported"), "messages");
      }
    }
    messages.push_back({role.get<std::string>(), ReadContent(message)});
  }
  // A last message of the assistant is what the answer is to begin with.
  const bool open = messages.back().role == "assistant";
  for (const auto& [key, value] : {std::pair("continue_final_message", open), {"add_generation_prompt", !open}}) {
    if (Switch(request, key, value) != value) {
      throw ApiError(400, StrCat(key, " must be ", value ? "true" : "false", " where the last message is ", open ? "the assistant's" : "not the assistant's"), key);
    }
  }
  try {
    return RenderChat(*served.chat, messages, served.bos, served.eos);
  } catch (const InputError& error) {
    throw ApiError(400, error.what(), "messages");
  }
}

ApiQuery NewQuery(bool chat) {
  std::random_device random;
  constexpr char kDigits[] = "0123456789abcdef";
  ApiQuery query;
  query.chat = chat;
  query.id = chat ? "chatcmpl-" : "cmpl-";
  for (int i = 0; i < 32; ++i) query.id += kDigits[random() % 16];
  query.created = static_cast<int64_t>(std::time(nullptr));
  return query;
}

// ---- answers

double Shown(double logprob) { return std::max(logprob, -9999.0); }  // JSON has no infinity

size_t CodePoints(const std::string& bytes) {
  return static_cast<size_t>(std::count_if(bytes.begin(), bytes.end(), [](char byte) { return (byte & 0xC0) != 0x80; }));
}

// A token as text: where its bytes alone are no UTF-8, OpenAI's form `bytes:\xe2\x96`.
std::string TokenText(int32_t id, const Tokenizer& tokenizer) {
  const std::string bytes = tokenizer.Bytes(id);
  if (bytes.empty()) return StrCat("token_id:", id);
  if (ReplaceInvalidUtf8(bytes) == bytes) return bytes;
  std::string text = "bytes:";
  for (const char byte : bytes) {
    char escaped[8];
    std::snprintf(escaped, sizeof escaped, "\\x%02x", static_cast<unsigned char>(byte));
    text += escaped;
  }
  return text;
}

// logprobs of /v1/completions: four lists, an entry a token.
struct TokenLists {
  OrderedJson text_offset = OrderedJson::array(), token_logprobs = OrderedJson::array(), tokens = OrderedJson::array(),
              top_logprobs = OrderedJson::array();

  void AddFirst(int32_t id, size_t offset, const Tokenizer& tokenizer) {  // which nothing predicts
    text_offset.push_back(offset);
    token_logprobs.push_back(nullptr);
    tokens.push_back(TokenText(id, tokenizer));
    top_logprobs.push_back(nullptr);
  }
  void Add(const ScoredToken& token, size_t offset, const Tokenizer& tokenizer) {
    text_offset.push_back(offset);
    token_logprobs.push_back(Shown(token.chosen.logprob));
    tokens.push_back(TokenText(token.chosen.id, tokenizer));
    // Two tokens may have one text: the chosen one keeps it, others are told apart by their ids.
    OrderedJson top = OrderedJson::object();
    top[tokens.back().get<std::string>()] = Shown(token.chosen.logprob);
    for (const TokenChance& likely : token.top) {
      if (likely.id == token.chosen.id) continue;
      std::string text = TokenText(likely.id, tokenizer);
      if (top.contains(text)) text = StrCat("token_id:", likely.id);
      top[text] = Shown(likely.logprob);
    }
    top_logprobs.push_back(std::move(top));
  }
  OrderedJson Json() const {
    return {{"text_offset", text_offset}, {"token_logprobs", token_logprobs}, {"tokens", tokens}, {"top_logprobs", top_logprobs}};
  }
};

// The generated tokens; `offset` goes on by what they add.
void AddTokens(const std::vector<ScoredToken>& tokens, const Tokenizer& tokenizer, TextOffset& offset, TokenLists& lists) {
  for (const ScoredToken& token : tokens) {
    lists.Add(token, offset.Now(), tokenizer);
    if (!tokenizer.IsSpecial(token.chosen.id)) offset.Add(tokenizer.Bytes(token.chosen.id));
  }
}

// The prompt's, as far as it is scored; behind it the answer's text begins anew.
void AddPrompt(const ApiQuery::Prompt& prompt, const Completion& answer, const Tokenizer& tokenizer, TextOffset& offset,
               TokenLists& lists) {
  for (size_t i = 0; i < prompt.query.prompt.size(); ++i) {
    if (i == 0) {
      lists.AddFirst(prompt.query.prompt[0], offset.Now(), tokenizer);
    } else {
      lists.Add(answer.prompt[i - 1], offset.Now(), tokenizer);
    }
    offset.Add(prompt.pieces[i]);
  }
  offset = TextOffset(CodePoints(prompt.text));
}

// logprobs of /v1/chat/completions.
OrderedJson TokenList(const std::vector<ScoredToken>& tokens, const Tokenizer& tokenizer) {
  const auto one = [&](const TokenChance& token) -> OrderedJson {
    OrderedJson bytes = OrderedJson::array();
    for (const char byte : tokenizer.Bytes(token.id)) bytes.push_back(static_cast<unsigned char>(byte));
    return {{"token", TokenText(token.id, tokenizer)}, {"logprob", Shown(token.logprob)}, {"bytes", bytes}};
  };
  OrderedJson content = OrderedJson::array();
  for (const ScoredToken& token : tokens) {
    OrderedJson entry = one(token.chosen);
    entry["top_logprobs"] = OrderedJson::array();
    for (const TokenChance& likely : token.top) entry["top_logprobs"].push_back(one(likely));
    content.push_back(std::move(entry));
  }
  return {{"content", content}};
}

OrderedJson FinishReason(const Completion& answer) { return answer.stopped ? "stop" : "length"; }

OrderedJson StopReason(const Completion& answer) {
  if (answer.stop_id) return *answer.stop_id;
  return answer.stop_text ? OrderedJson(*answer.stop_text) : OrderedJson();
}

// Over prompts, `first` and on: usage, what the cache held, how long it took.
OrderedJson Sums(const ApiQuery& query, const Served& served, size_t first, std::span<const Completion> answers) {
  int64_t prompt = 0, generated = 0, reused = 0, stored = 0, bytes = 0;
  std::set<std::string> ran;
  std::optional<int64_t> encoded = 0;
  double prompt_s = 0, s = 0, share = 0;
  for (size_t i = 0; i < answers.size(); ++i) {
    prompt += static_cast<int64_t>(query.prompts[first + i].query.prompt.size());
    generated += static_cast<int64_t>(answers[i].tokens.size());
    reused += answers[i].reused;
    stored += answers[i].stored;
    encoded = encoded && answers[i].encoded ? std::optional(*encoded + *answers[i].encoded) : std::nullopt;
    bytes += answers[i].kv_bytes;
    ran.insert(answers[i].ran);
    share += answers[i].encoded_share / static_cast<double>(answers.size());
    prompt_s += answers[i].prompt_seconds;
    s += answers[i].seconds;
  }
  OrderedJson kv = served.kv;
  std::string kernels;
  for (const std::string& one : ran) kernels += (kernels.empty() ? "" : "; ") + one;
  kv["ran"] = kernels;
  kv.update({{"tokens", stored}, {"encoded_tokens", encoded ? OrderedJson(*encoded) : OrderedJson()}, {"kv_bytes", bytes}, {"encoded_share", share}});
  return {{"usage", {{"prompt_tokens", prompt}, {"total_tokens", prompt + generated}, {"completion_tokens", generated},
                     {"prompt_tokens_details", {{"cached_tokens", reused}}}}},
          {"kv", kv},
          {"timings", {{"prompt_n", prompt - reused}, {"prompt_ms", 1e3 * prompt_s}, {"predicted_n", generated}, {"predicted_ms", 1e3 * s}}}};
}

std::string Event(const OrderedJson& json) { return "data: " + json.dump() + "\n\n"; }

}  // namespace

void TextOffset::Add(const std::string& bytes) {
  half_ += bytes;
  const size_t certain = half_.size() - HalfCharacter(half_);
  whole_ += CodePoints(ReplaceInvalidUtf8(half_.substr(0, certain)));
  half_.erase(0, certain);
}

size_t TextOffset::Now() const { return whole_ + CodePoints(ReplaceInvalidUtf8(half_)); }

std::vector<int32_t> Served::Encode(const std::string& text, bool special) const {
  const std::lock_guard lock(mutex_);
  return tokenizer->Encode(text, special);
}

std::string ErrorJson(int status, const std::string& message, const std::string& param) {
  const OrderedJson error = {{"message", message}, {"type", TypeOf(status)}, {"param", param.empty() ? OrderedJson() : OrderedJson(param)},
                             {"code", status}};
  return OrderedJson{{"error", error}}.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

ApiQuery ParseCompletion(const std::string& body, const Served& served) {
  const json request = ParseBody(body);
  CheckModel(request, served);
  RefuseUnsupported(request);
  ApiQuery query = NewQuery(false);
  ReadStream(request, query);
  query.echo = Switch(request, "echo", false);
  CompletionQuery settings = ReadSettings(request, served);
  const std::optional<int64_t> top = Whole(request, "logprobs", 0, kMostTop);
  query.logprobs = settings.logprobs = top.has_value();
  settings.score_prompt = query.logprobs && query.echo;
  settings.top = top.value_or(0);
  const std::optional<int64_t> max_tokens = Whole(request, "max_tokens", query.echo ? 0 : 1, std::numeric_limits<int32_t>::max());
  ReadPrompts(request, query.echo, served, [&](ApiQuery::Prompt prompt) {
    Settle(query, std::move(prompt), settings, max_tokens.value_or(16), "max_tokens", served);
  });
  return query;
}

ApiQuery ParseChat(const std::string& body, const Served& served) {
  const json request = ParseBody(body);
  CheckModel(request, served);
  RefuseUnsupported(request);
  ApiQuery query = NewQuery(true);
  ReadStream(request, query);
  if (Switch(request, "echo", false)) throw ApiError(400, "echo is not supported in chats", "echo");
  CompletionQuery settings = ReadSettings(request, served);
  query.logprobs = settings.logprobs = Switch(request, "logprobs", false);
  settings.top = Whole(request, "top_logprobs", 0, kMostTop).value_or(0);
  if (settings.top > 0 && !query.logprobs) throw ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs");
  std::optional<int64_t> max_tokens = Whole(request, "max_completion_tokens", 1, std::numeric_limits<int32_t>::max());
  if (!max_tokens) max_tokens = Whole(request, "max_tokens", 1, std::numeric_limits<int32_t>::max());
  // The template has written the special tokens.
  Settle(query, TextPrompt(ReadMessages(request, served), Switch(request, "add_special_tokens", false), false, served), settings, max_tokens,
         "messages", served);
  return query;
}

OrderedJson CompletionJson(const ApiQuery& query, const Served& served, const std::vector<Completion>& answers) {
  OrderedJson choices = OrderedJson::array();
  for (size_t i = 0; i < answers.size(); ++i) {
    const Completion& answer = answers[i];
    OrderedJson logprobs;
    if (query.chat) {
      if (query.logprobs) logprobs = TokenList(answer.tokens, *served.tokenizer);
      choices.push_back({{"index", i}, {"message", {{"role", "assistant"}, {"content", answer.text}, {"refusal", nullptr}, {"tool_calls", OrderedJson::array()}}},
                         {"logprobs", logprobs}, {"finish_reason", FinishReason(answer)}, {"stop_reason", StopReason(answer)}});
      continue;
    }
    if (query.logprobs) {
      TokenLists lists;
      TextOffset offset;
      if (query.echo) AddPrompt(query.prompts[i], answer, *served.tokenizer, offset, lists);
      AddTokens(answer.tokens, *served.tokenizer, offset, lists);
      logprobs = lists.Json();
    }
    choices.push_back({{"index", i}, {"text", query.prompts[i].text + answer.text}, {"logprobs", logprobs},
                       {"finish_reason", FinishReason(answer)}, {"stop_reason", StopReason(answer)}});
  }
  OrderedJson json = {{"id", query.id}, {"object", query.chat ? "chat.completion" : "text_completion"}, {"created", query.created}, {"model", served.name},
                      {"choices", choices}};
  json.update(Sums(query, served, 0, answers));
  return json;
}

OrderedJson CompletionEvents::Chunk(OrderedJson choices) const {
  return {{"id", query_.id}, {"object", query_.chat ? "chat.completion.chunk" : "text_completion"}, {"created", query_.created}, {"model", served_.name},
          {"choices", std::move(choices)}};
}

OrderedJson CompletionEvents::Choice(size_t prompt, const Completion& answer, const CompletionPart& part, std::string& before) {
  const bool first = open_ != prompt;
  open_ = prompt;
  if (first) offset_ = TextOffset();
  if (query_.chat) {
    const auto choice = [&](OrderedJson delta, OrderedJson logprobs) -> OrderedJson {
      return {{"index", prompt}, {"delta", std::move(delta)}, {"logprobs", std::move(logprobs)}, {"finish_reason", nullptr}};
    };
    if (first) before = Event(Chunk(OrderedJson::array({choice({{"role", "assistant"}, {"content", ""}}, nullptr)})));
    return choice({{"content", part.text}}, query_.logprobs ? TokenList(part.tokens, *served_.tokenizer) : OrderedJson());
  }
  const bool echo = first && query_.echo;
  OrderedJson logprobs;
  if (query_.logprobs) {
    TokenLists lists;
    if (echo) AddPrompt(query_.prompts[prompt], answer, *served_.tokenizer, offset_, lists);
    AddTokens(part.tokens, *served_.tokenizer, offset_, lists);
    logprobs = lists.Json();
  }
  return {{"index", prompt}, {"text", (echo ? query_.prompts[prompt].text : "") + part.text}, {"logprobs", logprobs},
          {"finish_reason", nullptr}, {"stop_reason", nullptr}};
}

std::string CompletionEvents::Part(size_t prompt, const Completion& answer, const CompletionPart& part) {
  std::string before;
  OrderedJson choice = Choice(prompt, answer, part, before);
  return before + Event(Chunk(OrderedJson::array({std::move(choice)})));
}

std::string CompletionEvents::End(size_t prompt, const Completion& answer) {
  std::string before;
  OrderedJson choice = Choice(prompt, answer, answer.rest, before);
  choice["finish_reason"] = FinishReason(answer);
  choice["stop_reason"] = StopReason(answer);
  OrderedJson chunk = Chunk(OrderedJson::array({std::move(choice)}));
  const OrderedJson sums = Sums(query_, served_, prompt, std::span(&answer, 1));
  chunk["kv"] = sums["kv"];
  chunk["timings"] = sums["timings"];
  return before + Event(chunk);
}

std::string CompletionEvents::Done(const std::vector<Completion>& answers) const {
  std::string events;
  if (query_.include_usage) {
    OrderedJson chunk = Chunk(OrderedJson::array());
    chunk["usage"] = Sums(query_, served_, 0, answers)["usage"];
    events = Event(chunk);
  }
  return events + "data: [DONE]\n\n";
}

OrderedJson TokenizeJson(const std::string& body, const Served& served) {
  const json request = ParseBody(body);
  CheckModel(request, served);
  // vLLM's names and their defaults, or llama-server's.
  const bool vllm = request.contains("prompt"), chat = request.contains("messages");
  const json& given = Field(request, vllm ? "prompt" : "content");
  if (!chat && !given.is_string()) throw ApiError(400, "prompt (or content) must be a text, or messages a list", "prompt");
  const std::string text = chat ? ReadMessages(request, served) : given.get<std::string>();
  const bool special = vllm || chat ? Switch(request, "add_special_tokens", !chat) : Switch(request, "add_special", false);
  const std::vector<int32_t> ids = served.Encode(text, special);
  OrderedJson pieces;
  if (Switch(request, "return_token_strs", false)) {
    pieces = OrderedJson::array();
    for (const int32_t id : ids) pieces.push_back(served.tokenizer->Piece(id));
  }
  return {{"count", ids.size()}, {"max_model_len", served.context}, {"tokens", ids}, {"token_strs", pieces}};
}

OrderedJson DetokenizeJson(const std::string& body, const Served& served) {
  const json request = ParseBody(body);
  CheckModel(request, served);
  const json& tokens = Field(request, "tokens");
  if (!tokens.is_array()) throw ApiError(400, "tokens must be a list of token ids", "tokens");
  std::string text;
  try {
    text = served.tokenizer->Decode(ReadIds(tokens, served, "tokens"), false);
  } catch (const InputError& error) {
    throw ApiError(400, error.what(), "tokens");
  }
  return {{"prompt", text}, {"content", text}};
}

OrderedJson TokenizerInfoJson(const OrderedJson& config, const Tokenizer& tokenizer) {
  OrderedJson info = config;
  if (!info.contains("tokenizer_class")) info["tokenizer_class"] = "PreTrainedTokenizerFast";
  for (const char* key : {"bos_token", "eos_token", "pad_token", "unk_token"}) {  // an object, or its content
    if (info.contains(key) && info[key].is_object() && info[key].contains("content")) info[key] = OrderedJson(info[key]["content"]);
  }
  const auto add = [&](const char* key, const std::optional<int32_t>& id) {
    if (id && (!info.contains(key) || info[key].is_null())) info[key] = tokenizer.Piece(*id);
  };
  add("bos_token", tokenizer.bos_id());
  add("eos_token", tokenizer.eos_id());
  return info;
}

}  // namespace kvq
