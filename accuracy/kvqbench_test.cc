// The command as its users run it: what it prints and measures.
#include <ATen/Version.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "accuracy/distribution.h"
#include "accuracy/tiny_model.h"
#include "benchmarks/decoding.h"
#include "fixtures/model_config.h"
#include "kernels/error.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;

class Kvqbench : public TinyModel {};

// On a processor without instructions for bfloat16, products are of our own.
TEST_F(Kvqbench, SixteenBitsAreTheSameWithoutInstructionsForThem) {
  const std::string arguments = Tiny() + " --schemes=none --contexts=64 --windows=4 --dtype=bfloat16 "
                                         "--benchmark_filter=^perplexity/ --benchmark_format=json";
  const auto run = [&](const std::string& before) {
    const Outcome outcome = Execute(arguments, before);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return ByName(outcome.out).at("perplexity/tiny/sdpa/none/ctx:64/batch:1");
  };
  const auto here = run(""), there = run("export ATEN_CPU_CAPABILITY=avx2;");
  EXPECT_NEAR(there.value("ppl", 0.0) / here.value("ppl", 1.0), 1, 2e-3);
  EXPECT_NEAR(there.value("ppl_reference", 0.0) / here.value("ppl_reference", 1.0), 1, 2e-3);
}

// ---- positions

void SetPositions(const fs::path& model, int64_t positions) {
  std::ifstream in(model / "config.json");
  nlohmann::json config = nlohmann::json::parse(in);
  in.close();
  config["max_position_embeddings"] = positions;
  std::ofstream(model / "config.json") << config;
}

TEST_F(Kvqbench, WhatExceedsAModelsPositionsIsSkippedAndTheRestRuns) {
  fs::copy(dir_ / "tiny", dir_ / "long");
  SetPositions(dir_ / "long", 512);
  const std::string models = StrCat(" --models=", (dir_ / "tiny").string(), ",", (dir_ / "long").string());
  const Outcome outcome = Execute(Tiny() + models + " --schemes=none --contexts=128,256 --windows=2 --dtype=float32 --runs=1 "
                                  "--decode-tokens=5 --benchmark_filter='kv_size|perplexity|needle|memory|decode' "
                                  "--benchmark_format=json");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  const auto runs = ByName(outcome.out);
  const auto why = [&](const std::string& name, int context) {
    return runs.at(StrCat(name, "/sdpa/none/ctx:", context, "/batch:1")).value("error_message", "");
  };
  EXPECT_EQ(why("perplexity/tiny", 128), "");
  EXPECT_EQ(why("needle/tiny", 128), "skipped: the context's 128 tokens and 32 new ones exceed the model's 128 positions");
  EXPECT_NE(why("memory/tiny", 128).find("and 8 new ones exceed"), std::string::npos);
  if (std::string(KVQ_BUILD_TYPE) == "Release") {
    EXPECT_NE(why("decode/tiny", 128).find("and 5 new ones exceed"), std::string::npos);
  }
  EXPECT_EQ(why("kv_size/tiny", 256), "skipped: the context's 256 tokens exceed the model's 128 positions");
  for (const char* name : {"kv_size/long", "perplexity/long", "needle/long"}) EXPECT_EQ(why(name, 256), "") << name;
  // Learned positions end on random weights, too; rotary ones were trained for no length there.
  const auto random = ByName(Execute("--models=gpt2,llama-2-7b --schemes=none --contexts=8192 --benchmark_filter=kv_size "
                                     "--benchmark_format=json").out);
  EXPECT_NE(random.at("kv_size/gpt2/sdpa/none/ctx:8192/batch:1").value("error_message", "").find("1024 positions"),
            std::string::npos);
  EXPECT_FALSE(random.at("kv_size/llama-2-7b/sdpa/none/ctx:8192/batch:1").contains("error_message"));
}

TEST_F(Kvqbench, ListsWhatItWouldRun) {
  const Outcome outcome = Execute(Tiny() + " --schemes=none --contexts=32,64 --batch=1,2 --benchmark_filter='kv_size|error' --benchmark_list_tests");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.out,
            "error/tiny/sdpa/none/ctx:32/batch:1\nerror/tiny/sdpa/none/ctx:32/batch:2\n"
            "error/tiny/sdpa/none/ctx:64/batch:1\nerror/tiny/sdpa/none/ctx:64/batch:2\n"
            "kv_size/tiny/sdpa/none/ctx:32/batch:1\nkv_size/tiny/sdpa/none/ctx:32/batch:2\n"
            "kv_size/tiny/sdpa/none/ctx:64/batch:1\nkv_size/tiny/sdpa/none/ctx:64/batch:2\n");
  const Outcome negative = Execute(Tiny() + " --schemes=none --contexts=32 --benchmark_filter='-kv|e' --benchmark_list_tests=true");
  EXPECT_EQ(negative.code, 2) << "every name but kv_size has an e";
  const Outcome help = Execute("--help");
  EXPECT_EQ(help.code, 0);
  for (const char* word : {"--models", "--corpus-file", "perplexity", "--protocol=study:", "int4-hqq", "sdpa", "exit code"}) {
    EXPECT_NE(help.out.find(word), std::string::npos) << word;
  }
}

