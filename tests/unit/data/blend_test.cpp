#include "normformer/data/blend.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "temporary_folder.h"

namespace normformer {
namespace {

TEST(Blend, OfTwoGivesTheTurnToTheOneThatLagsMost) {
  for (const auto& weights : std::vector<std::vector<int64_t>>{{1, 1}, {3, 4}, {5, 8}, {1, 8}, {32, 1}}) {
    const Blend blend(std::vector<double>(weights.begin(), weights.end()));
    const int64_t total = weights[0] + weights[1];
    std::vector<int64_t> taken = {0, 0};
    for (int64_t i = 0; i < 1000; ++i) {
      const int64_t lag0 = weights[0] * (i + 1) - taken[0] * total;
      const int64_t lag1 = weights[1] * (i + 1) - taken[1] * total;
      const int64_t next = lag0 >= lag1 ? 0 : 1;
      ASSERT_EQ(blend.turn(i), (BlendTurn{next, taken[next]})) << weights[0] << ":" << weights[1] << " " << i;
      ++taken[next];
    }
  }
}

TEST(Blend, NumbersEveryDatasetsSamplesWithoutGapOrRepetition) {
  const Blend blend(std::vector<double>{0.5, 0.03, 0.2, 0.17, 0.1});
  std::vector<int64_t> taken(5, 0);
  for (int64_t i = 0; i < 20000; ++i) {
    for (int64_t k = 0; k < 5; ++k) ASSERT_EQ(blend.count(k, i), taken[k]);
    const BlendTurn turn = blend.turn(i);
    ASSERT_EQ(turn.index, taken[turn.dataset]);
    ++taken[turn.dataset];
  }
}

TEST(Blend, KeepsEveryShareWithinHalfASampleForEachLevel) {
  std::mt19937 random(5);
  for (const int datasets : {1, 2, 3, 7, 8, 31}) {
    std::vector<double> weights(datasets);
    for (auto& weight : weights) weight = std::exp(std::uniform_real_distribution<>(-4, 4)(random));
    const Blend blend(weights);
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    const double bound = 0.5 * std::ceil(std::log2(datasets)) + 1e-6;
    for (const int64_t samples : {1, 10, 999, 12345, 1000000}) {
      int64_t sum = 0;
      for (int64_t k = 0; k < datasets; ++k) {
        const int64_t count = blend.count(k, samples);
        EXPECT_NEAR(static_cast<double>(count), weights[k] / total * static_cast<double>(samples), bound);
        sum += count;
      }
      EXPECT_EQ(sum, samples);
    }
  }
}

TEST(Blend, AnswersFarOutAndForLopsidedWeights) {
  const Blend blend(std::vector<double>{1e-9, 1});
  const int64_t far = int64_t{1} << 60;
  const BlendTurn turn = blend.turn(far);
  EXPECT_EQ(turn.index, blend.count(turn.dataset, far));
  EXPECT_NEAR(static_cast<double>(blend.count(0, far)) / static_cast<double>(far), 1e-9, 1e-12);
}

TEST(Blend, RefusesWeightsThatCannotBeMixed) {
  using ::testing::HasSubstr;
  EXPECT_THROW(Blend(std::vector<double>{}), ConfigError);
  EXPECT_THAT(NF_SENTENCE_OF(ConfigError, Blend(std::vector<double>{1, 0})), HasSubstr("above 0"));
  EXPECT_THROW(Blend(std::vector<double>{1, -1}), ConfigError);
  EXPECT_THROW(Blend(std::vector<double>{std::numeric_limits<double>::quiet_NaN()}), ConfigError);
}

}  // namespace
}  // namespace normformer
