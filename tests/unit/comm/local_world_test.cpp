#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/comm/group.h"

#include "support/comm_contract.h"

namespace normformer {
namespace {

using testing::ContractCase;
using ::testing::HasSubstr;

class LocalWorld : public ::testing::TestWithParam<std::tuple<int, ContractCase>> {};

TEST_P(LocalWorld, KeepsTheContract) {
  const auto& [ranks, contract] = GetParam();
  run_local_world(ranks, contract.check);
}

INSTANTIATE_TEST_SUITE_P(Worlds, LocalWorld,
                         ::testing::Combine(::testing::Values(1, 2, 3, 4, 7),
                                            ::testing::ValuesIn(testing::comm_contract())),
                         [](const auto& instance) {
                           return std::get<1>(instance.param).name + "Over" +
                                  std::to_string(std::get<0>(instance.param));
                         });

class LocalWorldOnGpu : public ::testing::TestWithParam<std::tuple<int, ContractCase>> {};

TEST_P(LocalWorldOnGpu, KeepsTheContract) {
  if (list_gpus().empty()) GTEST_SKIP() << "no GPU: " << describe_cuda();
  const testing::ContractOnGpu on_gpu;
  const auto& [ranks, contract] = GetParam();
  run_local_world(ranks, contract.check);
}

INSTANTIATE_TEST_SUITE_P(Worlds, LocalWorldOnGpu,
                         ::testing::Combine(::testing::Values(1, 3),
                                            ::testing::ValuesIn(testing::comm_contract())),
                         [](const auto& instance) {
                           return std::get<1>(instance.param).name + "Over" +
                                  std::to_string(std::get<0>(instance.param));
                         });

class SelfWorld : public ::testing::TestWithParam<ContractCase> {};

TEST_P(SelfWorld, KeepsTheContract) { GetParam().check(make_self_world()); }

INSTANTIATE_TEST_SUITE_P(One, SelfWorld, ::testing::ValuesIn(testing::comm_contract()),
                         [](const auto& instance) { return instance.param.name; });

TEST(SelfWorldFailures, WaitingForNothingIsAnError) {
  Context context(DeviceKind::cpu);
  const Group world = make_self_world();
  const Tensor tensor = context.zeros({4}, DType::f32);
  EXPECT_THROW(world.receive(context, tensor, 0, 1), CommError);
  CommRequest request = world.send(context, tensor, 0, 1);
  EXPECT_THROW(world.receive(context, context.zeros({5}, DType::f32), 0, 1), CommError);
  CommRequest waited = world.send(context, tensor, 0, 2);
  EXPECT_THROW(waited.wait(), CommError);
}

TEST(LocalWorldRanks, EveryRankRunsOnceAndIsLabelled) {
  std::atomic<int> ranks_seen{0};
  run_local_world(5, [&](const Group& world) {
    EXPECT_EQ(world.size(), 5);
    EXPECT_EQ(rank_label(), world.rank());
    ranks_seen += 1 << world.rank();
  });
  EXPECT_EQ(ranks_seen, 31);
}

TEST(LocalWorldRanks, NobodyLeavesABarrierBeforeAllHaveCome) {
  std::atomic<int> arrived{0};
  run_local_world(7, [&](const Group& world) {
    for (int round = 1; round <= 100; ++round) {
      ++arrived;
      world.barrier();
      EXPECT_GE(arrived, 7 * round);
      world.barrier();
    }
  });
}

// Rank 1 of 3 fails while the others wait in `wait`; they must wake with a CommError that names it, and the
// caller must get rank 1's own exception.
void expect_wakes(const std::function<void(const Group&, Context&, const Tensor&)>& wait) {
  std::atomic<int> woken{0};
  const auto body = [&](const Group& world) {
    Context context(DeviceKind::cpu);
    const Tensor tensor = context.zeros({100000}, DType::f32);
    if (world.rank() == 1) throw std::domain_error("the disk is on fire");
    try {
      wait(world, context, tensor);
    } catch (const CommError& e) {
      EXPECT_THAT(e.what(), HasSubstr("rank 1 failed: the disk is on fire"));
      ++woken;
      throw;
    }
  };
  EXPECT_THROW(run_local_world(3, body), std::domain_error);
  EXPECT_EQ(woken, 2);
}

TEST(LocalWorldFailures, WakeThoseInACollective) {
  expect_wakes([](const Group& world, Context& context, const Tensor& tensor) {
    world.all_reduce(context, tensor, ReduceOp::sum);
  });
  expect_wakes([](const Group& world, Context& context, const Tensor& tensor) {
    world.broadcast(context, tensor, 1);
    world.barrier();
  });
  expect_wakes([](const Group& world, Context&, const Tensor&) { world.barrier(); });
  expect_wakes([](const Group& world, Context&, const Tensor&) { world.all_gather_text("here"); });
  expect_wakes([](const Group& world, Context&, const Tensor&) { world.split({0, 0}, "none"); });
}

TEST(LocalWorldFailures, WakeThoseWaitingForAMessage) {
  expect_wakes([](const Group& world, Context& context, const Tensor& tensor) {
    world.receive(context, tensor, 1, 0);
  });
  expect_wakes([](const Group& world, Context& context, const Tensor& tensor) {
    CommRequest request = world.send(context, tensor, 1, 0);
    request.wait();
  });
}

TEST(LocalWorldFailures, WakeThoseInAnotherGroup) {
  std::atomic<int> woken{0};
  const auto body = [&](const Group& world) {
    try {
      const Group pair = world.split({world.rank() / 2, 0}, "pair");
      if (world.rank() == 3) throw std::domain_error("alone");
      // Ranks 0 and 1 keep each other company for ever; 2 waits for 3.
      while (true) pair.barrier();
    } catch (const CommError&) {
      ++woken;
      throw;
    }
  };
  EXPECT_THROW(run_local_world(4, body), std::domain_error);
  EXPECT_EQ(woken, 3);
}

TEST(LocalWorldFailures, LeaveTheMemoryOfACollectiveToItsCaller) {
  // Rank 2 fails at some point while the others copy from each other; whoever is woken writes at once. A
  // sanitizer shows where a copy still runs then.
  for (int round = 0; round < 8; ++round) {
    const auto body = [&](const Group& world) {
      const Group pair = world.split({world.rank() / 2, 0}, "pair");
      Context context(DeviceKind::cpu);
      const Tensor tensor = context.zeros({world.rank() == 2 ? 0 : 1 << 22}, DType::f32);
      world.barrier();
      if (world.rank() == 2) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5 + 3 * round));
        throw std::domain_error("at round " + std::to_string(round));
      }
      try {
        while (true) pair.broadcast(context, tensor, 0);
      } catch (const CommError&) {
        fill_zero(context, tensor);
        throw;
      }
    };
    EXPECT_THROW(run_local_world(3, body), std::domain_error);
  }
}

