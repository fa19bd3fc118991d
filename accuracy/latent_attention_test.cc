// Fused decode attention over latents against attention in float64 over the tokens as the CPU decodes them.
#include <algorithm>
#include <array>
#include <cmath>

#include "accuracy/encoded.h"
#include "fixtures/cache/kv_cache.h"
#include "fixtures/cache/spec.h"
#include "fixtures/latent_attention.h"
#include "fixtures/machine/device.h"
#include "kernels/device/latent_attention.h"
#include "kernels/error.h"
#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

using at::Tensor;

constexpr int64_t kMany = 1 << 20;  // tokens, so that tiles are those of long sequences

struct LatentCase {
  std::string spec;  // as of a cache of latents: the rotary keys stay as they are where no second scheme is named
  int64_t heads, rank = 512, turned = 64;
  std::vector<SequenceLength> lengths = {{0, 1000, 0}};  // of each sequence
  at::ScalarType dtype = at::kBFloat16;
  int64_t capacity = 0;  // where it is more than there are tokens

  std::array<const Codec*, 2> Codecs() const {
    const SchemePair pair = ParseSpec(spec).schemes;
    return {&pair.keys->keys, pair.apart ? &pair.values->values : &FindScheme("none").values};
  }
  bool dense() const { return Codecs()[0]->encode == nullptr && Codecs()[1]->encode == nullptr; }
};

// One part of the tokens: where they are on the GPU, and all of a sequence's as they should be read, [tokens, channels].
struct Part {
  Tensor tokens, sinks, residual;
  EncodedTensors encoded;
  CodecParams params;
  std::vector<Tensor> read;
};

// `tokens`: where they stand if they are not encoded, [batch, 1, capacity, channels], NaN.
Part MakePart(const LatentCase& c, const Codec& codec, const Tensor& tokens, int64_t capacity) {
  const int64_t batch = tokens.size(0), channels = tokens.size(3);
  const auto normal = [&](int64_t n) { return at::randn({batch, 1, n, channels}).to(c.dtype); };
  const auto counts = [&](auto member) {
    int64_t most = 1;
    for (const SequenceLength& length : c.lengths) most = std::max<int64_t>(most, length.*member);
    return most;
  };
  Part part;
  part.sinks = normal(counts(&SequenceLength::sinks)), part.residual = normal(counts(&SequenceLength::residual));
  Tensor between = normal(capacity);
  if (codec.encode != nullptr) {
    part.params.group_size = codec.default_group;
    EncodedTensors on_cpu = Encode(codec, part.params, between, 1);
    Tensor decoded = at::empty(between.sizes(), at::kFloat);  // rounded once: schemes that are typed would round each operation
    DecodeTensor(codec, part.params, on_cpu, 0, decoded);
    between = decoded.to(c.dtype);
    for (int64_t b = 0; b < batch; ++b) {  // what lies behind the length must not be seen
      for (Tensor& plane : on_cpu.planes) {
        Tensor rows = plane[b].view({capacity, -1});
        rows.narrow(0, c.lengths[static_cast<size_t>(b)].encoded, capacity - c.lengths[static_cast<size_t>(b)].encoded).fill_(0xFF);
      }
    }
    part.encoded = on_cpu;
    for (Tensor& plane : part.encoded.planes) plane = plane.cuda();
  }
  for (int64_t b = 0; b < batch; ++b) {
    const SequenceLength& length = c.lengths[static_cast<size_t>(b)];
    const Tensor all = at::cat({part.sinks[b][0].narrow(0, 0, length.sinks), between[b][0].narrow(0, 0, length.encoded),
                                part.residual[b][0].narrow(0, 0, length.residual)}, 0);
    if (codec.encode == nullptr) tokens[b][0].narrow(0, 0, all.size(0)).copy_(all);
    part.read.push_back(all.to(at::kDouble));
    // Behind the length, of these as well.
    for (const auto& [rows, n] : {std::pair(&part.sinks, length.sinks), std::pair(&part.residual, length.residual)}) {
      (*rows)[b][0].narrow(0, n, rows->size(2) - n).fill_(NAN);
    }
  }
  part.tokens = tokens, part.sinks = part.sinks.cuda(), part.residual = part.residual.cuda();
  return part;
}

