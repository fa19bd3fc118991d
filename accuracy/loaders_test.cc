// safetensors, config.json and datasets: what is right is read, what lies is refused with one clear line.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <regex>
#include <set>

#include "accuracy/families.h"
#include "accuracy/golden.h"
#include "fixtures/dataset.h"
#include "fixtures/model_config.h"
#include "fixtures/safetensors.h"
#include "kernels/sha256.h"
#include "kernels/error.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;

// A fresh folder of this test.
fs::path Folder() {
  const fs::path dir = fs::path(testing::TempDir()) / TestName();
  fs::remove_all(dir);
  fs::create_directories(dir);
  return dir;
}

void Write(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

std::string File(const std::string& header, const std::string& data, int64_t size = -1) {
  uint64_t length = size < 0 ? header.size() : static_cast<uint64_t>(size);
  std::string prefix(8, '\0');
  std::memcpy(prefix.data(), &length, 8);
  return prefix.append(header).append(data);
}

template <typename Work>
std::string Message(const Work& work) {
  try {
    work();
  } catch (const InputError& error) {
    return error.what();
  }
  return "no error";
}

std::string ParseMessage(const std::string& file) {
  return Message([&] { ParseSafetensors(std::as_bytes(std::span(file)), "F"); });
}

constexpr char kTwo[] = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                        R"("b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]},"__metadata__":{"format":"pt"}})";

TEST(Safetensors, ReadsWhatIsThere) {
  const std::string file = File(kTwo, "abcdefghijkl");
  const auto entries = ParseSafetensors(std::as_bytes(std::span(file)), "F");
  ASSERT_EQ(entries.size(), 2u);
  EXPECT_EQ(entries.at("b").shape, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(entries.at("b").dtype, "BF16");
  EXPECT_EQ(std::memcmp(entries.at("b").data, "ijkl", 4), 0);
  // A tensor of no elements and a scalar are tensors.
  EXPECT_EQ(ParseMessage(File(R"({"e":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},)"
                              R"("s":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})", "x")), "no error");
}

TEST(Safetensors, RefusesEveryLie) {
  const auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return File("{\"a\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}",
                "12345678");
  };
  EXPECT_EQ(ParseMessage(one("F32", "[2]", "[0,8]")), "no error");
  EXPECT_NE(ParseMessage("").find("truncated"), std::string::npos);
  EXPECT_NE(ParseMessage(File(kTwo, "", 1 << 30)).find("truncated"), std::string::npos);
  EXPECT_NE(ParseMessage(File("not json", "")).find("not a JSON object"), std::string::npos);
  EXPECT_NE(ParseMessage(File("[]", "")).find("not a JSON object"), std::string::npos);
  EXPECT_NE(ParseMessage(one("F32", "[2]", "[0,80]")).find("truncated"), std::string::npos);
  EXPECT_NE(ParseMessage(one("F32", "[2]", "[8,0]")).find("data_offsets"), std::string::npos);
  EXPECT_NE(ParseMessage(one("F32", "[2]", "[-8,0]")).find("data_offsets"), std::string::npos);
  EXPECT_NE(ParseMessage(one("F32", "[2]", "[0,8,9]")).find("wants dtype"), std::string::npos);
  EXPECT_NE(ParseMessage(one("F32", "[3]", "[0,8]")).find("need 12"), std::string::npos);
  EXPECT_NE(ParseMessage(one("F32", "[-2]", "[0,8]")).find("impossible shape"), std::string::npos);
  EXPECT_NE(ParseMessage(one("F32", "[4611686018427387904,4]", "[0,8]")).find("impossible shape"), std::string::npos);
  EXPECT_NE(ParseMessage(one("F32", "[18446744073709551615]", "[0,8]")).find("impossible shape"), std::string::npos);
  EXPECT_NE(ParseMessage(one("F32", "[2.0]", "[0,8]")).find("impossible shape"), std::string::npos);
  EXPECT_NE(ParseMessage(one("F33", "[2]", "[0,8]")).find("unknown type"), std::string::npos);
  EXPECT_NE(ParseMessage(one("U8", "[4]", "[0,4]")).find("belong to no tensor"), std::string::npos);
  EXPECT_NE(ParseMessage(one("U8", "[4]", "[4,8]")).find("leaves a hole"), std::string::npos);
  EXPECT_NE(ParseMessage(File(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                              R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})", "123")).find("overlaps"),
            std::string::npos);
  EXPECT_NE(ParseMessage(File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                              R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", "12")).find("twice"),
            std::string::npos);
}

TEST(Safetensors, ReadsShardsAndFindsTheirLies) {
  const fs::path dir = Folder();
  const auto open = [&] { return Message([&] { Safetensors::Open(dir.string()); }); };
  EXPECT_NE(open().find("neither"), std::string::npos);
  Write(dir / "x1.safetensors", File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "1"));
  Write(dir / "x2.safetensors", File(R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "2"));
  const auto index = [&](const std::string& map) {
    Write(dir / "model.safetensors.index.json", "{\"weight_map\":" + map + "}");
  };
  index(R"({"a":"x1.safetensors","b":"x2.safetensors"})");
  const Safetensors files = Safetensors::Open(dir.string());
  EXPECT_EQ(std::to_integer<char>(*files.Get("b").data), '2');
  EXPECT_NE(Message([&] { files.Get("c"); }).find("tensor c is missing"), std::string::npos);
  index(R"({"a":"x1.safetensors","b":"x1.safetensors"})");
  EXPECT_NE(open().find("tensor b is not in"), std::string::npos);
  index(R"({"a":"x1.safetensors","c":"x2.safetensors"})");
  EXPECT_NE(open().find("does not say that tensor b"), std::string::npos);
  index(R"({"a":"x1.safetensors","b":"x3.safetensors"})");
  EXPECT_NE(open().find("x3.safetensors: not there"), std::string::npos);
  index(R"({"a":"../x1.safetensors"})");
  EXPECT_NE(open().find("beside it"), std::string::npos);
  index("[]");
  EXPECT_NE(open().find("weight_map"), std::string::npos);
  index("{}");
  EXPECT_NE(open().find("empty"), std::string::npos);
}

