#include "benchmarks/decoding.h"

#include "fixtures/finite.h"
#include "kernels/error.h"

namespace kvq {
Decoding::Decoding(Session& session, const Cell& cell, int64_t new_tokens, const at::Tensor& ids, int64_t chunk)
    : session_(session),
      cell_(cell),
      model_(session.model(cell.model)),
      backend_(FindBackend(cell.backend)),
      spec_(ParseSpec(cell.spec)),
      new_tokens_(new_tokens),
      chunk_(chunk),
      ids_(ids),
      cache_(model_.NewCache(spec_, ids.size(0), ids.size(1) + new_tokens)) {
  if (!backend_.graph) return;
  try {
    graph_.emplace(model_, cache_);
    session.ran = graph_->kernels();
  } catch (const InputError& why) {
    session.ran = StrCat("sdpa", spec_.stores_dense() ? "" : " on decoded tokens", " (", why.what(), ")");
  }
}

at::Tensor Decoding::Start(bool once) {
  if (!first_.defined()) {
    first_ = Next(Prompt(captured_ && !once));
    if (!once) behind_context_ = cache_.Save();
  } else {
    behind_context_();
  }
  return first_;
}

at::Tensor Decoding::Prompt(bool captured) {
  if (!captured) return Feed(model_, ids_, cache_, backend_, chunk_);
  const int64_t before = ids_.size(1) - 1;
  Store(model_, session_.captured_cache(cell_), before, cache_);
  return model_.Forward(ids_.narrow(1, before, 1), cache_, backend_);
}

void Decoding::Run(at::Tensor token) {
  if (graph_) {
    graph_->Run(token, new_tokens_);
    return;
  }
  for (int64_t i = 0; i < new_tokens_; ++i) {
    last_ = model_.Forward(token, cache_, backend_);
    token = Next(last_);
  }
}

void Decoding::CheckFinite() const {
  kvq::CheckFinite(graph_ ? graph_->logits() : model_.Logits(last_), model_, ids_, spec_, backend_);
}

void Decoding::WarmUp() {
  at::Tensor ours;
  Routing routing;
  if (graph_) {
    graph_->Run(Start(), 1);
    ours = graph_->logits();
    routing = graph_->routing();
  }
  const at::Tensor logits = model_.Logits(model_.Forward(Start(), cache_, backend_, {}, {}, {}, routing)).select(1, 0);
  kvq::CheckFinite(logits, model_, ids_, spec_, backend_);
  if (!graph_) return;
  const double error = ((ours - logits).norm() / logits.norm()).item<double>();
  if (!(error < GraphTolerance(model_.config(), model_.dtype(), cache_))) {
    throw std::runtime_error(StrCat("the graph's logits are off by ", error, " of their norm"));
  }
}

int64_t Decoding::ExpertBytesRead(at::Device device) const {
  return model_.ExpertBytesRead(device) + (graph_ && device == model_.device() ? graph_->expert_bytes() : 0);
}

at::Tensor Decoding::Next(const at::Tensor& hidden) const {
  return model_.Logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1);
}

}  // namespace kvq
