#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "normformer/comm/ledger_file.h"

namespace normformer {

/// How a run stands, as one who watches it from outside sees it.
enum class RunState { running, stopped, finished, failed, hang };

/// "running", "stopped", ...
std::string_view name_of(RunState state);

/// What heartbeat.json says (docs/watchdog.md).
struct Heartbeat {
  RunState state = RunState::running;
  RunPhase phase = RunPhase::starting;
  int64_t update = 0;   ///< made last
  int64_t updates = 0;  ///< of the whole run
  double loss = 0.0;    ///< of that update; not finite: null
};

/// A heartbeat as JSON, with time, host, process and NORMFORMER_ATTEMPT.
std::string to_json(const Heartbeat& heartbeat);

/// A file that always holds one whole heartbeat: written under another name and renamed, not synced.
class HeartbeatFile {
 public:
  explicit HeartbeatFile(std::filesystem::path path);

  /// Puts a heartbeat in place of the one before, by one thread at a time. A failure is logged, the first
  /// time, and left at that.
  void write(const Heartbeat& heartbeat) noexcept;

 private:
  std::filesystem::path path_;
  bool has_failed_ = false;
};

}  // namespace normformer
