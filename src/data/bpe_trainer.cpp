#include "normformer/data/bpe_trainer.h"

#include <algorithm>
#include <array>
#include <queue>
#include <unordered_set>

#include <fmt/format.h>
#include <xxhash.h>

#include "normformer/core/error.h"
#include "normformer/data/pretokenizer.h"

#include "byte_alphabet.h"

namespace normformer {

namespace {

constexpr int64_t kBytes = 256;

uint64_t pair_of(int32_t left, int32_t right) {
  return (uint64_t{static_cast<uint32_t>(left)} << 32) | static_cast<uint32_t>(right);
}

struct PairHash {
  std::size_t operator()(uint64_t pair) const {
    return static_cast<std::size_t>((pair * 0x9E3779B97F4A7C15ull) >> 16);
  }
};

/// A word of the corpus as its current tokens.
struct Word {
  std::vector<int32_t> tokens;
  int64_t count;
};

/// A pair and the count it had when it was put into the queue; the most frequent first, then lower ids.
struct Candidate {
  int64_t count;
  uint64_t pair;
  bool operator<(const Candidate& other) const {
    return count != other.count ? count < other.count : pair > other.pair;
  }
};

/// The words of a corpus and the counts of all adjacent pairs in them, kept up to date as pairs are merged.
class PairStatistics {
 public:
  PairStatistics(std::vector<Word> words, int64_t min_count)
      : words_(std::move(words)), min_count_(min_count) {
    for (std::size_t i = 0; i < words_.size(); ++i) {
      const auto& tokens = words_[i].tokens;
      for (std::size_t t = 0; t + 1 < tokens.size(); ++t) {
        const uint64_t pair = pair_of(tokens[t], tokens[t + 1]);
        pairs_[pair].count += words_[i].count;
        list_word(pair, i);
      }
    }
    for (const auto& [pair, info] : pairs_) offer(pair, info.count);
  }

  /// The most frequent pair, or a count of 0 where none is frequent enough.
  Candidate most_frequent() {
    while (!queue_.empty()) {
      const Candidate top = queue_.top();
      const int64_t count = pairs_.at(top.pair).count;
      if (count == top.count) return top;
      // Counts that fell are corrected here; those that rose were offered anew.
      queue_.pop();
      if (count < top.count) offer(top.pair, count);
    }
    return {0, 0};
  }

  /// Replaces the pair by `token` in every word.
  void merge(uint64_t pair, int32_t token) {
    changes_.clear();
    const std::vector<uint32_t> affected = std::move(pairs_.at(pair).words);
    for (const uint32_t index : affected) merge_in_word(index, pair, token);
    for (const auto& [changed, difference] : changes_) {
      if (difference == 0) continue;
      const int64_t count = pairs_[changed].count += difference;
      if (difference > 0) offer(changed, count);
    }
    pairs_[pair] = {};
  }

 private:
  struct PairInfo {
    int64_t count = 0;
    std::vector<uint32_t> words;  ///< increasing within one merge; may name words that lost the pair
  };

  void offer(uint64_t pair, int64_t count) {
    if (count >= min_count_) queue_.push({count, pair});
  }

  void list_word(uint64_t pair, std::size_t word) {
    auto& words = pairs_[pair].words;
    if (words.empty() || words.back() != word) words.push_back(static_cast<uint32_t>(word));
  }

  void count_pairs(const Word& word, int64_t sign) {
    for (std::size_t t = 0; t + 1 < word.tokens.size(); ++t) {
      changes_[pair_of(word.tokens[t], word.tokens[t + 1])] += sign * word.count;
    }
  }

  void merge_in_word(uint32_t index, uint64_t pair, int32_t token) {
    Word& word = words_[index];
    auto& tokens = word.tokens;
    const auto starts_at = [&](std::size_t t) {
      return t + 1 < tokens.size() && pair_of(tokens[t], tokens[t + 1]) == pair;
    };
    std::size_t first = 0;
    while (first < tokens.size() && !starts_at(first)) ++first;
    if (first == tokens.size()) return;  // an earlier merge took the pair's tokens

    count_pairs(word, -1);
    std::size_t kept = first;
    for (std::size_t t = first; t < tokens.size(); ++kept) {
      const bool merged = starts_at(t);
      tokens[kept] = merged ? token : tokens[t];
      t += merged ? 2 : 1;
    }
    tokens.resize(kept);
    count_pairs(word, +1);
    for (std::size_t t = 0; t + 1 < tokens.size(); ++t) {
      if (tokens[t] == token || tokens[t + 1] == token) list_word(pair_of(tokens[t], tokens[t + 1]), index);
    }
  }

