#include "benchmarks/study.h"

#include <algorithm>

namespace kvq {

at::Tensor StudyInput(Session& session, const Cell& cell) {
  if (session.random_weights(cell.model)) return session.context_ids(cell);
  std::string text;
  for (int64_t i = 0; i < cell.context / 2; ++i) text += "Hello world ";
  std::vector<int32_t> ids = session.tokenizer(cell.model).Encode(text, true);
  ids.resize(std::min(ids.size(), static_cast<size_t>(cell.context)));
  if (ids.empty()) throw Skip("the study's input is empty at a context of 1");
  return IdTensor(ids, cell.batch, session.device());
}

at::Tensor StudyPrefill(const Model& model, const at::Tensor& ids, KvCache& cache,
                        const Backend& backend) {
  const at::Tensor hidden = model.Forward(ids, cache, backend);
  const int64_t n = ids.size(1);
  at::Tensor logits = at::empty({ids.size(0), n, model.config().vocab_size},
                                hidden.options().dtype(model.dtype()));
  // Logits come in float32; of few positions at a time, so that no second copy of them all is made.
  for (int64_t begin = 0; begin < n; begin += 256) {
    const int64_t some = std::min<int64_t>(256, n - begin);
    logits.narrow(1, begin, some).copy_(model.Logits(hidden.narrow(1, begin, some)));
  }
  return logits;
}

int64_t StudyPeakBytes(const Spec& spec, const CacheShape& shape, int64_t tokens,
                       int64_t vocab_size, int64_t hidden_size, at::ScalarType kv_dtype, at::ScalarType dtype) {
  return 3 * KvBytes(spec, shape, tokens, kv_dtype) +
         shape.batch * tokens * (vocab_size + hidden_size) *
             static_cast<int64_t>(c10::elementSize(dtype));
}

}  // namespace kvq
