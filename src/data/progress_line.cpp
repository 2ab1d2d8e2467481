#include "progress_line.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include <fmt/format.h>
#include <unistd.h>

#include "normformer/core/log.h"

namespace normformer {

namespace {
constexpr std::chrono::milliseconds kTerminalPause{100};
constexpr std::chrono::seconds kLogPause{10};
}  // namespace

std::string describe_duration(double seconds) {
  if (seconds < 99.5) return fmt::format("{:.0f} s", seconds);
  if (seconds < 99.5 * 60) return fmt::format("{:.0f} min", seconds / 60);
  return fmt::format("{:.1f} h", seconds / 3600);
}

ProgressLine::ProgressLine(std::string what, int64_t total, bool shown)
    : what_(std::move(what)),
      total_(total),
      shown_(shown),
      terminal_(isatty(STDERR_FILENO) == 1),
      begin_(Clock::now()),
      last_(begin_) {}

std::string ProgressLine::describe(Clock::time_point now) const {
  const double seconds = std::max(1e-3, std::chrono::duration<double>(now - begin_).count());
  const double rate = static_cast<double>(done_) / seconds;
  const double left = static_cast<double>(total_ - done_) / std::max(1.0, rate);
  return fmt::format("{}: {:.1f} of {:.1f} MB, {:.1f} MB/s, {} left", what_, static_cast<double>(done_) / 1e6,
                     static_cast<double>(total_) / 1e6, rate / 1e6, describe_duration(left));
}

void ProgressLine::advance(int64_t done) {
  done_ += done;
  const auto now = Clock::now();
  if (!shown_ || (terminal_ ? now - last_ < kTerminalPause : now - last_ < kLogPause)) return;
  last_ = now;
  if (terminal_) {
    std::fputs(fmt::format("\r{}\x1b[K", describe(now)).c_str(), stderr);
  } else {
    log_line(LogLevel::info, describe(now));
  }
}

void ProgressLine::finish() {
  if (!shown_) return;
  if (terminal_) std::fputs("\r\x1b[K", stderr);
  const double seconds = std::max(1e-3, std::chrono::duration<double>(Clock::now() - begin_).count());
  log_line(LogLevel::info,
           fmt::format("{}: {:.1f} MB in {:.1f} s, {:.1f} MB/s", what_, static_cast<double>(done_) / 1e6,
                       seconds, static_cast<double>(done_) / 1e6 / seconds));
}

}  // namespace normformer
