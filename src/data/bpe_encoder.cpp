#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <limits>
#include <queue>
#include <utility>

#include <xxhash.h>

#include "normformer/core/error.h"
#include "normformer/data/bpe_tokenizer.h"
#include "normformer/data/pretokenizer.h"

namespace normformer {

namespace {

constexpr int32_t kNoMerge = -1;
constexpr int32_t kLastRank = std::numeric_limits<int32_t>::max();
constexpr std::size_t kShortPiece = 32;
constexpr std::size_t kLongestCached = 64;

/// A special token's text found in a text.
struct SpecialMatch {
  std::size_t begin;
  int32_t id;
};

/// The first special token at or after `begin`, the longest where several begin there; id -1 and the end of
/// the text where there is none.
SpecialMatch find_special(const BpeTokenizer& tokenizer, const std::array<bool, 256>& first_bytes,
                          std::string_view text, std::size_t begin) {
  for (std::size_t position = begin; position < text.size(); ++position) {
    if (!first_bytes[static_cast<unsigned char>(text[position])]) continue;
    SpecialMatch best{position, -1};
    for (const int32_t id : tokenizer.special_tokens()) {
      const std::string& token = tokenizer.token(id);
      const bool longer = best.id < 0 || token.size() > tokenizer.token(best.id).size();
      if (longer && text.substr(position, token.size()) == token) best.id = id;
    }
    if (best.id >= 0) return best;
  }
  return {text.size(), -1};
}

}  // namespace

/// The ids of words seen before, found by hash. Emptied when full, which bounds its memory.
class BpeEncoder::WordCache {
 public:
  WordCache() : slots_(kSlots) {}

  static uint64_t hash(std::string_view word) { return XXH3_64bits(word.data(), word.size()); }

  /// Appends the word's ids to `ids`; false where it is not known.
  bool take(std::string_view word, uint64_t hash, std::vector<int32_t>& ids) const {
    for (std::size_t i = hash & (kSlots - 1);; i = (i + 1) & (kSlots - 1)) {
      const Slot& slot = slots_[i];
      if (slot.length == 0) return false;
      if (slot.hash == hash && slot.length == word.size() &&
          std::memcmp(words_.data() + slot.word, word.data(), word.size()) == 0) {
        ids.insert(ids.end(), ids_.begin() + slot.ids, ids_.begin() + slot.ids + slot.num_ids);
        return true;
      }
    }
  }

  void add(std::string_view word, uint64_t hash, std::span<const int32_t> ids) {
    if (2 * used_ >= kSlots) clear();
    std::size_t i = hash & (kSlots - 1);
    while (slots_[i].length != 0) i = (i + 1) & (kSlots - 1);
    slots_[i] = {hash, static_cast<uint32_t>(words_.size()), static_cast<uint32_t>(ids_.size()),
                 static_cast<uint16_t>(word.size()), static_cast<uint16_t>(ids.size())};
    words_.append(word);
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    ++used_;
  }

 private:
  // Half of them hold words of at most kLongestCached bytes, so that 32-bit offsets suffice.
  static constexpr std::size_t kSlots = std::size_t{1} << 19;

  struct Slot {
    uint64_t hash = 0;
    uint32_t word = 0;
    uint32_t ids = 0;
    uint16_t length = 0;  ///< of the word; 0 for a free slot
    uint16_t num_ids = 0;
  };

  void clear() {
    std::fill(slots_.begin(), slots_.end(), Slot{});
    words_.clear();
    ids_.clear();
    used_ = 0;
  }