constexpr char kConfig[] = R"({"model_type":"llama","num_hidden_layers":2,"hidden_size":36,"intermediate_size":40,
  "num_attention_heads":9,"num_key_value_heads":3,"vocab_size":61,"max_position_embeddings":128,
  "rms_norm_eps":1e-6,"rope_theta":1000.0,"hidden_act":"silu","eos_token_id":[2,3]})";

TEST(ModelConfig, ReadsBothSpellings) {
  const ModelConfig config = ParseModelConfig(kConfig, "C");
  EXPECT_EQ(config.layers.size(), 2u);
  EXPECT_EQ(config.layers[1].head_dim, 4);
  EXPECT_EQ(config.layers[1].num_kv_heads, 3);
  EXPECT_EQ(config.ropes[0].theta, 1000);
  EXPECT_EQ(config.eos_token_id, 2);
  EXPECT_FALSE(config.tie_word_embeddings);
  std::string five = kConfig;
  five.replace(five.find("\"rope_theta\":1000.0"), 19, R"("rope_parameters":{"rope_type":"default","rope_theta":500.0})");
  EXPECT_EQ(ParseModelConfig(five, "C").ropes[0].theta, 500);
  EXPECT_EQ(config.dtype, "");
  for (const char* key : {"dtype", "torch_dtype"}) {
    std::string typed = kConfig;
    typed.insert(1, std::string("\"") + key + "\":\"bfloat16\",");
    EXPECT_EQ(ParseModelConfig(typed, "C").dtype, "bfloat16") << key;
  }
}

