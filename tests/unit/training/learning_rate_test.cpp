#include "normformer/training/learning_rate.h"

#include <gtest/gtest.h>

namespace normformer {
namespace {

OptimizerConfig optimizer(DecayStyle decay) {
  OptimizerConfig o;
  o.lr = 1.0;
  o.min_lr = 0.1;
  o.warmup_updates = 10;
  o.decay = decay;
  return o;
}

TEST(LearningRate, WarmsUpLinearlyFromZero) {
  const OptimizerConfig o = optimizer(DecayStyle::cosine);
  EXPECT_DOUBLE_EQ(learning_rate(o, 110, 1), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate(o, 110, 5), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(o, 110, 10), 1.0);
}

TEST(LearningRate, DecaysAsNamed) {
  EXPECT_DOUBLE_EQ(learning_rate(optimizer(DecayStyle::constant), 110, 100), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(optimizer(DecayStyle::linear), 110, 60), 0.55);
  EXPECT_DOUBLE_EQ(learning_rate(optimizer(DecayStyle::cosine), 110, 60), 0.55);
  EXPECT_NEAR(learning_rate(optimizer(DecayStyle::cosine), 110, 35), 0.1 + 0.9 * 0.8535533905932737, 1e-15);
  OptimizerConfig square = optimizer(DecayStyle::polynomial);
  square.decay_power = 2.0;
  EXPECT_DOUBLE_EQ(learning_rate(square, 110, 60), 0.1 + 0.9 * 0.25);
}

TEST(LearningRate, StaysAtTheEndAndHeedsDecayUpdates) {
  OptimizerConfig o = optimizer(DecayStyle::linear);
  EXPECT_DOUBLE_EQ(learning_rate(o, 110, 110), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate(o, 110, 500), 0.1);
  o.decay_updates = 20;
  EXPECT_DOUBLE_EQ(learning_rate(o, 110, 15), 0.55);
  EXPECT_DOUBLE_EQ(learning_rate(o, 110, 50), 0.1);
}

TEST(LearningRate, WithoutWarmupTheFirstUpdateIsPastThePeak) {
  OptimizerConfig o = optimizer(DecayStyle::linear);
  o.warmup_updates = 0;
  EXPECT_DOUBLE_EQ(learning_rate(o, 100, 1), 0.1 + 0.9 * 0.99);
}

}  // namespace
}  // namespace normformer