TEST_F(Kvqbench, NamesAModelOfTheHuggingFaceCacheByItsLastPart) {
  const fs::path snapshots = dir_ / "hub/models--owner--small/snapshots";
  fs::create_directories(snapshots);
  fs::create_directory_symlink(dir_ / "tiny", snapshots / "0123");
  fs::create_directory_symlink(dir_ / "tiny", dir_ / "small");
  const std::string cache = StrCat("HF_HUB_CACHE=", (dir_ / "hub").string());
  const std::string rest = " --schemes=none --contexts=32 --benchmark_filter=kv_size --benchmark_list_tests";
  const Outcome outcome = Execute("--models=owner/small" + rest, cache);
  EXPECT_EQ(outcome.out, "kv_size/small/sdpa/none/ctx:32/batch:1\n") << outcome.err;
  ExpectRefused(Execute(StrCat("--models=owner/small,", (dir_ / "small").string(), rest), cache), {"would both be named 'small'"});
  ExpectRefused(Execute("--models=owner/large" + rest, cache), {"models--owner--large", "hf download owner/large"});
}

// The machine's rates stand beside times, and where a file is taken up again by something that is timed.
TEST_F(Kvqbench, LooksAtRatesWhereSomethingIsTimed) {
  if (std::string(KVQ_BUILD_TYPE) != "Release") GTEST_SKIP() << "without optimization nothing is timed";
  const auto context = [&](const std::string& what) {
    const fs::path file = dir_ / "out.json";
    const Outcome outcome = Execute(StrCat(Tiny(), " --schemes=none --contexts=32 --runs=1 --max-runs=1 --benchmark_filter='^(", what,
                                           ")/' --benchmark_out=", file.string()));
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return nlohmann::json::parse(std::ifstream(file))["context"];
  };
  EXPECT_FALSE(context("kv_size").contains("read_gb_per_s"));
  const auto timed = context("kv_size|prefill");
  ASSERT_TRUE(timed.contains("read_gb_per_s"));
  EXPECT_GT(std::stod(timed["read_gb_per_s"].get<std::string>()), 0.1);
  EXPECT_EQ(context("kv_size|error"), timed) << "what was timed before is still there";
}

TEST_F(Kvqbench, HelpKeepsItsColumnsApart) {
  const std::string help = Execute("--help").out;
  const auto apart = [&](const std::string& name) { EXPECT_NE(help.find("\n  " + name + "  "), std::string::npos) << name; };
  for (const Measurement& measurement : Measurements()) apart(measurement.name);
  for (const Scheme& scheme : Schemes()) apart(scheme.name);
  for (const PublishedShape& shape : PublishedShapes()) apart(shape.name);
  for (const Backend& backend : Backends()) apart(backend.name);
  for (const char* flag : {"--dtype", "--kv-dtype", "--prefill-chunk", "--vram-diag"}) apart(flag);
}

// Of encoded tokens alone: what a scheme's header comment says, whatever stays dense.
TEST_F(Kvqbench, CountsTheBitsOfEncodedTokens) {
  WidenHeads(dir_ / "tiny");
  const auto runs = ByName(Execute(Tiny() + " --contexts=32 --dtype=float32 --benchmark_filter=^kv_size/ --benchmark_format=json "
                                   "--schemes=none,int8-hqq,int4-hqq,int4-hqq@group=32,int2-hqq-kivi,int4-hqq+none,"
                                   "int8-hqq+int4-hqq@layers=0-0:none,int4-hqq@residual=8+0,int2-hqq+int4-hqq@policy=kivi@residual=8,"
                                   "int4-hqq@residual=0@dense=1+0").out);
  const auto bits = [&](const std::string& spec) {
    return runs.at(StrCat("kv_size/tiny/sdpa/", spec, "/ctx:32/batch:1")).value("encoded_bits_per_element", -1.0);
  };
  EXPECT_EQ(bits("none"), -1) << "nothing is encoded";
  EXPECT_EQ(bits("int8-hqq"), 8.5);
  EXPECT_EQ(bits("int4-hqq"), 4.5) << "though all 32 tokens are in the residual";
  EXPECT_EQ(bits("int4-hqq@group=32"), 5);
  EXPECT_EQ(bits("int2-hqq-kivi"), 2.5);
  EXPECT_EQ(bits("int4-hqq+none"), 4.5);
  EXPECT_EQ(bits("int8-hqq+int4-hqq@layers=0-0:none"), (8.5 + 4.5) / 2);
  // What is encoded and what is not, of 32 bits here, are all there is.
  for (const auto& [spec, share] : std::vector<std::pair<std::string, double>>{
           {"int4-hqq@residual=8+0", (24 + 32) / 64.0}, {"int4-hqq@residual=0@dense=1+0", 0.5}, {"int4-hqq", 0}}) {
    const auto& run = runs.at(StrCat("kv_size/tiny/sdpa/", spec, "/ctx:32/batch:1"));
    EXPECT_EQ(run["encoded_share"], share) << spec;
    EXPECT_EQ(run["bits_per_element"], share * 4.5 + (1 - share) * 32) << spec;
  }
  // 32 keys at 2.5 bits; of values the newest 8 in 32 and 24 at 4.5.
  EXPECT_EQ(runs.at("kv_size/tiny/sdpa/int2-hqq+int4-hqq@policy=kivi@residual=8/ctx:32/batch:1")["bits_per_element"],
            (32 * 2.5 + 24 * 4.5 + 8 * 32) / 64);
}