void CheckOne(const LatentCase& c) {
  SCOPED_TRACE(StrCat(c.spec, " heads ", c.heads, " rank ", c.rank, " + ", c.turned, " lengths ", c.lengths[0].sinks, "/", c.lengths[0].encoded,
                      "/", c.lengths[0].residual, " of ", c.lengths.size(), " ", c.dtype));
  const auto codecs = c.Codecs();
  const int64_t batch = static_cast<int64_t>(c.lengths.size()), channels = c.rank + c.turned;
  int64_t capacity = 16, all_tokens = 1;
  for (const SequenceLength& length : c.lengths) {
    capacity = std::max<int64_t>(capacity, (length.encoded + 31) / 16 * 16);
    all_tokens = std::max<int64_t>(all_tokens, length.sinks + length.encoded + length.residual + 3);
  }
  const Tensor both = at::full({batch, 1, all_tokens, channels}, NAN, at::TensorOptions(c.dtype));  // side by side
  Part parts[2] = {MakePart(c, *codecs[0], both.narrow(3, 0, c.rank), capacity),
                   MakePart(c, *codecs[1], both.narrow(3, c.rank, c.turned), capacity)};
  const Tensor on_gpu = both.cuda(), queries = at::randn({batch, c.heads, channels}).to(c.dtype);
  parts[0].tokens = on_gpu.narrow(3, 0, c.rank), parts[1].tokens = on_gpu.narrow(3, c.rank, c.turned);
  const double scale = 1 / std::sqrt(static_cast<double>(channels));

  // Weights are rounded to 16 bits once, to 11 bits of them or 8, and the output is. Tokens are read as the CPU rounds them.
  const double roundoff = std::ldexp(1, c.dtype == at::kHalf ? -11 : -8);
  Tensor expected = at::zeros({batch, c.heads, c.rank}, at::kDouble), allowed = at::zeros_like(expected);
  for (int64_t b = 0; b < batch; ++b) {
    const Tensor &latents = parts[0].read[static_cast<size_t>(b)], &rotary_keys = parts[1].read[static_cast<size_t>(b)];
    if (latents.size(0) == 0) continue;
    const Tensor p = at::softmax(at::matmul(queries[b].to(at::kDouble), at::cat({latents, rotary_keys}, 1).t()) * scale, -1);
    expected[b].copy_(at::matmul(p, latents));
    allowed[b].copy_(roundoff * (at::matmul(p, latents.abs()) + expected[b].abs()));
  }

  std::vector<int32_t> counts;
  for (const SequenceLength& length : c.lengths) counts.insert(counts.end(), {length.sinks, length.encoded, length.residual});
  const Tensor lengths = at::tensor(counts, at::kInt).cuda(), queries_on_gpu = queries.cuda();
  const Tensor out = at::full({batch, c.heads, c.rank}, NAN, queries_on_gpu.options());
  const auto side = [&](const Part& part, const Codec& codec) {
    return LatentSide{.codes = codec.encode != nullptr ? part.encoded.view() : KvView(), .params = part.params, .tokens = ViewOf(part.tokens),
                      .sinks = ViewOf(part.sinks), .residual = ViewOf(part.residual)};
  };
  LatentAttentionArgs args{.dtype = DTypeOf(c.dtype), .batch = batch, .heads = c.heads, .rank = c.rank, .turned = c.turned,
                           .queries = queries_on_gpu.data_ptr(), .out = out.data_ptr(), .scale = static_cast<float>(scale),
                           .latents = side(parts[0], *codecs[0]), .rotary_keys = side(parts[1], *codecs[1]), .capacity = std::max(c.capacity, all_tokens),
                           .lengths = reinterpret_cast<const SequenceLength*>(lengths.data_ptr())};
  const Tensor workspace = at::full({LatentAttentionWorkspace(*codecs[0], *codecs[1], args)}, 0xFF, lengths.options().dtype(at::kByte));
  args.workspace = workspace.data_ptr();
  // A workspace serves again; and early, behind a kernel that changes the lengths.
  for (int launch = 0; launch < 3; ++launch) {
    out.fill_(NAN);
    args.early = launch == 2;
    if (const Tensor late = at::bitwise_and(lengths, 0x7FFFFFC0); args.early) {
      lengths.sub_(late);
      Synchronize(lengths.device());
      lengths.add_(late);
    }
    LatentAttention(*codecs[0], *codecs[1], args, nullptr);
    const Tensor error = (out.cpu().to(at::kDouble) - expected).abs();
    EXPECT_TRUE(error.le(allowed + 1e-30).all().item<bool>())
        << "launch " << launch << " of " << LatentAttentionName(*codecs[0], *codecs[1], args) << ": " << (error / (allowed + 1e-30)).max().item<double>() << " of what is allowed";
  }
}

