#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace normformer {

/// What becomes of a special token's text, such as "<|endoftext|>", inside of text to be encoded.
enum class SpecialText {
  as_text,  ///< it is text like any other: a corpus cannot smuggle in special tokens
  as_token  ///< it becomes the special token
};

/// Two tokens that are merged into one; the earlier in the list of merges goes first.
struct BpeMerge {
  int32_t left = 0;
  int32_t right = 0;
  bool operator==(const BpeMerge&) const = default;
};

/// A byte-level BPE vocabulary as GPT-2's: any byte string becomes ids, and decode gives it back exactly.
///
/// Text is cut into pieces (pretokenizer.h); each piece starts as its bytes, and the adjacent pair that
/// stands first in the list of merges is merged, all its occurrences from left to right, until no listed
/// pair is left. Tokens that are neither a single byte nor the result of a merge are special: encode gives
/// them only where it is told to look for their text. Immutable, so safe to share between threads.
/// Sources: Sennrich, Haddow, Birch, "Neural machine translation of rare words with subword units",
/// ACL 2016; Radford et al., "Language models are unsupervised multitask learners", 2019, section 2.2.
class BpeTokenizer {
 public:
  /// From the bytes of each token, by id, and the merges. `name` says in errors where they come from.
  /// Throws DataError where a byte has no token, two tokens are equal, or a merge names an unknown or
  /// special token, has no token for its result or stands in the list twice.
  BpeTokenizer(std::vector<std::string> tokens, std::vector<BpeMerge> merges,
               std::string_view name = "the vocabulary");

  // Copies would look tokens up in the original's memory.
  BpeTokenizer(const BpeTokenizer&) = delete;
  BpeTokenizer& operator=(const BpeTokenizer&) = delete;
  BpeTokenizer(BpeTokenizer&&) = default;
  BpeTokenizer& operator=(BpeTokenizer&&) = default;

  /// From a tokenizer.json, or from a folder that has one, or vocab.json + merges.txt, or encoder.json +
  /// vocab.bpe (the first of these that is complete). Throws IoError and DataError; files above 64 MiB are
  /// refused.
  static BpeTokenizer load(const std::filesystem::path& where);
  /// From a vocabulary (JSON, token to id; ids 0 to size - 1, each once) and its merges (text).
  static BpeTokenizer load(const std::filesystem::path& vocabulary, const std::filesystem::path& merges);
  /// From Hugging Face's tokenizer.json with a BPE model and GPT-2's byte-level pre-tokenizer; anything that
  /// would change ids (a normalizer, another pattern, a prefix space) is refused. Added tokens become
  /// special; templates of added BOS and EOS tokens are not applied.
  static BpeTokenizer load_tokenizer_json(const std::filesystem::path& path);

  /// Writes vocab.json and merges.txt, which load() and Hugging Face's GPT2Tokenizer read, into `folder`,
  /// which is made if need be. Throws IoError.
  void save(const std::filesystem::path& folder) const;

  int64_t vocab_size() const { return static_cast<int64_t>(tokens_.size()); }
  const std::vector<BpeMerge>& merges() const { return merges_; }
  /// The bytes of a token. Throws DataError for an id outside of the vocabulary.
  const std::string& token(int64_t id) const;
  /// The token with exactly these bytes.
  std::optional<int32_t> find(std::string_view bytes) const;
  /// The ids of special tokens, in increasing order.
  const std::vector<int32_t>& special_tokens() const { return special_; }
  /// The id of "<|endoftext|>", which separates documents.
  std::optional<int32_t> end_of_text() const;

  /// A hash of all tokens and merges (XXH3, 64 bits), the same whichever files they were read from.
  uint64_t hash() const { return hash_; }

  std::vector<int32_t> encode(std::string_view text, SpecialText special = SpecialText::as_text) const;
  /// The bytes of the ids one after another. Throws DataError for an id outside of the vocabulary.
  std::string decode(std::span<const int32_t> ids) const;

 private:
  friend class BpeEncoder;

  struct Merged {
    int32_t rank;  ///< its place in the list of merges, or kNoMerge
    int32_t token;
  };

  void find_bytes(std::string_view name);
  void index_merges(std::string_view name);
  void find_special_tokens();
  uint64_t compute_hash() const;
  Merged merged(int32_t left, int32_t right) const;

  std::vector<std::string> tokens_;
  std::vector<BpeMerge> merges_;
  std::unordered_map<std::string_view, int32_t> ids_;  ///< views into tokens_
  std::array<int32_t, 256> byte_ids_{};
  std::vector<int32_t> special_;

  // Open addressing over the pair of ids; a slot whose rank is kNoMerge is free.
  struct Slot {
    uint64_t pair;
    Merged merged;
  };
  std::vector<Slot> slots_;
  uint64_t hash_ = 0;
};

/// Encodes with one vocabulary and remembers the words it has seen: a few times faster than encode() of the
/// vocabulary on running text. For one thread at a time; the vocabulary must outlive it.
class BpeEncoder {
 public:
  explicit BpeEncoder(const BpeTokenizer& tokenizer);
  BpeEncoder(BpeEncoder&&) noexcept;
  BpeEncoder& operator=(BpeEncoder&&) noexcept;
  ~BpeEncoder();

  /// Appends the ids of `text` to `ids`.
  void encode(std::string_view text, std::vector<int32_t>& ids, SpecialText special = SpecialText::as_text);

 private:
  friend class BpeTokenizer;
  class WordCache;

  BpeEncoder(const BpeTokenizer& tokenizer, bool remember);
  void encode_text(std::string_view text, std::vector<int32_t>& ids);
  void encode_piece(std::string_view piece, std::vector<int32_t>& ids);
  void merge(std::string_view piece, std::vector<int32_t>& ids) const;
  void merge_short(std::string_view piece, std::vector<int32_t>& ids) const;
  void merge_long(std::string_view piece, std::vector<int32_t>& ids) const;

  const BpeTokenizer* tokenizer_;
  std::unique_ptr<WordCache> cache_;
};

}  // namespace normformer
