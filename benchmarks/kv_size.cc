// kv_size: what the KV cache of a context takes, all metadata counted: by formula from the scheme's
// planes, and as the cache's tensors really allocate it. The two must agree to the byte, or there is no
// number. kv_bytes is what `context` tokens occupy; a residual that is not full yet is allocated whole.
#include "benchmarks/measurement.h"

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
  return {{"kv_bytes", static_cast<double>(bytes)},
          {"kv_bytes_allocated", static_cast<double>(allocated)},
          {"bits_per_element", 8.0 * static_cast<double>(bytes) / elements},
          {"encoded_tokens", static_cast<double>(spec.stores_dense()            ? 0
                                                 : spec.policy == Policy::kHf ? cell.context
                                                                              : EncodedTokens(spec, cell.context))}};
}

const RegisterMeasurement kKvSize{
    {.name = "kv_size", .what = "bytes and bits per element of the KV cache, all metadata counted",
     .run = KvSize}};

}  // namespace
}  // namespace kvq
