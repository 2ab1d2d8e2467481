#pragma once

#include <cstdint>
#include <string>

#include "normformer/comm/group.h"

namespace normformer {

/// How many ways a run is split along each axis of the mesh.
struct MeshDegrees {
  int64_t tensor = 1;    ///< heads, features and vocabulary rows of every layer
  int64_t context = 1;   ///< tokens of every sequence
  int64_t data = 1;      ///< sequences of every global batch
  int64_t pipeline = 1;  ///< layers
  bool operator==(const MeshDegrees&) const = default;
};

/// The number of ranks that the degrees need: their product. ConfigError for a degree below 1.
int64_t num_ranks(const MeshDegrees& degrees);

/// "tensor 2 x context 1 x data 4 x pipeline 2"
std::string to_string(const MeshDegrees& degrees);

/// Where a rank stands along each axis of the mesh.
struct MeshCoordinates {
  int64_t tensor = 0;
  int64_t context = 0;
  int64_t data = 0;
  int64_t pipeline = 0;
  bool operator==(const MeshCoordinates&) const = default;
};

/// The coordinates of a world rank. Ranks count along tensor first, then context, then data, then pipeline,
/// so that those who talk most are closest: consecutive ranks share a host.
MeshCoordinates coordinates_of(const MeshDegrees& degrees, int64_t world_rank);

/// The inverse of coordinates_of.
int64_t world_rank_of(const MeshDegrees& degrees, const MeshCoordinates& coordinates);

/// The ranks of a run arranged along four axes, and the groups among which they communicate: a cheap value.
/// In a group along one axis, a rank's number is its coordinate on that axis.
class Mesh {
 public:
  /// ConfigError where the degrees do not make up the world. `shard_group` divides the number of replicas; 0
  /// means all of them. Collective over the world.
  Mesh(Group world, const MeshDegrees& degrees, int64_t shard_group = 0);

  const MeshDegrees& degrees() const { return degrees_; }
  const MeshCoordinates& coordinates() const { return coordinates_; }

  const Group& world() const { return world_; }
  const Group& tensor() const { return tensor_; }
  const Group& context() const { return context_; }
  const Group& data() const { return data_; }
  const Group& pipeline() const { return pipeline_; }

  /// All ranks that hold the same parameters, over which gradients are summed: equal tensor and pipeline
  /// coordinates, context fastest. The data group itself where sequences are not split.
  const Group& replicas() const { return replicas_; }

  /// The block of `shard_group` consecutive replicas that this rank is in, which split what is split among
  /// replicas: the replicas themselves where that is all of them.
  const Group& sharding() const { return sharding_; }

  /// Those at this rank's place in every block, the first block's first: they hold the same. Undefined where
  /// there is one block.
  const Group& replication() const { return replication_; }

  /// Whether this rank is in the first block of replicas, which answers for what every block holds.
  bool is_first_block() const { return !replication_.defined() || replication_.rank() == 0; }

  /// All ranks that together hold one copy of the model: equal data coordinates.
  const Group& model() const { return model_; }

  /// The first and the last stage, which both hold the tied embedding, of equal other coordinates. Undefined
  /// on the stages between them, and everywhere where there is one stage.
  const Group& embedding() const { return embedding_; }

  bool is_first_stage() const { return coordinates_.pipeline == 0; }
  bool is_last_stage() const { return coordinates_.pipeline == degrees_.pipeline - 1; }

 private:
  MeshDegrees degrees_;
  MeshCoordinates coordinates_;
  Group world_;
  Group tensor_;
  Group context_;
  Group data_;
  Group pipeline_;
  Group replicas_;
  Group sharding_;
  Group replication_;
  Group model_;
  Group embedding_;
};

}  // namespace normformer
