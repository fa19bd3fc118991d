#include "kernels/host/step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/groups.h"

namespace kvq::host {
namespace {

// Rounded as a tensor of the type would hold it, in place.
KVQ_VECTOR void RoundAll(DType dtype, float* x, int64_t n) {
  if (dtype == DType::kFloat16) {
    for (int64_t i = 0; i < n; ++i) x[i] = HalfToFloat(FloatToHalf(x[i]));
  } else if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) x[i] = BFloat16ToFloat(FloatToBFloat16(x[i]));
  }
}

float Rounded(DType dtype, float x) {
  RoundAll(dtype, &x, 1);
  return x;
}

std::vector<float> Row(const void* data, DType dtype, int64_t offset, int64_t n) {
  std::vector<float> row(static_cast<size_t>(n));
  LoadRow(data, dtype, offset, n, row.data());
  return row;
}

double SumOfSquares(const std::vector<float>& x) {
  float sum[16] = {};
  for (size_t i = 0; i < x.size(); ++i) sum[i % 16] += x[i] * x[i];
  double all = 0;
  for (const float part : sum) all += part;
  return all;
}
float InverseRms(const std::vector<float>& x, float eps) {
  return 1 / std::sqrt(static_cast<float>(SumOfSquares(x) / static_cast<double>(x.size())) + eps);
}

// Row r of delta and bias, rounded.
std::vector<float> Delta(const AddNormArgs& a, int64_t r) {
  std::vector<float> delta = Row(a.delta, a.dtype, r * a.size, a.size);
  if (a.bias == nullptr) return delta;
  const std::vector<float> bias = Row(a.bias, a.dtype, 0, a.size);
  for (int64_t i = 0; i < a.size; ++i) delta[i] += bias[i];
  RoundAll(a.dtype, delta.data(), a.size);
  return delta;
}

// Row r of `out`: the norm of x, which it destroys.
void Normalize(const AddNormArgs& a, int64_t r, std::vector<float>& x) {
  if (a.shift != nullptr) {
    double total = 0;
    for (const float v : x) total += v;
    const float mean = static_cast<float>(total / static_cast<double>(a.size));
    for (float& v : x) v -= mean;
  }
  const float inverse = InverseRms(x, a.eps);
  for (int64_t i = 0; i < a.size; ++i) {
    x[i] = x[i] * inverse * a.weight[i];
    if (a.shift != nullptr) x[i] += a.shift[i];
  }
  StoreRow(x.data(), a.size, a.dtype, r * a.size, a.out);
}

KVQ_VECTOR void ActivateAll(Gate activation, float* x, int64_t n) {
  if (activation == Gate::kSilu) {
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] / (1 + Exp(Smaller(-x[i], 88.0f)));
  } else if (activation == Gate::kClamped) {
    for (int64_t i = 0; i < n; ++i) {
      const float gate = x[i] > 7 ? 7 : x[i];  // NaN stays
      x[i] = gate / (1 + Exp(Smaller(-1.702f * gate, 88.0f)));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {  // tanh(u) = 1 - 2 / (1 + e^2u)
      const float u = 0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
      x[i] = 0.5f * x[i] * (2 - 2 / (1 + Exp(Smaller(2 * u, 88.0f))));
    }
  }
}

// Row r of gate, activated, and rounded where a factor follows.
std::vector<float> Activated(const GateArgs& a, const void* gate, int64_t offset, bool rounded) {
  std::vector<float> x = Row(gate, a.dtype, offset, a.size);
  if (a.bias != nullptr) {
    const std::vector<float> bias = Row(a.bias, a.dtype, 0, a.size);
    for (int64_t i = 0; i < a.size; ++i) x[i] += bias[i];
    RoundAll(a.dtype, x.data(), a.size);
  }
  ActivateAll(a.activation, x.data(), a.size);
  if (rounded) RoundAll(a.dtype, x.data(), a.size);
  return x;
}

// Whether one is above the bound, or NaN.
KVQ_VECTOR bool HasAbove(const float* x, int64_t n, float bound) {
  int32_t above = 0;
  for (int64_t i = 0; i < n; ++i) above |= !(x[i] <= bound);
  return above != 0;
}

// Where the newest token of sequence b goes: the view, and its number there.
std::pair<const DenseView*, int64_t> Place(const NewToken& to, int64_t b) {
  const SequenceLength& length = to.lengths[b];
  if (to.dense) return {&to.tail, length.sinks + length.encoded + length.residual - 1};
  if (length.residual > 0) return {&to.tail, length.residual - 1};
  return {&to.sinks, length.sinks - 1};
}

}  // namespace

