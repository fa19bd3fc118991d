// kv_size: what the KV cache of a context takes, all metadata counted: by formula from the scheme's
// planes, and as the cache's tensors really allocate it. The two must agree to the byte, or there is no
// number. kv_bytes is what `context` tokens occupy; a residual that is not full yet is allocated whole.
// encoded_bits_per_element is of encoded tokens alone, their metadata included: what bits_per_element comes near to in a
// long context (4.5 for 4-bit codes in groups of 64 that share two fp16 numbers). encoded_share says how many of all
// elements those are, dense tokens, sides and layers counted: bits_per_element is the mean of the two, weighted by it.
// encoded_tokens is of the side that encodes more. state_bytes, of models that have layers of linear attention, is what those keep
// of the sequences at any length; it is no part of the others. kv_bytes/layer:N is what each layer has of kv_bytes. Where layers keep
// a window alone (@window-cache=window), kv_bytes has the tokens that are kept, and encoded_share is of these; bits_per_element is over
// the elements of the whole context, as of any cache: what a token of context costs, so that `none` has fewer than 16. Where they could,
// and the spec keeps all tokens, kv_bytes_window_cache is what it would have of kv_bytes otherwise, as engines do.
#include <algorithm>

#include "benchmarks/measurement.h"
#include "kernels/error.h"

namespace kvq {
namespace {

Counters KvSize(Session& session, const Cell& cell, benchmark::State& state) {
  const ModelConfig config = FindModel(cell.model).config();
  const CacheShape shape = CacheShapeOf(config, cell.batch);
  const std::vector<at::Device> devices = CacheDevicesOf(config, session.devices());
  const Spec spec = ParseSpec(cell.spec);
  const at::ScalarType dtype = session.kv_dtype(cell.model);
  int64_t allocated = 0;
  for (auto _ : state) {
    const double seconds = Time(session.devices(), [&] {
      KvCache cache(spec, shape, cell.context, dtype, devices);
      if (spec.policy == Policy::kHf) {  // its tensors are made when tokens come
        for (size_t layer = 0; layer < shape.layers.size(); ++layer) {
          const KvShape& of = shape.layers[layer];
          const at::Tensor x = at::zeros({shape.batch, of.kv_heads, cell.context, of.head_dim},
                                         at::TensorOptions(dtype).device(devices[layer]));
          cache.Update(static_cast<int64_t>(layer), x, x);
        }
      }
      allocated = cache.AllocatedBytes();
    });
    state.SetIterationTime(seconds);
  }
  const int64_t reserved = KvBytesReserved(spec, shape, cell.context, dtype);
  if (allocated != reserved) {
    throw std::runtime_error("kv_size: the formula says " + std::to_string(reserved) +
                             " bytes, the tensors have " + std::to_string(allocated));
  }
  const int64_t bytes = KvBytes(spec, shape, cell.context, dtype);
  const double elements = static_cast<double>(shape.TokenElements() * cell.context);
  Counters counters = {{"kv_bytes", static_cast<double>(bytes)},
                       {"kv_bytes_allocated", static_cast<double>(allocated)},
                       {"bits_per_element", 8.0 * static_cast<double>(bytes) / elements}};
  Spec windowed = spec;
  windowed.window_cache = spec.policy != Policy::kHf;
  if (const int64_t fewer = KvBytes(windowed, shape, cell.context, dtype); fewer < bytes) {
    counters.emplace_back("kv_bytes_window_cache", static_cast<double>(fewer));
  }
  if (const auto bits = EncodedBits(spec, shape)) counters.emplace_back("encoded_bits_per_element", *bits);
  const int64_t encoded_tokens = spec.stores_dense()            ? 0
                                 : spec.policy == Policy::kHf ? cell.context
                                                              : EncodedTokens(spec, cell.context);
  counters.emplace_back("encoded_tokens", static_cast<double>(encoded_tokens));
  counters.emplace_back("encoded_share", EncodedShare(spec, shape, cell.context));
  const auto linear = std::count_if(config.layers.begin(), config.layers.end(), [](const LayerConfig& layer) { return layer.linear; });
  if (linear > 0) {
    counters.emplace_back("state_bytes", static_cast<double>(linear * StateBytesOf(config, cell.batch, dtype)));
  }
  for (size_t layer = 0; layer < shape.layers.size(); ++layer) {
    counters.emplace_back(StrCat("kv_bytes/layer:", layer),
                          static_cast<double>(KvLayerBytes(spec, shape, layer, cell.context, dtype)));
  }
  return counters;
}

const RegisterMeasurement kKvSize{
    {.name = "kv_size", .what = "bytes and bits per element of the KV cache, all metadata counted",
     .turn = 0, .like_tokens = [](const Options&, double) { return 0.0; }, .run = KvSize}};

}  // namespace
}  // namespace kvq
