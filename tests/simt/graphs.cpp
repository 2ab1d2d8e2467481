#include <functional>
#include <memory>
#include <vector>

#include "simt/control.h"
#include "simt/runtime_api.h"
#include "streams.h"

struct CUgraph_st {
  std::vector<std::function<void()>> work;
};

struct CUgraphExec_st {
  std::shared_ptr<const std::vector<std::function<void()>>> work;
};

namespace {

simt::GraphCounts counted;

std::shared_ptr<const std::vector<std::function<void()>>> work_of(cudaGraph_t graph) {
  return std::make_shared<const std::vector<std::function<void()>>>(graph->work);
}

}  // namespace

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const auto queue = simt::find_queue(stream);
  if (stream == nullptr || queue == nullptr) return cudaErrorInvalidResourceHandle;
  return simt::begin_capture(queue) ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  const auto queue = simt::find_queue(stream);
  if (queue == nullptr) return cudaErrorInvalidResourceHandle;
  auto captured = simt::end_capture(queue);
  if (!captured) return cudaErrorInvalidValue;
  *graph = new CUgraph_st{std::move(*captured)};
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  ++counted.instantiated;
  *executable = new CUgraphExec_st{work_of(graph)};
  return cudaSuccess;
}

cudaError_t cudaGraphExecUpdate(cudaGraphExec_t executable, cudaGraph_t graph,
                                cudaGraphExecUpdateResultInfo*) {
  if (executable->work->size() != graph->work.size()) return cudaErrorGraphExecUpdateFailure;
  ++counted.updated;
  executable->work = work_of(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const auto queue = simt::find_queue(stream);
  if (queue == nullptr) return cudaErrorInvalidResourceHandle;
  ++counted.launched;
  simt::enqueue(queue, [work = executable->work] {
    for (const auto& piece : *work) piece();
  });
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

namespace simt {

GraphCounts graph_counts() { return counted; }

}  // namespace simt
