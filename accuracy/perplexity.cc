// perplexity: what quantizing the cache does to the model's predictions of real text.
//
// Protocol `decode`. Each window is fed in calls of residual_length tokens (Spec::CallTokens), so that every scored token
// reads the history as decoding would: encoded, with the residual as it is. With @prefill=raw, and under policies kivi and
// hf, the first call alone is a prefill and reads its own tokens as they came. Beside it the unquantized
// model runs once over the whole window. Per scored token: nll of both, kld = KL(unquantized ||
// quantized) in nats, and whether the likeliest token is the same. Intervals (95 %) are Student's over
// windows. The floor is `none` sent through the same calls against the same reference: what rounding
// alone does, in this type, on this machine; a kld near it means nothing.
//
// Protocol `study` is the reference study's: half-overlapping windows; the quantized model is given the
// first half in one call and the second half in another, and only the second call is scored, without its
// first token; the first window is never quantized; a window's mean counts once for every target, scored or
// not. With @policy=hf it replays what that study's library did. The JSON has each window's sums, from which
// other choices follow (accuracy/defects.py): its targets, how many of them each model scored, both nll
// sums, and the unquantized nll of the first scored one, which the quantized model leaves out.
#include <map>

#include "accuracy/scoring.h"
#include "accuracy/text_windows.h"
#include "fixtures/finite.h"
#include "kernels/error.h"

