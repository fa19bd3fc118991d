// Checkpoints as other programs write them: transformers' own shards and tied embeddings are read; quantized weights are refused by
// name, whatever config.json says, and never taken for what they are not.
#include <ATen/ATen.h>

#include "accuracy/golden.h"
#include "accuracy/relative_error.h"
#include "accuracy/tiny_model.h"
#include "fixtures/dataset.h"
#include "fixtures/model.h"
#include "fixtures/tokenizer/tokenizer.h"
#include "kernels/error.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

TEST(CheckpointParity, WhatTransformersWritesIsRead) {
  const c10::InferenceMode guard;
  const json golden = Golden("checkpoints.json");
  EXPECT_EQ(golden.size(), 3u);
  for (const auto& [name, theirs] : golden.items()) {
    SCOPED_TRACE(name);
    const std::string dir = GoldenPath("checkpoints/" + name);
    EXPECT_EQ(fs::exists(dir + "/model.safetensors.index.json"), name.ends_with("-shards"));
    EXPECT_EQ(Safetensors::Open(dir).Has("lm_head.weight"), name.find("tied") == std::string::npos);
    const auto model = LoadModel(dir, at::kFloat, kCpu);
    KvCache cache = model->NewCache(ParseSpec("none"), 1, 64);
    const std::vector<int32_t> ids = theirs["ids"];
    const at::Tensor logits = model->Logits(model->Forward(IdTensor(ids, 1, kCpu), cache, FindBackend("eager")))[0];
    for (size_t i = 0; i < theirs["positions"].size(); ++i) {  // float32 sums in another order, as in ArchitectureParity
      EXPECT_LT(RelativeError(logits[theirs["positions"][i].get<int64_t>()], at::tensor(theirs["logits"][i].get<std::vector<float>>())), 1e-5);
    }
  }
}

// A checkpoint of a test's own: a copy of one of transformers', with its config.json and tensors changed.
class Checkpoint : public testing::Test {
 protected:
  void Copy(const std::string& name) {
    dir_ = fs::path(testing::TempDir()) / TestName();
    fs::remove_all(dir_);
    fs::copy(GoldenPath("checkpoints/" + name), dir_, fs::copy_options::recursive);
  }
  template <typename Change>
  void Config(const Change& change) {
    json config = json::parse(std::ifstream(dir_ / "config.json"));
    change(config);
    std::ofstream(dir_ / "config.json") << config;
  }
  // The one file's tensors, {name: [dtype, shape, bytes]}, written anew after `change`.
  template <typename Change>
  void Tensors(const Change& change) {
    std::map<std::string, std::tuple<std::string, std::vector<int64_t>, std::string>> tensors;
    {
      const Safetensors files = Safetensors::Open(dir_.string());
      for (const auto& [name, entry] : files.entries()) {
        tensors[name] = {entry.dtype, entry.shape, std::string(reinterpret_cast<const char*>(entry.data), static_cast<size_t>(entry.nbytes))};
      }
    }
    change(tensors);
    json header;
    std::string data;
    for (const auto& [name, tensor] : tensors) {
      const auto& [dtype, shape, bytes] = tensor;
      header[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {data.size(), data.size() + bytes.size()}}};
      data += bytes;
    }
    const uint64_t length = header.dump().size();
    fs::remove(dir_ / "model.safetensors");  // which may be mapped
    std::ofstream(dir_ / "model.safetensors", std::ios::binary).write(reinterpret_cast<const char*>(&length), sizeof length) << header.dump() << data;
  }
  void Whole() {  // of shards one file
    Tensors([](auto&) {});
  }
  std::string Refusal() {
    try {
      LoadModel(dir_.string(), at::kFloat, kCpu);
    } catch (const InputError& error) {
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
      return error.what();
    }
    return "no refusal";
  }
  void ExpectRefusal(const std::vector<std::string>& words) {
    const std::string refusal = Refusal();
    for (const std::string& word : words) EXPECT_NE(refusal.find(word), std::string::npos) << word << " in: " << refusal;
  }
  fs::path dir_;
};

// Block scales as of DeepSeek-V3 and Qwen3's fp8 checkpoints, by transformers' FineGrainedFP8Config.
TEST_F(Checkpoint, Fp8IsRefusedByItsConfigItsScalesAndItsType) {
  Copy("llama-fp8");
  ExpectRefusal({"config.json", "'quantization_config'", "quant_method \"fp8\"", "saved dequantized"});
  Config([](json& config) { config.erase("quantization_config"); });
  ExpectRefusal({"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight_scale_inv", "quantized"});
  Tensors([](auto& tensors) { std::erase_if(tensors, [](const auto& t) { return t.first.ends_with("_scale_inv"); }); });
  ExpectRefusal({"model.layers.0.self_attn.q_proj.weight", "type F8_E4M3", "F32, F16 or BF16"});
}

