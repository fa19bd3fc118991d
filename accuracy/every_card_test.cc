// Every kernel that ships, compiled for every card it ships to, without a GPU: no thread may want memory of its own (for
// registers that do not fit, or what is indexed as it runs), and what a block asks for must be there. What runs is what the functions of kernels/ would launch on such a card (Gather).
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>

#include "accuracy/golden.h"
#include "fixtures/cache/spec.h"
#include "kernels/device/attention.h"
#include "kernels/device/experts.h"
#include "kernels/device/latent_attention.h"
#include "kernels/device/newest.h"
#include "kernels/device/probe.h"
#include "kernels/device/sage.h"
#include "kernels/device/step.h"
#include "kernels/error.h"
#include "kernels/runtime/launch.h"

namespace kvq {

void PrintTo(const DeviceShape& card, std::ostream* out) { *out << card.block_shared / 1024 << " KiB a block"; }

namespace {

// Skips where NVRTC is not there; fails there where KVQ_REQUIRE_NVRTC=1, as in ci/test.
#define KVQ_NEEDS_NVRTC()                                                               \
  if (const std::string why = WhyNoNvrtc(); !why.empty()) {                             \
    const char* required = std::getenv("KVQ_REQUIRE_NVRTC");                            \
    ASSERT_FALSE(required != nullptr && std::string(required) == "1") << why;           \
    GTEST_SKIP() << why;                                                                \
  }
std::string WhyNoNvrtc() {
  try {
    NvrtcVersion();
    return "";
  } catch (const InputError& error) {
    return error.what();
  }
}

// A100, RTX 3090, RTX 4090, H100, B200, RTX 5090; limits: CUDA C++ Programming Guide, table of compute capabilities.
const std::vector<DeviceShape> kCards = {{108, 80, 163 << 10, 164 << 10}, {82, 86, 99 << 10, 100 << 10},
                                         {128, 89, 99 << 10, 100 << 10},  {132, 90, 227 << 10, 228 << 10},
                                         {148, 100, 227 << 10, 228 << 10}, {170, 120, 99 << 10, 100 << 10}};

using Launches = std::map<std::string, KernelLaunch>;  // by instance; of several the one that takes most shared memory

class Collector {
 public:
  explicit Collector(const DeviceShape& card) : card_(card) {}

  void Add(const std::function<void()>& work) {
    for (const KernelLaunch& launch : Gather(card_, work)) {
      KernelLaunch& known = launches_.emplace(launch.instance.name, launch).first->second;
      if (known.shared_bytes < launch.shared_bytes) known = launch;
    }
  }
  const Launches& launches() const { return launches_; }