  std::vector<Word> words_;
  int64_t min_count_;
  std::unordered_map<uint64_t, PairInfo, PairHash> pairs_;
  std::unordered_map<uint64_t, int64_t, PairHash> changes_;  ///< of the merge in progress
  std::priority_queue<Candidate> queue_;
};

/// The tokens and merges found so far.
struct TrainedVocabulary {
  std::vector<std::string> tokens;
  std::vector<BpeMerge> merges;
  std::unordered_map<std::string, int32_t> ids;
  std::unordered_set<uint64_t> merged;

  TrainedVocabulary() {
    for (const uint8_t byte : byte_order()) add(std::string(1, static_cast<char>(byte)));
  }

  int32_t add(const std::string& token) {
    const auto [known, added] = ids.emplace(token, static_cast<int32_t>(tokens.size()));
    if (added) tokens.push_back(token);
    return known->second;
  }

  /// The token that a pair becomes: a known one where another pair made the same bytes before. That one may
  /// then stand in front of a token with which it was merged long ago; the pair is listed once.
  int32_t merge(uint64_t pair) {
    const auto left = static_cast<int32_t>(pair >> 32);
    const auto right = static_cast<int32_t>(pair & 0xFFFFFFFFu);
    if (merged.insert(pair).second) merges.push_back({left, right});
    return add(tokens[left] + tokens[right]);
  }
};

std::vector<Word> as_bytes(const WordCounts& counts) {
  std::array<int32_t, kBytes> id_of{};
  for (int32_t id = 0; id < kBytes; ++id) id_of[byte_order()[id]] = id;
  std::vector<Word> words;
  for (const auto& [text, count] : counts.sorted()) {
    Word word{{}, count};
    for (const char byte : text) word.tokens.push_back(id_of[static_cast<unsigned char>(byte)]);
    words.push_back(std::move(word));
  }
  return words;
}

}  // namespace

std::size_t WordCounts::Hash::operator()(std::string_view word) const {
  return XXH3_64bits(word.data(), word.size());
}

void WordCounts::add(std::string_view text) {
  for_each_piece(text, [this](std::string_view piece) {
    const auto known = counts_.find(piece);
    if (known != counts_.end()) {
      ++known->second;
    } else {
      counts_.emplace(piece, 1);
    }
  });
}

void WordCounts::add(const WordCounts& other) {
  for (const auto& [word, count] : other.counts_) counts_[word] += count;
}

std::vector<std::pair<std::string_view, int64_t>> WordCounts::sorted() const {
  std::vector<std::pair<std::string_view, int64_t>> words(counts_.begin(), counts_.end());
  std::sort(words.begin(), words.end());
  return words;
}

BpeTokenizer train_bpe(const WordCounts& words, const BpeTrainingOptions& options) {
  if (options.vocab_size < kBytes + 1) {
    throw ConfigError(fmt::format(
        "a vocabulary of {} tokens is too small: 256 bytes and <|endoftext|> make 257", options.vocab_size));
  }
  if (words.empty()) throw DataError("there is no text to train a vocabulary on");

  TrainedVocabulary vocabulary;
  PairStatistics statistics(as_bytes(words), std::max<int64_t>(1, options.min_pair_count));
  while (static_cast<int64_t>(vocabulary.tokens.size()) < options.vocab_size - 1) {
    const Candidate best = statistics.most_frequent();
    if (best.count == 0) break;
    statistics.merge(best.pair, vocabulary.merge(best.pair));
  }
  vocabulary.tokens.emplace_back("<|endoftext|>");
  return BpeTokenizer(std::move(vocabulary.tokens), std::move(vocabulary.merges), "the trained vocabulary");
}

}  // namespace normformer
