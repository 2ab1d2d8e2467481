#pragma once

#include <filesystem>
#include <string>

#include "normformer/comm/group.h"
#include "normformer/config/run_config.h"
#include "normformer/core/error.h"
#include "normformer/tensor/context.h"
#include "normformer/training/profile.h"

namespace normformer {

/// What a command line adds to a run's configuration.
struct RunOptions {
  bool resume =
      false;  ///< go on from the newest checkpoint of the run's folder, or start where there is none
  std::filesystem::path dump_gradients;  ///< write the next step's gradients here, as safetensors, and end
  ProfiledUpdates profile;               ///< trace these updates into a file of the run's folder
  bool stop_on_terminal_signals =
      false;  ///< also SIGINT and SIGTERM stop cleanly: for one process without mpirun
};

/// The files of a run's folder.
struct RunFolder {
  std::filesystem::path root;
  std::filesystem::path config() const { return root / "config.toml"; }
  std::filesystem::path metrics() const { return root / "metrics.jsonl"; }
  std::filesystem::path statistics() const { return root / "statistics.jsonl"; }
  std::filesystem::path tensorboard() const { return root / "tensorboard"; }
  std::filesystem::path log() const { return root / "log.txt"; }
  std::filesystem::path trace(const ProfiledUpdates& updates) const {
    return root / fmt::format("trace_{}-{}.json", updates.first, updates.last);
  }
  /// A pipeline's pictures: "measured" or "simulated".
  std::filesystem::path timeline(const ProfiledUpdates& updates, const char* how) const {
    return root / fmt::format("pipeline_{}_{}.svg", updates.last, how);
  }
  std::filesystem::path tokenizer() const { return root / "tokenizer"; }
  /// The names of a classifier's classes, in the order of their numbers (write_class_names).
  std::filesystem::path classes() const { return root / "classes.json"; }
  /// What every rank is doing (LedgerFile): a file each.
  std::filesystem::path ledgers() const { return root / "ledger"; }
  std::filesystem::path checkpoints() const { return root / "checkpoints"; }
};

/// Trains as configured: from start or newest checkpoint to the last update, with validation, metrics and
/// checkpoints, or until a stop signal (RunSignals). A hang ends the process with ExitCode::hang (Watchdog).
/// Returns ExitCode::success, or ExitCode::stopped after a signal. Throws AgreedError for what the user has
/// to mend. Collective over `world`.
ExitCode run_training(const RunConfig& config, const RunOptions& options, Context& context,
                      const Group& world);

}  // namespace normformer