TEST(ModelConfig, RefusesByName) {
  const auto with = [](const std::string& from, const std::string& to) {
    std::string text = kConfig;
    EXPECT_NE(text.find(from), std::string::npos) << from;
    text.replace(text.find(from), from.size(), to);
    return Message([&] { ParseModelConfig(text, "C"); });
  };
  EXPECT_NE(with("{", "").find("not a JSON object"), std::string::npos);
  EXPECT_NE(with("\"hidden_size\":36", "\"hidden_size\":null").find("'hidden_size' is missing"), std::string::npos);
  EXPECT_NE(with("\"hidden_size\":36", "\"hidden_size\":-36").find("positive"), std::string::npos);
  EXPECT_NE(with("\"hidden_size\":36", "\"hidden_size\":1e99").find("positive"), std::string::npos);
  EXPECT_NE(with("\"hidden_size\":36", "\"hidden_size\":\"36\"").find("positive"), std::string::npos);
  EXPECT_NE(with("\"num_key_value_heads\":3", "\"num_key_value_heads\":2").find("multiple"), std::string::npos);
  EXPECT_NE(with("\"silu\"", "\"relu\"").find("hidden_act"), std::string::npos);
  EXPECT_NE(with("\"rope_theta\":1000.0", "\"rope_theta\":0").find("rope_theta"), std::string::npos);
  EXPECT_NE(with("\"vocab_size\"", "\"rope_scaling\":{\"rope_type\":\"longrope\"},\"vocab_size\"").find("\"longrope\""),
            std::string::npos);
  EXPECT_NE(with("\"rope_theta\":1000.0", R"("rope_parameters":{"rope_type":"llama3","rope_theta":5.0})").find("'factor' is missing"),
            std::string::npos);
}

// What a config leaves out its class has.
TEST(ModelConfig, LeavesOutWhatTransformersKnows) {
  std::set<std::string> seen;
  for (const Family& family : Families()) {
    for (const auto& [type, theirs] : family.golden["defaults"].items()) {
      SCOPED_TRACE(type);
      seen.insert(type);
      const ModelConfig config = ParseModelConfig("{\"model_type\":\"" + type + "\"}", "C");
      const LayerConfig& first = config.layers[0];
      EXPECT_EQ(config.hidden_size, theirs["hidden_size"]);
      EXPECT_EQ(config.layers.size(), theirs["layers"]);
      EXPECT_EQ(config.num_heads, theirs["heads"]);
      EXPECT_EQ(first.num_kv_heads, theirs["kv_heads"]);
      EXPECT_EQ(first.head_dim, theirs["head_dim"]);
      EXPECT_EQ(first.intermediate_size, theirs["intermediate_size"]);
      EXPECT_EQ(config.vocab_size, theirs["vocabulary"]);
      EXPECT_EQ(config.max_position_embeddings, theirs["positions"]);
      EXPECT_EQ(config.norm_eps, theirs["norm_eps"]);
      EXPECT_EQ(first.sliding_window, theirs["window"]);
      EXPECT_EQ(config.tie_word_embeddings, theirs["tied"]);
      EXPECT_EQ(config.ropes.empty() ? 0 : config.ropes[first.rope].theta, theirs["rope_theta"]);
    }
  }
  std::set<std::string> rows;
  for (const Architecture& architecture : Architectures()) rows.insert(architecture.model_type);
  EXPECT_EQ(seen, rows) << "run make_golden_models.py";
}

