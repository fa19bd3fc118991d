// distribution: how keys and values are distributed, layer by layer, on the model's own cache at a
// context: what makes them hard to quantize. Keys both as they are stored and before their
// rotation, which mixes pairs of channels and hides what distinguishes them. Definitions are the
// reference study's (accuracy/distribution.h).
//
// Keys and values are measured as they stream into an unquantized cache, in its type, computed in float64. Shares beyond
// sigmas and the histogram need the mean and the deviation first: the text runs through the model a
// second time, which costs a prefill, where holding the cache would cost its memory once more.
//
// Outlier channels: KIVI (arXiv:2402.02750) and KVQuant (arXiv:2401.18079) show a few fixed
// channels of keys to be much larger than all others and put no number to it. Here a channel is one
// if its largest |x| exceeds 6 standard deviations of the layer, the bound of Bondarenko et al.
// (arXiv:2306.12929) for outliers. Where there are many, they raise the deviation themselves and
// hide: channel_max_ratio, the largest channel maximum over the median one, still shows them.
// Values have outlying tokens instead, which would count as channels: they get the ratio alone.
#include "accuracy/distribution.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "accuracy/statistics.h"
#include "benchmarks/measurement.h"
#include "fixtures/finite.h"

namespace kvq {

// ---- Moments

Moments Moments::Along(const at::Tensor& x, int64_t dim) {
  const at::Tensor values = x.to(at::kDouble);
  const at::Tensor mean = values.mean(dim, /*keepdim=*/true);
  const at::Tensor deviation = values - mean, square = deviation.square();
  return {static_cast<double>(x.size(dim)), mean.squeeze(dim), square.sum(dim),
          (square * deviation).sum(dim), square.square().sum(dim)};
}

void Moments::Merge(const Moments& b) {
  if (count == 0) {
    *this = b;
    return;
  }
  const double na = count, nb = b.count, n = na + nb;
  const at::Tensor d = b.mean - mean, d2 = d.square();
  m4 = m4 + b.m4 + d2.square() * (na * nb * (na * na - na * nb + nb * nb) / (n * n * n)) +
       d2 * (b.m2 * na * na + m2 * nb * nb) * (6 / (n * n)) + d * (b.m3 * na - m3 * nb) * (4 / n);
  m3 = m3 + b.m3 + d2 * d * (na * nb * (na - nb) / (n * n)) + d * (b.m2 * na - m2 * nb) * (3 / n);
  m2 = m2 + b.m2 + d2 * (na * nb / n);
  mean = mean + d * (nb / n);
  count = n;
}

Moments Moments::Pooled() const {
  // Every variable has as many values, so the mean of all is that of the means. Powers of
  // x - pooled mean expand around each variable's own; its first moment there is 0.
  Moments all;
  all.count = count * static_cast<double>(mean.numel());
  all.mean = mean.mean();
  const at::Tensor d = mean - all.mean, d2 = d.square();
  all.m2 = (m2 + d2 * count).sum();
  all.m3 = (m3 + d * m2 * 3 + d2 * d * count).sum();
  all.m4 = (m4 + d * m3 * 4 + d2 * m2 * 6 + d2.square() * count).sum();
  return all;
}

// ---- Distribution

void Distribution::Add(const at::Tensor& x) {
  const at::Tensor values = x.to(at::kDouble), sizes = values.abs();
  const at::Tensor largest = sizes.amax({0, 2});
  const bool first = channels_.count == 0;
  min_ = first ? values.min() : at::minimum(min_, values.min());
  max_ = first ? values.max() : at::maximum(max_, values.max());
  channel_max_ = first ? largest : at::maximum(channel_max_, largest);
  channels_.Merge(Moments::Along(values, 2));
  abs_sum_ += sizes.sum().item<double>();
  token_var_sum_ += values.var(3, /*unbiased=*/true).sum().item<double>();
  tokens_ += x.size(0) * x.size(1) * x.size(2);
}

void Distribution::Count(const at::Tensor& x) {
  const at::Tensor values = x.to(at::kDouble), sizes = values.abs();
  const double mean = this->mean(), std = this->std();
  if (!(std > 0)) return;
  beyond_[0] += sizes.gt(3 * std).sum().item<double>();
  beyond_[1] += sizes.gt(6 * std).sum().item<double>();
  counted_ += x.numel();
  const at::Tensor bins = at::histc((values - mean) / std, kBins, -kRange, kRange);
  histogram_ = histogram_.defined() ? histogram_ + bins : bins;
}

double Distribution::std() const {
  const Moments all = pooled();
  return std::sqrt(all.m2.item<double>() / (all.count - 1));
}

double Distribution::kurtosis() const {
  const Moments all = pooled();
  const double variance = all.m2.item<double>() / (all.count - 1);
  return all.m4.item<double>() / all.count / (variance * variance) - 3;
}

double Distribution::max_over_mean() const {
  return channel_max_.max().item<double>() / (abs_sum_ / pooled().count);
}

double Distribution::per_channel_var() const {
  return channels_.m2.mean().item<double>() / (channels_.count - 1);
}

std::vector<double> Distribution::channel_max() const {
  const at::Tensor all = channel_max_.cpu().contiguous();
  return {all.data_ptr<double>(), all.data_ptr<double>() + all.numel()};
}

int64_t Distribution::outlier_channels() const {
  return channel_max_.gt(6 * std()).sum().item<int64_t>();
}

std::vector<double> Distribution::density() const {
  if (!histogram_.defined()) return {};
  const at::Tensor all = (histogram_ / (histogram_.sum() * (2 * kRange / kBins))).cpu();
  return {all.data_ptr<double>(), all.data_ptr<double>() + all.numel()};
}

// ---- the measurement

namespace {

// What is measured of a layer.
struct Side {
  const char* name;
  const at::Tensor& (*of)(const LayerView& view);
};
constexpr std::array<Side, 3> kSides = {{
    {"k", [](const LayerView& view) -> const at::Tensor& { return view.keys; }},
    {"k_pre_rope",
     [](const LayerView& view) -> const at::Tensor& { return view.keys_before_rotation; }},
    {"v", [](const LayerView& view) -> const at::Tensor& { return view.values; }},
}};

using Layer = std::array<Distribution, kSides.size()>;

// Where all values are equal there is no kurtosis and no share: not 0, and nothing for JSON.
void Add(Counters& counters, const std::string& name, double value) {
  if (std::isfinite(value)) counters.emplace_back(name, value);
}

void AddLayer(Counters& counters, const std::string& side, int64_t layer, const Distribution& of) {
  const std::string suffix = "_" + side + "/layer:" + std::to_string(layer);
  std::vector<double> largest = of.channel_max();
  AddList(counters, "channel_max" + suffix, largest);
  AddList(counters, "density" + suffix, of.density());
  std::sort(largest.begin(), largest.end());
  for (const auto& [name, value] :
       Counters{{"mean", of.mean()},
                {"std", of.std()},
                {"min", of.min()},
                {"max", of.max()},
                {"kurtosis", of.kurtosis()},
                {"beyond_3sigma", of.beyond_3sigma()},
                {"beyond_6sigma", of.beyond_6sigma()},
                {"max_over_mean", of.max_over_mean()},
                {"per_channel_var", of.per_channel_var()},
                {"per_token_var", of.per_token_var()},
                {"var_ratio", of.per_channel_var() / of.per_token_var()},
                {"channel_max_ratio", largest.back() / largest[largest.size() / 2]}}) {
    Add(counters, name + suffix, value);
  }
  if (side != "v") {
    Add(counters, "outlier_channels" + suffix, static_cast<double>(of.outlier_channels()));
  }
}

Counters MeasureDistribution(Session& session, const Cell& cell, benchmark::State& state) {
  const Model& model = session.model(cell.model);
  const at::Tensor ids = session.context_ids(cell);
  const Spec none = ParseSpec("none");
  std::vector<Layer> layers;
  for (auto _ : state) {
    state.SetIterationTime(Time(session.devices(), [&] {
      layers = std::vector<Layer>(model.cache_shape(1).layers.size());
      for (const auto pass : {&Distribution::Add, &Distribution::Count}) {
        KvCache cache = model.NewCache(none, cell.batch, cell.context);
        Feed(model, ids, cache, FindBackend(cell.backend), session.prefill_chunk(cell.batch), 0,
             [&](const LayerView& view) {
               Layer& layer = layers[view.cached_layer];
               for (size_t side = 0; side < kSides.size(); ++side) {
                 (layer[side].*pass)(kSides[side].of(view).to(model.kv_dtype()));
               }
             });
      }
    }));
  }
  std::vector<double> ends;
  for (const Layer& layer : layers) {
    for (const Distribution& of : layer) ends.insert(ends.end(), {of.min(), of.max()});
  }
  CheckFinite(at::tensor(ends), model, ids, none, FindBackend(cell.backend));
  Counters summary, per_layer;
  int64_t heavy = 0;
  for (size_t side = 0; side < kSides.size(); ++side) {
    const std::string name = kSides[side].name;
    const bool before_rotation = name == "k_pre_rope";
    if (before_rotation && model.config().ropes.empty()) continue;  // nothing is rotated
    std::vector<double> kurtosis, beyond;
    int64_t outliers = 0;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      const Distribution& of = layers[layer][side];
      AddLayer(per_layer, name, static_cast<int64_t>(layer), of);
      kurtosis.push_back(of.kurtosis());
      beyond.push_back(of.beyond_6sigma());
      outliers += of.outlier_channels();
      heavy += !before_rotation && of.kurtosis() > 3;
    }
    Add(summary, "kurtosis_" + name + "_mean", Mean(kurtosis));
    Add(summary, "kurtosis_" + name + "_max", *std::max_element(kurtosis.begin(), kurtosis.end()));
    Add(summary, "beyond_6sigma_" + name + "_mean", Mean(beyond));
    if (name != "v") Add(summary, "outlier_channels_" + name, static_cast<double>(outliers));
  }
  Add(summary, "heavy_tailed_layers", static_cast<double>(heavy));  // of keys plus of values
  Add(summary, "layers", static_cast<double>(layers.size()));
  summary.insert(summary.end(), per_layer.begin(), per_layer.end());
  return summary;
}

const RegisterMeasurement kDistribution{
    {.name = "distribution",
     .what = "of keys and values, per layer: moments, tails, outlier channels, histogram",
     .quality = true, .unquantized = true,
     .like_tokens = [](const Options&, double tokens) { return 2 * tokens; }, .run = MeasureDistribution}};

}  // namespace
}  // namespace kvq
