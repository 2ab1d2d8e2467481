#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/core/mapped_file.h"
#include "normformer/data/prepare.h"

namespace normformer {

/// The files that `inputs` name: files as given, folders as all regular files below them, sorted by path,
/// hidden ones apart. Throws IoError for what does not exist, DataError for compressed files and where a
/// folder holds no file.
std::vector<std::filesystem::path> list_corpus_files(const std::vector<std::filesystem::path>& inputs);

/// A piece of work: a document, or a part of a long one, cut where its pieces may be cut.
struct CorpusChunk {
  std::string_view raw;  ///< text, or one line of JSON
  const MappedFile* file = nullptr;
  int64_t line = 0;      ///< of JSON, from 1
  int64_t document = 0;  ///< counted over all files, from 0
  bool is_json = false;
  bool ends_document = false;
};

/// Some chunks in order, and the files that they are views of.
struct CorpusBatch {
  std::vector<CorpusChunk> chunks;
  std::vector<std::shared_ptr<const MappedFile>> files;
  int64_t bytes = 0;
};

/// Reads files front to back and cuts them into documents, and long documents into chunks.
class CorpusReader {
 public:
  CorpusReader(std::vector<std::filesystem::path> files, DocumentRule rule, std::string separator);

  /// The next tens of megabytes, or nothing at the end. Throws IoError, DataError.
  std::optional<CorpusBatch> read();

 private:
  bool open_next_file(CorpusBatch& batch);
  bool find_document();
  bool find_text_document();
  bool find_json_line();
  CorpusChunk take_chunk();
  std::string_view take_line();
  bool is_separator(std::string_view line) const;

  std::vector<std::filesystem::path> files_;
  DocumentRule rule_;
  std::string separator_;

  std::size_t next_file_ = 0;
  std::shared_ptr<const MappedFile> file_;
  bool is_json_ = false;
  std::string_view rest_;           ///< of the file, after the current document
  int64_t line_ = 0;                ///< lines taken from the file
  std::string_view document_rest_;  ///< of the current document
  int64_t document_ = -1;
};

}  // namespace normformer
