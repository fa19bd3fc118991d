// Layers spread over devices (Model), and cells spread over GPUs (ci/grid). Stages that are all on one device run the
// same code as several GPUs but for the copies; the meta device, which knows shapes and no numbers, stands for a
// second one: an operation on tensors of two devices throws there as it does on GPUs.
#include <algorithm>
#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "accuracy/command.h"
#include "accuracy/families.h"
#include "accuracy/golden.h"
#include "fixtures/decode_graph.h"
#include "fixtures/machine/device.h"
#include "fixtures/model.h"

// Skips where there are fewer than two GPUs, with KVQ_REQUIRE_CUDA=1, too: that asks for a GPU, not for two.
#define KVQ_NEEDS_TWO_GPUS()                                         \
  KVQ_NEEDS_CUDA();                                                  \
  if (c10::impl::VirtualGuardImpl(at::kCUDA).deviceCount() < 2) {     \
    GTEST_SKIP() << "this test needs a second GPU, and there is one"; \
  }

namespace kvq {
namespace {

namespace fs = std::filesystem;

const at::Device kMeta(at::kMeta);

std::unique_ptr<Model> Tiny(const std::string& name, const std::vector<at::Device>& devices,
                            at::ScalarType type = at::kFloat) {
  return LoadModel(GoldenPath("models/" + name), type, devices);
}

at::Tensor SomeIds(const Model& model) {
  return at::arange(0, 80, at::kLong).remainder(model.config().vocab_size).view({2, 40}).to(model.device());
}

// Logits of a prefill in calls of 13 tokens and of four greedy steps behind it.
at::Tensor LogitsOf(const Model& model, const std::string& spec, const std::string& backend = "sdpa") {
  KvCache cache(ParseSpec(spec), model.cache_shape(2), 64, model.dtype(), model.cache_devices());
  at::Tensor hidden = Feed(model, SomeIds(model), cache, FindBackend(backend), 13);
  std::vector<at::Tensor> logits;
  for (int step = 0; step < 5; ++step) {
    logits.push_back(model.Logits(hidden.narrow(1, hidden.size(1) - 1, 1)));
    if (step < 4) hidden = model.Forward(logits.back().argmax(-1), cache, FindBackend(backend));
  }
  return at::cat(logits, 1);
}

// ---- stages

TEST(Pipeline, StagesAreContiguousAndBalancedToHalfALayer) {
  for (const PublishedShape& shape : PublishedShapes()) {
    const ModelConfig config = ParseModelConfig(shape.config, shape.name);
    for (const size_t count : {1, 2, 3, 4, 8}) {
      const std::vector<size_t> stages = StagesOf(config, count);
      ASSERT_EQ(stages.size(), config.layers.size());
      EXPECT_TRUE(std::is_sorted(stages.begin(), stages.end())) << shape.name;
      EXPECT_LT(stages.back(), count);
    }
  }
  // Mistral-7B: 32 layers of 218.1 M elements, embedding and head of 131.1 M each: four stages of 1810 M, 8.3 layers.
  const ModelConfig mistral = ParseModelConfig(FindPublishedShape("mistral-7b")->config, "mistral-7b");
  const std::vector<size_t> four = StagesOf(mistral, 4);
  std::vector<int64_t> layers(4);
  for (const size_t stage : four) ++layers[stage];
  EXPECT_EQ(layers, (std::vector<int64_t>{8, 8, 8, 8}));
  EXPECT_EQ(StageText(mistral, {{at::kCUDA, 0}, {at::kCUDA, 3}}), "layers 0-15 on cuda:0, 16-31 on cuda:3");
  EXPECT_EQ(StageText(mistral, {kCpu}), "");
}

// What StagesOf counts from the config is what the model's tensors have, but for norms and biases.
TEST(Pipeline, StagesWeighWhatTheModelLoads) {
  const c10::InferenceMode guard;
  const ModelConfig config = ParseModelConfig(FindPublishedShape("llama-3.1-8b")->config, "llama-3.1-8b");
  ModelConfig small = config;
  small.hidden_size = 64, small.vocab_size = 500, small.num_heads = 4;
  for (LayerConfig& layer : small.layers) layer.num_kv_heads = 2, layer.head_dim = 16, layer.intermediate_size = 160;
  const Model model(small, Weights::Random(1, at::kFloat, kCpu), {kCpu, kCpu, kCpu});
  const std::vector<size_t> stages = StagesOf(small, 3);
  std::vector<double> bytes = {static_cast<double>(model.embedding().nbytes()), 0,
                               static_cast<double>(model.head().weight.nbytes())};
  double layer_bytes = 0;
  for (size_t i = 0; i < stages.size(); ++i) {
    const DecoderLayer& layer = model.layers()[i];
    layer_bytes = 0;
    for (const Linear* l : {&layer.qkv, &layer.o, &layer.up, &layer.down}) {
      layer_bytes += static_cast<double>(l->weight.nbytes());
    }
    bytes[stages[i]] += layer_bytes;
  }
  const double share = (bytes[0] + bytes[1] + bytes[2]) / 3;
  for (const double stage : bytes) EXPECT_LE(std::abs(stage - share), layer_bytes) << "half a layer at each end";
}

TEST(Pipeline, OneDeviceInStagesGivesTheSameBits) {
  const c10::InferenceMode guard;
  for (const std::string& name : GoldenModelNames()) {
    const std::unique_ptr<Model> whole = Tiny(name, {kCpu}), staged = Tiny(name, {kCpu, kCpu, kCpu});
    EXPECT_TRUE(at::equal(LogitsOf(*whole, "none"), LogitsOf(*staged, "none"))) << name;
    EXPECT_EQ(whole->WeightBytes(), staged->WeightBytes()) << name;
    EXPECT_EQ(staged->WeightBytes(kCpu), staged->WeightBytes()) << name;
  }
  const auto quantized = [](const std::vector<at::Device>& devices) {
    return LogitsOf(*Tiny("gemma3-dim256", devices), "int8-hqq@group=32@residual=32@sinks=4");
  };
  EXPECT_TRUE(at::equal(quantized({kCpu}), quantized({kCpu, kCpu})));
}

// Nothing that a layer reads is left behind on another device: weights, the cache, rotations, keys and values that
// layers share, what every layer gets of the token.
TEST(Pipeline, EveryLayerFindsItsInputsOnItsOwnDevice) {
  const c10::InferenceMode guard;
  std::set<size_t> first_of_meta;
  for (const std::string& name : GoldenModelNames()) {
    // libtorch's LayerNorm knows no meta tensors, and which experts a token goes through is a number.
    const ModelConfig config = LoadModelConfig(GoldenPath("models/" + name));
    if (config.norm == NormKind::kLayerNorm || config.layers.back().experts > 0) continue;
    for (const auto& devices : std::vector<std::vector<at::Device>>{
             {kCpu, kMeta}, {kCpu, kCpu, kMeta}, {kCpu, kMeta, kMeta}}) {
      const std::unique_ptr<Model> model = Tiny(name, devices);
      const std::vector<size_t> stages = StagesOf(model->config(), devices.size());
      const std::vector<int64_t> cached = model->config().CachedLayers();
      KvCache cache(ParseSpec("none"), model->cache_shape(2), 64, at::kFloat, model->cache_devices());
      size_t seen = 0;
      const auto tap = [&](const LayerView& view) {
        EXPECT_EQ(view.keys.device(), devices[stages[cached[view.cached_layer]]]) << name;
        EXPECT_EQ(view.attended.device(), view.keys.device()) << name;
        EXPECT_EQ(cache.storage(view.cached_layer).first.tokens.device(), view.keys.device()) << name;
        ++seen;
      };
      const at::Tensor hidden = Feed(*model, SomeIds(*model), cache, FindBackend("eager"), 13, 0, tap);
      EXPECT_EQ(seen, 4 * cached.size()) << name;
      EXPECT_EQ(hidden.device(), kMeta) << name;
      const at::Tensor logits = model->Logits(hidden);
      EXPECT_EQ(logits.device(), kMeta) << name;
      EXPECT_EQ(logits.size(2), model->config().vocab_size) << name;
      EXPECT_EQ(model->WeightBytes(kCpu) + model->WeightBytes(kMeta), model->WeightBytes()) << name;
      first_of_meta.insert(std::find(stages.begin(), stages.end(), stages.back()) - stages.begin());
    }
  }
  EXPECT_GT(first_of_meta.size(), 1u) << "the boundary lay at several layers";
}

TEST(Pipeline, TheCacheCountsItsScratchOnEveryDevice) {
  const CacheShape shape = CacheShape::Uniform(4, 1, 2, 64);
  const Spec spec = ParseSpec("int4-hqq@residual=8");
  const KvCache one(spec, shape, 32, at::kFloat, kCpu);
  const KvCache two(spec, shape, 32, at::kFloat, std::vector<at::Device>{kCpu, kCpu, kMeta, kMeta});
  EXPECT_EQ(two.AllocatedBytes(), one.AllocatedBytes());
  EXPECT_EQ(two.ScratchBytes(), 2 * one.ScratchBytes());
  EXPECT_THROW(KvCache(spec, shape, 32, at::kFloat, std::vector<at::Device>{kCpu, kCpu}), std::logic_error);
  int64_t sum = 0;
  for (size_t layer = 0; layer < 4; ++layer) sum += KvLayerBytes(spec, shape, layer, 29, at::kHalf);
  EXPECT_EQ(sum, KvBytes(spec, shape, 29, at::kHalf));
}

TEST(Pipeline, TheGraphRefusesSeveralDevices) {
  const c10::InferenceMode guard;
  const std::unique_ptr<Model> model = Tiny("llama-mha", {kCpu, kCpu}, at::kHalf);
  KvCache cache(ParseSpec("none"), model->cache_shape(1), 64, at::kHalf, model->cache_devices());
  try {
    DecodeGraph graph(*model, cache);
    FAIL() << "no refusal";
  } catch (const InputError& error) {
    const std::string why = error.what();
    EXPECT_NE(why.find("it runs on one GPU, and the layers lie on"), std::string::npos) << why;
  }
}

TEST(PipelineGpu, OneGpuInStagesGivesTheSameBits) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  const at::Device gpu(at::kCUDA, 0);
  for (const char* name : {"llama-gqa3", "qwen3-gqa4", "gemma4-shared"}) {
    const auto run = [&](const std::vector<at::Device>& devices) {
      return LogitsOf(*Tiny(name, devices, at::kHalf), "none");
    };
    EXPECT_TRUE(at::equal(run({gpu}), run({gpu, gpu}))) << name;
  }
}

// The GPUs are taken to be of one kind, so that both choose the same kernels.
TEST(PipelineGpu, TwoGpusGiveTheBitsOfOne) {
  KVQ_NEEDS_TWO_GPUS();
  const c10::InferenceMode guard;
  const at::Device first(at::kCUDA, 0), second(at::kCUDA, 1);
  for (const auto& [name, spec] : {std::pair("llama-gqa3", "none"), std::pair("gpt2", "none"),
                                   std::pair("gemma4-shared", "none"),
                                   std::pair("gemma3-dim256", "int8-hqq@group=32@residual=32@sinks=4")}) {
    const auto run = [&, name = name, spec = spec](const std::vector<at::Device>& devices) {
      return LogitsOf(*Tiny(name, devices, at::kHalf), spec).cpu();
    };
    const at::Tensor one = run({first});
    EXPECT_TRUE(at::equal(one, run({second}))) << name;
    EXPECT_TRUE(at::equal(one, run({first, second}))) << name;
    EXPECT_TRUE(at::equal(one, run({second, first}))) << name;
  }
}

TEST(PipelineGpu, TheStopwatchSeesWorkOfTheSecondGpu) {
  KVQ_NEEDS_TWO_GPUS();
  const std::vector<at::Device> both = {{at::kCUDA, 0}, {at::kCUDA, 1}};
  const at::Tensor a = at::randn({4096, 4096}, at::TensorOptions().device(both[1]));
  const auto seconds = [&](int products) {
    return Time(both, [&] {
      for (int i = 0; i < products; ++i) at::matmul(a, a);
    });
  };
  seconds(2);  // warm-up
  const double few = seconds(10), many = seconds(40);
  EXPECT_NEAR(many / few, 4, 1) << "clocks change, but not by a quarter";
}

// ---- which GPUs

std::string RefusalOf(const std::string& device) {
  try {
    ParseGpus(device);
  } catch (const InputError& error) {
    return error.what();
  }
  return "no refusal";
}

TEST(Devices, TheFlagNamesGpusByNumber) {
  const Environment none{{"CTEST_RESOURCE_GROUP_COUNT", "0"}};
  EXPECT_EQ(ParseGpus("cpu"), (std::vector<int>{}));
  EXPECT_EQ(ParseGpus("cuda"), (std::vector<int>{0}));
  EXPECT_EQ(ParseGpus("cuda:3"), (std::vector<int>{3}));
  EXPECT_EQ(ParseGpus("cuda:2,0,11"), (std::vector<int>{2, 0, 11}));
  EXPECT_EQ(ParseGpus("cuda:0,cuda:1"), (std::vector<int>{0, 1}));
  for (const char* bad : {"", "tpu", "cuda:", "cuda0", "cuda:x", "cuda:0,,1", "cuda:0,", "cuda:-1", "cuda:128", "0,1",
                          "cpu:0", "cuda:0 1"}) {
    EXPECT_NE(RefusalOf(bad).find("--device: cpu, cuda, cuda:1, or cuda:0,1"), std::string::npos) << bad;
  }
  EXPECT_NE(RefusalOf("cuda:1,0,1").find("names GPU 1 twice"), std::string::npos);
  EXPECT_EQ(DeviceText(at::Device("cpu")), "cpu");
  EXPECT_EQ(DeviceText({at::Device("cuda:1"), at::Device("cuda:0")}), "cuda:1,0");
}

TEST(Devices, CtestAllotsTheGpusOfPlainCuda) {
  {
    const Environment one{{"CTEST_RESOURCE_GROUP_COUNT", "1"}, {"CTEST_RESOURCE_GROUP_0_GPUS", "id:5,slots:1"}};
    EXPECT_EQ(ParseGpus("cuda"), (std::vector<int>{5}));
    EXPECT_EQ(ParseGpus("cuda:1"), (std::vector<int>{1})) << "who names a GPU gets it";
    EXPECT_EQ(ParseGpus("cpu"), (std::vector<int>{}));
  }
  {
    const Environment two{{"CTEST_RESOURCE_GROUP_COUNT", "2"},
                          {"CTEST_RESOURCE_GROUP_0_GPUS", "id:5,slots:1;id:2,slots:1"},
                          {"CTEST_RESOURCE_GROUP_1_GPUS", "id:0,slots:1"}};
    EXPECT_EQ(ParseGpus("cuda"), (std::vector<int>{5, 2, 0}));
  }
  const Environment names{{"CTEST_RESOURCE_GROUP_COUNT", "1"}, {"CTEST_RESOURCE_GROUP_0_GPUS", "id:left,slots:1"}};
  EXPECT_NE(RefusalOf("cuda").find("'id:left,slots:1' is not the number of a GPU"), std::string::npos);
}

// ---- ci/grid

class Grid : public testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    Write("two.json", R"({"version": {"major": 1, "minor": 0},
      "local": [{"gpus": [{"id": "97", "slots": 1}, {"id": "98", "slots": 1}]}]})");
  }
  void Write(const std::string& name, const std::string& text) { std::ofstream(dir_ / name) << text; }
  // Exit code of ci/grid with these arguments; kvqbench is the real one, or a script of this folder.
  int Run(const std::string& arguments, const std::string& kvqbench = KVQ_BENCH_EXE) {
    const int status = std::system(StrCat("cd ", dir_.string(), " && KVQ_BENCH_EXE=", kvqbench, " ", KVQ_SOURCE_DIR,
                                          "/ci/grid ", arguments, " >log 2>&1 </dev/null").c_str());
    std::ifstream file(dir_ / "log");
    log_ = std::string((std::istreambuf_iterator<char>(file)), {});
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  // A stand-in for kvqbench that takes a while and writes down when, and which GPUs it was given.
  std::string Clock() {
    Write("clock", R"(#!/bin/bash
for argument; do case $argument in --benchmark_out=*) out=${argument#*=} ;; esac; done
began=$(date +%s%N)
sleep 0.2
echo "$began $(date +%s%N) $CTEST_RESOURCE_GROUP_0_GPUS $CTEST_RESOURCE_GROUP_1_GPUS" >"$out"
echo run >>runs
)");
    fs::permissions(dir_ / "clock", fs::perms::owner_all);
    return (dir_ / "clock").string();
  }
  struct Cell {
    int64_t begin, end;
    std::string gpu;
  };
  std::vector<Cell> Cells() {
    std::vector<Cell> cells;
    for (const auto& entry : fs::directory_iterator(dir_ / "out")) {
      if (!fs::exists(entry.path() / "benchmarks.json")) continue;
      std::ifstream file(entry.path() / "benchmarks.json");
      Cell cell;
      file >> cell.begin >> cell.end;
      std::getline(file >> std::ws, cell.gpu);
      cells.push_back(cell);
    }
    return cells;
  }

  const fs::path dir_ = fs::path(testing::TempDir()) / TestName();
  std::string log_;
};

