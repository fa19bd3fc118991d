// Where kvqbench keeps what takes long to bring or to make.
#pragma once

#include <cstdlib>
#include <string>

namespace kvq {

// $KVQ_CACHE, or ~/.cache/kvqbench.
inline std::string CacheDir() {
  if (const char* cache = std::getenv("KVQ_CACHE"); cache != nullptr && *cache != '\0') return cache;
  const char* home = std::getenv("HOME");
  return std::string(home != nullptr ? home : "/root") + "/.cache/kvqbench";
}

}  // namespace kvq
