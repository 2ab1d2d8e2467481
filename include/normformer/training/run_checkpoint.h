#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/config/run_config.h"
#include "normformer/core/file_system.h"
#include "normformer/training/trainer.h"

namespace normformer {

/// This rank's optimizer state as a checkpoint names it; only what this rank owns, or copies too. Shares
/// memory.
std::vector<TensorPiece> checkpoint_pieces(const ShardedOptimizer& optimizer, bool owned_only);

/// Memory that a rank takes to stage what it saves; on the host, whatever the device.
int64_t staging_bytes(const CheckpointConfig& config, const ShardedOptimizer& optimizer);

/// Whether a path is that of one checkpoint, a "step-..." folder, and not of a run.
bool names_checkpoint(const std::filesystem::path& path);

/// open_newest_checkpoint, which fails on every rank alike, with its failures as AgreedError. Collective over
/// `world`.
std::optional<CheckpointReader> open_newest_agreed(const Group& world, FileSystem& files,
                                                   const std::filesystem::path& folder,
                                                   const std::function<void(const CheckpointReader&)>& use,
                                                   bool older_too = true);

/// The checkpoints of one run's folder, in terms of its trainer. Holds no tensors.
class RunCheckpoints {
 public:
  /// `tokenizer_hash` identifies what the tokens mean and `data_fingerprint` which they are, for comparison
  /// on resume.
  RunCheckpoints(const Group& world, std::filesystem::path folder, const RunConfig& config,
                 std::string tokenizer_hash, uint64_t data_fingerprint);

  /// Whether the folder holds any. Not collective.
  bool any() const;

  /// Begins to save everything that the run needs to go on with the same bits; `metrics` are for people. As
  /// CheckpointWriter::begin. Collective over the world.
  std::optional<SaveResult> begin_save(Trainer& trainer, const std::map<std::string, double>& metrics);

  /// What moves the save on.
  CheckpointWriter& writer() { return writer_; }

  /// Fills the trainer from the newest checkpoint that can be read. False where there is none at all. Throws
  /// AgreedError where there are some but none is readable, or where it is of another model. Collective over
  /// the world.
  bool load_newest(Trainer& trainer);

 private:
  std::unique_ptr<FileSystem> files_;
  std::filesystem::path folder_;
  RunConfig config_;
  std::string tokenizer_hash_;
  uint64_t data_fingerprint_;
  CheckpointWriter writer_;
};

}  // namespace normformer
