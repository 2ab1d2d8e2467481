#pragma once

#include <filesystem>
#include <optional>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/config/run_config.h"
#include "normformer/training/run.h"

#include "ranks.h"

namespace normformer {

/// A run's newest checkpoint, or the checkpoint "step-..." itself. DataError where there is none.
CheckpointReader open_checkpoint(FileSystem& files, const std::filesystem::path& where);

/// The folder of the run that has written a checkpoint, where it still stands in it.
RunFolder run_folder_of(const CheckpointReader& reader);

/// `normformer checkpoint diff`: prints what differs between two checkpoints. Returns 0 where nothing does,
/// else 1.
int diff_checkpoints(const std::filesystem::path& a, const std::filesystem::path& b);

/// `normformer checkpoint reshard`: writes a checkpoint anew as the first one of the run's folder `to`, in
/// one data file for each rank, and for another precision where one is given, and beside it the
/// configuration and, where the first run's folder has them, tokenizer and names of classes. Throws
/// AgreedError. Collective over process.world.
int reshard_checkpoint(const std::filesystem::path& from, const std::filesystem::path& to,
                       std::optional<Precision> precision, const RankProcess& process);

}  // namespace normformer
