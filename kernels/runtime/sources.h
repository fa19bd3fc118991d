// The text of this build's device code and of what it includes, as CMake has embedded it.
#pragma once

#include <string>
#include <vector>

namespace kvq {

struct EmbeddedSource {
  std::string path;  // in the repository, "kernels/device/step.cuh"
  std::string text;
};
std::vector<EmbeddedSource> EmbeddedSources();

}  // namespace kvq
