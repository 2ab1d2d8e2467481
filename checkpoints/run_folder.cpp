#include "run_folder.h"

#include <algorithm>
#include <charconv>
#include <functional>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/core/error.h"
#include "normformer/core/log.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "step-";
constexpr std::string_view kTemporaryPrefix = ".tmp-";
constexpr std::string_view kRemovalPrefix = ".del-";
constexpr size_t kDigits = 10;

std::optional<int64_t> parse_number(std::string_view digits) {
  int64_t number = 0;
  const char* end = digits.data() + digits.size();
  const auto [last, error] = std::from_chars(digits.data(), end, number);
  if (error != std::errc() || last != end || number < 0) return std::nullopt;
  return number;
}

/// Newest first.
std::vector<CheckpointName> checkpoints_in(FileSystem& files, const fs::path& folder) {
  std::vector<CheckpointName> found;
  if (!files.exists(folder)) return found;
  for (const std::string& name : files.list(folder)) {
    if (const auto parsed = parse_checkpoint_name(name)) found.push_back(*parsed);
  }
  std::sort(found.begin(), found.end(), std::greater<>());
  return found;
}

void log_failures_of(std::string_view what, const std::function<void()>& body) {
  try {
    body();
  } catch (const IoError& e) {
    log_rank(LogLevel::warning, "{}: {}", what, e.what());
  }
}

void set_aside(FileSystem& files, const fs::path& folder, const CheckpointName& name) {
  std::string aside = "set-aside-" + to_string(name);
  for (int64_t n = 2; files.exists(folder / aside); ++n) {
    aside = fmt::format("set-aside-{}-again-{}", to_string(name), n);
  }
  log_rank(LogLevel::warning, "{} is of more updates than the checkpoint just saved: renamed to {}",
           (folder / to_string(name)).string(), aside);
  files.rename(folder / to_string(name), folder / aside);
  files.sync_folder(folder);
}

}  // namespace

std::string to_string(const CheckpointName& name) {
  const std::string base = fmt::format("{}{:0{}}", kPrefix, name.updates, kDigits);
  return name.repeat == 1 ? base : fmt::format("{}-{}", base, name.repeat);
}

std::optional<CheckpointName> parse_checkpoint_name(std::string_view name) {
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const std::string_view rest = name.substr(kPrefix.size());
  const size_t dash = rest.find('-');
  const auto updates = parse_number(rest.substr(0, dash));
  const auto repeat = dash == std::string_view::npos ? 1 : parse_number(rest.substr(dash + 1));
  if (!updates || !repeat) return std::nullopt;
  const CheckpointName parsed{*updates, *repeat};
  if (to_string(parsed) != name) return std::nullopt;
  return parsed;
}

CheckpointName next_name(FileSystem& files, const fs::path& folder, int64_t updates) {
  CheckpointName name{updates, 1};
  for (const CheckpointName& there : checkpoints_in(files, folder)) {
    if (there.updates == updates) name.repeat = std::max(name.repeat, there.repeat + 1);
  }
  return name;
}

fs::path temporary_folder(const fs::path& folder, const CheckpointName& name) {
  return folder / (std::string(kTemporaryPrefix) + to_string(name));
}

void remove_leftovers(FileSystem& files, const fs::path& folder) {
  for (const std::string& name : files.list(folder)) {
    if (!name.starts_with(kTemporaryPrefix) && !name.starts_with(kRemovalPrefix)) continue;
    log_failures_of("cannot remove what an earlier save left",
                    [&] { remove_folder_and_files(files, folder / name); });
  }
}

void retain(FileSystem& files, const fs::path& folder, const CheckpointName& saved, int64_t keep,
            int64_t keep_every) {
  log_failures_of("cannot look for older checkpoints", [&] {
    int64_t kept = 1;
    for (const CheckpointName& name : checkpoints_in(files, folder)) {
      if (name == saved) continue;
      if (name.updates > saved.updates) {
        log_failures_of("cannot set a checkpoint aside", [&] { set_aside(files, folder, name); });
      } else if (name.updates < saved.updates && kept < keep) {
        ++kept;
      } else if (name.updates == saved.updates || keep_every == 0 || name.updates % keep_every != 0) {
        log_failures_of("cannot remove an older checkpoint",
                        [&] { remove_folder_durably(files, folder / to_string(name)); });
      }
    }
  });
}

std::vector<std::string> list_checkpoints(FileSystem& files, const fs::path& folder) {
  std::vector<std::string> names;
  for (const CheckpointName& name : checkpoints_in(files, folder)) names.push_back(to_string(name));
  return names;
}

}  // namespace normformer
