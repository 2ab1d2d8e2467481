#include "normformer/data/masking.h"

#include <array>

#include "normformer/core/error.h"

namespace normformer {

namespace {

// An ordinary token by 64 random bits.
int32_t random_token(const MaskingRule& rule, uint64_t bits) {
  const bool skips = rule.start_token < rule.ordinary_tokens;
  const auto choices = static_cast<uint64_t>(rule.ordinary_tokens - (skips ? 1 : 0));
  const auto drawn = static_cast<int32_t>(bits % choices);
  return skips && drawn >= rule.start_token ? drawn + 1 : drawn;
}

}  // namespace

void mask_sample(const MaskingRule& rule, int64_t index, std::span<int32_t> tokens,
                 std::span<uint8_t> predicted) {
  NF_CHECK(predicted.size() == tokens.size(), "{} tokens, and room for {}", tokens.size(), predicted.size());
  NF_CHECK(rule.ordinary_tokens >= 2, "a vocabulary of {} tokens", rule.ordinary_tokens);
  const RandomStream stream = rule.stream.with(static_cast<uint64_t>(index));
  for (size_t t = 0; t < tokens.size(); ++t) {
    const std::array<uint32_t, 4> words = stream.words(t);
    const bool is_special = tokens[t] == rule.start_token || tokens[t] == rule.mask_token;
    predicted[t] = !is_special && to_unit_open(words[0]) < rule.probability ? 1 : 0;
    if (predicted[t] == 0) continue;
    const double share = to_unit_open(words[1]);
    if (share < rule.kept) continue;
    tokens[t] = share < rule.kept + rule.random ? random_token(rule, (uint64_t{words[3]} << 32) | words[2])
                                                : rule.mask_token;
  }
}

}  // namespace normformer
