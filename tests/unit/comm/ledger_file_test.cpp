#include "normformer/comm/ledger_file.h"

#include <atomic>
#include <cstring>
#include <fstream>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"

#include "temporary_folder.h"

namespace normformer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// A rank of a world on meta that keeps a ledger.
struct Rank {
  Rank(const TemporaryFolder& folder, int rank, int size)
      : world(make_meta_world(rank, size)),
        file(std::make_shared<LedgerFile>(folder / ledger_file_name(rank), rank, size)) {
    world.ledger().attach(file);
  }
  RankLedger read() const { return parse_ledger(file->bytes(), "this"); }
  Tensor bytes(int64_t count) { return context.empty({count}, DType::u8); }

  Context context{DeviceKind::meta};
  Group world;
  std::shared_ptr<LedgerFile> file;
};

// A call that fails before it is done, as a rank sees that its neighbour has gone.
void fail_in_a_call(TrafficLedger& ledger, const TrafficEvent& event) {
  EXPECT_THROW(
      {
        const TrafficCall call = ledger.record(event);
        throw std::runtime_error("the neighbour has gone");
      },
      std::runtime_error);
}

std::shared_ptr<const GroupMembers> members_of(const Group& group) {
  return std::make_shared<GroupMembers>(GroupMembers{group.name(), group.world_ranks()});
}

TEST(LedgerFile, HasEveryCallWithItsGroupAndPlace) {
  const TemporaryFolder folder;
  Rank rank(folder, 2, 4);
  const Group pair = rank.world.split_by([](int r) { return SplitChoice{r / 2, r}; }, "pair");
  rank.file->begin_update(7);
  {
    const TraceScope module(rank.context, TraceKind::module, "decoder.layers.3.self_attn", "forward");
    const TraceScope operation(rank.context, TraceKind::operation, "not a place");
    pair.broadcast(rank.context, rank.bytes(40), 1);
  }
  rank.world.barrier();
  pair.receive(rank.context, rank.bytes(5), 1, 9);
  const RankLedger ledger = read_ledger(folder / "rank-00002.ledger");
  EXPECT_EQ(std::tuple(ledger.rank, ledger.world_size, ledger.host, ledger.process, ledger.update),
            std::tuple(2, 4, host_name(), getpid(), 7));
  EXPECT_EQ(ledger.ended_ns, 0);
  ASSERT_EQ(ledger.calls.size(), 3u);
  const auto group_of = [&](const LedgerCall& call) {
    return ledger.groups.at(static_cast<size_t>(call.group)).members;
  };
  const LedgerCall& broadcast = ledger.calls[0];
  EXPECT_EQ(broadcast.kind, "broadcast");
  EXPECT_EQ(broadcast.place, "decoder.layers.3.self_attn forward");
  EXPECT_EQ(group_of(broadcast).name, "pair");
  EXPECT_THAT(group_of(broadcast).world_ranks, ElementsAre(2, 3));
  EXPECT_EQ(std::tuple(broadcast.number, broadcast.ordinal, broadcast.bytes, broadcast.peer),
            std::tuple(0, 1, 40, 1));
  EXPECT_TRUE(broadcast.is_done());
  EXPECT_LE(broadcast.issued_ns, broadcast.done_ns);
  EXPECT_EQ(ledger.calls[1].kind, "barrier");
  EXPECT_EQ(ledger.calls[1].place, "");
  EXPECT_EQ(group_of(ledger.calls[1]).name, "world");
  const LedgerCall& receive = ledger.calls[2];
  EXPECT_EQ(std::tuple(receive.kind, receive.ordinal, receive.peer, receive.tag),
            std::tuple(std::string("receive"), 1, 1, 9));
  EXPECT_EQ(std::tuple(ledger.phase, ledger.alive_ns, ledger.still_ns), std::tuple(RunPhase::starting, 0, 0));
  rank.file->enter_phase(RunPhase::saving);
  rank.file->sign_of_life(17);
  rank.file->end_run();
  const RankLedger later = rank.read();
  EXPECT_GT(later.ended_ns, 0);
  EXPECT_EQ(std::tuple(later.phase, later.still_ns), std::tuple(RunPhase::saving, 17));
  EXPECT_GE(later.alive_ns, later.started_ns);
}

TEST(LedgerFile, ActivityGrowsWithEveryBeginningAndEndOfACall) {
  const TemporaryFolder folder;
  LedgerFile file(folder / "x.ledger", 0, 1);
  const auto group = std::make_shared<GroupMembers>(GroupMembers{"world", {0}});
  EXPECT_EQ(file.activity(), 0u);
  const uint64_t call = file.issue({group, "barrier", 0});
  EXPECT_EQ(file.activity(), 1u);
  file.complete(call);
  EXPECT_EQ(file.activity(), 2u);
}

