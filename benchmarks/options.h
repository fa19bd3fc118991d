// The command line of kvqbench.
#pragma once

#include <string>
#include <vector>

#include "benchmarks/measurement.h"

namespace kvq {

// Where and how results are written: Google Benchmark's flags of the same names.
struct OutputOptions {
  std::string filter = ".*";    // --benchmark_filter
  std::string format = "console";
  std::string out;              // --benchmark_out, always JSON
  bool list_tests = false;
  std::string to_v2;              // --to-v2: a folder; nothing is measured
  std::vector<std::string> files;  // what it converts
};

struct CommandLine {
  Options options;
  OutputOptions output;
  bool help = false;
  std::vector<std::string> rest;  // for benchmark::Initialize
};

// Throws InputError naming the flag.
CommandLine ParseCommandLine(const std::vector<std::string>& arguments);

// What --help prints.
std::string HelpText();

}  // namespace kvq