  std::vector<Slot> slots_;
  std::string words_;
  std::vector<int32_t> ids_;
  std::size_t used_ = 0;
};

BpeEncoder::BpeEncoder(const BpeTokenizer& tokenizer) : BpeEncoder(tokenizer, true) {}
BpeEncoder::BpeEncoder(const BpeTokenizer& tokenizer, bool remember)
    : tokenizer_(&tokenizer), cache_(remember ? std::make_unique<WordCache>() : nullptr) {}
BpeEncoder::BpeEncoder(BpeEncoder&&) noexcept = default;
BpeEncoder& BpeEncoder::operator=(BpeEncoder&&) noexcept = default;
BpeEncoder::~BpeEncoder() = default;

void BpeEncoder::encode(std::string_view text, std::vector<int32_t>& ids, SpecialText special) {
  if (special == SpecialText::as_text) return encode_text(text, ids);
  std::array<bool, 256> first_bytes{};
  for (const int32_t id : tokenizer_->special_tokens()) {
    first_bytes[static_cast<unsigned char>(tokenizer_->token(id).front())] = true;
  }
  for (std::size_t begin = 0; begin < text.size();) {
    const SpecialMatch match = find_special(*tokenizer_, first_bytes, text, begin);
    encode_text(text.substr(begin, match.begin - begin), ids);
    if (match.id < 0) return;
    ids.push_back(match.id);
    begin = match.begin + tokenizer_->token(match.id).size();
  }
}

void BpeEncoder::encode_text(std::string_view text, std::vector<int32_t>& ids) {
  for_each_piece(text, [&](std::string_view piece) { encode_piece(piece, ids); });
}

void BpeEncoder::encode_piece(std::string_view piece, std::vector<int32_t>& ids) {
  if (piece.size() == 1) {
    ids.push_back(tokenizer_->byte_ids_[static_cast<unsigned char>(piece[0])]);
    return;
  }
  if (!cache_ || piece.size() > kLongestCached) return merge(piece, ids);
  const uint64_t hash = WordCache::hash(piece);
  if (cache_->take(piece, hash, ids)) return;
  const std::size_t before = ids.size();
  merge(piece, ids);
  cache_->add(piece, hash, std::span(ids).subspan(before));
}

void BpeEncoder::merge(std::string_view piece, std::vector<int32_t>& ids) const {
  if (piece.size() <= kShortPiece) {
    merge_short(piece, ids);
  } else {
    merge_long(piece, ids);
  }
}

void BpeEncoder::merge_short(std::string_view piece, std::vector<int32_t>& ids) const {
  std::array<int32_t, kShortPiece> symbols;
  std::array<int32_t, kShortPiece> ranks;  // of the pair that each symbol begins
  std::size_t count = piece.size();
  for (std::size_t i = 0; i < count; ++i) {
    symbols[i] = tokenizer_->byte_ids_[static_cast<unsigned char>(piece[i])];
  }
  const auto rank_at = [&](std::size_t i) {
    const int32_t rank = i + 1 < count ? tokenizer_->merged(symbols[i], symbols[i + 1]).rank : kNoMerge;
    return rank == kNoMerge ? kLastRank : rank;
  };
  for (std::size_t i = 0; i < count; ++i) ranks[i] = rank_at(i);
  while (true) {
    const int32_t lowest = *std::min_element(ranks.begin(), ranks.begin() + count);
    if (lowest == kLastRank) break;
    std::size_t kept = 0;
    for (std::size_t i = 0; i < count; ++kept) {
      const bool merge = ranks[i] == lowest;
      symbols[kept] = merge ? tokenizer_->merged(symbols[i], symbols[i + 1]).token : symbols[i];
      i += merge ? 2 : 1;
    }
    count = kept;
    for (std::size_t i = 0; i < count; ++i) ranks[i] = rank_at(i);
  }
  ids.insert(ids.end(), symbols.begin(), symbols.begin() + count);
}

void BpeEncoder::merge_long(std::string_view piece, std::vector<int32_t>& ids) const {
  struct Symbol {
    int32_t id;
    int32_t rank;  // of the pair with the next symbol; kNoMerge without one, or when merged away
    uint32_t previous;
    uint32_t next;
  };
  const auto count = static_cast<uint32_t>(piece.size());
  NF_CHECK(piece.size() < std::numeric_limits<uint32_t>::max(), "a word of {} bytes", piece.size());
  std::vector<Symbol> symbols(count);
  using Candidate = std::pair<int32_t, uint32_t>;  // rank, place
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
  const auto consider = [&](uint32_t place) {
    Symbol& symbol = symbols[place];
    symbol.rank =
        symbol.next < count ? tokenizer_->merged(symbol.id, symbols[symbol.next].id).rank : kNoMerge;
    if (symbol.rank != kNoMerge) candidates.emplace(symbol.rank, place);
  };
  for (uint32_t i = 0; i < count; ++i) {
    symbols[i] = {tokenizer_->byte_ids_[static_cast<unsigned char>(piece[i])], kNoMerge, i - 1, i + 1};
  }
  for (uint32_t i = 0; i < count; ++i) consider(i);

  std::vector<uint32_t> places;
  while (!candidates.empty()) {
    // All occurrences of the lowest pair are merged before any pair that their merging makes.
    const int32_t lowest = candidates.top().first;
    places.clear();
    for (; !candidates.empty() && candidates.top().first == lowest; candidates.pop()) {
      places.push_back(candidates.top().second);
    }
    for (const uint32_t place : places) {
      Symbol& symbol = symbols[place];
      if (symbol.rank != lowest) continue;  // a neighbour took part of the pair
      const uint32_t gone = symbol.next;
      symbol.id = tokenizer_->merged(symbol.id, symbols[gone].id).token;
      symbol.next = symbols[gone].next;
      symbols[gone].rank = kNoMerge;
      if (symbol.next < count) symbols[symbol.next].previous = place;
      consider(place);
      if (symbol.previous < count) consider(symbol.previous);
    }
  }
  for (uint32_t i = 0; i < count; i = symbols[i].next) ids.push_back(symbols[i].id);
}

}  // namespace normformer
