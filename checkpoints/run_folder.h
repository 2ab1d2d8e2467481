#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "normformer/core/file_system.h"

namespace normformer {

/// The name of a checkpoint: its updates and, where a run came to the same number again, which time it was.
struct CheckpointName {
  int64_t updates = 0;
  int64_t repeat = 1;
  auto operator<=>(const CheckpointName&) const = default;
};

/// "step-0000000012", "step-0000000012-2".
std::string to_string(const CheckpointName& name);

/// None where a name is not a checkpoint's.
std::optional<CheckpointName> parse_checkpoint_name(std::string_view name);

/// The name for a new checkpoint: one that readers prefer to all that are there of as many updates.
CheckpointName next_name(FileSystem& files, const std::filesystem::path& folder, int64_t updates);

/// The folder in which a checkpoint is written.
std::filesystem::path temporary_folder(const std::filesystem::path& folder, const CheckpointName& name);

/// Removes what saves and removals that did not end have left behind; logs what cannot be removed.
void remove_leftovers(FileSystem& files, const std::filesystem::path& folder);

/// The file of a run's folder of checkpoints that says which start of the run may write there.
inline constexpr const char* kAttemptName = "ATTEMPT";

/// After `saved` was written: keeps it, the `keep` - 1 before it and those after a multiple of `keep_every`
/// updates (0: none), removes other older ones and those of as many updates that it replaces, and renames
/// those of more updates to "set-aside-...". Logs what fails.
void retain(FileSystem& files, const std::filesystem::path& folder, const CheckpointName& saved, int64_t keep,
            int64_t keep_every);

}  // namespace normformer
