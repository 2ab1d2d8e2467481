#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/data/bpe_tokenizer.h"

namespace normformer {

/// One dataset of a prepared corpus.
struct CorpusSplit {
  std::string name;     ///< "train", "valid", or "all" where the corpus was not split
  std::string dataset;  ///< name of its .bin and .idx without suffix, in the manifest's folder
  int64_t documents = 0;
  int64_t tokens = 0;        ///< with the end-of-document tokens
  int64_t bytes = 0;         ///< of text, as encoded
  uint64_t tokens_hash = 0;  ///< XXH3-64 of the .bin file
  uint64_t index_hash = 0;   ///< XXH3-64 of the .idx file
};

/// What `prepare` writes down beside a corpus, as PREFIX.json: all that one must know to train on it.
struct CorpusManifest {
  std::filesystem::path folder;  ///< where it lies; not part of the file
  std::string tokenizer;         ///< the folder with the tokenizer's files, in the manifest's folder
  uint64_t tokenizer_hash = 0;   ///< BpeTokenizer::hash()
  int64_t vocab_size = 0;
  std::string unicode_version;             ///< of the tables by which text was cut into pieces
  std::optional<int32_t> end_of_document;  ///< the token that ends each document, where one was appended
  std::string invalid_utf8;                ///< the policy: "refuse", "replace" or "bytes"
  int64_t replaced = 0;                    ///< how many invalid parts were replaced
  std::vector<CorpusSplit> splits;
};

/// Writes manifest.folder / `name` + ".json" atomically. Throws IoError.
void write_corpus_manifest(const CorpusManifest& manifest, std::string_view name);

/// Reads a manifest. Throws IoError and DataError.
CorpusManifest read_corpus_manifest(const std::filesystem::path& path);

/// The manifest that describes the dataset with this prefix (PREFIX, PREFIX_train or PREFIX_valid of
/// `prepare`); nothing for a dataset from elsewhere. Throws IoError and DataError.
std::optional<CorpusManifest> find_corpus_manifest(const std::filesystem::path& dataset_prefix);

/// The tokenizer that a prepared dataset was made with, checked against its manifest. Throws DataError where
/// the dataset has no manifest, or its tokenizer has changed since.
BpeTokenizer load_corpus_tokenizer(const std::filesystem::path& dataset_prefix);

/// Reads a whole prepared dataset again and compares it with its manifest: both hashes, the counts, and that
/// every token is in the vocabulary. Throws DataError with the first difference.
void verify_corpus(const std::filesystem::path& dataset_prefix);

}  // namespace normformer
