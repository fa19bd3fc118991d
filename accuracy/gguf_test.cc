// Models as llama.cpp has them: GGUF files that its own converter made from tiny random models of transformers
// (accuracy/make_golden_gguf.py), given to the loaders as users give them.
#include <ATen/ATen.h>
#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "accuracy/command.h"
#include "accuracy/golden.h"
#include "fixtures/dataset.h"
#include "fixtures/gguf.h"
#include "fixtures/model.h"
#include "fixtures/tokenizer/tokenizer.h"
#include "kernels/error.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;

// A cache of this test's own, with the packages of the real one.
class OwnCache {
 public:
  ~OwnCache() { fs::remove_all(dir_); }
  const fs::path& dir() const { return dir_; }

 private:
  static fs::path Make() {
    const fs::path dir = fs::path(testing::TempDir()) / TestName();
    fs::remove_all(dir);
    fs::create_directories(dir);
    fs::create_directory_symlink(CacheDir() + "/downloads", dir / "downloads");
    return dir;
  }
  const fs::path dir_ = Make();
  const Environment environment_{{"KVQ_CACHE", dir_.c_str()}};
};

class GgufParity : public testing::TestWithParam<std::string> {};

std::vector<std::string> FileNames() {
  const nlohmann::json golden = Golden("gguf.json");
  std::vector<std::string> names;
  for (const auto& [name, unused] : golden.items()) names.push_back(name);
  return names;
}

TEST_P(GgufParity, LogitsAndTokensEqualTransformers) {
  const OwnCache cache_dir;
  const c10::InferenceMode guard;
  const ModelFiles files = FindModel(GoldenPath("gguf/" + GetParam() + ".gguf"));
  const nlohmann::json golden = Golden("gguf.json")[GetParam()];
  const std::unique_ptr<Model> model = LoadModel(files.dir, at::kFloat, {at::Device(at::kCPU)});
  KvCache cache(ParseSpec("none"), model->cache_shape(1), 64, at::kFloat, at::Device(at::kCPU));
  const at::Tensor logits = model->Logits(
      model->Forward(IdTensor(golden["ids"], 1, at::kCPU), cache, FindBackend("sdpa")))[0];
  for (size_t i = 0; i < golden["positions"].size(); ++i) {
    const at::Tensor theirs = at::tensor(golden["logits"][i].get<std::vector<float>>());
    const at::Tensor ours = logits[golden["positions"][i].get<int64_t>()];
    // The weights are the same bit for bit, but for what float16 cannot say (below 6e-5) and for norms to which one was
    // added and taken away again (6e-8). float32 sums differ: 7e-7 were seen.
    EXPECT_LT(((ours - theirs).norm() / theirs.norm()).item<double>(), 1e-5);
  }

  const std::string family = "tokenizers/" + golden["tokenizer"].get<std::string>();
  const nlohmann::json texts = Golden("tokenizers/texts.json")["texts"], expected = Golden(family + "/golden.json");
  const Tokenizer tokenizer = Tokenizer::Load(files.dir);
  ASSERT_GT(texts.size(), 10u);
  for (size_t i = 0; i < texts.size(); ++i) {
    const std::string text = texts[i];
    EXPECT_EQ(tokenizer.Encode(text, false), expected["ids"][i].get<std::vector<int32_t>>()) << text;
  }
  EXPECT_EQ(tokenizer.Encode("Hello", true), expected["with_bos"][1].get<std::vector<int32_t>>());
}
INSTANTIATE_TEST_SUITE_P(Models, GgufParity, testing::ValuesIn(FileNames()), [](const auto& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST(Gguf, IsConvertedOnceAndAnewWhereItChanged) {
  const OwnCache cache;
  const fs::path file = cache.dir() / "tiny.gguf";
  fs::copy_file(GoldenPath("gguf/qwen2-tied.gguf"), file);
  const auto folders = [&] {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(cache.dir() / "gguf")) {
      if (entry.is_directory()) names.push_back(entry.path().string());
    }
    return names;
  };
  // What a converter that was killed has left is not taken, and goes away.
  fs::create_directories(cache.dir() / "gguf/tiny-0123456789abcdef.part.77");
  const std::string first = FindModel(file).dir;
  EXPECT_EQ(folders(), std::vector<std::string>{first});
  const auto made = fs::last_write_time(first);
  EXPECT_EQ(FindModel(file).dir, first);
  EXPECT_EQ(fs::last_write_time(first), made);
  fs::last_write_time(file, fs::last_write_time(file) + std::chrono::seconds(1));
  EXPECT_NE(FindModel(file).dir, first);
  EXPECT_EQ(folders().size(), 2u);
}

TEST(Gguf, TheCommandTakesAFile) {
  const OwnCache cache;
  const std::string arguments = "--models=" + GoldenPath("gguf/qwen3.gguf") +
                                " --schemes=none --contexts=32 --benchmark_filter=kv_size --benchmark_list_tests";
  Outcome outcome = Execute(arguments);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.out, "kv_size/qwen3.gguf/sdpa/none/ctx:32/batch:1\n");
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
  EXPECT_NE(outcome.err.find("converting"), std::string::npos) << outcome.err;
  outcome = Execute(arguments);
  EXPECT_EQ(outcome.code, 0);
  EXPECT_EQ(outcome.err, "");
}

