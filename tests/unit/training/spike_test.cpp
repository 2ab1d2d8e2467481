#include "normformer/training/spike.h"

#include <gtest/gtest.h>

namespace normformer {
namespace {

double z(const std::vector<double>& values, double value) { return robust_zscore(values, value); }

// By hand: median 3, distances 2 1 0 1 97, their median 1.
TEST(Spike, ScoresAreOverTheMedianInMediansOfDistances) {
  EXPECT_DOUBLE_EQ(z({1, 2, 3, 4, 100}, 10), 7.0 / 1.4826);
  EXPECT_DOUBLE_EQ(z({100, 4, 1, 3, 2}, 10), 7.0 / 1.4826);
  EXPECT_DOUBLE_EQ(z({1, 2, 3, 4, 100}, 0), -3.0 / 1.4826);
  // Median 2.5, distances 1.5 0.5 0.5 2.5, their median 1.
  EXPECT_DOUBLE_EQ(z({1, 2, 3, 5}, 4), 1.5 / 1.4826);
  EXPECT_DOUBLE_EQ(z({4}, 4), 0.0);
}

TEST(Spike, ValuesThatAreAlikeHaveAThousandthOfTheirSizeAsSpread) {
  EXPECT_NEAR(z({2, 2, 2}, 2.1), 50.0, 1e-9);
  EXPECT_NEAR(z({-2, -2, -2}, -1.9), 50.0, 1e-9);
  EXPECT_EQ(z({0, 0}, 0), 0.0);
  EXPECT_GT(z({0, 0}, 1), 1e300);
}

RecentBatches counted(const SpikeRule& rule, int64_t batches) {
  RecentBatches recent;
  for (int64_t i = 1; i <= batches; ++i)
    enter_batch(rule, recent, static_cast<double>(i), static_cast<double>(10 * i));
  return recent;
}

TEST(Spike, NothingIsJudgedBeforeAQuarterOfTheWindow) {
  const SpikeRule rule{3.0, 18};
  EXPECT_FALSE(spike_scores(rule, counted(rule, 4), 1e9, 1e9).has_value());
  // 1 ... 5: median 3, distances 2 1 0 1 2.
  const auto scores = spike_scores(rule, counted(rule, 5), 6.0, 20.0);
  ASSERT_TRUE(scores.has_value());
  EXPECT_DOUBLE_EQ(scores->loss, 3.0 / 1.4826);
  EXPECT_DOUBLE_EQ(scores->gradient_norm, -1.0 / 1.4826);
  EXPECT_EQ(scores->batches, 5);
  EXPECT_FALSE(spike_scores({0.0, 18}, counted(rule, 5), 6.0, 20.0).has_value());
}

TEST(Spike, EitherNumberMakesOneAndAFallDoesNot) {
  const SpikeRule rule{3.0, 8};
  EXPECT_TRUE(is_spike(rule, {3.1, 0.0, 8}));
  EXPECT_TRUE(is_spike(rule, {0.0, 3.1, 8}));
  EXPECT_FALSE(is_spike(rule, {3.0, 3.0, 8}));
  EXPECT_FALSE(is_spike(rule, {-100.0, -100.0, 8}));
  EXPECT_FALSE(is_spike({0.0, 8}, {100.0, 100.0, 8}));
}

TEST(Spike, TheWindowHoldsTheNewest) {
  const SpikeRule rule{3.0, 8};
  const RecentBatches recent = counted(rule, 11);
  EXPECT_EQ(recent.losses, (std::vector<double>{4, 5, 6, 7, 8, 9, 10, 11}));
  EXPECT_EQ(recent.gradient_norms.front(), 40.0);
  EXPECT_EQ(recent.gradient_norms.size(), 8u);
  EXPECT_EQ(start_recent({3.0, 10}, recent), recent);
  EXPECT_EQ(start_recent({3.0, 2}, recent).losses, (std::vector<double>{10, 11}));
  EXPECT_EQ(start_recent({0.0, 8}, recent), RecentBatches{});
  EXPECT_EQ(counted({0.0, 8}, 3), RecentBatches{});
}

}  // namespace
}  // namespace normformer
