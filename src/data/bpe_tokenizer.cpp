#include "normformer/data/bpe_tokenizer.h"

#include <algorithm>
#include <bit>
#include <utility>

#include <fmt/format.h>
#include <xxhash.h>

#include "normformer/core/error.h"

#include "byte_alphabet.h"

namespace normformer {

namespace {

constexpr int32_t kNoMerge = -1;
constexpr std::string_view kEndOfText = "<|endoftext|>";

uint64_t pair_of(int32_t left, int32_t right) {
  return (uint64_t{static_cast<uint32_t>(left)} << 32) | static_cast<uint32_t>(right);
}

std::size_t slot_of(uint64_t pair, std::size_t slots) {
  // Fibonacci hashing; the number of slots is a power of two.
  return static_cast<std::size_t>((pair * 0x9E3779B97F4A7C15ull) >> (64 - std::countr_zero(slots)));
}

}  // namespace

BpeTokenizer::BpeTokenizer(std::vector<std::string> tokens, std::vector<BpeMerge> merges,
                           std::string_view name)
    : tokens_(std::move(tokens)), merges_(std::move(merges)) {
  ids_.reserve(tokens_.size());
  for (std::size_t id = 0; id < tokens_.size(); ++id) {
    if (tokens_[id].empty()) throw DataError(fmt::format("{}: token {} is empty", name, id));
    const auto [other, added] = ids_.emplace(tokens_[id], static_cast<int32_t>(id));
    if (!added) {
      throw DataError(fmt::format("{}: tokens {} and {} are the same, \"{}\"", name, other->second, id,
                                  to_alphabet(tokens_[id])));
    }
  }
  find_bytes(name);
  find_special_tokens();
  index_merges(name);
  hash_ = compute_hash();
}

void BpeTokenizer::find_bytes(std::string_view name) {
  for (int byte = 0; byte < 256; ++byte) {
    const char character = static_cast<char>(byte);
    const auto id = find(std::string_view(&character, 1));
    if (!id) {
      throw DataError(fmt::format(
          "{} has no token for the byte 0x{:02X}; a byte-level vocabulary has all 256", name, byte));
    }
    byte_ids_[byte] = *id;
  }
}

void BpeTokenizer::find_special_tokens() {
  std::vector<bool> ordinary(tokens_.size(), false);
  for (const int32_t id : byte_ids_) ordinary[id] = true;
  std::string result;
  for (const BpeMerge& merge : merges_) {
    const bool known =
        merge.left >= 0 && merge.left < vocab_size() && merge.right >= 0 && merge.right < vocab_size();
    if (!known) continue;  // refused by index_merges
    result = tokens_[merge.left] + tokens_[merge.right];
    if (const auto id = find(result)) ordinary[*id] = true;
  }
  for (std::size_t id = 0; id < tokens_.size(); ++id) {
    if (!ordinary[id]) special_.push_back(static_cast<int32_t>(id));
  }
}

void BpeTokenizer::index_merges(std::string_view name) {
  slots_.assign(std::bit_ceil(2 * merges_.size() + 2), Slot{0, {kNoMerge, 0}});
  for (std::size_t rank = 0; rank < merges_.size(); ++rank) {
    const auto [left, right] = merges_[rank];
    for (const int32_t part : {left, right}) {
      if (part < 0 || part >= vocab_size()) {
        throw DataError(fmt::format("{}: merge {} names token {} of {}", name, rank, part, vocab_size()));
      }
      if (std::binary_search(special_.begin(), special_.end(), part)) {
        throw DataError(fmt::format("{}: merge {} names \"{}\", which neither a byte nor a merge makes", name,
                                    rank, to_alphabet(tokens_[part])));
      }
    }
    const std::string bytes = tokens_[left] + tokens_[right];
    const auto result = find(bytes);
    if (!result) {
      throw DataError(fmt::format("{}: merge {} makes \"{}\", which the vocabulary lacks", name, rank,
                                  to_alphabet(bytes)));
    }
    const uint64_t pair = pair_of(left, right);
    std::size_t slot = slot_of(pair, slots_.size());
    while (slots_[slot].merged.rank != kNoMerge) {
      if (slots_[slot].pair == pair) {
        throw DataError(fmt::format("{}: merges {} and {} are the same, \"{}\" and \"{}\"", name,
                                    slots_[slot].merged.rank, rank, to_alphabet(tokens_[left]),
                                    to_alphabet(tokens_[right])));
      }
      slot = (slot + 1) & (slots_.size() - 1);
    }
    slots_[slot] = {pair, {static_cast<int32_t>(rank), *result}};
  }
}

BpeTokenizer::Merged BpeTokenizer::merged(int32_t left, int32_t right) const {
  const uint64_t pair = pair_of(left, right);
  std::size_t slot = slot_of(pair, slots_.size());
  while (slots_[slot].merged.rank != kNoMerge && slots_[slot].pair != pair) {
    slot = (slot + 1) & (slots_.size() - 1);
  }
  return slots_[slot].merged;
}

uint64_t BpeTokenizer::compute_hash() const {
  std::string all;
  const auto put = [&all](uint64_t value) {
    all.append(reinterpret_cast<const char*>(&value), sizeof(value));
  };
  put(tokens_.size());
  for (const std::string& token : tokens_) {
    put(token.size());
    all += token;
  }
  for (const BpeMerge& merge : merges_) put(pair_of(merge.left, merge.right));
  return XXH3_64bits(all.data(), all.size());
}

const std::string& BpeTokenizer::token(int64_t id) const {
  if (id < 0 || id >= vocab_size()) {
    throw DataError(fmt::format("token {} is outside of the vocabulary of {}", id, vocab_size()));
  }
  return tokens_[id];
}

std::optional<int32_t> BpeTokenizer::find(std::string_view bytes) const {
  const auto found = ids_.find(bytes);
  return found == ids_.end() ? std::nullopt : std::optional<int32_t>(found->second);
}

std::optional<int32_t> BpeTokenizer::end_of_text() const { return find(kEndOfText); }

std::vector<int32_t> BpeTokenizer::encode(std::string_view text, SpecialText special) const {
  // A few words are not worth a cache of megabytes.
  const bool remember = text.size() > (std::size_t{1} << 20);
  std::vector<int32_t> ids;
  BpeEncoder(*this, remember).encode(text, ids, special);
  return ids;
}

std::string BpeTokenizer::decode(std::span<const int32_t> ids) const {
  std::string bytes;
  for (const int32_t id : ids) bytes += token(id);
  return bytes;
}

}  // namespace normformer
