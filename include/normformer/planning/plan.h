#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "normformer/comm/group.h"
#include "normformer/config/run_config.h"
#include "normformer/mesh/layout.h"
#include "normformer/mesh/mesh.h"
#include "normformer/pipeline/simulator.h"
#include "normformer/tensor/memory.h"

namespace normformer {

/// What one step takes of one rank.
struct RankPlan {
  int64_t rank = 0;
  MeshCoordinates at;
  MemoryReport memory;  ///< after a first step; its peaks are those of training
  std::vector<TrafficRecord> traffic;
  int64_t flops = 0;          ///< that the rank computes, recomputation included
  int64_t calls = 0;          ///< of communication, from the start of the run to the end of the step
  int64_t staging_bytes = 0;  ///< of host memory, for checkpoints on their way to the disk

  /// Payload of all its communication, in bytes.
  int64_t traffic_bytes() const;
};

/// What the ranks of one pipeline stage hold: they are alike but for what does not divide evenly.
struct StagePlan {
  std::vector<Range> layers;  ///< of each part on a rank
  RankPlan largest;           ///< the one with the highest peak
};

/// A pipeline's idle time, with times that are in proportion to FLOPs and transfers that take none.
struct PipelinePlan {
  double bubble_fraction = 0;  ///< of all ranks' time of a step
  double barrier_share = 0;    ///< barrier_cost as a share of the step
};

/// How much more sharding.gradients or .parameters moves over the ranks that split them than
/// sharding.optimizer.
struct ShardingPlan {
  std::string group;               ///< the name of their group
  int64_t bytes = 0;               ///< of the busiest rank's gradients and weights, a step
  int64_t bytes_of_optimizer = 0;  ///< the same under sharding.optimizer
};

/// Whether all ranks' calls fit together (check_launch_order).
struct OrderPlan {
  int64_t ranks = 0;      ///< how many were compared
  int64_t calls = 0;      ///< all of theirs
  std::string violation;  ///< what was found; "" for nothing
};

/// What a run will take, from its own code on the meta device.
struct Plan {
  RunConfig config;  ///< resolved
  int64_t ranks = 1;
  int64_t parameters = 0;     ///< of the whole model
  int64_t micro_batches = 0;  ///< a step, of the replica with the most
  std::vector<StagePlan> stages;
  RankPlan busiest;                      ///< the rank with most traffic
  int64_t most_flops = 0;                ///< of one rank
  double model_flops = 0;                ///< what the step needs over all ranks (training_flops_per_token)
  std::optional<PipelinePlan> pipeline;  ///< with more than one stage
  std::optional<ShardingPlan> sharding;  ///< with gradients or parameters split and several micro-batches
  OrderPlan order;
};

/// Runs one step of every rank on meta; of more than `most_ranks` those that are first or last in their
/// tensor, context and data groups, of every stage: the others hold and do as much or less. `config` is
/// resolved for `ranks` and has a vocabulary. Reads no data.
Plan make_plan(const RunConfig& config, int64_t ranks, int64_t most_ranks = 64);

/// The times of every part of the model for one micro-batch, in FLOPs: what a plan simulates its pipeline
/// with. `config` is resolved and has a vocabulary.
StageTimes flops_of_parts(const RunConfig& config);

/// A plan for people, several lines.
std::string describe(const Plan& plan);

}  // namespace normformer