// compressed-tensors' formats (docs of its package): float-quantized and int-quantized have a weight of 8 bits with its scale,
// naive-quantized and fake-quantized ones a weight of 16 bits beside it, pack-quantized no weight but int32 words and a shape.
TEST_F(Checkpoint, CompressedTensorsAreRefused) {
  const std::string q = "model.layers.1.mlp.up_proj.";
  const auto compressed = [](const char* format) {
    return json{{"quant_method", "compressed-tensors"}, {"format", format}, {"config_groups", {{"group_0", {{"targets", {"Linear"}},
                {"weights", {{"num_bits", 8}, {"type", "float"}, {"strategy", "channel"}}}}}}}, {"ignore", {"lm_head"}}};
  };
  for (const char* format : {"float-quantized", "naive-quantized", "pack-quantized", "int-quantized"}) {
    SCOPED_TRACE(format);
    Copy("llama-shards");
    Config([&](json& config) { config["quantization_config"] = compressed(format); });
    ExpectRefusal({"'quantization_config'", "compressed-tensors", "saved dequantized"});
    Config([&](json& config) { config.erase("quantization_config"), config["compression_config"] = compressed(format); });
    ExpectRefusal({"'compression_config'", "saved dequantized"});
    Config([&](json& config) { config.erase("compression_config"); });
    Whole();
    EXPECT_EQ(Refusal(), "no refusal");
    Tensors([&](auto& tensors) {
      auto& [dtype, shape, bytes] = tensors.at(q + "weight");
      const int64_t rows = shape[0], columns = shape[1];
      if (std::string(format) != "pack-quantized") tensors[q + "weight_scale"] = {"BF16", {rows, 1}, std::string(static_cast<size_t>(rows) * 2, '\1')};
      if (std::string(format) == "float-quantized") dtype = "F8_E4M3", bytes.resize(bytes.size() / 2);
      if (std::string(format) == "int-quantized") dtype = "I8", bytes.resize(bytes.size() / 2);
      if (std::string(format) != "pack-quantized") return;
      tensors[q + "weight_packed"] = {"I32", {rows, columns / 8}, std::string(static_cast<size_t>(rows * columns / 2), '\1')};
      tensors[q + "weight_shape"] = {"I64", {2}, std::string(16, '\1')};
      tensors.erase(q + "weight");
    });
    if (std::string(format) == "pack-quantized") {
      ExpectRefusal({q + "weight is missing"});
    } else {
      ExpectRefusal({q + "weight", q + "weight_scale", "quantized"});
    }
  }
}

// GPTQ's and bitsandbytes' names.
TEST_F(Checkpoint, WhatOtherQuantizersWriteIsRefused) {
  for (const char* name : {"weight.absmax", "SCB", "scales", "qzeros", "g_idx", "input_scale"}) {
    Copy("qwen3-tied");
    Tensors([&](auto& tensors) { tensors[std::string("model.layers.1.self_attn.o_proj.") + name] = {"F32", {1}, std::string(4, '\1')}; });
    ExpectRefusal({"model.layers.1.self_attn.o_proj.weight", std::string("o_proj.") + name, "quantized"});
  }
}

// Tied in config.json, and a head of its own in the file: transformers ties all the same. Untied, and none there: it is missing.
TEST_F(Checkpoint, ConfigSaysWhetherTheHeadIsTied) {
  const c10::InferenceMode guard;
  const auto logits = [&] {
    const auto model = LoadModel(dir_.string(), at::kFloat, kCpu);
    KvCache cache = model->NewCache(ParseSpec("none"), 1, 8);
    return model->Logits(model->Forward(IdTensor({3, 1, 4}, 1, kCpu), cache, FindBackend("eager")));
  };
  Copy("qwen3-tied");
  const at::Tensor tied = logits();
  Tensors([](auto& tensors) {
    tensors["lm_head.weight"] = tensors.at("model.embed_tokens.weight");
    std::get<2>(tensors["lm_head.weight"]).assign(std::get<2>(tensors["lm_head.weight"]).size(), '\1');
  });
  EXPECT_TRUE(logits().equal(tied));
  Config([](json& config) { config["tie_word_embeddings"] = false; });
  EXPECT_FALSE(logits().equal(tied));
  Tensors([](auto& tensors) { tensors.erase("lm_head.weight"); });
  ExpectRefusal({"tensor lm_head.weight is missing"});
}

TEST_F(Checkpoint, AShardThatIsNotThereOrCutOffIsNamed) {
  Copy("llama-shards");
  fs::resize_file(dir_ / "model-00003-of-00005.safetensors", 3000);
  ExpectRefusal({"model-00003-of-00005.safetensors", "truncated"});
  fs::remove(dir_ / "model-00003-of-00005.safetensors");
  ExpectRefusal({"model-00003-of-00005.safetensors", "not there"});
  fs::remove(dir_ / "model.safetensors.index.json");
  ExpectRefusal({"neither model.safetensors nor model.safetensors.index.json"});
}

}  // namespace
}  // namespace kvq
