#include "normformer/pipeline/checker.h"

#include <algorithm>
#include <ostream>
#include <tuple>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "lists.h"

namespace normformer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

auto refuses(const Schedule& schedule) {
  return [&schedule] { check_schedule(schedule); };
}

class GeneratedSchedule : public testing::TestWithParam<std::tuple<int64_t, int64_t>> {};

TEST_P(GeneratedSchedule, IsSoundAndKeepsWhatItPromises) {
  const auto [stages, micro_batches] = GetParam();
  const auto peaks_1f1b = check_schedule(one_f_one_b_schedule(stages, micro_batches)).peak_saved;
  const auto peaks_gpipe = check_schedule(gpipe_schedule(stages, micro_batches)).peak_saved;
  ASSERT_EQ(static_cast<int64_t>(peaks_1f1b.size()), stages);
  for (int64_t s = 0; s < stages; ++s) {
    EXPECT_EQ(peaks_1f1b[static_cast<size_t>(s)], std::min(stages - s, micro_batches)) << "stage " << s;
    EXPECT_EQ(peaks_gpipe[static_cast<size_t>(s)], micro_batches) << "stage " << s;
  }
}

INSTANTIATE_TEST_SUITE_P(AllSizes, GeneratedSchedule,
                         testing::Combine(testing::Range<int64_t>(1, 9), testing::Range<int64_t>(0, 13)));

TEST(Checker, SplitBackwardKeepsStateUntilTheWeightGradients) {
  EXPECT_THAT(check_schedule(zero_bubble_two_stages()).peak_saved, ElementsAre(2, 2));
  EXPECT_THAT(check_schedule(lists(3, {"F0 I0 F1 I1 F2 I2 W0 W1 W2"})).peak_saved, ElementsAre(3));
}

TEST(Checker, WholeAndSplitBackwardMayMix) {
  EXPECT_THAT(check_schedule(lists(2, {"F0 F1 B0 I1 W1", "F0 I0 W0 F1 B1"})).peak_saved, ElementsAre(2, 1));
}

TEST(Checker, InterleavedChunksAreCountedOneByOne) {
  EXPECT_THAT(check_schedule(interleaved_two_stages()).peak_saved, ElementsAre(4, 3));
  EXPECT_THAT(check_schedule(lists(1, {"F0a F0b B0b B0a"}, 2)).peak_saved, ElementsAre(2));
}

struct WrongList {
  const char* what;
  Schedule schedule;
  const char* message;
};

void PrintTo(const WrongList& wrong, std::ostream* out) { *out << wrong.what; }

class WrongSchedule : public testing::TestWithParam<WrongList> {};

TEST_P(WrongSchedule, IsRefusedByStageAndAction) {
  EXPECT_THAT(refuses(GetParam().schedule), ThrowsMessage<LogicError>(HasSubstr(GetParam().message)));
}

