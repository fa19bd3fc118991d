// sensitivity: where quantization hurts. One layer of the cache is encoded and no other, its keys
// alone (k), its values alone (v), or both (kv). For each:
//
// attention_nmse, the error of what attention gives in that layer, for the queries that read
// encoded tokens. All before it is unquantized, so its inputs are bit for bit those of the
// unquantized model: one forward pass computes it for all layers, attending a second time to what a
// cache of the spec would hand out.
//
// logits_nmse, kld_nats, top1_agreement: the error at the model's end, over the tokens that
// perplexity would score, in a run each. Windows are fed as in its protocol `decode`. The reference
// is the unquantized model in the same calls, so that there is no noise floor to subtract: with
// nothing encoded all three are exact.
//
// perplexity gives the same kld under the spec that PartOfSpec writes, but for its reference, which
// is fed in one call. The cost is that of three runs of the windows a layer: choose few --windows.
#include "accuracy/sensitivity.h"

#include <algorithm>
#include <array>

#include "accuracy/error_sum.h"
#include "accuracy/scoring.h"
#include "accuracy/text_windows.h"
#include "fixtures/finite.h"
#include "kernels/error.h"

namespace kvq {
namespace {

struct Part {
  const char* name;
  bool keys, values;
};
constexpr std::array<Part, 3> kParts = {
    {{"k", true, false}, {"v", false, true}, {"kv", true, true}}};

// What encoding one part of one layer does, over all windows.
struct Effect {
  ErrorSum attention;
  std::vector<WindowScore> scores;  // one a window
  double logits_error = 0, logits_squares = 0;

