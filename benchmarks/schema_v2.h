// The reference study's schema, version 2.0 (ci/schema/v2.json), for those whose tools read it.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "fixtures/dataset.h"

namespace kvq {

// model_config of the schema; what a run writes into its context as `model_config <model>`. Where
// layers differ, heads are the first layer's. Parameters are null where there are no weights.
nlohmann::json ModelConfigV2(const ModelFiles& files);

// Converts files of Google Benchmark's JSON: one file a model, backend and spec into `dir`, named as
// the study names its own. Returns their paths. What was not measured is null. A version-2 file has no
// batch size and one perplexity: cells of other batch sizes than 1 are left out, and the perplexity is
// that of the longest context. Throws InputError naming the file that is no result of kvqbench, before
// anything is written.
std::vector<std::string> WriteV2(const std::vector<std::string>& files, const std::string& dir);

}  // namespace kvq
