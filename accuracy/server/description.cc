#include "accuracy/server/description.h"

#include <ctime>
#include <filesystem>
#include <set>

#include "fixtures/tokenizer/tokenizer_json.h"
#include "kernels/error.h"
#include "kernels/file.h"

namespace kvq {
namespace {

using nlohmann::json;

void ReadChatTemplate(const ModelFiles& files, OrderedJson& tokenizer_info, Served& served) {
  const auto text = [&](const char* key) {
    const OrderedJson value = tokenizer_info.value(key, OrderedJson());
    return value.is_string() ? value.get<std::string>() : "";
  };
  served.bos = text("bos_token"), served.eos = text("eos_token");
  std::string chat = text("chat_template");
  const OrderedJson named = tokenizer_info.value("chat_template", OrderedJson());
  for (const OrderedJson& one : named.is_array() ? named : OrderedJson::array()) {  // several by name
    if (one.is_object() && one.value("name", "") == "default") chat = one.value("template", "");
  }
  const std::string path = files.dir + "/chat_template.jinja";  // where newer models have it
  if (chat.empty() && std::filesystem::exists(path)) chat = ReadFile(path);
  if (!chat.empty()) tokenizer_info["chat_template"] = chat;
  served.chat = FindChatTemplate(chat);
  if (served.chat != nullptr) return;
  std::string known;
  for (const ChatTemplate& one : ChatTemplates()) known += (known.empty() ? "" : ", ") + one.name;
  served.no_chat = chat.empty() ? "this model has no chat template; /v1/completions takes a prompt as it is"
                                 : StrCat("this model's chat template (sha256 ", ChatTemplateSha256(chat), ") is none of those known: ", known);
}

}  // namespace

std::vector<int32_t> EndIds(const ModelFiles& files, const Tokenizer& tokenizer) {
  std::set<int32_t> ids;
  if (tokenizer.eos_id()) ids.insert(*tokenizer.eos_id());
  for (const char* name : {"config.json", "generation_config.json"}) {
    const std::string path = files.dir + "/" + name;
    if (!std::filesystem::exists(path)) continue;
    const json config = json::parse(ReadFile(path), nullptr, /*allow_exceptions=*/false);
    const json& eos = Member(config, "eos_token_id");
    for (const json& id : eos.is_array() ? eos : json::array({eos})) {
      if (id.is_number_unsigned()) ids.insert(TokenId(id, path));
    }
  }
  return {ids.begin(), ids.end()};
}

Description Describe(const ModelFiles& files, const Spec& spec, const Model& model, const CompletionEngine& engine,
                     const Flags& flags, bool cuda, const std::string& commit, Served& served) {
  Description description;
  const auto both = [](const auto& keys, const auto& values) { return keys == values ? StrCat(keys) : StrCat(keys, "+", values); };
  served.kv = {{"spec", spec.text}};
  if (!spec.meaning.empty()) served.kv["meaning"] = spec.meaning;
  served.kv.update({{"residual", both(spec.keys.residual_length, spec.values.residual_length)}, {"sinks", spec.sink_tokens},
                     {"call_tokens", spec.CallTokens()}, {"dtype", c10::toString(model.dtype())},
                     {"kv_dtype", c10::toString(model.kv_dtype())}, {"device", cuda ? "cuda" : "cpu"},
                     {"backend", flags.backend}, {"ran", engine.ran()}, {"reuse", flags.reuse && spec.policy != Policy::kHf}});
  const std::string path = files.dir + "/tokenizer_config.json";
  OrderedJson config = OrderedJson::object();
  if (std::filesystem::exists(path)) config = OrderedJson::parse(ReadFile(path));
  description.tokenizer_info = TokenizerInfoJson(config, *served.tokenizer);
  ReadChatTemplate(files, description.tokenizer_info, served);
  OrderedJson meta = served.kv;
  meta.update({{"commit", commit}, {"model_sha256", ModelSha256(files)}, {"tokenizer_sha256", TokenizerSha256(files.dir)},
               {"n_vocab", served.vocab}, {"n_ctx_train", model.config().max_position_embeddings}});
  const std::time_t now = std::time(nullptr);
  description.models = {{"object", "list"},
             {"data", OrderedJson::array({{{"id", served.name}, {"object", "model"}, {"created", now}, {"owned_by", "kvqbench"},
                                           {"root", served.name}, {"parent", nullptr}, {"max_model_len", served.context},
                                           {"permission", OrderedJson::array()}, {"meta", meta}}})}};
  return description;
}

}  // namespace kvq
