#include "normformer/comm/ledger_report.h"

#include <csignal>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "normformer/core/error.h"

namespace normformer {
namespace {

using ::testing::AnyOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

constexpr int64_t kSecond = 1'000'000'000;

// A rank that waits in the first all_reduce of the world, as all do.
RankLedger waiting_rank(int rank, int world_size) {
  std::vector<int> all;
  for (int r = 0; r < world_size; ++r) all.push_back(r);
  LedgerCall call{.kind = "all_reduce", .group = 0, .ordinal = 1, .bytes = 64, .place = "decoder forward"};
  call.issued_ns = 50 * kSecond;
  return {.rank = rank,
          .world_size = world_size,
          .host = "elsewhere",
          .process = 1000 + rank,
          .update = 7,
          .phase = RunPhase::training,
          .alive_ns = 100 * kSecond,
          .groups = {{{"world", all}, 1}},
          .channels = {},
          .calls = {call}};
}

std::vector<RankLedger> waiting_ranks(int count) {
  std::vector<RankLedger> ledgers;
  for (int r = 0; r < count; ++r) ledgers.push_back(waiting_rank(r, count));
  return ledgers;
}

std::vector<int> ranks_of(const std::vector<AbsentRank>& absent) {
  std::vector<int> ranks;
  for (const AbsentRank& rank : absent) ranks.push_back(rank.rank);
  return ranks;
}

// A process that does nothing until this ends.
class Child {
 public:
  Child() : process_(fork()) {
    if (process_ == 0) {
      while (true) pause();
    }
  }
  ~Child() { end(); }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  int64_t process() const { return process_; }
  void stop() const {
    kill(process_, SIGSTOP);
    int status = 0;
    waitpid(process_, &status, WUNTRACED);
  }
  void end() {
    if (ended_) return;
    ended_ = true;
    kill(process_, SIGKILL);
    waitpid(process_, nullptr, 0);
  }

