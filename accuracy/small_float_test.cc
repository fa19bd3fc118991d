// kernels/small_float.h against libtorch's 8-bit floats and against OCP's table of E2M1.
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>
#include <gtest/gtest.h>

#include <cmath>
#include <iterator>

#include "kernels/small_float.h"

namespace kvq {
namespace {

// All codes, and the neighbourhood of the middle between every two numbers.
template <typename Format, typename Theirs>
void ExpectLibtorchs(float largest) {
  for (uint32_t code = 0; code < 256; ++code) {
    const Theirs theirs(static_cast<uint8_t>(code), Theirs::from_bits());
    const auto value = static_cast<float>(theirs);
    if (!(std::fabs(value) <= largest)) {
      EXPECT_TRUE(std::isnan(Format::Value(code))) << code;
      continue;
    }
    EXPECT_EQ(FloatBits(Format::Value(code)), FloatBits(value)) << code;
    EXPECT_EQ(Format::Code(value), code);
    const auto next = static_cast<float>(Theirs(static_cast<uint8_t>(code + 1), Theirs::from_bits()));
    if (!(std::fabs(next) <= largest)) continue;
    const float middle = (value + next) / 2;
    for (const float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 2 * next)}) {
      EXPECT_EQ(Format::Code(x), Theirs(x).x) << x;
    }
  }
  const uint32_t most = Theirs(largest).x;
  for (const float beyond : {std::nextafter(largest, INFINITY), largest * 1.04f, largest * 2, 3e38f, INFINITY}) {
    EXPECT_EQ(Format::Code(beyond), most) << beyond;
    EXPECT_EQ(Format::Code(-beyond), most | 0x80) << beyond;
  }
  for (const float nan : {NAN, -NAN}) EXPECT_TRUE(std::isnan(Format::Value(Format::Code(nan))));
}

TEST(SmallFloat, EightBitsEqualLibtorchs) {
  ExpectLibtorchs<E4M3, c10::Float8_e4m3fn>(448);
  ExpectLibtorchs<E5M2, c10::Float8_e5m2>(57344);
}

TEST(SmallFloat, FourBitsAreTheNearestOfTheTable) {
  const float table[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  for (uint32_t i = 0; i < std::size(table); ++i) {
    EXPECT_EQ(FloatBits(E2M1::Value(i)), FloatBits(table[i]));
    EXPECT_EQ(FloatBits(E2M1::Value(i | 8)), FloatBits(-table[i]));
    EXPECT_EQ(E2M1::Code(table[i]), i);
    EXPECT_EQ(E2M1::Code(-table[i]), i | 8);
    if (i + 1 == std::size(table)) continue;
    const float middle = (table[i] + table[i + 1]) / 2;
    EXPECT_EQ(E2M1::Code(std::nextafter(middle, 0.0f)), i);
    EXPECT_EQ(E2M1::Code(middle), i % 2 == 0 ? i : i + 1);  // of two as near the one whose last bit is 0
    EXPECT_EQ(E2M1::Code(std::nextafter(middle, 9.0f)), i + 1);
  }
  for (const float beyond : {6.1f, 7.5f, 1e30f, INFINITY}) EXPECT_EQ(E2M1::Code(beyond), 7u);
  EXPECT_EQ(E2M1::Code(NAN), 0u);
}

TEST(SmallFloat, PowersOfTwo) {
  for (uint32_t e = 0; e < 255; ++e) EXPECT_EQ(PowerOfTwo(e), std::ldexp(1.0f, static_cast<int>(e) - 127));
  EXPECT_TRUE(std::isnan(PowerOfTwo(255)));
}

}  // namespace
}  // namespace kvq
