// The command line of kvqbench.
#pragma once

#include <regex>
#include <string>
#include <vector>

#include "benchmarks/measurement.h"

namespace kvq {

// Where and how results are written: Google Benchmark's flags of the same names.
struct OutputOptions {
  std::string filter = ".*";    // --benchmark_filter
  std::string format = "console";
  std::string out;              // --benchmark_out, always JSON
  std::string patch;            // --patch: measures these again in `out`
  bool backup = true;           // --no-backup
  std::string summary_file;     // --summary-file
  bool list_tests = false;
  bool list_devices = false;
  bool list_presets = false;
  std::string to_v2;              // --to-v2: a folder; nothing is measured
  std::vector<std::string> files;  // what it converts
};

struct CommandLine {
  Options options;
  OutputOptions output;
  bool help = false;
  std::vector<std::string> rest;  // for benchmark::Initialize
};

// Items with commas between them.
std::string Join(const std::vector<std::string>& items);

// From `least` to a thousand millions. Throws InputError naming the flag.
int64_t WholeNumber(const std::string& flag, const std::string& text, int64_t least);

// "24GiB", "23.5GB", "512MiB", "1000000": bytes, at least one. Throws InputError naming the flag.
int64_t MemorySize(const std::string& flag, const std::string& text);

// Throws InputError naming the flag.
std::regex CompileRegex(const std::string& flag, const std::string& text);

// Throws InputError naming the flag.
CommandLine ParseCommandLine(const std::vector<std::string>& arguments);

// What --help prints.
std::string HelpText();

}  // namespace kvq
