#include "normformer/data/masking.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "normformer/core/error.h"

namespace normformer {
namespace {

constexpr int32_t kStart = 7;
constexpr int32_t kMask = 50;
constexpr int32_t kToken = 20;

MaskingRule rule_of(double probability, double kept, double random, uint64_t seed = 1) {
  return {.probability = probability,
          .kept = kept,
          .random = random,
          .mask_token = kMask,
          .start_token = kStart,
          .ordinary_tokens = 50,
          .stream = RandomStream{seed}.with("masking")};
}

struct Masked {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> predicted;
  bool operator==(const Masked&) const = default;
};

Masked masked(const MaskingRule& rule, int64_t index, std::vector<int32_t> tokens) {
  std::vector<uint8_t> predicted(tokens.size(), 2);
  mask_sample(rule, index, tokens, predicted);
  return {tokens, predicted};
}

// Within five standard deviations of a binomial distribution.
void expect_rate(int64_t count, int64_t of, double rate) {
  const auto n = static_cast<double>(of);
  EXPECT_NEAR(static_cast<double>(count), n * rate, 5.0 * std::sqrt(n * rate * (1.0 - rate)));
}

TEST(Masking, RatesAreThoseAskedFor) {
  for (const auto& [probability, kept, random] :
       {std::array{0.15, 0.1, 0.1}, std::array{0.4, 0.3, 0.2}, std::array{0.9, 0.0, 0.5}}) {
    const std::vector<int32_t> tokens(1000, kToken);
    int64_t predicted = 0;
    int64_t as_mask = 0;
    int64_t as_other = 0;
    for (int64_t sample = 0; sample < 200; ++sample) {
      const Masked m = masked(rule_of(probability, kept, random), sample, tokens);
      for (size_t t = 0; t < tokens.size(); ++t) {
        ASSERT_TRUE(m.predicted[t] == 1 || m.tokens[t] == kToken);
        predicted += m.predicted[t];
        as_mask += m.tokens[t] == kMask ? 1 : 0;
        as_other += m.tokens[t] != kMask && m.tokens[t] != kToken ? 1 : 0;
      }
    }
    expect_rate(predicted, 200'000, probability);
    expect_rate(as_mask, predicted, 1.0 - kept - random);
    // One of 49 random tokens is what stood there.
    expect_rate(as_other, predicted, random * 48.0 / 49.0);
  }
}

TEST(Masking, RandomTokensAreAllOrdinaryOnesAlike) {
  std::array<int64_t, 51> seen{};
  for (int64_t sample = 0; sample < 500; ++sample) {
    const Masked m = masked(rule_of(1.0, 0.0, 1.0), sample, std::vector<int32_t>(100, kToken));
    for (const int32_t token : m.tokens) ++seen.at(static_cast<size_t>(token));
  }
  for (int32_t token = 0; token < 50; ++token) {
    if (token == kStart) continue;
    expect_rate(seen[static_cast<size_t>(token)], 50'000, 1.0 / 49.0);
  }
  EXPECT_EQ(seen[kStart], 0);
  EXPECT_EQ(seen[kMask], 0);
}

TEST(Masking, SpecialTokensAreNeverPredicted) {
  const Masked m = masked(rule_of(1.0, 0.0, 0.0), 3, {kStart, 4, kMask, 5, kStart});
  EXPECT_EQ(m.predicted, (std::vector<uint8_t>{0, 1, 0, 1, 0}));
  EXPECT_EQ(m.tokens, (std::vector<int32_t>{kStart, kMask, kMask, kMask, kStart}));
}

TEST(Masking, IsAFunctionOfSeedAndSampleAlone) {
  const std::vector<int32_t> tokens(64, kToken);
  std::set<std::vector<uint8_t>> different;
  for (const uint64_t seed : {1, 2}) {
    for (int64_t sample = 0; sample < 20; ++sample) {
      const Masked m = masked(rule_of(0.3, 0.1, 0.1, seed), sample, tokens);
      EXPECT_EQ(m, masked(rule_of(0.3, 0.1, 0.1, seed), sample, tokens));
      different.insert(m.predicted);
    }
  }
  EXPECT_EQ(different.size(), 40U);
}

TEST(Masking, RefusesWhatNothingCanBeDrawnFrom) {
  MaskingRule rule = rule_of(0.5, 0.0, 1.0);
  rule.ordinary_tokens = 1;
  EXPECT_THROW(masked(rule, 0, {1, 2}), LogicError);
  std::vector<int32_t> tokens(3);
  std::vector<uint8_t> predicted(2);
  EXPECT_THROW(mask_sample(rule_of(0.5, 0.0, 1.0), 0, tokens, predicted), LogicError);
}

}  // namespace
}  // namespace normformer
