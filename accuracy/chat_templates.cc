#include "accuracy/chat_templates.h"

#include <algorithm>
#include <array>

#include "fixtures/tokenizer/unicode.h"
#include "kernels/error.h"
#include "kernels/sha256.h"

namespace kvq {

struct ChatWriter {
  const std::string &bos, &eos;
  const std::vector<std::string>& words;
  bool open;  // the last message is an assistant's, which is not closed
};

namespace {

using Messages = std::vector<ChatMessage>;

// Python's str.strip().
std::string Trim(const std::string& text) {
  static const std::vector<std::string> kSpaces = {"\t", "\n", "\v", "\f", "\r", "\x1c", "\x1d", "\x1e", "\x1f", " ", "\u0085", "\u00a0",
      "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200a", "\u2028",
      "\u2029", "\u202f", "\u205f", "\u3000"};
  const std::vector<std::string_view> letters = Characters(text);
  const auto is_space = [](std::string_view letter) { return std::find(kSpaces.begin(), kSpaces.end(), letter) != kSpaces.end(); };
  size_t begin = 0, end = letters.size();
  while (begin < end && is_space(letters[begin])) ++begin;
  while (begin < end && is_space(letters[end - 1])) --end;
  std::string trimmed;
  for (; begin < end; ++begin) trimmed += letters[begin];
  return trimmed;
}

std::string StripLineFeeds(const std::string& text, bool left, bool right) {
  const size_t begin = left ? text.find_first_not_of('\n') : 0;
  if (begin == std::string::npos || text.empty()) return "";
  const size_t end = right ? text.find_last_not_of('\n') : text.size() - 1;
  return end == std::string::npos ? "" : text.substr(begin, end + 1 - begin);
}

bool IsLast(const Messages& messages, size_t i) { return i + 1 == messages.size(); }

// A user's message first, then in turn.
void CheckTurns(const Messages& messages, size_t begin) {
  for (size_t i = begin; i < messages.size(); ++i) {
    if ((messages[i].role == "user") != ((i - begin) % 2 == 0)) {
      throw InputError("this model's chat template wants messages of user and assistant in turn");
    }
  }
}

// words: the system's text where there is none, empty for none.
std::string WriteChatMl(const ChatWriter& how, const Messages& messages) {
  std::string text;
  if (!how.words[0].empty() && messages[0].role != "system") text += "<|im_start|>system\n" + how.words[0] + "<|im_end|>\n";
  for (size_t i = 0; i < messages.size(); ++i) {
    text += "<|im_start|>" + messages[i].role + "\n" + messages[i].content;
    if (!(how.open && IsLast(messages, i))) text += "<|im_end|>\n";
  }
  return how.open ? text : text + "<|im_start|>assistant\n";
}

// ChatML, but thoughts are dropped from answers before the last question, and the last answer has some, if empty ones.
std::string WriteQwen3(const ChatWriter& how, const Messages& messages) {
  size_t last_question = messages.size() - 1;
  for (size_t i = messages.size(); i-- > 0;) {
    const std::string& content = messages[i].content;
    if (messages[i].role == "user" && !(content.starts_with("<tool_response>") && content.ends_with("</tool_response>"))) {
      last_question = i;
      break;
    }
  }
  std::string text;
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& [role, whole] = messages[i];
    std::string content = whole, thought;
    if (role == "assistant") {
      const size_t end = whole.rfind("</think>");
      if (end != std::string::npos) {
        content = StripLineFeeds(whole.substr(end + 8), true, false);
        thought = StripLineFeeds(whole.substr(0, whole.find("</think>")), false, true);
        if (const size_t begin = thought.rfind("<think>"); begin != std::string::npos) thought = thought.substr(begin + 7);
        thought = StripLineFeeds(thought, true, true);
      }
      if (i > last_question && (IsLast(messages, i) || !thought.empty())) {
        content = "<think>\n" + thought + "\n</think>\n\n" + StripLineFeeds(content, true, false);
      }
    }
    text += "<|im_start|>" + role + "\n" + content;
    if (!(how.open && IsLast(messages, i))) text += "<|im_end|>\n";
  }
  return how.open ? text : text + "<|im_start|>assistant\n";
}

// words: what stands before the system's text, in a message that is always there; empty: none.
std::string WriteLlama3(const ChatWriter& how, const Messages& messages) {
  const auto head = [](const std::string& role) { return "<|start_header_id|>" + role + "<|end_header_id|>\n\n"; };
  std::string text = how.bos;
  size_t begin = 0;
  if (!how.words[0].empty()) {
    const bool system = messages[0].role == "system";
    text += head("system") + how.words[0] + (system ? Trim(messages[0].content) : "") + "<|eot_id|>";
    begin = system;
  }
  for (size_t i = begin; i < messages.size(); ++i) {
    text += head(messages[i].role) + Trim(messages[i].content);
    if (!(how.open && IsLast(messages, i))) text += "<|eot_id|>";
  }
  return how.open ? text : text + head("assistant");
}

// words: before [INST], before an answer, behind its end.
std::string WriteMistral(const ChatWriter& how, const Messages& messages) {
  CheckTurns(messages, 0);
  std::string text = how.bos;
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& [role, content] = messages[i];
    if (role == "system") throw InputError("this model's chat template takes messages of user and assistant only");
    if (role == "user") {
      text += how.words[0] + "[INST] " + content + " [/INST]";
    } else {
      text += how.words[1] + content;
      if (!(how.open && IsLast(messages, i))) text += how.eos + how.words[2];
    }
  }
  return text;
}

