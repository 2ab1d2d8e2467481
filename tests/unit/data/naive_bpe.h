#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "normformer/data/bpe_tokenizer.h"

namespace normformer {

/// Byte-pair merging as its definition says, in quadratic time: find the pair that stands first in the list,
/// merge all its occurrences from left to right, look again.
inline std::vector<int32_t> naive_merges(const BpeTokenizer& tokenizer, std::string_view piece) {
  std::map<std::pair<std::string, std::string>, std::size_t> ranks;
  for (std::size_t rank = 0; rank < tokenizer.merges().size(); ++rank) {
    const BpeMerge& merge = tokenizer.merges()[rank];
    ranks[{tokenizer.token(merge.left), tokenizer.token(merge.right)}] = rank;
  }
  std::vector<std::string> symbols;
  for (const char byte : piece) symbols.emplace_back(1, byte);
  while (true) {
    std::size_t lowest = ranks.size();
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto found = ranks.find({symbols[i], symbols[i + 1]});
      if (found != ranks.end() && found->second < lowest) lowest = found->second;
    }
    if (lowest == ranks.size()) break;
    std::vector<std::string> merged;
    for (std::size_t i = 0; i < symbols.size(); ++i) {
      const auto found = i + 1 < symbols.size() ? ranks.find({symbols[i], symbols[i + 1]}) : ranks.end();
      if (found != ranks.end() && found->second == lowest) {
        merged.push_back(symbols[i] + symbols[i + 1]);
        ++i;
      } else {
        merged.push_back(symbols[i]);
      }
    }
    symbols = merged;
  }
  std::vector<int32_t> ids;
  for (const auto& symbol : symbols) ids.push_back(tokenizer.find(symbol).value());
  return ids;
}

}  // namespace normformer