TEST(LedgerFile, CutsWhatIsTooLong) {
  const TemporaryFolder folder;
  Rank rank(folder, 0, 2);
  const Group group = rank.world.split_by([](int) { return SplitChoice{}; }, std::string(100, 'g'));
  const std::string name(200, 'm');
  const TraceScope module(rank.context, TraceKind::module, name, "forward");
  group.barrier();
  const RankLedger ledger = rank.read();
  EXPECT_EQ(ledger.calls.at(0).place, std::string(56, 'm'));
  EXPECT_EQ(ledger.groups.at(0).members.name, std::string(39, 'g'));
}

TEST(LedgerFile, KeepsTheLastCalls) {
  const TemporaryFolder folder;
  Rank rank(folder, 0, 2);
  const uint64_t early = rank.file->issue({members_of(rank.world), "barrier", 0});
  for (int i = 0; i < 999; ++i) rank.world.all_reduce(1.0, ReduceOp::sum);
  rank.file->complete(early);
  const RankLedger ledger = rank.read();
  ASSERT_EQ(ledger.calls.size(), 256u);
  for (size_t i = 0; i < 256; ++i) {
    EXPECT_EQ(ledger.calls[i].number, static_cast<int64_t>(744 + i));
    EXPECT_EQ(ledger.calls[i].ordinal, static_cast<int64_t>(745 + i));
    EXPECT_EQ(ledger.calls[i].kind, "control");
  }
  EXPECT_EQ(ledger.groups.at(0).collectives, 1000);
}

TEST(LedgerFile, HasRoomForSoManyGroupsAndNamesNoMore) {
  const TemporaryFolder folder;
  Rank rank(folder, 0, 2);
  for (int i = 0; i < 200; ++i)
    rank.world.split_by([](int) { return SplitChoice{}; }, std::to_string(i)).barrier();
  rank.world.split_by([](int) { return SplitChoice{}; }, "3").barrier();
  const RankLedger ledger = rank.read();
  EXPECT_EQ(ledger.groups.size(), 32u);
  EXPECT_EQ(ledger.groups[3].collectives, 2);
  EXPECT_EQ(ledger.calls.back().group, 3);
  EXPECT_EQ(ledger.calls.at(199).group, -1);
}

TEST(LedgerFile, ACallThatFailsIsNotDone) {
  const TemporaryFolder folder;
  Rank rank(folder, 0, 2);
  fail_in_a_call(rank.world.ledger(), {members_of(rank.world), "all_reduce", 8});
  rank.world.barrier();
  const RankLedger ledger = rank.read();
  EXPECT_FALSE(ledger.calls.at(0).is_done());
  EXPECT_TRUE(ledger.calls.at(1).is_done());
}

TEST(LedgerFile, ACallIsDoneWhereItEnds) {
  const TemporaryFolder folder;
  Rank rank(folder, 0, 2);
  const auto issue = [&] { return rank.world.ledger().record({members_of(rank.world), "all_reduce", 8}); };
  TrafficCall first = issue();
  TrafficCall abandoned = issue();
  abandoned.abandon();
  EXPECT_FALSE(rank.read().calls.at(0).is_done());
  std::thread([call = std::move(first)]() mutable { call.complete(); }).join();
  EXPECT_TRUE(rank.read().calls.at(0).is_done());
  TrafficCall second = issue();
  second = issue();
  EXPECT_TRUE(rank.read().calls.at(2).is_done());
  EXPECT_FALSE(rank.read().calls.at(3).is_done());
  EXPECT_FALSE(rank.read().calls.at(1).is_done());
}

TEST(LedgerFile, AMessageIsDoneWhenItsRequestIs) {
  const TemporaryFolder folder;
  Rank rank(folder, 0, 2);
  {
    CommRequest waited = rank.world.send(rank.context, rank.bytes(3), 1, 4);
    CommRequest moved = rank.world.send(rank.context, rank.bytes(3), 1, 4);
    waited.wait();
    EXPECT_TRUE(rank.read().calls.at(0).is_done());
    const CommRequest last = std::move(moved);
    EXPECT_FALSE(rank.read().calls.at(1).is_done());
  }
  const RankLedger ledger = rank.read();
  EXPECT_TRUE(ledger.calls.at(1).is_done());
  EXPECT_EQ(ledger.calls.at(1).ordinal, 2);
  ASSERT_EQ(ledger.channels.size(), 1u);
  EXPECT_EQ(std::tuple(ledger.channels[0].peer, ledger.channels[0].tag, ledger.channels[0].sent),
            std::tuple(1, 4, 2));
  EXPECT_THROW(
      {
        const CommRequest left = rank.world.send(rank.context, rank.bytes(3), 1, 4);
        throw std::runtime_error("something else failed");
      },
      std::runtime_error);
  EXPECT_FALSE(rank.read().calls.at(2).is_done());
}

