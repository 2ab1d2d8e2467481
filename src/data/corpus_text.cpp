#include "corpus_text.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "normformer/core/error.h"

#include "json_file.h"

namespace normformer {

namespace {

void require_utf8(const CorpusChunk& chunk, std::string_view cure) {
  const auto invalid = find_invalid_utf8(chunk.raw);
  if (!invalid) return;
  const std::string_view file = chunk.file->text();
  const auto offset = static_cast<std::size_t>(chunk.raw.data() - file.data()) + *invalid;
  const auto line = 1 + std::count(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(offset), '\n');
  throw DataError(fmt::format("{} is not UTF-8 at byte {} (line {}): 0x{:02X}; {}",
                              chunk.file->path().string(), offset, line,
                              static_cast<unsigned char>(file[offset]), cure));
}

std::string keys_of(const nlohmann::json& object) {
  std::string keys;
  for (const auto& item : object.items())
    keys += fmt::format("{}\"{}\"", keys.empty() ? "" : ", ", item.key());
  return keys;
}

std::string text_in_json(std::string_view line, const CorpusChunk& chunk, const std::string& key) {
  const std::string place = fmt::format("{} line {}", chunk.file->path().string(), chunk.line);
  const nlohmann::json object = parse_json(line, place);
  if (!object.is_object()) throw DataError(fmt::format("{} is not a JSON object", place));
  const auto found = object.find(key);
  if (found == object.end()) {
    throw DataError(
        fmt::format("{} has no \"{}\" (it has {}); name the field that holds the text with --json-key", place,
                    key, keys_of(object)));
  }
  if (!found->is_string()) throw DataError(fmt::format("{}: \"{}\" is not a string", place, key));
  return found->get<std::string>();
}

}  // namespace

ChunkText::ChunkText(const CorpusChunk& chunk, const std::string& json_key, InvalidUtf8 policy)
    : text_(chunk.raw) {
  if (policy == InvalidUtf8::replace) {
    if (find_invalid_utf8(text_)) text_ = changed_ = replace_invalid_utf8(text_, &replaced_);
  } else if (policy == InvalidUtf8::refuse || chunk.is_json) {
    require_utf8(chunk,
                 "convert the file, or have such bytes replaced by U+FFFD with --invalid-utf8 replace");
  }
  if (chunk.is_json) {
    std::string text = text_in_json(text_, chunk, json_key);
    changed_ = std::move(text);
    text_ = changed_;
  }
}

}  // namespace normformer
