#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace normformer {

/// The texts that a file gives to continue, one a line: the line itself, or, where the file's name ends in
/// .jsonl, the string "prompt" of the JSON object in it. Throws IoError, and DataError that names file and
/// line.
std::vector<std::string> read_prompts(const std::filesystem::path& path);

}  // namespace normformer
