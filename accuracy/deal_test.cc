// Work that is dealt to threads: each piece once, whoever deals and whatever a piece does.
#include "kernels/deal.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace kvq
