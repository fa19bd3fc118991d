// For the tests of the command: a tiny model with a tokenizer and a text, in a folder of the test's
// own.
#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <span>

#include "accuracy/command.h"
#include "accuracy/golden.h"
#include "fixtures/safetensors.h"

namespace kvq {

// The tiny model of the parity tests with the tokenizer of the tokenizer tests.
class TinyModel : public testing::Test {
 protected:
  void SetUp() override {
    namespace fs = std::filesystem;
    dir_ = fs::path(testing::TempDir()) / StrCat("kvqbench_", TestName());
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    fs::copy(GoldenPath("models/llama-mha"), dir_ / "tiny", fs::copy_options::recursive);
    fs::copy(GoldenPath("tokenizer"), dir_ / "tiny", fs::copy_options::recursive);
    std::ofstream text(dir_ / "text.txt");
    for (int i = 0; i < 400; ++i) text << "The capital of France is Paris. ";
  }
  std::string Tiny() const {
    return StrCat(" --models=", (dir_ / "tiny").string(),
                  " --corpus-file=", (dir_ / "text.txt").string());
  }
  std::filesystem::path dir_;
};

// One line on stderr that has all these words, exit code 2, nothing on stdout.
inline void ExpectRefused(const Outcome& outcome, const std::vector<std::string>& words) {
  EXPECT_EQ(outcome.code, 2) << outcome.err;
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  for (const std::string& word : words) {
    EXPECT_NE(outcome.err.find(word), std::string::npos) << word << " in " << outcome.err;
  }
}

// Sets every number of a tensor, F32 or BF16, of the model in `dir`.
inline void Overwrite(const std::filesystem::path& dir, const std::string& tensor, float value) {
  std::ifstream in(dir / "model.safetensors", std::ios::binary);
  std::string file((std::istreambuf_iterator<char>(in)), {});
  const TensorEntry entry = ParseSafetensors(std::as_bytes(std::span(file)), "tiny").at(tensor);
  const size_t begin = static_cast<size_t>(reinterpret_cast<const char*>(entry.data) - file.data());
  const size_t size = entry.dtype == "F32" ? 4 : 2;
  for (size_t at = begin; at < begin + static_cast<size_t>(entry.nbytes); at += size) {
    std::memcpy(&file[at], reinterpret_cast<const char*>(&value) + sizeof value - size, size);
  }
  std::ofstream(dir / "model.safetensors", std::ios::binary) << file;
}

// Writes tensors, float32, as a safetensors file.
inline void WriteTensors(const std::filesystem::path& file, const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  nlohmann::json header;
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor weights = tensor.contiguous();
    header[name] = {{"dtype", "F32"}, {"shape", weights.sizes().vec()}, {"data_offsets", {data.size(), data.size() + weights.nbytes()}}};
    data.append(static_cast<const char*>(weights.data_ptr()), weights.nbytes());
  }
  const uint64_t length = header.dump().size();
  std::ofstream(file, std::ios::binary).write(reinterpret_cast<const char*>(&length), sizeof length) << header << data;
}

// Gives the tiny model heads of 64 channels, which the schemes can encode, and random weights.
inline void WidenHeads(const std::filesystem::path& dir) {
  nlohmann::json config = nlohmann::json::parse(std::ifstream(dir / "config.json"));
  const int64_t wider = 64 / config["head_dim"].get<int64_t>();
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  at::manual_seed(11);
  const Safetensors tiny = Safetensors::Open(dir.string());
  for (const auto& [name, entry] : tiny.entries()) {
    std::vector<int64_t> shape = entry.shape;
    for (const char* projection : {"q_proj", "k_proj", "v_proj"}) {
      if (name.find(projection) != std::string::npos) shape[0] *= wider;
    }
    if (name.find("o_proj") != std::string::npos) shape[1] *= wider;
    tensors.emplace_back(name, shape.size() == 1 ? at::ones(shape) : at::randn(shape) * 0.3);
  }
  config["head_dim"] = 64;
  std::ofstream(dir / "wide.json") << config;
  WriteTensors(dir / "wide.safetensors", tensors);
  std::filesystem::rename(dir / "wide.json", dir / "config.json");
  // The old one is still mapped.
  std::filesystem::rename(dir / "wide.safetensors", dir / "model.safetensors");
}

}  // namespace kvq
