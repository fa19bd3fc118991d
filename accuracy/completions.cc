#include "accuracy/completions.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "accuracy/samples.h"
#include "accuracy/scoring.h"
#include "fixtures/finite.h"
#include "fixtures/tokenizer/unicode.h"
#include "kernels/error.h"

namespace kvq {
namespace {

// States of the cache that are kept behind calls of a prompt: each is a copy of the residual. The newest, since prompts
// mostly differ near their ends.
constexpr size_t kMarks = 8;
constexpr int64_t kLogitRows = 256;  // positions whose logits are there at once

bool Likelier(const TokenChance& a, const TokenChance& b) {
  return a.logprob != b.logprob ? a.logprob > b.logprob : a.id < b.id;
}

// The `count` largest logits [vocab], as they are.
std::vector<TokenChance> Largest(const float* logits, int64_t vocab, int64_t count) {
  std::vector<TokenChance> top;
  for (int64_t id = 0; id < vocab && count > 0; ++id) {
    if (static_cast<int64_t>(top.size()) == count && !(logits[id] > top.back().logprob)) continue;
    const TokenChance next{static_cast<int32_t>(id), logits[id]};
    top.insert(std::upper_bound(top.begin(), top.end(), next, Likelier), next);
    if (static_cast<int64_t>(top.size()) > count) top.pop_back();
  }
  return top;
}

const char* OnDecoded(const Spec& spec) { return spec.stores_dense() ? "" : " on decoded tokens"; }

}  // namespace

std::vector<TokenChance> Likeliest(const float* logits, int64_t vocab, int64_t count, const TokenChance& came) {
  std::vector<TokenChance> top = Largest(logits, vocab, count);
  const double log_sum = logits[came.id] - came.logprob;
  for (TokenChance& token : top) {
    token.logprob = token.logprob == logits[came.id] ? came.logprob : token.logprob - log_sum;
  }
  return top;
}

size_t HalfCharacter(std::string_view text) {
  for (size_t n = 1; n <= 3 && n <= text.size(); ++n) {
    const auto byte = static_cast<unsigned char>(text[text.size() - n]);
    if ((byte & 0xC0) == 0x80) continue;  // not its first
    const size_t size = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
    return size > n ? n : 0;
  }
  return 0;
}

int32_t Draw(const float* logits, int64_t vocab, const Sampling& sampling, std::mt19937_64& random) {
  if (sampling.temperature == 0) return static_cast<int32_t>(std::max_element(logits, logits + vocab) - logits);
  const double most = *std::max_element(logits, logits + vocab);
  std::vector<TokenChance> tokens;  // weights e^((logit - most) / temperature): the likeliest has 1
  for (int64_t id = 0; id < vocab; ++id) {
    const double weight = std::exp((logits[id] - most) / sampling.temperature);
    if (weight >= sampling.min_p && weight > 0) tokens.push_back({static_cast<int32_t>(id), weight});
  }
  if (sampling.top_k > 0 || sampling.top_p < 1) std::sort(tokens.begin(), tokens.end(), Likelier);
  if (sampling.top_k > 0 && sampling.top_k < static_cast<int64_t>(tokens.size())) tokens.resize(static_cast<size_t>(sampling.top_k));
  double all = 0;
  for (const TokenChance& token : tokens) all += token.logprob;
  if (sampling.top_p < 1) {
    double sum = 0;
    size_t kept = 0;
    while (kept < tokens.size() && (kept == 0 || sum < sampling.top_p * all)) sum += tokens[kept++].logprob;
    tokens.resize(kept);
    all = sum;
  }
  // 53 random bits as a number in [0, 1): the standard's distributions are not the same everywhere.
  const double drawn = static_cast<double>(random() >> 11) * 0x1p-53 * all;
  double sum = 0;
  for (const TokenChance& token : tokens) {
    sum += token.logprob;
    if (drawn < sum) return token.id;
  }
  return tokens.back().id;
}

bool TextStream::Add(const std::string& bytes) {
  const size_t before = bytes_.size();
  bytes_ += bytes;
  size_t first = std::string::npos;
  for (const std::string& stop : stops_) {
    if (stop.empty()) continue;
    const size_t at = bytes_.find(stop, before < stop.size() ? 0 : before - stop.size() + 1);
    if (at < first) {
      first = at;
      stopped_by_ = stop;
    }
  }
  if (first == std::string::npos) return false;
  bytes_.resize(first);
  return true;
}

std::string TextStream::Take(bool end) {
  std::string_view next = std::string_view(bytes_).substr(std::min(taken_, bytes_.size()));
  if (!end) {
    size_t held = 0;
    for (const std::string& stop : stops_) {
      for (size_t n = std::min(stop.size(), next.size() + 1) - (stop.empty() ? 0 : 1); n > held; --n) {
        if (next.ends_with(std::string_view(stop).substr(0, n))) held = n;
      }
    }
    next.remove_suffix(held);
    next.remove_suffix(HalfCharacter(next));
  }
  taken_ += next.size();
  return ReplaceInvalidUtf8(next);
}

CompletionEngine::CompletionEngine(Session& session, const Model& model, const Tokenizer& tokenizer, const Backend& backend,
                                   const Spec& spec, int64_t context, std::vector<int32_t> end_ids, bool reuse)
    : model_(model), tokenizer_(tokenizer), backend_(backend), spec_(spec), context_(context), end_ids_(std::move(end_ids)),
      reuse_(reuse && spec.policy != Policy::kHf), stepper_(session, model, backend, spec, 1, context) {
  if (backend.graph) {
    ran_ = session.ran;
  } else {
    ran_ = backend.name + OnDecoded(spec);
  }
  if (spec.policy != Policy::kHf) marks_.push_back({0, stepper_.cache().Save()});
}

at::Tensor CompletionEngine::Ids(const int32_t* ids, int64_t n) const {
  return IdTensor({ids, ids + n}, 1, model_.device());
}

int64_t CompletionEngine::Reusable(const CompletionQuery& query) const {
  if (!reuse_) return 0;
  const auto both = std::mismatch(kept_.begin(), kept_.end(), query.prompt.begin(), query.prompt.end());
  // The last position must be read anew for its logits, and the score of the last that is kept needs the token behind it.
  int64_t most = std::max<int64_t>(both.first - kept_.begin() - 1, 0);
  if (query.score_prompt) {
    int64_t scored = 0;
    while (scored < most && positions_[scored].scored && static_cast<int64_t>(positions_[scored].top.size()) >= query.top) ++scored;
    most = scored;
  }
  int64_t reusable = 0;
  for (const Mark& mark : marks_) {
    if (mark.length <= most) reusable = std::max(reusable, mark.length);
  }
  return reusable;
}

// The chance of the token that came is that of perplexity (ScoreTokens) to the bit; the others are from the same sum.
void CompletionEngine::Score(const at::Tensor& logits, const int32_t* targets, const CompletionQuery& query,
                             std::vector<Position>& to) const {
  const int64_t n = logits.size(0), vocab = logits.size(1);
  const at::Tensor rows = logits.unsqueeze(0);
  const at::Tensor scores = ScoreTokens(rows, rows, Ids(targets, n).cpu());
  for (int64_t i = 0; i < n; ++i) {
    const float* row = logits.data_ptr<float>() + i * vocab;
    const double logprob = -scores.data_ptr<double>()[i * 4 + 1];
    to.push_back({.logprob = logprob, .top = Likeliest(row, vocab, query.top, {targets[i], logprob}), .scored = true});
  }
}

CompletionEngine::Running::Running(const CompletionQuery& query)
    : query(query), random(query.sampling.seed ? *query.sampling.seed : std::random_device()()), text(query.stops) {}

void CompletionEngine::Begin(const CompletionQuery& query) {
  if (query.prompt.empty()) throw std::logic_error("a prompt without tokens");
  Running& now = running_.emplace(query);
  now.read = now.answer.reused = Reusable(query);
  if (spec_.policy == Policy::kHf) {
    stepper_.cache().Clear();
  } else {
    while (marks_.back().length > now.read) marks_.pop_back();
    marks_.back().restore();
  }
  kept_.resize(static_cast<size_t>(now.read));
  positions_.resize(static_cast<size_t>(now.read));
}

void CompletionEngine::Read(Running& now) {
  const CompletionQuery& query = now.query;
  KvCache& cache = stepper_.cache();
  const int64_t length = now.length(), begin = now.read;
  const int64_t whole = begin == 0 ? spec_.sink_tokens + spec_.CallTokens() : begin + spec_.CallTokens();
  const int64_t end = std::min(whole, length);
  const at::Tensor hidden = model_.Forward(Ids(query.prompt.data() + begin, end - begin), cache, backend_);
  at::Tensor logits;
  for (int64_t at = begin; at < end && query.score_prompt; at += kLogitRows) {
    const int64_t n = std::min(kLogitRows, end - at);
    logits = model_.Logits(hidden.narrow(1, at - begin, n)).squeeze(0).cpu().contiguous();
    // The last position's token is still to come.
    std::vector<int32_t> targets(query.prompt.begin() + at + 1, query.prompt.begin() + std::min(at + n + 1, length));
    targets.resize(static_cast<size_t>(n), 0);
    Score(logits, targets.data(), query, positions_);
  }
  if (!query.score_prompt) positions_.resize(static_cast<size_t>(end));
  if (end == length) {
    if (!query.score_prompt) logits = model_.Logits(hidden.narrow(1, end - begin - 1, 1)).squeeze(0).cpu().contiguous();
    now.logits = logits[logits.size(0) - 1];
    CheckFinite(now.logits, model_, Ids(query.prompt.data(), length), spec_, backend_);
    positions_.back() = {};
  }
  kept_.insert(kept_.end(), query.prompt.begin() + begin, query.prompt.begin() + end);
  now.read = end;
  if (reuse_ && end == whole) {
    marks_.push_back({end, cache.Save()});
    if (marks_.size() > kMarks + 1) marks_.erase(marks_.begin() + 1);
  }
}

void CompletionEngine::TakePromptScores(Running& now) const {
  for (int64_t i = 0; i + 1 < now.length(); ++i) {
    const Position& position = positions_[static_cast<size_t>(i)];
    if (!std::isfinite(position.logprob)) {
      CheckFinite(at::full({}, NAN), model_, Ids(now.query.prompt.data(), now.length()), spec_, backend_);
    }
    ScoredToken token{{now.query.prompt[static_cast<size_t>(i) + 1], position.logprob}, position.top};
    if (static_cast<int64_t>(token.top.size()) > now.query.top) token.top.resize(static_cast<size_t>(now.query.top));
    now.answer.prompt.push_back(std::move(token));
  }
}

bool CompletionEngine::Next(Running& now, const OnPart& part) const {
  const CompletionQuery& query = now.query;
  Completion& answer = now.answer;
  CompletionPart& next = answer.rest;
  const int32_t id = Draw(now.logits.data_ptr<float>(), now.logits.size(0), query.sampling, now.random);
  std::vector<Position> position(1);
  if (query.logprobs) {
    position.clear();
    Score(now.logits.unsqueeze(0), &id, query, position);
  }
  answer.tokens.push_back({{id, position[0].logprob}, std::move(position[0].top)});
  next.tokens.push_back(answer.tokens.back());
  const auto among = [&](const std::vector<int32_t>& ids) { return std::find(ids.begin(), ids.end(), id) != ids.end(); };
  if (!query.ignore_eos && among(end_ids_)) {
    answer.stopped = true;
  } else if (among(query.stop_ids)) {
    answer.stop_id = id;
  } else if (tokenizer_.IsSpecial(id)) {  // is not printed, but a stop string may be its name
    for (const std::string& stop : query.stops) {
      if (stop == tokenizer_.Piece(id)) answer.stop_text = stop;
    }
  } else if (now.text.Add(tokenizer_.Bytes(id))) {
    answer.stop_text = now.text.stopped_by();
  }
  answer.stopped = answer.stopped || answer.stop_id || answer.stop_text;
  if (answer.stopped) return true;
  next.text += now.text.Take(false);
  const bool last = static_cast<int64_t>(answer.tokens.size()) == query.max_tokens;
  if (!part || next.text.empty() || last) return last;
  answer.text += next.text;
  part(answer, next);
  next = {};
  return false;
}

void CompletionEngine::NoteWays(Running& now) const {
  if (backend_.ran == nullptr) return;
  const std::string ran = backend_.ran();
  for (size_t begin = 0; begin < ran.size();) {
    const size_t end = std::min(ran.find(", ", begin), ran.size());
    const std::string way = ran.substr(begin, end - begin);
    if (std::find(now.ways.begin(), now.ways.end(), way) == now.ways.end()) now.ways.push_back(way);
    begin = end + 2;
  }
}

bool CompletionEngine::Step(const OnPart& part) {
  Running& now = running_.value();
  Completion& answer = now.answer;
  if (backend_.ran != nullptr) backend_.ran();  // of one that failed
  Stopwatch watch(model_.devices());
  double reading = 0;
  bool whole = false;
  if (now.read < now.length()) {
    Read(now);
    reading = watch.Seconds();
    answer.prompt_seconds += reading;
    if (now.read == now.length()) {
      if (now.query.score_prompt) TakePromptScores(now);
      whole = now.query.max_tokens == 0 || Next(now, part);
      answer.seconds += watch.Seconds() - reading;
    }
  } else {
    const at::Tensor last = at::full({1}, int64_t{answer.tokens.back().chosen.id}, at::TensorOptions(at::kLong).device(model_.device()));
    now.logits = stepper_.Logits(stepper_.Step(last)).view({-1}).cpu().contiguous();
    CheckFinite(now.logits, model_, Ids(now.query.prompt.data(), now.length()), spec_, backend_);
    whole = Next(now, part);
    answer.seconds += watch.Seconds();
  }
  NoteWays(now);
  return whole;
}

Completion CompletionEngine::End() {
  Running& now = running_.value();
  Completion answer = std::move(now.answer);
  answer.rest.text += now.text.Take(true);
  answer.text += answer.rest.text;

  answer.ran = ran_;
  if (!now.ways.empty()) {
    answer.ran.clear();
    for (const std::string& way : now.ways) answer.ran += (answer.ran.empty() ? "" : ", ") + way;
    answer.ran += OnDecoded(spec_);
  }
  answer.stored = stepper_.cache().length();
  const CacheShape shape = model_.cache_shape(1);
  const int64_t first_call = std::min(spec_.sink_tokens + spec_.CallTokens(), now.length());
  answer.encoded_share = EncodedShareRead(spec_, shape, first_call, answer.stored - 1, answer.stored);
  if (spec_.policy == Policy::kHf) {  // what is there depends on the calls
    answer.kv_bytes = stepper_.cache().AllocatedBytes();
  } else {
    answer.kv_bytes = KvBytes(spec_, shape, answer.stored, model_.kv_dtype());
    answer.encoded = EncodedTokens(spec_, answer.stored);
  }
  running_.reset();
  return answer;
}

Completion CompletionEngine::Complete(const CompletionQuery& query, const std::function<bool()>& wanted, const OnPart& part) {
  Begin(query);
  do {
    if (wanted && !wanted()) throw Cancelled();
  } while (!Step(part));
  return End();
}

}  // namespace kvq
