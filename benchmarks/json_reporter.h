// Google Benchmark's JSON, with lists: counters `NAME[0]`, `NAME[1]`, ... of a run (AddList) are
// written as one array `"NAME": [...]`, rounded to float32, behind its other numbers. A histogram
// or the channels of a layer would otherwise be thousands of keys. Numbers that are not finite are null.
#pragma once

#include <benchmark/benchmark.h>

#include <vector>

namespace kvq {

class JsonReporter : public benchmark::JSONReporter {
 public:
  void ReportRuns(const std::vector<Run>& runs) override;
};

}  // namespace kvq
