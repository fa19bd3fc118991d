// Specs of parts of a cache, and the profile that `sensitivity` draws, number by number: against
// attention and logits of runs under those specs.
#include "accuracy/sensitivity.h"

#include <gtest/gtest.h>

#include "kernels/error.h"

namespace kvq {
namespace {

TEST(Sensitivity, PartsOfSpecsAreSpecs) {
  const auto part = [](const std::string& text, int64_t first, int64_t last, bool keys,
                       bool values) {
    const std::string result = PartOfSpec(ParseSpec(text), CacheShape::Uniform(4, 1, 2, 128), [&](int64_t layer, bool of_values) {
      return first <= layer && layer <= last && (of_values ? values : keys);
    });
    if (!result.empty()) EXPECT_FALSE(ParseSpec(result).stores_dense()) << result;
    return result;
  };
  EXPECT_EQ(part("int4-hqq", 2, 2, true, false), "none@layers=2-2:int4-hqq+none");
  EXPECT_EQ(part("int4-hqq", 2, 2, false, true), "none@layers=2-2:none+int4-hqq");
  EXPECT_EQ(part("int4-hqq", 0, 1, true, true),
            "none@layers=0-0:int4-hqq+int4-hqq@layers=1-1:int4-hqq+int4-hqq");
  EXPECT_EQ(part("int2-hqq+int8-hqq@group=32@residual=64@sinks=4", 3, 3, true, true),
            "none@group=32@residual=64@sinks=4@layers=3-3:int2-hqq+int8-hqq");
  EXPECT_EQ(part("int4-hqq@layers=0-1:none+int8-hqq@policy=hf", 0, 2, true, true),
            "none@policy=hf@layers=0-0:none+int8-hqq@layers=1-1:none+int8-hqq@layers=2-2:int4-hqq+"
            "int4-hqq");
  EXPECT_EQ(part("int4-hqq@layers=0-1:none+int8-hqq", 0, 1, true, false), "")
      << "nothing would be encoded";
  EXPECT_EQ(part("none+int4-hqq@group=32", 1, 1, true, false), "");
  EXPECT_EQ(part("int4-hqq@dense=1@residual=64+0", 0, 3, true, true),
            "none@residual=64+0@layers=1-1:int4-hqq+int4-hqq@layers=2-2:int4-hqq+int4-hqq");
  // Of a preset, what it means.
  EXPECT_EQ(part("llamacpp-q8_0-q4_0", 3, 3, true, true),
            "none@residual=0@rotate=hadamard+hadamard:64@layers=3-3:q8_0+q4_0");
  const auto all_but_one = [](int64_t layer, bool values) { return layer != 1 || values; };
  EXPECT_EQ(PartOfSpec(ParseSpec("int4-hqq@sinks=4"), CacheShape::Uniform(2, 1, 2, 128), all_but_one),
            "none@sinks=4@layers=0-0:int4-hqq+int4-hqq@layers=1-1:none+int4-hqq");
  // Of latents, whose rotary keys a spec encodes only where it says so.
  const CacheShape latents{1, {{1, 512, 64}, {1, 512, 64}}};
  EXPECT_EQ(PartOfSpec(ParseSpec("int4-hqq@sinks=4"), latents, all_but_one), "none@sinks=4@layers=0-0:int4-hqq+none");
  EXPECT_EQ(PartOfSpec(ParseSpec("int4-hqq+int8-hqq"), latents, all_but_one),
            "none@layers=0-0:int4-hqq+int8-hqq@layers=1-1:none+int8-hqq");
}

}  // namespace
}  // namespace kvq
