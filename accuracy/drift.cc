// drift: what a quantized cache does to a long decoding. The unquantized model (spec `none`, the same backend) writes
// --decode-tokens greedily behind each of --windows prompts, the first disjoint windows of the text; it does so once, for
// all specs. All prompts are fed as in perplexity's protocol `decode`, and then token by token, --batch side by side. A
// text ends with the EOS, which counts. The unit of every interval is the prompt: tokens of one text are not independent.
//
// On the path. The unquantized model's text is fed to both: kld_nats, top1_agreement, delta_nll (the text's, this cache
// less the other), means of the prompts' means; the same by position, /from:N for positions N to 2N - 1, counted from 1;
// kld_p99_nats of all tokens; kld_slope_nats_per_1k, the slope of the straight line through a prompt's klds, mean of
// prompts. The floor is `none` again, its prompts fed in calls half as long: what rounding alone does.
//
// Off the path. divergence_median: how many tokens of free greedy decoding are those of the unquantized model (Kaplan and
// Meier, texts that never part are watched to --decode-tokens; not there where more than half never part);
// identical_64, _256, _1024: shares of prompts whose first so many are, a text that ended the same among them. Where
// they part, divergence_gap_nats is how far the unquantized model's first choice was above its second, median; a gap no
// larger than the floor moved gaps (the 99th percentile, near_tie_gap_nats) is a near tie: near_tie_share of the divergences.
// own_nll is what the unquantized model thinks of the quantized one's own text, delta_own_nll less what it thinks of its
// own, both scored in the same calls. repetition is the share of 4-grams that the text had before, length is in
// tokens, eos_rate the share of texts that end; _reference the same of the unquantized model.
#include "accuracy/drift.h"

#include <map>

#include "accuracy/scoring.h"
#include "accuracy/stepper.h"
#include "accuracy/text_windows.h"
#include "fixtures/finite.h"
#include "kernels/error.h"

