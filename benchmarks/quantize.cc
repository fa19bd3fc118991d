// quantize, dequantize: the codec alone, with its rotation, on the model's own keys and values: what the policy encodes
// of a context, all layers. gb_per_s counts the encoded bytes and the elements in the type that they are encoded
// from or decoded into, the cache's and the model's own, each once. The shares say how much of a prefill and of a decoding step is spent there, in one run each.
#include "benchmarks/decoding.h"
#include "fixtures/cache/codec_tensors.h"
#include "fixtures/finite.h"

namespace kvq {
namespace {

// One side of one layer, ready to be encoded or decoded again and again.
struct Job {
  const Codec* codec;
  CodecParams params;
  Rotation rotation;
  at::Tensor plain;
  EncodedTensors encoded;

  void Encode() const { EncodeRotated(*codec, params, rotation, plain, 0, encoded.view()); }
};

std::vector<Job> Jobs(Session& session, const Cell& cell, const Spec& spec) {
  if (EncodedTokens(spec, cell.context) == 0) throw Skip("all tokens fit into the residual; nothing is encoded");
  std::vector<Job> jobs;
  const auto& captured = session.captured_cache(cell);
  const CacheShape shape = session.model(cell.model).cache_shape(cell.batch);
  for (size_t layer = 0; layer < captured.size(); ++layer) {
    const auto add = [&](const LayerSide& side, const at::Tensor& all) {
      const Codec& codec = *side.codec;
      const SideRule& rule = *side.rule;
      const int64_t tokens = EncodedTokens(spec, rule, cell.context);
      if (codec.encode == nullptr || tokens == 0) return;
      const at::Tensor plain = all.narrow(2, spec.sink_tokens, tokens);
      const CodecParams params = spec.Params(codec);
      jobs.push_back({&codec, params, rule.rotation, plain,
                      AllocateEncoded(codec, params, plain.size(0), plain.size(1), plain.size(3), tokens,
                                      BlockTokens(spec, rule, codec), plain.device())});
    };
    const auto [keys, values] = SidesOf(spec, shape, static_cast<int64_t>(layer));
    add(keys, captured[layer].first);
    add(values, captured[layer].second);
  }
  return jobs;
}

// Shares of a prefill and of kSteps decoding steps that the cache spends encoding and decoding.
struct Shares {
  double encode_prefill, decode_prefill, encode_step, decode_step;
};

Shares MeasureShares(Session& session, const Cell& cell, const Spec& spec) {
  const Model& model = session.model(cell.model);
  const Backend& backend = FindBackend(cell.backend);
  KvCache cache = model.NewCache(spec, cell.batch, cell.context + kSteps);
  cache.CountTime(true);
  at::Tensor hidden;
  const auto next = [&] {
    return model.Logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1);
  };
  at::Tensor token;
  const at::Tensor ids = session.context_ids(cell);
  const double prefill_s = Time(model.devices(), [&] {
    hidden = Feed(model, ids, cache, backend, session.prefill_chunk(cell.batch));
    token = next();
  });
  const CacheWork prefill = cache.work();
  cache.ResetWork();
  const double decode_s = Time(model.devices(), [&] {
    for (int64_t i = 0; i < kSteps; ++i) {
      hidden = model.Forward(token, cache, backend);
      token = next();
    }
  });
  const CacheWork decode = cache.work();
  CheckFinite(model.Logits(hidden), model, ids, spec, backend);
  return {prefill.encode_s / prefill_s, prefill.decode_s / prefill_s, decode.encode_s / decode_s,
          decode.decode_s / decode_s};
}

// Bytes that encoding or decoding all jobs moves: elements of `dtype`, and codes with metadata.
double MovedBytes(const std::vector<Job>& jobs, at::ScalarType dtype) {
  int64_t bytes = 0;
  for (const Job& job : jobs) {
    bytes += job.plain.numel() * static_cast<int64_t>(c10::elementSize(dtype)) + job.encoded.nbytes();
  }
  return static_cast<double>(bytes);
}

Counters Rates(const std::vector<double>& seconds, double bytes, const std::vector<at::Device>& devices) {
  std::vector<double> milliseconds, rates;
  for (const double s : seconds) {
    milliseconds.push_back(s * 1e3);
    rates.push_back(bytes / s / 1e9);
  }
  Counters counters;
  AddSpread(counters, "gb_per_s", rates);
  AddSpread(counters, "all_layers_ms", milliseconds);
  double bandwidth = 0;  // GPUs that hold a layer each work at the same time
  for (const at::Device device : devices) bandwidth += ReadBandwidth(device);
  counters.emplace_back("peak_fraction", counters.front().second * 1e9 / bandwidth);
  return counters;
}

Counters Quantize(Session& session, const Cell& cell, benchmark::State& state) {
  const Spec spec = ParseSpec(cell.spec);
  const std::vector<Job> jobs = Jobs(session, cell, spec);
  const auto encode = [&] {
    for (const Job& job : jobs) job.Encode();
  };
  encode();
  const std::vector<double> seconds = Samples(session, state, [&] { return session.Time(encode); });
  Counters counters = Rates(seconds, MovedBytes(jobs, session.kv_dtype(cell.model)), session.devices());
  const Shares shares = MeasureShares(session, cell, spec);
  counters.emplace_back("share_of_prefill", shares.encode_prefill);
  counters.emplace_back("share_of_decode", shares.encode_step);
  return counters;
}

Counters Dequantize(Session& session, const Cell& cell, benchmark::State& state) {
  const Spec spec = ParseSpec(cell.spec);
  const std::vector<Job> jobs = Jobs(session, cell, spec);
  std::vector<at::Tensor> decoded;
  for (const Job& job : jobs) {
    job.Encode();
    decoded.push_back(at::empty(job.plain.sizes(), job.plain.options().dtype(session.dtype())));
  }
  const auto decode = [&] {
    for (size_t i = 0; i < jobs.size(); ++i) {
      DecodeRotated(*jobs[i].codec, jobs[i].params, jobs[i].rotation, jobs[i].encoded, 0, decoded[i]);
    }
  };
  decode();
  const std::vector<double> seconds = Samples(session, state, [&] { return session.Time(decode); });
  Counters counters = Rates(seconds, MovedBytes(jobs, session.dtype()), session.devices());
  const Shares shares = MeasureShares(session, cell, spec);
  counters.emplace_back("share_of_prefill", shares.decode_prefill);
  counters.emplace_back("share_of_decode", shares.decode_step);
  return counters;
}

const RegisterMeasurement kQuantize{
    {.name = "quantize", .what = "GB/s of encoding, and its share of prefill and decode",
     .timed = true, .needs_encoding = true, .new_tokens = [](const Options&) { return kSteps; }, .run = Quantize}};
const RegisterMeasurement kDequantize{
    {.name = "dequantize", .what = "GB/s of decoding, and its share of prefill and decode",
     .timed = true, .needs_encoding = true,
     .like_tokens = [](const Options&, double tokens) { return 2 * tokens; },
     .new_tokens = [](const Options&) { return kSteps; }, .run = Dequantize}};

}  // namespace
}  // namespace kvq
