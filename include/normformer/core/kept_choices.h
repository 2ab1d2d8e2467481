#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

namespace normformer {

/// Where programs of this user keep what can be made again: $NORMFORMER_CACHE, or else normformer/ in
/// $XDG_CACHE_HOME, or else in ~/.cache; nothing where no such variable is set.
std::optional<std::filesystem::path> cache_folder();

/// Choices that measuring has made, kept in a file so that later runs, and other processes that share it,
/// choose alike. A line of the file is a key, a tab and a choice.
class KeptChoices {
 public:
  /// The file and its folder are made when the first choice is kept.
  explicit KeptChoices(std::filesystem::path file);

  /// What is kept under `key`, or else what `choose` returns, kept from then on. `choose` runs while a lock
  /// on the file keeps others from choosing: it must not wait for another process. Neither keys nor choices
  /// hold tabs or line ends. Nothing, and a line in the log, where the file cannot be read or written.
  /// Exceptions of `choose` pass. Safe from several threads and processes with objects of their own.
  std::optional<std::string> find_or_choose(const std::string& key,
                                            const std::function<std::string()>& choose);

 private:
  std::filesystem::path file_;
};

}  // namespace normformer
