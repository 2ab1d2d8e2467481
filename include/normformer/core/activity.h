#pragma once

#include <atomic>
#include <cstdint>

namespace normformer {

/// What a thread has done so far, as a number that only grows: whoever watches looks whether it does. Spans
/// (TraceScope) and blocks of files (FileSystem) count.
using ActivityCounter = std::atomic<uint64_t>;

/// From now on the calling thread's activity counts there too; null for nowhere. The counter may be shared
/// by several threads and must outlive what they do.
void count_activity_in(ActivityCounter* counter) noexcept;

/// Where the calling thread's activity counts, for handing to a thread that it starts; null for nowhere.
ActivityCounter* activity_counter() noexcept;

/// The calling thread has done something.
void note_activity() noexcept;

}  // namespace normformer
