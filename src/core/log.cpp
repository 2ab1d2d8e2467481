#include "normformer/core/log.h"

#include <cstdlib>
#include <memory>
#include <string>

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include "normformer/core/error.h"

namespace normformer {

namespace {

constexpr const char* kPattern = "%H:%M:%S %^%l%$ %v";

spdlog::logger& logger() {
  static const auto instance = [] {
    auto made = std::make_shared<spdlog::logger>("normformer",
                                                 std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
    const char* wanted = std::getenv("NORMFORMER_LOG");
    made->set_level(wanted != nullptr && std::string_view(wanted) == "debug" ? spdlog::level::debug
                                                                             : spdlog::level::info);
    made->set_pattern(kPattern);
    made->flush_on(spdlog::level::debug);
    return made;
  }();
  return *instance;
}

// What writes to the log file alone; null until there is one.
std::shared_ptr<spdlog::logger>& file_logger() {
  static std::shared_ptr<spdlog::logger> instance;
  return instance;
}

spdlog::level::level_enum to_spdlog(LogLevel level) {
  switch (level) {
    case LogLevel::debug:
      return spdlog::level::debug;
    case LogLevel::info:
      return spdlog::level::info;
    case LogLevel::warning:
      return spdlog::level::warn;
    case LogLevel::error:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

}  // namespace

void log_line(LogLevel level, std::string_view message) {
  logger().log(to_spdlog(level), "{}{}", rank_prefix(), message);
}

void log_to_file(std::string_view message) {
  if (file_logger() != nullptr) file_logger()->info("{}", message);
}

void open_log_file(const std::string& path) {
  try {
    auto sink = std::make_shared<spdlog::sinks::basic_file_sink_mt>(path);
    sink->set_pattern(kPattern);
    file_logger() = std::make_shared<spdlog::logger>("file", sink);
    file_logger()->flush_on(spdlog::level::info);
    logger().sinks().push_back(std::move(sink));
  } catch (const spdlog::spdlog_ex& e) {
    throw IoError(fmt::format("cannot open the log file {}: {}", path, e.what()));
  }
}

namespace detail {
bool is_root_rank() { return rank_label() == 0; }
}  // namespace detail

}  // namespace normformer
