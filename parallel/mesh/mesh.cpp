#include "normformer/mesh/mesh.h"

#include "normformer/core/checked.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

int64_t checked_degree(int64_t degree, const char* axis) {
  if (degree < 1) {
    throw ConfigError(fmt::format("the {}-parallel degree is {}: it must be at least 1", axis, degree));
  }
  return degree;
}

// Forms the groups in which all coordinates but those that `forget` clears are equal, ranks in world order.
template <class Forget>
Group group_along(const Group& world, const MeshDegrees& degrees, const char* name, Forget forget) {
  const auto choose = [&](int world_rank) {
    MeshCoordinates rest = coordinates_of(degrees, world_rank);
    forget(rest);
    return SplitChoice{static_cast<int>(world_rank_of(degrees, rest)), world_rank};
  };
  return world.split_by(choose, name);
}

// Forms the groups of ranks of equal tensor and pipeline coordinates for whose numbers among the replicas
// `place` gives the same replica.
template <class Place>
Group group_of_replicas(const Group& world, const MeshDegrees& degrees, const char* name, Place place) {
  return group_along(world, degrees, name, [&](MeshCoordinates& c) {
    const int64_t replica = place(c.data * degrees.context + c.context);
    c.context = replica % degrees.context;
    c.data = replica / degrees.context;
  });
}

// First and last stage; nobody else.
Group embedding_group(const Group& world, const MeshDegrees& degrees) {
  const auto choose = [&](int world_rank) {
    MeshCoordinates rest = coordinates_of(degrees, world_rank);
    const bool first = rest.pipeline == 0;
    const bool last = rest.pipeline == degrees.pipeline - 1;
    rest.pipeline = 0;
    return SplitChoice{first != last ? static_cast<int>(world_rank_of(degrees, rest)) : -1, world_rank};
  };
  return world.split_by(choose, "embedding");
}

}  // namespace

int64_t num_ranks(const MeshDegrees& degrees) {
  int64_t product = checked_degree(degrees.tensor, "tensor");
  product = checked_mul(product, checked_degree(degrees.context, "context"));
  product = checked_mul(product, checked_degree(degrees.data, "data"));
  return checked_mul(product, checked_degree(degrees.pipeline, "pipeline"));
}

std::string to_string(const MeshDegrees& degrees) {
  return fmt::format("tensor {} x context {} x data {} x pipeline {}", degrees.tensor, degrees.context,
                     degrees.data, degrees.pipeline);
}

MeshCoordinates coordinates_of(const MeshDegrees& degrees, int64_t world_rank) {
  NF_CHECK(world_rank >= 0 && world_rank < num_ranks(degrees), "rank {} in a mesh of {}", world_rank,
           to_string(degrees));
  MeshCoordinates at;
  at.tensor = world_rank % degrees.tensor;
  world_rank /= degrees.tensor;
  at.context = world_rank % degrees.context;
  world_rank /= degrees.context;
  at.data = world_rank % degrees.data;
  at.pipeline = world_rank / degrees.data;
  return at;
}

int64_t world_rank_of(const MeshDegrees& degrees, const MeshCoordinates& at) {
  NF_CHECK(at.tensor >= 0 && at.tensor < degrees.tensor && at.context >= 0 && at.context < degrees.context &&
               at.data >= 0 && at.data < degrees.data && at.pipeline >= 0 && at.pipeline < degrees.pipeline,
           "coordinates {} {} {} {} in a mesh of {}", at.tensor, at.context, at.data, at.pipeline,
           to_string(degrees));
  return ((at.pipeline * degrees.data + at.data) * degrees.context + at.context) * degrees.tensor + at.tensor;
}

Mesh::Mesh(Group world, const MeshDegrees& degrees, int64_t shard_group)
    : degrees_(degrees), world_(std::move(world)) {
  if (num_ranks(degrees) != world_.size()) {
    throw ConfigError(
        fmt::format("{} needs {} ranks, but the job has {}: start it with mpirun -n {}, or change the "
                    "degrees of [parallel]",
                    to_string(degrees), num_ranks(degrees), world_.size(), num_ranks(degrees)));
  }
  coordinates_ = coordinates_of(degrees, world_.rank());
  tensor_ = group_along(world_, degrees, "tensor", [](MeshCoordinates& c) { c.tensor = 0; });
  context_ = group_along(world_, degrees, "context", [](MeshCoordinates& c) { c.context = 0; });
  data_ = group_along(world_, degrees, "data", [](MeshCoordinates& c) { c.data = 0; });
  pipeline_ = group_along(world_, degrees, "pipeline", [](MeshCoordinates& c) { c.pipeline = 0; });
  replicas_ = degrees.context == 1 ? data_ : group_along(world_, degrees, "replicas", [](MeshCoordinates& c) {
    c.context = 0;
    c.data = 0;
  });
  sharding_ = replicas_;
  NF_CHECK(shard_group >= 0, "blocks of {} replicas", shard_group);
  if (shard_group > 0 && shard_group != replicas_.size()) {
    NF_CHECK(replicas_.size() % shard_group == 0, "{} replicas in blocks of {}", replicas_.size(),
             shard_group);
    sharding_ = group_of_replicas(world_, degrees, "sharding",
                                  [=](int64_t replica) { return replica / shard_group * shard_group; });
    replication_ = group_of_replicas(world_, degrees, "replication",
                                     [=](int64_t replica) { return replica % shard_group; });
  }
  model_ = group_along(world_, degrees, "model", [](MeshCoordinates& c) {
    c = {.tensor = 0, .context = 0, .data = c.data, .pipeline = 0};
  });
  embedding_ = embedding_group(world_, degrees);
}

}  // namespace normformer
