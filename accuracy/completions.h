// What kvqserve computes: the log-probabilities of a prompt's tokens and of those that follow it, through one cache.
//
// A prompt is read as decoding would read it: in calls of Spec::CallTokens, the sinks with the first, as `perplexity` does.
// So a prompt's scores say what the stored cache costs, and their sum is kvqbench's nll of the same ids.
//
// The cache is kept. Of the next prompt what both begin with is not read again, up to the end of a call: the calls behind
// it are the same as on an empty cache, and so is every bit of what they give. (Not under policy hf, which encodes again
// what is stored; a kept state would be a second cache.)
#pragma once

#include <functional>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "accuracy/stepper.h"

namespace kvq {

// One of the vocabulary's tokens, in nats.
struct TokenChance {
  int32_t id = 0;
  double logprob = 0;
};

// A token that came, and the likeliest that could have, which come first; of equals that with the lowest id.
struct ScoredToken {
  TokenChance chosen;
  std::vector<TokenChance> top;
};

struct Sampling {
  double temperature = 1;  // 0: the likeliest token, of equals that with the lowest id
  double top_p = 1, min_p = 0;
  int64_t top_k = 0;  // 0: all
  std::optional<uint64_t> seed;
};

// The `count` largest logits [vocab], given what the token that came has of them: equals of it have that too, to the bit.
std::vector<TokenChance> Likeliest(const float* logits, int64_t vocab, int64_t count, const TokenChance& came);

// Draws from logits [vocab]: divided by the temperature, then those are left out whose probability is below min_p times the
// largest, then all but the top_k likeliest, then those behind the first that reach top_p of what is left together.
int32_t Draw(const float* logits, int64_t vocab, const Sampling& sampling, std::mt19937_64& random);

// Bytes at the end that begin a character and do not end it.
size_t HalfCharacter(std::string_view text);

// Text that becomes certain as tokens come: not the bytes of half a character, and nothing that may be the beginning of a
// stop string. What can never be UTF-8 becomes U+FFFD.
class TextStream {
 public:
  explicit TextStream(std::vector<std::string> stops) : stops_(std::move(stops)) {}
  // True where a stop string is complete; the text then ends before the first of them, and stopped_by says which.
  bool Add(const std::string& bytes);
  // What has become certain since the last call; at the end all.
  std::string Take(bool end);
  const std::string& stopped_by() const { return stopped_by_; }

 private:
  std::vector<std::string> stops_;
  std::string bytes_, stopped_by_;
  size_t taken_ = 0;
};

struct CompletionQuery {
  std::vector<int32_t> prompt;  // one token or more
  bool score_prompt = false;
  int64_t top = 0;         // likeliest tokens that are wanted with each score
  bool logprobs = false;   // of what is generated
  int64_t max_tokens = 0;
  Sampling sampling;
  std::vector<std::string> stops;
  std::vector<int32_t> stop_ids;  // beside the model's own end
  bool ignore_eos = false;
};

// What is new of an answer.
struct CompletionPart {
  std::string text;
  std::vector<ScoredToken> tokens;  // generated, with those whose text is still held back
};

struct Completion {
  CompletionPart rest;              // what no part had
  std::vector<ScoredToken> prompt;  // of all its tokens but the first, where asked for
  std::string text;
  std::vector<ScoredToken> tokens;  // generated, the one that ended it included
  bool stopped = false;             // else the length ended it
  std::optional<std::string> stop_text;  // what stopped it: a stop string, a stop id, or the model's own end
  std::optional<int32_t> stop_id;
  int64_t reused = 0;               // of the prompt's tokens
  int64_t stored = 0;               // tokens in the cache at the end
  std::optional<int64_t> encoded;   // of them; not known under policy hf
  int64_t kv_bytes = 0;
  double encoded_share = 0;         // of what the last position read
  double prompt_seconds = 0, seconds = 0;  // reading the prompt, and all that followed
  std::string ran;                  // the kernels, in words
};

// Thrown where the client is gone.
class Cancelled : public std::runtime_error {
 public:
  Cancelled() : std::runtime_error("the client is gone") {}
};

class CompletionEngine {
 public:
  // Room for `context` tokens. `end_ids`: those with which the model ends a text. What it refers to outlives it.
  CompletionEngine(Session& session, const Model& model, const Tokenizer& tokenizer, const Backend& backend, const Spec& spec,
                   int64_t context, std::vector<int32_t> end_ids, bool reuse);

  using OnPart = std::function<void(const Completion& so_far, const CompletionPart&)>;
  // `part` is handed what has become certain before the end; `wanted` is asked between calls of the model. Throws Cancelled where it says no,
  // and std::runtime_error where logits are not finite.
  Completion Complete(const CompletionQuery& query, const std::function<bool()>& wanted = {}, const OnPart& part = {});

  // The same in steps, between which other engines may have theirs: Begin, then Step, one call of the model each, until it
  // says that the answer is whole, then End. What is begun takes the place of what was, ended or not. The query outlives
  // its answer, whose seconds are those of its own steps.
  void Begin(const CompletionQuery& query);
  bool Step(const OnPart& part = {});
  Completion End();

  // Of a prompt's tokens, those that would not be read again.
  int64_t Reusable(const CompletionQuery& query) const;
  // Bytes that the cache has, whatever is in it, with those in which it hands tokens to attention.
  int64_t CacheBytes() const { return stepper_.cache().AllocatedBytes() + stepper_.cache().ScratchBytes(); }

  // The kernels, in words; where the backend chooses with each call, its name, and Completion::ran says more.
  const std::string& ran() const { return ran_; }

 private:
  // What follows a position: the scores of all tokens that are wanted, given its logits [vocab].
  struct Position {
    double logprob = 0;  // of the token that came
    std::vector<TokenChance> top;
    bool scored = false;
  };
  struct Mark {
    int64_t length;
    std::function<void()> restore;
  };

  // An answer that is being made.
  struct Running {
    explicit Running(const CompletionQuery& query);
    int64_t length() const { return static_cast<int64_t>(query.prompt.size()); }

    const CompletionQuery& query;
    Completion answer;
    int64_t read = 0;    // tokens of the prompt
    at::Tensor logits;   // behind the last token, once the prompt is read: [vocab], float32, on the CPU
    std::mt19937_64 random;
    TextStream text;
    std::vector<std::string> ways;  // what the backend says of its calls
  };

  // The next call of the prompt.
  void Read(Running& now);
  void TakePromptScores(Running& now) const;
  // The next token; true if it is the last.
  bool Next(Running& now, const OnPart& part) const;
  void NoteWays(Running& now) const;
  void Score(const at::Tensor& logits, const int32_t* targets, const CompletionQuery& query, std::vector<Position>& to) const;
  at::Tensor Ids(const int32_t* ids, int64_t n) const;

  const Model& model_;
  const Tokenizer& tokenizer_;
  const Backend& backend_;
  const Spec& spec_;
  int64_t context_;
  std::vector<int32_t> end_ids_;
  bool reuse_;
  Stepper stepper_;
  std::string ran_;
  std::vector<Mark> marks_;           // states behind whole calls of kept_, the empty cache first
  std::vector<int32_t> kept_;         // the prompt that was fed last
  std::vector<Position> positions_;   // of each of its tokens
  std::optional<Running> running_;
};

}  // namespace kvq
