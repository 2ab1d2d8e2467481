#include "normformer/mesh/mesh.h"

#include <gtest/gtest.h>

#include "support/mpi_world.h"

namespace normformer {
namespace {

using testing::mpi_world;

// The groups that each rank of a real world forms are those that the arithmetic on meta foretells.
void expect_as_on_meta(const MeshDegrees& degrees, int64_t shard_group = 0) {
  const Mesh real(mpi_world(), degrees, shard_group);
  const Mesh meta(make_meta_world(mpi_world().rank(), mpi_world().size()), degrees, shard_group);
  const auto expect_alike = [](const Group& ours, const Group& foretold) {
    ASSERT_EQ(ours.defined(), foretold.defined());
    if (!ours.defined()) return;
    EXPECT_EQ(ours.world_ranks(), foretold.world_ranks());
    EXPECT_EQ(ours.rank(), foretold.rank());
    EXPECT_EQ(ours.all_reduce_sum(int64_t{1}), ours.size());
  };
  expect_alike(real.tensor(), meta.tensor());
  expect_alike(real.context(), meta.context());
  expect_alike(real.data(), meta.data());
  expect_alike(real.pipeline(), meta.pipeline());
  expect_alike(real.replicas(), meta.replicas());
  expect_alike(real.sharding(), meta.sharding());
  expect_alike(real.replication(), meta.replication());
  expect_alike(real.model(), meta.model());
  expect_alike(real.embedding(), meta.embedding());
}

TEST(MeshOverMpi, FormsTheGroupsForetold) {
  const int64_t n = mpi_world().size();
  expect_as_on_meta({.tensor = n});
  expect_as_on_meta({.data = n});
  expect_as_on_meta({.pipeline = n});
  if (n % 2 == 0) {
    expect_as_on_meta({.tensor = 2, .pipeline = n / 2});
    expect_as_on_meta({.context = 2, .data = n / 2});
    expect_as_on_meta({.data = n}, 2);
    expect_as_on_meta({.context = 2, .data = n / 2}, n / 2);
  }
}

TEST(MeshOverMpi, EveryRankRefusesAWrongProduct) {
  EXPECT_THROW(Mesh(mpi_world(), {.tensor = mpi_world().size() + 1}), ConfigError);
}

}  // namespace
}  // namespace normformer
