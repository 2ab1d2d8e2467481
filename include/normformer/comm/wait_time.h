#pragma once

#include <cstdint>

namespace normformer {

/// How long the calling thread has waited for other ranks so far, in nanoseconds, inside calls of Group and
/// CommRequest: bytes that are moved are waited for too. Where a transport only enqueues on a GPU, the GPU
/// waits, and not this thread.
int64_t nanoseconds_waited();

}  // namespace normformer
