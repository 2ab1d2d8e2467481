#include "normformer/tensor/thread_pool.h"

#include <algorithm>

#include "normformer/core/checked.h"
#include "normformer/core/error.h"

namespace normformer {

ThreadPool::ThreadPool(int threads) {
  NF_CHECK(threads >= 1, "a thread pool of {} threads", threads);
  workers_.reserve(static_cast<size_t>(threads - 1));
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { worker_loop(); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t n, int64_t grain, Call call, void* body) {
  NF_CHECK(n >= 0 && grain >= 1, "a loop of {} in runs of {}", n, grain);
  if (n == 0) return;
  const Job job{call, body, n, grain};
  if (workers_.empty() || n <= grain) {
    for (int64_t begin = 0; begin < n; begin += grain) call(body, begin, std::min(n, begin + grain));
    return;
  }
  job_ = job;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  work_on(job);
  for (int left = busy_.load(std::memory_order_acquire); left != 0;
       left = busy_.load(std::memory_order_acquire)) {
    busy_.wait(left, std::memory_order_acquire);
  }
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void ThreadPool::work_on(const Job& job) noexcept {
  const int64_t runs = ceil_div(job.n, job.grain);
  for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < runs;
       i = next_.fetch_add(1, std::memory_order_relaxed)) {
    try {
      job.call(job.body, i * job.grain, std::min(job.n, (i + 1) * job.grain));
    } catch (...) {
      const std::lock_guard lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }
}

void ThreadPool::worker_loop() {
  uint32_t seen = 0;
  while (true) {
    epoch_.wait(seen, std::memory_order_acquire);
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_acquire)) return;
    work_on(job_);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
  }
}

}  // namespace normformer