// All kernels first, as many at a time as there are processors.
void CheckAll(const std::vector<LatentCase>& cases) {
  Prepare([&] {
    for (const LatentCase& c : cases) {
      const auto codecs = c.Codecs();
      LatentAttentionArgs args{.dtype = DTypeOf(c.dtype), .batch = static_cast<int64_t>(c.lengths.size()), .heads = c.heads, .rank = c.rank,
                               .turned = c.turned, .capacity = c.capacity};
      args.latents.params.group_size = codecs[0]->default_group, args.rotary_keys.params.group_size = codecs[1]->default_group;
      LatentAttention(*codecs[0], *codecs[1], args, nullptr);
    }
  });
  for (const LatentCase& c : cases) CheckOne(c);
}

TEST(LatentAttentionGpu, EqualsAttentionOverTokensAsTheyAre) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(11);
  std::vector<LatentCase> cases;
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16}) {
    for (const int64_t heads : {1, 16, 20, 40, 128}) {
      for (const int32_t tokens : {0, 1, 31, 32, 33, 64, 65, 1000}) cases.push_back({"none", heads, 512, 64, {{0, tokens, 0}, {0, 70, 0}}, dtype});
    }
    for (const int64_t rank : {16, 64, 96}) cases.push_back({"none", 4, rank, 8, {{0, 100, 0}, {0, 7, 0}}, dtype});
    for (const int64_t rank : {64, 128, 192, 320, 384, 448}) {  // some of which are a power of two
      for (const int64_t capacity : {int64_t{0}, kMany}) cases.push_back({"none", 16, rank, 64, {{0, 1000, 0}, {0, 70, 0}}, dtype, capacity});
    }
    cases.push_back({"none", 16, 512, 64, {{0, 20000, 0}}, dtype});
    for (const int32_t tokens : {0, 31, 32, 33, 1000, 20000}) cases.push_back({"none", 16, 512, 64, {{0, tokens, 0}, {0, 70, 0}}, dtype, kMany});
  }
  CheckAll(cases);
}

TEST(LatentAttentionGpu, EqualsAttentionOverDecodedTokens) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(12);
  std::vector<LatentCase> cases;
  const auto fits = [](const Codec& codec, int64_t channels) {
    try {
      codec.planes(1, channels, {.group_size = codec.default_group});
      return true;
    } catch (const InputError&) {
      return false;
    }
  };
  for (const Scheme& scheme : Schemes()) {
    if (!scheme.refused.empty() || scheme.stores_dense() || !HasLatentAttention(scheme.keys, scheme.values) || !fits(scheme.keys, 512)) continue;
    cases.push_back({scheme.name, 16, 512, 64, {{0, 333, 0}, {5, 64, 100}}, at::kHalf, kMany});
    if (fits(scheme.values, 64)) cases.push_back({scheme.name + "+" + scheme.name, 16, 512, 64, {{4, 500, 31}, {0, 7, 0}}, at::kBFloat16});
  }
  EXPECT_GT(cases.size(), 20u);
  for (const char* spec : {"q8_0", "q4_0", "int4-hqq", "fp8-e4m3+fp8-e4m3", "none+q8_0"}) {
    for (const int64_t heads : {3, 20, 128}) cases.push_back({spec, heads, 512, 64, {{8, 300, 128}, {0, 0, 1}, {3, 0, 0}, {0, 0, 0}}, at::kBFloat16});
    for (const int32_t encoded : {1, 31, 32, 33, 20000}) {
      for (const int64_t capacity : {int64_t{0}, kMany}) cases.push_back({spec, 16, 512, 64, {{4, encoded, 17}}, at::kHalf, capacity});
    }
  }
  for (const int64_t rank : {64, 128, 256}) {
    cases.push_back({rank == 64 ? "int8-hqq" : "int4-hqq", 4, rank, 64, {{2, 100, 16}}, at::kHalf});
    cases.push_back({"q8_0+int2-hqq", 4, rank, 64, {{2, 100, 16}}, at::kHalf});
  }
  cases.push_back({"int4-hqq+q4_0", 16, 512, 128, {{2, 100, 16}}, at::kHalf});
  CheckAll(cases);
}

