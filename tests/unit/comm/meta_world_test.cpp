#include <mutex>

#include <gtest/gtest.h>

#include "normformer/comm/group.h"

#include "support/comm_contract.h"

namespace normformer {
namespace {

// Everything a rank's accounts say after the same calls.
struct Accounts {
  std::vector<TrafficRecord> records;
  std::vector<std::string> events;
  std::vector<std::string> costs;
  MemoryReport memory;
};

std::string describe(const TrafficEvent& event) {
  std::string members;
  for (const int r : event.group->world_ranks) members += std::to_string(r) + " ";
  return fmt::format("{} [{}] {} {} {} {}", event.group->name, members, event.kind, event.bytes, event.peer,
                     event.tag);
}

Accounts account(const Group& world, DeviceKind device) {
  Context context(device);
  world.ledger().keep_events();
  testing::run_every_call(world, context);
  Accounts accounts;
  accounts.records = world.ledger().records();
  for (const TrafficEvent& event : world.ledger().events()) accounts.events.push_back(describe(event));
  for (const auto& [name, cost] : context.costs().operations()) {
    accounts.costs.push_back(fmt::format("{} {} {} {}", name, cost.calls, cost.flops, cost.bytes));
  }
  accounts.memory = context.memory().report();
  return accounts;
}

void expect_same(const Accounts& meta, const Accounts& real) {
  EXPECT_EQ(meta.records, real.records);
  EXPECT_EQ(meta.events, real.events);
  EXPECT_EQ(meta.costs, real.costs);
  EXPECT_EQ(meta.memory.peak_live, real.memory.peak_live);
  EXPECT_EQ(meta.memory.peak_reserved, real.memory.peak_reserved);
  EXPECT_EQ(meta.memory.at_peak_by_use, real.memory.at_peak_by_use);
}

class MetaWorld : public ::testing::TestWithParam<int> {};

TEST_P(MetaWorld, AccountsAsARealOneDoes) {
  const int ranks = GetParam();
  std::vector<Accounts> real(static_cast<size_t>(ranks));
  run_local_world(ranks, [&](const Group& world) {
    real[static_cast<size_t>(world.rank())] = account(world, DeviceKind::cpu);
  });
  std::vector<Accounts> threads_on_meta(static_cast<size_t>(ranks));
  run_local_world(ranks, [&](const Group& world) {
    threads_on_meta[static_cast<size_t>(world.rank())] = account(world, DeviceKind::meta);
  });
  for (int r = 0; r < ranks; ++r) {
    SCOPED_TRACE(r);
    const auto i = static_cast<size_t>(r);
    EXPECT_FALSE(real[i].events.empty());
    expect_same(account(make_meta_world(r, ranks), DeviceKind::meta), real[i]);
    expect_same(threads_on_meta[i], real[i]);
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, MetaWorld, ::testing::Values(1, 2, 3, 4, 7));

TEST(MetaWorld, SplitsWithoutTheOthers) {
  const Group world = make_meta_world(13, 512);
  const Group group = world.split_by([](int r) { return SplitChoice{r % 8, -r}; }, "eighth");
  EXPECT_EQ(group.size(), 64);
  EXPECT_EQ(group.rank(), 62);
  EXPECT_EQ(group.world_ranks().front(), 509);
  EXPECT_EQ(group.world_ranks()[62], 13);
  EXPECT_TRUE(group.is_meta());
  EXPECT_FALSE(world.split_by([](int) { return SplitChoice{-1, 0}; }, "none").defined());
  EXPECT_THROW(world.split({0, 0}, "nobody answers"), LogicError);
}

TEST(MetaWorld, TakesHostNumbersToBeTheSameEverywhere) {
  const Group world = make_meta_world(2, 8);
  EXPECT_EQ(world.all_reduce(1.5, ReduceOp::sum), 12.0);
  EXPECT_EQ(world.all_reduce(1.5, ReduceOp::max), 1.5);
  EXPECT_EQ(world.all_reduce_sum(int64_t{3}), 24);
  EXPECT_EQ(world.all_gather_text("x"), std::vector<std::string>(8, "x"));
}

TEST(MetaWorld, RefusesTensorsWithValues) {
  Context context(DeviceKind::cpu);
  const Group world = make_meta_world(0, 2);
  EXPECT_THROW(world.all_reduce(context, context.zeros({1}, DType::f32), ReduceOp::sum), LogicError);
}

}  // namespace
}  // namespace normformer
