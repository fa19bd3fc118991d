// The flags of kvqserve.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kvq {

struct Flags {
  std::string model = "smollm2-135m", spec = "none", backend = "sdpa";
  std::string device = "cpu", dtype = "auto", kv_dtype = "auto";
  std::string host = "127.0.0.1";
  int64_t context = 0, port = 8000, parallel = 1, queue = 64, body_mib = 8;
  bool reuse = true, help = false;
};

extern const char kServerHelp[];

// Throws InputError for flags that are none.
Flags ParseFlags(const std::vector<std::string>& arguments);

}  // namespace kvq
