// Runs kvqbench as its users do, for the tests of the command.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "accuracy/golden.h"
#include "kernels/error.h"

namespace kvq {

struct Outcome {
  int code;
  std::string out, err;
};

// Runs kvqbench with these arguments; `before` may set limits.
inline Outcome Execute(const std::string& arguments, const std::string& before = "") {
  const std::filesystem::path dir = testing::TempDir();
  const std::string out = dir / (TestName() + ".out"), err = dir / (TestName() + ".err");
  const int status = std::system(
      StrCat("(", before, " exec ", KVQ_BENCH_EXE, " ", arguments, ") >", out, " 2>", err, " </dev/null").c_str());
  const auto read = [](const std::string& path) {
    std::ifstream file(path);
    return std::string((std::istreambuf_iterator<char>(file)), {});
  };
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read(out), read(err)};
}

// benchmarks.json by name.
inline std::map<std::string, nlohmann::json> ByName(const std::string& text) {
  std::map<std::string, nlohmann::json> runs;
  const nlohmann::json all = nlohmann::json::parse(text);
  for (const auto& run : all["benchmarks"]) runs[run["name"]] = run;
  return runs;
}

}  // namespace kvq
