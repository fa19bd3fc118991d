// Work that is dealt to threads: each piece once, whoever deals and whatever a piece does.
#include "kernels/deal.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#include <utility>
#include <vector>

namespace kvq {
namespace {

TEST(Deal, CallsEachPieceOnce) {
  for (const int64_t n : {0, 1, 2, 3, 64, 1000}) {
    for (int round = 0; round < 200; ++round) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(n));
      Deal(n, [&](int64_t i) { calls[static_cast<size_t>(i)].fetch_add(1, std::memory_order_relaxed); });
      for (const std::atomic<int>& of : calls) ASSERT_EQ(of, 1) << n << " pieces";
    }
  }
}

TEST(Deal, SeesWhatPiecesWrote) {
  std::vector<int64_t> squares(10000);
  Deal(std::ssize(squares), [&](int64_t i) { squares[static_cast<size_t>(i)] = i * i; });
  for (int64_t i = 0; i < std::ssize(squares); ++i) ASSERT_EQ(squares[static_cast<size_t>(i)], i * i);
}

TEST(Deal, PiecesMayDeal) {
  std::atomic<int64_t> sum = 0;
  Deal(50, [&](int64_t i) { Deal(20, [&](int64_t j) { sum += i * 20 + j; }); });
  EXPECT_EQ(sum, 999 * 1000 / 2);
}

TEST(Deal, ThreadsMayDealAtOnce) {
  std::vector<int64_t> sums(4);
  std::vector<std::thread> threads;
  for (int64_t& sum : sums) {
    threads.emplace_back([&sum] {
      for (int round = 0; round < 500; ++round) {
        std::vector<int64_t> parts(37);
        Deal(37, [&](int64_t i) { parts[static_cast<size_t>(i)] = i; });
        sum += std::accumulate(parts.begin(), parts.end(), int64_t{0});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int64_t sum : sums) EXPECT_EQ(sum, 500 * 666);
}

// Where all threads work at once: each begins with its run's first piece, and goes through its pieces of a run in order.
TEST(Deal, EachThreadHasARun) {
  const int threads = omp_get_max_threads();
  const int64_t pieces = 8 * threads;
  std::vector<std::pair<std::thread::id, int64_t>> taken(static_cast<size_t>(pieces));  // by whom, and as which of all
  std::atomic<int64_t> next = 0;
  std::atomic<int> begun = 0;
  std::mutex mutex;
  std::set<std::thread::id> working;
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  Deal(pieces, [&](int64_t i) {
    taken[static_cast<size_t>(i)] = {std::this_thread::get_id(), next++};
    {
      const std::lock_guard<std::mutex> lock(mutex);
      working.insert(std::this_thread::get_id()), begun = static_cast<int>(working.size());
    }
    while (begun < threads && std::chrono::steady_clock::now() < until) std::this_thread::yield();
  });
  ASSERT_EQ(begun, threads) << "not all threads had a processor within ten seconds";
  std::set<std::thread::id> owners;
  for (int64_t i = 0; i < pieces; ++i) {
    if (i % 8 == 0) EXPECT_TRUE(owners.insert(taken[static_cast<size_t>(i)].first).second) << i;
    else if (const auto &before = taken[static_cast<size_t>(i - 1)], &now = taken[static_cast<size_t>(i)]; before.first == now.first) {
      EXPECT_LT(before.second, now.second) << i;
    }
  }
}

TEST(FetchAhead, AsksForEachLineOnce) {
  std::vector<std::byte> bytes(1 << 20);
  const auto lines = [&](int64_t piece, int64_t n) {
    Announce({bytes.data(), piece, n});
    int64_t count = 0;
    while (FetchAhead(1)) ++count;
    return count;
  };
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  EXPECT_EQ(lines(4096, 10000), 157);          // the last line is not whole
  EXPECT_EQ(lines(4096, 0), 0);
  EXPECT_EQ(lines(4096, 1 << 20), 4096);       // a quarter of a MiB at most
  omp_set_num_threads(4);
  EXPECT_EQ(lines(4096, 10 * 4096), 2 * 64);   // of ten pieces the first two are this thread's
  omp_set_num_threads(threads);
  EXPECT_FALSE(FetchAhead(1));
}

}  // namespace
}  // namespace kvq
