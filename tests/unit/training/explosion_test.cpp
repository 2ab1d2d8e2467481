#include "normformer/training/explosion.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

namespace normformer {
namespace {

const ExplosionRule kRule{.rise = 1.0, .loss_scale_min = 1e-4};
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

LossTrend trend_of(const std::vector<double>& losses, const ExplosionRule& rule = kRule) {
  LossTrend trend;
  for (const double loss : losses) enter_loss(rule, trend, loss);
  return trend;
}

TEST(Explosion, TheRiseIsOfMeansOverFiveUpdates) {
  EXPECT_EQ(trend_of({9, 8, 7, 6}).lowest, std::nullopt);
  EXPECT_EQ(rise_of(trend_of({1, 1, 1, 9})), 0.0);
  EXPECT_EQ(trend_of({9, 8, 7, 6, 5}).lowest, 7.0);
  EXPECT_EQ(trend_of({9, 8, 7, 6, 5, 4}).lowest, 6.0);
  EXPECT_EQ(trend_of({9, 8, 7, 6, 5, 4}).newest, (std::vector<double>{8, 7, 6, 5, 4}));
  // Means 7, 6, then (7 + 6 + 5 + 4 + 28) / 5 = 10.
  EXPECT_DOUBLE_EQ(rise_of(trend_of({9, 8, 7, 6, 5, 4, 28})), 4.0);
}

TEST(Explosion, OneSpikeIsNoneAndLastingOnesAre) {
  const auto found = [](const std::vector<double>& losses) {
    return find_explosion(kRule, {.loss = losses.back()}, trend_of(losses));
  };
  EXPECT_EQ(found({3, 3, 3, 3, 3, 7.9}), std::nullopt);
  EXPECT_EQ(found({3, 3, 3, 3, 3, 7.9, 3}), std::nullopt);
  EXPECT_EQ(found({3, 3, 3, 3, 3, 4, 4, 4, 4}), std::nullopt);
  EXPECT_EQ(found({3, 3, 3, 3, 3, 4, 4, 4, 4, 4}), ExplosionReason::rise);
  EXPECT_EQ(found({9, 9, 9, 9, 9, 4, 4, 4, 4, 4}), std::nullopt);
}

TEST(Explosion, NumbersThatAreNotFiniteAreOneAtOnce) {
  EXPECT_EQ(find_explosion(kRule, {.loss = 3.0, .nonfinite = true}, {}), ExplosionReason::nonfinite);
  EXPECT_EQ(find_explosion(kRule, {.loss = kNan, .overflowed = true}, {}), ExplosionReason::nonfinite);
  EXPECT_EQ(find_explosion(kRule, {.loss = 3.0}, {}), std::nullopt);
}

TEST(Explosion, AnOverflowIsOneWhereTheLossScaleIsSpent) {
  EXPECT_EQ(find_explosion(kRule, {.loss = 3.0, .overflowed = true, .loss_scale = 0x1p-13}, {}),
            std::nullopt);
  EXPECT_EQ(find_explosion(kRule, {.loss = 3.0, .overflowed = true, .loss_scale = 0x1p-14}, {}),
            ExplosionReason::loss_scale);
}

TEST(Explosion, NothingIsLookedForWithoutARise) {
  const ExplosionRule none{};
  EXPECT_EQ(trend_of({1, 2, 3, 4, 5, 6}, none), LossTrend{});
  EXPECT_EQ(find_explosion(none, {.loss = kNan, .nonfinite = true}, {}), std::nullopt);
}

TEST(Explosion, TheLeastLossScaleCountsInFp16Only) {
  RunConfig config;
  config.health.explosion_rise = 2.0;
  EXPECT_EQ(explosion_rule(config).loss_scale_min, 0.0);
  config.train.precision = Precision::fp16;
  EXPECT_EQ(explosion_rule(config).loss_scale_min, 1e-4);
  EXPECT_EQ(explosion_rule(config).rise, 2.0);
}

}  // namespace
}  // namespace normformer