// Few enough for compute-sanitizer.
TEST(LatentAttentionGpu, AFewShapes) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(14);
  CheckAll({{"none", 16, 512, 64, {{0, 200, 0}, {0, 33, 0}}, at::kBFloat16},
            {"q8_0", 20, 512, 64, {{3, 200, 40}, {0, 0, 5}}, at::kHalf},
            {"q5_1", 16, 512, 64, {{3, 200, 40}, {0, 0, 5}}, at::kHalf},
            {"int4-hqq", 128, 512, 64, {{0, 100, 33}}, at::kBFloat16},
            {"fp8-e4m3+fp8-e4m3", 16, 512, 64, {{0, 100, 0}}, at::kBFloat16},
            {"q8_0", 16, 512, 64, {{3, 200, 40}, {0, 0, 5}}, at::kBFloat16, kMany},
            {"none+q8_0", 4, 512, 64, {{2, 70, 3}}, at::kHalf},
            {"none", 4, 16, 8, {{0, 100, 0}}, at::kHalf},
            // More tiles of a block than it has stages, on a card with no more than 132 multiprocessors.
            {"none", 5, 512, 64, std::vector<SequenceLength>(44, {0, 601, 0}), at::kHalf}});
}

// The newest token's latent is not there before the kernel before has written it, which begins early itself. That kernel is attention
// over equal tokens, whose sum is the token to the bit: of 256 channels of float16, the bytes of 512 codes.
TEST(LatentAttentionGpu, DoesNotReadTheNewestTokenEarly) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(16);
  const Codec& none = FindScheme("none").keys;
  const auto options = at::TensorOptions(at::kHalf).device(at::kCUDA);
  const Tensor slow = at::zeros({1 << 27}, options);
  for (const char* name : {"none", "fp8-e4m3"}) {
    const Codec& codec = FindScheme(name).keys;
    for (const int64_t tokens : {1, 40, 64, 65, 300, 5000}) {
      SCOPED_TRACE(StrCat(name, " tokens ", tokens));
      const int64_t capacity = (tokens + 15) / 16 * 16;
      const Tensor latents = at::randn({1, 1, capacity, 512}, options), rotary_keys = at::randn({1, 1, capacity, 64}, options);
      const Tensor queries = at::randn({1, 16, 576}, options), out = at::empty({1, 16, 512}, options);
      LatentAttentionArgs args{.dtype = DType::kFloat16, .batch = 1, .heads = 16, .rank = 512, .turned = 64, .queries = queries.data_ptr(),
                               .out = out.data_ptr(), .scale = 0.05f, .capacity = capacity, .length = {0, static_cast<int32_t>(tokens), 0},
                               .newest_is_encoded = codec.encode != nullptr};
      EncodedTensors encoded;
      args.latents.tokens = ViewOf(latents), args.rotary_keys.tokens = ViewOf(rotary_keys);
      Tensor row = latents[0][0][tokens - 1];
      if (codec.encode != nullptr) {
        encoded = Encode(codec, {}, latents.cpu(), 1);
        for (Tensor& plane : encoded.planes) plane = plane.cuda();
        args.latents.codes = encoded.view();
        row = encoded.planes[0].view({capacity, 512})[tokens - 1].view(at::kHalf);
      }
      const Tensor workspace = at::empty({LatentAttentionWorkspace(codec, none, args)}, options.dtype(at::kByte));
      args.workspace = workspace.data_ptr();
      LatentAttention(codec, none, args, nullptr);
      const Tensor expected = out.cpu();
      EXPECT_FALSE(expected.isnan().any().item<bool>());

      constexpr int32_t kEqual = 1024;
      const Tensor newest = row.clone(), no_keys = at::zeros({1, 1, kEqual, 64}, options), any = at::zeros({1, 1, row.size(0) + 64}, options);
      LatentAttentionArgs writes{.dtype = DType::kFloat16, .batch = 1, .heads = 1, .rank = row.size(0), .turned = 64, .queries = any.data_ptr(),
                                 .out = row.data_ptr(), .capacity = kEqual, .length = {0, kEqual, 0}};
      writes.latents.tokens = ViewOf(newest.view({1, 1, 1, -1}).expand({1, 1, kEqual, -1})), writes.rotary_keys.tokens = ViewOf(no_keys);
      const Tensor room = at::empty({LatentAttentionWorkspace(none, none, writes)}, options.dtype(at::kByte));
      writes.workspace = room.data_ptr();
      for (const bool early : {false, true, true}) {  // of which the first loads its kernels
        args.early = early;
        row.fill_(NAN), out.fill_(0);
        for (int i = 0; i < 4; ++i) slow.add_(1);  // so that both are launched by the time that the first begins
        LatentAttention(none, none, writes, nullptr);
        LatentAttention(codec, none, args, nullptr);
        EXPECT_TRUE(out.cpu().equal(expected)) << "early " << early;
        EXPECT_TRUE(row.equal(newest));
      }
    }
  }
}

