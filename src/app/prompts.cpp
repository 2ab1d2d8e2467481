#include "prompts.h"

#include <string_view>

#include <nlohmann/json.hpp>

#include "normformer/core/error.h"
#include "normformer/core/mapped_file.h"

namespace normformer {

namespace {

constexpr size_t kMostBytes = size_t{1} << 30;

std::vector<std::string_view> lines_of(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    if (line.ends_with('\r')) line.remove_suffix(1);
    lines.push_back(line);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return lines;
}

std::string prompt_in_json(std::string_view line, const std::string& place) {
  const auto object = nlohmann::json::parse(line, nullptr, false);
  if (object.is_discarded()) throw DataError(fmt::format("{} is not valid JSON", place));
  if (!object.is_object() || !object.contains("prompt") || !object["prompt"].is_string()) {
    throw DataError(fmt::format(
        "{} is not an object with a string \"prompt\": write lines as {{\"prompt\": \"Once\"}}", place));
  }
  return object["prompt"].get<std::string>();
}

}  // namespace

std::vector<std::string> read_prompts(const std::filesystem::path& path) {
  const std::string text = read_small_file(path, kMostBytes, "the file of prompts");
  const bool is_json = path.extension() == ".jsonl";
  std::vector<std::string> prompts;
  int64_t number = 0;
  for (const std::string_view line : lines_of(text)) {
    ++number;
    if (!is_json) {
      prompts.emplace_back(line);
    } else if (line.find_first_not_of(" \t") != std::string_view::npos) {
      prompts.push_back(prompt_in_json(line, fmt::format("{} line {}", path.string(), number)));
    }
  }
  if (prompts.empty()) throw DataError(fmt::format("{} holds no prompt", path.string()));
  return prompts;
}

}  // namespace normformer