// The system's text stands in the last question, if a question is last.
std::string WriteNemo(const ChatWriter& how, const Messages& messages) {
  const size_t begin = messages[0].role == "system";
  CheckTurns(messages, begin);
  std::string text = how.bos;
  for (size_t i = begin; i < messages.size(); ++i) {
    const auto& [role, content] = messages[i];
    if (role == "user") {
      text += "[INST]" + (IsLast(messages, i) && begin == 1 ? messages[0].content + "\n\n" : "") + content + "[/INST]";
    } else if (role == "assistant") {
      text += content + (how.open && IsLast(messages, i) ? "" : how.eos);
    } else {
      throw InputError("this model's chat template takes the system's message first alone");
    }
  }
  return text;
}

// words: "bos" or nothing; "system" where its text goes before the first question, else it is refused.
std::string WriteGemma(const ChatWriter& how, const Messages& messages) {
  const bool system = messages[0].role == "system";
  if (system && how.words[1].empty()) throw InputError("this model's chat template takes no message of the system");
  const size_t begin = system;
  CheckTurns(messages, begin);
  std::string text = how.words[0].empty() ? "" : how.bos;
  for (size_t i = begin; i < messages.size(); ++i) {
    const std::string role = messages[i].role == "assistant" ? "model" : messages[i].role;
    text += "<start_of_turn>" + role + "\n" + (system && i == begin ? messages[0].content + "\n\n" : "") + Trim(messages[i].content);
    if (!(how.open && IsLast(messages, i))) text += "<end_of_turn>\n";
  }
  return how.open ? text : text + "<start_of_turn>model\n";
}

}  // namespace

const std::vector<ChatTemplate>& ChatTemplates() {
  static const std::vector<ChatTemplate> templates = {
      {"153280e3ff55d19da1398bdb3914ee2a51b80429bfaedde11d7d216c39db80f3", "ChatML", WriteChatMl, {""}},
      {"793202280c0910ab26bc6eb57c8212c2417324c6d8c4efd0d10d59092ab3e3eb", "Qwen2-Instruct", WriteChatMl,  // and 1.5
       {"You are a helpful assistant."}},
      {"a18cc698dd45623eb707279d08e66f7bb8d76afc89ead84016b88487b395b5cc", "Qwen2.5-Instruct", WriteChatMl,
       {"You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}},
      {"872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788", "SmolLM2-Instruct", WriteChatMl,
       {"You are a helpful AI assistant named SmolLM, trained by Hugging Face"}},
      {"2df317a15cbc983d9602cc391d33be17237d47ec7eb11ead80fae277143958aa", "Qwen3", WriteQwen3, {}},
      {"ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122", "Meta-Llama-3-Instruct", WriteLlama3, {""}},
      {"b48c47f6443892716176eb200bf4ef108f64e06ca26ed0fa8ebc0a4b3992fcb2", "Meta-Llama-3-Instruct-first", WriteLlama3, {""}},
      {"99799a835a31e1d33c4a9c7ee8a0de3923b291a95155ed6dc8efcbd0fe1d0238", "Llama-3.1-Instruct", WriteLlama3,  // and 3.3
       {"Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"}},
      {"7e995b379ec01747807246483647cd99030abf331653f1119e16d7ac041a3495", "Mistral-7B-Instruct-v0.1", WriteMistral, {"", "", " "}},
      {"26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7", "Mistral-7B-Instruct-v0.2", WriteMistral, {"", "", ""}},
      {"046388a492ef370b38e94cd755a62ed17ee18afbefe01df64d48a9da985005e0", "Mixtral-8x7B-Instruct-v0.1", WriteMistral, {" ", " ", ""}},
      {"1127255163dd25a2fd472f9901035aa9e78dc77ca33efdd010f5c8ea87e5d436", "Mistral-Nemo-Instruct-2407", WriteNemo, {}},
      {"3919b9309d8949ee8f4b710215987700f87dc5bb0e87bf24dd39189ec65e3eec", "gemma-7b-it", WriteGemma, {"", ""}},
      {"ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6", "gemma-2-it", WriteGemma, {"bos", ""}},
      {"8d9e3a3c114fb2053ec500184677af4f7e5f8ec2582443cd535834e68b3ade29", "gemma-3-it", WriteGemma, {"bos", "system"}}};
  return templates;
}

std::string ChatTemplateSha256(const std::string& text) {
  const size_t end = text.find_last_not_of(" \t\r\n");
  return Sha256(ReplaceAll(text.substr(0, end == std::string::npos ? 0 : end + 1), "\\n", "\n"));
}

const ChatTemplate* FindChatTemplate(const std::string& text) {
  const std::string sha256 = ChatTemplateSha256(text);
  for (const ChatTemplate& chat : ChatTemplates()) {
    if (chat.sha256 == sha256) return &chat;
  }
  return nullptr;
}

std::string RenderChat(const ChatTemplate& chat, const std::vector<ChatMessage>& messages, const std::string& bos, const std::string& eos) {
  if (messages.empty()) throw InputError("messages must not be empty");
  return chat.write({bos, eos, chat.words, messages.back().role == "assistant"}, messages);
}

}  // namespace kvq