// What is copied by lengths that are from before the step is copied anew by its own. The kernel before, attention over equal tokens as
// above, writes these: a row of 16 float16, which begins as it does.
TEST(LatentAttentionGpu, TakesLengthsThatTheKernelBeforeWrites) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(17);
  const Codec& none = FindScheme("none").keys;
  const auto options = at::TensorOptions(at::kHalf).device(at::kCUDA);
  const Tensor slow = at::zeros({1 << 27}, options);
  constexpr int64_t kCapacity = 40000, kEqual = 1024;
  const Tensor latents = at::randn({1, 1, kCapacity, 512}, options), rotary_keys = at::randn({1, 1, kCapacity, 64}, options);
  const Tensor queries = at::randn({1, 16, 576}, options), out = at::empty({1, 16, 512}, options);
  for (const char* name : {"none", "fp8-e4m3"}) {
    const Codec& codec = FindScheme(name).keys;
    EncodedTensors encoded;
    LatentAttentionArgs args{.dtype = DType::kFloat16, .batch = 1, .heads = 16, .rank = 512, .turned = 64, .queries = queries.data_ptr(),
                             .out = out.data_ptr(), .scale = 0.05f, .capacity = kCapacity};
    args.latents.tokens = ViewOf(latents), args.rotary_keys.tokens = ViewOf(rotary_keys);
    if (codec.encode != nullptr) {
      encoded = Encode(codec, {}, latents.cpu(), 1);
      for (Tensor& plane : encoded.planes) plane = plane.cuda();
      args.latents.codes = encoded.view();
    }
    const Tensor workspace = at::empty({LatentAttentionWorkspace(codec, none, args)}, options.dtype(at::kByte));
    args.workspace = workspace.data_ptr();
    for (const auto& [before, now] : {std::pair(20000, 39999), std::pair(39999, 20000), std::pair(39999, 0), std::pair(0, 39999), std::pair(100, 8448)}) {
      SCOPED_TRACE(StrCat(name, " from ", before, " to ", now));
      const auto row_of = [&](int32_t n) { return at::tensor({0, n, 0, 0, 0, 0, 0, 0}, at::kInt).cuda(); };
      const Tensor old = row_of(before), row = row_of(now), lengths = row.clone();
      args.lengths = reinterpret_cast<const SequenceLength*>(lengths.data_ptr()), args.early = false;
      LatentAttention(codec, none, args, nullptr);
      const Tensor expected = out.cpu();

      const Tensor no_keys = at::zeros({1, 1, kEqual, 64}, options), any = at::zeros({1, 1, 80}, options);
      LatentAttentionArgs writes{.dtype = DType::kFloat16, .batch = 1, .heads = 1, .rank = 16, .turned = 64, .queries = any.data_ptr(),
                                 .out = lengths.data_ptr(), .capacity = kEqual, .length = {0, kEqual, 0}};
      writes.latents.tokens = ViewOf(row.view(at::kHalf).view({1, 1, 1, 16}).expand({1, 1, kEqual, 16}));
      writes.rotary_keys.tokens = ViewOf(no_keys);
      const Tensor room = at::empty({LatentAttentionWorkspace(none, none, writes)}, options.dtype(at::kByte));
      writes.workspace = room.data_ptr();
      args.early = true;
      for (int time = 0; time < 2; ++time) {  // of which the first loads its kernels
        lengths.copy_(old), out.fill_(NAN);
        for (int i = 0; i < 4; ++i) slow.add_(1);  // so that both are launched by the time that the first begins
        LatentAttention(none, none, writes, nullptr);
        LatentAttention(codec, none, args, nullptr);
        EXPECT_TRUE(lengths.equal(row));
        EXPECT_TRUE(out.cpu().equal(expected));
      }
    }
  }
}

