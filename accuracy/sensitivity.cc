// sensitivity: where quantization hurts, and how errors add up. What is encoded is (--parts) all that the spec encodes
// (all); of one layer of the cache its keys (k), its values (v), or both (kv), and nothing else; or all but one layer's
// keys (without-k) or values (without-v). For each:
//
// attention_nmse (not of all and without-*), the error of what attention gives in that layer, for the queries that read
// encoded tokens. All before it is unquantized, so its inputs are bit for bit those of the
// unquantized model: one forward pass computes it for all layers, attending a second time to what a
// cache of the spec would hand out.
//
// logits_nmse, kld_nats, top1_agreement: the error at the model's end, over the tokens that
// perplexity would score, in a run each. Windows are fed as in its protocol `decode`. The reference
// is the unquantized model in the same calls, so that there is no noise floor to subtract: with
// nothing encoded all three are exact.
//
// interaction: kld_nats_all over the sum of kld_nats_k and _v of all layers. 1: errors of layers add up as if they were
// independent; more: they point the same way.
//
// perplexity gives the same kld under the spec that PartOfSpec writes, but for its reference, which
// is fed in one call. Layers below the one that differs are not run again, where the model allows it (Model::Branches)
// and what went into them fits into kKept: the cost is about that of half a run of the windows a layer and part.
#include "accuracy/sensitivity.h"

#include <algorithm>
#include <numeric>

#include "accuracy/error_sum.h"
#include "accuracy/scoring.h"
#include "accuracy/text_windows.h"
#include "fixtures/finite.h"
#include "kernels/error.h"

namespace kvq {
namespace {

constexpr int64_t kKept = int64_t{2} << 30;  // bytes of states, and of logits, that are kept of a run

struct Part {
  std::string name;
  bool keys = false, values = false;  // of one layer
  bool without = false;               // all but these
};

Part PartOf(const std::string& name) {
  const std::string sides = name.starts_with("without-") ? name.substr(8) : name;
  Part part{name, sides == "k" || sides == "kv", sides == "v" || sides == "kv", sides != name};
  std::replace(part.name.begin(), part.name.end(), '-', '_');
  return part;
}

// What encoding one part does, over all windows.
struct Effect {
  ErrorSum attention;
  std::vector<WindowScore> scores;  // one a window
  double logits_error = 0, logits_squares = 0;

  double logits_nmse() const { return logits_error / logits_squares; }
  double kld() const {
    return Total(scores, [](const WindowScore& s) { return s.kld; });
  }
};

struct Effects {
  Effect all;
  std::vector<std::vector<Effect>> of;  // of each layer of the cache, of each part
};

// Norms of rows in float32: of a vocabulary's squares they lose less than 1e-5.
double Squares(const at::Tensor& x) { return at::linalg_vector_norm(x, 2, -1).to(at::kDouble).square().sum().item<double>(); }

// Windows that score the same positions, side by side, in the calls of a spec.
class Feeding {
 public:
  // What a run of them leaves, call by call: hidden states, and what went into each layer of the model, unless that is
  // too much to keep.
  struct Run {
    std::vector<at::Tensor> hidden;
    std::vector<std::vector<at::Tensor>> inputs;
  };

  Feeding(const Work& work, const Spec& spec, const std::vector<Window>& windows)
      : work_(work), windows_(windows), ids_(WindowIds(work, windows)), calls_(CallsOf(spec, ids_.size(1))),
        model_layer_(work.model.config().CachedLayers()),
        // Position p predicts token p + 1: the first that counts is just before the first scored token.
        first_(windows[0].score_from - windows[0].begin + static_cast<int64_t>(work.bos.size()) - 1) {}

  const at::Tensor& ids() const { return ids_; }

  Run Feed(KvCache& cache, const Tap& tap = {}) const {
    const ModelConfig& config = work_.model.config();
    const int64_t layers = static_cast<int64_t>(config.layers.size());
    const bool keep = work_.model.Branches() && ids_.numel() * config.hidden_size * layers *
                                                        static_cast<int64_t>(c10::elementSize(work_.model.dtype())) <= kKept;
    Run run;
    for (const auto& [begin, end] : calls_) {
      std::vector<at::Tensor> inputs;
      const StateTap states = [&](int64_t layer, const at::Tensor& state) {
        if (layer + 1 < layers) inputs.push_back(state.clone());
      };
      run.hidden.push_back(work_.model.Forward(ids_.narrow(1, begin, end - begin), cache, work_.backend, tap,
                                               keep ? states : StateTap()));
      if (keep) run.inputs.push_back(std::move(inputs));
    }
    return run;
  }

