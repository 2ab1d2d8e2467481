#include "normformer/comm/launch_order.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::shared_ptr<const GroupMembers> group_of(std::string name, std::vector<int> ranks) {
  return std::make_shared<GroupMembers>(GroupMembers{std::move(name), std::move(ranks)});
}

// Every rank has its own copy of what a group is, as in processes.
TrafficEvent sum(const char* group, std::vector<int> ranks, int64_t bytes = 8) {
  return {group_of(group, std::move(ranks)), "all_reduce", bytes, -1, 0};
}
TrafficEvent send(int to, int tag = 0, int64_t bytes = 4) {
  return {group_of("line", {0, 1, 2}), "send", bytes, to, tag};
}
TrafficEvent receive(int from, int tag = 0, int64_t bytes = 4) {
  return {group_of("line", {0, 1, 2}), "receive", bytes, from, tag};
}

std::vector<RankEvents> ranks_of(std::vector<std::vector<TrafficEvent>> events) {
  std::vector<RankEvents> ranks;
  for (auto& of_rank : events) ranks.push_back({static_cast<int>(ranks.size()), std::move(of_rank)});
  return ranks;
}

std::string violation(std::vector<std::vector<TrafficEvent>> events) {
  return NF_SENTENCE_OF(LogicError, check_launch_order(ranks_of(std::move(events))));
}

TEST(LaunchOrder, OfRanksThatAgreeIsSound) {
  check_launch_order({});
  check_launch_order(ranks_of({{send(1, 3), sum("ab", {0, 1}), sum("all", {0, 1, 2}), receive(2, 1, 9)},
                               {sum("ab", {0, 1}), receive(0, 3), sum("all", {0, 1, 2})},
                               {send(0, 1, 9), sum("all", {0, 1, 2})}}));
}

TEST(LaunchOrder, SwappedCollectivesAreTold) {
  EXPECT_THAT(
      violation({{sum("ab", {0, 1}), sum("all", {0, 1, 2})},
                 {sum("all", {0, 1, 2}), sum("ab", {0, 1})},
                 {sum("all", {0, 1, 2})}}),
      HasSubstr("ranks 0 and 1 do not agree on collective 0 of those that they share: rank 0 with its "
                "call 0 does all_reduce of 8 bytes in group ab of ranks 0, 1, rank 1 with its call 0 "
                "does all_reduce of 8 bytes in group all of ranks 0, 1, 2"));
}

TEST(LaunchOrder, AMissingCallIsTold) {
  EXPECT_THAT(violation({{sum("ab", {0, 1}), sum("ab", {0, 1})}, {sum("ab", {0, 1})}}),
              AllOf(HasSubstr("collective 1 of those"), HasSubstr("rank 0 with its call 1 does all_reduce"),
                    HasSubstr("rank 1 makes no more such calls")));
  EXPECT_THAT(violation({{}, {sum("ab", {0, 1})}}), HasSubstr("rank 0 makes no more such calls"));
}

TEST(LaunchOrder, OtherBytesKindsRootsAndMembersAreTold) {
  EXPECT_THAT(violation({{sum("ab", {0, 1}, 8)}, {sum("ab", {0, 1}, 16)}}),
              AllOf(HasSubstr("of 8 bytes"), HasSubstr("of 16 bytes")));
  EXPECT_THAT(violation({{sum("ab", {0, 1})}, {sum("ab", {1, 0})}}),
              AllOf(HasSubstr("of ranks 0, 1"), HasSubstr("of ranks 1, 0")));
  EXPECT_THAT(violation({{sum("ab", {0, 1})}, {sum("other", {0, 1})}}), HasSubstr("group other"));
  TrafficEvent gathering = sum("ab", {0, 1});
  gathering.kind = "all_gather";
  EXPECT_THAT(violation({{sum("ab", {0, 1})}, {gathering}}), HasSubstr("does all_gather"));
  TrafficEvent broadcast{group_of("ab", {0, 1}), "broadcast", 8, 0, 0};
  TrafficEvent other_root = broadcast;
  other_root.peer = 1;
  EXPECT_THAT(violation({{broadcast}, {other_root}}), HasSubstr("from its rank 1"));
}

TEST(LaunchOrder, TextsMayDifferInLength) {
  const TrafficEvent text{group_of("ab", {0, 1}), "control", 12, -1, 0};
  TrafficEvent longer = text;
  longer.bytes = 90;
  check_launch_order(ranks_of({{text}, {longer}}));
}

