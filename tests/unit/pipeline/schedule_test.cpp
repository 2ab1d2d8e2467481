#include "normformer/pipeline/schedule.h"

#include <utility>
#include <vector>

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

TEST(Schedule, ZbH1OfFourStagesAndFiveMicroBatches) {
  EXPECT_EQ(zb_h1_schedule(4, 5).stages, lists(5, {"F0 F1 F2 F3 I0 W0 F4 I1 W1 I2 W2 I3 W3 I4 W4",  //
                                                   "F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 I3 W2 I4 W3 W4",  //
                                                   "F0 F1 I0 F2 I1 F3 I2 W0 F4 I3 W1 I4 W2 W3 W4",  //
                                                   "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 W2 W3 W4"})
                                             .stages);
  EXPECT_EQ(zb_h1_schedule(2, 4).stages, zero_bubble_two_stages().stages);
}

TEST(Schedule, ZbH2OfThreeStagesAndSixMicroBatches) {
  EXPECT_EQ(zb_h2_schedule(3, 6).stages, lists(6, {"F0 F1 F2 F3 F4 I0 W0 F5 I1 W1 I2 W2 I3 W3 I4 W4 I5 W5",
                                                   "F0 F1 F2 I0 F3 I1 F4 I2 W0 F5 I3 W1 I4 W2 I5 W3 W4 W5",
                                                   "F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 F5 I5 W1 W2 W3 W4 W5"})
                                             .stages);
}

TEST(Schedule, ZbVOfTwoRanksAndThreeMicroBatches) {
  const Schedule schedule = zb_v_schedule(2, 3);
  EXPECT_EQ(schedule.stages, zb_v_two_stages().stages);
  EXPECT_EQ(schedule.chunks, 2);
  EXPECT_EQ(schedule.placement, Placement::v_shape);
}

TEST(Schedule, InterleavedOfTwoRanksWithTwoChunks) {
  EXPECT_EQ(interleaved_schedule(2, 2, 2).stages, interleaved_two_stages().stages);
  EXPECT_EQ(interleaved_schedule(2, 4, 2).stages,
            lists(4,
                  {"F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a",
                   "F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a"},
                  2)
                .stages);
  EXPECT_EQ(interleaved_schedule(2, 4, 2).placement, Placement::round_robin);
}

TEST(Schedule, LargerGroupsGoThroughAChunkTogether) {
  EXPECT_EQ(interleaved_schedule(2, 4, 2, 4).stages,
            lists(4,
                  {"F0a F1a F2a F3a F0b F1b F2b B0b F3b B1b B2b B3b B0a B1a B2a B3a",
                   "F0a F1a F2a F3a F0b B0b F1b B1b F2b B2b F3b B3b B0a B1a B2a B3a"},
                  2)
                .stages);
  EXPECT_EQ(interleaved_schedule(2, 4, 2, 1000000000).stages, interleaved_schedule(2, 4, 2, 4).stages);
}

TEST(Schedule, MicroBatchesThatStagesDoNotDivide) {
  // The order of four micro-batches without the last.
  EXPECT_EQ(interleaved_schedule(2, 3, 2).stages, lists(3,
                                                        {"F0a F1a F0b F1b F2a B0b B1b F2b B0a B1a B2b B2a",
                                                         "F0a F1a F0b B0b F1b B1b F2a B0a B1a F2b B2b B2a"},
                                                        2)
                                                      .stages);
}

TEST(Schedule, InterleavingOneChunkIs1F1B) {
  EXPECT_EQ(interleaved_schedule(4, 7, 1).stages, one_f_one_b_schedule(4, 7).stages);
}

TEST(Schedule, FewerMicroBatchesThanStages) {
  EXPECT_EQ(one_f_one_b_schedule(4, 2).stages,
            lists(2, {"F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"}).stages);
  EXPECT_EQ(one_f_one_b_schedule(2, 0).stages, lists(0, {"", ""}).stages);
  EXPECT_EQ(gpipe_schedule(2, 0).stages, lists(0, {"", ""}).stages);
}