INSTANTIATE_TEST_SUITE_P(
    EachKind, WrongSchedule,
    testing::Values(
        WrongList{"forward_twice", lists(1, {"F0 B0", "F0 F0 B0"}),
                  "stage 1, action 1 (forward of micro-batch 0): the micro-batch has gone forward before"},
        WrongList{"forward_again_after_backward", lists(1, {"F0 B0 F0"}),
                  "stage 0, action 2 (forward of micro-batch 0): the micro-batch has gone forward before"},
        WrongList{"forward_missing", lists(2, {"F0 F1 B0 B1", "F0 B0"}),
                  "stage 1: forward of micro-batch 1 is missing"},
        WrongList{"backward_missing", lists(2, {"F0 F1 B0", "F0 B0 F1 B1"}),
                  "stage 0: backward of micro-batch 1 is missing"},
        WrongList{"weight_missing", lists(1, {"F0 I0"}),
                  "stage 0: backward_weight of micro-batch 0 is missing"},
        WrongList{"backward_before_forward", lists(1, {"B0 F0"}),
                  "stage 0, action 0 (backward of micro-batch 0): the micro-batch has not gone forward yet"},
        WrongList{"backward_twice", lists(1, {"F0 B0 B0"}),
                  "stage 0, action 2 (backward of micro-batch 0): the micro-batch has gone back before"},
        WrongList{"whole_after_input", lists(1, {"F0 I0 B0"}),
                  "stage 0, action 2 (backward of micro-batch 0): the micro-batch has gone back before"},
        WrongList{"input_twice", lists(1, {"F0 I0 I0 W0"}),
                  "stage 0, action 2 (backward_input of micro-batch 0): the micro-batch has gone back"},
        WrongList{"weight_before_input", lists(1, {"F0 W0 I0"}),
                  "stage 0, action 1 (backward_weight of micro-batch 0): its backward_input has not run yet"},
        WrongList{"weight_twice", lists(1, {"F0 I0 W0 W0"}),
                  "stage 0, action 3 (backward_weight of micro-batch 0): the micro-batch has its weight"},
        WrongList{"weight_after_whole", lists(1, {"F0 B0 W0"}),
                  "stage 0, action 2 (backward_weight of micro-batch 0): the micro-batch has its weight"},
        WrongList{"weights_out_of_order", lists(2, {"F0 F1 I0 I1 W1 W0"}),
                  "stage 0, action 4 (backward_weight of micro-batch 1): weight gradients must come in"},
        WrongList{"inputs_out_of_order", lists(2, {"F0 F1 B1 B0"}),
                  "stage 0, action 2 (backward of micro-batch 1): input gradients must come in"},
        WrongList{"micro_batch_too_large", lists(1, {"F0 B0 F1 B1"}),
                  "stage 0, action 2 (forward of micro-batch 1): there are 1 micro-batches"},
        WrongList{"chunk_too_large", lists(1, {"F0a B0a F0b B0b"}),
                  "stage 0, action 2 (forward of micro-batch 0, chunk 1): there are 1 chunks"},
        WrongList{"no_such_kind", Schedule{1, 1, {{Action{static_cast<ActionKind>(7), 0, 0}}}},
                  "stage 0, action 0 (? of micro-batch 0): not a kind of action"},
        WrongList{
            "neighbours_disagree_on_order", lists(2, {"F1 F0 B0 B1", "F0 F1 B0 B1"}),
            "stage 1, action 0 (forward of micro-batch 0): waits for the activation of micro-batch 0 for "
            "chunk 0 from stage 0, but next to arrive is the activation of micro-batch 1"},
        WrongList{"turn_before_it_is_reached",
                  lists(1, {"F0a F0b I0b W0b I0a W0a", "F0b F0a I0b W0b I0a W0a"}, 2, Placement::v_shape),
                  "deadlock, waits for ever for the activation of micro-batch 0 for chunk 1 from stage 1"},
        WrongList{
            "turn_in_another_order",
            lists(2, {"F0a F1a F0b F1b B0b B1b B0a B1a", "F0a F1a F1b F0b B0b B1b B0a B1a"}, 2,
                  Placement::v_shape),
            "stage 1, action 2 (forward of micro-batch 1, chunk 1): waits for the activation of "
            "micro-batch 1 for chunk 1 from stage 1, but next to arrive is the activation of micro-batch "
            "0 for chunk 1"},
        WrongList{"weight_of_a_chunk_missing",
                  lists(1, {"F0a F0b I0b I0a W0a", "F0a F0b B0b B0a"}, 2, Placement::v_shape),
                  "stage 0: backward_weight of micro-batch 0, chunk 1 is missing"},
        WrongList{"weight_of_a_chunk_twice",
                  lists(1, {"F0a F0b B0b B0a", "F0a F0b I0b W0b W0b I0a W0a"}, 2, Placement::v_shape),
                  "stage 1, action 4 (backward_weight of micro-batch 0, chunk 1): the micro-batch has its"},
        WrongList{"no_such_placement", Schedule{0, 1, {{}}, static_cast<Placement>(7)},
                  "a schedule of unknown placement 7"},
        WrongList{"no_stages", Schedule{1, 1, {}}, "a schedule without stages"},
        WrongList{"no_chunks", Schedule{1, 0, {{}}}, "a schedule of 0 chunks"},
        WrongList{"negative_micro_batches", Schedule{-1, 1, {{}}}, "a schedule of -1 micro-batches"}),
    [](const auto& list) { return list.param.what; });