 private:
  const DeviceShape& card_;
  Launches launches_;
};

struct AttentionKind {
  bool apart = false;  // values have a ring
  float cap = 0;
  bool encodes = false, makes_heads = false;  // the newest token's
  bool clusters = true;                       // those of few tokens, too
};
void AddAttention(Collector& all, const std::string& spec, int64_t dim, int64_t group, int64_t ratio, int32_t window,
                  DType dtype, const AttentionKind& kind = {}) {
  const SchemePair pair = ParseSpec(spec).schemes;
  DecodeAttentionArgs args;
  args.dtype = dtype, args.window = window, args.values_in_ring = kind.apart, args.softcap = kind.cap;
  args.keys.batch = 1, args.keys.head_dim = dim;
  args.values = args.keys;
  const Codec &keys = pair.keys->keys, &values = pair.values->values;
  for (const auto& [codec, params, turn] : {std::tuple(&keys, &args.key_params, &args.key_turn),
                                            std::tuple(&values, &args.value_params, &args.value_turn)}) {
    if (codec->planes == nullptr) continue;
    const bool choice = codec->device.plain == nullptr && std::ranges::count(codec->groups, group) > 0;
    params->group_size = choice ? group : codec->default_group;
    *turn = TurnOf(*codec, {}, dim);
    const bool in_tiles = dim == 64 || dim == 128 || dim == 256;  // attention turns, and reads groups of tokens, in these alone
    if (!in_tiles && (turn->block > 0 || (codec == &keys && codec->min_block_tokens > 1))) return;
    try {
      codec->planes(2, dim, *params);
    } catch (const InputError&) {
      return;  // a shape that the scheme refuses
    }
  }
  alignas(16) static const float there[4] = {};  // looked at, but not behind
  if (kind.encodes) {
    args.newest_is_encoded = true;
    if (DecodeAttentionEncodes(keys, dim)) args.newest_keys = there;
    if (DecodeAttentionEncodes(values, dim)) args.newest_values = there;
  }
  if (kind.makes_heads) args.made_of = there;
  // Few tokens of eight KV heads are read by blocks in a cluster, many are not.
  // Fewer still, of made heads, are not asked for ahead of the lengths.
  for (const auto& [heads, capacity] : {std::pair<int64_t, int64_t>(8, 4096), {2, 32768}, {4, 1024}}) {
    if ((capacity == 4096 && !kind.clusters) || (capacity == 1024 && !kind.makes_heads)) continue;
    args.query_heads = heads * ratio, args.keys.heads = args.values.heads = heads, args.keys.capacity = args.values.capacity = capacity;
    args.heads = {.heads = args.query_heads, .kv_heads = heads, .head_dim = dim};
    all.Add([&] { DecodeAttention(keys, values, args, nullptr); });
  }
}

constexpr int64_t kManyTokens = 1 << 20;  // of latents: other tiles than for few

// Of what a spec names keys are the latents; the rotary keys stay as they are where no second scheme is named.
void AddLatents(Collector& all, const std::string& spec, int64_t rank, int64_t turned, int64_t heads, DType dtype,
                int64_t tokens = 4096) {
  const SchemePair pair = ParseSpec(spec).schemes;
  const Codec &latents = pair.keys->keys, &rotary_keys = pair.apart ? pair.values->values : FindScheme("none").values;
  LatentAttentionArgs args;
  args.dtype = dtype, args.batch = 1, args.heads = heads, args.rank = rank, args.turned = turned, args.capacity = tokens;
  args.latents.params.group_size = latents.default_group, args.rotary_keys.params.group_size = rotary_keys.default_group;
  for (const auto& [codec, channels] : {std::pair(&latents, rank), std::pair(&rotary_keys, turned)}) {
    try {
      if (codec->planes != nullptr) codec->planes(1, channels, {.group_size = codec->default_group});
    } catch (const InputError&) {
      return;  // a shape that the scheme refuses
    }
  }
  all.Add([&] { LatentAttention(latents, rotary_keys, args, nullptr); });
}

// In a row's own groups, or in all that it names.
void AddCodecs(Collector& all, const Scheme& scheme, DType dtype, bool every_group) {
  DenseView x;
  x.dtype = dtype, x.batch = 1, x.heads = 2, x.tokens = 256, x.head_dim = 128;
  x.token_stride = 128, x.head_stride = 256 * 128, x.batch_stride = 2 * x.head_stride;
  KvView view;
  view.batch = 1, view.heads = 2, view.head_dim = 128, view.capacity = 256, view.block_tokens = 128;
  for (const Codec* codec : {&scheme.keys, &scheme.values}) {
    if (codec->encode == nullptr) continue;
    std::vector<int64_t> groups = {codec->default_group};
    if (every_group && !codec->groups.empty()) groups.assign(codec->groups.begin(), codec->groups.end());
    for (const int64_t group : groups) {
      const CodecParams params{.group_size = group};
      all.Add([&] {
        codec->encode_cuda(params, x, 0, view, nullptr);
        codec->decode_cuda(params, view, 0, x, nullptr);
      });
    }
  }
}

void AddNewest(Collector& all, const Codec& codec) {
  NewestToken token{.codec = &codec, .params = {.group_size = codec.default_group}};
  token.x.dtype = DType::kFloat16, token.x.batch = 1, token.x.heads = 2, token.x.tokens = 129, token.x.head_dim = 128;
  token.out.batch = 1, token.out.heads = 2, token.out.head_dim = 128, token.out.capacity = 256;
  all.Add([&] {
    EncodeNewest(&token, nullptr, nullptr);
    EncodeNewest(token, nullptr, 2, nullptr);
  });
}

constexpr float kNumber = 0;  // for pointers that are looked at, but not behind

void AddSteps(Collector& all, DType dtype) {
  const float there = 1;  // for what a kernel is chosen by whether it has
  for (const int64_t size : {4096, 8192, 1023}) {
    AddNormArgs norm = {.dtype = dtype, .rows = 1, .size = size};
    all.Add([&] { AddNorm(norm, nullptr); });
    all.Add([&] { AddNormed({.next = norm}, nullptr); });
    norm.shift = &there;
    all.Add([&] { AddNorm(norm, nullptr); });
    all.Add([&] { GateUp({.dtype = dtype, .rows = 1, .size = size}, nullptr, nullptr); });
    all.Add([&] { Activate({.dtype = dtype, .rows = 1, .size = size}, nullptr, nullptr); });
  }
  AppendArgs append;
  for (const int64_t dim : {512, 128}) {
    append.of = {.dtype = dtype, .rows = 1, .heads = 8, .kv_heads = 2, .head_dim = dim};
    all.Add([&] { TurnHeads(append.of, nullptr, nullptr); });
    all.Add([&] { AppendHeads(append, nullptr, nullptr); });
    AppendArgs with_value_norm = append;
    with_value_norm.of.v_norm = &there;
    all.Add([&] { AppendHeads(with_value_norm, nullptr, nullptr); });
  }
  for (const auto& [hidden, size] : {std::pair<int64_t, int64_t>(2048, 768), {2880, 2880}, {36, 20}}) {
    for (const int64_t rows : {1, 8}) {
      const ExpertsArgs experts = {.dtype = dtype, .rows = rows, .hidden = hidden, .size = size, .experts = 128, .per_token = 8};
      all.Add([&] { ExpertsUp(experts, nullptr), ExpertsDown(experts, nullptr); });
    }
  }
  all.Add([&] { LayerInputs({.dtype = dtype, .batch = 1, .layers = 2, .size = 256}, nullptr); });
  all.Add([&] { MergeAttention({.dtype = dtype, .batch = 1, .tokens = 1, .heads = 8, .head_dim = 128}, nullptr); });
  all.Add([&] { StartSteps({}, 1, nullptr, {}, {}, nullptr); });
  BeginArgs begin;
  begin.dtype = dtype, begin.batch = 1;
  all.Add([&] { BeginStep(begin, nullptr); });
  begin.positions = &there;
  all.Add([&] { BeginStep(begin, nullptr); });
  PickArgs pick;
  pick.dtype = dtype, pick.batch = 1;
  all.Add([&] { PickTokens(pick, nullptr); });
  pick.cap = 30;
  all.Add([&] { PickTokens(pick, nullptr); });
  for (const int64_t rows : {1, 2, 8}) {
    for (const int64_t in : {2048, 4096, 11008}) {  // x that is kept in registers, and stages that are not all whole
      for (const ProductEnd end : {ProductEnd::kPartial, ProductEnd::kStore, ProductEnd::kGate, ProductEnd::kAppend,
                                   ProductEnd::kActivate}) {
        for (const bool normalizes : {false, true}) {
          ProductArgs product;
          product.dtype = dtype, product.rows = rows, product.in = in, product.out = 12 * 128, product.end = end;
          product.normalizes = normalizes, product.append = append;
          product.gate.size = end == ProductEnd::kGate ? product.out / 2 : product.out;
          all.Add([&] {
            if (ProductFits(product)) Product(product, nullptr);
          });
        }
      }
    }
  }
}

void AddSage(Collector& all, DType dtype, int64_t dim) {
  SageArgs sage;
  sage.keys.dtype = dtype, sage.keys.batch = 1, sage.keys.heads = 2, sage.keys.tokens = 256, sage.keys.head_dim = dim;
  sage.queries = sage.values = sage.out = sage.keys;
  all.Add([&] { SageAttentionCuda(sage, nullptr); });
}

// As NAME or NAME+NAME: each scheme with itself, or where it knows one side alone with another that knows the other.
std::vector<std::string> FusedSchemes(bool plain) {
  std::vector<std::string> names;
  for (const Scheme& scheme : Schemes()) {
    if (!scheme.refused.empty() || !HasDecodeAttention(scheme.keys, scheme.values)) continue;
    if ((scheme.keys.device.plain != nullptr) == plain) names.push_back(scheme.name);
  }
  return names;
}

void ExpectFits(const DeviceShape& card, const Launches& launches) {
  std::vector<KernelInstance> instances;
  for (const auto& [name, launch] : launches) instances.push_back(launch.instance);
  const std::vector<CompiledKernel> compiled = CompileKernels(instances, card.arch);
  size_t i = 0;
  for (const auto& [name, launch] : launches) {
    const CompiledKernel& kernel = compiled[i++];
    // cosf and sinf have an array for angles that no context reaches.
    EXPECT_LE(kernel.local_bytes, name.starts_with("kvq::step::BeginKernel") ? 32 : 0) << name << " for sm_" << card.arch;
    EXPECT_LE(kernel.shared_bytes + static_cast<int64_t>(launch.shared_bytes), card.block_shared) << name;
    EXPECT_GT(kernel.registers, 0) << name;
    EXPECT_LE(kernel.registers * launch.threads, 65536) << name;  // of a multiprocessor
    // On the card that was timed a block of the output's product finds room beside one of attention's, which has 192 (attention.cc).
    const bool behind_attention = name.starts_with("kvq::step::ProductKernel<") && name.find(", kvq::ProductEnd(0), 0>") != std::string::npos;
    if (card.arch == 90 && behind_attention && launch.threads == 256) EXPECT_LE(kernel.registers, 64) << name;
  }
}

class EveryCard : public testing::TestWithParam<DeviceShape> {};

// Of default flags' kernels, compiled in some minutes of a processor: sm_90, whose blocks have the most shared memory and whose tiles
// were timed, takes those of heads of 128 channels and all that encodes, sm_86, whose blocks have the least, all attention over heads of
// 64 channels, too. Others take what is read most, in 16 bits and 4: which scheme it is differs little from card to card, and
// EveryCardEveryInstance takes all for each of the six. sm_89 runs what sm_86 does, latents among it, but for what the test behind these
// takes.
bool TakesEveryScheme(int arch) { return arch == 86 || arch == 90; }

// What a run with default flags and the schemes' own groups uses.
TEST_P(EveryCard, TakesTheDefaultInstances) {
  KVQ_NEEDS_NVRTC();
  const int arch = GetParam().arch;
  Collector all(GetParam());
  const std::vector<std::string> few = {"none", "int4-hqq"};
  for (const std::string& spec : TakesEveryScheme(arch) ? FusedSchemes(/*plain=*/false) : few) {
    if (arch == 86 || (arch == 90 && std::ranges::count(few, spec) > 0)) AddAttention(all, spec, 64, 64, 4, 0, DType::kFloat16);
    AddAttention(all, spec, 128, 64, 4, 0, DType::kFloat16);
  }
  if (arch == 90) {  // they are many
    std::vector<std::string> plain = FusedSchemes(/*plain=*/true);
    plain.insert(plain.end(), {"turboquant-k4+turboquant-v4", "turboquant-k3+turboquant-v3"});
    for (const std::string& spec : plain) {  // blocks of a cluster, which read fewer tokens, are EveryInstance's
      AddAttention(all, spec, 128, 0, 4, 0, DType::kFloat16, {.encodes = true, .clusters = false});
    }
  }
  if (TakesEveryScheme(arch)) {
    AddAttention(all, "int8-hqq+int4-hqq", 128, 64, 4, 0, DType::kFloat16);
    AddAttention(all, "none+int4-hqq", 256, 64, 2, 512, DType::kFloat16);
    for (const char* spec : {"kivi-4", "kivi-2"}) AddAttention(all, spec, 128, 32, 4, 0, DType::kFloat16, {.apart = true});
  }
  AddAttention(all, "int4-hqq", 256, 64, 4, 512, DType::kFloat16);
  AddAttention(all, "int4-hqq", 512, 64, 4, 0, DType::kFloat16);
  for (const std::string& spec : few) {  // Gemma 2's
    for (const int32_t window : {0, 512}) AddAttention(all, spec, 256, 64, 2, window, DType::kFloat16, {.cap = 50});
  }
  AddAttention(all, "none", 128, 0, 8, 0, DType::kFloat16, {.makes_heads = true});
  AddSteps(all, DType::kFloat16);
  AddSage(all, DType::kFloat16, 128);
  if (arch == 90) {
    for (const Scheme& scheme : Schemes()) AddCodecs(all, scheme, DType::kFloat16, /*every_group=*/false);
    AddNewest(all, FindScheme("kivi-2").values);
    AddNewest(all, FindScheme("turboquant-v4").values);
    all.Add([] { StreamingRead(nullptr, kStreamingReadBytes, nullptr, nullptr); });
    all.Add([] { CountClock(nullptr, nullptr); });
  }
  EXPECT_GT(all.launches().size(), 40u);
  ExpectFits(GetParam(), all.launches());
}

// DeepSeek-V2-Lite's and -V3's heads, and GLM-4.7-Flash's.
TEST_P(EveryCard, TakesLatents) {
  KVQ_NEEDS_NVRTC();
  Collector all(GetParam());
  std::vector<std::string> specs = {"none", "q4_0"};
  if (GetParam().arch == 90) specs.insert(specs.end(), {"q8_0", "fp8-e4m3+fp8-e4m3", "int8-hqq", "int4-hqq"});
  for (const std::string& spec : specs) {
    for (const int64_t heads : {16, 128}) AddLatents(all, spec, 512, 64, heads, DType::kBFloat16);
    AddLatents(all, spec, 512, 64, 16, DType::kBFloat16, kManyTokens);
  }
  for (const char* spec : {"none", "q4_0"}) AddLatents(all, spec, 512, 64, 20, DType::kBFloat16);
  AddLatents(all, "none+q8_0", 512, 64, 16, DType::kFloat16);
  EXPECT_GE(all.launches().size(), 6u);  // smaller cards take 20 heads and 128 alike
  ExpectFits(GetParam(), all.launches());
}

TEST(EightBitFloats, AreEncodedByAnInstructionOfSm89) {
  KVQ_NEEDS_NVRTC();
  const DeviceShape& card = kCards[2];
  Collector all(card);
  for (const char* scheme : {"fp8-e4m3", "fp8-e5m2", "fp8-e4m3-token", "mxfp8", "mxfp8-rceil", "nvfp4", "nvfp4-4over6"}) {
    AddCodecs(all, FindScheme(scheme), DType::kFloat16, /*every_group=*/false);
  }
  EXPECT_EQ(all.launches().size(), 14u);
  ExpectFits(card, all.launches());
}

class EveryCardEveryInstance : public testing::TestWithParam<DeviceShape> {};

TEST_P(EveryCardEveryInstance, Fits) {
  KVQ_NEEDS_NVRTC();
  Collector all(GetParam());
  for (const std::string& spec : FusedSchemes(/*plain=*/true)) {
    for (const bool encodes : {false, true}) {
      for (const int64_t dim : {64, 128, 256}) AddAttention(all, spec, dim, 0, 4, 0, DType::kFloat16, {.encodes = encodes});
      AddAttention(all, spec, 128, 0, 16, 512, DType::kFloat16, {.encodes = encodes});
    }
    AddAttention(all, spec, 96, 0, 3, 0, DType::kBFloat16);
  }
  // Where keys and values have unlike lengths: what dense tokens are read beside does not change what they need.
  for (const char* spec : {"kivi-4", "kivi-2", "int4-hqq", "int8-hqq+none", "none+int2-quanto", "q8_0+q4_0", "q5_1", "kivi-2+q8_0"}) {
    for (const int64_t dim : {64, 128, 256}) {
      for (const int64_t ratio : {4, 16}) AddAttention(all, spec, dim, 64, ratio, dim == 64 ? 512 : 0, DType::kBFloat16, {.apart = true});
    }
  }
  for (const char* spec : {"none", "int4-hqq", "int8-hqq+none", "none+int2-quanto", "q8_0", "kivi-2", "turboquant-k4+turboquant-v4"}) {
    for (const int64_t dim : {64, 96, 128, 256}) {
      if (dim == 96 && std::string(spec) != "none" && std::string(spec) != "int4-hqq") continue;
      for (const int64_t ratio : {2, 16}) AddAttention(all, spec, dim, 32, ratio, 512, DType::kBFloat16, {.cap = 50});
    }
  }
  for (const int64_t dim : {64, 128, 256}) {
    for (const int64_t ratio : {1, 4, 16}) {
      for (const int32_t window : {0, 512}) {
        AddAttention(all, "none", dim, 0, ratio, window, DType::kBFloat16, {.makes_heads = true});
      }
    }
  }
  const std::vector<std::string> schemes = FusedSchemes(/*plain=*/false);
  for (const std::string& keys : schemes) {
    for (const std::string& values : schemes) {
      const std::string spec = keys + "+" + values;
      for (const int32_t window : {0, 512}) {
        for (const int64_t dim : {64, 128, 256}) {
          for (const int64_t group : {32, 64, 128}) {
            if (keys != values && group != 64) continue;  // which group does not change what a pair of codecs needs
            for (const int64_t ratio : {4, 16}) {
              if (group <= dim) AddAttention(all, spec, dim, group, ratio, window, DType::kFloat16);
            }
          }
        }
        for (const int64_t dim : {32, 80, 96, 192, 512}) {
          for (const int64_t ratio : {1, 2, 3, 4}) AddAttention(all, spec, dim, 32, ratio, window, DType::kBFloat16);
        }
      }
    }
  }
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const Scheme& scheme : Schemes()) AddCodecs(all, scheme, dtype, /*every_group=*/true);
    if (dtype == DType::kFloat32) continue;
    AddSteps(all, dtype);
    for (const int64_t dim : {64, 128}) AddSage(all, dtype, dim);
  }
  ExpectFits(GetParam(), all.launches());
}