TEST_F(Kvqbench, MeasuresEverythingOnATinyModel) {
  const fs::path file = dir_ / "out.json";
  const Outcome outcome = Execute(Tiny() + " --schemes=none --backends=eager,sdpa --contexts=64 --batch=2 --windows=3 --runs=2 "
                              "--decode-tokens=4 --dtype=float32 --benchmark_filter=-needle --benchmark_out=" + file.string());
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_FALSE(fs::exists(file.string() + ".part"));
  std::ifstream in(file);
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  const auto runs = ByName(text);
  ASSERT_EQ(runs.size(), 20u);  // sensitivity runs only where the filter names it
  const auto context = nlohmann::json::parse(text)["context"];
  EXPECT_EQ(context["executable"], "kvqbench");  // whatever folder it was started from
  for (const char* fact : {"kvqbench_commit", "kvqbench_build", "model " , "corpus_sha256", "seed", "dtype", "threads", "libtorch"}) {
    EXPECT_NE(context.dump().find(fact), std::string::npos) << fact;
  }
  for (const char* backend : {"eager", "sdpa"}) {
    const auto run = [&](const std::string& measurement) { return runs.at(measurement + "/tiny/" + backend + "/none/ctx:64/batch:2"); };
    EXPECT_EQ(run("kv_size")["kv_bytes"], 2 * 2 * 2 * 4 * 64 * 8 * 4);  // sides layers batch heads tokens dim float
    EXPECT_EQ(run("kv_size")["bits_per_element"], 32);
    EXPECT_NEAR(run("perplexity")["kld_nats"].get<double>(), 0, 1e-6);
    EXPECT_EQ(run("perplexity")["top1_agreement"], 1);
    EXPECT_EQ(run("perplexity")["scored_tokens"], 3 * 63);  // this tokenizer adds BOS
    EXPECT_LT(run("perplexity")["ppl_lo"].get<double>(), run("perplexity")["ppl"].get<double>());
    if (std::string(KVQ_BUILD_TYPE) == "Release") {
      EXPECT_GE(run("prefill")["samples"], 2);
      EXPECT_FALSE(run("prefill").contains("sm_clock_mhz")) << "a CPU has none";
      EXPECT_GT(run("prefill")["prefill_ms"].get<double>(), 0);
      EXPECT_GT(run("decode")["tokens_per_s"].get<double>(), 0);
      EXPECT_GT(run("decode")["peak_fraction"].get<double>(), 0);
      // A virtual machine rarely has counters of energy; then it says so.
      const std::string why = run("power").value("error_message", "");
      EXPECT_TRUE(run("power").value("watts", 0.0) > 0 || why.find("powercap") != std::string::npos) << why;
    } else {
      EXPECT_NE(run("prefill")["error_message"].get<std::string>().find("Release"), std::string::npos);
    }
    for (const char* nothing : {"quantize", "dequantize", "error"}) {
      EXPECT_NE(run(nothing)["error_message"].get<std::string>().find("nothing is encoded"), std::string::npos);
    }
  }
  EXPECT_NEAR(runs.at("perplexity/tiny/eager/none/ctx:64/batch:2")["ppl"].get<double>(),
              runs.at("perplexity/tiny/sdpa/none/ctx:64/batch:2")["ppl"].get<double>(), 1e-3);
}

// A step of one sequence reads two experts a layer, not all five; by hand, in float32.
TEST_F(Kvqbench, TheLimitCountsExpertsThatStepsRead) {
  if (std::string(KVQ_BUILD_TYPE) != "Release") GTEST_SKIP() << "times are measured in Release builds only";
  for (const char* name : {"config.json", "model.safetensors"}) {
    fs::copy(StrCat(GoldenPath("models/mixtral-top2/"), name), dir_ / "tiny" / name, fs::copy_options::overwrite_existing);
  }
  const fs::path file = dir_ / "experts.json";
  const Outcome outcome = Execute(Tiny() + " --schemes=none --backends=fused --contexts=16 --decode-tokens=4 --dtype=float32 --runs=1 "
                                  "--max-runs=1 --benchmark_filter='^decode' --benchmark_out=" + file.string());
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  std::ifstream in(file);
  const auto run = nlohmann::json::parse(in)["benchmarks"][0];
  const int64_t layer = 32 * (32 + 16 + 16 + 32) + 2 * 32 + 5 * 32;  // q, k, v, o; norms; router
  const int64_t head = 32 + 420 * 32, experts = 2 * 3 * 24 * 32, token = 2 * 2 * 2 * 8;
  EXPECT_EQ(run["bytes_per_token"], 4 * (2 * (layer + experts) + head + (16 + 2) * token));
  EXPECT_EQ(run.value("label", ""), "cpu Float, sdpa (no decoding graph: a head_dim that is no multiple of 16)");
}

TEST_F(Kvqbench, TheLabelSaysWhatRanUnderSage) {
  const auto label = [&](const std::string& contexts) {
    const fs::path file = dir_ / ("out" + contexts + ".json");
    const Outcome outcome = Execute(Tiny() + " --schemes=none --backends=sage --contexts=" + contexts +
                                    " --dtype=float32 --runs=1 --max-runs=1 --benchmark_filter='^prefill' "
                                    "--benchmark_out=" + file.string());
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    std::ifstream in(file);
    return nlohmann::json::parse(in)["benchmarks"][0].value("label", "");
  };
  if (std::string(KVQ_BUILD_TYPE) != "Release") GTEST_SKIP() << "times are measured in Release builds only";
  EXPECT_EQ(label("64"), "cpu Float, sdpa (fewer than 128 tokens)");
  EXPECT_EQ(label("128"), "cpu Float, sdpa (head_dim not 64 or 128)");
}