// As a cache keeps them: what it hands to other backends, decoded, and what the kernel reads of its tensors.
TEST(LatentAttentionGpu, ReadsWhatACacheStores) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(15);
  const at::Device device(at::kCUDA, 0);
  const CacheShape shape{2, {{1, 512, 64}, {1, 512, 64}}};
  const auto options = at::TensorOptions(at::kHalf).device(device);
  for (const char* text : {"none", "int4-hqq", "int4-hqq@residual=32@sinks=4", "q8_0@residual=0", "q8_0+q4_0@residual=0@sinks=3",
                           "none+q8_0@residual=64", "llamacpp-q8_0-mla", "vllm-fp8-mla", "int4-hqq@layers=1-1:none"}) {
    SCOPED_TRACE(text);
    const Spec spec = ParseSpec(text);
    KvCache read(spec, shape, 400, at::kHalf, device), stored(spec, shape, 400, at::kHalf, device);
    const AttentionParams params{1 / std::sqrt(576.0), 0, 0};
    for (const int64_t n : {1, 150, 1, 148, 1}) {
      const Tensor queries = at::randn({2, 16, n, 576}, options);
      for (int64_t layer = 0; layer < 2; ++layer) {
        const Tensor latents = at::randn({2, 1, n, 512}, options), rotary_keys = at::randn({2, 1, n, 64}, options);
        const auto [all, turned] = read.Update(layer, latents, rotary_keys);
        EXPECT_TRUE(ReadsStoredLatents(stored, layer, queries, params));
        stored.Store(layer, latents, rotary_keys);
        if (n > 1) continue;
        const Tensor keys = at::cat({all, turned}, 3).to(at::kDouble), values = all.to(at::kDouble);
        const Tensor expected = at::matmul(at::softmax(at::matmul(queries.to(at::kDouble), keys.transpose(2, 3)) * params.scale, -1), values);
        const Tensor ours = AttendStoredLatents(stored, layer, queries, params).to(at::kDouble);
        // Weights and output are rounded to 11 bits; where tokens are rotated, queries, tokens and the output once more.
        EXPECT_LT(((ours - expected).norm() / expected.norm()).item<double>(), std::ldexp(spec.keys.rotation ? 4 : 1, -11));
      }
    }
    EXPECT_NE(LatentKernelsRan().find("fused_latent_"), std::string::npos);
  }
  // What it leaves to others.
  const Tensor queries = at::randn({2, 16, 1, 576}, options);
  const auto reads = [&](const char* text, const Tensor& of) {
    return ReadsStoredLatents(KvCache(ParseSpec(text), shape, 400, at::kHalf, device), 0, of, {1, 0, 0});
  };
  EXPECT_TRUE(reads("none", queries));
  EXPECT_FALSE(reads("none", queries.to(at::kBFloat16))) << "another type than the cache's";
  EXPECT_FALSE(reads("q8_0+q8_0@residual=128+64", queries)) << "latents and rotary keys at unlike places";
  EXPECT_FALSE(reads("q8_0@rotate=hadamard", queries)) << "rotated tokens beside others";
}

// Three hundred sequences of no to two tiles: more sequences than multiprocessors.
TEST(LatentAttentionGpu, TakesMoreSequencesThanThereAreMultiprocessors) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  at::manual_seed(13);
  std::vector<SequenceLength> lengths;
  for (int32_t b = 0; b < 300; ++b) lengths.push_back({b % 3, b % 70, b % 5});
  CheckAll({{"q8_0", 16, 512, 64, lengths, at::kBFloat16}});
}