// Every scheme that it reads, of the latents and of both parts.
TEST_P(EveryCardEveryInstance, FitsLatents) {
  KVQ_NEEDS_NVRTC();
  Collector all(GetParam());
  for (const Scheme& scheme : Schemes()) {
    if (!scheme.refused.empty() || !HasLatentAttention(scheme.keys, scheme.values)) continue;
    for (const int64_t heads : {16, 20, 128}) {
      for (const int64_t tokens : {int64_t{4096}, kManyTokens}) {
        AddLatents(all, scheme.name, 512, 64, heads, DType::kFloat16, tokens);
        if (heads == 16) AddLatents(all, scheme.name + "+" + scheme.name, 512, 64, heads, DType::kBFloat16, tokens);
      }
    }
  }
  AddLatents(all, "none+q8_0", 512, 64, 16, DType::kFloat16);
  for (const int64_t rank : {16, 64, 96}) AddLatents(all, "none", rank, 8, 4, DType::kBFloat16);
  for (const int64_t rank : {64, 128, 192, 320, 384, 448}) AddLatents(all, "none", rank, 64, 16, DType::kBFloat16);
  for (const int64_t rank : {128, 256}) AddLatents(all, "int4-hqq+int8-hqq", rank, 64, 4, DType::kFloat16);
  ExpectFits(GetParam(), all.launches());
}

