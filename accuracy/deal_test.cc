// Work that is dealt to threads: each piece once, whoever deals and whatever a piece does.
#include "kernels/deal.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <atomic>
#include <numeric>
#include <thread>
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

// Which thread has which piece is not said, but that each begins a run of its own: of two threads that both work, none has all.
TEST(Deal, PiecesOfARunAreInOrder) {
  constexpr int64_t kPieces = 64;
  std::vector<std::atomic<int64_t>> order(kPieces);
  for (int round = 0; round < 100; ++round) {
    std::atomic<int64_t> next = 0;
    Deal(kPieces, [&](int64_t i) { order[static_cast<size_t>(i)] = next++; });
    const int threads = omp_get_max_threads();
    for (int run = 0; run < threads; ++run) {
      for (int64_t i = kPieces * run / threads + 1; i < kPieces * (run + 1) / threads; ++i) {
        // Two that two threads take at once may begin in either order.
        ASSERT_LT(order[static_cast<size_t>(i - 1)], order[static_cast<size_t>(i)] + threads) << i;
      }
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
