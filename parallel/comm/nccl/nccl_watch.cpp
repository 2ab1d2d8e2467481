#include "nccl_watch.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "normformer/core/error.h"

namespace normformer {

namespace {

constexpr std::chrono::milliseconds kPause(200);

}  // namespace

NcclWatch::NcclWatch(double timeout_seconds) : timeout_(timeout_seconds) {
  cudaGetDevice(&device_);
  thread_ = std::thread([this] { watch(); });
}

NcclWatch::~NcclWatch() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
  for (const Expected& e : expected_) cudaEventDestroy(e.done);
  for (const cudaEvent_t event : free_events_) cudaEventDestroy(event);
}

void NcclWatch::add(ncclComm_t communicator, std::string name) {
  const std::lock_guard lock(mutex_);
  communicators_.push_back({communicator, std::move(name)});
}

void NcclWatch::remove(ncclComm_t communicator) {
  const std::lock_guard lock(mutex_);
  std::erase_if(communicators_, [&](const Watched& w) { return w.communicator == communicator; });
}

cudaEvent_t NcclWatch::take_event() {
  if (free_events_.empty()) {
    cudaEvent_t made = nullptr;
    NF_CHECK(cudaEventCreateWithFlags(&made, cudaEventDisableTiming) == cudaSuccess,
             "no event could be made");
    return made;
  }
  const cudaEvent_t event = free_events_.back();
  free_events_.pop_back();
  return event;
}

void NcclWatch::expect(cudaStream_t stream, std::string what) {
  const std::lock_guard lock(mutex_);
  const cudaEvent_t done = take_event();
  NF_CHECK(cudaEventRecord(done, stream) == cudaSuccess, "an event could not be recorded for {}", what);
  expected_.push_back({done, std::move(what), std::chrono::steady_clock::now()});
}

void NcclWatch::watch() {
  cudaSetDevice(device_);
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, kPause, [this] { return stop_; })) {
    check_communicators();
    check_expected();
  }
}

void NcclWatch::check_communicators() {
  for (const Watched& w : communicators_) {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(w.communicator, &state);
    if (asked == ncclSuccess && (state == ncclSuccess || state == ncclInProgress)) continue;
    end(fmt::format("group {}: NCCL: {} ({})", w.name,
                    ncclGetErrorString(asked == ncclSuccess ? state : asked),
                    ncclGetLastError(w.communicator)));
  }
}

void NcclWatch::check_expected() {
  while (!expected_.empty()) {
    const cudaError_t state = cudaEventQuery(expected_.front().done);
    if (state == cudaErrorNotReady) break;
    if (state != cudaSuccess)
      end(fmt::format("{}: CUDA: {}", expected_.front().what, cudaGetErrorString(state)));
    free_events_.push_back(expected_.front().done);
    expected_.pop_front();
  }
  if (expected_.empty()) return;
  const Expected& oldest = expected_.front();
  if (std::chrono::steady_clock::now() - oldest.since < timeout_) return;
  end(fmt::format("{} was not done after {:.0f} s, {} later ones wait", oldest.what, timeout_.count(),
                  expected_.size() - 1));
}

void NcclWatch::end(const std::string& reason) {
  std::fprintf(stderr, "%s%s\n", rank_prefix().c_str(), reason.c_str());
  std::fflush(stderr);
  // Kernels that wait for other ranks hold the GPU until their communicator is aborted.
  for (const Watched& w : communicators_) ncclCommAbort(w.communicator);
  std::_Exit(static_cast<int>(ExitCode::hang));
}

}  // namespace normformer
