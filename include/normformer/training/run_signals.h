#pragma once

#include <cstdint>

namespace normformer {

/// Turns signals into requests to a run. SIGUSR1 asks to stop after the current step, SIGUSR2 for a
/// checkpoint after it; SIGINT and SIGTERM ask to stop, too, where `with_terminal_signals`, for a single
/// process (mpirun gives its ranks no time on these): a second one of these ends the process at once. When
/// this goes, the system's own handlers are back, save that SIGUSR2 is ignored: what it asks for has been
/// done. At most one exists at a time.
class RunSignals {
 public:
  explicit RunSignals(bool with_terminal_signals);
  ~RunSignals();
  RunSignals(const RunSignals&) = delete;
  RunSignals& operator=(const RunSignals&) = delete;

  /// Whether this process was asked to stop. Ranks must agree before they act on it.
  bool requested_stop() const;

  /// How often this process was asked for a checkpoint. Ranks may hear of one request in different steps: the
  /// most that one has heard of tells all (FinishedStep::save_requests).
  int64_t save_requests() const;

 private:
  bool with_terminal_signals_;
};

}  // namespace normformer
