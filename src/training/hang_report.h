#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "normformer/comm/ledger_file.h"

namespace normformer {

/// What a rank knows when it finds that it makes no progress.
struct Hang {
  std::filesystem::path run_folder;
  std::filesystem::path ledgers;  ///< empty where there are none yet
  int rank = 0;
  double limit_seconds = 0.0;
  double seconds = 0.0;  ///< without progress
  RunPhase phase = RunPhase::starting;
  int64_t update = 0;  ///< made last
};

/// Tells people of a hang: writes what this rank's threads are in (`stacks`) to stacks-rank-NNNNN.txt; and,
/// on the one rank of the run that gets to it first, what all ranks do to hang-TIME.txt and stderr. Returns
/// once that rank has given the others time to write their stacks. May wait for a disk for ever.
void tell_hang(const Hang& hang, const std::string& stacks);

/// "rank 2 has made no progress for 600.0 s (health.watchdog_seconds is 600), saving after update 40"
std::string sentence_of(const Hang& hang);

}  // namespace normformer
