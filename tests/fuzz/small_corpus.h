#pragma once

#include <filesystem>

#include "normformer/data/prepare.h"

#include "unit/data/temporary_folder.h"

namespace normformer {

/// Writes a corpus of a few words with a tokenizer trained on it, the same bytes each time, in the same
/// names as a user would have: PREFIX_train, PREFIX_valid, PREFIX_tokenizer and PREFIX.json.
inline CorpusManifest prepare_small_corpus(const std::filesystem::path& prefix) {
  const TemporaryFolder source;
  write_bytes(source / "train.txt", "a cat and a hat\n\nthe cat sat\n\nthat hat\n");
  write_bytes(source / "valid.txt", "the hat\n");
  return prepare_corpus({.inputs = {source / "train.txt"},
                         .output = prefix,
                         .train_vocab_size = 260,
                         .documents = DocumentRule::blank_lines,
                         .valid_inputs = {source / "valid.txt"},
                         .threads = 1,
                         .show_progress = false});
}

}  // namespace normformer
