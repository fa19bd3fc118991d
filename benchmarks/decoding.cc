#include "benchmarks/decoding.h"

namespace kvq {

Decoding::Decoding(Session& session, const Cell& cell, int64_t new_tokens)
    : session_(session),
      model_(session.model(cell.model)),
      backend_(FindBackend(cell.backend)),
      spec_(ParseSpec(cell.spec)),
      new_tokens_(new_tokens),
      ids_(session.context_ids(cell)),
      cache_(spec_, model_.cache_shape(cell.batch), cell.context + new_tokens, model_.dtype(),
             model_.device()) {}

at::Tensor Decoding::Start() {
  cache_.Clear();
  return Next(Feed(model_, ids_, cache_, backend_, session_.options().prefill_chunk));
}

void Decoding::Run(at::Tensor token) {
  for (int64_t i = 0; i < new_tokens_; ++i) token = Next(model_.Forward(token, cache_, backend_));
}

void Decoding::WarmUp() { Next(model_.Forward(Start(), cache_, backend_)); }

at::Tensor Decoding::Next(const at::Tensor& hidden) const {
  return model_.Logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1);
}

}  // namespace kvq
