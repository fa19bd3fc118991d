// The arithmetic behind the quality measurements: windows, intervals, scores, the needle prompt.
#include <ATen/ATen.h>

#include <cmath>

#include "accuracy/needle.h"
#include "accuracy/scoring.h"
#include "accuracy/statistics.h"
#include "accuracy/windows.h"
#include "accuracy/golden.h"
#include "fixtures/dataset.h"

namespace kvq {
namespace {

TEST(Windows, DisjointOnesScoreAllButTheirFirstToken) {
  const std::vector<Window> windows = DecodeWindows(1000, 256, 0, 10);
  ASSERT_EQ(windows.size(), 3u);  // the rest of 232 tokens is no window
  EXPECT_EQ(windows[2].begin, 512);
  EXPECT_EQ(windows[2].end, 768);
  for (const Window& window : windows) EXPECT_EQ(window.scored(), 255);
  EXPECT_EQ(DecodeWindows(1000, 256, 0, 2).size(), 2u);
  EXPECT_EQ(DecodeWindows(255, 256, 0, 2).size(), 0u);
  EXPECT_EQ(DecodeWindows(256, 256, 0, 2).size(), 1u);
  EXPECT_EQ(DecodeWindows(1000, 256, 0, 1, true)[0].scored(), 256);  // BOS before it
}

TEST(Windows, OverlapIsContextOnly) {
  const std::vector<Window> windows = DecodeWindows(1000, 256, 64, 100);
  ASSERT_EQ(windows.size(), 12u);  // begins 0, 64, ... 704
  EXPECT_EQ(windows[0].scored(), 255);
  int64_t scored = 0;
  for (const Window& window : windows) {
    EXPECT_EQ(window.score_from, scored == 0 ? 1 : scored + 1);
    scored += window.scored();
  }
  EXPECT_EQ(scored, 704 + 256 - 1);  // every token once
}

TEST(Windows, TheStudysNumberOfWindows) {
  // 1 + ceil((N - W) / S) windows, S = W / 2; the last may be shorter.
  for (const int64_t tokens : {4096, 4097, 6144, 6145, 100000, 304978}) {
    const std::vector<Window> windows = StudyWindows(tokens, 4096, 0, 1 << 20);
    EXPECT_EQ(static_cast<int64_t>(windows.size()), 1 + (tokens - 4096 + 2047) / 2048) << tokens;
    EXPECT_EQ(windows.back().end, tokens);
    int64_t targets = 0;
    for (const Window& window : windows) targets += window.scored();
    EXPECT_EQ(targets, tokens);  // the weights of the means add up to N
  }
  EXPECT_EQ(StudyWindows(100, 4096, 0, 10).size(), 1u);
  EXPECT_EQ(StudyWindows(100000, 4096, 0, 3).back().end, 4096 + 2 * 2048);
}

TEST(Statistics, IntervalsOfKnownSamples) {
  EXPECT_NEAR(StudentT95(1), 12.7062, 1e-4);
  EXPECT_NEAR(StudentT95(30), 2.0423, 1e-4);
  EXPECT_NEAR(StudentT95(31), 2.0395, 1e-4);
  EXPECT_NEAR(StudentT95(100), 1.9840, 1e-4);
  EXPECT_NEAR(StudentT95(100000), 1.9600, 1e-4);
  EXPECT_FALSE(MeanInterval({3.0}).has_value());
  const Interval interval = *MeanInterval({1, 2, 3, 4, 5});  // mean 3, s = sqrt(2.5), t = 2.7764
  EXPECT_NEAR(interval.high - 3, 2.7764 * std::sqrt(2.5 / 5), 1e-9);
  EXPECT_NEAR(3 - interval.low, interval.high - 3, 1e-12);
  const Interval wilson = WilsonInterval(5, 10);  // Wilson 1927: 0.2366 to 0.7634
  EXPECT_NEAR(wilson.low, 0.2366, 1e-4);
  EXPECT_NEAR(wilson.high, 0.7634, 1e-4);
  EXPECT_NEAR(WilsonInterval(0, 5).low, 0, 1e-12);
  EXPECT_NEAR(WilsonInterval(5, 5).high, 1, 1e-12);
}

TEST(Scoring, EqualsLibtorchInDoublePrecision) {
  for (const int64_t vocab : {1, 7, 61, 255, 256, 257, 49152}) {
    const at::Tensor r = at::tensor(GoldenNumbers(2 * 3 * vocab, 1, "normal")).view({2, 3, vocab}) * 6;
    const at::Tensor q = r + at::tensor(GoldenNumbers(2 * 3 * vocab, 2, "normal")).view({2, 3, vocab}) * 0.3;
    const at::Tensor targets = at::arange(6, at::kLong).view({2, 3}).remainder(vocab);
    const at::Tensor scores = ScoreTokens(r, q, targets);
    const at::Tensor lr = at::log_softmax(r.to(at::kDouble), -1), lq = at::log_softmax(q.to(at::kDouble), -1);
    const at::Tensor index = targets.unsqueeze(-1);
    const auto expect = [&](int64_t column, const at::Tensor& expected) {
      EXPECT_LT((scores.select(-1, column) - expected).abs().max().item<double>(), 2e-6) << "vocab " << vocab;
    };
    expect(0, -lr.gather(-1, index).squeeze(-1));
    expect(1, -lq.gather(-1, index).squeeze(-1));
    expect(2, (lr.exp() * (lr - lq)).sum(-1));
    EXPECT_TRUE(scores.select(-1, 3).equal(r.argmax(-1).eq(q.argmax(-1)).to(at::kDouble)));
    // A model against itself: nothing but the rounding of its sums.
    const at::Tensor same = ScoreTokens(r, r, targets);
    EXPECT_LT(same.select(-1, 2).abs().max().item<double>(), 1e-12);
    EXPECT_EQ(same.select(-1, 3).sum().item<double>(), 6);
  }
}

TEST(ScoringGpu, EqualsTheCpu) {
  KVQ_NEEDS_CUDA();
  const at::Tensor r = at::tensor(GoldenNumbers(3 * 1000, 1, "normal")).view({1, 3, 1000}) * 6, q = r * 0.9;
  const at::Tensor targets = at::arange(3, at::kLong).view({1, 3});
  const at::Tensor gpu = ScoreTokens(r.cuda(), q.cuda(), targets.cuda()).cpu();
  EXPECT_LT((gpu - ScoreTokens(r, q, targets)).abs().max().item<double>(), 1e-5);
}

// One token a word, so that the budget can be counted by hand.
std::vector<int32_t> Words(const std::string& text, bool) {
  std::vector<int32_t> ids;
  for (size_t at = 0; at < text.size(); ++at) {
    if (text[at] != ' ' && text[at] != '\n' && (at == 0 || text[at - 1] == ' ' || text[at - 1] == '\n')) ids.push_back(1);
  }
  return ids;
}

TEST(NeedlePrompt, CountsSentencesAndPlacesTheNeedle) {
  // Question 8 words, needle 13, sentences 4, 4, 4, 3, 4: mean 3.8. (200 - 8 - 10 - 13) / 3.8 = 44.47.
  const NeedlePrompt prompt = MakeNeedlePrompt(Words, 200, 0.5, "7492");
  const std::string needle =
      "The special magic number for this experiment is 7492. Remember this number: 7492.";
  const size_t at = prompt.text.find(needle);
  ASSERT_NE(at, std::string::npos);
  const auto sentences = [](const std::string& text) { return std::count(text.begin(), text.end(), '.'); };
  EXPECT_EQ(sentences(prompt.text.substr(0, at)), 22);  // int(0.5 * 44)
  EXPECT_EQ(sentences(prompt.text), 44 + 2);
  EXPECT_EQ(prompt.text.substr(0, 38), "The grass is green. The sky is blue. T");
  const std::string end = "\n\nThe special magic number for this experiment is";
  EXPECT_EQ(prompt.text.substr(prompt.text.size() - end.size()), end);
  EXPECT_EQ(prompt.text[prompt.text.size() - end.size() - 1], '.');
  EXPECT_LE(prompt.ids.size(), 200u);
  EXPECT_EQ(MakeNeedlePrompt(Words, 200, 0.0, "1").text.find("The special"), 0u);
  EXPECT_LE(MakeNeedlePrompt(Words, 20, 0.9, "1").ids.size(), 20u);  // cut on the right
}

}  // namespace
}  // namespace kvq