class KvqbenchGpu : public Kvqbench {};

TEST_F(KvqbenchGpu, MeasuresTimesMemoryAndPower) {
  KVQ_NEEDS_CUDA();
  SetPositions(dir_ / "tiny", 512);
  const fs::path file = dir_ / "out.json";
  const Outcome outcome = Execute(Tiny() + " --device=cuda --schemes=none --contexts=64 --batch=2 --runs=2 --max-seconds=2 "
                              "--decode-tokens=400 --vram-diag --benchmark_filter='^(prefill|decode|memory|power)' --benchmark_out=" +
                              file.string());
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.err.find("GPU memory, after the last step"), std::string::npos) << outcome.err;
  std::ifstream in(file);
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  const auto context = nlohmann::json::parse(text)["context"];
  const auto number = [&](const char* fact) { return std::stod(context.at(fact).get<std::string>()); };
  EXPECT_GT(number("read_gb_per_s"), number("copy_gb_per_s"));
  EXPECT_GT(number("gemm_tflop_per_s"), 0);
  const auto runs = ByName(text);
  const auto run = [&](const std::string& measurement) { return runs.at(measurement + "/tiny/sdpa/none/ctx:64/batch:2"); };
  const auto value = [&](const char* measurement, const char* counter) {
    EXPECT_TRUE(run(measurement).contains(counter)) << measurement << " " << counter << ": " << run(measurement).dump();
    return run(measurement).value(counter, -1.0);
  };
  EXPECT_GE(value("memory", "beyond_weights_bytes"), value("memory", "kv_bytes_allocated"));
  EXPECT_GT(value("memory", "vram_peak_bytes"), value("memory", "beyond_weights_bytes"));
  EXPECT_GE(value("memory", "vram_reserved_bytes"), value("memory", "vram_peak_bytes"));
  EXPECT_EQ(value("memory", "vram_overflow"), 0);
  EXPECT_FALSE(run("memory").contains("rss_peak_bytes"));
  EXPECT_GE(value("decode", "samples"), 2);
  if (context.contains("nvml")) {
    const char* required = std::getenv("KVQ_REQUIRE_CUDA");
    ASSERT_FALSE(required != nullptr && std::string(required) == "1") << "KVQ_REQUIRE_CUDA=1, but: " << context["nvml"];
    GTEST_SKIP() << "the rest needs NVML: " << context["nvml"];
  }
  EXPECT_TRUE(context.contains("gpu_driver"));
  for (const char* measurement : {"prefill", "decode"}) {
    EXPECT_GT(value(measurement, "sm_clock_mhz"), 100) << measurement;
    EXPECT_GT(value(measurement, "temperature_c"), 10) << measurement;
    const bool noted = run(measurement)["label"].get<std::string>().find("throttled: ") != std::string::npos;
    EXPECT_EQ(value(measurement, "throttled"), noted ? 1 : 0) << run(measurement)["label"];
  }
  EXPECT_GT(value("power", "watts_idle"), 0);
  // A model as small as this hardly warms a GPU, which may still cool down from the probes.
  EXPECT_GT(value("power", "watts"), 0.8 * value("power", "watts_idle"));
  EXPECT_NEAR(value("power", "watts_net"), value("power", "watts") - value("power", "watts_idle"), 1e-3);
  // The same second and the same tokens: what is drawn over what is decoded, up to medians of each, and what reading
  // the counters takes beside each run: some of its 0.4 s.
  EXPECT_NEAR(value("power", "mj_per_token") * value("power", "tokens_per_s") / 1e3, value("power", "watts"),
              0.2 * value("power", "watts"));
}

