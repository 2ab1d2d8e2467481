#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace normformer {

/// Says on stderr how far a long pass over bytes has come, how fast it is and how long it will take: one line
/// that is renewed on a terminal, a log line every ten seconds elsewhere.
class ProgressLine {
 public:
  /// `what` is being done to `total` bytes; says nothing where not `shown`.
  ProgressLine(std::string what, int64_t total, bool shown);

  /// `done` more bytes are done.
  void advance(int64_t done);
  /// Ends with one log line for the whole.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  std::string describe(Clock::time_point now) const;

  std::string what_;
  int64_t total_;
  bool shown_;
  bool terminal_;
  int64_t done_ = 0;
  Clock::time_point begin_;
  Clock::time_point last_;
};

/// "3 s", "12 min", "5.2 h".
std::string describe_duration(double seconds);

}  // namespace normformer