// NaN in one channel of an encoded token reaches what sees it, and a token that is hidden by the length none.
TEST(LatentAttentionGpu, ANaNReachesTheOutput) {
  KVQ_NEEDS_CUDA();
  const c10::InferenceMode guard;
  const Codec &codec = FindScheme("fp8-e4m3").keys, &dense = FindScheme("none").values;
  Tensor latents = at::zeros({1, 1, 64, 512}, at::kHalf), rotary_keys = at::zeros({1, 1, 64, 64}, at::kHalf).cuda();
  latents[0][0][5][17] = NAN;
  EncodedTensors encoded = Encode(codec, {}, latents, 1);
  for (Tensor& plane : encoded.planes) plane = plane.cuda();
  const Tensor queries = at::ones({1, 16, 576}, rotary_keys.options()), out = at::zeros({1, 16, 512}, rotary_keys.options());
  const Tensor lengths = at::tensor({0, 64, 0}, at::kInt).cuda();
  LatentAttentionArgs args{.dtype = DType::kFloat16, .batch = 1, .heads = 16, .rank = 512, .turned = 64, .queries = queries.data_ptr(),
                           .out = out.data_ptr(), .capacity = 64, .lengths = reinterpret_cast<const SequenceLength*>(lengths.data_ptr())};
  args.latents.codes = encoded.view(), args.rotary_keys.tokens = ViewOf(rotary_keys);
  const Tensor workspace = at::zeros({LatentAttentionWorkspace(codec, dense, args)}, lengths.options().dtype(at::kByte));
  args.workspace = workspace.data_ptr();
  LatentAttention(codec, dense, args, nullptr);
  EXPECT_TRUE(at::isnan(out).all().item<bool>()) << "a logit that is NaN";
  lengths.copy_(at::tensor({0, 5, 0}, at::kInt));
  LatentAttention(codec, dense, args, nullptr);
  EXPECT_TRUE(out.eq(0).all().item<bool>());
}

TEST(LatentAttention, RefusesWhatItHasNoKernelFor) {
  const auto refusal = [](int64_t rank, int64_t turned, DType dtype, const char* scheme = "none") -> std::string {
    LatentAttentionArgs args{.dtype = dtype, .batch = 1, .heads = 16, .rank = rank, .turned = turned};
    args.latents.params.group_size = FindScheme(scheme).keys.default_group;
    try {
      LatentAttention(FindScheme(scheme).keys, FindScheme("none").values, args, nullptr);
    } catch (const InputError& error) {
      return error.what();
    }
    return "none";
  };
  EXPECT_EQ(refusal(520, 64, DType::kFloat16), "attention over latents wants a rank that is a multiple of 16 up to 512, not 520");
  EXPECT_EQ(refusal(1024, 64, DType::kFloat16), "attention over latents wants a rank that is a multiple of 16 up to 512, not 1024");
  EXPECT_EQ(refusal(512, 60, DType::kFloat16), "attention over latents wants rotary keys of a multiple of 8 channels up to 128, not 60");
  EXPECT_EQ(refusal(512, 64, DType::kFloat32), "attention over latents wants float16 or bfloat16");
  EXPECT_EQ(refusal(512, 32, DType::kFloat16, "q8_0"),
            "attention over encoded latents or rotary keys wants a rank of 64, 128, 256 or 512 and rotary keys of 64 or 128 channels, not 512 and 32");
  EXPECT_EQ(refusal(64, 64, DType::kFloat16, "q4_0"), "attention over latents of 4 bits wants a rank that is a multiple of 128, not 64");
  const auto has = [](const char* name) { return HasLatentAttention(FindScheme(name).keys, FindScheme("none").values); };
  for (const char* name : {"none", "q8_0", "q4_0", "fp8-e4m3", "int4-hqq", "int8-hqq"}) EXPECT_TRUE(has(name)) << name;
  for (const char* name : {"kivi-4", "turboquant-k4"}) EXPECT_FALSE(has(name)) << name;
}

}  // namespace
}  // namespace kvq