// A spec's kernels are compiled once, in seconds, and say so; another run finds them.
TEST_F(KvqbenchGpu, CompilesAKernelOnce) {
  KVQ_NEEDS_CUDA();
  const std::string before = StrCat("export KVQ_CACHE=", (dir_ / "cache").string(), ";");
  fs::create_directories(dir_ / "cache");  // with NVIDIA's libraries, where ci/setup brought them
  fs::create_directory_symlink(CacheDir() + "/nvidia", dir_ / "cache/nvidia");
  const std::string arguments = "--models=qwen2-0.5b --device=cuda --backends=fused --schemes=int8-hqq+int4-hqq --contexts=512 "
                                "--runs=1 --max-runs=1 --decode-tokens=4 --benchmark_filter='^decode/'";
  const auto seconds = [&](Outcome& outcome) {
    const auto start = std::chrono::steady_clock::now();
    outcome = Execute(arguments, before);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  Outcome first, second;
  const double first_s = seconds(first), second_s = seconds(second);
  ASSERT_EQ(first.code, 0) << first.err;
  ASSERT_EQ(second.code, 0) << second.err;
  EXPECT_NE(first.err.find("kvqbench: compiling "), std::string::npos) << first.err;
  EXPECT_NE(first.err.find(" for sm_"), std::string::npos) << first.err;
  EXPECT_EQ(second.err.find("compiling"), std::string::npos) << second.err;
  EXPECT_LT(first_s - second_s, 20) << "what a user waits for at a spec's first use";
  EXPECT_NE(first.out.find("fused_decode_int8+int4 (sm_"), std::string::npos) << first.out;
}

TEST_F(Kvqbench, SameSeedSameNumbers) {
  const std::string arguments = Tiny() + " --schemes=none --contexts=64 --windows=2 --dtype=float32 --benchmark_filter='perplexity|needle' --benchmark_format=json";
  const std::string threads = "export OMP_NUM_THREADS=2;";
  const auto first = ByName(Execute(arguments, threads).out), second = ByName(Execute(arguments, threads).out);
  for (const auto& [name, run] : first) {
    for (const auto& [key, value] : run.items()) {
      if (key.find("time") == std::string::npos && key.find("per_s") == std::string::npos && key != "elapsed_s") {
        EXPECT_EQ(value, second.at(name)[key]) << name << " " << key;
      }
    }
  }
  EXPECT_EQ(first.size(), 2u);
}

// A spec is scored against logits of the unquantized model that the spec before it has left.
TEST_F(Kvqbench, ASpecsScoresAreThoseThatItHasAlone) {
  WidenHeads(dir_ / "tiny");
  const std::string spec = "int4-hqq@residual=16";
  const auto scores = [&](const std::string& specs, const std::string& type) {
    const Outcome outcome = Execute(StrCat(Tiny(), " --schemes=", specs, " --contexts=64 --windows=2 --dtype=", type,
                                           " --benchmark_filter='perplexity/.*/", spec, "/|perplexity/.*/none' --benchmark_format=json"));
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    for (const auto& [name, run] : ByName(outcome.out)) {
      if (name.find("/" + spec + "/") == std::string::npos) continue;
      return StrCat(run["ppl"], " ", run["ppl_reference"], " ", run["kld_nats"], " ", run["kld_nats_hi"], " ", run["top1_agreement"]);
    }
    return outcome.out;
  };
  for (const char* type : {"bfloat16", "float32"}) {
    const std::string alone = scores(spec, type);
    EXPECT_EQ(std::count(alone.begin(), alone.end(), ' '), 4) << alone;
    EXPECT_EQ(scores("none@residual=16," + spec, type), alone) << type;
    EXPECT_EQ(scores("none," + spec, type), alone) << type << ", in other calls";
  }
}

// The study's protocol with nothing quantized is the reference itself.
TEST_F(Kvqbench, StudyProtocolOfNoneIsTheReference) {
  const auto runs = ByName(Execute(Tiny() + " --schemes=none --contexts=64 --windows=3 --protocol=study --dtype=float32 "
                               "--benchmark_filter=perplexity --benchmark_format=json").out);
  ASSERT_EQ(runs.size(), 1u);
  const auto& run = runs.begin()->second;
  EXPECT_EQ(run["delta_ppl"], 0);
  EXPECT_EQ(run["windows"], 3);
  EXPECT_EQ(run["scored_tokens"], 64 + 32 + 32);
}

// What a machine computes in is its own affair; without AVX-512-BF16, which the variable hides, that is float32.
TEST_F(Kvqbench, SizesDoNotDependOnWhatIsComputedIn) {
  WidenHeads(dir_ / "tiny");
  const auto sizes = [&](const std::string& arguments, const std::string& before = "", std::string* types = nullptr) {
    const Outcome outcome = Execute(arguments + " --benchmark_filter=^kv_size/ --benchmark_format=json", before);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    std::map<std::string, std::string> found;
    for (const auto& [name, run] : ByName(outcome.out)) {
      found[name] = StrCat(run.value("kv_bytes", 0.0), " ", run.value("bits_per_element", 0.0));
    }
    const auto context = nlohmann::json::parse(outcome.out)["context"];
    if (types != nullptr) *types = StrCat(context.value("dtype", ""), " ", context.value("kv_dtype tiny", ""));
    return found;
  };
  const std::string specs = Tiny() + " --contexts=96 --schemes=none,int8-hqq@residual=16@sinks=4,int2-hqq-kivi@residual=32";
  const auto expected = sizes(specs + " --dtype=bfloat16");
  EXPECT_EQ(expected.at("kv_size/tiny/sdpa/none/ctx:96/batch:1"), StrCat(2 * 2 * 4 * 96 * 64 * 2.0, " 16"));
  std::string types;
  // Where oneDNN would multiply bfloat16 and is kept from it; on a processor without AVX-512 products of our own do.
  const char* narrow = at::get_cpu_capability() == "AVX512" ? "Float BFloat16" : "BFloat16 BFloat16";
  for (const auto& [flags, before, said] :
       {std::tuple("", "", " BFloat16"), std::tuple("", "export ONEDNN_MAX_CPU_ISA=AVX2;", narrow),
        std::tuple("--dtype=float32 --kv-dtype=bfloat16", "", "Float BFloat16"),
        std::tuple("--dtype=float32 --kv-dtype=float16", "", "Float Half"),
        std::tuple("--dtype=float16", "", "Half Half"), std::tuple("--kv-dtype=float16", "", " Half")}) {
    EXPECT_EQ(sizes(specs + " " + flags, before, &types), expected) << flags << before;
    EXPECT_TRUE(types.ends_with(said)) << types << " for " << flags << before;
  }
  const auto wide = sizes(specs + " --dtype=float32", "", &types);
  EXPECT_EQ(types, "Float Float");
  EXPECT_EQ(wide.at("kv_size/tiny/sdpa/none/ctx:96/batch:1"), StrCat(2 * 2 * 4 * 96 * 64 * 4.0, " 32"));
  EXPECT_EQ(sizes("--models=mistral-7b --schemes=none --contexts=4096"),
            (std::map<std::string, std::string>{{"kv_size/mistral-7b/sdpa/none/ctx:4096/batch:1", StrCat(536870912.0, " 16")}}));
}

// Everything that has a cache, with one of 16 bits under a model in float32.
TEST_F(Kvqbench, MeasuresACacheOfAnotherType) {
  WidenHeads(dir_ / "tiny");
  const std::string arguments = Tiny() + " --schemes=none,int8-hqq@residual=16 --contexts=64 --windows=2 --runs=1 --max-runs=1 "
                                "--decode-tokens=4 --dtype=float32 --benchmark_format=json "
                                "--benchmark_filter='^(decode|dequantize|distribution|error|memory|needle|perplexity|"
                                "prefill|quantize|sensitivity)/' ";
  const Outcome half = Execute(arguments + "--kv-dtype=float16"), full = Execute(arguments);
  ASSERT_EQ(half.code, 0) << half.err;
  ASSERT_EQ(full.code, 0) << full.err;
  const auto ours = ByName(half.out), theirs = ByName(full.out);
  const auto run = [](const auto& runs, const std::string& measurement, const std::string& spec) {
    return runs.at(StrCat(measurement, "/tiny/sdpa/", spec, "/ctx:64/batch:1"));
  };
  const std::string spec = "int8-hqq@residual=16";
  EXPECT_EQ(run(ours, "memory", "none")["kv_bytes_allocated"].get<double>() * 2,
            run(theirs, "memory", "none")["kv_bytes_allocated"].get<double>());
  EXPECT_EQ(run(ours, "memory", "none")["scratch_bytes"], 2 * 4 * (64 + 8) * 64 * 4) << "of one layer, in float32";
  EXPECT_EQ(run(theirs, "memory", "none")["scratch_bytes"], 0);
  // Codes of 8 bits are off by far more than float16 is.
  EXPECT_NEAR(run(ours, "error", spec)["nmse_k"].get<double>(), run(theirs, "error", spec)["nmse_k"].get<double>(),
              0.02 * run(theirs, "error", spec)["nmse_k"].get<double>());
  EXPECT_NE(run(ours, "error", spec)["nmse_k"], run(theirs, "error", spec)["nmse_k"]);
  for (const std::string& of : {std::string("none"), spec}) {
    EXPECT_NEAR(run(ours, "perplexity", of)["ppl"].get<double>(), run(theirs, "perplexity", of)["ppl"].get<double>(),
                1e-2 * run(theirs, "perplexity", of)["ppl"].get<double>());
    EXPECT_TRUE(run(ours, "needle", of).contains("needle_rate")) << run(ours, "needle", of);
    if (std::string(KVQ_BUILD_TYPE) != "Release") continue;
    EXPECT_GT(run(ours, "decode", of)["tokens_per_s"].get<double>(), 0);
    EXPECT_LT(run(ours, "decode", of)["bytes_per_token"].get<double>(), run(theirs, "decode", of)["bytes_per_token"].get<double>());
  }
  EXPECT_LT(run(ours, "perplexity", "none")["kld_nats"].get<double>(), 1e-4) << "both are rounded alike";
}

// Specs share what they have alike: a window's first call where it encodes nothing, the unquantized model's windows.
TEST_F(Kvqbench, SpecsThatShareWindowsMeasureWhatTheyDoAlone) {
  WidenHeads(dir_ / "tiny");
  std::ofstream text(dir_ / "text.txt");
  for (int i = 0; i < 400; ++i) text << "Of " << i * i << " rivers " << (i * 7919) % 1000 << " run through " << i % 37 << " towns. ";
  text.close();
  const std::string arguments = Tiny() + " --contexts=72 --windows=3 --batch=2 --dtype=float32 --kv-dtype=float16 "
                                "--benchmark_filter=^perplexity/ --benchmark_format=json --schemes=";
  // Of calls of 16 tokens, of 3 and 16, of 72 the first is made by the spec that comes first; the others store what it made.
  const std::vector<std::string> specs = {"none", "int2-hqq@residual=16", "int4-hqq+int2-hqq@residual=16", "q4_0@residual=0",
                                          "int2-hqq@residual=16@sinks=3", "int4-hqq@residual=16@sinks=3", "int2-hqq@residual=19",
                                          "int2-hqq@residual=16@prefill=raw", "kivi-2@residual=32", "int2-hqq@residual=16@policy=hf"};
  const auto run = [&](const std::string& schemes) {
    const Outcome outcome = Execute(arguments + schemes);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return ByName(outcome.out);
  };
  std::string all;
  for (const std::string& spec : specs) all += (all.empty() ? "" : ",") + spec;
  const auto together = run(all);
  EXPECT_EQ(together.size(), specs.size());
  for (const auto& [name, cell] : together) {
    const size_t begin = std::string("perplexity/tiny/sdpa/").size();
    const std::string spec = name.substr(begin, name.find("/ctx:") - begin);
    const auto alone = run(spec).at(name);
    for (const char* number : {"ppl", "kld_nats", "top1_agreement", "kld_floor_nats"}) {
      EXPECT_EQ(cell[number], alone[number]) << name << " " << number;
    }
  }
}

// On a CPU a cache is filled with what the unquantized model made of the context.
TEST_F(Kvqbench, DecodingGoesOnBehindTheContextThatAllSpecsShare) {
  const c10::InferenceMode guard;
  WidenHeads(dir_ / "tiny");
  const Options options{.models = {(dir_ / "tiny").string()}, .corpus_file = (dir_ / "text.txt").string(), .dtype = "float32",
                        .kv_dtype = "float16"};
  for (const char* spec : {"none", "int2-hqq@residual=16", "q8_0@residual=0", "int2-hqq@residual=16@sinks=3", "kivi-4@residual=32"}) {
    SCOPED_TRACE(spec);
    Session session(options);
    const Cell cell{options.models[0], "sdpa", spec, 50, 2};
    Decoding captured(session, cell, 4), fed(session, cell, 4);
    const at::Tensor token = captured.Start();
    fed.Start(/*once=*/true);
    ASSERT_EQ(captured.cache().length(), 50);
    // Of 50 tokens int2-hqq keeps the last two dense. The model's second layer has them from what the first one read: of the unquantized
    // context, but for the last token; fed, each from the quantized one.
    if (std::string(spec) == "int2-hqq@residual=16") {
      const Model& model = session.model(cell.model);
      KvCache expected(ParseSpec(spec), captured.cache().shape(), 54, at::kHalf, at::Device(at::kCPU), at::kFloat);
      const LayerTokens& tokens = session.captured_cache(cell);
      for (int64_t layer = 0; layer < 2; ++layer) {
        const auto& [keys, values] = tokens[static_cast<size_t>(layer)];
        expected.Update(layer, keys.narrow(2, 0, 49).to(at::kFloat), values.narrow(2, 0, 49).to(at::kFloat));
      }
      model.Forward(session.context_ids(cell).narrow(1, 49, 1), expected, FindBackend("sdpa"));
      const auto dense = [](const KvCache& cache) { return cache.storage(1).first.residual.narrow(2, 0, 2); };
      EXPECT_TRUE(dense(captured.cache()).equal(dense(expected)));
      EXPECT_FALSE(dense(captured.cache()).equal(dense(fed.cache())));
    }
    captured.Run(token);
    EXPECT_EQ(captured.cache().length(), 54);
    EXPECT_TRUE(captured.Start().equal(token)) << "again";
    EXPECT_EQ(captured.cache().length(), 50);
    if (std::string(spec) != "none") continue;
    const auto [keys, values] = captured.cache().storage(1);
    const auto [fed_keys, fed_values] = fed.cache().storage(1);
    EXPECT_TRUE(keys.tokens.narrow(2, 0, 49).equal(fed_keys.tokens.narrow(2, 0, 49)));
    EXPECT_TRUE(values.tokens.narrow(2, 0, 49).equal(fed_values.tokens.narrow(2, 0, 49)));
  }
}

TEST_F(Kvqbench, WhatDoesNotFitIntoMemoryIsSkippedAndTheRestRuns) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer reserves more memory than any limit";
#endif
  // 2 sides, 2 layers, 4 heads, 8 channels, 4 bytes, 64 tokens: 4 GB for 125,000 sequences.
  const Outcome outcome = Execute(Tiny() + " --schemes=none --contexts=64 --batch=125000,1 --dtype=float32 "
                              "--benchmark_filter=kv_size --benchmark_format=json", "ulimit -d 3000000;");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  const auto runs = ByName(outcome.out);
  EXPECT_NE(runs.at("kv_size/tiny/sdpa/none/ctx:64/batch:125000")["error_message"].get<std::string>().find("out of memory"),
            std::string::npos);
  EXPECT_GT(runs.at("kv_size/tiny/sdpa/none/ctx:64/batch:1")["kv_bytes"].get<double>(), 0);
}

