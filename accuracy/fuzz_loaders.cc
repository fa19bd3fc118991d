// libFuzzer target of the loaders. The first byte picks one: safetensors, config.json or tokenizer.json.
// Whatever the bytes are, a loader reads them or throws InputError: anything else is a finding.
#include <cstdint>
#include <string>

#include "fixtures/model_config.h"
#include "fixtures/safetensors.h"
#include "fixtures/tokenizer.h"
#include "kernels/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    switch (data[0] % 3) {
      case 0:
        for (const auto& [name, entry] : kvq::ParseSafetensors(std::as_bytes(std::span(text)), "fuzz")) {
          // The bytes an entry promises are there.
          if (entry.nbytes > 0 && entry.data[0] == entry.data[entry.nbytes - 1]) continue;
        }
        break;
      case 1: kvq::ParseModelConfig(text, "fuzz"); break;
      default: {
        const kvq::Tokenizer tokenizer = kvq::Tokenizer::Parse(text, "", "fuzz");
        const auto ids = tokenizer.Encode("Hello <|im_end|>\xF0\x9F\x98\x80 123\n\t\xFF naïve", true);
        tokenizer.Decode(ids, true);
        tokenizer.Decode(ids, false);
      }
    }
  } catch (const kvq::InputError&) {
  }
  return 0;
}
