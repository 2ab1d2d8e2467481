#include <chrono>
#include <cmath>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include "normformer/comm/group.h"
#include "normformer/comm/nccl.h"

#include "mpi/messages.h"
#include "support/comm_contract.h"
#include "support/mpi_world.h"

namespace normformer {
namespace {

using testing::ContractCase;
using ::testing::HasSubstr;
using testing::mpi_session;
using testing::mpi_world;

class MpiWorld : public ::testing::TestWithParam<ContractCase> {};

TEST_P(MpiWorld, KeepsTheContract) { GetParam().check(mpi_world()); }

INSTANTIATE_TEST_SUITE_P(Ranks, MpiWorld, ::testing::ValuesIn(testing::comm_contract()),
                         [](const auto& instance) { return instance.param.name; });

// By way of the hosts.
class MpiWorldOnGpu : public ::testing::TestWithParam<ContractCase> {};

TEST_P(MpiWorldOnGpu, KeepsTheContract) {
  if (list_gpus().empty()) GTEST_SKIP() << "no GPU: " << describe_cuda();
  const testing::ContractOnGpu on_gpu;
  GetParam().check(mpi_world());
}

INSTANTIATE_TEST_SUITE_P(Ranks, MpiWorldOnGpu, ::testing::ValuesIn(testing::comm_contract()),
                         [](const auto& instance) { return instance.param.name; });

// Several ranks may share a GPU here if each claims a host of its own (NCCL_HOSTID) and talks over sockets.
class NcclWorld : public ::testing::TestWithParam<ContractCase> {
 protected:
  static void SetUpTestSuite() {
    if (list_gpus().empty() || !has_nccl()) return;
    context = new Context(DeviceKind::cuda);
    world = new Group(make_nccl_world(*context, mpi_world(), 60.0));
  }
  static void TearDownTestSuite() {
    delete world;
    delete context;
  }

  static inline Context* context = nullptr;
  static inline Group* world = nullptr;
};

TEST_P(NcclWorld, KeepsTheContract) {
  if (world == nullptr) GTEST_SKIP() << "no GPU, or no NCCL: " << describe_cuda() << "; " << describe_nccl();
  const testing::ContractOnGpu on_gpu;
  GetParam().check(*world);
}

INSTANTIATE_TEST_SUITE_P(Ranks, NcclWorld, ::testing::ValuesIn(testing::comm_contract()),
                         [](const auto& instance) { return instance.param.name; });

TEST(MpiTransport, AgreesWithMpiOnExactSums) {
  Context context(DeviceKind::cpu);
  std::vector<double> ours(5003);
  for (size_t i = 0; i < ours.size(); ++i) ours[i] = std::floor(std::sin(1.0 + mpi_world().rank() + i) * 1e9);
  std::vector<double> theirs = ours;
  const Tensor tensor = from_host<double>(context, ours, {5003});
  mpi_world().all_reduce(context, tensor, ReduceOp::sum);
  MPI_Allreduce(MPI_IN_PLACE, theirs.data(), 5003, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
  EXPECT_EQ(to_host(tensor), theirs);
}

TEST(MpiTransport, KnowsWhoSharesTheHost) {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  EXPECT_EQ(mpi_world().size(), size);
  // Tests run on one host.
  EXPECT_EQ(mpi_session().local_size(), size);
  EXPECT_EQ(mpi_session().local_rank(), mpi_world().rank());
  EXPECT_EQ(rank_label(), mpi_world().rank());
}

TEST(MpiTransport, ASecondSessionIsRefused) { EXPECT_THROW(MpiSession(nullptr, nullptr), LogicError); }

// What a receive of `expected` bytes says when the other rank sends `sent`; "" on ranks that do not receive.
std::string mismatch(int64_t sent, int64_t expected) {
  const Group pair = mpi_world().split({mpi_world().rank() < 2 ? 0 : -1, 0}, "pair");
  if (!pair.defined()) return "";
  Context context(DeviceKind::cpu);
  if (pair.rank() == 0) {
    pair.send(context, context.zeros({sent}, DType::u8), 1, 0).wait();
    return "";
  }
  try {
    pair.receive(context, context.zeros({expected}, DType::u8), 0, 0);
  } catch (const CommError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(MpiTransport, FailuresBecomeCommErrorsWithTheText) {
  if (mpi_world().size() < 2) GTEST_SKIP() << "needs two ranks";
  const std::string shorter = mismatch(8, 16);
  const std::string longer = mismatch(16, 8);
  if (mpi_world().rank() == 1) {
    EXPECT_THAT(shorter, HasSubstr("rank 0 sent 8 bytes where 16 were expected"));
    EXPECT_THAT(longer, HasSubstr("MPI_ERR_TRUNCATE"));
  }
  mpi_world().barrier();
}

TEST(MpiTransport, ARequestWaitsWhereItIsDropped) {
  if (mpi_world().size() < 2) GTEST_SKIP() << "needs two ranks";
  Context context(DeviceKind::cpu);
  // Too large to be buffered: the sender must still drive it after it let go of request and tensor.
  constexpr int64_t kElements = 1 << 20;
  if (mpi_world().rank() == 0) {
    std::vector<float> values(kElements, 3.0F);
    {
      const CommRequest dropped =
          mpi_world().send(context, from_host<float>(context, values, {kElements}), 1, 9);
    }
  }
  if (mpi_world().rank() == 1) {
    const Tensor received = context.zeros({kElements}, DType::f32);
    mpi_world().receive(context, received, 0, 9);
    EXPECT_EQ(received.data<float>()[kElements - 1], 3.0F);
  }
  mpi_world().barrier();
}

TEST(MpiMessages, AreCutInOrderWithoutGaps) {
  for (int64_t bytes = 0; bytes <= 50; ++bytes) {
    int64_t end = 0;
    int messages = 0;
    detail::for_each_message(
        bytes,
        [&](int64_t offset, int count) {
          EXPECT_EQ(offset, end);
          EXPECT_LE(count, 7);
          end += count;
          ++messages;
        },
        7);
    EXPECT_EQ(end, bytes);
    EXPECT_EQ(messages, bytes == 0 ? 1 : (bytes + 6) / 7);
  }
}

TEST(MpiMessages, SizesBeyondAnIntAreCut) {
  std::vector<std::pair<int64_t, int>> cut;
  detail::for_each_message(5'300'000'000,
                           [&](int64_t offset, int count) { cut.emplace_back(offset, count); });
  constexpr int kGiB = 1 << 30;
  EXPECT_EQ(cut, (std::vector<std::pair<int64_t, int>>{{0, kGiB},
                                                       {int64_t{1} << 30, kGiB},
                                                       {int64_t{2} << 30, kGiB},
                                                       {int64_t{3} << 30, kGiB},
                                                       {int64_t{4} << 30, 1'005'032'704}}));
}

}  // namespace
}  // namespace normformer
