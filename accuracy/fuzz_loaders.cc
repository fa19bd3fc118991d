// libFuzzer target of the loaders. The first byte picks one: safetensors, config.json, tokenizer.json,
// tokenizer.model, vocab.json and merges.txt with a zero byte between them, a results file, or a spec.
// Whatever the bytes are, a loader reads them or throws InputError: anything else is a finding.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "benchmarks/results_file.h"
#include "fixtures/cache/spec.h"
#include "fixtures/model_config.h"
#include "fixtures/safetensors.h"
#include "fixtures/tokenizer/tokenizer.h"
#include "fixtures/tokenizer/tokenizer_formats.h"
#include "kernels/error.h"
#include "kernels/runtime/launch.h"
#include "kernels/runtime/scratch.h"

// Rows of the table of schemes link with what launches their kernels; nothing is encoded here.
namespace kvq {
std::string JoinInstance(const std::string&, const std::vector<std::string>&) { abort(); }
void LaunchRaw(const char*, const KernelLaunch&, void*, const std::vector<size_t>&, void**) { abort(); }
const DeviceShape& CurrentDevice() { abort(); }
Scratch::Scratch(int64_t, void*) { abort(); }
Scratch::~Scratch() { abort(); }
}  // namespace kvq

namespace {

void Expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  abort();
}

void Use(const kvq::Tokenizer& tokenizer) {
  const auto ids = tokenizer.Encode(
      "Hello <|im_end|>\xF0\x9F\x98\x80 123\n\t\xFF nai\u0308ve \u0323\u0301\u2581 don't  </s> \uAC00", true);
  tokenizer.Decode(ids, true);
  tokenizer.Decode(ids, false);
}

// What a run does with a file that is there; `flags` says how.
void Use(const std::string& text, unsigned flags) {
  kvq::ResultsFile file("");
  file.TakeUp(text);
  std::vector<std::string> there;
  for (const kvq::StoredCell& cell : file.cells()) there.push_back(cell.text);
  const auto expect_kept = [&](const kvq::ResultsFile& now) {
    for (size_t i = 0; i < there.size(); ++i) Expect(now.cells()[i].text == there[i], "a cell has changed");
  };
  if (file.Fact("kvqbench_build").empty() && there.empty()) return;  // most of what is no such file
  const bool patch = flags & 1;
  file.Join(R"({"context": {"date": "now", "kvqbench_build": "fuzz", "kvqbench_commit": "c", "dtype": "Float",
    "model tiny": "sha256:0", "model_config tiny": "{}", "kv_dtype tiny": "Float"}, "benchmarks": [)",
            patch);
  if (patch) {
    file.BeginPatch("kv_size", file.PatchNames("kv_size"), false);
  } else {
    file.Add(R"({"name": "new", "run_name": "new", "real_time": 1})");
    Expect(file.Find("new") != nullptr, "what was added is not there");
  }
  if (file.Find("new") == nullptr || file.Place("new") >= there.size()) expect_kept(file);
  kvq::ResultsFile again("");
  again.TakeUp(file.Text());
  Expect(again.cells().size() == file.cells().size(), "cells were lost in writing");
  expect_kept(again);
  Expect(again.Text() == file.Text(), "written and read again it is another file");
}

void UseSpec(const std::string& text) {
  const kvq::Spec spec = kvq::ParseSpec(text);
  spec.stores_dense();
  const kvq::CacheShape latent{1, {{1, 512, 64}, {1, 512, 64}}};
  const kvq::CacheShape mixed{2, {{8, 128}, {1, 256}, {3, 80}, {.kv_heads = 2, .head_dim = 64, .window = 16}}};
  for (const kvq::CacheShape& shape :
       {kvq::CacheShape::Uniform(4, 1, 2, 64), kvq::CacheShape::Uniform(1, 1, 1, 1), mixed, latent}) {
    try {
      kvq::CheckSpec(spec, shape);
    } catch (const kvq::InputError&) {
      continue;
    }
    // What was allowed has a size.
    for (size_t layer = 0; layer < shape.layers.size(); ++layer) {
      for (const kvq::LayerSide& side : kvq::SidesOf(spec, shape, static_cast<int64_t>(layer))) {
        if (!side.encodes()) continue;
        const int64_t tokens = 1024 * side.codec->min_block_tokens;
        Expect(kvq::EncodedBytes(*side.codec, spec.Params(*side.codec), shape.batch, side.heads, side.channels, tokens) > 0,
               "no bytes");
      }
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  const unsigned flags = data[0] >> 3;
  nlohmann::json config = nlohmann::json::object();
  try {
    switch (data[0] % 8) {
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
      case 4: {
        const size_t zero = std::min(text.find('\0'), text.size());
        const auto vocabulary = nlohmann::json::parse(text.substr(0, zero), nullptr, false);
        if (!vocabulary.is_object()) break;
        config["tokenizer_class"] = flags & 1 ? "Qwen2Tokenizer" : "GPT2Tokenizer";
        const std::string merges = text.substr(std::min(zero + 1, text.size()));
        const nlohmann::json root = kvq::FromGpt2(vocabulary, merges, config, "fuzz");
        Use(kvq::Tokenizer::FromJson(root, config, "fuzz"));
        break;
      }
      case 5: Use(text, flags); break;
      case 6: UseSpec(text); break;
      default: break;
    }
  } catch (const kvq::InputError&) {
  }
  return 0;
}