void AddNorm(const AddNormArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    std::vector<float> x = Row(a.x, a.dtype, r * a.size, a.size);
    if (a.delta != nullptr) {
      const std::vector<float> delta = Delta(a, r);
      for (int64_t i = 0; i < a.size; ++i) x[i] += delta[i];
      RoundAll(a.dtype, x.data(), a.size);
      StoreRow(x.data(), a.size, a.dtype, r * a.size, a.sum);
    }
    Normalize(a, r, x);
  }
}

void AddNormed(const AddNormedArgs& args) {
  const AddNormArgs& a = args.next;
  for (int64_t r = 0; r < a.rows; ++r) {
    std::vector<float> x = Row(a.x, a.dtype, r * a.size, a.size), delta = Delta(a, r);
    const float inverse = InverseRms(delta, a.eps);
    for (int64_t i = 0; i < a.size; ++i) delta[i] = delta[i] * inverse * args.delta_weight[i];
    RoundAll(a.dtype, delta.data(), a.size);
    for (int64_t i = 0; i < a.size; ++i) x[i] += delta[i];
    RoundAll(a.dtype, x.data(), a.size);
    for (int64_t i = 0; i < a.size; ++i) x[i] *= args.scale;
    RoundAll(a.dtype, x.data(), a.size);
    StoreRow(x.data(), a.size, a.dtype, r * a.size, a.sum);
    if (a.weight != nullptr) Normalize(a, r, x);
  }
}

void AppendHeads(const AppendArgs& a, const void* qkv) {
  const HeadsArgs& of = a.of;
  const int64_t all = of.heads + 2 * of.kv_heads, dim = of.head_dim, half = of.pairs();
  for (int64_t r = 0; r < of.rows; ++r) {
    for (int64_t head = 0; head < all; ++head) {
      std::vector<float> x = Row(qkv, of.dtype, (r * all + head) * dim, dim);
      if (of.bias != nullptr) {
        const std::vector<float> bias = Row(of.bias, of.dtype, head * dim, dim);
        for (int64_t i = 0; i < dim; ++i) x[i] += bias[i];
        RoundAll(of.dtype, x.data(), dim);
      }
      const bool query = head < of.heads, value = head >= of.heads + of.kv_heads;
      if (const float* norm = query ? of.q_norm : value ? of.v_norm : of.k_norm; norm != nullptr) {
        const float inverse = InverseRms(x, of.eps);
        for (int64_t i = 0; i < dim; ++i) x[i] = x[i] * inverse * norm[i];
        RoundAll(of.dtype, x.data(), dim);
      }
      if (!value) {
        const float *cos = of.cos + r % of.positions * half, *sin = of.sin + r % of.positions * half;
        for (int64_t i = 0; i < half; ++i) {
          const float low = x[i], high = x[half + i];
          x[i] = low * cos[i] - high * sin[i], x[half + i] = high * cos[i] + low * sin[i];
        }
      }
      if (query) {
        StoreRow(x.data(), dim, of.dtype, (r * of.heads + head) * dim, a.queries);
        continue;
      }
      RoundAll(of.dtype, x.data(), dim);  // first to the model's type, then to the cache's
      const int64_t h = (head - of.heads) % of.kv_heads;
      const auto [view, token] = Place(value ? a.values : a.keys, r);
      StoreRow(x.data(), dim, view->dtype, Offset(*view, r, h, token, 0), view->data);
    }
  }
}

void GateUp(const GateArgs& a, const void* up) {
  for (int64_t r = 0; r < a.rows; ++r) {
    std::vector<float> x = Activated(a, up, 2 * r * a.size, /*rounded=*/true);
    std::vector<float> other = Row(up, a.dtype, (2 * r + 1) * a.size, a.size);
    if (a.bias != nullptr) {
      const std::vector<float> bias = Row(a.bias, a.dtype, a.size, a.size);
      for (int64_t i = 0; i < a.size; ++i) other[i] += bias[i];
      RoundAll(a.dtype, other.data(), a.size);
    }
    if (a.activation == Gate::kClamped) {
      for (float& up : other) up = (up > 7 ? 7 : up < -7 ? -7 : up) + 1;
      RoundAll(a.dtype, other.data(), a.size);
    }
    for (int64_t i = 0; i < a.size; ++i) x[i] *= other[i];
    StoreRow(x.data(), a.size, a.dtype, r * a.size, a.out);
  }
}