// Every family and shape that a file registers is in the tables: a linker that dropped an object would take its rows along.
TEST(Tables, HaveTheRowsOfEveryArchitecturesFile) {
  std::set<std::string> types, shapes;
  for (const auto& entry : fs::directory_iterator(KVQ_SOURCE_DIR "/fixtures/architectures")) {
    std::ifstream in(entry.path());
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    const auto find = [&](const std::string& row, std::set<std::string>& names) {
      const std::regex pattern(row + R"x( \w+\{\s*\{"([^"]+)")x");
      for (std::sregex_iterator at(text.begin(), text.end(), pattern), end; at != end; ++at) names.insert((*at)[1]);
    };
    const size_t before = types.size();
    find("RegisterArchitecture", types), find("RegisterShape", shapes);
    EXPECT_GT(types.size(), before) << entry.path();
  }
  for (const Architecture& architecture : Architectures()) EXPECT_EQ(types.erase(architecture.model_type), 1u) << architecture.model_type;
  for (const PublishedShape& shape : PublishedShapes()) EXPECT_EQ(shapes.erase(shape.name), 1u) << shape.name;
  EXPECT_EQ(types, std::set<std::string>());
  EXPECT_EQ(shapes, std::set<std::string>());
}

// The keys of published files, as they came.
TEST(ModelConfig, ReadsPublishedFiles) {
  const ModelConfig gemma = ParseModelConfig(R"({"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
    "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02,
    "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
    "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024}, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"}})", "gemma-3-4b-it");
  EXPECT_EQ(gemma.num_heads, 8);
  EXPECT_EQ(gemma.layers[0].num_kv_heads, 4);
  EXPECT_EQ(gemma.layers[5].head_dim, 256);
  EXPECT_EQ(gemma.layers[4].sliding_window, 1024);
  EXPECT_EQ(gemma.ropes[1].factor, 8);
  EXPECT_EQ(gemma.vocab_size, 262208);
  const ModelConfig smollm = ParseModelConfig(R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false,
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
    "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
    "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "use_cache": true, "vocab_size": 49152})", "SmolLM2-135M-Instruct");
  EXPECT_EQ(smollm.layers[0].head_dim, 64);
  const ModelConfig qwen = ParseModelConfig(R"({"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
    "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
    "vocab_size": 151936})", "Qwen2.5-1.5B");
  EXPECT_EQ(qwen.layers[0].sliding_window, 0);
  const ModelConfig gpt2 = ParseModelConfig(R"({"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
    "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
    "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257})", "gpt2");
  EXPECT_EQ(gpt2.max_position_embeddings, 1024);
  const ModelConfig phi = ParseModelConfig(FindPublishedShape("phi-4-mini")->config, "phi-4-mini");
  EXPECT_EQ(phi.ropes[0].type, "longrope");
  EXPECT_EQ(phi.ropes[0].TurnedChannels(phi.layers[0].head_dim), 96);
  // What ONNX Runtime's builder and llama.cpp's converter have for a factor of 32 over 4096.
  EXPECT_NEAR(phi.ropes[0].attention_factor, 1.1902380714238083, 1e-12);
  const ModelConfig smollm3 = ParseModelConfig(FindPublishedShape("smollm3-3b")->config, "smollm3-3b");
  for (size_t i = 0; i < smollm3.layers.size(); ++i) {
    EXPECT_EQ(smollm3.layers[i].rope, i % 4 == 3 ? LayerConfig::kNoRope : 0) << i;
    EXPECT_EQ(smollm3.layers[i].sliding_window, 0);
  }
}

TEST(ModelConfig, RefusesWhatAFamilyCannotMean) {
  for (const Family& family : Families()) {
    for (const nlohmann::json& refused : family.says.value("refuses", nlohmann::json::array())) {
      nlohmann::json config = refused["config"];
      config["model_type"] = family.says["model_type"];
      const std::string message = Message([&] { ParseModelConfig(config.dump(), "C"); });
      EXPECT_NE(message.find(refused["says"].get<std::string>()), std::string::npos) << family.name << ": " << message;
    }
  }
}

// Whatever may change the arithmetic is refused by name, in every family; what asks for nothing is not.
TEST(ModelConfig, RefusesKeysThatItDoesNotKnow) {
  const auto message = [](const std::string& type, const std::string& key) {
    return Message([&] { ParseModelConfig("{\"model_type\":\"" + type + "\"," + key + "}", "C"); });
  };
  // Keys, and the families that know what they mean.
  const std::set<std::pair<std::string, std::string>> known = {
      {"logits_scaling", "granite"}, {"attention_multiplier", "granite"}, {"no_rope_layers", "smollm3"},
      {"no_rope_layers", "llama4_text"}, {"use_qk_norm", "llama4_text"}, {"quantization_config", "gpt_oss"},
      {"n_shared_experts", "deepseek_v2"}, {"n_shared_experts", "deepseek_v3"}, {"n_shared_experts", "glm4_moe_lite"}};
  for (const Architecture& architecture : Architectures()) {
    for (const char* key : {"\"logits_scaling\":8.0", "\"use_qk_norm\":true", "\"no_rope_layers\":[0,1]",
                            "\"attention_multiplier\":0.5", "\"quantization_config\":{\"bits\":4}", "\"n_shared_experts\":1",
                            "\"compression_config\":{\"format\":\"int\"}"}) {
      const std::string name = std::string(key).substr(1, std::string(key).find('"', 1) - 1);
      if (known.contains({name, architecture.model_type})) continue;
      EXPECT_NE(message(architecture.model_type, key).find("C: '" + name + "' is "), std::string::npos)
          << architecture.model_type << " " << key;
    }
    EXPECT_EQ(message(architecture.model_type, "\"use_qk_norm\":null,\"pruned_heads\":{},\"torch_dtype\":\"float16\""), "no error");
  }
  for (const char* key : {"\"final_logit_softcapping\":1.0", "\"sliding_window\":8"}) {
    EXPECT_NE(message("llama", key).find("does not know it in a model of type llama"), std::string::npos) << key;
  }
  EXPECT_NE(message("gemma3", "\"text_config\":{\"attn_logit_softcapping\":50.0}").find("'text_config/attn_logit_softcapping'"),
            std::string::npos);
  EXPECT_NE(message("qwen2", "\"rope_scaling\":{\"rope_type\":\"default\",\"mrope_section\":[16,24,24]}")
                .find("'rope_scaling/mrope_section'"), std::string::npos);
  EXPECT_NE(message("gemma3", "\"tie_word_embeddings\":false").find("tie_word_embeddings"), std::string::npos);
}

