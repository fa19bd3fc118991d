// What measurements that score windows of a text share: the text, its windows as tokens, and the
// unquantized model's predictions beside the quantized one's, made in calls as decoding would.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "accuracy/scoring.h"
#include "accuracy/statistics.h"
#include "accuracy/windows.h"
#include "benchmarks/measurement.h"

namespace kvq {

// What one cell works with.
struct Work {
  std::string key;  // of everything the unquantized model's results depend on
  const Model& model;
  const Backend& backend;
  std::vector<int32_t> text;  // the corpus in tokens
  std::vector<int32_t> bos;   // before every window: empty, or the BOS id
  // Of the unquantized model, the same for all specs (Session::WindowStates). Logits are kept as long as they are few.
  std::map<int64_t, at::Tensor>& reference_states;
  std::map<std::array<int64_t, 3>, at::Tensor>& reference_logits;
  std::map<std::array<int64_t, 2>, Session::FirstCall>& first_calls;
};

// `what` begins the key, for measurements that keep something else than perplexity does.
Work WorkOf(Session& session, const Cell& cell, const std::string& what = "");

// The windows of protocol `decode`, of cell.context tokens with their BOS. Throws Skip where the
// text is shorter than one.
std::vector<Window> WindowsOf(const Work& work, const Cell& cell, const Options& options);

// Tokens of windows of one length, [windows, length with BOS].
at::Tensor WindowIds(const Work& work, const std::vector<Window>& windows);

// The calls, [begin, end) each, in which so many tokens are fed so that every token reads the history as decoding would:
// of Spec::CallTokens, the sinks with the first.
std::vector<std::pair<int64_t, int64_t>> CallsOf(const Spec& spec, int64_t length);

// Feeds ids [batch, n] in the calls of a spec; hands each call's first position
// and hidden states [batch, tokens of the call, hidden_size] to `use`. With `first` the first call is what it has, or, where it
// has nothing yet, is kept there; a tap does not see it then.
void FeedAsDecoding(const Model& model, const Backend& backend, const Spec& spec,
                    const at::Tensor& ids, KvCache& cache,
                    const std::function<void(int64_t begin, const at::Tensor& hidden)>& use,
                    const Tap& tap = {}, Session::FirstCall* first = nullptr);

// Runs windows that score the same positions, side by side (ids [batch, n]), through a cache of
// `spec` and hands to `use`, call by call, for the positions whose next token counts: logits of the
// reference, whose hidden states [batch, n, hidden_size] are given, logits of this run, [batch, m,
// vocab_size] both, and the tokens that came, [batch, m].
void CompareLogits(const Work& work, const Spec& spec, const std::vector<Window>& windows,
                   const at::Tensor& ids, const at::Tensor& reference,
                   const std::function<void(const at::Tensor& reference, const at::Tensor& logits,
                                            const at::Tensor& targets)>& use);

// Scores of windows with these ids; throws as CheckFinite (fixtures/finite.h) does.
void CheckScores(const Work& work, const Spec& spec, const at::Tensor& ids, const std::vector<WindowScore>& scores);

// Adds a value and, where there is one, its interval as `name`_lo and _hi. `most` and `least`: what
// the quantity cannot exceed. `suffix` ends all three names.
void AddInterval(Counters& counters, const std::string& name, double value,
                 const std::optional<Interval>& interval, double least = -INFINITY,
                 double most = INFINITY, const std::string& suffix = "");

}  // namespace kvq
