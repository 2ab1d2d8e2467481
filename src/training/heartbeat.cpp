#include "normformer/training/heartbeat.h"

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>

#include <nlohmann/json.hpp>
#include <unistd.h>

#include "normformer/core/error.h"
#include "normformer/core/log.h"

namespace normformer {

std::string_view name_of(RunState state) {
  switch (state) {
    case RunState::running:
      return "running";
    case RunState::stopped:
      return "stopped";
    case RunState::finished:
      return "finished";
    case RunState::failed:
      return "failed";
    case RunState::hang:
      return "hang";
  }
  return "?";
}

std::string to_json(const Heartbeat& heartbeat) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  nlohmann::ordered_json json;
  json["time"] = std::chrono::duration_cast<std::chrono::milliseconds>(now).count() / 1000.0;
  json["host"] = host_name();
  json["pid"] = getpid();
  if (const char* attempt = std::getenv("NORMFORMER_ATTEMPT")) json["attempt"] = attempt;
  json["update"] = heartbeat.update;
  json["updates"] = heartbeat.updates;
  json["phase"] = name_of(heartbeat.phase);
  json["loss"] = std::isfinite(heartbeat.loss) ? nlohmann::ordered_json(heartbeat.loss) : nullptr;
  json["state"] = name_of(heartbeat.state);
  // The host's name and the attempt may be anybody's bytes.
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

HeartbeatFile::HeartbeatFile(std::filesystem::path path) : path_(std::move(path)) {}

void HeartbeatFile::write(const Heartbeat& heartbeat) noexcept {
  try {
    const std::filesystem::path next = path_.string() + ".tmp";
    std::ofstream file(next, std::ios::trunc);
    file << to_json(heartbeat);
    file.close();
    if (!file) throw IoError(fmt::format("cannot write {}: {}", next.string(), system_reason()));
    std::filesystem::rename(next, path_);
  } catch (const std::exception& e) {
    if (!std::exchange(has_failed_, true))
      log_rank(LogLevel::warning, "no heartbeat for who watches from outside, and no more is said of it: {}",
               e.what());
  }
}

}  // namespace normformer
