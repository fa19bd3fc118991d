// What the command refuses, in one line with exit code 2: flags, models and files that are none.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <fstream>
#include <utility>

#include "accuracy/tiny_model.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;

class Refusals : public TinyModel {};

TEST_F(Refusals, BadInputIsOneLine) {
  const std::string tiny = Tiny();
  ExpectRefused(Execute("--models=gpt-5"), {"--models", "gpt-5", "smollm2-135m"});
  ExpectRefused(Execute("--models=" + (dir_ / "none/x").string()), {"not a directory"});
  ExpectRefused(Execute(tiny + " --schemes=int5-hqq"), {"int5-hqq", "int4-hqq"});
  ExpectRefused(Execute(tiny + " --schemes=int8-quanto"), {"int8-quanto", "2 and 4 bits"});
  ExpectRefused(Execute(tiny + " --schemes=int4-hqq"), {"head_dim", "64"});  // the tiny model's is 8
  ExpectRefused(Execute(tiny + " --backends=warp"), {"warp", "eager, sdpa, fused, sage"});
  ExpectRefused(Execute(tiny + " --contexts=ten"), {"--contexts", "ten"});
  ExpectRefused(Execute(tiny + " --contexts=64,,"), {"--contexts", "empty item"});
  ExpectRefused(Execute(tiny + " --windows=0"), {"--windows", "1"});
  ExpectRefused(Execute(tiny + " --window=4"), {"--window", "no such flag"});
  ExpectRefused(Execute(tiny + " --benchmark_windows=4 --schemes=none --contexts=32"), {"--benchmark_windows", "no such flag"});
  ExpectRefused(Execute(tiny + " --protocol=fast"), {"--protocol", "decode or study"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --dtype=int8"), {"--dtype", "float32"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --kv-dtype=int8"), {"--kv-dtype", "bfloat16", "int8"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --device=tpu"), {"--device", "tpu"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --vram-diag"), {"--vram-diag", "--device=cuda"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --benchmark_filter=nothing"), {"--benchmark_filter", "matches none"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --benchmark_filter='('"), {"--benchmark_filter", "regular expression"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --benchmark_format=xml"), {"--benchmark_format"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --benchmark_out=/no/such/dir/x.json"), {"--benchmark_out", "/no/such/dir"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --summary-file=/no/such/dir/x.txt"), {"--summary-file", "/no/such/dir"});
  ExpectRefused(Execute("--models=./" + std::string(5000, 'a')), {"File name too long"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --benchmark_out=" + (dir_ / "\xff.json").string()),
                {"--benchmark_out", "UTF-8"});
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --corpus-file=/no/such/file"), {"--corpus-file", "is not there"});
  std::ofstream(dir_ / "empty.txt");
  ExpectRefused(Execute(tiny + " --schemes=none --contexts=32 --corpus-file=" + (dir_ / "empty.txt").string()), {"empty.txt", "empty"});
}

TEST_F(Refusals, BrokenModelsAreOneLine) {
  const auto run = [&] { return Execute(Tiny() + " --schemes=none --contexts=32 --benchmark_filter=perplexity"); };
  std::ofstream(dir_ / "tiny/tokenizer.json") << "{";
  ExpectRefused(run(), {"tokenizer.json", "not a JSON object"});
  fs::remove(dir_ / "tiny/tokenizer.json");
  ExpectRefused(run(), {"tokenizer.json", "not there"});
  fs::resize_file(dir_ / "tiny/model.safetensors", 5000);
  ExpectRefused(run(), {"model.safetensors", "truncated"});
  fs::remove(dir_ / "tiny/model.safetensors");
  ExpectRefused(run(), {"neither model.safetensors"});
  std::ofstream(dir_ / "tiny/config.json") << "{}";
  ExpectRefused(run(), {"config.json", "model_type"});
}

TEST_F(Refusals, ATokenizerOfAnotherModel) {
  fs::copy(GoldenPath("models/llama-gqa3"), dir_ / "tiny", fs::copy_options::recursive | fs::copy_options::overwrite_existing);
  ExpectRefused(Execute(Tiny() + " --schemes=none --contexts=32"), {"420 tokens", "vocab_size 61"});
}

// Found before anything is measured, of any model: the right one before it has no result that would be lost.
TEST_F(Refusals, ATensorOfAnotherTypeOrShapeBeforeItMeasures) {
  const auto refused = [&](const std::string& tensor, const std::string& from, const std::string& to, const std::string& why) {
    fs::remove_all(dir_ / "bad");
    fs::copy(dir_ / "tiny", dir_ / "bad");
    std::ifstream in(dir_ / "bad/model.safetensors", std::ios::binary);
    std::string file((std::istreambuf_iterator<char>(in)), {});
    const size_t at = file.find(from, file.find("\"" + tensor + "\""));
    ASSERT_NE(at, std::string::npos);
    std::ofstream(dir_ / "bad/model.safetensors", std::ios::binary) << file.replace(at, from.size(), to);
    const std::string models = StrCat(" --models=", (dir_ / "tiny").string(), ",", (dir_ / "bad").string());
    ExpectRefused(Execute(Tiny() + models + " --schemes=none --contexts=32 --benchmark_filter=kv_size "
                          "--benchmark_format=json"), {tensor, why});
  };
  refused("model.norm.weight", "\"BF16\"", " \"I16\"", "type I16");
  refused("model.layers.1.mlp.down_proj.weight", "[32,40]", "[40,32]", "shape [40, 32]");
}

// ---- files that are none

TEST_F(Refusals, OnlyRegularFilesAreReplacedOrRead) {
  const std::string flags = Tiny() + " --schemes=none --contexts=32 --benchmark_filter=kv_size ";
  const fs::path pipe = dir_ / "pipe";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  ExpectRefused(Execute(flags + "--benchmark_out=" + pipe.string()), {"--benchmark_out", pipe.string(), "a pipe"});
  EXPECT_EQ(fs::status(pipe).type(), fs::file_type::fifo);
  ExpectRefused(Execute(flags + "--benchmark_out=/dev/stdout"), {"--benchmark_out", "--benchmark_format=json"});
  ExpectRefused(Execute(flags + "--corpus-file=" + pipe.string()), {pipe.string(), "no regular file"});
  ExpectRefused(Execute("--to-v2=" + (dir_ / "v2").string() + " " + pipe.string()), {pipe.string(), "no regular file"});
  // A summary is only written: what takes text gets it, at the end, and stays what it is.
  const Outcome shown = Execute(flags + "--summary-file=/dev/stdout");
  EXPECT_EQ(shown.code, 0) << shown.err;
  EXPECT_LT(shown.out.find("kv_size/tiny"), shown.out.find("1 benchmarks: 1 done")) << shown.out;
  EXPECT_NE(shown.out.find("1 benchmarks: 1 done"), std::string::npos) << shown.out;
  const Outcome full = Execute(flags + "--summary-file=/dev/full");
  EXPECT_EQ(full.code, 2) << full.err;
  EXPECT_NE(full.err.find("cannot write /dev/full: No space left"), std::string::npos) << full.err;
  // A link's file is replaced, not the link.
  fs::create_symlink(dir_ / "summary.txt", dir_ / "link.txt");
  EXPECT_EQ(Execute(flags + "--summary-file=" + (dir_ / "link.txt").string()).code, 0);
  EXPECT_TRUE(fs::is_symlink(dir_ / "link.txt"));
  EXPECT_TRUE(fs::exists(dir_ / "summary.txt"));
  for (const char* name : {"config.json", "tokenizer.json", "model.safetensors"}) {
    fs::rename(dir_ / "tiny" / name, dir_ / name);
    ASSERT_EQ(mkfifo((dir_ / "tiny" / name).c_str(), 0600), 0);
    ExpectRefused(Execute(flags), {name});
    fs::rename(dir_ / name, dir_ / "tiny" / name);
  }
  // A device as /dev/null and /dev/zero are, under a name of its own: only root may make one.
  for (const auto& [name, minor_number] : {std::pair("null", 3), std::pair("zero", 5)}) {
    const fs::path node = dir_ / name;
    if (mknod(node.c_str(), S_IFCHR | 0666, makedev(1, static_cast<unsigned>(minor_number))) != 0) continue;
    ExpectRefused(Execute(flags + "--benchmark_out=" + node.string()), {node.string(), "a device"});
    EXPECT_EQ(Execute(flags + "--summary-file=" + node.string()).code, 0);
    EXPECT_EQ(fs::status(node).type(), fs::file_type::character);
  }
}

}  // namespace
}  // namespace kvq
