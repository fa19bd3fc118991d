#include "kernels/runtime/captured_graph.h"

#include <stdexcept>

#include "kernels/runtime/cuda_check.h"

namespace kvq {

CapturedGraph::~CapturedGraph() {
  if (executable_ != nullptr) {
    cudaStreamSynchronize(stream_);
    cudaGraphExecDestroy(executable_);
  }
  if (graph_ != nullptr) cudaGraphDestroy(graph_);
}

void CapturedGraph::Begin(cudaStream_t stream) {
  if (graph_ != nullptr) throw std::logic_error("a graph is captured once");
  stream_ = stream;
  // Of this thread alone: others may allocate, as those that watch the GPU do.
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin of the capture");
}

void CapturedGraph::Abandon() {
  cudaGraph_t unfinished = nullptr;
  cudaStreamEndCapture(stream_, &unfinished);
  if (unfinished != nullptr) cudaGraphDestroy(unfinished);
  cudaGetLastError();  // that the capture is invalid says nothing that the exception does not
}

void CapturedGraph::End() {
  Check(cudaStreamEndCapture(stream_, &graph_), "end of the capture");
  Check(cudaGraphInstantiate(&executable_, graph_, 0), "instantiation of the graph");
  Check(cudaGraphUpload(executable_, stream_), "upload of the graph");
}

void CapturedGraph::Launch() { Check(cudaGraphLaunch(executable_, stream_), "launch of a graph"); }

size_t CapturedGraph::nodes() const {
  size_t nodes = 0;
  Check(cudaGraphGetNodes(graph_, nullptr, &nodes), "nodes of the graph");
  return nodes;
}

}  // namespace kvq