void Activate(const GateArgs& a, const void* gate) {
  for (int64_t r = 0; r < a.rows; ++r) {
    std::vector<float> x = Activated(a, gate, r * a.size, a.factor != nullptr);
    if (a.factor != nullptr) {
      const std::vector<float> factor = Row(a.factor, a.dtype, r * a.size, a.size);
      for (int64_t i = 0; i < a.size; ++i) x[i] *= factor[i];
    }
    StoreRow(x.data(), a.size, a.dtype, r * a.size, a.out);
  }
}

void LayerInputs(const LayerInputsArgs& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t layer = 0; layer < a.layers; ++layer) {
      std::vector<float> x = Row(a.projected, a.dtype, (b * a.layers + layer) * a.size, a.size);
      for (float& v : x) v /= a.divisor;
      RoundAll(a.dtype, x.data(), a.size);
      const float inverse = InverseRms(x, a.eps);
      std::vector<float> token = Row(a.embedding, a.dtype, (a.tokens[b] * a.layers + layer) * a.size, a.size);
      for (int64_t i = 0; i < a.size; ++i) x[i] = x[i] * inverse * a.weight[i], token[i] *= a.scale;
      RoundAll(a.dtype, x.data(), a.size), RoundAll(a.dtype, token.data(), a.size);
      for (int64_t i = 0; i < a.size; ++i) x[i] = Rounded(a.dtype, x[i] + token[i]) * 0.70710678f;  // 1 / sqrt(2)
      StoreRow(x.data(), a.size, a.dtype, (layer * a.batch + b) * a.size, a.out);
    }
  }
}

void StartSteps(const StepState& s, int64_t batch, const int64_t* first, SequenceLength dense, SequenceLength append) {
  for (int64_t b = 0; b < batch; ++b) s.tokens[b] = first[b], s.dense[b] = dense, s.append[b] = append;
  *s.step = 0;
}

void BeginStep(const BeginArgs& a) {
  const int32_t position = a.state.dense[0].encoded;  // the same in all sequences
  for (int64_t b = 0; b < a.batch; ++b) {
    a.state.dense[b].encoded = position + 1;
    SequenceLength& append = a.state.append[b];
    if (position < a.sink_tokens) {
      append.sinks = position + 1;
    } else {
      const bool full = append.residual == a.residual_length;
      if (full) append.encoded += append.residual;
      append.residual = full ? 1 : append.residual + 1;
    }
    if (a.state.read != nullptr) a.state.read[b] = {append.sinks, append.encoded + append.residual, 0};
    std::vector<float> x = Row(a.embedding, a.dtype, a.state.tokens[b] * a.hidden, a.hidden);
    for (float& v : x) v *= a.scale;
    if (a.positions != nullptr) {
      RoundAll(a.dtype, x.data(), a.hidden);
      const std::vector<float> learned = Row(a.positions, a.dtype, position * a.hidden, a.hidden);
      for (int64_t i = 0; i < a.hidden; ++i) x[i] += learned[i];
    }
    StoreRow(x.data(), a.hidden, a.dtype, b * a.hidden, a.x);
  }
  ++*a.state.step;
  for (const BeginArgs::Rope& rope : a.ropes) {
    for (int64_t i = 0; i < rope.pairs; ++i) {
      const float angle = static_cast<float>(position) * rope.frequency[i];
      rope.cos[i] = std::cos(angle) * rope.factor, rope.sin[i] = std::sin(angle) * rope.factor;
    }
  }
}

void CountSides(const CountArgs& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    for (const CountArgs::Side* side : {&a.keys, &a.values}) {
      side->to[b] = side->count.To(a.dense[b].encoded), side->read[b] = side->count.Read(a.dense[b].encoded);
    }
  }
}

void PickTokens(const PickArgs& a) {
  constexpr int64_t kSome = 1024;  // logits at a time, in a first cache
  for (int64_t b = 0; b < a.batch; ++b) {
    // The largest, of several the first; NaN above all.
    int64_t best = 0;
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t first = 0; first < a.vocabulary; first += kSome) {
      const int64_t n = std::min(kSome, a.vocabulary - first);
      float logits[kSome];
      LoadRow(a.logits, a.dtype, b * a.vocabulary + first, n, logits);
      if (a.cap > 0) {
        for (int64_t i = 0; i < n; ++i) logits[i] = std::tanh(logits[i] / a.cap) * a.cap;
        std::copy(logits, logits + n, a.capped + b * a.vocabulary + first);
      }
      if (std::isnan(largest) || !HasAbove(logits, n, largest)) continue;
      for (int64_t i = 0; i < n && !std::isnan(largest); ++i) {
        if (!(logits[i] <= largest)) best = first + i, largest = logits[i];
      }
    }
    a.state.tokens[b] = best;
    a.state.history[(*a.state.step - 1) * a.batch + b] = best;
  }
}

}  // namespace kvq::host