  // The run that all others are held against.
  void SetReference(const Run& run) {
    reference_ = run.hidden;
    logits_.clear();
    const int64_t scored = ids_.size(0) * (ids_.size(1) - 1 - first_);
    if (scored * work_.model.config().vocab_size * static_cast<int64_t>(sizeof(float)) > kKept) return;
    for (size_t call = 0; call < calls_.size(); ++call) logits_.push_back(LogitsOf(call, reference_[call]));
  }

  // Adds to `effect` what a run does: `run` itself, or one under `spec` that does as `run` does in all layers before this
  // one of the cache.
  void Score(const Run& run, Effect& effect, const Spec* spec = nullptr, size_t layer = 0) const {
    std::vector<WindowScore> scores(windows_.size());
    std::optional<KvCache> cache;
    if (spec != nullptr) cache.emplace(*spec, work_.model.cache_shape(ids_.size(0)), ids_.size(1), work_.model.kv_dtype(),
                                       work_.model.cache_devices(), work_.model.dtype());
    for (size_t call = 0; call < calls_.size(); ++call) {
      const auto [begin, end] = calls_[call];
      at::Tensor hidden = run.hidden[call];
      if (spec != nullptr) {
        LayerInput from;
        if (!run.inputs.empty()) from = {model_layer_[layer], run.inputs[call][static_cast<size_t>(model_layer_[layer])]};
        hidden = work_.model.Forward(ids_.narrow(1, begin, end - begin), *cache, work_.backend, {}, {}, from);
      }
      const int64_t from = std::max(begin, first_), to = std::min(end, ids_.size(1) - 1);
      if (from >= to) continue;
      const at::Tensor exact = logits_.empty() ? LogitsOf(call, reference_[call]) : logits_[call];
      const at::Tensor logits = LogitsOf(call, hidden);
      AddScores(exact, logits, ids_.narrow(1, from + 1, to - from).to(hidden.device()), scores.data());
      effect.logits_error += Squares(logits - exact);
      effect.logits_squares += Squares(exact);
    }
    CheckScores(work_, spec != nullptr ? *spec : ParseSpec("none"), ids_, scores);
    effect.scores.insert(effect.scores.end(), scores.begin(), scores.end());
  }

 private:
  // Logits of a call's scored positions; undefined where it has none.
  at::Tensor LogitsOf(size_t call, const at::Tensor& hidden) const {
    const auto [begin, end] = calls_[call];
    const int64_t from = std::max(begin, first_), to = std::min(end, ids_.size(1) - 1);
    return from < to ? work_.model.Logits(hidden.narrow(1, from - begin, to - from)) : at::Tensor();
  }