const auto kNames = [](const testing::TestParamInfo<DeviceShape>& info) { return StrCat("sm_", info.param.arch); };
INSTANTIATE_TEST_SUITE_P(Cards, EveryCard, testing::Values(kCards[0], kCards[1], kCards[3], kCards[4], kCards[5]), kNames);
INSTANTIATE_TEST_SUITE_P(Cards, EveryCardEveryInstance, testing::ValuesIn(kCards), kNames);

// ---- the folder of compiled kernels

// A folder of its own, and the lines that say what is compiled.
class KernelCache : public testing::Test {
 protected:
  void SetUp() override {
    KVQ_NEEDS_NVRTC();  // and loads it, before the cache is another one: it may have come from there
    setenv("KVQ_CACHE", folder_.c_str(), 1);
    std::filesystem::remove_all(folder_);
    OnCompiling([this](const std::string& line) { lines_.push_back(line); });
  }
  void TearDown() override {
    if (IsSkipped()) return;
    OnCompiling([](const std::string& line) { fprintf(stderr, "kvqbench: %s\n", line.c_str()); });
    std::filesystem::remove_all(folder_);
    if (before_) setenv("KVQ_CACHE", before_->c_str(), 1);
    else unsetenv("KVQ_CACHE");
  }
  std::vector<std::filesystem::path> Files() const {
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(folder_ + "/kernels")) files.push_back(entry.path());
    return files;
  }

  const std::optional<std::string> before_ =
      getenv("KVQ_CACHE") != nullptr ? std::optional<std::string>(getenv("KVQ_CACHE")) : std::nullopt;
  const std::string folder_ = testing::TempDir() + "/" + TestName();
  std::vector<std::string> lines_;
  const KernelInstance kernel_{{"kernels/device/probe.cuh"}, "kvq::probe::StreamingReadKernel"};
};

