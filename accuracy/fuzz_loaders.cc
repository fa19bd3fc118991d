// libFuzzer target of the loaders. The first byte picks one: safetensors, config.json, tokenizer.json,
// tokenizer.model, or vocab.json and merges.txt with a zero byte between them.
// Whatever the bytes are, a loader reads them or throws InputError: anything else is a finding.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "fixtures/model_config.h"
#include "fixtures/safetensors.h"
#include "fixtures/tokenizer/tokenizer.h"
#include "fixtures/tokenizer/tokenizer_formats.h"
#include "kernels/error.h"

namespace {

void Use(const kvq::Tokenizer& tokenizer) {
  const auto ids = tokenizer.Encode(
      "Hello <|im_end|>\xF0\x9F\x98\x80 123\n\t\xFF nai\u0308ve \u0323\u0301\u2581 don't  </s> \uAC00", true);
  tokenizer.Decode(ids, true);
  tokenizer.Decode(ids, false);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  nlohmann::json config = nlohmann::json::object();
  try {
    switch (data[0] % 5) {
      case 0:
        for (const auto& [name, entry] : kvq::ParseSafetensors(std::as_bytes(std::span(text)), "fuzz")) {
          // The bytes an entry promises are there.
          if (entry.nbytes > 0 && entry.data[0] == entry.data[entry.nbytes - 1]) continue;
        }
        break;
      case 1: kvq::ParseModelConfig(text, "fuzz"); break;
      case 2: Use(kvq::Tokenizer::Parse(text, "", "fuzz")); break;
      case 3: {
        const nlohmann::json root = kvq::FromSentencePiece(text, config, "fuzz");
        Use(kvq::Tokenizer::FromJson(root, config, "fuzz"));
        break;
      }
      default: {
        const size_t zero = std::min(text.find('\0'), text.size());
        const auto vocabulary = nlohmann::json::parse(text.substr(0, zero), nullptr, false);
        if (!vocabulary.is_object()) break;
        config["tokenizer_class"] = data[0] & 128 ? "Qwen2Tokenizer" : "GPT2Tokenizer";
        const std::string merges = text.substr(std::min(zero + 1, text.size()));
        const nlohmann::json root = kvq::FromGpt2(vocabulary, merges, config, "fuzz");
        Use(kvq::Tokenizer::FromJson(root, config, "fuzz"));
      }
    }
  } catch (const kvq::InputError&) {
  }
  return 0;
}