// ---- texts

TEST(Dataset, JoinsWikiTextAsTheStudyDoes) {
  // Rows are lines with their ends; those of white space alone become empty; a blank line joins them.
  EXPECT_EQ(JoinWikiText(" \n = Title = \n \n text\n"), "\n\n = Title = \n\n\n\n\n text\n");
  EXPECT_EQ(JoinWikiText("a\nb"), "a\n\n\nb");
  EXPECT_EQ(JoinWikiText(""), "");
}

TEST(Dataset, TheStudysTextFromTheRawFile) {
  const char* shared = std::getenv("KVQ_SHARED");
  const fs::path raw = fs::path(shared ? shared : std::string(KVQ_SOURCE_DIR) + "/../shared") / "datasets/wiki.test.raw";
  if (!fs::exists(raw)) GTEST_SKIP() << raw << " is not part of the project; set KVQ_SHARED";
  const Corpus corpus = LoadCorpus("", raw.string());
  EXPECT_EQ(corpus.text.size(), 1296370u);
  EXPECT_EQ(corpus.sha256, "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83");
}

TEST(Dataset, AnyTextFileOrFolderIsACorpus) {
  const fs::path dir = Folder();
  Write(dir / "b.txt", "second");
  Write(dir / "a.txt", "first é");
  Write(dir / "c.md", "not this");
  EXPECT_EQ(LoadCorpus("", (dir / "b.txt").string()).text, "second");
  EXPECT_EQ(LoadCorpus("", dir.string()).text, "first é\n\nsecond");
  EXPECT_EQ(LoadCorpus("", (dir / "b.txt").string()).sha256, Sha256("second"));
  const char* was = std::getenv("KVQ_DATASETS");
  const std::optional<std::string> before = was != nullptr ? std::optional<std::string>(was) : std::nullopt;
  setenv("KVQ_DATASETS", dir.c_str(), 1);
  Write(dir / "wikitext2.txt", "local");
  EXPECT_EQ(LoadCorpus("wikitext2", "").text, "local");
  before ? setenv("KVQ_DATASETS", before->c_str(), 1) : unsetenv("KVQ_DATASETS");
}

TEST(Dataset, RefusesWhatIsNoText) {
  const fs::path dir = Folder();
  const auto load = [&](const std::string& name, const std::string& file) {
    return Message([&] { LoadCorpus(name, file); });
  };
  EXPECT_NE(load("", (dir / "none.txt").string()).find("is not there"), std::string::npos);
  EXPECT_NE(load("", dir.string()).find("without .txt"), std::string::npos);
  Write(dir / "empty.txt", " \n\t\n");
  EXPECT_NE(load("", (dir / "empty.txt").string()).find("must not be empty"), std::string::npos);
  for (const char* bad : {"\xff", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "ab\xe2\x82"}) {
    Write(dir / "bad.txt", bad);
    EXPECT_NE(load("", (dir / "bad.txt").string()).find("not UTF-8"), std::string::npos);
  }
  EXPECT_NE(load("no-such-text", "").find("pride-and-prejudice"), std::string::npos);
}

TEST(Dataset, ModelsByNameAndPath) {
  const auto find = [](const std::string& name) { return Message([&] { FindModel(name); }); };
  EXPECT_NE(find("gpt-5").find("smollm2-135m"), std::string::npos) << "lists the known ones";
  EXPECT_NE(find("./no/such/dir").find("not a directory"), std::string::npos);
  const fs::path dir = Folder();
  EXPECT_EQ(FindModel(dir.string()).dir, dir.string());
  const Environment cache{{"KVQ_CACHE", dir.c_str()}};
  EXPECT_NE(find("smollm2-135m").find("datasets/fetch smollm2-135m"), std::string::npos);
}

