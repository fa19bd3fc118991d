#include "accuracy/text_windows.h"

#include "fixtures/finite.h"
#include "kernels/error.h"

namespace kvq {
namespace {

constexpr int64_t kMostFirstCalls = int64_t{1} << 28;  // bytes: four of 128 tokens take SmolLM2 12 MB
constexpr size_t kMostLogits = size_t{1} << 30;  // bytes: six windows of 1,024 tokens and 49,152 words take 600 MB

// The unquantized model's logits of positions [from, to) of windows side by side, of which `window` is the first one's beginning. A CPU
// takes a quarter as long for SmolLM2's as for its layers, so they are kept, in the type that the head computes in: what it says is exact there.
at::Tensor ReferenceLogits(const Work& work, int64_t window, const at::Tensor& reference, int64_t from, int64_t to) {
  if (const auto kept = work.reference_logits.find({window, from, to}); kept != work.reference_logits.end()) return kept->second.to(at::kFloat);
  const at::Tensor logits = work.model.Logits(reference.narrow(1, from, to - from));
  const ModelConfig& c = work.model.config();
  if (!logits.is_cpu() || c.logit_divisor != 1 || c.logit_softcap > 0) return logits;  // the latter work in float32
  const at::Tensor kept = logits.to(work.model.dtype());
  size_t bytes = kept.nbytes();
  for (const auto& [of, others] : work.reference_logits) bytes += others.nbytes();
  if (bytes <= kMostLogits && kept.to(at::kFloat).equal(logits)) work.reference_logits[{window, from, to}] = kept;
  return logits;
}

}  // namespace

Work WorkOf(Session& session, const Cell& cell, const std::string& what) {
  const Tokenizer& tokenizer = session.tokenizer(cell.model);
  const std::string key = StrCat(what, cell.model, "/", cell.backend, "/", cell.context, "/", cell.batch);
  const Model& model = session.model(cell.model);
  Session::WindowStates& states = session.window_states(key);
  Work work{key, model, FindBackend(cell.backend), session.corpus_ids(cell.model), {}, states.hidden, states.logits, states.first_calls};
  if (tokenizer.adds_bos()) work.bos.push_back(*tokenizer.bos_id());
  return work;
}

std::vector<Window> WindowsOf(const Work& work, const Cell& cell, const Options& options) {
  const int64_t bos = static_cast<int64_t>(work.bos.size());
  if (cell.context < 2) throw Skip("a window of one token predicts none; choose --contexts of 2 or more");
  std::vector<Window> windows =
      DecodeWindows(static_cast<int64_t>(work.text.size()), cell.context - bos, options.stride,
                    options.skip_windows + options.windows, bos > 0);
  const int64_t skipped = std::min(options.skip_windows, static_cast<int64_t>(windows.size()));
  windows.erase(windows.begin(), windows.begin() + skipped);
  if (windows.empty()) {
    throw Skip(StrCat("the corpus has ", work.text.size(), " tokens, one window ", cell.context,
                      skipped > 0 ? StrCat(", and --skip-windows leaves out ", skipped) : ""));
  }
  return windows;
}

at::Tensor WindowIds(const Work& work, const std::vector<Window>& windows) {
  std::vector<at::Tensor> rows;
  for (const Window& window : windows) {
    std::vector<int32_t> ids = work.bos;
    ids.insert(ids.end(), work.text.begin() + window.begin, work.text.begin() + window.end);
    rows.push_back(IdTensor(ids, 1, work.model.device()));
  }
  return at::cat(rows, 0);
}

std::vector<std::pair<int64_t, int64_t>> CallsOf(const Spec& spec, int64_t length) {
  const int64_t chunk = spec.CallTokens();
  std::vector<std::pair<int64_t, int64_t>> calls;
  for (int64_t begin = 0; begin < length; begin = calls.back().second) {
    calls.emplace_back(begin, std::min(begin == 0 ? spec.sink_tokens + chunk : begin + chunk, length));
  }
  return calls;
}

void FeedAsDecoding(const Model& model, const Backend& backend, const Spec& spec,
                    const at::Tensor& ids, KvCache& cache,
                    const std::function<void(int64_t begin, const at::Tensor& hidden)>& use,
                    const Tap& tap, Session::FirstCall* first) {
  for (const auto& [begin, end] : CallsOf(spec, ids.size(1))) {
    const at::Tensor some = ids.narrow(1, begin, end - begin);
    if (begin > 0 || first == nullptr) {
      use(begin, model.Forward(some, cache, backend, tap));
      continue;
    }
    if (first->hidden.defined()) {
      Store(model, first->tokens, end, cache);
    } else {
      Capture capture(model);
      const at::Tensor hidden = model.Forward(some, cache, backend, capture.tap());
      *first = {hidden, capture.Take()};
    }
    use(begin, first->hidden);
  }
}

void CompareLogits(const Work& work, const Spec& spec, const std::vector<Window>& windows,
                   const at::Tensor& ids, const at::Tensor& reference,
                   const std::function<void(const at::Tensor& reference, const at::Tensor& logits,
                                            const at::Tensor& targets)>& use) {
  const int64_t length = ids.size(1), bos = static_cast<int64_t>(work.bos.size());
  // Position p predicts token p + 1: the first that counts is just before the first scored token.
  const int64_t first = windows[0].score_from - windows[0].begin + bos - 1;
  KvCache cache = work.model.NewCache(spec, ids.size(0), length);
  // A CPU takes an eighth of the time for an eighth of a window: what all specs have alike it makes once.
  const int64_t call = CallsOf(spec, length).front().second;
  const std::array<int64_t, 2> key = {windows[0].begin, call};
  bool alike = ids.is_cpu() && CanStore(work.model, spec) && !spec.raw_prefill && !ReadsEncoded(spec, call, call);
  if (alike && !work.first_calls.contains(key)) {
    int64_t bytes = KvBytes(ParseSpec("none"), cache.shape(), call, cache.dtype());
    for (const auto& [of, others] : work.first_calls) {
      for (const auto& [keys, values] : others.tokens) bytes += static_cast<int64_t>(keys.nbytes() + values.nbytes());
    }
    alike = bytes <= kMostFirstCalls;
  }
  FeedAsDecoding(work.model, work.backend, spec, ids, cache,
                 [&](int64_t begin, const at::Tensor& hidden) {
                   const int64_t from = std::max(begin, first);
                   const int64_t to = std::min(begin + hidden.size(1), length - 1);
                   if (from >= to) return;
                   use(ReferenceLogits(work, windows[0].begin, reference, from, to),
                       work.model.Logits(hidden.narrow(1, from - begin, to - from)),
                       ids.narrow(1, from + 1, to - from).to(hidden.device()));
                 },
                 {}, alike ? &work.first_calls[key] : nullptr);
}

void CheckScores(const Work& work, const Spec& spec, const at::Tensor& ids, const std::vector<WindowScore>& scores) {
  std::vector<double> sums;
  for (const WindowScore& score : scores) sums.insert(sums.end(), {score.reference_nll, score.nll, score.kld});
  CheckFinite(at::tensor(sums), work.model, ids, spec, work.backend);
}

void AddInterval(Counters& counters, const std::string& name, double value,
                 const std::optional<Interval>& interval, double least, double most,
                 const std::string& suffix) {
  counters.emplace_back(name + suffix, value);
  if (!interval) return;
  counters.emplace_back(name + "_lo" + suffix, std::max(interval->low, least));
  counters.emplace_back(name + "_hi" + suffix, std::min(interval->high, most));
}

}  // namespace kvq