  const Work& work_;
  const std::vector<Window>& windows_;
  at::Tensor ids_;
  std::vector<std::pair<int64_t, int64_t>> calls_;
  std::vector<int64_t> model_layer_;  // of each layer of the cache
  int64_t first_;
  std::vector<at::Tensor> reference_, logits_;
};

// `spec` as far as it encodes a part of a layer, or all but that.
std::string TextOf(const Spec& spec, const CacheShape& shape, const Part& part, int64_t layer) {
  return PartOfSpec(spec, shape, [&](int64_t at, bool values) {
    return (at == layer && (values ? part.values : part.keys)) != part.without;
  });
}

// The unquantized model; on the way, the errors of attention for every layer and part.
Feeding::Run Reference(const Work& work, const Spec& spec, const Feeding& feeding, const std::vector<Part>& parts,
                       Effects& effects) {
  const auto cache_of = [&](const std::string& text) {
    return std::unique_ptr<KvCache>(
        new KvCache(work.model.NewCache(ParseSpec(text), feeding.ids().size(0), feeding.ids().size(1))));
  };
  const std::unique_ptr<KvCache> plain = cache_of("none");
  std::vector<std::unique_ptr<KvCache>> encoded(parts.size());
  for (size_t part = 0; part < parts.size(); ++part) {
    if (parts[part].without) continue;
    const std::string text =
        PartOfSpec(spec, work.model.cache_shape(1), [&](int64_t, bool values) { return values ? parts[part].values : parts[part].keys; });
    if (!text.empty()) encoded[part] = cache_of(text);
  }
  return feeding.Feed(*plain, [&](const LayerView& view) {
    const bool reads_encoded = ReadsEncoded(spec, plain->length(), view.keys.size(2));
    for (size_t part = 0; part < parts.size(); ++part) {
      if (!encoded[part]) continue;
      const auto [keys, values] = encoded[part]->Update(view.cached_layer, view.keys, view.values);
      if (!reads_encoded) continue;
      effects.of[view.cached_layer][part].attention.Add(ErrorSum::Of(view.attended, view.attend(keys, values)));
    }
  });
}

// Runs all parts of all layers on windows side by side.
void AddWindows(const Work& work, const Spec& spec, const std::vector<Window>& windows, const std::vector<Part>& parts,
                bool whole, Effects& effects) {
  const int64_t layers = static_cast<int64_t>(effects.of.size());
  const CacheShape shape = work.model.cache_shape(1);
  Feeding feeding(work, spec, windows);
  Feeding::Run base = Reference(work, spec, feeding, parts, effects);
  feeding.SetReference(base);
  const auto score = [&](bool without) {
    for (int64_t layer = 0; layer < layers; ++layer) {
      for (size_t part = 0; part < parts.size(); ++part) {
        if (parts[part].without != without) continue;
        if (TextOf(spec, shape, {.keys = parts[part].keys, .values = parts[part].values}, layer).empty()) {
          continue;  // nothing is encoded there
        }
        const std::string text = TextOf(spec, shape, parts[part], layer);
        if (text.empty()) continue;  // it alone is
        const Spec of = ParseSpec(text);
        feeding.Score(base, effects.of[static_cast<size_t>(layer)][part], &of, static_cast<size_t>(layer));
      }
    }
  };
  score(false);
  const bool any_without = std::any_of(parts.begin(), parts.end(), [](const Part& part) { return part.without; });
  if (!whole && !any_without) return;
  KvCache cache = work.model.NewCache(spec, feeding.ids().size(0), feeding.ids().size(1));
  base = {};  // not both at once
  base = feeding.Feed(cache);
  if (whole) feeding.Score(base, effects.all);
  score(true);
}

void AddEffect(Counters& counters, const Effect& effect, const std::string& name, const std::string& suffix) {
  const auto of_windows = [&](auto get) { return MeanInterval(PerToken(effect.scores, get)); };
  const auto kld = [](const WindowScore& s) { return s.kld; };
  const auto agreements = [](const WindowScore& s) { return s.agreements; };
  counters.emplace_back("logits_nmse" + name + suffix, effect.logits_nmse());
  AddInterval(counters, "kld_nats" + name, effect.kld(), of_windows(kld), 0, INFINITY, suffix);
  AddInterval(counters, "top1_agreement" + name, Total(effect.scores, agreements), of_windows(agreements), 0, 1, suffix);
}

// Counters of one part: the summary, and each layer's.
void AddPart(const Effects& effects, const std::vector<Part>& parts, size_t part, Counters& summary, Counters& per_layer) {
  const std::string name = "_" + parts[part].name;
  std::vector<double> attention, kld;
  int64_t most_sensitive = -1;
  for (size_t layer = 0; layer < effects.of.size(); ++layer) {
    const Effect& effect = effects.of[layer][part];
    if (effect.scores.empty()) continue;  // the spec encodes nothing here
    const std::string suffix = StrCat("/layer:", layer);
    if (effect.attention.squares > 0) {  // policy hf may read nothing encoded: no error, not that of 0
      per_layer.emplace_back("attention_nmse" + name + suffix, effect.attention.nmse());
      attention.push_back(effect.attention.nmse());
    }
    AddEffect(per_layer, effect, name, suffix);
    if (kld.empty() || effect.kld() > *std::max_element(kld.begin(), kld.end())) {
      most_sensitive = static_cast<int64_t>(layer);
    }
    kld.push_back(effect.kld());
  }
  if (kld.empty()) return;
  for (const auto& [of, values] :
       {std::pair("attention_nmse", attention), std::pair("kld_nats", kld)}) {
    if (values.empty()) continue;
    summary.emplace_back(of + name + "_mean", Mean(values));
    summary.emplace_back(of + name + "_max", *std::max_element(values.begin(), values.end()));
  }
  // By kld; without that layer it is the least.
  if (!parts[part].without) summary.emplace_back("most_sensitive_layer" + name, static_cast<double>(most_sensitive));
}

Counters Sensitivity(Session& session, const Cell& cell, benchmark::State& state) {
  const Spec spec = ParseSpec(cell.spec);
  if (spec.policy != Policy::kHf && EncodedTokens(spec, cell.context) == 0) {
    throw Skip("all tokens fit into the residual; nothing is encoded");
  }
  const Work work = WorkOf(session, cell);
  const std::vector<Window> windows = WindowsOf(work, cell, session.options());
  bool whole = false;
  std::vector<Part> parts;
  for (const std::string& name : session.options().parts) {
    if (name == "all") whole = true; else parts.push_back(PartOf(name));
  }
  Effects effects;
  for (auto _ : state) {
    state.SetIterationTime(Time(session.devices(), [&] {
      effects = {.all = {}, .of = std::vector(work.model.cache_shape(1).layers.size(), std::vector<Effect>(parts.size()))};
      for (const std::vector<Window>& group : SideBySide(windows, cell.batch)) {
        AddWindows(work, spec, group, parts, whole, effects);
      }
    }));
  }
  Counters counters, per_layer;
  for (size_t part = 0; part < parts.size(); ++part) AddPart(effects, parts, part, counters, per_layer);
  if (whole) {
    AddEffect(counters, effects.all, "_all", "");
    double sum = 0;
    bool keys = false, values = false;
    for (size_t part = 0; part < parts.size(); ++part) {
      if (parts[part].without || parts[part].keys == parts[part].values) continue;
      (parts[part].keys ? keys : values) = true;
      for (const std::vector<Effect>& layer : effects.of) sum += layer[part].scores.empty() ? 0 : layer[part].kld();
    }
    if (keys && values && sum > 0) counters.emplace_back("interaction", effects.all.kld() / sum);
  }
  counters.emplace_back("windows", static_cast<double>(windows.size()));
  counters.insert(counters.end(), per_layer.begin(), per_layer.end());
  return counters;
}

const RegisterMeasurement kSensitivity{
    {.name = "sensitivity",
     .what = "of attention and logits to one layer's keys, values, both, and how errors add up (--parts); only if the filter names it",
     .needs_encoding = true, .quality = true, .on_request = true, .turn = 2,
     .like_tokens = [](const Options& o, double tokens) {  // of a model with 32 layers: half of them for each
       return 16.0 * static_cast<double>(o.parts.size() * o.windows) * tokens;
     },
     .run = Sensitivity}};

}  // namespace

std::string PartOfSpec(const Spec& spec, const CacheShape& shape,
                       const std::function<bool(int64_t layer, bool values)>& encodes) {
  const std::string& whole = spec.meaning.empty() ? spec.text : spec.meaning;
  std::string text = "none", of_layers;
  for (size_t at = whole.find('@'); at != std::string::npos;) {
    const size_t next = whole.find('@', at + 1);
    const std::string option = whole.substr(at, next == std::string::npos ? next : next - at);
    if (!option.starts_with("@layers=") && !option.starts_with("@dense=")) text += option;
    at = next;
  }
  for (int64_t layer = 0; layer < shape.count(); ++layer) {
    const SchemePair pair = spec.At(layer, shape.count());
    const auto [of_keys, of_values] = SidesOf(spec, shape, layer);
    const bool keys = of_keys.encodes() && encodes(layer, false), values = of_values.encodes() && encodes(layer, true);
    if (!keys && !values) continue;
    of_layers += StrCat("@layers=", layer, "-", layer, ":", keys ? pair.keys->name : "none", "+",
                        values ? pair.values->name : "none");
  }
  return of_layers.empty() ? "" : text + of_layers;
}

}  // namespace kvq