TEST_F(KernelCache, CompilesOnceAndOnlyWhatChanged) {
  const int64_t before = CompiledCount();
  const CompiledKernel first = CompileKernel(kernel_, 90);
  EXPECT_EQ(CompiledCount(), before + 1);
  const CompiledKernel second = CompileKernel(kernel_, 90);
  EXPECT_EQ(CompiledCount(), before + 1) << "the second time it comes from the folder";
  EXPECT_EQ(first.cubin, second.cubin);
  EXPECT_EQ(first.symbol, second.symbol);
  EXPECT_EQ(first.registers, second.registers);
  EXPECT_EQ(lines_.size(), 1u);
  EXPECT_NE(lines_[0].find("compiling 1 kernel for sm_90 (kvq::probe::StreamingReadKernel)"), std::string::npos) << lines_[0];
  CompileKernel(kernel_, 86);  // another architecture is another file
  EXPECT_EQ(CompiledCount(), before + 2);
  EXPECT_EQ(Files().size(), 2u);
}

TEST_F(KernelCache, CompilesADamagedFileAnew) {
  const CompiledKernel good = CompileKernel(kernel_, 90);
  ASSERT_EQ(Files().size(), 1u);
  const std::filesystem::path file = Files().front();
  const auto size = std::filesystem::file_size(file);
  for (const auto& damage : std::vector<std::function<void()>>{
           [&] { std::filesystem::resize_file(file, size - 1); }, [&] { std::filesystem::resize_file(file, 0); },
           [&] {
             std::fstream(file, std::ios::in | std::ios::out | std::ios::binary).seekp(static_cast<int64_t>(size / 2)).put('#');
           }}) {
    damage();
    const int64_t before = CompiledCount();
    EXPECT_EQ(CompileKernel(kernel_, 90).cubin, good.cubin);
    EXPECT_EQ(CompiledCount(), before + 1);
    EXPECT_EQ(std::filesystem::file_size(file), size);
  }
}

