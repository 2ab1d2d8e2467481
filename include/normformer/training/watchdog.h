#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <thread>

#include "normformer/comm/ledger_file.h"
#include "normformer/core/activity.h"
#include "normformer/training/heartbeat.h"

namespace normformer {

/// What a Watchdog has to know.
struct WatchdogOptions {
  double limit_seconds = 0.0;        ///< without progress after which the job ends; 0: never
  std::filesystem::path run_folder;  ///< for reports and the heartbeat
  std::filesystem::path ledgers;     ///< where ranks' ledgers are, and the claim of who reports
  int rank = 0;
  int64_t updates = 0;             ///< of the whole run
  double patience_seconds = 20.0;  ///< for a disk that does not take the report; then the job ends without
};

/// Sees to it that a rank which makes no progress for too long says so and ends the job, with
/// ExitCode::hang: see docs/watchdog.md for what it writes. Progress is a call of communication that begins
/// or ends (LedgerFile), a span that begins or a block of a file that is written or read on the thread that
/// made the watchdog (count_activity_in), or a call of a function below. Time in which the whole process does
/// not run (stopped, or its machine asleep) does not count.
///
/// Two threads: one looks, and touches memory only; the other gives signs of life in the ledger, and on rank
/// 0 in heartbeat.json, and may well wait for a disk. Made and destroyed by the rank's own thread; what is
/// below may be called by any.
class Watchdog {
 public:
  explicit Watchdog(WatchdogOptions options);

  /// Ends both threads; a last heartbeat says how the run ended.
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// The run's folder is there, and the ledger too unless it is null: heartbeats and signs of life from now
  /// on. To be called once.
  void open(std::shared_ptr<LedgerFile> ledger);

  /// What the run is at now. Returns what it was at before.
  RunPhase enter(RunPhase phase) noexcept;

  /// An update was made.
  void finish_update(int64_t update, double loss) noexcept;

  /// How the run ended: RunState::failed unless this is called.
  void end(RunState state) noexcept;

 private:
  void look();
  void give_signs();
  void tell(bool& what);
  bool wait(std::chrono::nanoseconds time, const bool& until);
  uint64_t progress() const noexcept;
  Heartbeat heartbeat() const noexcept;
  void write_heartbeat();
  [[noreturn]] void end_job(double seconds);

  const WatchdogOptions options_;
  ActivityCounter activity_{0};
  std::atomic<RunPhase> phase_{RunPhase::starting};
  std::atomic<RunState> state_{RunState::running};
  std::atomic<int64_t> update_{0};
  std::atomic<double> loss_{0.0};
  std::atomic<int64_t> still_ns_{0};  // time without progress
  std::shared_ptr<LedgerFile> owned_ledger_;
  std::atomic<LedgerFile*> ledger_{nullptr};  // that one, once it is there
  std::atomic<bool> has_folder_{false};
  std::mutex heartbeat_mutex_;
  HeartbeatFile heartbeat_file_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool run_is_over_ = false;
  bool signs_are_given_ = false;  // all of them
  std::thread looking_;
  std::thread giving_signs_;
};

/// A phase from construction to destruction, then the one before again.
class PhaseScope {
 public:
  PhaseScope(Watchdog& watchdog, RunPhase phase) : watchdog_(watchdog), before_(watchdog.enter(phase)) {}
  ~PhaseScope() { watchdog_.enter(before_); }
  PhaseScope(const PhaseScope&) = delete;
  PhaseScope& operator=(const PhaseScope&) = delete;

 private:
  Watchdog& watchdog_;
  RunPhase before_;
};

}  // namespace normformer