// Everything in a call says the same number; a reader must never see two of them in one.
TEST(LedgerFile, AReaderSeesWholeCallsWhileTheyAreWritten) {
  const TemporaryFolder folder;
  LedgerFile file(folder / "x.ledger", 0, 3);
  const auto group = std::make_shared<GroupMembers>(GroupMembers{"world", {0, 1, 2}});
  std::atomic<bool> ends = false;
  const auto write = [&] {
    Context context(DeviceKind::meta);
    for (int i = 0; !ends; ++i) {
      const std::string name(static_cast<size_t>(i % 50 + 1), static_cast<char>('a' + i % 26));
      const TraceScope scope(context, TraceKind::module, name);
      file.complete(file.issue({group, "send", i, i % 3, i % 30000}));
    }
  };
  std::thread first(write);
  std::thread second(write);
  int64_t seen = 0;
  while (seen < 20000 && !HasFailure()) {
    for (const LedgerCall& call : parse_ledger(file.bytes(), "x").calls) {
      const int64_t i = call.bytes;
      EXPECT_EQ(std::tuple(call.kind, call.peer, call.tag), std::tuple("send", i % 3, i % 30000));
      EXPECT_EQ(call.place, std::string(static_cast<size_t>(i % 50 + 1), static_cast<char>('a' + i % 26)));
      seen = std::max(seen, call.number);
    }
  }
  ends = true;
  first.join();
  second.join();
}

TEST(LedgerDiagnosis, NamesWhoHasNotBegunACollective) {
  const TemporaryFolder folder;
  for (int r = 0; r < 4; ++r) {
    Rank rank(folder, r, 4);
    for (int i = 0; i < 300; ++i) rank.world.all_reduce(1.0, ReduceOp::sum);
    if (r != 2) fail_in_a_call(rank.world.ledger(), {members_of(rank.world), "all_reduce", 64});
  }
  const LedgerDiagnosis diagnosis = diagnose(read_ledgers(folder.path()));
  ASSERT_EQ(diagnosis.waits.size(), 1u);
  EXPECT_EQ(diagnosis.waits[0].call.kind, "all_reduce");
  EXPECT_EQ(diagnosis.waits[0].call.ordinal, 301);
  EXPECT_THAT(diagnosis.waits[0].waiting, ElementsAre(0, 1, 3));
  EXPECT_THAT(diagnosis.waits[0].not_issued, ElementsAre(2));
  EXPECT_THAT(diagnosis.missing, ElementsAre(2));
}

TEST(LedgerDiagnosis, FollowsMessagesToTheRankThatAllWaitFor) {
  const TemporaryFolder folder;
  for (int r = 0; r < 3; ++r) {
    Rank rank(folder, r, 3);
    if (r > 0) rank.world.receive(rank.context, rank.bytes(8), r - 1, 5);
    if (r < 2) rank.world.send(rank.context, rank.bytes(8), r + 1, 5).wait();
    if (r > 0) fail_in_a_call(rank.world.ledger(), {members_of(rank.world), "receive", 8, r - 1, 5});
  }
  const LedgerDiagnosis diagnosis = diagnose(read_ledgers(folder.path()));
  ASSERT_EQ(diagnosis.waits.size(), 2u);
  EXPECT_THAT(diagnosis.waits[1].not_issued, ElementsAre(1));
  EXPECT_THAT(diagnosis.missing, ElementsAre(0));
}

// A rank that is stopped while it receives what was sent waits for nobody.
TEST(LedgerDiagnosis, AMessageThatWasSentIsWaitedForNoMore) {
  const TemporaryFolder folder;
  {
    Rank sender(folder, 0, 2);
    sender.world.send(sender.context, sender.bytes(8), 1, 5).wait();
    fail_in_a_call(sender.world.ledger(), {members_of(sender.world), "receive", 8, 1, 6});
    Rank receiver(folder, 1, 2);
    fail_in_a_call(receiver.world.ledger(), {members_of(receiver.world), "receive", 8, 0, 5});
  }
  const LedgerDiagnosis diagnosis = diagnose(read_ledgers(folder.path()));
  ASSERT_EQ(diagnosis.waits.size(), 2u);
  EXPECT_THAT(diagnosis.waits[1].not_issued, IsEmpty());
  EXPECT_THAT(diagnosis.missing, ElementsAre(1));
}

TEST(LedgerDiagnosis, ARankWithoutALedgerIsMissing) {
  const TemporaryFolder folder;
  Rank rank(folder, 1, 2);
  fail_in_a_call(rank.world.ledger(), {members_of(rank.world), "barrier", 0});
  EXPECT_THAT(diagnose(read_ledgers(folder.path())).missing, ElementsAre(0));
}

