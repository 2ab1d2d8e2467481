#pragma once

#include <string>

#include "normformer/comm/group.h"

namespace normformer {

/// "NCCL 2.28.9", or why there is none: "this build has no NCCL".
std::string describe_nccl();

/// Whether make_nccl_world works in this build.
bool has_nccl();

/// The ranks of `over` again, whose tensors on GPUs travel by NCCL: collectives in the queue for computing,
/// messages up and messages down each in a queue of their own beside it. Host numbers and texts go as they go
/// in `over`; sums are made here, in the order of ranks, as everywhere. Every rank needs a GPU of its own.
/// What was enqueued is watched: where NCCL reports a failure, or something enqueued is not done within
/// `timeout_seconds`, this process says what it was and ends with ExitCode::hang, and so the job. `context`
/// must outlive the group. ConfigError where the build has no NCCL; CommError where ranks cannot be joined.
/// Collective over the group.
Group make_nccl_world(Context& context, const Group& over, double timeout_seconds = 600.0);

}  // namespace normformer