TEST_F(Kvqbench, AWindowOfOneTokenIsSkipped) {
  const auto runs = ByName(Execute(Tiny() + " --schemes=none --contexts=1 --benchmark_filter=perplexity "
                               "--benchmark_format=json").out);
  EXPECT_NE(runs.at("perplexity/tiny/sdpa/none/ctx:1/batch:1")["error_message"].get<std::string>().find("one token"),
            std::string::npos);
}

TEST_F(Kvqbench, ColoursAreForTerminals) {
  const Outcome outcome = Execute(Tiny() + " --schemes=none --contexts=32 --benchmark_filter=kv_size");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("kv_size/tiny"), std::string::npos);
  EXPECT_EQ(outcome.out.find('\033'), std::string::npos) << outcome.out;
}

// Lists of the JSON, and a summary that is one of the layers; the numbers are the cache's own.
TEST_F(Kvqbench, DistributionDescribesTheCache) {
  const c10::InferenceMode guard;
  WidenHeads(dir_ / "tiny");
  const std::string arguments =
      Tiny() +
      " --contexts=64 --batch=2 --prefill-chunk=24 --dtype=float32 --benchmark_format=json";
  const Outcome outcome =
      Execute(arguments + " --schemes=int4-hqq,none --benchmark_filter=distribution");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto runs = ByName(outcome.out);
  ASSERT_EQ(runs.size(), 1u) << "once, whatever the schemes";
  const auto& run = runs.at("distribution/tiny/sdpa/none/ctx:64/batch:2");
  EXPECT_EQ(outcome.out.find("]\":"), std::string::npos)
      << "an element of a list was left a counter";

  Options options{.models = {(dir_ / "tiny").string()},
                  .corpus_file = (dir_ / "text.txt").string(),
                  .dtype = "float32"};
  Session session(options);
  const auto& captured = session.captured_cache({options.models[0], "sdpa", "none", 64, 2});
  double kurtosis_sum = 0, kurtosis_max = -INFINITY;
  int heavy = 0;
  for (size_t layer = 0; layer < captured.size(); ++layer) {
    for (const auto& [side, x] :
         {std::pair("k", captured[layer].first), std::pair("v", captured[layer].second)}) {
      const auto value = [&, side = side](const std::string& name) {
        return run[StrCat(name, "_", side, "/layer:", layer)];
      };
      Distribution of;
      of.Add(x);
      of.Count(x);
      // The measurement fed 24 tokens a call, which moves float32 sums of the model.
      EXPECT_NEAR(value("kurtosis").get<double>(), of.kurtosis(), 1e-4);
      EXPECT_NEAR(value("std").get<double>(), of.std(), 1e-5 * of.std());
      EXPECT_NEAR(value("var_ratio").get<double>(), of.per_channel_var() / of.per_token_var(),
                  1e-4);
      const std::vector<double> density = value("density"), largest = value("channel_max");
      ASSERT_EQ(density.size(), 200u);
      // Lists are rounded to float32.
      EXPECT_NEAR(0.06 * std::accumulate(density.begin(), density.end(), 0.0), 1, 1e-5);
      ASSERT_EQ(largest.size(), 4u * 64);
      for (size_t i = 0; i < largest.size(); ++i) {
        EXPECT_NEAR(largest[i], of.channel_max()[i], 1e-5 * of.std());
      }
      heavy += of.kurtosis() > 3;
      if (side == std::string("v")) continue;
      kurtosis_sum += value("kurtosis").get<double>();
      kurtosis_max = std::max(kurtosis_max, value("kurtosis").get<double>());
      EXPECT_NEAR(value("std").get<double>(),
                  run[StrCat("std_k_pre_rope/layer:", layer)].get<double>(), 0.1 * of.std());
      EXPECT_NE(value("density"), run[StrCat("density_k_pre_rope/layer:", layer)]);
    }
  }
  EXPECT_NEAR(run["kurtosis_k_mean"].get<double>(), kurtosis_sum / 2, 1e-12);
  EXPECT_EQ(run["kurtosis_k_max"], kurtosis_max);
  EXPECT_EQ(run["heavy_tailed_layers"], heavy);
  EXPECT_EQ(run["layers"], 2);
}

