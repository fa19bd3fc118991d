// What the measurements share under --protocol=study: the reference study's input, its prefill and its
// memory, defects included. Each measurement says in its own file what it does under that protocol, and
// gives the honest number beside it.
#pragma once

#include "benchmarks/measurement.h"

namespace kvq {

// The study's input: "Hello world " floor(context / 2) times, tokenized with the default specials, cut to
// the context: [batch, n], n <= context. For random weights random tokens: there is no tokenizer.
at::Tensor StudyInput(Session& session, const Cell& cell);

// The study's prefill of ids [batch, n] into an empty cache: one call, and the logits of all positions,
// [batch, n, vocab_size] in the model's type, where the last one's would do.
at::Tensor StudyPrefill(const Model& model, const at::Tensor& ids, KvCache& cache,
                        const Backend& backend);

// What the study's peak memory holds beside the weights, in bytes after a prompt of `tokens`: three caches
// (the prefilled one, its deep copy, and the one of the prefill inside the decode timer), the logits
// of all positions and the last hidden states. Of its published peaks this is the slope over
// the context for models without sliding windows and soft caps (accuracy/study_test.cc); temporary
// tensors of the layers are not in it.
int64_t StudyPeakBytes(const Spec& spec, const CacheShape& shape, int64_t tokens,
                       int64_t vocab_size, int64_t hidden_size, at::ScalarType kv_dtype, at::ScalarType dtype);

}  // namespace kvq
