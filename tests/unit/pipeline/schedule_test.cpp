#include "normformer/pipeline/schedule.h"

#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "lists.h"

namespace normformer {
namespace {

TEST(Schedule, OneFOneBOfFourStagesAndEightMicroBatches) {
  const Schedule schedule = one_f_one_b_schedule(4, 8);
  const Schedule drawn = lists(8, {"F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",  //
                                   "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",  //
                                   "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",  //
                                   "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7"});
  EXPECT_EQ(schedule.stages, drawn.stages);
  EXPECT_EQ(schedule.micro_batches, 8);
  EXPECT_EQ(schedule.chunks, 1);
}

TEST(Schedule, GpipeOfFourStagesAndEightMicroBatches) {
  const std::string drawn = "F0 F1 F2 F3 F4 F5 F6 F7 B0 B1 B2 B3 B4 B5 B6 B7";
  EXPECT_EQ(gpipe_schedule(4, 8).stages, lists(8, {drawn, drawn, drawn, drawn}).stages);
}

TEST(Schedule, FewerMicroBatchesThanStages) {
  EXPECT_EQ(one_f_one_b_schedule(4, 2).stages,
            lists(2, {"F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"}).stages);
  EXPECT_EQ(one_f_one_b_schedule(2, 0).stages, lists(0, {"", ""}).stages);
  EXPECT_EQ(gpipe_schedule(2, 0).stages, lists(0, {"", ""}).stages);
}

TEST(Schedule, ImpossibleSizesAreRefused) {
  EXPECT_THROW(gpipe_schedule(0, 4), LogicError);
  EXPECT_THROW(one_f_one_b_schedule(0, 4), LogicError);
  EXPECT_THROW(gpipe_schedule(2, -1), LogicError);
  EXPECT_THROW(one_f_one_b_schedule(2, -1), LogicError);
}

TEST(Schedule, MessagesOfAPlainPipeline) {
  const Schedule schedule = gpipe_schedule(3, 1);
  const Action forward{ActionKind::forward, 0, 0};
  const Action input{ActionKind::backward_input, 0, 0};
  const Action weight{ActionKind::backward_weight, 0, 0};
  EXPECT_EQ(received_by(schedule, 0, forward), std::nullopt);
  EXPECT_EQ(received_by(schedule, 1, forward), (Message{MessageKind::activation, 0, 1, 0, 0}));
  EXPECT_EQ(sent_by(schedule, 1, forward), (Message{MessageKind::activation, 1, 2, 0, 0}));
  EXPECT_EQ(sent_by(schedule, 2, forward), std::nullopt);
  EXPECT_EQ(received_by(schedule, 2, input), std::nullopt);
  EXPECT_EQ(received_by(schedule, 1, input), (Message{MessageKind::gradient, 2, 1, 0, 0}));
  EXPECT_EQ(sent_by(schedule, 1, input), (Message{MessageKind::gradient, 1, 0, 0, 0}));
  EXPECT_EQ(sent_by(schedule, 0, input), std::nullopt);
  EXPECT_EQ(received_by(schedule, 1, weight), std::nullopt);
  EXPECT_EQ(sent_by(schedule, 1, weight), std::nullopt);
}

TEST(Schedule, MessagesBetweenChunksGoRound) {
  const Schedule schedule = interleaved_two_stages();
  const Action forward_a{ActionKind::forward, 1, 0};
  const Action forward_b{ActionKind::forward, 1, 1};
  const Action backward_b{ActionKind::backward, 1, 1};
  EXPECT_EQ(sent_by(schedule, 1, forward_a), (Message{MessageKind::activation, 1, 0, 1, 1}));
  EXPECT_EQ(received_by(schedule, 0, forward_b), (Message{MessageKind::activation, 1, 0, 1, 1}));
  EXPECT_EQ(sent_by(schedule, 1, forward_b), std::nullopt);
  EXPECT_EQ(sent_by(schedule, 0, backward_b), (Message{MessageKind::gradient, 0, 1, 1, 0}));
}

TEST(Schedule, ActionsReadAsText) {
  EXPECT_EQ(to_string(Action{ActionKind::backward_input, 3, 0}), "backward_input of micro-batch 3");
  EXPECT_EQ(to_string(Action{ActionKind::forward, 0, 1}), "forward of micro-batch 0, chunk 1");
}

}  // namespace
}  // namespace normformer
