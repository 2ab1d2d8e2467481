#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "normformer/training/metrics.h"
#include "normformer/training/statistics.h"
#include "normformer/training/trainer.h"

namespace normformer {

/// One record of a TFRecord file: length, checksum of the length, `data`, checksum of `data`; little-endian,
/// checksums CRC-32C, masked as readers expect.
std::string tfrecord(std::string_view data);

/// A run's metrics as TensorBoard reads them: a folder of event files, one for each start of the run. A
/// value's step is its update. Written by rank 0 only; flushed record by record, so that a killed run leaves
/// at most one torn record, at the end, which readers leave out. A full disk is told and does not end the
/// run.
class TensorBoardFile {
 public:
  /// Begins a new file in `folder`, which is made. Tells readers to forget what earlier files have of updates
  /// after `counters.updates` (from a run that went on and was lost). Throws IoError.
  TensorBoardFile(const std::filesystem::path& folder, const TrainingCounters& counters);

  /// Loss, perplexity (of a classifier accuracy), gradient norm, learning rate, loss scale (fp16) and speed;
  /// nothing of a step that was skipped, which is no update.
  void write_step(const FinishedStep& step, const Speed& speed);

  /// Loss and perplexity, or accuracy.
  void write_validation(const TrainingCounters& counters, const EvaluationResult& result);

  /// A histogram, named "distributions/" and the parameter's name.
  void write_distribution(const TrainingCounters& counters, const Distribution& distribution);

  /// The run's resolved configuration, shown as it stands in its file.
  void write_config(const TrainingCounters& counters, const std::string& toml);

  /// The run went back to `to`: what was written of later updates no longer counts.
  void write_rollback(const TrainingCounters& to);

 private:
  void write_record(const std::string& event);
  void cut_torn_record();

  std::filesystem::path path_;
  std::ofstream file_;
  uintmax_t bytes_ = 0;  // of whole records
};

}  // namespace normformer
