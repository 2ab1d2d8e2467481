#include "normformer/training/loss_scale.h"

#include <vector>

#include <gtest/gtest.h>

namespace normformer {
namespace {

TrainConfig fp16(int64_t global_batch, int64_t micro_batch) {
  TrainConfig c;
  c.precision = Precision::fp16;
  c.global_batch = global_batch;
  c.micro_batch = micro_batch;
  return c;
}

TEST(LossScale, TheWindowIsFairseqsWhateverTheLayout) {
  // fairseq: 2^14 / data-parallel ranks / micro-batches of each; the paper's command had 16 of them.
  EXPECT_EQ(loss_scale_rule(fp16(64, 4)).window, 1024);
  EXPECT_EQ(loss_scale_rule(fp16(1, 1)).window, 16384);
  EXPECT_EQ(loss_scale_rule(fp16(7, 2)).window, 4096);
  EXPECT_EQ(loss_scale_rule(fp16(1 << 20, 1)).window, 1);
  TrainConfig c = fp16(64, 4);
  c.loss_scale_window = 7;
  EXPECT_EQ(loss_scale_rule(c).window, 7);
}

TEST(LossScale, OtherPrecisionsHaveNone) {
  TrainConfig c;
  for (const Precision precision : {Precision::fp64, Precision::fp32, Precision::bf16}) {
    c.precision = precision;
    const LossScaleRule rule = loss_scale_rule(c);
    EXPECT_FALSE(rule.active());
    EXPECT_EQ(start_loss_scale(rule, {.value = 8, .overflows = 2}), LossScale{});
    EXPECT_EQ(next_loss_scale(rule, {}, true), LossScale{});
    EXPECT_EQ(LossScale{}.factor(), 1.0);
  }
}

TEST(LossScale, StartsWhereARunHadNone) {
  const LossScaleRule rule = loss_scale_rule(fp16(8, 1));
  EXPECT_EQ(start_loss_scale(rule, {}), (LossScale{.value = 128}));
  const LossScale saved{.value = 0.5, .clean_updates = 3, .overflows = 9};
  EXPECT_EQ(start_loss_scale(rule, saved), saved);
}

TEST(LossScale, HalvesWithEveryOverflowAndDoublesAfterAWindowWithoutOne) {
  const LossScaleRule rule{.init = 16, .window = 3, .min = 1};
  LossScale scale = start_loss_scale(rule, {});
  std::vector<double> values;
  for (const bool overflowed : {true, true, false, false, true, false, false, false, false, false, false}) {
    scale = next_loss_scale(rule, scale, overflowed);
    values.push_back(scale.value);
  }
  EXPECT_EQ(values, (std::vector<double>{8, 4, 4, 4, 2, 2, 2, 4, 4, 4, 8}));
  EXPECT_EQ(scale.overflows, 3);
  EXPECT_EQ(scale.clean_updates, 0);
}

}  // namespace
}  // namespace normformer
