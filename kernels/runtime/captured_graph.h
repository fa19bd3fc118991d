// A CUDA graph with the scratch memory of its kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/runtime/scratch.h"

namespace kvq {

class CapturedGraph {
 public:
  CapturedGraph() = default;
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;
  ~CapturedGraph();  // waits for what was launched

  // Does `work` as it is, with scratch memory that stays for the capture: nothing is to be allocated in one. Libraries
  // get theirs here, too.
  template <typename Work>
  void Rehearse(const Work& work) {
    scratch_.Keep(work);
  }

  // What `work` enqueues on `stream`, and on streams that it forks from it and joins to it. Throws OutOfMemory where
  // the device has no room for the graph; whatever is thrown, the stream captures no longer.
  template <typename Work>
  void Capture(cudaStream_t stream, const Work& work) {
    Begin(stream);
    try {
      scratch_.Keep(work);
    } catch (...) {
      Abandon();
      throw;
    }
    End();
  }

  bool captured() const { return executable_ != nullptr; }
  void Launch();  // on the stream on which it was captured
  size_t nodes() const;

 private:
  void Begin(cudaStream_t stream);
  void Abandon();
  void End();

  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
  ScratchKeeper scratch_;
};

}  // namespace kvq