// ---- SmolLM2 on the default text: the numbers users see must not drift

TEST(SmolLm2Slow, QualityStaysWhereItWas) {
  const std::string dir = CacheDir() + "/models/smollm2-135m";
  if (!fs::exists(dir)) GTEST_SKIP() << dir << " is not there; run datasets/fetch smollm2-135m";
  const Outcome outcome =
      Execute("--schemes=none,int8-hqq,int4-hqq,int2-hqq,int4-hqq-kivi,int2-hqq-kivi --contexts=512 --windows=4 --dtype=float32 "
          "--benchmark_filter='perplexity|error|kv_size' --benchmark_format=json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto runs = ByName(outcome.out);
  const auto value = [&](const std::string& measurement, const std::string& spec, const char* counter) {
    return runs.at(measurement + "/smollm2-135m/sdpa/" + spec + "/ctx:512/batch:1")[counter].get<double>();
  };
  struct Expected {
    const char* spec;
    double ppl, kld, top1;
  };
  // Observed in float32 on one machine (AVX-512). Another machine's sums move single codes: the kld by less
  // than a twentieth, the ppl by less than that share of its change.
  for (const Expected& e : {Expected{"none", 20.831941, 0, 1}, Expected{"int8-hqq", 20.831867, 3.164626e-5, 0.998043},
        Expected{"int4-hqq", 20.989409, 0.009030926, 0.947162}, Expected{"int2-hqq", 50.581685, 0.9137909, 0.563112},
        Expected{"int4-hqq-kivi", 20.997340, 0.008852416, 0.952055},
        Expected{"int2-hqq-kivi", 30.604915, 0.4083672, 0.706947}}) {
    EXPECT_NEAR(value("perplexity", e.spec, "ppl"), e.ppl, e.ppl * (1e-4 + 0.05 * e.kld)) << e.spec;
    EXPECT_NEAR(value("perplexity", e.spec, "kld_nats"), e.kld, 0.05 * e.kld + 1e-6) << e.spec;
    EXPECT_NEAR(value("perplexity", e.spec, "top1_agreement"), e.top1, 0.01) << e.spec;
  }
  // What must hold whatever the machine.
  const double floor = value("perplexity", "none", "kld_nats"), int8 = value("perplexity", "int8-hqq", "kld_nats");
  const double int4 = value("perplexity", "int4-hqq", "kld_nats"), int2 = value("perplexity", "int2-hqq", "kld_nats");
  EXPECT_GT(int2, int4);
  EXPECT_GT(int4, int8);
  EXPECT_GT(int8, floor);
  EXPECT_GE(value("perplexity", "int8-hqq", "top1_agreement"), 0.97);
  // 384 of 512 tokens encoded: (384 * bits + 128 * 32) / 512.
  EXPECT_EQ(value("kv_size", "int4-hqq", "bits_per_element"), (384 * 4.5 + 128 * 32) / 512);
  for (const char* spec : {"int8-hqq", "int4-hqq", "int2-hqq", "int4-hqq-kivi", "int2-hqq-kivi"}) {
    EXPECT_EQ(value("kv_size", spec, "kv_bytes"), value("kv_size", spec, "kv_bytes_allocated"));
  }
  EXPECT_GT(value("error", "int2-hqq", "nmse_k"), value("error", "int4-hqq", "nmse_k"));
  EXPECT_GT(value("error", "int4-hqq", "nmse_k"), value("error", "int8-hqq", "nmse_k"));
}

}  // namespace
}  // namespace kvq
