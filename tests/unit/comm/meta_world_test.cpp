#include <gtest/gtest.h>

#include "normformer/comm/group.h"

#include "support/comm_contract.h"

namespace normformer {
namespace {

class MetaWorld : public ::testing::TestWithParam<int> {};

TEST_P(MetaWorld, ThreadsOnMetaAccountAsOneAloneDoes) {
  run_local_world(GetParam(), [](const Group& world) {
    const testing::Accounts among_threads = testing::account(world, DeviceKind::meta);
    EXPECT_FALSE(among_threads.events.empty());
    const Group alone = make_meta_world(world.rank(), world.size());
    testing::expect_same(testing::account(alone, DeviceKind::meta), among_threads);
  });
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
