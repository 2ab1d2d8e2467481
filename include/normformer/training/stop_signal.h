#pragma once

namespace normformer {

/// Turns signals into a request to stop after the current step. SIGUSR1 always; SIGINT and SIGTERM too where
/// `with_terminal_signals`, for a single process (mpirun gives its ranks no time on these). A second signal
/// of the same kind ends the process at once. Restores the handlers when it goes. At most one exists at a
/// time.
class StopSignal {
 public:
  explicit StopSignal(bool with_terminal_signals);
  ~StopSignal();
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;

  /// Whether a signal has come to this process. Ranks must agree before they act on it.
  bool requested() const;

 private:
  bool with_terminal_signals_;
};

}  // namespace normformer
