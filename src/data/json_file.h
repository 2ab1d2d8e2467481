#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace normformer {

/// Parses JSON; throws DataError with `place` (a file, or a file and line) in front of what is wrong. Lists
/// and objects within each other are refused beyond 256 levels.
nlohmann::json parse_json(std::string_view text, std::string_view place);

/// Reads and parses a JSON file of at most 64 MiB. Throws IoError and DataError.
nlohmann::json read_json_file(const std::filesystem::path& path, std::string_view what);

}  // namespace normformer
