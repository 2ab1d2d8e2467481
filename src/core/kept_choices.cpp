#include "normformer/core/kept_choices.h"

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include "normformer/core/error.h"
#include "normformer/core/log.h"
#include "normformer/core/unique_handle.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

struct DescriptorTraits {
  using Handle = int;
  static Handle none() noexcept { return -1; }
  static void close(Handle handle) noexcept { ::close(handle); }
};
using Descriptor = UniqueHandle<DescriptorTraits>;

std::string environment_text(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// The file, made where it is missing, and locked until the descriptor is closed.
Descriptor open_locked(const fs::path& file) {
  fs::create_directories(file.parent_path());
  Descriptor opened(::open(file.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (!opened) throw IoError(fmt::format("cannot open {}: {}", file.string(), system_reason()));
  while (flock(opened.get(), LOCK_EX) != 0) {
    if (errno != EINTR) throw IoError(fmt::format("cannot lock {}: {}", file.string(), system_reason()));
  }
  return opened;
}

// The last of a key's choices counts: others were cut off while they were written.
std::optional<std::string> find(const fs::path& file, const std::string& key) {
  std::optional<std::string> found;
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line) && !lines.eof();) {
    if (line.size() > key.size() && line[key.size()] == '\t' && line.starts_with(key)) {
      found = line.substr(key.size() + 1);
    }
  }
  return found;
}

bool ends_within_a_line(int descriptor) {
  const off_t size = lseek(descriptor, 0, SEEK_END);
  char last = '\n';
  return size > 0 && pread(descriptor, &last, 1, size - 1) == 1 && last != '\n';
}

void append_line(const fs::path& file, int descriptor, const std::string& line) {
  const std::string text = (ends_within_a_line(descriptor) ? "\n" : "") + line + "\n";
  if (::write(descriptor, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    throw IoError(fmt::format("cannot write {}: {}", file.string(), system_reason()));
  }
}

}  // namespace

std::optional<fs::path> cache_folder() {
  if (const std::string own = environment_text("NORMFORMER_CACHE"); !own.empty()) return own;
  if (const std::string cache = environment_text("XDG_CACHE_HOME"); !cache.empty()) {
    return fs::path(cache) / "normformer";
  }
  if (const std::string home = environment_text("HOME"); !home.empty()) {
    return fs::path(home) / ".cache" / "normformer";
  }
  return std::nullopt;
}

KeptChoices::KeptChoices(fs::path file) : file_(std::move(file)) {}

std::optional<std::string> KeptChoices::find_or_choose(const std::string& key,
                                                       const std::function<std::string()>& choose) {
  NF_CHECK(!key.empty() && key.find_first_of("\t\n") == std::string::npos, "\"{}\" is no key", key);
  Descriptor locked;
  try {
    locked = open_locked(file_);
    if (auto kept = find(file_, key)) return kept;
  } catch (const std::exception& e) {  // of the file system's own kind, too
    log_line(LogLevel::warning, fmt::format("choices are not kept: {}", e.what()));
    return std::nullopt;
  }
  std::string choice = choose();
  NF_CHECK(choice.find_first_of("\t\n") == std::string::npos, "\"{}\" is no choice", choice);
  try {
    append_line(file_, locked.get(), key + '\t' + choice);
  } catch (const IoError& e) {
    log_line(LogLevel::warning, fmt::format("choices are not kept: {}", e.what()));
    return std::nullopt;
  }
  return choice;
}

}  // namespace normformer