TEST(Schedule, StepsOneAfterTheOther) {
  const Schedule twice = repeated(zb_h1_schedule(2, 1), 2);
  EXPECT_EQ(twice.stages, lists(2, {"F0 I0 W0 F1 I1 W1", "F0 I0 W0 F1 I1 W1"}).stages);
  EXPECT_EQ(twice.micro_batches, 2);
  EXPECT_EQ(repeated(zb_v_schedule(2, 3), 3).placement, Placement::v_shape);
  EXPECT_THROW(repeated(gpipe_schedule(2, 1), 0), LogicError);
}

TEST(Schedule, ImpossibleSizesAreRefused) {
  EXPECT_THROW(gpipe_schedule(0, 4), LogicError);
  EXPECT_THROW(one_f_one_b_schedule(0, 4), LogicError);
  EXPECT_THROW(gpipe_schedule(2, -1), LogicError);
  EXPECT_THROW(one_f_one_b_schedule(2, -1), LogicError);
  EXPECT_THROW(zb_h1_schedule(0, 4), LogicError);
  EXPECT_THROW(zb_h2_schedule(2, -1), LogicError);
  EXPECT_THROW(zb_v_schedule(0, 4), LogicError);
  EXPECT_THROW(interleaved_schedule(2, 4, 0), LogicError);
  EXPECT_THROW(interleaved_schedule(2, -1, 2), LogicError);
  EXPECT_THROW(interleaved_schedule(4, 8, 2, 3), LogicError);
}

TEST(Schedule, PartsLieRoundRobinOrInAV) {
  Schedule schedule = interleaved_schedule(3, 0, 3);
  const std::vector<int64_t> round{0, 1, 2, 0, 1, 2, 0, 1, 2};
  const std::vector<int64_t> turning{0, 1, 2, 2, 1, 0, 0, 1, 2};
  for (const auto& [placement, stage_of] : {std::pair(Placement::round_robin, round),  //
                                            std::pair(Placement::v_shape, turning)}) {
    schedule.placement = placement;
    for (int64_t part = 0; part < 9; ++part) {
      EXPECT_EQ(schedule.stage_of(part), stage_of[static_cast<size_t>(part)]) << part;
      EXPECT_EQ(schedule.chunk_of(part), part / 3) << part;
      EXPECT_EQ(schedule.part(schedule.stage_of(part), schedule.chunk_of(part)), part);
    }
  }
}

TEST(Schedule, MessagesOfAVTurnInsideTheLastRank) {
  const Schedule schedule = zb_v_two_stages();
  const Action forward_a{ActionKind::forward, 1, 0};
  const Action forward_b{ActionKind::forward, 1, 1};
  const Action input_a{ActionKind::backward_input, 1, 0};
  const Action input_b{ActionKind::backward_input, 1, 1};
  EXPECT_EQ(sent_by(schedule, 0, forward_a), (Message{MessageKind::activation, 0, 1, 1, 0}));
  EXPECT_EQ(sent_by(schedule, 1, forward_a), (Message{MessageKind::activation, 1, 1, 1, 1}));
  EXPECT_EQ(received_by(schedule, 1, forward_b), (Message{MessageKind::activation, 1, 1, 1, 1}));
  EXPECT_EQ(sent_by(schedule, 1, forward_b), (Message{MessageKind::activation, 1, 0, 1, 1}));
  EXPECT_EQ(sent_by(schedule, 0, forward_b), std::nullopt);
  EXPECT_EQ(received_by(schedule, 0, input_b), std::nullopt);
  EXPECT_EQ(sent_by(schedule, 0, input_b), (Message{MessageKind::gradient, 0, 1, 1, 1}));
  EXPECT_EQ(received_by(schedule, 1, input_a), (Message{MessageKind::gradient, 1, 1, 1, 0}));
  EXPECT_EQ(sent_by(schedule, 1, input_a), (Message{MessageKind::gradient, 1, 0, 1, 0}));
  EXPECT_EQ(sent_by(schedule, 0, input_a), std::nullopt);
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
