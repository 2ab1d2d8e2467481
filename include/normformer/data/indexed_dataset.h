#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <span>
#include <string>

#include "normformer/core/checked.h"
#include "normformer/core/mapped_file.h"

namespace normformer {

/// How one token is stored: the codes of the index file of Megatron-LM, GPT-NeoX and fairseq.
enum class TokenType : uint8_t { u8 = 1, i8 = 2, i16 = 3, i32 = 4, i64 = 5, u16 = 8, u32 = 9, u64 = 10 };

/// Bytes of one stored token.
int64_t size_of(TokenType type);

/// The type that tokens of a vocabulary are written with: u16 below 65 500 entries, else i32, as
/// Megatron-LM does.
TokenType token_type_for(int64_t vocab_size);

/// Whose file layout a dataset has.
enum class DatasetForm {
  megatron,  ///< .bin + .idx with a document index (Megatron-LM, GPT-NeoX; what this program writes)
  fairseq,   ///< .bin + .idx without one: every sequence is a document
  llmc       ///< one .bin with llm.c's 1 KiB header and 16-bit tokens: one document
};

/// The largest vocabulary that a token of this program, an int32, can name.
inline constexpr int64_t kAnyVocabulary = int64_t{1} << 31;

/// A corpus of tokens on disk, mapped into memory: one stream of tokens, the documents one after another,
/// and where each document begins. Movable; reading is safe from several threads.
///
/// The layout is told from the exact size of the index, which only one of the two .idx forms can have. The
/// whole index is validated when opened: its size, the lengths, the offsets (which must be the running sum
/// of the lengths, so that the stream has no gap), the document index, and the size of the .bin file.
class IndexedDataset {
 public:
  /// Opens `prefix`.idx and `prefix`.bin, or llm.c's `prefix`.bin; a trailing ".bin" or ".idx" is ignored.
  /// Tokens that are not below `vocab_size` are refused when read. Throws IoError and DataError.
  explicit IndexedDataset(const std::filesystem::path& prefix, int64_t vocab_size = kAnyVocabulary);

  DatasetForm form() const { return form_; }
  TokenType token_type() const { return type_; }
  /// The path without ".bin" or ".idx".
  const std::filesystem::path& prefix() const { return prefix_; }

  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_documents() const { return num_documents_; }

  /// Where document `index` lies in the stream of tokens.
  Range document(int64_t index) const;
  /// The document that the token at `position` belongs to; O(log documents).
  int64_t document_at(int64_t position) const;

  /// Copies tokens [position, position + out.size()) of the stream. Throws LogicError outside of the
  /// stream, and DataError naming document and position for a token that the vocabulary lacks.
  void read(int64_t position, std::span<int32_t> out) const;

  /// A hash of the index and of both ends of the token file (XXH3, 64 bits): two corpora that differ agree
  /// only where their documents have the same lengths and the same 64 KiB at either end.
  uint64_t fingerprint() const;

 private:
  void open_indexed(const std::filesystem::path& index_path);
  void open_llmc();
  void validate_sequences() const;
  void validate_document_index() const;
  int64_t sequence_begin(int64_t sequence) const;
  template <class Stored>
  void copy_tokens(int64_t position, std::span<int32_t> out) const;
  [[noreturn]] void refuse_token(int64_t token, int64_t position) const;

  std::filesystem::path prefix_;
  MappedFile tokens_;
  std::unique_ptr<MappedFile> index_;  ///< null for llm.c's form
  DatasetForm form_ = DatasetForm::megatron;
  TokenType type_ = TokenType::u16;
  int64_t vocab_size_ = kAnyVocabulary;
  int64_t num_tokens_ = 0;
  int64_t num_sequences_ = 0;
  int64_t num_documents_ = 0;
  int64_t header_bytes_ = 0;  ///< of the .bin file

  // Byte offsets of the three arrays in the index; none of them need be aligned.
  int64_t lengths_at_ = 0;
  int64_t offsets_at_ = 0;
  int64_t documents_at_ = 0;
};

/// What a finished IndexedDatasetWriter wrote.
struct WrittenDataset {
  int64_t num_documents = 0;
  int64_t num_tokens = 0;
  TokenType token_type = TokenType::u16;
  uint64_t tokens_hash = 0;  ///< XXH3-64 of the .bin file
  uint64_t index_hash = 0;   ///< XXH3-64 of the .idx file
};

/// Writes a dataset in Megatron-LM's form, document by document, with memory for the index only (12 bytes
/// a document). Both files appear under their names when finish() returns, complete and synced to disk; a
/// writer that is destroyed before leaves nothing behind.
class IndexedDatasetWriter {
 public:
  /// Starts `prefix`.bin and `prefix`.idx for tokens below `vocab_size`, under temporary names. A sequence
  /// longer than `max_sequence` tokens (the index stores 32-bit lengths) is cut into several sequences of
  /// one document. Throws IoError.
  IndexedDatasetWriter(const std::filesystem::path& prefix, int64_t vocab_size,
                       int64_t max_sequence = std::numeric_limits<int32_t>::max());
  IndexedDatasetWriter(const IndexedDatasetWriter&) = delete;
  IndexedDatasetWriter& operator=(const IndexedDatasetWriter&) = delete;
  ~IndexedDatasetWriter();

  /// Adds tokens to the current document. Throws LogicError for a token outside of the vocabulary, IoError.
  void append(std::span<const int32_t> tokens);
  /// Ends the current document, which may be empty.
  void end_document();
  /// append(tokens), end_document().
  void add_document(std::span<const int32_t> tokens);

  int64_t num_documents() const;
  int64_t num_tokens() const;

  /// Writes the index, syncs both files and gives them their names, the index last. Throws IoError, and
  /// LogicError where a document is still open. Nothing may be added afterwards.
  WrittenDataset finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace normformer