  double logits_nmse() const { return logits_error / logits_squares; }
  double kld() const {
    return Total(scores, [](const WindowScore& s) { return s.kld; });
  }
};
using Effects = std::vector<std::array<Effect, kParts.size()>>;  // of each layer of the cache

// Hidden states of the unquantized model over windows [batch, n, hidden_size], in the calls of the
// spec; on the way, the errors of attention for every layer and part.
at::Tensor Reference(const Work& work, const Spec& spec, const at::Tensor& ids, Effects& effects) {
  const int64_t layers = static_cast<int64_t>(effects.size());
  const std::vector<int64_t> model_layer = work.model.config().CachedLayers();
  const auto cache_of = [&](const std::string& text) {
    return std::unique_ptr<KvCache>(new KvCache(work.model.NewCache(ParseSpec(text), ids.size(0), ids.size(1))));
  };
  const std::unique_ptr<KvCache> plain = cache_of("none");
  std::array<std::unique_ptr<KvCache>, kParts.size()> encoded;
  for (size_t part = 0; part < kParts.size(); ++part) {
    const std::string text =
        PartOfSpec(spec, 0, layers - 1, kParts[part].keys, kParts[part].values, layers);
    if (!text.empty()) encoded[part] = cache_of(text);
  }
  std::vector<at::Tensor> hidden;
  FeedAsDecoding(
      work.model, work.backend, spec, ids, *plain,
      [&](int64_t, const at::Tensor& of_call) { hidden.push_back(of_call); },
      [&](const LayerView& view) {
        const LayerConfig& layer = work.model.config().layers[model_layer[view.cached_layer]];
        const bool reads_encoded = ReadsEncoded(spec, plain->length(), view.keys.size(2));
        for (size_t part = 0; part < kParts.size(); ++part) {
          if (!encoded[part]) continue;
          const auto [keys, values] =
              encoded[part]->Update(view.cached_layer, view.keys, view.values);
          if (!reads_encoded) continue;
          effects[view.cached_layer][part].attention.Add(ErrorSum::Of(
              view.attended, work.backend.attend(view.queries, keys, values,
                                                 {layer.attention_scale, layer.sliding_window})));
        }
      });
  return at::cat(hidden, 1);
}

// Runs all parts of all layers on windows side by side.
void AddWindows(const Work& work, const Spec& spec, const std::vector<Window>& windows,
                Effects& effects) {
  const at::Tensor ids = WindowIds(work, windows);
  const at::Tensor reference = Reference(work, spec, ids, effects);
  for (size_t layer = 0; layer < effects.size(); ++layer) {
    for (size_t part = 0; part < kParts.size(); ++part) {
      const std::string text =
          PartOfSpec(spec, static_cast<int64_t>(layer), static_cast<int64_t>(layer),
                     kParts[part].keys, kParts[part].values, static_cast<int64_t>(effects.size()));
      if (text.empty()) continue;
      Effect& effect = effects[layer][part];
      std::vector<WindowScore> scores(windows.size());
      CompareLogits(
          work, ParseSpec(text), windows, ids, reference,
          [&](const at::Tensor& exact, const at::Tensor& logits, const at::Tensor& targets) {
            AddScores(exact, logits, targets, scores.data());
            // Norms of rows in float32: of a vocabulary's squares they lose less than 1e-5.
            const auto squares = [](const at::Tensor& x) {
              return at::linalg_vector_norm(x, 2, -1).to(at::kDouble).square().sum().item<double>();
            };
            effect.logits_error += squares(logits - exact);
            effect.logits_squares += squares(exact);
          });
      CheckScores(work, ParseSpec(text), ids, scores);
      CheckFinite(at::tensor({effect.attention.squared_error, effect.attention.squares}, at::kDouble), work.model, ids,
                  ParseSpec(text), work.backend);
      effect.scores.insert(effect.scores.end(), scores.begin(), scores.end());
    }
  }
}

// Counters of one part: the summary, and each layer's.
void AddPart(const Effects& effects, size_t part, Counters& summary, Counters& per_layer) {
  const std::string name = std::string("_") + kParts[part].name;
  std::vector<double> attention, kld;
  int64_t most_sensitive = -1;
  for (size_t layer = 0; layer < effects.size(); ++layer) {
    const Effect& effect = effects[layer][part];
    if (effect.scores.empty()) continue;  // the spec encodes nothing here
    const std::string suffix = StrCat("/layer:", layer);
    const auto of_windows = [&](auto get) { return MeanInterval(PerToken(effect.scores, get)); };
    const auto kld_of = [](const WindowScore& s) { return s.kld; };
    const auto agreements = [](const WindowScore& s) { return s.agreements; };
    if (effect.attention.squares > 0) {  // policy hf may read nothing encoded: no error, not that of 0
      per_layer.emplace_back("attention_nmse" + name + suffix, effect.attention.nmse());
      attention.push_back(effect.attention.nmse());
    }
    per_layer.emplace_back("logits_nmse" + name + suffix, effect.logits_nmse());
    AddInterval(per_layer, "kld_nats" + name, effect.kld(), of_windows(kld_of), 0, INFINITY,
                suffix);
    AddInterval(per_layer, "top1_agreement" + name, Total(effect.scores, agreements),
                of_windows(agreements), 0, 1, suffix);
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
  // By kld.
  summary.emplace_back("most_sensitive_layer" + name, static_cast<double>(most_sensitive));
}

Counters Sensitivity(Session& session, const Cell& cell, benchmark::State& state) {
  const Spec spec = ParseSpec(cell.spec);
  if (spec.policy != Policy::kHf && EncodedTokens(spec, cell.context) == 0) {
    throw Skip("all tokens fit into the residual; nothing is encoded");
  }
  const Work work = WorkOf(session, cell);
  const std::vector<Window> windows = WindowsOf(work, cell, session.options());
  Effects effects;
  for (auto _ : state) {
    state.SetIterationTime(Time(session.devices(), [&] {
      effects = Effects(work.model.cache_shape(1).layers.size());
      for (const std::vector<Window>& group : SideBySide(windows, cell.batch)) {
        AddWindows(work, spec, group, effects);
      }
    }));
  }
  Counters counters, per_layer;
  for (size_t part = 0; part < kParts.size(); ++part) AddPart(effects, part, counters, per_layer);
  counters.emplace_back("windows", static_cast<double>(windows.size()));
  counters.insert(counters.end(), per_layer.begin(), per_layer.end());
  return counters;
}

const RegisterMeasurement kSensitivity{
    {.name = "sensitivity",
     .what = "of attention and logits to one layer's keys, values, both; only if the filter names it",
     .needs_encoding = true, .quality = true, .on_request = true, .turn = 2, .run = Sensitivity}};

}  // namespace

std::string PartOfSpec(const Spec& spec, int64_t first, int64_t last, bool keys, bool values, int64_t layers_of_cache) {
  std::string text = "none", layers;
  for (size_t at = spec.text.find('@'); at != std::string::npos;) {
    const size_t next = spec.text.find('@', at + 1);
    const std::string option = spec.text.substr(at, next == std::string::npos ? next : next - at);
    if (!option.starts_with("@layers=") && !option.starts_with("@dense=")) text += option;
    at = next;
  }
  for (int64_t layer = first; layer <= last; ++layer) {
    const SchemePair pair = spec.At(layer, layers_of_cache);
    const bool encodes_keys = keys && pair.keys->keys.encode != nullptr;
    const bool encodes_values = values && pair.values->values.encode != nullptr;
    if (!encodes_keys && !encodes_values) continue;
    layers += StrCat("@layers=", layer, "-", layer, ":", encodes_keys ? pair.keys->name : "none",
                     "+", encodes_values ? pair.values->name : "none");
  }
  return layers.empty() ? "" : text + layers;
}

}  // namespace kvq
