// decode: new tokens per second at a context, greedy, one at a time; the prefill is outside the timer, and on a CPU there is one for
// all specs of policy append: each stores the keys and values that the unquantized model made of the context (Decoding).
// Limit: the bytes one step must read, weights and stored KV cache (as far as a sliding window shows it), over the read bandwidth measured in
// the same run (peak_fraction). Of experts those count that the timed steps read, each once a layer and step. In a pipeline over several GPUs the stages of a step work one after the other, so the
// limit is the sum of their times: one GPU's bandwidth, not that of all.
//
// Backend fused runs the steps as one CUDA graph, whose first logits are compared with the other path's
// before anything is timed. What the graph refuses runs as under sdpa, and the label says why.
//
// Protocol `study` is the reference study's: its input; the last prompt token is fed a second time, then
// greedy steps; and the timer starts before the whole prompt is prefilled once more (the study meant to copy
// a cache there). tokens_per_s is that number; tokens_per_s_net is what it should have been, the same
// steps without the prefill, and reprefill_ms the difference. The tokens are in the JSON.
#include <algorithm>
#include <cmath>
#include <functional>

#include "benchmarks/decoding.h"
#include "benchmarks/study.h"
#include "fixtures/finite.h"
#include "kernels/error.h"

namespace kvq {
namespace {

at::Tensor Next(const Model& model, const at::Tensor& hidden) {
  return model.Logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1);
}

// The bytes of experts that timed steps read, on each device.
class ExpertReads {
 public:
  using Now = std::function<int64_t(at::Device)>;  // until now
  ExpertReads(const Model& model, Now now) : devices_(model.devices()), now_(std::move(now)), bytes_(devices_.size()) {}
  // What `steps` of them do is counted.
  template <typename Steps>
  void Count(int64_t steps, const Steps& run) {
    for (size_t i = 0; i < devices_.size(); ++i) bytes_[i] -= now_(devices_[i]);
    run();
    for (size_t i = 0; i < devices_.size(); ++i) bytes_[i] += now_(devices_[i]);
    steps_ += steps;
  }
  // A step, on the device number `i` of the model's.
  double PerStep(size_t i) const { return static_cast<double>(bytes_[i]) / static_cast<double>(std::max<int64_t>(steps_, 1)); }

