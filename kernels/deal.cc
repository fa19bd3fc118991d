#include "kernels/deal.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <thread>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace kvq {
namespace {

// Looks for work, or at what others still do, before a thread sleeps: some tens of microseconds, as between two products of a step.
constexpr int kLooks = 2000;
constexpr int kLines = 4;  // that are asked for between two looks
constexpr int kMostRuns = 256;
thread_local bool within = false;

// As many as OpenMP would take; one within its regions, and where a build has none.
int Threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : std::min(omp_get_max_threads(), kMostRuns);
#else
  return 1;
#endif
}

void Pause() {
#ifdef __x86_64__
  _mm_pause();
#endif
}

// Half of a core's second cache, which has the rest for what it works on.
constexpr int64_t kMostAhead = 256 << 10;

// What is announced. Of two announcements at once a thread may have parts of both: then it asks for what nobody needs.
std::atomic<uint32_t> announced = 0;
std::atomic<const std::byte*> ahead_begin = nullptr;
std::atomic<int64_t> ahead_piece = 1, ahead_bytes = 0, ahead_runs = 1;
thread_local int number = 0;  // of the thread, 0: that deals
struct Fetched {
  uint32_t of = 0;
  const std::byte *at = nullptr, *end = nullptr;
};
thread_local Fetched fetched;

// The first of n pieces of a run.
int64_t RunBegin(int64_t n, int64_t run, int64_t runs) { return n * run / runs; }

class Team {
 public:
  void Run(int64_t n, void (*run)(const void*, int64_t), const void* body) {
    const int count = Threads();
    for (; helpers_ < count - 1; ++helpers_) {
      std::thread([this, own = helpers_ + 1] { number = own, Help(); }).detach();
    }
    run_ = run, body_ = body;
    unfinished_.store(static_cast<int32_t>(n), std::memory_order_relaxed);
    run_count_.store(count, std::memory_order_relaxed);
    const uint64_t deal = deals_.load(std::memory_order_relaxed) + 1;
    for (int i = 0; i < count; ++i) {
      const int64_t begin = RunBegin(n, i, count);
      runs_[i].end = RunBegin(n, i + 1, count);
      runs_[i].left.store(deal << 32 | static_cast<uint64_t>(runs_[i].end - begin), std::memory_order_release);
    }
    deals_.fetch_add(1, std::memory_order_release), deals_.notify_all();
    while (Take()) {}
    int looks = 0;
    for (int32_t left; (left = unfinished_.load(std::memory_order_acquire)) > 0;) {
      if (FetchAhead(kLines)) continue;
      if (++looks < kLooks) Pause();
      else unfinished_.wait(left);
    }
  }

 private:
  struct alignas(64) Pieces {
    std::atomic<uint64_t> left = 0;  // the deal's number, and pieces that nobody has: one word, so that nobody takes another deal's
    int64_t end = 0;
  };

  // A piece, if there is one: of this thread's run, then of others. Whoever has one knows what run_, body_ and the run's end are: the deal
  // lasts as long as he works.
  bool Take() {
    const int count = run_count_.load(std::memory_order_relaxed);
    for (int i = 0; i < count; ++i) {
      Pieces& of = runs_[(number + i) % count];
      uint64_t left = of.left.load(std::memory_order_acquire);
      while (static_cast<uint32_t>(left) > 0) {
        if (!of.left.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        run_(body_, of.end - static_cast<uint32_t>(left));
        if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
        return true;
      }
    }
    return false;
  }
  void Help() {
    within = true;
    uint32_t seen = 0;  // the deal of which nothing is left
    for (int looks = 0;;) {
      const uint32_t deals = deals_.load(std::memory_order_acquire);
      if (deals != seen) {
        while (Take()) {}
        seen = deals, looks = 0;
      } else if (FetchAhead(kLines)) {
        continue;
      } else if (++looks < kLooks) {
        Pause();
      } else {
        deals_.wait(deals), looks = 0;
      }
    }
  }

  int helpers_ = 0;
  void (*run_)(const void*, int64_t) = nullptr;
  const void* body_ = nullptr;
  std::array<Pieces, kMostRuns> runs_;
  std::atomic<int> run_count_ = 1;
  std::atomic<int32_t> unfinished_ = 0;  // pieces
  std::atomic<uint32_t> deals_ = 0;      // that helpers sleep by
};

}  // namespace

void Announce(const Ahead& ahead) {
  ahead_begin.store(ahead.begin, std::memory_order_relaxed);
  ahead_piece.store(ahead.piece, std::memory_order_relaxed), ahead_bytes.store(ahead.bytes, std::memory_order_relaxed);
  ahead_runs.store(Threads(), std::memory_order_relaxed);
  announced.fetch_add(1, std::memory_order_release);
}

bool FetchAhead(int lines) {
  if (const uint32_t now = announced.load(std::memory_order_acquire); fetched.of != now) {
    const int64_t piece = ahead_piece.load(std::memory_order_relaxed), bytes = ahead_bytes.load(std::memory_order_relaxed);
    const int64_t runs = ahead_runs.load(std::memory_order_relaxed), n = (bytes + piece - 1) / piece, own = std::min<int64_t>(number, runs);
    const int64_t begin = RunBegin(n, own, runs) * piece, end = std::min(RunBegin(n, own + 1, runs) * piece, bytes);
    const std::byte* from = ahead_begin.load(std::memory_order_relaxed);
    fetched = {now, from + begin, from + std::clamp(end, begin, begin + kMostAhead)};
  }
  if (fetched.at >= fetched.end) return false;
  for (int i = 0; i < lines; ++i, fetched.at += 64) __builtin_prefetch(fetched.at, 0, 2);
  return true;
}

void DealPieces(int64_t n, void (*run)(const void*, int64_t), const void* body) {
  static Team& team = *new Team;  // its threads never end
  static std::mutex dealing;
  std::unique_lock<std::mutex> lock(dealing, std::defer_lock);
  if (n <= 1 || within || Threads() == 1 || !lock.try_lock()) {
    for (int64_t i = 0; i < n; ++i) run(body, i);
    return;
  }
  within = true;
  team.Run(n, run, body);
  within = false;
}

}  // namespace kvq
