#include "normformer/data/indexed_dataset.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <xxhash.h>

#include "normformer/core/error.h"

namespace normformer {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kMagic{"MMIDIDX\0\0", 9};
constexpr int64_t kFairseqHeader = 26;
constexpr int64_t kMegatronHeader = 34;
constexpr int64_t kLlmcHeader = 1024;
constexpr int32_t kLlmcMagic = 20240520;
constexpr int32_t kLlmcVersion = 1;

/// A little-endian value at a byte offset that need not be aligned.
template <class T>
T load(const MappedFile& file, int64_t offset) {
  T value;
  std::memcpy(&value, file.bytes().data() + offset, sizeof(T));
  return value;
}

int64_t bytes_of(const MappedFile& file) { return static_cast<int64_t>(file.size()); }

/// header + sequences * 12 + documents * 8, or nothing where that leaves 64 bits.
std::optional<int64_t> index_size(int64_t header, uint64_t sequences, uint64_t documents) {
  uint64_t lengths = 0;
  uint64_t boundaries = 0;
  uint64_t total = 0;
  if (__builtin_mul_overflow(sequences, uint64_t{12}, &lengths) ||
      __builtin_mul_overflow(documents, uint64_t{8}, &boundaries) ||
      __builtin_add_overflow(lengths, boundaries, &total) ||
      __builtin_add_overflow(total, static_cast<uint64_t>(header), &total) ||
      total > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    return std::nullopt;
  }
  return static_cast<int64_t>(total);
}

fs::path without_suffix(const fs::path& given) {
  if (given.extension() == ".bin" || given.extension() == ".idx") {
    return given.parent_path() / given.stem();
  }
  return given;
}

fs::path with_suffix(const fs::path& prefix, std::string_view suffix) {
  return fs::path(prefix.string() + std::string(suffix));
}

/// Whether nothing has this name; false where that cannot be found out.
bool is_absent(const fs::path& path) {
  std::error_code error;
  return !fs::exists(path, error) && !error;
}

// What `prepare --output` was told for the datasets that it writes.
std::string output_of(const std::string& prefix) {
  for (const std::string_view split : {"_train", "_valid"}) {
    if (prefix.ends_with(split)) return prefix.substr(0, prefix.size() - split.size());
  }
  return prefix;
}

MappedFile open_tokens(const fs::path& prefix) {
  const fs::path path = with_suffix(prefix, ".bin");
  if (is_absent(path)) {
    const bool prepared = !is_absent(with_suffix(prefix, "_train.bin"));
    throw IoError(
        prepared ? fmt::format("{} does not exist; {}_train.bin does: give {}_train", path.string(),
                               prefix.string(), prefix.string())
                 : fmt::format(
                       "{} does not exist: make the corpus with `normformer prepare TEXTS --output {}`, or "
                       "name another in data.train and data.valid, each by what its .bin and .idx files "
                       "have in common",
                       path.string(), output_of(prefix.string())));
  }
  return MappedFile(path);
}

TokenType checked_type(uint8_t code, DatasetForm form, const fs::path& path) {
  const bool wide = code == 9 || code == 10;
  if ((code >= 1 && code <= 5) || code == 8 || (wide && form == DatasetForm::fairseq)) {
    return static_cast<TokenType>(code);
  }
  if (code == 6 || code == 7) {
    throw DataError(fmt::format("{} holds floating-point numbers (type code {}), not tokens", path.string(),
                                static_cast<int>(code)));
  }
  throw DataError(
      fmt::format("{} has the unknown type code {} at byte 17", path.string(), static_cast<int>(code)));
}

}  // namespace

int64_t size_of(TokenType type) {
  switch (type) {
    case TokenType::u8:
    case TokenType::i8:
      return 1;
    case TokenType::i16:
    case TokenType::u16:
      return 2;
    case TokenType::i32:
    case TokenType::u32:
      return 4;
    case TokenType::i64:
    case TokenType::u64:
      return 8;
  }
  NF_CHECK(false, "unknown token type {}", static_cast<int>(type));
  return 0;
}

TokenType token_type_for(int64_t vocab_size) {
  NF_CHECK(vocab_size > 0 && vocab_size <= kAnyVocabulary, "a vocabulary of {} entries", vocab_size);
  return vocab_size < 65500 ? TokenType::u16 : TokenType::i32;
}

IndexedDataset::IndexedDataset(const fs::path& prefix, int64_t vocab_size)
    : prefix_(without_suffix(prefix)), tokens_(open_tokens(prefix_)), vocab_size_(vocab_size) {
  NF_CHECK(vocab_size > 0 && vocab_size <= kAnyVocabulary, "a vocabulary of {} entries", vocab_size);
  const fs::path index_path = with_suffix(prefix_, ".idx");
  if (is_absent(index_path)) {
    open_llmc();
  } else {
    open_indexed(index_path);
  }
}

