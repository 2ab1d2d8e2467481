#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <cuda_runtime.h>
#include <nccl.h>

namespace normformer {

/// Looks after all communicators of a process from a thread of its own: ends the process with ExitCode::hang
/// where one of them fails, or where something enqueued is not done in time.
class NcclWatch {
 public:
  explicit NcclWatch(double timeout_seconds);
  ~NcclWatch();
  NcclWatch(const NcclWatch&) = delete;
  NcclWatch& operator=(const NcclWatch&) = delete;

  /// From now on until remove() failures of `communicator` end the process.
  void add(ncclComm_t communicator, std::string name);
  void remove(ncclComm_t communicator);

  /// While this is held the watch keeps off all communicators: NCCL lets one thread at a time work with one,
  /// and to ask a communicator how it does is to work with it.
  [[nodiscard]] std::unique_lock<std::mutex> hold() { return std::unique_lock(mutex_); }

  /// Everything enqueued on `stream` so far must be done within the time-out.
  void expect(cudaStream_t stream, std::string what);

 private:
  struct Watched {
    ncclComm_t communicator;
    std::string name;
  };
  struct Expected {
    cudaEvent_t done;
    std::string what;
    std::chrono::steady_clock::time_point since;
  };

  void watch();
  void check_communicators();
  void check_expected();
  cudaEvent_t take_event();
  [[noreturn]] void end(const std::string& reason);

  const std::chrono::duration<double> timeout_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::vector<Watched> communicators_;
  std::deque<Expected> expected_;
  std::vector<cudaEvent_t> free_events_;
  int device_ = 0;
  std::thread thread_;
};

}  // namespace normformer
