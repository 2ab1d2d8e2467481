#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "normformer/data/bpe_tokenizer.h"

namespace normformer {

/// How often each piece of a text occurs, pieces cut as for encoding. Count parts of a corpus in several
/// threads, each with its own WordCounts, and add them up: the sum does not depend on how it was cut.
class WordCounts {
 public:
  /// Counts the pieces of a text. Parts of one text must be cut where safe_cut() says.
  void add(std::string_view text);
  /// Adds another's counts to these.
  void add(const WordCounts& other);

  /// Every piece and its count, in increasing order of the piece's bytes.
  std::vector<std::pair<std::string_view, int64_t>> sorted() const;
  bool empty() const { return counts_.empty(); }

 private:
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view word) const;
  };
  std::unordered_map<std::string, int64_t, Hash, std::equal_to<>> counts_;
};

/// What vocabulary train_bpe makes.
struct BpeTrainingOptions {
  int64_t vocab_size = 0;      ///< all tokens: 256 bytes, the merges, and "<|endoftext|>" as the last id
  int64_t min_pair_count = 2;  ///< pairs that occur less often are not merged
};

/// Trains a byte-level BPE vocabulary: again and again the pair of adjacent tokens that occurs most often
/// becomes one token; of equally frequent pairs the one with the lower ids. Ids are GPT-2's: bytes in its
/// order, then the merges. A pure function of the counts. Where pairs run out, the vocabulary is smaller than
/// asked for. Throws ConfigError for a size below 257, DataError where there are no words.
/// Source: Sennrich, Haddow, Birch, ACL 2016, algorithm 1.
BpeTokenizer train_bpe(const WordCounts& words, const BpeTrainingOptions& options);

}  // namespace normformer
