// error: how far encoded keys and values are from the originals, on the model's own cache at a context,
// per layer. Only what the policy has encoded counts (of hf: what append would): sinks and residual are stored as they
// are; encoded_tokens is of the side that encodes more. nmse
// is the sum of squared errors over the sum of squares; max_error is the largest absolute one.
#include <cmath>

#include "accuracy/error_sum.h"
#include "benchmarks/measurement.h"
#include "fixtures/cache/codec_tensors.h"
#include "kernels/error.h"

namespace kvq {
namespace {

ErrorSum Measure(const LayerSide& side, const Spec& spec, const at::Tensor& all) {
  const Codec& codec = *side.codec;
  const SideRule& rule = *side.rule;
  const at::Tensor plain = all.narrow(2, spec.sink_tokens, EncodedTokens(spec, rule, all.size(2)));
  at::Tensor decoded = plain.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  if (codec.encode != nullptr) {
    const CodecParams params = spec.Params(codec);
    const EncodedTensors encoded =
        AllocateEncoded(codec, params, plain.size(0), plain.size(1), plain.size(3), plain.size(2),
                        BlockTokens(spec, rule, codec), plain.device());
    EncodeRotated(codec, params, rule.rotation, plain, 0, encoded.view());
    DecodeRotated(codec, params, rule.rotation, encoded, 0, decoded);
  }
  return ErrorSum::Of(plain, decoded);
}

Counters Error(Session& session, const Cell& cell, benchmark::State& state) {
  const Spec spec = ParseSpec(cell.spec);
  const int64_t encoded_tokens = EncodedTokens(spec, cell.context);
  if (encoded_tokens == 0) throw Skip("all tokens fit into the residual; nothing is encoded");
  ErrorSum keys, values;
  Counters per_layer;
  for (auto _ : state) {
    state.SetIterationTime(Time(session.devices(), [&] {
      keys = values = {};
      per_layer.clear();
      const auto& captured = session.captured_cache(cell);
      const CacheShape shape = session.model(cell.model).cache_shape(cell.batch);
      for (size_t layer = 0; layer < captured.size(); ++layer) {
        const auto [of_keys, of_values] = SidesOf(spec, shape, static_cast<int64_t>(layer));
        const ErrorSum k = Measure(of_keys, spec, captured[layer].first), v = Measure(of_values, spec, captured[layer].second);
        if (!std::isfinite(k.squared_error + v.squared_error)) {
          throw std::runtime_error(StrCat("keys or values of layer ", layer, " are finite, and not when they are decoded"));
        }
        keys.Add(k);
        values.Add(v);
        const std::string suffix = "/layer:" + std::to_string(layer);
        per_layer.insert(per_layer.end(), {{"nmse_k" + suffix, k.nmse()},
                                           {"nmse_v" + suffix, v.nmse()},
                                           {"max_error_k" + suffix, k.largest},
                                           {"max_error_v" + suffix, v.largest}});
      }
    }));
  }
  Counters counters = {{"nmse_k", keys.nmse()},
                       {"nmse_v", values.nmse()},
                       {"max_error_k", keys.largest},
                       {"max_error_v", values.largest},
                       {"encoded_tokens", static_cast<double>(encoded_tokens)}};
  counters.insert(counters.end(), per_layer.begin(), per_layer.end());
  return counters;
}

const RegisterMeasurement kError{
    {.name = "error", .what = "nmse and largest error of keys and values, per layer",
     .needs_encoding = true, .quality = true, .turn = 0,
     .like_tokens = [](const Options&, double tokens) { return tokens / 2; }, .run = Error}};

}  // namespace
}  // namespace kvq