TEST(LaunchOrder, AMessageThatNobodyReceivesIsTold) {
  EXPECT_THAT(
      violation({{send(1)}, {}, {}}),
      HasSubstr("message 0 from rank 0 to rank 1 with tag 0 does not arrive: rank 0 with its call 0 does "
                "send of 4 bytes to its rank 1, tag 0, in group line of ranks 0, 1, 2, rank 1 makes no "
                "more such calls"));
  EXPECT_THAT(violation({{}, {receive(0, 7)}, {}}), HasSubstr("rank 0 makes no more such calls"));
}

TEST(LaunchOrder, AMessageOfAnotherTagOrSizeIsTold) {
  EXPECT_THAT(violation({{send(1, 1)}, {receive(0, 2)}, {}}), HasSubstr("message 0 from rank 0 to rank 1"));
  EXPECT_THAT(violation({{send(1), send(1, 0, 6)}, {receive(0, 0, 4), receive(0, 0, 5)}, {}}),
              AllOf(HasSubstr("message 1 from"), HasSubstr("of 6 bytes"), HasSubstr("of 5 bytes")));
}

// Any two ranks agree, and yet each of the three waits for the next.
TEST(LaunchOrder, ACycleOfThreeRanksIsTold) {
  EXPECT_THAT(
      violation({{sum("ab", {0, 1}), sum("ca", {0, 2})},
                 {sum("bc", {1, 2}), sum("ab", {0, 1})},
                 {sum("ca", {0, 2}), sum("bc", {1, 2})}}),
      AllOf(HasSubstr("3 ranks wait for each other for ever"), HasSubstr("rank 1 with its call 0 does")));
}

TEST(LaunchOrder, MessagesThatAreWaitedForBeforeTheyAreSentAreTold) {
  EXPECT_THAT(violation({{receive(1), send(1)}, {receive(0), send(0)}, {}}),
              HasSubstr("2 ranks wait for each other for ever"));
  EXPECT_THAT(violation({{sum("ab", {0, 1}), send(1)}, {receive(0), sum("ab", {0, 1})}, {}}),
              HasSubstr("2 ranks wait for each other for ever"));
}

TrafficEvent started(TrafficEvent event, int64_t number) {
  event.start = number;
  return event;
}
TrafficEvent wait(int64_t number) { return {group_of("line", {0, 1, 2}), "wait", 0, -1, 0, number}; }

// Each receives before it sends, which only does where the receives are begun first.
TEST(LaunchOrder, WhatIsStartedHoldsNobodyUp) {
  check_launch_order(
      ranks_of({{started(receive(1), 1), send(1), wait(1)}, {started(receive(0), 1), send(0), wait(1)}}));
  check_launch_order(ranks_of({{started(sum("ab", {0, 1}), 1), receive(1), wait(1)},
                               {started(sum("ab", {0, 1}), 1), send(0), wait(1)}}));
}

TEST(LaunchOrder, WhatIsWaitedForTooEarlyIsTold) {
  EXPECT_THAT(
      violation({{started(receive(1), 1), wait(1), send(1)}, {started(receive(0), 1), wait(1), send(0)}}),
      AllOf(HasSubstr("2 ranks wait for each other for ever"),
            HasSubstr("rank 0 with its call 1 waits for the started receive of 4 bytes")));
  EXPECT_THAT(violation({{started(sum("ab", {0, 1}), 1), wait(1), send(1)},
                         {receive(0), started(sum("ab", {0, 1}), 1), wait(1)}}),
              HasSubstr("waits for the started all_reduce of 8 bytes in group ab"));
}

TEST(LaunchOrder, RanksThatAreLeftOutAreInTime) {
  std::vector<RankEvents> ranks{{0, {sum("all", {0, 1, 2}), receive(1), send(1)}},
                                {2, {sum("all", {0, 1, 2}), receive(1)}}};
  check_launch_order(ranks);
  ranks[1].events.pop_back();
  ranks[1].events.push_back(sum("all", {0, 1, 2}));
  EXPECT_THAT(NF_SENTENCE_OF(LogicError, check_launch_order(ranks)), HasSubstr("ranks 0 and 2 do not agree"));
}

}  // namespace
}  // namespace normformer