TEST(Gguf, ConversionsHaveABound) {
  using std::chrono::hours;
  const OwnCache cache;
  const auto folder = [&](const std::string& name) { return cache.dir() / "gguf" / name; };
  // A conversion of so many bytes that was used so long ago; a hole takes no space on the disk.
  const auto make = [&](const std::string& name, uint64_t bytes, hours ago) {
    fs::create_directories(folder(name));
    std::ofstream(folder(name) / "model.safetensors") << "x";
    fs::resize_file(folder(name) / "model.safetensors", bytes);
    fs::last_write_time(folder(name), fs::file_time_type::clock::now() - ago);
  };
  const std::string named = GoldenPath("gguf/qwen3.gguf"), arguments = " --schemes=none --contexts=32 --benchmark_list_tests";
  ASSERT_EQ(Execute("--models=" + named + arguments).code, 0);
  fs::path conversion;
  for (const auto& entry : fs::directory_iterator(cache.dir() / "gguf")) {
    if (entry.is_directory()) conversion = entry.path();
  }
  ASSERT_TRUE(fs::exists(conversion / "config.json")) << conversion;
  fs::last_write_time(conversion, fs::file_time_type::clock::now() - hours(9));

  make("read-0", kConvertedGgufBytes / 3, hours(4)), make("old-1", kConvertedGgufBytes / 3, hours(3));
  make("old-2", kConvertedGgufBytes / 3, hours(2)), make("at-work.part.77", kConvertedGgufBytes, hours(5));
  const int reader = open(folder("read-0").c_str(), O_RDONLY | O_DIRECTORY);  // as another process that reads it
  ASSERT_EQ(flock(reader, LOCK_SH), 0);
  const Outcome outcome = Execute("--models=" + named + arguments);
  EXPECT_EQ(outcome.code, 0);
  EXPECT_EQ(outcome.err, StrCat("kvqbench: removing ", folder("old-1").string(),
                                ", which was not used for longest: conversions have more than 64 GiB\n"));
  EXPECT_TRUE(fs::exists(conversion)) << "the present command names it";
  EXPECT_LT(fs::file_time_type::clock::now() - fs::last_write_time(conversion), hours(1)) << "and has used it now";
  EXPECT_TRUE(fs::exists(folder("read-0"))) << "is read";
  EXPECT_FALSE(fs::exists(folder("old-1"))) << "the least recently used of the others";
  EXPECT_TRUE(fs::exists(folder("old-2"))) << "the rest has room";
  EXPECT_TRUE(fs::exists(folder("at-work.part.77"))) << "is no conversion yet";

  // Nobody reads it any more; and any command looks, whatever it is about.
  close(reader);
  make("old-3", kConvertedGgufBytes / 3, hours(1));
  EXPECT_EQ(Execute("--models=mistral-7b" + arguments).code, 0);
  EXPECT_FALSE(fs::exists(folder("read-0")));
  EXPECT_TRUE(fs::exists(folder("old-2"))) << "the rest has room";
  EXPECT_TRUE(fs::exists(folder("old-3")));

  // One of this process stays, however old it seems.
  const fs::path own = FindModel(named).dir;
  EXPECT_EQ(own, conversion);
  fs::last_write_time(own, fs::file_time_type::clock::now() - hours(9));
  make("old-4", kConvertedGgufBytes, hours(0));
  BoundConvertedGgufs();
  EXPECT_TRUE(fs::exists(own));
  for (const char* name : {"old-2", "old-3", "old-4"}) EXPECT_FALSE(fs::exists(folder(name))) << name;
}

TEST(Gguf, SaysWhatIsWrongInOneLine) {
  const OwnCache cache;
  const fs::path dir = cache.dir();
  const auto refused = [&](const std::string& file, const std::string& words, const std::string& before = "") {
    const Outcome outcome = Execute("--models=" + file + " --schemes=none --contexts=32 --benchmark_filter=kv_size", before);
    EXPECT_EQ(outcome.code, 2);
    const size_t behind = outcome.err.find('\n', outcome.err.find("converting")) + 1;
    const std::string error = outcome.err.substr(behind);
    EXPECT_TRUE(error.starts_with("kvqbench: --models: " + file + ": ")) << error;
    EXPECT_NE(error.find(words), std::string::npos) << error;
    EXPECT_EQ(error.find('\n'), error.size() - 1) << error;
    for (const auto& entry : fs::directory_iterator(dir / "gguf")) EXPECT_FALSE(entry.is_directory()) << entry;
  };
  std::ofstream(dir / "text.gguf") << "GGML and more";
  refused((dir / "text.gguf").string(), "does not begin with GGUF");
  fs::copy_file(GoldenPath("gguf/qwen3.gguf"), dir / "short.gguf");
  fs::resize_file(dir / "short.gguf", 30000);
  refused((dir / "short.gguf").string(), "truncated");
  // A Python without the package: the first of its path is one that cannot be imported.
  fs::create_directories(dir / "modules");
  std::ofstream(dir / "modules/gguf.py") << "raise ImportError('there is no gguf')\n";
  refused(GoldenPath("gguf/qwen3.gguf"), "pip install gguf", StrCat("PYTHONPATH=", (dir / "modules").string()));
}

}  // namespace
}  // namespace kvq