TEST_F(KernelCache, AFolderThatCannotBeWrittenCostsTimeOnly) {
  setenv("KVQ_CACHE", "/proc/none", 1);
  EXPECT_FALSE(CompileKernel(kernel_, 90).cubin.empty());
}

TEST_F(KernelCache, HasABound) {
  CompileKernel(kernel_, 90);
  // Old files of other builds, a little more than there is room for; holes take no space on the disk.
  for (int i = 0; i < 3; ++i) {
    const std::string old = StrCat(folder_, "/kernels/old", i);
    std::ofstream(old) << "x";
    std::filesystem::resize_file(old, kCacheBytes / 3 + 1000);
    std::filesystem::last_write_time(old, std::filesystem::file_time_type::clock::now() - std::chrono::hours(3 - i));
  }
  CompileKernel(kernel_, 86);
  EXPECT_FALSE(std::filesystem::exists(folder_ + "/kernels/old0")) << "the least recently used goes first";
  EXPECT_TRUE(std::filesystem::exists(folder_ + "/kernels/old2"));
  EXPECT_EQ(Files().size(), 4u);
}

TEST_F(KernelCache, SaysWhatDoesNotCompile) {
  try {
    CompileKernel({{"kernels/device/probe.cuh"}, "kvq::probe::NoSuchKernel"}, 90);
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("for sm_90 does not compile: "), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("error: "), std::string::npos) << error.what();
  }
}

