#include "json_lines.h"

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "normformer/core/error.h"
#include "normformer/core/log.h"

namespace normformer {

namespace {

std::vector<std::string> lines_up_to(const std::filesystem::path& path, int64_t batch_index,
                                     const JsonLines::Visit& kept) {
  std::vector<std::string> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto parsed = nlohmann::json::parse(line, nullptr, false);
    if (!parsed.is_object() || !parsed.contains("batch") || !parsed["batch"].is_number_integer()) continue;
    if (parsed["batch"].get<int64_t>() > batch_index) continue;
    if (kept) kept(parsed);
    lines.push_back(line);
  }
  return lines;
}

}  // namespace

nlohmann::ordered_json json_number(double value) {
  if (!std::isfinite(value)) return nullptr;
  return value;
}

JsonLines::JsonLines(std::filesystem::path path, int64_t batch_index, const Visit& kept)
    : path_(std::move(path)) {
  const std::vector<std::string> lines = lines_up_to(path_, batch_index, kept);
  const std::filesystem::path next = path_.string() + ".tmp";
  {
    std::ofstream rewritten(next, std::ios::trunc);
    for (const std::string& line : lines) rewritten << line << '\n';
    if (!rewritten.flush()) throw IoError(fmt::format("cannot write {}: {}", next.string(), system_reason()));
  }
  std::filesystem::rename(next, path_);
  file_.open(path_, std::ios::app);
  if (!file_) throw IoError(fmt::format("cannot open {}: {}", path_.string(), system_reason()));
}

void JsonLines::write(const nlohmann::ordered_json& line) {
  file_ << line.dump() << std::endl;
  if (file_) return;
  log_root(LogLevel::warning, "cannot write {}: {}", path_.string(), system_reason());
  file_.clear();
}

}  // namespace normformer