void IndexedDataset::open_indexed(const fs::path& index_path) {
  index_ = std::make_unique<MappedFile>(index_path);
  const int64_t size = bytes_of(*index_);
  const std::string name = index_path.string();
  if (size < kFairseqHeader || index_->text().substr(0, kMagic.size()) != kMagic) {
    throw DataError(fmt::format("{} is not a dataset index: it does not begin with MMIDIDX", name));
  }
  if (const auto version = load<uint64_t>(*index_, 9); version != 1) {
    throw DataError(fmt::format("{} has version {}; version 1 is the only one known", name, version));
  }
  const auto sequences = load<uint64_t>(*index_, 18);
  const auto boundaries = size >= kMegatronHeader ? load<uint64_t>(*index_, 26) : 0;

  const auto megatron =
      size >= kMegatronHeader ? index_size(kMegatronHeader, sequences, boundaries) : std::optional<int64_t>{};
  if (megatron == size) {
    form_ = DatasetForm::megatron;
    lengths_at_ = kMegatronHeader;
  } else if (index_size(kFairseqHeader, sequences, 0) == size) {
    form_ = DatasetForm::fairseq;
    lengths_at_ = kFairseqHeader;
  } else if (megatron && *megatron < size && static_cast<uint64_t>(size - *megatron) == sequences) {
    throw DataError(
        fmt::format("{} is the index of a multimodal dataset; only text can be trained on", name));
  } else {
    throw DataError(fmt::format(
        "{} has {} bytes, which fits neither Megatron-LM's form for {} sequences and {} document bounds nor "
        "fairseq's for {} sequences; it is cut short or damaged",
        name, size, sequences, boundaries, sequences));
  }
  type_ = checked_type(load<uint8_t>(*index_, 17), form_, index_path);
  num_sequences_ = static_cast<int64_t>(sequences);
  offsets_at_ = lengths_at_ + 4 * num_sequences_;
  documents_at_ = offsets_at_ + 8 * num_sequences_;
  num_documents_ = form_ == DatasetForm::megatron ? static_cast<int64_t>(boundaries) - 1 : num_sequences_;
  validate_sequences();
  if (form_ == DatasetForm::megatron) validate_document_index();
  num_tokens_ = sequence_begin(num_sequences_);
}

void IndexedDataset::validate_sequences() const {
  const std::string name = index_->path().string();
  const int64_t item = size_of(type_);
  int64_t end = 0;
  for (int64_t i = 0; i < num_sequences_; ++i) {
    const auto length = load<int32_t>(*index_, lengths_at_ + 4 * i);
    const auto offset = load<int64_t>(*index_, offsets_at_ + 8 * i);
    if (length < 0) throw DataError(fmt::format("{}: sequence {} has the length {}", name, i, length));
    if (offset != end) {
      throw DataError(
          fmt::format("{}: sequence {} begins at byte {} of the tokens, not at {} where the one "
                      "before it ends",
                      name, i, offset, end));
    }
    end = checked_add(end, checked_mul(length, item));
  }
  if (end > bytes_of(tokens_)) {
    throw DataError(fmt::format("{} has {} bytes, but {} names {}; the copy of it is incomplete",
                                tokens_.path().string(), tokens_.size(), name, end));
  }
}

void IndexedDataset::validate_document_index() const {
  const std::string name = index_->path().string();
  if (num_documents_ < 0) throw DataError(fmt::format("{} has an empty document index", name));
  int64_t before = 0;
  for (int64_t i = 0; i <= num_documents_; ++i) {
    const auto bound = load<int64_t>(*index_, documents_at_ + 8 * i);
    if (i == 0 && bound != 0) {
      throw DataError(fmt::format("{}: the document index begins with sequence {}, not 0", name, bound));
    }
    if (bound < before) {
      throw DataError(fmt::format("{}: the document index goes back from sequence {} to {} at entry {}", name,
                                  before, bound, i));
    }
    before = bound;
  }
  if (before != num_sequences_) {
    throw DataError(
        fmt::format("{}: the document index ends at sequence {} of {}", name, before, num_sequences_));
  }
}

void IndexedDataset::open_llmc() {
  const std::string name = tokens_.path().string();
  const int64_t size = bytes_of(tokens_);
  if (size < kLlmcHeader || load<int32_t>(tokens_, 0) != kLlmcMagic) {
    throw DataError(
        fmt::format("{} has no index {} beside it, and does not begin with the header of llm.c's token files",
                    name, with_suffix(prefix_, ".idx").string()));
  }
  if (const auto version = load<int32_t>(tokens_, 4); version != kLlmcVersion) {
    throw DataError(fmt::format("{} is an llm.c token file of version {}; version {} is the only one known",
                                name, version, kLlmcVersion));
  }
  form_ = DatasetForm::llmc;
  type_ = TokenType::u16;
  header_bytes_ = kLlmcHeader;
  num_tokens_ = load<int32_t>(tokens_, 8);
  if (num_tokens_ < 0 || kLlmcHeader + 2 * num_tokens_ != size) {
    throw DataError(
        fmt::format("{} names {} tokens in its header, but has {} bytes", name, num_tokens_, size));
  }
  num_sequences_ = 1;
  num_documents_ = 1;
}

