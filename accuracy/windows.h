// The arithmetic of the perplexity protocols: which tokens of a text form a window, and which of them
// are scored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kvq {

// Tokens [begin, end) of a text; those from score_from on (an index into the text, too) are scored.
struct Window {
  int64_t begin = 0, end = 0, score_from = 0;
  int64_t scored() const { return end - score_from; }
};

// Protocol `decode`: whole windows of `length` tokens every `stride` tokens (0: disjoint), at most
// `count`. All but a window's first token are scored, each token once: what an earlier window has
// scored is context only. `first_is_scored`: something stands before the text (BOS), so that the first
// token can be scored as well.
inline std::vector<Window> DecodeWindows(int64_t tokens, int64_t length, int64_t stride,
                                         int64_t count, bool first_is_scored = false) {
  if (stride == 0) stride = length;
  std::vector<Window> windows;
  int64_t scored_until = 0;
  for (int64_t begin = 0; begin + length <= tokens && static_cast<int64_t>(windows.size()) < count;
       begin += stride) {
    const int64_t first = begin + (first_is_scored ? 0 : 1);
    windows.push_back({begin, begin + length, std::max(first, scored_until)});
    scored_until = begin + length;
  }
  return windows;
}

// At most `batch` windows in a row at a time. Only windows that score the same positions can run
// side by side: the first one scores more than those that overlap an earlier one.
inline std::vector<std::vector<Window>> SideBySide(const std::vector<Window>& windows, int64_t batch) {
  std::vector<std::vector<Window>> groups;
  for (const Window& window : windows) {
    if (groups.empty() || static_cast<int64_t>(groups.back().size()) == batch ||
        groups.back().front().scored() != window.scored()) {
      groups.emplace_back();
    }
    groups.back().push_back(window);
  }
  return groups;
}

// Protocol `study` (the reference study): windows of `length` tokens every `stride` (0: half a window)
// until one ends with the text; the last may be shorter. A window's targets are the tokens that no
// earlier one had; score_from is their first. `count` limits the text to that many windows.
inline std::vector<Window> StudyWindows(int64_t tokens, int64_t length, int64_t stride,
                                        int64_t count) {
  if (stride == 0) stride = length / 2;
  std::vector<Window> windows;
  int64_t scored_until = 0;
  for (int64_t begin = 0; static_cast<int64_t>(windows.size()) < count; begin += stride) {
    const int64_t end = std::min(begin + length, tokens);
    windows.push_back({begin, end, scored_until});
    scored_until = end;
    if (end == tokens) break;
  }
  return windows;
}

}  // namespace kvq