TEST(SharedLimit, IsANumberOfBytes) {
  EXPECT_EQ(ParseSharedLimit(nullptr), std::nullopt);
  EXPECT_EQ(ParseSharedLimit(""), std::nullopt);
  EXPECT_EQ(ParseSharedLimit("98304"), 98304);
  EXPECT_EQ(ParseSharedLimit("101376"), 101376);
  for (const char* text : {"x", "98303", "0", "-1", "101376 ", "101376b", "99999999999"}) {
    EXPECT_THROW(ParseSharedLimit(text), InputError) << text;
  }
}

TEST(DecodeAttention, TakesSmallerTilesOnASmallerCard) {
  const Codec& codec = FindScheme("none").keys;
  DecodeAttentionArgs args;
  args.query_heads = 8;
  args.keys.batch = 1, args.keys.heads = 2, args.keys.head_dim = 128, args.keys.capacity = 4096;
  args.values = args.keys;
  std::string large, small;
  Gather(kCards[3], [&] { large = DecodeAttentionName(codec, codec, args); });
  Gather(kCards[1], [&] { small = DecodeAttentionName(codec, codec, args); });
  EXPECT_EQ(large, "fused_decode_16bit (sm_90: 8 warps x 3 x 16 tokens)");
  EXPECT_EQ(small, "fused_decode_16bit (sm_86: 4 warps x 3 x 16 tokens)");
}

