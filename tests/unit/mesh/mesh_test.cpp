#include "normformer/mesh/mesh.h"

#include <array>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace normformer {
namespace {

using ::testing::HasSubstr;

std::vector<MeshDegrees> odd_meshes() {
  std::vector<MeshDegrees> meshes;
  for (const int64_t tensor : {1, 2, 3}) {
    for (const int64_t context : {1, 2}) {
      for (const int64_t data : {1, 2, 5}) {
        for (const int64_t pipeline : {1, 2, 3}) meshes.push_back({tensor, context, data, pipeline});
      }
    }
  }
  return meshes;
}

TEST(MeshArithmetic, CoordinatesAndRanksAreInverse) {
  for (const MeshDegrees& degrees : odd_meshes()) {
    std::set<std::array<int64_t, 4>> seen;
    for (int64_t rank = 0; rank < num_ranks(degrees); ++rank) {
      const MeshCoordinates at = coordinates_of(degrees, rank);
      EXPECT_EQ(world_rank_of(degrees, at), rank) << to_string(degrees);
      EXPECT_TRUE(seen.insert({at.tensor, at.context, at.data, at.pipeline}).second);
    }
    EXPECT_THROW(coordinates_of(degrees, num_ranks(degrees)), LogicError);
  }
}

TEST(MeshArithmetic, TensorIsFastestAndPipelineSlowest) {
  const MeshDegrees degrees{.tensor = 2, .context = 3, .data = 5, .pipeline = 7};
  EXPECT_EQ(num_ranks(degrees), 210);
  EXPECT_EQ(coordinates_of(degrees, 1), (MeshCoordinates{1, 0, 0, 0}));
  EXPECT_EQ(coordinates_of(degrees, 2), (MeshCoordinates{0, 1, 0, 0}));
  EXPECT_EQ(coordinates_of(degrees, 6), (MeshCoordinates{0, 0, 1, 0}));
  EXPECT_EQ(coordinates_of(degrees, 30), (MeshCoordinates{0, 0, 0, 1}));
  EXPECT_EQ(coordinates_of(degrees, 209), (MeshCoordinates{1, 2, 4, 6}));
}

// Why a mesh of these degrees over `ranks` ranks is refused.
std::string refusal(int ranks, const MeshDegrees& degrees) {
  try {
    const Mesh mesh(make_meta_world(0, ranks), degrees);
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(MeshArithmetic, DegreesThatDoNotMakeUpTheWorldAreRefused) {
  EXPECT_THAT(refusal(6, {.tensor = 2, .data = 2}),
              HasSubstr("tensor 2 x context 1 x data 2 x pipeline 1 needs 4 ranks"));
  EXPECT_THAT(refusal(6, {.tensor = 2, .data = 2}), HasSubstr("mpirun -n 4"));
  EXPECT_THAT(refusal(6, {.tensor = 0, .data = 2}), HasSubstr("tensor-parallel degree is 0"));
  EXPECT_EQ(refusal(6, {.tensor = 2, .data = 3}), "accepted");
}

// The world ranks whose coordinates pass `alike`, in world order.
template <class Alike>
std::vector<int> ranks_where(const MeshDegrees& degrees, Alike alike) {
  std::vector<int> ranks;
  for (int r = 0; r < num_ranks(degrees); ++r) {
    if (alike(coordinates_of(degrees, r))) ranks.push_back(r);
  }
  return ranks;
}

void expect_groups(const Mesh& mesh) {
  const MeshDegrees& degrees = mesh.degrees();
  const MeshCoordinates me = mesh.coordinates();
  SCOPED_TRACE(to_string(degrees) + ", rank " + std::to_string(mesh.world().rank()));
  EXPECT_EQ(me, coordinates_of(degrees, mesh.world().rank()));

  EXPECT_EQ(mesh.tensor().rank(), me.tensor);
  EXPECT_EQ(mesh.context().rank(), me.context);
  EXPECT_EQ(mesh.data().rank(), me.data);
  EXPECT_EQ(mesh.pipeline().rank(), me.pipeline);
  EXPECT_EQ(mesh.tensor().world_ranks(), ranks_where(degrees, [&](MeshCoordinates c) {
              return c.context == me.context && c.data == me.data && c.pipeline == me.pipeline;
            }));
  EXPECT_EQ(mesh.context().world_ranks(), ranks_where(degrees, [&](MeshCoordinates c) {
              return c.tensor == me.tensor && c.data == me.data && c.pipeline == me.pipeline;
            }));
  EXPECT_EQ(mesh.data().world_ranks(), ranks_where(degrees, [&](MeshCoordinates c) {
              return c.tensor == me.tensor && c.context == me.context && c.pipeline == me.pipeline;
            }));
  EXPECT_EQ(mesh.pipeline().world_ranks(), ranks_where(degrees, [&](MeshCoordinates c) {
              return c.tensor == me.tensor && c.context == me.context && c.data == me.data;
            }));
  EXPECT_EQ(mesh.replicas().rank(), me.data * degrees.context + me.context);
  EXPECT_EQ(mesh.replicas().world_ranks(), ranks_where(degrees, [&](MeshCoordinates c) {
              return c.tensor == me.tensor && c.pipeline == me.pipeline;
            }));
  EXPECT_EQ(mesh.model().world_ranks(),
            ranks_where(degrees, [&](MeshCoordinates c) { return c.data == me.data; }));

  const bool at_an_end = me.pipeline == 0 || me.pipeline == degrees.pipeline - 1;
  ASSERT_EQ(mesh.embedding().defined(), degrees.pipeline > 1 && at_an_end);
  if (mesh.embedding().defined()) {
    EXPECT_EQ(mesh.embedding().world_ranks(), ranks_where(degrees, [&](MeshCoordinates c) {
                return c.tensor == me.tensor && c.context == me.context && c.data == me.data &&
                       (c.pipeline == 0 || c.pipeline == degrees.pipeline - 1);
              }));
  }
  EXPECT_EQ(mesh.is_first_stage(), me.pipeline == 0);
  EXPECT_EQ(mesh.is_last_stage(), me.pipeline == degrees.pipeline - 1);
}

TEST(Mesh, GroupsAreRightOnMeta) {
  for (const MeshDegrees& degrees : odd_meshes()) {
    const auto ranks = static_cast<int>(num_ranks(degrees));
    for (int r = 0; r < ranks; ++r) expect_groups(Mesh(make_meta_world(r, ranks), degrees));
  }
}

TEST(Mesh, ReplicasFormBlocks) {
  const MeshDegrees degrees{.tensor = 2, .context = 2, .data = 3, .pipeline = 2};
  for (const int64_t block : {1, 2, 3}) {
    int64_t answering = 0;
    for (int r = 0; r < 24; ++r) {
      const Mesh mesh(make_meta_world(r, 24), degrees, block);
      const std::vector<int>& replicas = mesh.replicas().world_ranks();
      const int64_t mine = mesh.replicas().rank();
      std::vector<int> together;
      std::vector<int> copies;
      for (int64_t other = 0; other < 6; ++other) {
        if (other / block == mine / block) together.push_back(replicas[static_cast<size_t>(other)]);
        if (other % block == mine % block) copies.push_back(replicas[static_cast<size_t>(other)]);
      }
      EXPECT_EQ(mesh.sharding().world_ranks(), together);
      EXPECT_EQ(mesh.sharding().rank(), mine % block);
      EXPECT_EQ(mesh.sharding().name(), "sharding");
      EXPECT_EQ(mesh.replication().world_ranks(), copies);
      EXPECT_EQ(mesh.replication().rank(), mine / block);
      EXPECT_EQ(mesh.is_first_block(), mine < block);
      answering += mesh.is_first_block() ? 1 : 0;
    }
    EXPECT_EQ(answering, 24 / 6 * block);
  }
  for (const int64_t all : {0, 6}) {
    const Mesh mesh(make_meta_world(7, 24), degrees, all);
    EXPECT_EQ(mesh.sharding().name(), "replicas");
    EXPECT_FALSE(mesh.replication().defined());
    EXPECT_TRUE(mesh.is_first_block());
  }
  EXPECT_THROW(Mesh(make_meta_world(0, 24), degrees, 4), LogicError);
}

TEST(Mesh, GroupsAreRightAmongThreads) {
  for (const MeshDegrees& degrees :
       {MeshDegrees{2, 1, 2, 3}, MeshDegrees{1, 1, 1, 1}, MeshDegrees{3, 2, 1, 1}}) {
    run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
      const Mesh mesh(world, degrees);
      expect_groups(mesh);
      EXPECT_EQ(mesh.data().all_reduce_sum(mesh.coordinates().data), degrees.data * (degrees.data - 1) / 2);
      EXPECT_EQ(mesh.model().all_reduce_sum(int64_t{1}), degrees.tensor * degrees.context * degrees.pipeline);
    });
  }
}

TEST(Mesh, LargeMeshesAreQuickArithmetic) {
  const Mesh mesh(make_meta_world(511, 512), {.tensor = 8, .data = 8, .pipeline = 8});
  expect_groups(mesh);
}

}  // namespace
}  // namespace normformer
