#include "json_file.h"

#include <fmt/format.h>

#include "normformer/core/error.h"
#include "normformer/core/mapped_file.h"

namespace normformer {

namespace {
constexpr std::size_t kMostBytes = std::size_t{64} << 20;
}

nlohmann::json parse_json(std::string_view text, std::string_view place) {
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
