// Greedy decoding behind a prefilled context, as the measurements time, weigh and hold it: `decode`, `power`
// and `memory` run the same steps.
//
// Under a backend with a graph (fused) the steps run as one (fixtures/decode_graph.h); what the graph refuses runs as
// under sdpa, and Session::ran, which ends up in the label, says why.
#pragma once

#include <functional>
#include <optional>

#include "benchmarks/measurement.h"
#include "fixtures/decode_graph.h"
#include "fixtures/machine/host_memory.h"

namespace kvq {

// Steps behind a prompt where not their time but what they hold, or a cache's part in them, is measured.
inline constexpr int64_t kSteps = 8;

class Decoding {
 public:
  // Of `new_tokens` steps behind the cell's context. Throws Skip where that cannot be had.
  Decoding(Session& session, const Cell& cell, int64_t new_tokens)
      : Decoding(session, cell, new_tokens, session.context_ids(cell), session.prefill_chunk(cell.batch)) {
    const int64_t dense = KvBytes(ParseSpec("none"), cache_.shape(), cell.context, cache_.dtype());  // twice while they are captured
    captured_ = model_.device().is_cpu() && CanStore(model_, spec_) && 4 * dense <= AvailableBytes().value_or(0);
  }
  // Behind these ids, [batch, n], fed `chunk` of a sequence at once.
  Decoding(Session& session, const Cell& cell, int64_t new_tokens, const at::Tensor& ids, int64_t chunk);

  // Brings the cache to where it is behind the context; returns the next token of every sequence, [batch, 1]. `once`: nothing is kept
  // to do so again, which is a copy of the residual and of windows, where memory is what is measured. A CPU takes as long for a
  // prompt as for all that follows: there specs of policy append store the one context that the unquantized model has made, but for
  // models with linear attention, where memory is scarce, and with `once`.
  at::Tensor Start(bool once = false);
  // Feeds the token and decodes greedily, new_tokens steps in all.
  void Run(at::Tensor token);
  // A prefill and one step. Where a graph runs, throws std::runtime_error if its logits are not those of the other
  // path.
  void WarmUp();
  // Behind a Run: its last logits, as fixtures/finite.h says.
  void CheckFinite() const;

  // Bytes of experts that steps have read until now, on one of the model's devices.
  int64_t ExpertBytesRead(at::Device device) const;

  const Model& model() const { return model_; }
  const KvCache& cache() const { return cache_; }
  const Spec& spec() const { return spec_; }
  double tokens() const { return static_cast<double>(new_tokens_ * cache_.shape().batch); }  // of a Run

 private:
  at::Tensor Next(const at::Tensor& hidden) const;
  // The last token's hidden states behind the context, fed or, where that may be, stored as it was captured.
  at::Tensor Prompt(bool captured);

  Session& session_;
  const Cell cell_;
  const Model& model_;
  const Backend& backend_;
  const Spec spec_;
  const int64_t new_tokens_, chunk_;
  const at::Tensor ids_;
  bool captured_ = false;  // the context may be stored so
  KvCache cache_;
  std::optional<DecodeGraph> graph_;
  at::Tensor first_;                       // token behind the context, once it is known
  at::Tensor last_;                        // hidden states of the last step without a graph
  std::function<void()> behind_context_;  // brings the cache there again
};

}  // namespace kvq