TEST_F(Grid, NoGpuHasTwoCellsAtATimeAndBothWork) {
  Write("grid", "--contexts=1\n--contexts=2  # a comment\n\n# another\n--contexts=3\n--contexts=4\n--contexts=5");
  ASSERT_EQ(Run("grid --out out --resources two.json", Clock()), 0) << log_;
  const std::vector<Cell> cells = Cells();
  ASSERT_EQ(cells.size(), 5u) << log_;
  std::set<std::string> gpus;
  for (const Cell& a : cells) {
    gpus.insert(a.gpu);
    for (const Cell& b : cells) {
      EXPECT_TRUE(&a == &b || a.gpu != b.gpu || a.end <= b.begin || b.end <= a.begin) << a.gpu;
    }
  }
  EXPECT_EQ(gpus, (std::set<std::string>{"id:97,slots:1 ", "id:98,slots:1 "}));
}

TEST_F(Grid, ACellMayHaveSeveralGpus) {
  Write("grid", "--contexts=1\n--contexts=2\n");
  ASSERT_EQ(Run("grid --out out --gpus 2 --resources two.json", Clock()), 0) << log_;
  const std::vector<Cell> cells = Cells();
  ASSERT_EQ(cells.size(), 2u) << log_;
  for (const Cell& cell : cells) {
    EXPECT_TRUE(cell.gpu == "id:97,slots:1 id:98,slots:1" || cell.gpu == "id:98,slots:1 id:97,slots:1") << cell.gpu;
  }
  EXPECT_EQ(Run("grid --out out --gpus 3 --resources two.json", Clock()), 2);
  EXPECT_NE(log_.find("--gpus=3: there are 2"), std::string::npos) << log_;
}

