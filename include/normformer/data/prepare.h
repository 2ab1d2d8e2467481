#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "normformer/data/manifest.h"
#include "normformer/data/unicode.h"

namespace normformer {

/// What is one document of a text file. (In JSONL files every object is one.)
enum class DocumentRule {
  file,         ///< the whole file
  blank_lines,  ///< what stands between runs of empty lines (white space does not count)
  separator     ///< what stands between lines that are exactly the separator
};

/// What to make a corpus of, and how.
struct PrepareOptions {
  /// Files and folders (all files below them, hidden ones apart, in order of their paths). Files named
  /// .jsonl, .ndjson or .json hold one JSON object a line, all others text.
  std::vector<std::filesystem::path> inputs;
  /// Where the output goes: OUTPUT.bin and .idx, or OUTPUT_train and OUTPUT_valid; OUTPUT.json, the manifest;
  /// OUTPUT_tokenizer/, the tokenizer's files.
  std::filesystem::path output;

  std::filesystem::path tokenizer = {};  ///< as BpeTokenizer::load takes it; empty: train one
  int64_t train_vocab_size = 0;          ///< tokens of a vocabulary trained on the training documents

  std::string json_key = "text";  ///< the field of JSON objects that holds the text
  DocumentRule documents = DocumentRule::file;
  std::string separator = {};          ///< the line of DocumentRule::separator
  bool append_end_of_document = true;  ///< "<|endoftext|>" after every document
  InvalidUtf8 invalid_utf8 = InvalidUtf8::refuse;

  /// Validation: documents from files of their own, or this share of all documents, spread evenly over the
  /// corpus at places drawn by `seed`.
  std::vector<std::filesystem::path> valid_inputs = {};
  double valid_fraction = 0;
  uint64_t seed = 0;

  int threads = 0;            ///< 0: as many as the machine has
  bool show_progress = true;  ///< a line on stderr, renewed on a terminal
};

/// Turns text into a dataset of tokens with its index, manifest and tokenizer, and returns the manifest. The
/// output does not depend on the number of threads. Text is never searched for special tokens, so no document
/// can contain the token that ends documents. Documents without text are left out. Throws ConfigError for
/// options that contradict each other, DataError for an empty corpus, for text that is not UTF-8 (where
/// refused; JSON must be UTF-8 unless replaced) and for JSON that is not as expected, each with file and line
/// or offset, and IoError.
CorpusManifest prepare_corpus(const PrepareOptions& options);

}  // namespace normformer
