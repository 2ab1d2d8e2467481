#pragma once

#include <cstdint>
#include <functional>

namespace normformer {

/// Calls body(thread, index) for every index in [0, count), in `threads` threads that each take the next
/// index; `thread` is below `threads`. Where bodies throw, the exception of the lowest index is thrown when
/// all have stopped, so that the same input gives the same error however threads are scheduled.
void parallel_for(int threads, int64_t count, const std::function<void(int thread, int64_t index)>& body);

}  // namespace normformer
