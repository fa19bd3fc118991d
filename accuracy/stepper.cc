#include "accuracy/stepper.h"

#include "kernels/error.h"

namespace kvq {

Stepper::Stepper(Session& session, const Model& model, const Backend& backend, const Spec& spec, int64_t batch,
                 int64_t capacity, const char* steps)
    : model_(model), backend_(backend), spec_(spec), cache_(model.NewCache(spec, batch, capacity)) {
  if (!backend.graph) return;
  try {
    graph_.emplace(model, cache_);
    session.ran = StrCat("sdpa, ", steps, " ", graph_->kernels());
  } catch (const InputError& why) {  // what it does not know goes the other way
    session.ran = StrCat("sdpa", spec.stores_dense() ? "" : " on decoded tokens", " (", why.what(), ")");
  }
}

at::Tensor Stepper::Feed(const at::Tensor& ids, int64_t call) {
  return kvq::Feed(model_, ids, cache_, backend_, call, cache_.length() == 0 ? spec_.sink_tokens + call : 0);
}

at::Tensor Stepper::Prompt(const at::Tensor& ids, int64_t call) {
  const at::Tensor hidden = Feed(ids, call);
  return hidden.narrow(1, hidden.size(1) - 1, 1).clone();
}

at::Tensor Stepper::Step(const at::Tensor& tokens) {
  if (!graph_) return model_.Forward(tokens.unsqueeze(1), cache_, backend_);
  graph_->Run(tokens.unsqueeze(1).contiguous(), 1);
  return graph_->logits().clone();
}

at::Tensor Stepper::Logits(const at::Tensor& state) const {
  return state.dim() == 3 ? model_.Logits(state) : state.unsqueeze(1).to(at::kFloat);
}

}  // namespace kvq