TEST(Checker, DeadlockIsRefusedThoughEveryListIsInOrder) {
  // Stage 0 goes on to micro-batch 1 only after micro-batch 0 is back; stage 1 wants both first.
  EXPECT_THAT(refuses(lists(2, {"F0 B0 F1 B1", "F0 F1 B0 B1"})),
              ThrowsMessage<LogicError>(HasSubstr("stage 0, action 1 (backward of micro-batch 0): deadlock, "
                                                  "waits for ever for the gradient of micro-batch 0")));
}

TEST(Checker, DeadlockBetweenChunksIsRefused) {
  // Rank 0 goes back through its first chunk before its second has gone forward.
  EXPECT_THAT(refuses(lists(1, {"F0a B0a F0b B0b", "F0a F0b B0b B0a"}, 2)),
              ThrowsMessage<LogicError>(HasSubstr("deadlock")));
  EXPECT_THAT(refuses(lists(1, {"F0b F0a B0b B0a"}, 2)), ThrowsMessage<LogicError>(HasSubstr("deadlock")));
}

TEST(Checker, ListsMadeForOnePlacementAreRefusedInTheOther) {
  for (int64_t p = 2; p <= 5; ++p) {
    Schedule v = zb_v_schedule(p, 2 * p);
    check_schedule(v);
    v.placement = Placement::round_robin;
    EXPECT_THROW(check_schedule(v), LogicError) << p;
    Schedule round = interleaved_schedule(p, 2 * p, 2);
    check_schedule(round);
    round.placement = Placement::v_shape;
    EXPECT_THROW(check_schedule(round), LogicError) << p;
  }
}

TEST(Checker, ChunksExchangedOnOneRankAreRefused) {
  for (const Schedule& schedule : {zb_v_schedule(3, 5), interleaved_schedule(3, 6, 2)})
    for (size_t s = 0; s < 3; ++s) {
      Schedule exchanged = schedule;
      for (Action& action : exchanged.stages[s]) action.chunk = 1 - action.chunk;
      EXPECT_THROW(check_schedule(exchanged), LogicError) << s;
    }
}

TEST(Checker, InterleavingGroupsSmallerThanThePipelineDeadlocks) {
  // Each micro-batch alone through both chunks: stage 0's last forward waits for stage 2, which first wants
  // the gradient of micro-batch 0's first chunk from stage 0.
  EXPECT_THAT(refuses(lists(3,
                            {"F0a F0b F1a F1b F2a F2b B0b B0a B1b B1a B2b B2a",
                             "F0a F0b F1a F1b B0b F2a B0a F2b B1b B1a B2b B2a",
                             "F0a F0b B0b F1a B0a F1b B1b F2a B1a F2b B2b B2a"},
                            2)),
              ThrowsMessage<LogicError>(HasSubstr(
                  "stage 0, action 5 (forward of micro-batch 2, chunk 1): deadlock, waits for ever")));
}

TEST(Checker, ThreeStageDeadlockInTheMiddleIsRefused) {
  EXPECT_THAT(refuses(lists(3, {"F0 F1 F2 B0 B1 B2", "F0 B0 F1 B1 F2 B2", "F0 F1 B0 B1 F2 B2"})),
              ThrowsMessage<LogicError>(HasSubstr("deadlock")));
}

}  // namespace
}  // namespace normformer