 private:
  pid_t process_;
  bool ended_ = false;
};

TEST(AbsentRanks, AreThoseThatGaveNoSignOfLifeWhileOthersDid) {
  std::vector<RankLedger> ledgers = waiting_ranks(4);
  EXPECT_THAT(find_absent(ledgers, 5 * kSecond), IsEmpty());
  ledgers[1].alive_ns -= 5 * kSecond;
  ledgers[2].alive_ns -= 6 * kSecond;
  ledgers[3].alive_ns = 0;  // never gave one: it may not have got that far
  const std::vector<AbsentRank> absent = find_absent(ledgers, 5 * kSecond);
  EXPECT_THAT(ranks_of(absent), ElementsAre(2));
  EXPECT_EQ(absent[0].why, "not alive since 00:01:34.000, 6.0 s before others");
  ledgers[2].ended_ns = 95 * kSecond;
  EXPECT_THAT(find_absent(ledgers, 5 * kSecond), IsEmpty());
}

TEST(AbsentRanks, AreThoseWhoseProcessesAreStoppedOrGoneWhileOthersRun) {
  std::vector<RankLedger> ledgers = waiting_ranks(3);
  Child stopped;
  Child gone;
  Child running;
  int64_t processes[] = {stopped.process(), gone.process(), running.process()};
  for (size_t r = 0; r < 3; ++r) {
    ledgers[r].host = host_name();
    ledgers[r].process = processes[r];
    EXPECT_EQ(state_of_process(ledgers[r]), ProcessState::running);
  }
  stopped.stop();
  gone.end();
  EXPECT_EQ(state_of_process(ledgers[0]), ProcessState::stopped);
  EXPECT_EQ(state_of_process(ledgers[1]), ProcessState::gone);
  EXPECT_THAT(ranks_of(find_absent(ledgers, 5 * kSecond)), ElementsAre(0, 1));
  EXPECT_THAT(describe_rank(ledgers[0]), HasSubstr("(stopped), in update 7"));
  EXPECT_THAT(describe_rank(ledgers[1]), HasSubstr("(not running), in update 7"));
  ledgers[0].host = "elsewhere";
  EXPECT_EQ(state_of_process(ledgers[0]), ProcessState::unknown);
  EXPECT_THAT(ranks_of(find_absent(ledgers, 5 * kSecond)), ElementsAre(1));
  running.end();
  EXPECT_THAT(find_absent(ledgers, 5 * kSecond), IsEmpty());
}

TEST(LedgerReport, NamesARankThatIsStoppedInsideACallThatAllHaveBegun) {
  std::vector<RankLedger> ledgers = waiting_ranks(4);
  EXPECT_EQ(
      report_diagnosis(ledgers, 5 * kSecond),
      "ranks 0-3 wait in all_reduce of 64 bytes, number 1 of group world (ranks 0-3), in decoder forward; "
      "begun by all\n"
      "missing: nobody; all ranks are alive and have begun what waits\n");
  ledgers[2].alive_ns = 80 * kSecond;
  const std::string text = report_diagnosis(ledgers, 5 * kSecond);
  EXPECT_THAT(text, HasSubstr("\nmissing: rank 2 on elsewhere, process 1002, in update 7; its last call, at "
                              "00:00:50.000, was all_reduce of 64 bytes"));
  EXPECT_THAT(text, HasSubstr("\nrank 2 is not alive since 00:01:20.000, 20.0 s before others\n"));
  EXPECT_THAT(text, Not(AnyOf(HasSubstr("missing: rank 0"), HasSubstr("missing: nobody"))));
}

// Rank 0 waits for rank 1's message, and rank 1 waits with rank 2, which is absent.
TEST(LedgerReport, WhoIsInACallWithAnAbsentRankWaits) {
  std::vector<RankLedger> ledgers = waiting_ranks(3);
  ledgers[0].calls[0] = {.kind = "receive", .group = 0, .ordinal = 1, .bytes = 8, .peer = 1, .place = ""};
  for (size_t r : {1u, 2u}) ledgers[r].groups.push_back({{"pair", {1, 2}}, 1});
  for (size_t r : {1u, 2u}) ledgers[r].calls[0].group = 1;
  const int absent[] = {2};
  EXPECT_THAT(diagnose(ledgers, absent).missing, ElementsAre(2));
  EXPECT_THAT(diagnose(ledgers).missing, ElementsAre(1));
  ledgers[1].calls[0] = {.kind = "send", .group = 1, .ordinal = 1, .bytes = 8, .peer = 1, .place = ""};
  EXPECT_THAT(diagnose(ledgers, absent).missing, ElementsAre(2));
  EXPECT_THAT(diagnose(ledgers).missing, ElementsAre(1));
}

TEST(LedgerReport, SaysWhatARankIsAtAndHowLongItHasNotGoneOn) {
  RankLedger ledger = waiting_rank(3, 4);
  EXPECT_EQ(describe_rank(ledger), "rank 3 on elsewhere, process 1003, in update 7");
  ledger.phase = RunPhase::saving;
  ledger.still_ns = 12 * kSecond;
  EXPECT_EQ(describe_rank(ledger),
            "rank 3 on elsewhere, process 1003, in update 7, saving, without progress for 12.0 s");
  ledger.ended_ns = 1;
  EXPECT_EQ(describe_rank(ledger), "rank 3 on elsewhere, process 1003, has ended in good order");
  ledger = waiting_rank(3, 4);
  ledger.calls[0].done_ns = ledger.calls[0].issued_ns + 1'500'000;
  EXPECT_EQ(report_calls({&ledger, 1}, 5),
            "rank 3 on elsewhere, process 1003, in update 7\n"
            "         0  00:00:50.000      1.500 ms  all_reduce of 64 bytes, number 1 of group world "
            "(ranks 0-3), in decoder forward\n");
}

}  // namespace
}  // namespace normformer
