#include "kernels/deal.h"

#ifdef _OPENMP
#include <omp.h>
#endif

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
thread_local bool within = false;

// As many as OpenMP would take; one within its regions, and where a build has none.
int Threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

void Pause() {
#ifdef __x86_64__
  _mm_pause();
#endif
}

class Team {
 public:
  void Run(int64_t n, void (*run)(const void*, int64_t), const void* body) {
    for (const int helpers = Threads() - 1; helpers_ < helpers; ++helpers_) std::thread([this] { Help(); }).detach();
    run_ = run, body_ = body, n_ = n;
    unfinished_.store(static_cast<int32_t>(n), std::memory_order_relaxed);
    const uint64_t deal = (dealt_.load(std::memory_order_relaxed) >> 32) + 1;
    dealt_.store(deal << 32 | static_cast<uint64_t>(n), std::memory_order_release);
    deals_.fetch_add(1, std::memory_order_release), deals_.notify_all();
    while (Take()) {}
    int looks = 0;
    for (int32_t left; (left = unfinished_.load(std::memory_order_acquire)) > 0;) {
      if (++looks < kLooks) Pause();
      else unfinished_.wait(left);
    }
  }

 private:
  // A piece, if there is one. Whoever has one knows what run_, body_ and n_ are: the deal lasts as long as he works.
  bool Take() {
    uint64_t dealt = dealt_.load(std::memory_order_acquire);
    while (static_cast<uint32_t>(dealt) > 0) {
      if (!dealt_.compare_exchange_weak(dealt, dealt - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      run_(body_, n_ - static_cast<uint32_t>(dealt));
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
      return true;
    }
    return false;
  }
  void Help() {
    within = true;
    for (int looks = 0;;) {
      const uint32_t deals = deals_.load(std::memory_order_acquire);
      if (Take()) {
        looks = 0;
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
  int64_t n_ = 0;
  std::atomic<uint64_t> dealt_ = 0;       // the deal's number, and pieces that nobody has: one word, so that nobody takes another deal's
  std::atomic<int32_t> unfinished_ = 0;   // pieces
  std::atomic<uint32_t> deals_ = 0;       // that helpers sleep by
};

}  // namespace

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
