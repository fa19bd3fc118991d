// What the tests share: golden files, the inputs they were made from, the environment, and whether there is a GPU.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "fixtures/machine/device.h"
#include "kernels/half.h"

namespace kvq {

inline const c10::Device kCpu(c10::kCPU);

// Of the running test, for files of its own: tests run side by side, and two suites may have one of the same name.
inline std::string TestName() {
  const testing::TestInfo& test = *testing::UnitTest::GetInstance()->current_test_info();
  std::string name = std::string(test.test_suite_name()) + "." + test.name();
  std::replace(name.begin(), name.end(), '/', '_');
  return name;
}

inline std::string GoldenPath(const std::string& name) {
  return KVQ_SOURCE_DIR "/accuracy/golden/" + name;
}

inline nlohmann::json Golden(const std::string& name) {
  std::ifstream file(GoldenPath(name));
  return nlohmann::json::parse(file);
}

// numbers() of make_golden.py: close to normal, from integer arithmetic alone.
inline std::vector<float> GoldenNumbers(int64_t count, uint64_t seed, const std::string& kind) {
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  std::vector<float> out(static_cast<size_t>(count));
  for (float& x : out) {
    int64_t total = 0;
    for (int i = 0; i < 4; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      total += static_cast<int64_t>(state >> 48);
    }
    x = static_cast<float>(total - 131070) / 37837.0f;
  }
  for (size_t i = 0; i < out.size(); ++i) {
    if (kind == "outliers" && i % 16 == 0) out[i] = out[i] * 8 + 4;
    if (kind == "constant" && i < out.size() / 2) out[i] = 0.75f;
    if (kind == "tiny") out[i] *= 1e-5f;
    if (kind == "offset") out[i] += 20;
    if (kind == "ties") out[i] = 3.5f * static_cast<float>(i * 6 % 31);
    if (kind == "bfloat16") out[i] = BFloat16ToFloat(FloatToBFloat16(out[i]));
  }
  return out;
}

// Independent standard-normal numbers, by Box and Muller's transformation.
inline std::vector<float> NormalNumbers(int64_t count, uint64_t seed) {
  std::mt19937_64 engine(seed);
  const auto uniform = [&] { return (static_cast<double>(engine() >> 11) + 0.5) * 0x1p-53; };
  std::vector<float> out(static_cast<size_t>(count + count % 2));
  for (size_t i = 0; i < out.size(); i += 2) {
    const double radius = std::sqrt(-2 * std::log(uniform())), angle = 2 * M_PI * uniform();
    out[i] = static_cast<float>(radius * std::cos(angle));
    out[i + 1] = static_cast<float>(radius * std::sin(angle));
  }
  out.resize(static_cast<size_t>(count));
  return out;
}

// Sets environment variables for as long as the object lives; null: takes them away.
class Environment {
 public:
  Environment(std::initializer_list<std::pair<const char*, const char*>> variables) {
    for (const auto& [name, value] : variables) {
      const char* old = std::getenv(name);
      old_.emplace_back(name, old != nullptr ? std::optional<std::string>(old) : std::nullopt);
      value != nullptr ? setenv(name, value, 1) : unsetenv(name);
    }
  }
  ~Environment() {
    for (const auto& [name, old] : old_) old ? setenv(name.c_str(), old->c_str(), 1) : unsetenv(name.c_str());
  }

 private:
  std::vector<std::pair<std::string, std::optional<std::string>>> old_;
};

// Skips the test where there is no GPU, with the reason; with KVQ_REQUIRE_CUDA=1 fails it instead.
#define KVQ_NEEDS_CUDA()                                                     \
  if (!::kvq::WhyNoCuda().empty()) {                                         \
    const char* required = std::getenv("KVQ_REQUIRE_CUDA");                  \
    ASSERT_FALSE(required != nullptr && std::string(required) == "1")        \
        << "KVQ_REQUIRE_CUDA=1, but: " << ::kvq::WhyNoCuda();                \
    GTEST_SKIP() << ::kvq::WhyNoCuda();                                      \
  }

}  // namespace kvq