TEST(Product, OfASmallMatrixHasBlocksForWhichThereIsNoRoomTwice) {
  const auto of = [](const DeviceShape& card, int64_t in, int64_t out) {
    ProductArgs args;
    args.rows = 1, args.in = in, args.out = out, args.end = ProductEnd::kPartial;
    return Gather(card, [&] { Product(args, nullptr); }).at(0);
  };
  // A100, H100 and B200; the others' blocks have no room for a second one of anything.
  for (const DeviceShape& card : {kCards[0], kCards[3], kCards[4]}) {
    const unsigned all = card.multiprocessors;
    const KernelLaunch small = of(card, 2048, 2048), large = of(card, 4096, 14336), few = of(card, 2048, 128);
    EXPECT_EQ(small.grid.x, all) << card.arch;
    EXPECT_GT(2 * (small.shared_bytes + 1024), static_cast<size_t>(card.shared)) << card.arch;
    EXPECT_LE(small.shared_bytes + 1024 + few.shared_bytes + 1024, static_cast<size_t>(card.shared)) << card.arch;
    EXPECT_EQ(large.grid.x, 2 * all) << card.arch;
    EXPECT_LE(2 * (large.shared_bytes + 1024), static_cast<size_t>(card.shared)) << card.arch;
    EXPECT_EQ(few.grid.x, 16u) << card.arch;
  }
}

TEST(LatentAttention, TakesOneBlockAMultiprocessorForFewTokens) {
  const auto of = [](const DeviceShape& card, const char* scheme, int64_t batch, int64_t tokens) {
    const Codec &latents = FindScheme(scheme).keys, &rotary_keys = FindScheme("none").values;
    LatentAttentionArgs args;
    args.dtype = DType::kBFloat16, args.batch = batch, args.heads = 16, args.rank = 512, args.turned = 64, args.capacity = tokens;
    args.latents.params.group_size = latents.default_group;
    std::string name;
    const std::vector<KernelLaunch> launches = Gather(card, [&] {
      name = LatentAttentionName(latents, rotary_keys, args);
      LatentAttention(latents, rotary_keys, args, nullptr);
    });
    return StrCat(name.substr(name.find(':') + 2), ", ", launches.at(0).grid.x, " and ", launches.at(1).grid.x);
  };
  for (const int64_t batch : {1, 4}) {
    EXPECT_EQ(of(kCards[3], "none", batch, 32768), "1 x 9 warps x 4 x 32 tokens), 132 and 128") << batch;
    EXPECT_EQ(of(kCards[3], "q8_0", batch, 32768), "1 x 8 warps x 2 x 64 tokens), 132 and 128") << batch;
  }
  EXPECT_EQ(of(kCards[3], "q4_0", 1, 32768), "1 x 8 warps x 3 x 64 tokens), 132 and 128") << "there is room for a third stage";
  EXPECT_EQ(of(kCards[3], "none", 8, 32768), "1 x 9 warps x 4 x 32 tokens), 128 and 256");
  EXPECT_EQ(of(kCards[3], "q8_0", 8, 32768), "2 x 8 warps x 3 x 32 tokens), 264 and 256");
  EXPECT_EQ(of(kCards[3], "none", 8, 131072), "2 x 8 warps x 2 x 32 tokens), 264 and 256");
  EXPECT_EQ(of(kCards[3], "none", 1, 1 << 20), "2 x 8 warps x 2 x 32 tokens), 256 and 256") << "256 rows by 32 channels";
  EXPECT_EQ(of(kCards[1], "q8_0", 1, 32768), "1 x 8 warps x 2 x 32 tokens), 82 and 128");
}

}  // namespace
}  // namespace kvq
