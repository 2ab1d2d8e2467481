#include "normformer/core/error.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <exception>

#include <unistd.h>

namespace normformer {

namespace {
struct RankLabel {
  int rank = 0;
  std::string prefix;
};
thread_local RankLabel label;
}  // namespace

namespace detail {
void check_failed(const char* condition, const std::string& message, const std::source_location& where) {
  throw LogicError(fmt::format("{} (required: {})", message, condition), where);
}
}  // namespace detail

LogicError::LogicError(const std::string& what, const std::source_location& where)
    : Error(ExitCode::internal, fmt::format("{}:{}: {}", where.file_name(), where.line(), what)) {}

std::string rank_prefix() { return label.prefix; }

void set_rank_label(int rank, std::string host) {
  label.rank = rank;
  label.prefix = fmt::format("[rank {} host {}] ", rank, host);
}

int rank_label() { return label.rank; }

std::string host_name() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0) return "unknown";
  return name.data();
}

std::string describe_current_exception() {
  try {
    throw;
  } catch (const std::exception& e) {
    return rank_prefix() + e.what();
  } catch (...) {
    return rank_prefix() + "unknown exception";
  }
}

ExitCode current_exception_exit_code() {
  try {
    throw;
  } catch (const Error& e) {
    return e.exit_code();
  } catch (...) {
    return ExitCode::internal;
  }
}

std::string system_reason() { return std::strerror(errno); }

}  // namespace normformer
