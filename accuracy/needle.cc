// needle: can the model still find one sentence in its quantized history? Five depths; needle_rate with
// the study's one number (7492), needle_random_rate with numbers drawn from --seed: a constant answer can be
// guessed, and is the same trial again and again. The prompt is fed in calls of Spec::CallTokens,
// so that also the first answered token reads encoded history; greedy, 32 new tokens, success if the
// number is in them. Intervals are Wilson's, 95 %.
//
// Protocol `study` is the reference study's: the whole prompt in one call, so that with @policy=hf the
// first answered token comes from unquantized attention. Its trials are the constant ones; the answers'
// tokens are in the JSON, their texts in the label. The random ones stand beside them.
#include "accuracy/needle.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <random>

#include "accuracy/statistics.h"
#include "benchmarks/measurement.h"
#include "fixtures/finite.h"
#include "kernels/error.h"

namespace kvq {
namespace {

constexpr std::array<const char*, 5> kNoise = {"The grass is green.", "The sky is blue.",
                                               "The sun is yellow.", "Here we go.",
                                               "There and back again."};
constexpr char kQuestion[] = "The special magic number for this experiment is";
constexpr std::array<double, 5> kDepths = {0.1, 0.25, 0.5, 0.75, 0.9};
constexpr int64_t kNewTokens = 32;

// Greedy continuation of a prompt that is fed in calls of `chunk` tokens (the sinks come with the first):
// 32 tokens, or up to EOS, which is one of them; what is found stays found, so it ends with `until`
// unless that is empty.
std::vector<int32_t> Answer(Session& session, const Cell& cell, const Spec& spec,
                            const NeedlePrompt& prompt, int64_t chunk, const std::string& until) {
  const Model& model = session.model(cell.model);
  const Tokenizer& tokenizer = session.tokenizer(cell.model);
  const Backend& backend = FindBackend(cell.backend);
  KvCache cache = model.NewCache(spec, 1, static_cast<int64_t>(prompt.ids.size()) + kNewTokens);
  const at::Tensor ids = IdTensor(prompt.ids, 1, model.device());
  at::Tensor hidden = Feed(model, ids, cache, backend, chunk, spec.sink_tokens + chunk);
  std::vector<int32_t> answer;
  for (;;) {
    const at::Tensor logits = model.Logits(hidden.narrow(1, hidden.size(1) - 1, 1));
    CheckFinite(logits, model, ids, spec, backend);
    const at::Tensor token = logits.argmax(-1);
    answer.push_back(static_cast<int32_t>(token.item<int64_t>()));
    if (static_cast<int64_t>(answer.size()) == kNewTokens || tokenizer.eos_id() == answer.back() ||
        (!until.empty() && tokenizer.Decode(answer).find(until) != std::string::npos)) {
      return answer;
    }
    hidden = model.Forward(token, cache, backend);
  }
}

Counters Needle(Session& session, const Cell& cell, benchmark::State& state) {
  const Spec spec = ParseSpec(cell.spec);
  if (cell.batch != 1) throw Skip("prompts differ in length; needle runs at batch 1");
  const bool study = session.options().protocol == "study";
  const int64_t chunk = study ? cell.context : spec.CallTokens();
  const Tokenizer& tokenizer = session.tokenizer(cell.model);
  const auto encode = [&](const std::string& text, bool special) {
    return tokenizer.Encode(text, special);
  };
  std::mt19937_64 random(static_cast<uint64_t>(session.options().seed));
  int64_t found = 0, found_random = 0;
  Counters per_depth;
  std::vector<std::string> texts;
  for (auto _ : state) {
    state.SetIterationTime(Time(session.devices(), [&] {
      for (const double depth : kDepths) {
        const std::string suffix = StrCat("/depth:", static_cast<int>(100 * depth + 0.5));
        const auto trial = [&](const std::string& number, bool keep) {
          const NeedlePrompt prompt = MakeNeedlePrompt(encode, cell.context, depth, number);
          const std::vector<int32_t> answer =
              Answer(session, cell, spec, prompt, chunk, keep ? "" : number);
          const std::string text = tokenizer.Decode(answer);
          if (keep) {
            texts.push_back(text);
            per_depth.emplace_back("prompt_tokens" + suffix, prompt.ids.size());
            for (size_t i = 0; i < answer.size(); ++i) {
              per_depth.emplace_back(StrCat("answer", suffix, "/token:", i), answer[i]);
            }
          }
          return text.find(number) != std::string::npos;
        };
        const bool constant = trial("7492", study);
        const bool any = trial(std::to_string(1000 + random() % 9000), false);
        found += constant;
        found_random += any;
        per_depth.emplace_back("needle" + suffix, constant);
        per_depth.emplace_back("needle_random" + suffix, any);
      }
    }));
  }
  if (study) session.note = "answers: " + nlohmann::json(texts).dump();
  const int64_t trials = static_cast<int64_t>(kDepths.size());
  Counters counters;
  const auto add = [&](const std::string& name, int64_t successes) {
    const Interval interval = WilsonInterval(successes, trials);
    counters.emplace_back(name, static_cast<double>(successes) / static_cast<double>(trials));
    counters.emplace_back(name + "_lo", interval.low);
    counters.emplace_back(name + "_hi", interval.high);
  };
  add("needle_rate", found);
  add("needle_random_rate", found_random);
  counters.emplace_back("needle_trials", static_cast<double>(trials));
  counters.insert(counters.end(), per_depth.begin(), per_depth.end());
  return counters;
}

const RegisterMeasurement kNeedle{
    {.name = "needle", .what = "share of hidden numbers found, constant and random ones",
     .study = "the prompt in one call; 7492 at five depths, its answers in the JSON; random ones beside",
     .quality = true, .new_tokens = [](const Options&) { return kNewTokens; }, .run = Needle}};

}  // namespace

NeedlePrompt MakeNeedlePrompt(const EncodeText& encode, int64_t context, double depth,
                              const std::string& number) {
  const std::string needle = "The special magic number for this experiment is " + number +
                             ". Remember this number: " + number + ".";
  const auto tokens = [&](const std::string& text) {
    return static_cast<int64_t>(encode(text, false).size());
  };
  const int64_t budget = context - tokens(StrCat("\n\n", kQuestion)) - 10;
  int64_t noise_tokens = 0;
  for (const char* sentence : kNoise) noise_tokens += tokens(sentence);
  const double mean = static_cast<double>(noise_tokens) / static_cast<double>(kNoise.size());
  const int64_t count =
      std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(budget - tokens(needle)) / mean));
  const int64_t at =
      std::clamp<int64_t>(static_cast<int64_t>(depth * static_cast<double>(count)), 0, count - 1);
  NeedlePrompt prompt;
  for (int64_t i = 0; i < count; ++i) {
    if (i == at) prompt.text += needle + " ";
    prompt.text += std::string(kNoise[i % kNoise.size()]) + (i + 1 < count ? " " : "");
  }
  prompt.text += StrCat("\n\n", kQuestion);
  prompt.ids = encode(prompt.text, true);
  if (static_cast<int64_t>(prompt.ids.size()) > context) {
    prompt.ids.resize(static_cast<size_t>(context));
  }
  return prompt;
}

}  // namespace kvq