// A ledger's bytes, aligned as a mapped file is.
class Bytes {
 public:
  explicit Bytes(std::span<const std::byte> bytes) : size_(bytes.size()), words_(size_ / 8 + 1) {
    std::memcpy(words_.data(), bytes.data(), size_);
  }
  std::span<std::byte> all() { return std::as_writable_bytes(std::span(words_)).first(size_); }

  std::string sentence(size_t size) {
    return NF_SENTENCE_OF(DataError, static_cast<void>(parse_ledger(all().first(size), "it")));
  }

 private:
  size_t size_;
  std::vector<uint64_t> words_;
};

Bytes used_ledger(const TemporaryFolder& folder) {
  Rank rank(folder, 1, 3);
  for (int i = 0; i < 300; ++i) {
    rank.world.barrier();
    rank.world.send(rank.context, rank.bytes(i), i % 3, i % 7).wait();
  }
  return Bytes(rank.file->bytes());
}

TEST(DamagedLedger, IsRefusedInOneSentence) {
  const TemporaryFolder folder;
  Bytes bytes = used_ledger(folder);
  const size_t size = bytes.all().size();
  for (size_t shorter = 0; shorter < size; shorter += shorter < 300 ? 1 : 97)
    EXPECT_THAT(bytes.sentence(shorter), HasSubstr("it has")) << shorter;
  const auto with = [&](size_t at, uint32_t value) {
    Bytes changed = bytes;
    std::memcpy(changed.all().data() + at, &value, 4);
    return changed.sentence(size);
  };
  EXPECT_EQ(with(0, 5), "it is no ledger of a rank: it does not begin with NFLEDGER");
  EXPECT_EQ(with(8, 1), "it is no ledger of a rank: its version is 1, and this program reads version 2");
  EXPECT_EQ(with(12, 3), "it is damaged: rank 3 of 3");
  EXPECT_EQ(with(272, 6), "it is damaged: phase 6");
  EXPECT_EQ(with(268, 0x80000000), "it is damaged: its signs of life");
  EXPECT_THAT(with(16, 0x7fffffff), HasSubstr("where a rank of 2147483647 has"));
  write_bytes(folder / "rank-00000.ledger", "no ledger at all");
  EXPECT_THROW(static_cast<void>(read_ledgers(folder.path())), DataError);
  EXPECT_THROW(static_cast<void>(read_ledgers(folder / "nowhere")), DataError);
}

TEST(DamagedLedger, OfAnotherRankOrRunIsRefused) {
  const TemporaryFolder folder;
  EXPECT_THAT(NF_SENTENCE_OF(DataError, static_cast<void>(read_ledgers(folder.path()))),
              HasSubstr("holds no ledger"));
  { const Rank rank(folder, 1, 3); }
  std::filesystem::copy_file(folder / "rank-00001.ledger", folder / "rank-00002.ledger");
  EXPECT_THAT(NF_SENTENCE_OF(DataError, static_cast<void>(read_ledgers(folder.path()))),
              HasSubstr("rank-00002.ledger is the ledger of rank 1"));
  { const Rank rank(folder, 2, 4); }
  EXPECT_THAT(NF_SENTENCE_OF(DataError, static_cast<void>(read_ledgers(folder.path()))), HasSubstr("of 4"));
}

// Whatever bytes change, a reader finds a ledger or says what is wrong; and what it finds can be compared.
TEST(DamagedLedger, RandomDamageNeverHarmsAReader) {
  const TemporaryFolder folder;
  const Bytes whole = used_ledger(folder);
  std::mt19937_64 random(7);
  int refused = 0;
  constexpr int kRounds = 3000;
  for (int round = 0; round < kRounds; ++round) {
    Bytes bytes = whole;
    const auto all = bytes.all();
    for (size_t changes = random() % 8 + 1; changes > 0; --changes) {
      const size_t region = random() % 2 == 0 ? 8192 : all.size();
      const size_t at = random() % (region / 8) * 8 + random() % 2 * 4;
      const uint64_t value = random() % 3 == 0 ? random() % 64 : random() >> random() % 64;
      std::memcpy(all.data() + std::min(at, all.size() - 8), &value, random() % 2 == 0 ? 4 : 8);
    }
    try {
      const RankLedger ledger = parse_ledger(all, "it");
      EXPECT_LE(diagnose({&ledger, 1}).missing.size(), 3u);
    } catch (const DataError& e) {
      EXPECT_THAT(e.what(), HasSubstr("it is"));
      ++refused;
    }
  }
  EXPECT_GT(refused, kRounds / 4);
  EXPECT_LT(refused, kRounds);
}

TEST(LedgerFile, ThatCannotBeMadeSaysWhy) {
  const TemporaryFolder folder;
  EXPECT_THAT(NF_SENTENCE_OF(IoError, LedgerFile(folder / "none" / "x.ledger", 0, 1)),
              HasSubstr("x.ledger.new: No such file"));
}

}  // namespace
}  // namespace normformer
