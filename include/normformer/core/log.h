#pragma once

#include <string_view>
#include <utility>

#include <fmt/format.h>

namespace normformer {

/// How much a log line matters.
enum class LogLevel { debug, info, warning, error };

/// Writes one line to stderr, with time and the calling rank's label, and to the file of open_log_file if
/// any. Safe from several threads. A line of level `debug` appears only where NORMFORMER_LOG=debug is set.
void log_line(LogLevel level, std::string_view message);

/// Also appends this process's log lines to `path`, flushing each. Throws IoError where it cannot be opened.
void open_log_file(const std::string& path);

/// Writes one line to the file of open_log_file alone, with the time; nowhere where there is none. For what
/// is shown to people by other means.
void log_to_file(std::string_view message);

/// Logs from the rank labelled 0 only: for what every rank would say alike.
template <class... Args>
void log_root(LogLevel level, fmt::format_string<Args...> format, Args&&... args);

/// Logs from the calling rank, whichever it is.
template <class... Args>
void log_rank(LogLevel level, fmt::format_string<Args...> format, Args&&... args);

namespace detail {
bool is_root_rank();
}

template <class... Args>
void log_root(LogLevel level, fmt::format_string<Args...> format, Args&&... args) {
  if (detail::is_root_rank()) log_line(level, fmt::format(format, std::forward<Args>(args)...));
}

template <class... Args>
void log_rank(LogLevel level, fmt::format_string<Args...> format, Args&&... args) {
  log_line(level, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace normformer
