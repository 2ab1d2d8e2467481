#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "simt/runtime_api.h"

namespace simt {

/// A stream's queue of work.
class Queue;

/// A place in a queue: reached once all work enqueued before it is done.
struct Mark {
  std::shared_ptr<Queue> queue;
  uint64_t ticket = 0;
};

/// Null where the handle is none, or no longer. The null handle is the default stream, which waits for
/// streams made without cudaStreamNonBlocking and they for it.
std::shared_ptr<Queue> find_queue(cudaStream_t stream);
cudaStream_t add_queue(bool blocking);
/// False where the handle is none. Work that is left is done first.
bool remove_queue(cudaStream_t stream);

/// From now on work goes into a list of its own, until end_capture() takes that away. False where the queue
/// captures already.
bool begin_capture(const std::shared_ptr<Queue>& queue);
std::optional<std::vector<std::function<void()>>> end_capture(const std::shared_ptr<Queue>& queue);
bool captures(const std::shared_ptr<Queue>& queue);

/// Appends work.
void enqueue(const std::shared_ptr<Queue>& queue, std::function<void()> work);

/// Appends a wait for a place in another queue.
void enqueue_wait(const std::shared_ptr<Queue>& queue, const Mark& mark);

/// The place behind all work enqueued so far.
Mark mark_end(const std::shared_ptr<Queue>& queue);

bool reached(const Mark& mark);

/// Does work until the place is reached, on this host thread or by waiting for one that does it already. What
/// a piece of work throws is thrown here, and the piece counts as done.
void run_until(const Mark& mark);

/// As run_until() for the end of every queue.
void run_all();

/// Launches so far, to run every second one backwards.
uint64_t count_launch(const std::shared_ptr<Queue>& queue);

}  // namespace simt
