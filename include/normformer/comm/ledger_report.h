#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "normformer/comm/ledger_file.h"

namespace normformer {

/// What this host's system knows of a rank's process; `unknown` where it is another host's.
enum class ProcessState { unknown, running, stopped, gone };

/// Asks this host's system.
ProcessState state_of_process(const RankLedger& ledger);

/// A rank that is known not to run while others do.
struct AbsentRank {
  int rank = 0;
  std::string why;  ///< "stopped", "not running", "not alive since 14:03:07.123, 12.3 s before others"
};

/// Who is known not to run: by this host's system, or because the last sign of life in its ledger is older by
/// more than `silent_after_ns` than the newest of another's. Ranks that have ended in good order are not
/// among them, and nobody is where no rank runs any more. Sorted by rank.
std::vector<AbsentRank> find_absent(std::span<const RankLedger> ledgers, int64_t silent_after_ns);

/// "rank 3 on node1, process 9555 (stopped), in update 40, saving, without progress for 3.2 s".
std::string describe_rank(const RankLedger& ledger);

/// Each rank with its last `calls` calls, newest last: a line for each.
std::string report_calls(std::span<const RankLedger> ledgers, size_t calls);

/// Who waits for what, and who is missing and why: a line for each.
std::string report_diagnosis(std::span<const RankLedger> ledgers, int64_t silent_after_ns);

/// "14:03:07.123", UTC.
std::string time_of_day(int64_t ns);

}  // namespace normformer
