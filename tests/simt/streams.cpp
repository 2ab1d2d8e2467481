#include "streams.h"

#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "block.h"
#include "simt/control.h"

namespace simt {

struct Work {
  std::function<void()> run;  ///< empty: a wait
  Mark after;
};

class Queue {
 public:
  explicit Queue(bool blocks) : blocking(blocks) {}

  const bool blocking;
  std::deque<Work> work;
  uint64_t done = 0;
  uint64_t enqueued = 0;
  bool busy = false;  ///< a host thread does the work taken last
  uint64_t launches = 0;
  std::optional<std::vector<std::function<void()>>> captured;  ///< while it captures
};

namespace {

/// Every queue, under one lock, which is not held while work is done.
struct Queues {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<uint64_t, std::shared_ptr<Queue>> by_handle;
  uint64_t next_handle = 1;
  std::shared_ptr<Queue> default_queue = std::make_shared<Queue>(true);
};

Queues& queues() {
  static Queues all;
  return all;
}

// Handles are numbers never used again, so that one of a destroyed stream is found out.
uint64_t number_of(cudaStream_t stream) { return reinterpret_cast<uint64_t>(stream); }

void append(Queue& queue, Work work) {
  queue.work.push_back(std::move(work));
  ++queue.enqueued;
}

// The default stream and blocking streams do what was enqueued in one before what is enqueued in the other.
void wait_for_others(const std::shared_ptr<Queue>& queue) {
  if (!queue->blocking) return;
  Queues& all = queues();
  const auto wait_for = [&](const std::shared_ptr<Queue>& other) {
    if (other->done < other->enqueued) append(*queue, {{}, {other, other->enqueued}});
  };
  if (queue != all.default_queue) {
    wait_for(all.default_queue);
    return;
  }
  for (const auto& [handle, other] : all.by_handle) {
    if (other->blocking) wait_for(other);
  }
}

// With the lock held: does the oldest piece of work, or what it waits for.
void step(std::unique_lock<std::mutex>& lock, Queue& queue) {
  Queues& all = queues();
  Work& oldest = queue.work.front();
  if (!oldest.run) {
    const Mark mark = oldest.after;
    if (mark.queue->done < mark.ticket) {
      lock.unlock();
      run_until(mark);
      lock.lock();
      return;
    }
    queue.work.pop_front();
    ++queue.done;
    all.changed.notify_all();
    return;
  }
  const std::function<void()> run = std::move(oldest.run);
  queue.work.pop_front();
  queue.busy = true;
  const auto finish = [&] {
    lock.lock();
    queue.busy = false;
    ++queue.done;
    all.changed.notify_all();
  };
  lock.unlock();
  try {
    run();
  } catch (...) {
    finish();
    throw;
  }
  finish();
}

}  // namespace

std::shared_ptr<Queue> find_queue(cudaStream_t stream) {
  Queues& all = queues();
  const std::lock_guard lock(all.mutex);
  if (stream == nullptr) return all.default_queue;
  const auto found = all.by_handle.find(number_of(stream));
  return found == all.by_handle.end() ? nullptr : found->second;
}

cudaStream_t add_queue(bool blocking) {
  Queues& all = queues();
  const std::lock_guard lock(all.mutex);
  const uint64_t handle = all.next_handle++;
  all.by_handle[handle] = std::make_shared<Queue>(blocking);
  return reinterpret_cast<cudaStream_t>(handle);
}

bool remove_queue(cudaStream_t stream) {
  const std::shared_ptr<Queue> queue = stream == nullptr ? nullptr : find_queue(stream);
  if (queue == nullptr) return false;
  run_until(mark_end(queue));
  Queues& all = queues();
  const std::lock_guard lock(all.mutex);
  return all.by_handle.erase(number_of(stream)) == 1;
}

bool begin_capture(const std::shared_ptr<Queue>& queue) {
  const std::lock_guard lock(queues().mutex);
  if (queue->captured) return false;
  queue->captured.emplace();
  return true;
}

std::optional<std::vector<std::function<void()>>> end_capture(const std::shared_ptr<Queue>& queue) {
  const std::lock_guard lock(queues().mutex);
  return std::exchange(queue->captured, std::nullopt);
}

bool captures(const std::shared_ptr<Queue>& queue) {
  const std::lock_guard lock(queues().mutex);
  return queue->captured.has_value();
}

void enqueue(const std::shared_ptr<Queue>& queue, std::function<void()> work) {
  const std::lock_guard lock(queues().mutex);
  if (queue->captured) {
    queue->captured->push_back(std::move(work));
    return;
  }
  wait_for_others(queue);
  append(*queue, {std::move(work), {}});
}

void enqueue_host_work(cudaStream_t stream, std::function<void()> work) {
  const auto queue = find_queue(stream);
  if (queue == nullptr) throw std::invalid_argument("work for a stream that is none");
  enqueue(queue, std::move(work));
}

void enqueue_wait(const std::shared_ptr<Queue>& queue, const Mark& mark) {
  const std::lock_guard lock(queues().mutex);
  append(*queue, {{}, mark});
}

Mark mark_end(const std::shared_ptr<Queue>& queue) {
  const std::lock_guard lock(queues().mutex);
  return {queue, queue->enqueued};
}

bool reached(const Mark& mark) {
  const std::lock_guard lock(queues().mutex);
  return mark.queue->done >= mark.ticket;
}

void run_until(const Mark& mark) {
  if (in_kernel()) throw std::logic_error("a kernel waits for a stream");
  Queues& all = queues();
  std::unique_lock lock(all.mutex);
  while (mark.queue->done < mark.ticket) {
    if (mark.queue->busy) {
      all.changed.wait(lock);
    } else {
      step(lock, *mark.queue);
    }
  }
}

void run_all() {
  std::vector<Mark> marks;
  {
    Queues& all = queues();
    const std::lock_guard lock(all.mutex);
    marks.push_back({all.default_queue, all.default_queue->enqueued});
    for (const auto& [handle, queue] : all.by_handle) marks.push_back({queue, queue->enqueued});
  }
  for (const Mark& mark : marks) run_until(mark);
}

uint64_t count_launch(const std::shared_ptr<Queue>& queue) {
  const std::lock_guard lock(queues().mutex);
  return queue->launches++;
}

}  // namespace simt
