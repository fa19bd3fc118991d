// What the formulas of plain schemes are made of, where a GPU takes another way to the same number.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "kernels/device/cells.cuh"
#include "kernels/plain.h"

namespace kvq {
namespace {

TEST(Plain, NearestIsRound) {
  const auto expect = [](float v) {
    for (const float x : {v, std::nextafter(v, -1e9f), std::nextafter(v, 1e9f)}) {
      ASSERT_EQ(plain::Nearest(x), static_cast<int32_t>(std::round(x))) << x;
      ASSERT_EQ(plain::Nearest(-x), static_cast<int32_t>(std::round(-x))) << -x;
    }
  };
  for (int whole = 0; whole < 100000; ++whole) {
    expect(static_cast<float>(whole));
    expect(static_cast<float>(whole) + 0.5f);
  }
  for (int exponent = 0; exponent < 31; ++exponent) expect(std::ldexp(1.0f, exponent) - 0.5f);
}

TEST(Plain, QuotientsByAReciprocalAreDivisions) {
  std::mt19937_64 random(1);
  const auto number = [&](int exponent, uint32_t lost) {  // of a random mantissa without its last `lost` bits
    const auto mantissa = static_cast<uint32_t>(random()) >> 9 >> lost << lost;
    return BitsFloat(static_cast<uint32_t>(exponent + 127) << 23 | mantissa | static_cast<uint32_t>(random() & 1) << 31);
  };
  const auto expect = [](const plain::ReciprocalQuotients& by, float x, float d) { ASSERT_EQ(by.Of(x), x / d) << x << " / " << d; };
  for (int exponent = -126; exponent <= 127; ++exponent) {
    for (int i = 0; i < 64; ++i) {
      // Random ones, and those next to powers of two, where a reciprocal is rounded worst.
      float d = number(exponent, 0);
      if (i % 4 == 1) d = BitsFloat((FloatBits(d) & 0xFF800000) | (i / 4));
      if (i % 4 == 2) d = BitsFloat((FloatBits(d) | 0x7FFFFF) - static_cast<uint32_t>(i / 4));
      const auto by = plain::ReciprocalQuotients::By(d);
      for (int k = 0; k < 200; ++k) {
        const int of_x = std::clamp(exponent + static_cast<int>(random() % 40) - 30, -126, 126);
        const float x = number(of_x, k % 3 == 0 ? 0 : k % 3 == 1 ? 13 : 16);  // float32's, float16's, bfloat16's
        ASSERT_NO_FATAL_FAILURE(expect(by, x, d));
        // Quotients that are nearly a number in the middle between two floats.
        const double middle = 1 + (static_cast<double>(random() >> 41) + 0.5) / (1 << 23);
        const auto product = static_cast<float>(middle * d);
        if (std::isfinite(product)) ASSERT_NO_FATAL_FAILURE(expect(by, product, d));
      }
      expect(by, 0, d);
    }
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(plain::ReciprocalQuotients::By(kInfinity).Of(3), 0);
  EXPECT_TRUE(std::isnan(plain::ReciprocalQuotients::By(NAN).Of(3)));
  EXPECT_TRUE(std::isnan(plain::ReciprocalQuotients::By(2).Of(NAN)));
  EXPECT_EQ(plain::ReciprocalQuotients::By(1e-38f).Of(1e-38f), 1);
}

TEST(Plain, CellsCountThresholdsOrSayThatTheyCannot) {
  constexpr float kThresholds[] = {-115.5f, -93.5f, -74, -57, -42, -28.5f, -16, -4.5f, 0, 19, 31.5f, 45.5f, 61, 79, 101};
  constexpr Cells cells(1.0f / 256, kThresholds);
  static_assert(cells.apart && !Cells(1.0f / 512, kThresholds).apart);
  const auto sum = [&](float y) {
    constexpr float kScale = cells.slope * Cells::kSteps;
    return Cells::SumOf(y, kScale, cells.lanes[Cells::CellOf(y, kScale) & 31].carry);
  };
  // `off`: how far what is known of a number may be from it, in steps.
  constexpr double kStep = 256.0 / Cells::kSteps;
  const auto expect = [&](float y, double off) {
    const uint32_t of = sum(static_cast<float>(y + off * kStep));
    if (Cells::IsUnsure(of)) return true;
    EXPECT_EQ(Cells::CountOf(of, 15), std::upper_bound(std::begin(kThresholds), std::end(kThresholds), y) - std::begin(kThresholds)) << y << ", " << off;
    return false;
  };
  for (const float threshold : kThresholds) {
    for (const float y : {threshold, std::nextafter(threshold, -1e9f), std::nextafter(threshold, 1e9f)}) {
      for (int off = 1 - Cells::kUnsure; off < Cells::kUnsure; ++off) EXPECT_TRUE(expect(y, off)) << y << ", " << off;
      for (const double off : {-0.99 * Cells::kUnsure, 0.99 * Cells::kUnsure}) expect(y, off);
    }
    for (const double steps : {-Cells::kUnsure - 1.1, Cells::kUnsure + 1.1}) {
      EXPECT_FALSE(expect(static_cast<float>(threshold + steps * kStep), 0)) << threshold;
    }
  }
  EXPECT_EQ(Cells::CountOf(sum(0), 15), 9);  // of what is exact
  std::mt19937 random(2);
  int unsure = 0;
  for (int i = 0; i < 1000000; ++i) {
    const double off = std::uniform_real_distribution<double>(0.01 - Cells::kUnsure, Cells::kUnsure - 0.01)(random);
    unsure += expect(std::uniform_real_distribution<float>(-300, 300)(random), off);
  }
  EXPECT_LT(unsure, 200);  // 15 times 9 of 2.5 million steps
  for (const float y : {1e-2f, 250.0f, -250.0f, 400.0f, -400.0f, 511.0f, -511.0f}) expect(y, 0);  // up to two lengths
}

}  // namespace
}  // namespace kvq
