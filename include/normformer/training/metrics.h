#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "normformer/training/trainer.h"

namespace normformer {

/// How fast a run goes, over all ranks.
struct Speed {
  double tokens_per_second = 0.0;
  double flops_per_second = 0.0;  ///< model FLOPs (training_flops_per_token), not what the processors did
  double seconds_left = 0.0;
};

/// Measures steps; forgets slowly, so that the time left follows changes.
class Speedometer {
 public:
  /// `flops_per_token` as training_flops_per_token gives it.
  explicit Speedometer(double flops_per_token);

  /// Enters a step of `tokens` tokens that ended now; pauses since the last step or resume() do not count.
  Speed enter_step(int64_t tokens, int64_t updates_left);

  /// To be called when training goes on after something that is not a step (validation, a checkpoint).
  void resume();

 private:
  using Clock = std::chrono::steady_clock;
  double flops_per_token_;
  Clock::time_point last_;
  double seconds_ = 0.0;  // weighted sums over steps
  double tokens_ = 0.0;
  double steps_ = 0.0;
};

class JsonLines;

/// A run's metrics as JSON lines: one object a step, a validation, a rollback, an explosion. Written by rank
/// 0 only; flushed line by line, so that a killed run leaves at most one torn line, which open() drops.
class MetricsFile {
 public:
  /// Opens for appending. Records of batches after `counters.batch_index` (from a run that went on and was
  /// lost) are dropped, so that a resumed run leaves the file that an uninterrupted one would. Throws
  /// IoError.
  MetricsFile(const std::filesystem::path& path, const TrainingCounters& counters);
  ~MetricsFile();

  /// What the run trains: written once, by the start from which on the file is kept.
  void write_run(const TrainingCounters& counters, int64_t parameters, double flops_per_token);

  void write_step(const FinishedStep& step, const Speed& speed);

  /// Whether it was written: nothing is where there is a validation of as many batches, of a run that ended
  /// behind it and was resumed. `peak_memory`: the bytes that rank 0's tensors took at most so far.
  bool write_validation(const TrainingCounters& counters, const EvaluationResult& result,
                        int64_t peak_memory);

  /// The run went back behind step `from` to counters `to`; batches `first_left_out` ... to.batch_index, the
  /// first of all being 1, have left nothing in its weights.
  void write_rollback(const FinishedStep& from, const TrainingCounters& to, int64_t first_left_out);

  /// The run ended behind this step because it exploded.
  void write_explosion(const FinishedStep& step, ExplosionReason reason);

 private:
  void keep(const nlohmann::json& line);
  double elapsed() const;

  using Clock = std::chrono::steady_clock;
  bool says_run_ = false;
  int64_t validated_at_ = -1;    // batch index of the newest validation
  double elapsed_before_ = 0.0;  // seconds, of earlier starts, up to where this one went on
  Clock::time_point start_ = Clock::now();
  std::unique_ptr<JsonLines> lines_;
};

/// What a person watches: a line that is redrawn on a terminal, or plain lines elsewhere.
class StatusLine {
 public:
  /// `every`: updates between plain lines.
  StatusLine(int64_t updates, int64_t every);
  ~StatusLine();
  StatusLine(const StatusLine&) = delete;
  StatusLine& operator=(const StatusLine&) = delete;

  void show_step(const TrainingCounters& counters, const StepReport& report, const Speed& speed);

  /// Prints a line that stays, above the live one. It and plain lines go to the log file too.
  void show_message(const std::string& message);

 private:
  void clear_live_line();

  int64_t updates_;
  int64_t every_;
  bool is_terminal_;
  bool live_ = false;
  std::chrono::steady_clock::time_point last_drawn_;
};

/// Seconds since 1970, to the millisecond.
double unix_seconds();

/// "1.23 GFLOP/s", "45.6 M", "789": three digits, a prefix and the unit.
std::string with_prefix(double value, std::string_view unit = {});

/// "3 h 12 min", "4 min 5 s", "12 s".
std::string duration_text(double seconds);

}  // namespace normformer
