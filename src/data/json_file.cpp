#include "json_file.h"

#include <fmt/format.h>

#include "normformer/core/error.h"
#include "normformer/core/mapped_file.h"

namespace normformer {

namespace {

constexpr std::size_t kMostBytes = std::size_t{64} << 20;
constexpr int64_t kMostLevels = 256;  // the library writes and copies values by recursion

/// Whether lists and objects stand in each other deeper than kMostLevels.
bool is_deep(std::string_view text) {
  int64_t level = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '"') in_string = !in_string;
    if (in_string && c == '\\') ++i;
    if (in_string) continue;
    if (c == '[' || c == '{') ++level;
    if (c == ']' || c == '}') --level;
    if (level > kMostLevels) return true;
  }
  return false;
}

}  // namespace

nlohmann::json parse_json(std::string_view text, std::string_view place) {
  if (is_deep(text))
    throw DataError(fmt::format("{} is nested more than {} levels deep", place, kMostLevels));
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& e) {
    const std::string_view what = e.what();  // "[json.exception.parse_error.101] parse error at line 1, ..."
    const std::size_t bracket = what.find("] ");
    throw DataError(fmt::format("{} is not valid JSON: {}", place,
                                bracket == std::string_view::npos ? what : what.substr(bracket + 2)));
  }
}

nlohmann::json read_json_file(const std::filesystem::path& path, std::string_view what) {
  return parse_json(read_small_file(path, kMostBytes, what), fmt::format("{} {}", what, path.string()));
}

}  // namespace normformer