int64_t IndexedDataset::sequence_begin(int64_t sequence) const {
  if (form_ == DatasetForm::llmc) return sequence == 0 ? 0 : num_tokens_;
  if (sequence < num_sequences_) return load<int64_t>(*index_, offsets_at_ + 8 * sequence) / size_of(type_);
  if (num_sequences_ == 0) return 0;
  return load<int64_t>(*index_, offsets_at_ + 8 * (num_sequences_ - 1)) / size_of(type_) +
         load<int32_t>(*index_, lengths_at_ + 4 * (num_sequences_ - 1));
}

Range IndexedDataset::document(int64_t index) const {
  NF_CHECK(index >= 0 && index < num_documents_, "document {} of {}", index, num_documents_);
  if (form_ != DatasetForm::megatron) return {sequence_begin(index), sequence_begin(index + 1)};
  return {sequence_begin(load<int64_t>(*index_, documents_at_ + 8 * index)),
          sequence_begin(load<int64_t>(*index_, documents_at_ + 8 * (index + 1)))};
}

int64_t IndexedDataset::document_at(int64_t position) const {
  NF_CHECK(position >= 0 && position < num_tokens_, "token {} of {}", position, num_tokens_);
  Range candidates{0, num_documents_};
  while (candidates.size() > 1) {
    const int64_t middle = candidates.begin + candidates.size() / 2;
    (document(middle).begin <= position ? candidates.begin : candidates.end) = middle;
  }
  return candidates.begin;
}

template <class Stored>
void IndexedDataset::copy_tokens(int64_t position, std::span<int32_t> out) const {
  const std::byte* const from = tokens_.bytes().data() + header_bytes_ + position * int64_t{sizeof(Stored)};
  bool outside = false;
  for (std::size_t i = 0; i < out.size(); ++i) {
    Stored stored;
    std::memcpy(&stored, from + i * sizeof(Stored), sizeof(Stored));
    // A negative number becomes one above every vocabulary.
    outside |= static_cast<uint64_t>(stored) >= static_cast<uint64_t>(vocab_size_);
    out[i] = static_cast<int32_t>(stored);
  }
  if (!outside) return;
  for (std::size_t i = 0; i < out.size(); ++i) {
    Stored stored;
    std::memcpy(&stored, from + i * sizeof(Stored), sizeof(Stored));
    if (static_cast<uint64_t>(stored) >= static_cast<uint64_t>(vocab_size_)) {
      refuse_token(static_cast<int64_t>(stored), position + static_cast<int64_t>(i));
    }
  }
}

void IndexedDataset::refuse_token(int64_t token, int64_t position) const {
  const int64_t index = document_at(position);
  throw DataError(fmt::format(
      "{}: token {} at position {} of document {} is outside of the vocabulary of {}; the dataset was made "
      "with another tokenizer or is damaged",
      tokens_.path().string(), token, position - document(index).begin, index, vocab_size_));
}

void IndexedDataset::read(int64_t position, std::span<int32_t> out) const {
  const auto count = static_cast<int64_t>(out.size());
  NF_CHECK(position >= 0 && position <= num_tokens_ && count <= num_tokens_ - position,
           "tokens [{}, {} + {}) of {}", position, position, count, num_tokens_);
  switch (type_) {
    case TokenType::u8:
      return copy_tokens<uint8_t>(position, out);
    case TokenType::i8:
      return copy_tokens<int8_t>(position, out);
    case TokenType::i16:
      return copy_tokens<int16_t>(position, out);
    case TokenType::u16:
      return copy_tokens<uint16_t>(position, out);
    case TokenType::i32:
      return copy_tokens<int32_t>(position, out);
    case TokenType::u32:
      return copy_tokens<uint32_t>(position, out);
    case TokenType::i64:
      return copy_tokens<int64_t>(position, out);
    case TokenType::u64:
      return copy_tokens<uint64_t>(position, out);
  }
}

uint64_t IndexedDataset::fingerprint() const {
  constexpr std::size_t kEnd = std::size_t{64} << 10;
  const std::string_view tokens = tokens_.text();
  const std::string_view front = tokens.substr(0, kEnd);
  const std::string_view back = tokens.substr(tokens.size() - std::min(tokens.size(), kEnd));
  const std::string_view index = index_ ? index_->text() : std::string_view{};
  const std::array<uint64_t, 4> parts = {XXH3_64bits(index.data(), index.size()),
                                         XXH3_64bits(front.data(), front.size()),
                                         XXH3_64bits(back.data(), back.size()), tokens.size()};
  return XXH3_64bits(parts.data(), sizeof(parts));
}

}  // namespace normformer