namespace kvq {
namespace {

// What the unquantized model wrote behind prompts side by side.
struct Reference {
  at::Tensor prompts;               // [batch, context]
  at::Tensor tokens;                // [batch, new tokens]; behind a text's end whatever came
  std::vector<at::Tensor> states;   // before each token
  std::vector<std::vector<int32_t>> texts;
  std::vector<double> own_nll;
};

// Everything that was seen of one prompt.
struct Path {
  std::vector<double> kld, agreement, nll, reference_nll;  // by position
  std::vector<double> gap_change;                          // how far the reference's top two moved against each other
  Survival divergence = {0, false};                        // tokens that are the same before the first other one
  double gap = 0;                                          // the reference's, where they part
  std::vector<int32_t> own;                                // text
  double own_nll = 0;
};

std::vector<int32_t> TextOf(const at::Tensor& row, std::optional<int32_t> eos) {
  std::vector<int32_t> text;
  for (const int64_t id : std::vector<int64_t>(row.data_ptr<int64_t>(), row.data_ptr<int64_t>() + row.numel())) {
    text.push_back(static_cast<int32_t>(id));
    if (text.back() == eos) break;
  }
  return text;
}

// nll a token of texts behind their prompts under the unquantized model, in calls as decoding would make.
std::vector<double> NllOf(const Work& work, const at::Tensor& prompts, const std::vector<std::vector<int32_t>>& texts) {
  size_t longest = 0;
  for (const auto& text : texts) longest = std::max(longest, text.size());
  std::vector<at::Tensor> rows;
  for (std::vector<int32_t> text : texts) {
    text.resize(longest);  // what stands behind a text is not scored
    rows.push_back(IdTensor(text, 1, prompts.device()));
  }
  const at::Tensor ids = at::cat({prompts, at::cat(rows, 0)}, 1);
  const Spec none = ParseSpec("none");
  const int64_t first = prompts.size(1) - 1, last = ids.size(1) - 1;
  KvCache cache = work.model.NewCache(none, ids.size(0), ids.size(1));
  std::vector<double> sums(texts.size(), 0.0);
  FeedAsDecoding(work.model, work.backend, none, ids, cache, [&](int64_t begin, const at::Tensor& hidden) {
    const int64_t from = std::max(begin, first), to = std::min(begin + hidden.size(1), last);
    if (from >= to) return;
    const at::Tensor log = at::log_softmax(work.model.Logits(hidden.narrow(1, from - begin, to - from)), -1);
    const at::Tensor nll = log.gather(-1, ids.narrow(1, from + 1, to - from).to(log.device()).unsqueeze(-1)).squeeze(-1).neg().to(at::kDouble).cpu();
    for (size_t row = 0; row < texts.size(); ++row) {
      for (int64_t at = from; at < to && at - first < static_cast<int64_t>(texts[row].size()); ++at) {
        sums[row] += nll[static_cast<int64_t>(row)][at - from].item<double>();
      }
    }
  });
  for (size_t row = 0; row < texts.size(); ++row) sums[row] /= static_cast<double>(texts[row].size());
  return sums;
}

// Written once, and kept as tensors where the session keeps such for all specs: the tokens, the states, the nll.
Reference ReferenceOf(Session& session, const Work& work, const std::vector<Window>& windows, int64_t new_tokens,
                      std::optional<int32_t> eos) {
  Reference reference;
  reference.prompts = WindowIds(work, windows);
  at::Tensor& kept_tokens = work.reference_states[3 * windows[0].begin];
  at::Tensor& kept_states = work.reference_states[3 * windows[0].begin + 1];
  at::Tensor& kept_nll = work.reference_states[3 * windows[0].begin + 2];
  if (!kept_nll.defined()) {
    const Spec none = ParseSpec("none");
    Stepper stepper(session, work.model, work.backend, none, reference.prompts.size(0), reference.prompts.size(1) + new_tokens);
    // Where the prompt's state and those of steps may be of two kinds (Stepper), logits are kept.
    std::vector<at::Tensor> tokens, states;
    at::Tensor state = stepper.Prompt(reference.prompts, none.CallTokens());
    for (int64_t t = 0;; ++t) {
      const at::Tensor logits = stepper.Logits(state);
      CheckFinite(logits, work.model, reference.prompts, none, work.backend);
      states.push_back(work.backend.graph ? logits.squeeze(1) : state);
      tokens.push_back(logits.squeeze(1).argmax(-1).to(reference.prompts.device()));
      if (t + 1 == new_tokens) break;
      state = stepper.Step(tokens.back());
    }
    kept_tokens = at::stack(tokens, 1);
    kept_states = at::stack(states, 0);
    const at::Tensor rows = kept_tokens.cpu();
    for (int64_t row = 0; row < rows.size(0); ++row) reference.texts.push_back(TextOf(rows[row].contiguous(), eos));
    kept_nll = at::tensor(NllOf(work, reference.prompts, reference.texts), at::kDouble);
    reference.texts.clear();
  }
  reference.tokens = kept_tokens;
  for (int64_t t = 0; t < new_tokens; ++t) reference.states.push_back(kept_states[t]);
  const at::Tensor rows = kept_tokens.cpu();
  for (int64_t row = 0; row < rows.size(0); ++row) {
    reference.texts.push_back(TextOf(rows[row].contiguous(), eos));
    reference.own_nll.push_back(kept_nll[row].item<double>());
  }
  return reference;
}

// The reference's texts fed to a cache of `spec`, prompts in calls of `call` tokens; where `free`, then what it writes by
// itself.
std::vector<Path> Follow(Session& session, const Work& work, const Spec& spec, int64_t call, const Reference& reference,
                         std::optional<int32_t> eos, bool free) {
  const int64_t batch = reference.tokens.size(0), new_tokens = reference.tokens.size(1);
  std::vector<Path> paths(static_cast<size_t>(batch));
  Stepper stepper(session, work.model, work.backend, spec, batch, reference.prompts.size(1) + new_tokens);
  int64_t longest = 0;
  for (const auto& text : reference.texts) longest = std::max(longest, static_cast<int64_t>(text.size()));
  const at::Tensor reference_rows = reference.tokens.cpu();
  std::function<void()> restore;  // to where the first of them parts
  at::Tensor parting;             // the tokens that are picked there, [batch]
  int64_t parted_at = -1;
  at::Tensor state = stepper.Prompt(reference.prompts, call);
  for (int64_t t = 0; t < longest; ++t) {
    const at::Tensor logits = stepper.Logits(state), exact = stepper.Logits(reference.states[static_cast<size_t>(t)]);
    CheckFinite(logits, work.model, reference.prompts, spec, work.backend);
    const at::Tensor targets = reference.tokens.narrow(1, t, 1).to(logits.device());
    const at::Tensor scores = ScoreTokens(exact, logits, targets).squeeze(1).cpu();
    const at::Tensor picked = logits.squeeze(1).argmax(-1), picked_cpu = picked.cpu();
    const auto [top, top_ids] = exact.squeeze(1).topk(2, -1);
    const at::Tensor of_top = logits.squeeze(1).gather(-1, top_ids);
    const at::Tensor gaps = (top.select(1, 0) - top.select(1, 1)).to(at::kDouble).cpu();
    const at::Tensor moved = (of_top.select(1, 0) - of_top.select(1, 1)).to(at::kDouble).cpu();
    bool parts = false;
    for (int64_t row = 0; row < batch; ++row) {
      Path& path = paths[static_cast<size_t>(row)];
      if (t >= static_cast<int64_t>(reference.texts[static_cast<size_t>(row)].size())) continue;
      path.reference_nll.push_back(scores[row][0].item<double>());
      path.nll.push_back(scores[row][1].item<double>());
      path.kld.push_back(scores[row][2].item<double>());
      const bool same = picked_cpu[row].item<int64_t>() == reference_rows[row][t].item<int64_t>();
      path.agreement.push_back(same);
      path.gap_change.push_back(std::abs(moved[row].item<double>() - gaps[row].item<double>()));
      if (same || path.divergence.happened) continue;
      path.divergence = {static_cast<double>(t), true};
      path.gap = gaps[row].item<double>();
      parts = true;
    }
    if (parts && free && parted_at < 0) {
      restore = stepper.cache().Save();
      parting = picked.to(reference.tokens.device());
      parted_at = t;
    }
    if (t + 1 < longest) state = stepper.Step(reference.tokens.select(1, t));
  }
  for (Path& path : paths) {
    if (!path.divergence.happened) path.divergence.time = static_cast<double>(new_tokens);  // it ends, or goes on, the same
  }
  if (!free) return paths;
  std::vector<std::vector<int32_t>> own = reference.texts;
  if (parted_at >= 0) {
    restore();
    std::vector<at::Tensor> tokens = {parting};
    const auto all_ended = [&] {
      bool all = true;
      for (size_t row = 0; row < own.size(); ++row) {
        const bool before = static_cast<int64_t>(reference.texts[row].size()) <= parted_at;
        all = all && (before || own[row].back() == eos);
      }
      return all;
    };
    for (size_t row = 0; row < own.size(); ++row) {
      if (static_cast<int64_t>(own[row].size()) > parted_at) own[row].resize(static_cast<size_t>(parted_at));
    }
    const auto append = [&](const at::Tensor& picked) {
      const at::Tensor ids = picked.cpu();
      for (size_t row = 0; row < own.size(); ++row) {
        if (static_cast<int64_t>(reference.texts[row].size()) <= parted_at) continue;
        if (!own[row].empty() && own[row].back() == eos) continue;
        own[row].push_back(static_cast<int32_t>(ids[static_cast<int64_t>(row)].item<int64_t>()));
      }
    };
    append(parting);
    at::Tensor token = parting;
    for (int64_t t = parted_at + 1; t < new_tokens && !all_ended(); ++t) {
      const at::Tensor logits = stepper.Logits(stepper.Step(token));
      CheckFinite(logits, work.model, reference.prompts, spec, work.backend);
      token = logits.squeeze(1).argmax(-1).to(reference.tokens.device());
      append(token);
    }
  }
  const std::vector<double> nll = own == reference.texts ? reference.own_nll : NllOf(work, reference.prompts, own);
  for (size_t row = 0; row < paths.size(); ++row) {
    paths[row].own_nll = own[row] == reference.texts[row] ? reference.own_nll[row] : nll[row];
    paths[row].own = own[row];
  }
  return paths;
}

std::vector<double> Differences(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> differences;
  for (size_t i = 0; i < a.size(); ++i) differences.push_back(a[i] - b[i]);
  return differences;
}

// Means over prompts, and their intervals.
void AddMean(Counters& counters, const std::string& name, const std::vector<double>& of_prompts, double least = -INFINITY,
             double most = INFINITY, const std::string& suffix = "") {
  if (!of_prompts.empty()) AddInterval(counters, name, Mean(of_prompts), MeanInterval(of_prompts), least, most, suffix);
}

struct Floor {
  double kld, top1, gap;
};

Floor FloorOf(Session& session, const Work& work, const std::vector<Reference>& references, std::optional<int32_t> eos) {
  static std::map<std::string, Floor> known;
  const std::string key = StrCat(work.key, "/", references.size(), "/", references[0].prompts.size(0));
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const Spec none = ParseSpec("none");
  std::vector<double> kld, agreement, gap_change;
  Floor floor{0, 0, 0};
  for (const Reference& reference : references) {
    for (const Path& path : Follow(session, work, none, std::max<int64_t>(none.CallTokens() / 2, 1), reference, eos, false)) {
      kld.push_back(Mean(path.kld));
      agreement.push_back(Mean(path.agreement));
      gap_change.insert(gap_change.end(), path.gap_change.begin(), path.gap_change.end());
    }
  }
  floor.kld = Mean(kld), floor.top1 = Mean(agreement), floor.gap = Quantile(gap_change, 0.99);
  return known[key] = floor;
}

Counters Drift(Session& session, const Cell& cell, benchmark::State& state) {
  const Options& options = session.options();
  const Spec spec = ParseSpec(cell.spec);
  const int64_t new_tokens = options.decode_tokens;
  const Work work = WorkOf(session, cell, StrCat("drift/", new_tokens, "/"));
  const Tokenizer& tokenizer = session.tokenizer(cell.model);
  const std::optional<int32_t> eos = tokenizer.eos_id();
  const std::vector<Window> windows = WindowsOf(work, cell, options);
  std::vector<Reference> references;
  std::vector<Path> paths;
  Floor floor{0, 0, 0};
  for (auto _ : state) {
    state.SetIterationTime(Time(session.devices(), [&] {
      for (const std::vector<Window>& group : SideBySide(windows, cell.batch)) {
        references.push_back(ReferenceOf(session, work, group, new_tokens, eos));
      }
      floor = FloorOf(session, work, references, eos);
      for (const Reference& reference : references) {
        const std::vector<Path> part = Follow(session, work, spec, spec.CallTokens(), reference, eos, true);
        paths.insert(paths.end(), part.begin(), part.end());
      }
    }));
  }
  std::vector<std::vector<int32_t>> texts;
  std::vector<double> reference_own_nll;
  for (const Reference& reference : references) {
    texts.insert(texts.end(), reference.texts.begin(), reference.texts.end());
    reference_own_nll.insert(reference_own_nll.end(), reference.own_nll.begin(), reference.own_nll.end());
  }

  Counters counters;
  std::vector<double> kld, agreement, delta_nll, slope, all_kld, share;
  const int64_t first_call = std::min(spec.sink_tokens + spec.CallTokens(), cell.context);
  for (const Path& path : paths) {
    kld.push_back(Mean(path.kld));
    agreement.push_back(Mean(path.agreement));
    delta_nll.push_back(Mean(Differences(path.nll, path.reference_nll)));
    if (const auto of_path = Slope(path.kld)) slope.push_back(1000 * *of_path);
    all_kld.insert(all_kld.end(), path.kld.begin(), path.kld.end());
    share.push_back(EncodedShareRead(spec, work.model.cache_shape(1), first_call, cell.context - 1,
                                     cell.context - 1 + static_cast<int64_t>(path.kld.size())));
  }
  AddMean(counters, "kld_nats", kld, 0);
  AddMean(counters, "top1_agreement", agreement, 0, 1);
  AddMean(counters, "delta_nll", delta_nll);
  counters.emplace_back("kld_p99_nats", Quantile(all_kld, 0.99));
  AddMean(counters, "kld_slope_nats_per_1k", slope);
  counters.emplace_back("kld_floor_nats", floor.kld);
  counters.emplace_back("top1_floor", floor.top1);

  std::vector<Survival> survivals;
  std::vector<double> times, gaps;
  int64_t ties = 0, ended = 0, reference_ended = 0;
  std::vector<double> own_nll, repetition, reference_repetition, length, reference_length;
  for (size_t i = 0; i < paths.size(); ++i) {
    const Path& path = paths[i];
    survivals.push_back(path.divergence);
    times.push_back(path.divergence.time);
    if (path.divergence.happened) {
      gaps.push_back(path.gap);
      ties += path.gap <= floor.gap;
    }
    own_nll.push_back(path.own_nll);
    repetition.push_back(RepetitionRate(path.own));
    reference_repetition.push_back(RepetitionRate(texts[i]));
    length.push_back(static_cast<double>(path.own.size()));
    reference_length.push_back(static_cast<double>(texts[i].size()));
    ended += path.own.back() == eos;
    reference_ended += texts[i].back() == eos;
  }
  const int64_t prompts = static_cast<int64_t>(paths.size());
  if (const auto median = KaplanMeierMedian(survivals)) counters.emplace_back("divergence_median", *median);
  if (const auto interval = MedianInterval(times)) {
    counters.emplace_back("divergence_median_lo", interval->low);
    if (interval->high < static_cast<double>(new_tokens)) counters.emplace_back("divergence_median_hi", interval->high);
  }
  const auto rate = [&](const std::string& name, int64_t count, int64_t trials) {
    const Interval interval = WilsonInterval(count, trials);
    AddInterval(counters, name, static_cast<double>(count) / static_cast<double>(trials), interval, 0, 1);
  };
  for (const int64_t first : {64, 256, 1024}) {
    if (first > new_tokens) continue;
    rate(StrCat("identical_", first), std::count_if(times.begin(), times.end(), [&](double t) { return t >= static_cast<double>(first); }), prompts);
  }
  if (!gaps.empty()) {
    counters.emplace_back("divergence_gap_nats", Quantile(gaps, 0.5));
    rate("near_tie_share", ties, static_cast<int64_t>(gaps.size()));
  }
  counters.emplace_back("near_tie_gap_nats", floor.gap);
  AddMean(counters, "own_nll", own_nll);
  counters.emplace_back("own_nll_reference", Mean(reference_own_nll));
  AddMean(counters, "delta_own_nll", Differences(own_nll, reference_own_nll));
  counters.emplace_back("repetition", Mean(repetition));
  counters.emplace_back("repetition_reference", Mean(reference_repetition));
  AddMean(counters, "delta_repetition", Differences(repetition, reference_repetition));
  counters.emplace_back("length", Mean(length));
  counters.emplace_back("length_reference", Mean(reference_length));
  rate("eos_rate", ended, prompts);
  counters.emplace_back("eos_rate_reference", static_cast<double>(reference_ended) / static_cast<double>(prompts));
  counters.emplace_back("encoded_share", Mean(share));
  counters.emplace_back("prompts", static_cast<double>(prompts));
  counters.emplace_back("compared_tokens", static_cast<double>(all_kld.size()));

  // By position: of a prompt, the mean over those of its tokens that lie there.
  for (int64_t from = 1; from <= new_tokens; from *= 2) {
    std::vector<double> of_kld, of_agreement, of_delta;
    for (const Path& path : paths) {
      const int64_t end = std::min<int64_t>(2 * from - 1, static_cast<int64_t>(path.kld.size()));
      if (end < from) continue;
      const auto part = [&](const std::vector<double>& values) {
        return Mean({values.begin() + from - 1, values.begin() + end});
      };
      of_kld.push_back(part(path.kld));
      of_agreement.push_back(part(path.agreement));
      of_delta.push_back(part(path.nll) - part(path.reference_nll));
    }
    const std::string suffix = StrCat("/from:", from);
    AddMean(counters, "kld_nats", of_kld, 0, INFINITY, suffix);
    AddMean(counters, "top1_agreement", of_agreement, 0, 1, suffix);
    AddMean(counters, "delta_nll", of_delta, -INFINITY, INFINITY, suffix);
  }

  for (size_t i = 0; i < paths.size(); ++i) {
    const Path& path = paths[i];
    std::vector<int32_t> ids = work.bos;
    ids.insert(ids.end(), work.text.begin() + windows[i].begin, work.text.begin() + windows[i].end);
    const std::string id = StrCat("prompt:", windows[i].begin);
    Sample sample{.id = id, .cluster = id, .prompt_sha256 = PromptSha256(ids), .nll = Mean(path.nll), .encoded_share = share[i],
                  .answer = tokenizer.Decode(path.own)};
    sample.numbers = {{"kld_nats", kld[i]}, {"top1_agreement", agreement[i]}, {"delta_nll", delta_nll[i]},
                      {"divergence", path.divergence.time}, {"diverged", path.divergence.happened ? 1 : 0},
                      {"own_nll", path.own_nll}, {"repetition", repetition[i]}, {"length", length[i]},
                      {"ended", path.own.back() == eos ? 1 : 0}};
    if (path.divergence.happened) sample.numbers.emplace_back("gap_nats", path.gap);
    session.samples.push_back(sample);
  }
  return counters;
}

const RegisterMeasurement kDrift{
    {.name = "drift",
     .what = "of long decodings, on and off the unquantized model's path; only if the filter names it",
     .quality = true, .on_request = true, .turn = 2,
     .like_tokens = [](const Options& o, double tokens) {
       return static_cast<double>(o.windows) * (2 * tokens + 20 * static_cast<double>(o.decode_tokens));
     },
     .new_tokens = [](const Options& o) { return o.decode_tokens; }, .run = Drift}};

}  // namespace
}  // namespace kvq