namespace kvq {
namespace {

// Hidden states of the unquantized model over whole windows.
const at::Tensor& Reference(const Work& work, const at::Tensor& ids, int64_t first_window) {
  at::Tensor& hidden = work.reference_states[first_window];
  if (!hidden.defined()) {
    KvCache cache = work.model.NewCache(ParseSpec("none"), ids.size(0), ids.size(1));
    hidden = work.model.Forward(ids, cache, work.backend);
  }
  return hidden;
}

// Windows of one length and one score_from (relative to their beginnings), side by side.
std::vector<WindowScore> ScoreBatch(const Work& work, const Spec& spec,
                                    const std::vector<Window>& windows) {
  const at::Tensor ids = WindowIds(work, windows);
  const at::Tensor& reference = Reference(work, ids, windows[0].begin);
  std::vector<WindowScore> scores(windows.size());
  CompareLogits(work, spec, windows, ids, reference,
                [&](const at::Tensor& exact, const at::Tensor& logits, const at::Tensor& targets) {
                  AddScores(exact, logits, targets, scores.data());
                });
  CheckScores(work, spec, ids, scores);
  return scores;
}

std::vector<WindowScore> ScoreAll(const Work& work, const Spec& spec,
                                  const std::vector<Window>& windows, int64_t batch) {
  std::vector<WindowScore> scores;
  for (const std::vector<Window>& group : SideBySide(windows, batch)) {
    const std::vector<WindowScore> part = ScoreBatch(work, spec, group);
    scores.insert(scores.end(), part.begin(), part.end());
  }
  return scores;
}

Counters Summary(const std::vector<WindowScore>& scores) {
  const auto reference_nll = [](const WindowScore& s) { return s.reference_nll; };
  const auto nll = [](const WindowScore& s) { return s.nll; };
  const auto kld = [](const WindowScore& s) { return s.kld; };
  const auto agreements = [](const WindowScore& s) { return s.agreements; };
  const double reference_ppl = std::exp(Total(scores, reference_nll));
  const double ppl = std::exp(Total(scores, nll));
  std::vector<double> log_ppl = PerToken(scores, nll);
  const std::vector<double> reference_log_ppl = PerToken(scores, reference_nll);
  // d ppl = ppl d nll: the interval of the difference of two perplexities, window by window.
  std::vector<double> difference;
  for (size_t i = 0; i < log_ppl.size(); ++i) {
    difference.push_back(ppl * log_ppl[i] - reference_ppl * reference_log_ppl[i]);
  }
  Counters counters;
  std::optional<Interval> interval = MeanInterval(log_ppl);
  if (interval) interval = Interval{std::exp(interval->low), std::exp(interval->high)};
  AddInterval(counters, "ppl", ppl, interval);
  counters.emplace_back("ppl_reference", reference_ppl);
  interval = MeanInterval(difference);
  const double delta = ppl - reference_ppl;
  if (interval) {  // around the mean over tokens, not that of the windows
    const double half = (interval->high - interval->low) / 2;
    interval = Interval{delta - half, delta + half};
  }
  AddInterval(counters, "delta_ppl", delta, interval);
  AddInterval(counters, "kld_nats", Total(scores, kld), MeanInterval(PerToken(scores, kld)), 0);
  AddInterval(counters, "top1_agreement", Total(scores, agreements),
              MeanInterval(PerToken(scores, agreements)), 0, 1);
  counters.emplace_back("windows", static_cast<double>(scores.size()));
  int64_t tokens = 0;
  for (const WindowScore& score : scores) tokens += score.tokens;
  counters.emplace_back("scored_tokens", static_cast<double>(tokens));
  return counters;
}

double Find(const Counters& counters, const std::string& name) {
  for (const auto& [key, value] : counters) {
    if (key == name) return value;
  }
  throw std::logic_error("no counter " + name);
}

// `none` through the calls of `spec` against the plain forward; the same for all specs that share them.
Counters Floor(const Work& work, const Spec& spec, const std::vector<Window>& windows,
               const Cell& cell) {
  static std::map<std::string, Counters> known;
  const std::string calls = StrCat(work.key, "/", spec.CallTokens(), "/", spec.sink_tokens);
  const auto found = known.find(calls);
  if (found != known.end()) return found->second;
  Spec none = ParseSpec("none");
  none.keys.residual_length = none.values.residual_length = spec.CallTokens();
  none.sink_tokens = spec.sink_tokens;
  return known[calls] = Summary(ScoreAll(work, none, windows, cell.batch));
}

// Of what the scored tokens' predictions read, the share that is encoded.
double ShareRead(const Work& work, const Spec& spec, const std::vector<Window>& windows) {
  const CacheShape shape = work.model.cache_shape(1);
  double sum = 0, tokens = 0;
  for (const Window& window : windows) {
    const int64_t bos = static_cast<int64_t>(work.bos.size()), length = window.end - window.begin + bos;
    const int64_t begin = window.score_from - window.begin + bos - 1;
    const double scored = static_cast<double>(length - 1 - begin);
    sum += scored * EncodedShareRead(spec, shape, std::min(spec.sink_tokens + spec.CallTokens(), length), begin, length - 1);
    tokens += scored;
  }
  return sum / tokens;
}

Counters DecodeProtocol(const Work& work, const Spec& spec, const Cell& cell,
                        const Options& options) {
  const std::vector<Window> windows = WindowsOf(work, cell, options);
  const bool is_floor = spec.stores_dense() && spec.policy == Policy::kAppend;
  Counters counters;
  if (!is_floor) {
    const double seconds = Time(work.model.devices(), [&] {
      counters = Summary(ScoreAll(work, spec, windows, cell.batch));
    });
    counters.emplace_back("scored_tokens_per_s", Find(counters, "scored_tokens") / seconds);
  }
  const Counters floor = Floor(work, spec, windows, cell);
  if (is_floor) counters = floor;
  counters.emplace_back("encoded_share", ShareRead(work, spec, windows));
  counters.emplace_back("kld_floor_nats", Find(floor, "kld_nats"));
  counters.emplace_back("top1_floor", Find(floor, "top1_agreement"));
  return counters;
}

// nll of a window's targets as the study scores them, less those that it leaves out at the front.
std::vector<double> StudyNll(const Work& work, const Spec& spec, const Window& window,
                             bool quantized) {
  const at::Tensor ids = WindowIds(work, {window});
  const int64_t length = ids.size(1), overlap = window.score_from - window.begin;
  KvCache cache = work.model.NewCache(quantized ? spec : ParseSpec("none"), 1, length);
  // Phase one is never scored, nor is phase two's first token: nothing before it is in its call.
  const int64_t phase2 = quantized ? overlap : 0;
  if (phase2 > 0) work.model.Forward(ids.narrow(1, 0, phase2), cache, work.backend);
  const at::Tensor hidden =
      work.model.Forward(ids.narrow(1, phase2, length - phase2), cache, work.backend);
  std::vector<double> nll;
  const int64_t first = std::max(overlap, phase2 + 1);  // the first token whose nll is counted
  for (int64_t begin = first; begin < length; begin += 256) {  // logits of few positions at a time
    const int64_t n = std::min<int64_t>(256, length - begin);
    const at::Tensor log =
        at::log_softmax(work.model.Logits(hidden.narrow(1, begin - 1 - phase2, n)), -1);
    const at::Tensor of_targets =
        log.gather(-1, ids.narrow(1, begin, n).unsqueeze(-1).to(log.device())).view({n}).to(at::kDouble).cpu();
    for (int64_t i = 0; i < n; ++i) nll.push_back(-of_targets[i].item<double>());
  }
  CheckFinite(at::tensor(nll), work.model, ids, spec, work.backend);
  return nll;
}

// The same unquantized; kept for the next spec.
const std::vector<double>& StudyReference(const Work& work, const Window& window) {
  static std::map<std::pair<std::string, int64_t>, std::vector<double>> known;
  std::vector<double>& nll = known[{work.key, window.begin}];
  if (nll.empty()) nll = StudyNll(work, ParseSpec("none"), window, false);
  return nll;
}

Counters StudyProtocol(const Work& work, const Spec& spec, const Cell& cell,
                       const Options& options) {
  const std::vector<Window> windows =
      StudyWindows(static_cast<int64_t>(work.text.size()), cell.context, options.stride,
                   options.windows);
  double reference = 0, quantized = 0;
  Counters per_window;
  for (size_t i = 0; i < windows.size(); ++i) {
    const Window& window = windows[i];
    const double targets = static_cast<double>(window.scored());
    const std::vector<double>& plain = StudyReference(work, window);
    // An overlap shorter than 128 runs without a cache: always the first window.
    const bool encodes = window.score_from - window.begin >= 128 && !spec.stores_dense();
    const std::vector<double> scored = encodes ? StudyNll(work, spec, window, true) : plain;
    if (scored.empty()) {  // the study's mean over none is not a number, and so is its perplexity
      throw Skip(StrCat("the last window has one target, which the study does not score; choose "
                        "other --windows than ", windows.size()));
    }
    reference += Mean(plain) * targets;
    quantized += Mean(scored) * targets;
    const std::string suffix = StrCat("/window:", i);
    const double of_plain = static_cast<double>(plain.size());
    const double of_scored = static_cast<double>(scored.size());
    per_window.insert(per_window.end(),
                      {{"targets" + suffix, targets},
                       {"scored" + suffix, of_scored},
                       {"scored_reference" + suffix, of_plain},
                       {"nll_reference" + suffix, Mean(plain) * of_plain},
                       {"nll_reference_first" + suffix, plain.front()},
                       {"nll" + suffix, Mean(scored) * of_scored}});
  }
  const double tokens = static_cast<double>(windows.back().end);
  const double ppl_reference = std::exp(reference / tokens), ppl = std::exp(quantized / tokens);
  Counters counters = {{"ppl", ppl},
                       {"ppl_reference", ppl_reference},
                       {"delta_ppl", ppl - ppl_reference},
                       {"windows", static_cast<double>(windows.size())},
                       {"scored_tokens", tokens}};
  counters.insert(counters.end(), per_window.begin(), per_window.end());
  return counters;
}

Counters Perplexity(Session& session, const Cell& cell, benchmark::State& state) {
  const Options& options = session.options();
  Work work = WorkOf(session, cell);
  const Spec spec = ParseSpec(cell.spec);
  Counters counters;
  for (auto _ : state) {
    state.SetIterationTime(Time(session.devices(), [&] {
      if (options.protocol == "study") {
        // One tokenization with the default specials: a BOS stands in the first window alone.
        work.text.insert(work.text.begin(), work.bos.begin(), work.bos.end());
        work.bos.clear();
        counters = StudyProtocol(work, spec, cell, options);
      } else {
        counters = DecodeProtocol(work, spec, cell, options);
      }
    }));
  }
  return counters;
}

const RegisterMeasurement kPerplexity{
    {.name = "perplexity",
     .what = "ppl, its change, KLD and top-1 agreement with the unquantized model",
     .study = "half-overlapping windows in two calls; the second is scored, less its first token",
     .quality = true, .turn = 2, .first = [](const Options&) { return 2.0; },  // the reference, and the floor
     .like_tokens = [](const Options& o, double tokens) { return 1.3 * static_cast<double>(o.windows) * tokens; },  // and logits of all
     .run = Perplexity}};

}  // namespace
}  // namespace kvq
