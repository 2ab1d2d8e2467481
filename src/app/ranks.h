#pragma once

#include <functional>

#include "normformer/comm/group.h"
#include "normformer/config/run_config.h"

namespace normformer {

/// One process among the ranks of a job.
struct RankProcess {
  Group world;
  int local_rank = 0;
  int local_size = 1;

  /// Threads of this rank: as configured, or this host's cores shared by its ranks.
  int threads(const DeviceConfig& device) const;
};

/// Starts MPI, labels the rank and runs `body` on it. A failure that all ranks know of (AgreedError) is
/// printed once and ends all of them in good order; any other is printed by its rank and ends the whole job.
/// Returns the exit code.
int run_on_ranks(int* argc, char*** argv, const std::function<int(const RankProcess&)>& body);

/// Ends with a sentence where this process was started as one of several ranks: for commands that work alone.
void require_single_process(const char* command);

}  // namespace normformer
