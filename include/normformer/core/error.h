#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

// nvcc 13 cannot read fmt 9: in device code a failed check says its condition, but no values.
#ifndef __CUDACC__
#include <fmt/format.h>
#endif

namespace normformer {

/// What the process returns to the shell; a supervisor decides by it (sysexits.h where it has a fitting
/// code).
enum class ExitCode : int {
  success = 0,
  bad_usage = 64,   ///< a command line or configuration that cannot run; never worth a retry
  bad_data = 65,    ///< a corpus, tokenizer or checkpoint that cannot be read
  internal = 70,    ///< a broken invariant: a bug
  io_failure = 74,  ///< the operating system refused a read or a write
  stopped = 75,     ///< stopped cleanly after saving; start again to go on
  hang = 76,        ///< a rank stopped making progress
  numeric = 77,     ///< training diverged
  corrupt = 78,     ///< ranks held different copies of the same weights; start again from the last checkpoint
};

/// Base of every exception thrown here: one sentence for a person, and the exit code that it leads to.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& what) : std::runtime_error(what), code_(code) {}
  ExitCode exit_code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

/// The user's command line or configuration cannot run. Says what to write instead; thrown before any
/// communication.
class ConfigError : public Error {
 public:
  explicit ConfigError(const std::string& what) : Error(ExitCode::bad_usage, what) {}
};

/// A file that the user gave is not what it should be. Names the file and the place in it.
class DataError : public Error {
 public:
  explicit DataError(const std::string& what) : Error(ExitCode::bad_data, what) {}
};

/// The operating system refused an operation on a file. Names the file and the system's reason.
class IoError : public Error {
 public:
  explicit IoError(const std::string& what) : Error(ExitCode::io_failure, what) {}
};

/// Communication failed; the group must be considered dead and is never retried in place.
class CommError : public Error {
 public:
  explicit CommError(const std::string& what) : Error(ExitCode::internal, what) {}
};

/// Training produced values from which it cannot go on.
class NumericError : public Error {
 public:
  explicit NumericError(const std::string& what) : Error(ExitCode::numeric, what) {}
};

/// A broken invariant: a bug in this program. Carries the place in the source.
class LogicError : public Error {
 public:
  LogicError(const std::string& what, const std::source_location& where);
};

namespace detail {
[[noreturn]] void check_failed(const char* condition, const std::string& message,
                               const std::source_location& where);
}  // namespace detail

/// "[rank r host h] " of the calling thread, or "" before set_rank_label.
std::string rank_prefix();

/// Labels this thread's errors and log lines; called once by whoever starts a rank (a process or a test's
/// thread).
void set_rank_label(int rank, std::string host);

/// The rank given to set_rank_label on this thread; 0 before.
int rank_label();

/// This machine's host name.
std::string host_name();

/// The message of the exception in flight with the rank in front: "[rank r host h] what happened".
std::string describe_current_exception();

/// The exit code that the exception in flight leads to; `internal` where it is not an Error.
ExitCode current_exception_exit_code();

/// "strerror(errno)" of the last failed system call on this thread.
std::string system_reason();

}  // namespace normformer

#ifdef __CUDACC__
#define NF_CHECK_MESSAGE(...) std::string()
#else
#define NF_CHECK_MESSAGE(...) fmt::format(__VA_ARGS__)
#endif

/// Throws LogicError with a formatted message where the condition is false. Always on.
#define NF_CHECK(condition, ...)                                                    \
  do {                                                                              \
    if (!(condition)) [[unlikely]]                                                  \
      ::normformer::detail::check_failed(#condition, NF_CHECK_MESSAGE(__VA_ARGS__), \
                                         std::source_location::current());          \
  } while (false)