// Each cell by kvqbench's own rule: what a file has is not measured again.
TEST_F(Grid, ResumesWithWhatIsMissing) {
  const auto texts = [&] {
    std::multiset<std::string> all;
    for (const auto& entry : fs::directory_iterator(dir_ / "out")) {
      if (!fs::exists(entry.path() / "benchmarks.json")) continue;
      std::ifstream file(entry.path() / "benchmarks.json");
      all.emplace((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    }
    return all;
  };
  Write("none.json", R"({"version": {"major": 1, "minor": 0}, "local": [{"gpus": []}]})");
  const std::string flags = " --out out --resources none.json --models=gpt2 --benchmark_filter=kv_size";
  Write("grid", "--contexts=128\n--contexts=256\n");
  ASSERT_EQ(Run("grid" + flags), 0) << log_;
  const auto first = texts();
  ASSERT_EQ(first.size(), 2u) << log_;
  Write("grid", "--contexts=512\n--contexts=256\n--contexts=128\n");
  ASSERT_EQ(Run("grid" + flags), 0) << log_;
  const auto second = texts();
  EXPECT_EQ(second.size(), 3u);
  EXPECT_TRUE(std::includes(second.begin(), second.end(), first.begin(), first.end()));
}

// kvqbench itself takes the GPU it is allotted; no machine has as many, so it says which it could not have.
TEST_F(Grid, KvqbenchTakesTheGpuOfTheSpec) {
  Write("grid", "--models=mistral-7b --benchmark_filter=^kv_size --contexts=16\n"
                "--models=mistral-7b --benchmark_filter=^kv_size --contexts=32\n");
  EXPECT_EQ(Run("grid --out out --resources two.json"), 1) << log_;
  EXPECT_NE(log_.find("kvqbench: --device=cuda:97: "), std::string::npos) << log_;
  EXPECT_NE(log_.find("kvqbench: --device=cuda:98: "), std::string::npos) << log_;
  EXPECT_NE(log_.find("0 of 2 cells measured"), std::string::npos) << log_;
}

TEST_F(Grid, MeasuresOnWhatThereIs) {
  Write("grid", "--models=mistral-7b --contexts=16\n--models=qwen2-7b --contexts=16\n");
  ASSERT_EQ(Run("grid --out out --schemes=none,int4-hqq --dtype=bfloat16 --benchmark_filter='^kv_size/'"), 0) << log_;
  size_t runs = 0;
  for (const auto& entry : fs::directory_iterator(dir_ / "out")) {
    if (!fs::exists(entry.path() / "benchmarks.json")) continue;
    std::ifstream file(entry.path() / "benchmarks.json");
    runs += nlohmann::json::parse(file)["benchmarks"].size();
  }
  EXPECT_EQ(runs, 4u);
}

TEST_F(Grid, SaysWhatIsWrong) {
  const auto refuses = [&](const std::string& line, const std::string& part) {
    Write("grid", line);
    EXPECT_EQ(Run("grid --out out --resources two.json", Clock()), 2) << line;
    EXPECT_NE(log_.find(part), std::string::npos) << log_;
  };
  refuses("", "has no cells");
  refuses("--contexts 16", "'16' is no flag");
  refuses("--device=cuda:0", "the grid picks the GPUs");
  refuses("--contexts=1\n--contexts=1", "two cells '--contexts=1'");
  EXPECT_EQ(Run("nowhere --out out"), 2);
  EXPECT_NE(log_.find("nowhere: cannot be read"), std::string::npos) << log_;
}

}  // namespace
}  // namespace kvq