// What run_local_world throws, as text.
std::string failure_of(int ranks, const std::function<void(Group)>& body) {
  try {
    run_local_world(ranks, body);
  } catch (const CommError& e) {
    return e.what();
  }
  return "no failure";
}

TEST(LocalWorldFailures, RanksThatAllWaitAreToldSo) {
  const std::string why = failure_of(3, [](const Group& world) {
    Context context(DeviceKind::cpu);
    const Tensor tensor = context.zeros({4}, DType::f32);
    if (world.rank() == 0) world.receive(context, tensor, 1, 7);
    if (world.rank() == 1) world.all_reduce(context, tensor, ReduceOp::sum);
  });
  EXPECT_THAT(why, HasSubstr("rank 0 for a message with tag 7 from rank 1"));
  EXPECT_THAT(why, HasSubstr("rank 1 for a collective's message from rank"));
  EXPECT_THAT(why, HasSubstr("rank 2 has ended"));
}

TEST(LocalWorldFailures, AMessageOfAnotherSizeIsAnError) {
  const std::string why = failure_of(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    world.all_reduce(context, context.zeros({4 + world.rank()}, DType::f32), ReduceOp::sum);
  });
  EXPECT_THAT(why, ::testing::MatchesRegex(".*(16|20) bytes where it expects (16|20)"));
}

TEST(LocalWorldFailures, AMessageNobodyTakesIsToldAtItsEnd) {
  const std::string why = failure_of(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    if (world.rank() == 0) world.send(context, context.zeros({4}, DType::f32), 1, 0).wait();
  });
  EXPECT_THAT(why, HasSubstr("rank 0 for rank 1 to take what it sent"));
}

}  // namespace
}  // namespace normformer
