// What a model's chat template, a program in Jinja, makes of messages of text: those of the families that people run, each
// known by the hash of its text. Any other is refused: a prompt that is nearly the template's measures another model.
#pragma once

#include <string>
#include <vector>

namespace kvq {

struct ChatMessage {
  std::string role, content;  // system, user or assistant
};

struct ChatWriter;  // how a template of a family differs from the others

struct ChatTemplate {
  std::string sha256;  // of the text without white space at its end, its escaped line feeds as line feeds
  std::string name;    // of the models that have it
  std::string (*write)(const ChatWriter& how, const std::vector<ChatMessage>& messages);
  std::vector<std::string> words;  // the family's function knows which
};

const std::vector<ChatTemplate>& ChatTemplates();

// The one with this text, or null.
const ChatTemplate* FindChatTemplate(const std::string& text);
std::string ChatTemplateSha256(const std::string& text);

// The prompt for an assistant's answer; where the last message is an assistant's, it goes on with that. Throws InputError
// where the template refuses the order of roles.
std::string RenderChat(const ChatTemplate& chat, const std::vector<ChatMessage>& messages, const std::string& bos, const std::string& eos);

}  // namespace kvq
