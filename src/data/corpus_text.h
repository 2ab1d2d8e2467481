#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "normformer/data/unicode.h"

#include "corpus_reader.h"

namespace normformer {

/// The text of a chunk: taken out of JSON where it is in one, and with invalid UTF-8 refused or replaced.
class ChunkText {
 public:
  /// Throws DataError that names file and line or offset.
  ChunkText(const CorpusChunk& chunk, const std::string& json_key, InvalidUtf8 policy);
  ChunkText(const ChunkText&) = delete;
  ChunkText& operator=(const ChunkText&) = delete;

  std::string_view text() const { return text_; }
  /// How many invalid parts were replaced.
  int64_t replaced() const { return replaced_; }

 private:
  std::string changed_;  ///< what text_ views where it is not the file itself
  std::string_view text_;
  int64_t replaced_ = 0;
};

}  // namespace normformer
