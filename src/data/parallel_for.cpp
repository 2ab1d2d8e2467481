#include "parallel_for.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace normformer {

void parallel_for(int threads, int64_t count, const std::function<void(int thread, int64_t index)>& body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  int64_t failed_index = count;
  std::exception_ptr failure;

  const auto work = [&](int thread) {
    while (!failed) {
      const int64_t index = next++;
      if (index >= count) return;
      try {
        body(thread, index);
      } catch (...) {
        const std::lock_guard lock(mutex);
        failed = true;
        if (index < failed_index) {
          failed_index = index;
          failure = std::current_exception();
        }
      }
    }
  };
  {
    std::vector<std::jthread> pool;
    const auto helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
    for (int thread = 1; thread <= helpers; ++thread) pool.emplace_back(work, thread);
    work(0);
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace normformer
