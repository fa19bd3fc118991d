// A cache that is fed prompts and then single tokens, by the graph where the backend has one that knows model and spec.
#pragma once

#include <functional>
#include <optional>

#include "benchmarks/measurement.h"
#include "fixtures/decode_graph.h"

namespace kvq {

class Stepper {
 public:
  // Sets Session::ran, in which `steps` is what the graph's are called. What it refers to outlives it.
  Stepper(Session& session, const Model& model, const Backend& backend, const Spec& spec, int64_t batch, int64_t capacity,
          const char* steps = "tokens");

  // ids [batch, n] behind what the cache holds. On an empty cache in calls of `call` tokens, the sinks with the first.
  // Returns the hidden states of the last call, [batch, its tokens, hidden_size].
  at::Tensor Feed(const at::Tensor& ids, int64_t call);
  // The same, [batch, 1, hidden_size]: the state behind the last token.
  at::Tensor Prompt(const at::Tensor& ids, int64_t call);
  // tokens [batch], int64. The state behind them, which lives on: hidden ones, [batch, 1, hidden_size], or the graph's
  // logits, [batch, vocab_size].
  at::Tensor Step(const at::Tensor& tokens);
  // Of a state, [batch, 1, vocab_size], float32.
  at::Tensor Logits(const at::Tensor& state) const;

  KvCache& cache() { return cache_; }
  const KvCache& cache() const { return cache_; }

 private:
  const Model& model_;
  const Backend& backend_;
  const Spec& spec_;
  KvCache cache_;
  std::optional<DecodeGraph> graph_;
};

}  // namespace kvq
