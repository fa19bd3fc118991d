// needle: can the model still find one sentence in its quantized history? Five depths; needle_random_rate with numbers drawn
// from --seed; with --needles=both needle_rate, too, with the study's one number (7492): a constant answer can be
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
#include <functional>
#include <nlohmann/json.hpp>
#include <random>

#include "accuracy/statistics.h"
#include "accuracy/stepper.h"
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
constexpr char kStudyNumber[] = "7492";
constexpr int64_t kNewTokens = 32;

// Answers to prompts, one after the other, from a cache of its own. Prompts are fed in calls of `chunk` tokens (the sinks
// come with the first); one that begins as the one before did goes on from the last call's end that both share, with the
// calls, and so the numbers, that it would have had by itself.
class Answers {
 public:
  Answers(Session& session, const Cell& cell, const Spec& spec, std::vector<NeedlePrompt> prompts, int64_t chunk)
      : model_(session.model(cell.model)), tokenizer_(session.tokenizer(cell.model)), backend_(FindBackend(cell.backend)), spec_(spec),
        prompts_(std::move(prompts)), chunk_(chunk),
        stepper_(session, model_, backend_, spec, /*batch=*/1, Longest() + kNewTokens, "answers") {}

  // The greedy continuation of the next prompt: 32 tokens, or up to EOS, which is one of them; what is found stays found,
  // so it ends with `until` unless that is empty.
  std::vector<int32_t> Next(const std::string& until) {
    const at::Tensor ids = IdTensor(prompts_[next_].ids, 1, model_.device());
    at::Tensor state = FeedPrompt(ids);
    std::vector<int32_t> answer;
    for (;;) {
      const at::Tensor logits = stepper_.Logits(state);
      CheckFinite(logits, model_, ids, spec_, backend_);
      const at::Tensor token = logits.argmax(-1).flatten();
      answer.push_back(static_cast<int32_t>(token.item<int64_t>()));
      if (static_cast<int64_t>(answer.size()) == kNewTokens || tokenizer_.eos_id() == answer.back() ||
          (!until.empty() && tokenizer_.Decode(answer).find(until) != std::string::npos)) {
        return answer;
      }
      state = stepper_.Step(token);
    }
  }

 private:
  int64_t Longest() const {
    size_t longest = 0;
    for (const NeedlePrompt& prompt : prompts_) longest = std::max(longest, prompt.ids.size());
    return static_cast<int64_t>(longest);
  }

  // The end of the last call of which prompt i and the next one have all tokens, and more behind it; 0: none.
  int64_t Shared(size_t i) const {
    if (i + 1 >= prompts_.size()) return 0;
    const std::vector<int32_t>&a = prompts_[i].ids, &b = prompts_[i + 1].ids;
    const auto same = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
    const int64_t first = spec_.sink_tokens + chunk_;
    const int64_t most = std::min<int64_t>(same, static_cast<int64_t>(std::min(a.size(), b.size())) - 1);
    return most < first ? 0 : first + (most - first) / chunk_ * chunk_;
  }

  // The state behind the prompt.
  at::Tensor FeedPrompt(const at::Tensor& ids) {
    int64_t at = kept_;
    if (at > 0) {
      restore_();
    } else {
      stepper_.cache().Clear();
    }
    kept_ = Shared(next_++);
    if (kept_ > at) {
      stepper_.Feed(ids.narrow(1, at, kept_ - at), chunk_);
      restore_ = stepper_.cache().Save();
      at = kept_;
    } else if (kept_ < at) {  // the next one begins anew
      kept_ = 0;
    }
    return stepper_.Prompt(ids.narrow(1, at, ids.size(1) - at), chunk_);
  }

  const Model& model_;
  const Tokenizer& tokenizer_;
  const Backend& backend_;
  const Spec& spec_;
  std::vector<NeedlePrompt> prompts_;
  int64_t chunk_;
  Stepper stepper_;
  size_t next_ = 0;
  int64_t kept_ = 0;  // tokens of the next prompt that restore_ brings the cache back to
  std::function<void()> restore_;
};

Counters Needle(Session& session, const Cell& cell, benchmark::State& state) {
  const Spec spec = ParseSpec(cell.spec);
  if (cell.batch != 1) throw Skip("prompts differ in length; needle runs at batch 1");
  const bool study = session.options().protocol == "study";
  const bool both = BothNeedles(session.options());
  const int64_t chunk = study ? cell.context : spec.CallTokens();
  const Tokenizer& tokenizer = session.tokenizer(cell.model);
  const auto encode = [&](const std::string& text, bool special) {
    return tokenizer.Encode(text, special);
  };
  std::mt19937_64 random(static_cast<uint64_t>(session.options().seed));
  int64_t found = 0, found_random = 0;
  Counters per_depth;
  std::vector<std::string> texts;
  std::vector<double> share;
  for (auto _ : state) {
    state.SetIterationTime(Time(session.devices(), [&] {
      std::vector<NeedlePrompt> prompts;
      std::vector<std::string> numbers;
      std::vector<size_t> depths;  // of the prompts
      for (size_t d = 0; d < kDepths.size(); ++d) {
        const std::string drawn = std::to_string(1000 + random() % 9000);
        for (const std::string& number : both ? std::vector<std::string>{kStudyNumber, drawn} : std::vector{drawn}) {
          prompts.push_back(MakeNeedlePrompt(encode, cell.context, kDepths[d], number));
          numbers.push_back(number);
          depths.push_back(d);
        }
      }
      Answers answers(session, cell, spec, prompts, chunk);
      for (size_t i = 0; i < prompts.size(); ++i) {
        const std::string suffix = StrCat("/depth:", static_cast<int>(100 * kDepths[depths[i]] + 0.5));
        const bool constant = both && i % 2 == 0, keep = constant && study;
        const std::vector<int32_t> answer = answers.Next(keep ? "" : numbers[i]);
        const std::string text = tokenizer.Decode(answer);
        if (keep) {
          texts.push_back(text);
          per_depth.emplace_back("prompt_tokens" + suffix, prompts[i].ids.size());
          for (size_t t = 0; t < answer.size(); ++t) {
            per_depth.emplace_back(StrCat("answer", suffix, "/token:", t), answer[t]);
          }
        }
        const bool right = text.find(numbers[i]) != std::string::npos;
        (constant ? found : found_random) += right;
        per_depth.emplace_back((constant ? "needle" : "needle_random") + suffix, right);
        const int64_t last = static_cast<int64_t>(prompts[i].ids.size()) - 1;  // where the answer begins
        share.push_back(EncodedShareRead(spec, session.model(cell.model).cache_shape(1), std::min(spec.sink_tokens + chunk, last + 1),
                                         last, last + static_cast<int64_t>(answer.size())));
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
  if (both) add("needle_rate", found);
  add("needle_random_rate", found_random);
  counters.emplace_back("encoded_share", Mean(share));
  counters.emplace_back("needle_trials", static_cast<double>(trials));
  counters.insert(counters.end(), per_depth.begin(), per_depth.end());
  return counters;
}

const RegisterMeasurement kNeedle{
    {.name = "needle", .what = "share of hidden numbers found, constant and random ones",
     .study = "the prompt in one call; 7492 at five depths, its answers in the JSON; random ones beside",
     .quality = true, .turn = 2,
     // half of five or ten prompts, and the answers
     .like_tokens = [](const Options& o, double tokens) { return (BothNeedles(o) ? 10 : 5) * tokens; },
     .new_tokens = [](const Options&) { return kNewTokens; }, .run = Needle}};

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
