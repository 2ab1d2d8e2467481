#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace normformer {

/// A few threads that share loops with the thread that owns them. All parallel loops of a rank go through
/// one.
class ThreadPool {
 public:
  /// `threads` counts the calling thread: 1 starts none.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls body(begin, end) for [0, n) cut into runs of `grain`, each run once, on some thread, and waits for
  /// all. The cut depends on n and grain alone, so a result that is computed per run does not depend on the
  /// number of threads. The first exception thrown by a body is rethrown here. Not reentrant; called by the
  /// owner only.
  template <class Body>
  void parallel_for(int64_t n, int64_t grain, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run(
        n, grain, [](void* b, int64_t begin, int64_t end) { (*static_cast<Plain*>(b))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Call = void (*)(void* body, int64_t begin, int64_t end);
  struct Job {
    Call call = nullptr;
    void* body = nullptr;
    int64_t n = 0;
    int64_t grain = 1;
  };

  void run(int64_t n, int64_t grain, Call call, void* body);
  void work_on(const Job& job) noexcept;
  void worker_loop();

  std::vector<std::thread> workers_;
  Job job_;
  std::atomic<uint32_t> epoch_{0};  // rises with every job; workers wait for it
  std::atomic<int64_t> next_{0};    // the next run to be claimed
  std::atomic<int> busy_{0};        // workers that have not finished the job
  std::atomic<bool> stop_{false};
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
};

}  // namespace normformer