 private:
  std::vector<at::Device> devices_;
  Now now_;
  std::vector<int64_t> bytes_;
  int64_t steps_ = 0;
};

// What one step must read, and the share of the read bandwidth that is: of the cache what each layer's window shows it,
// again for every layer that reads it.
void AddLimit(Counters& counters, const Model& model, const ExpertReads& experts, const Spec& spec, int64_t batch,
              int64_t tokens, double seconds_per_step) {
  const CacheShape shape = model.cache_shape(batch);
  const std::vector<at::Device> cache_devices = model.cache_devices();
  double bytes = 0, limit = 0;
  for (size_t i = 0; i < model.devices().size(); ++i) {
    const at::Device device = model.devices()[i];
    int64_t here = model.WeightBytes(device) + static_cast<int64_t>(std::llround(experts.PerStep(i)));
    here += model.StateBytes(batch, device);
    for (size_t layer = 0; layer < model.config().layers.size(); ++layer) {
      if (model.config().layers[layer].linear) continue;
      const auto cached = static_cast<size_t>(model.cache_layer(static_cast<int64_t>(layer)));
      if (cache_devices[cached] != device) continue;
      here += KvLayerBytesSeen(spec, shape, cached, tokens, model.config().layers[layer].Seen(tokens), model.kv_dtype());
    }
    bytes += static_cast<double>(here);
    limit += static_cast<double>(here) / ReadBandwidth(device);
  }
  counters.emplace_back("bytes_per_token", bytes);
  counters.emplace_back("peak_fraction", limit / seconds_per_step);
}

Counters StudyDecode(Session& session, const Cell& cell, benchmark::State& state) {
  const Model& model = session.model(cell.model);
  const Backend& backend = FindBackend(cell.backend);
  const at::Tensor ids = StudyInput(session, cell);
  const int64_t new_tokens = session.options().decode_tokens;
  const Spec spec = ParseSpec(cell.spec);
  KvCache cache = model.NewCache(spec, cell.batch, ids.size(1) + new_tokens);
  const auto prefill = [&] {
    cache.Clear();
    StudyPrefill(model, ids, cache, backend);
  };
  const at::Tensor last = ids.narrow(1, ids.size(1) - 1, 1);
  prefill();
  Next(model, model.Forward(last, cache, backend));  // warm-up of both shapes
  ExpertReads experts(model, [&](at::Device device) { return model.ExpertBytesRead(device); });
  std::vector<double> rates, net_rates, prefill_ms;
  Counters tokens;
  at::Tensor hidden;
  const double count = static_cast<double>(new_tokens * cell.batch);
  Samples(session, state, [&] {
    const double prefill_s = session.Time(prefill);
    std::vector<at::Tensor> steps = {last};
    double steps_s = 0;
    experts.Count(new_tokens, [&] {
      steps_s = session.Time([&] {
        for (int64_t i = 0; i < new_tokens; ++i) {
          hidden = model.Forward(steps.back(), cache, backend);
          steps.push_back(Next(model, hidden));
        }
      });
    });
    rates.push_back(count / (prefill_s + steps_s));
    net_rates.push_back(count / steps_s);
    prefill_ms.push_back(prefill_s * 1e3);
    tokens.clear();
    for (int64_t i = 1; i <= new_tokens; ++i) {  // of the first sequence; all are the same
      tokens.emplace_back(StrCat("token/step:", i), steps[i][0][0].item<double>());
    }
    return prefill_s + steps_s;
  });
  CheckFinite(model.Logits(hidden), model, ids, spec, backend);
  Counters counters;
  AddSpread(counters, "tokens_per_s", rates);
  AddSpread(counters, "tokens_per_s_net", net_rates);
  AddLimit(counters, model, experts, spec, cell.batch, ids.size(1) + new_tokens / 2,
           static_cast<double>(cell.batch) / counters[3].second);
  AddSpread(counters, "reprefill_ms", prefill_ms);
  counters.emplace_back("prompt_tokens", static_cast<double>(ids.size(1)));
  counters.insert(counters.end(), tokens.begin(), tokens.end());
  return counters;
}

Counters Decode(Session& session, const Cell& cell, benchmark::State& state) {
  if (session.options().protocol == "study") return StudyDecode(session, cell, state);
  const int64_t new_tokens = session.options().decode_tokens;
  Decoding decoding(session, cell, new_tokens);
  decoding.WarmUp();
  ExpertReads experts(decoding.model(), [&](at::Device device) { return decoding.ExpertBytesRead(device); });
  std::vector<double> rates, per_token;
  for (const double seconds : Samples(session, state, [&] {
         const at::Tensor first = decoding.Start();
         double run_s = 0;
         experts.Count(new_tokens, [&] { run_s = session.Time([&] { decoding.Run(first); }); });
         return run_s;
       })) {
    rates.push_back(decoding.tokens() / seconds);
    per_token.push_back(seconds * 1e3 / static_cast<double>(new_tokens));
  }
  decoding.CheckFinite();
  Counters counters;
  AddSpread(counters, "tokens_per_s", rates);
  AddSpread(counters, "ms_per_token", per_token);
  AddLimit(counters, decoding.model(), experts, decoding.spec(), cell.batch, cell.context + new_tokens / 2,
           counters[3].second / 1e3);
  return counters;
}

const RegisterMeasurement kDecode{
    {.name = "decode", .what = "new tokens/s at a context, without its prefill",
     .study = "\"Hello world\" as text; a second prefill inside the timer; tokens_per_s_net without it",
     .timed = true, .turn = 0, .first = [](const Options& o) { return o.device == "cpu" ? 2.0 : 1.0; },
     .like_tokens = [](const Options& o, double tokens) {
       return tokens + 12.0 * static_cast<double>((o.runs + 1) * o.decode_tokens);  // a step reads all weights
     },
     .new_tokens = [](const Options& o) { return o.decode_tokens; }, .run = Decode}};

}  // namespace
}  // namespace kvq
