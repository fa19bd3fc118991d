// The CPU's twins of kernels/device/experts.h, for any sizes and rows, and float32 as well.
#pragma once

#include "kernels/device/experts.h"
#include "kernels/host/step.h"

namespace kvq::host {

// `chosen` of the logits, and the shares that go with them: [rows, per_token].
void ChooseExperts(const ExpertsArgs& args, float* shares);
// out [rows, hidden], rounded, of x; `gated` and `partial` are not used. Each expert is read once, for all rows that chose it.
void Experts(const ExpertsArgs& args, void* out);

}  // namespace kvq::host