// The layout of the Hugging Face cache: files are links to blobs.
TEST(Dataset, ModelsInTheHuggingFaceCache) {
  const fs::path cache = Folder() / "cache", repository = cache / "models--owner--tiny.v2", source = GoldenPath("models/llama-mha");
  const auto snapshot = [&](const std::string& revision) {
    const fs::path dir = repository / "snapshots" / revision;
    fs::create_directories(dir);
    fs::create_directories(repository / "blobs");
    for (const auto& entry : fs::directory_iterator(source)) {
      const std::string name = entry.path().filename().string(), blob = Sha256(revision + name);
      fs::copy_file(entry.path(), repository / "blobs" / blob);
      fs::create_symlink(fs::path("../../blobs") / blob, dir / name);
    }
    return dir;
  };
  const Environment hub{{"HF_HUB_CACHE", cache.c_str()}};
  const std::string name = "owner/tiny.v2";
  const auto find = [&] { return Message([&] { FindModel(name); }); };
  EXPECT_NE(find().find("owner/tiny.v2 is not a directory, and " + repository.string()), std::string::npos) << find();
  EXPECT_NE(find().find("hf download owner/tiny.v2"), std::string::npos) << find();
  fs::create_directories(repository / "snapshots" / "0none");  // nothing of the model was wanted
  EXPECT_NE(find().find("no snapshot"), std::string::npos);
  const fs::path older = snapshot("1111"), newer = snapshot("0000");
  fs::last_write_time(older, fs::last_write_time(newer) - std::chrono::hours(1));
  EXPECT_EQ(FindModel(name).dir, newer.string());
  EXPECT_EQ(FindModel(name).name, name);
  fs::create_directories(repository / "refs");
  Write(repository / "refs" / "main", "1111");
  EXPECT_EQ(FindModel(name).dir, older.string());
  Write(repository / "refs" / "main", "2222");  // which is not there
  EXPECT_EQ(FindModel(name).dir, newer.string());
  {
    const std::string home = cache.parent_path();
    const Environment other{{"HF_HUB_CACHE", nullptr}, {"HUGGINGFACE_HUB_CACHE", nullptr}, {"HF_HOME", home.c_str()}};
    EXPECT_NE(find().find((cache.parent_path() / "hub/models--owner").string()), std::string::npos) << find();
    fs::create_directory_symlink(cache, cache.parent_path() / "hub");
    EXPECT_NE(FindModel(name).dir.find("/hub/"), std::string::npos);
  }
  {
    const Environment none{{"HF_HUB_CACHE", nullptr}, {"HUGGINGFACE_HUB_CACHE", nullptr}, {"HF_HOME", nullptr},
                           {"XDG_CACHE_HOME", nullptr}, {"HOME", "/home/nobody"}};
    EXPECT_NE(find().find("/home/nobody/.cache/huggingface/hub/models--owner--tiny.v2"), std::string::npos) << find();
  }
  // Through the links it is the same model, by its name and by its path.
  for (const std::string& way : {name, newer.string(), newer.string() + "/"}) {
    const ModelFiles files = FindModel(way);
    EXPECT_EQ(files.config().vocab_size, 420);
    EXPECT_EQ(Safetensors::Open(files.dir).entries().size(), Safetensors::Open(source.string()).entries().size());
    EXPECT_EQ(ModelSha256(files), ModelSha256(FindModel(source.string())));
  }
  // What lies at a path comes first.
  const fs::path before = fs::current_path();
  fs::current_path(cache.parent_path());
  fs::create_directories(name);
  EXPECT_EQ(FindModel(name).dir, name);
  fs::current_path(before);
}

TEST(Sha256, KnownDigestsAndFilesThatChange) {
  EXPECT_EQ(Sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const fs::path dir = Folder();
  Write(dir / "f", "abc");
  EXPECT_EQ(Sha256File((dir / "f").string()), Sha256("abc"));
  EXPECT_EQ(Sha256File((dir / "f").string()), Sha256("abc"));  // from the memo
  Write(dir / "f", "abcd");
  EXPECT_EQ(Sha256File((dir / "f").string()), Sha256("abcd"));
  EXPECT_THROW(Sha256File((dir / "g").string()), InputError);
}

}  // namespace
}  // namespace kvq
