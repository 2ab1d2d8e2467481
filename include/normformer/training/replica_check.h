#pragma once

#include <string>
#include <vector>

#include "normformer/training/trainer.h"

namespace normformer {

/// Values of which ranks that must hold the same bits hold different ones.
struct ReplicaFault {
  std::string parameter;      ///< logical name
  std::string what;           ///< "weights", "master", "moment1" or "moment2"; kNotRounded
  std::vector<int> suspects;  ///< world ranks, ascending: those that differ from more than half of the
                              ///< holders that were compared, or all of these where no copy has that many
  std::vector<int> others;    ///< world ranks that hold the copy of more than half; none where there is none

  /// `what` where a rank's weights are not its own master weights rounded.
  static constexpr const char* kNotRounded = "weights beside master";
};

/// Compares what several ranks hold alike, bit by bit: weights over the replicas (data and context), those
/// that the tensor group holds whole over that, the tied embedding over first and last stage; with hybrid
/// sharding also what blocks have copies of, masters and moments or pieces of weights, over the replication
/// group. And, on each rank alone, weights with the master weights that they are rounded from. Every rank
/// hashes its values (XXH3-64); one gather tells of a hash for each of its groups, and only where some differ
/// parameters are exchanged and named. On a GPU values are copied to the host block by block. The same on
/// every rank, by parameter; none where all agree. LogicError where a step is not settled. Collective over
/// the world.
std::vector<ReplicaFault> compare_replicas(Trainer& trainer);

/// One sentence that names parameters and ranks, with hosts[r] as the host of world rank r.
std::string describe(const std::vector<ReplicaFault>& faults, const std::vector<std::string>& hosts);

/// Throws an AgreedError of ExitCode::corrupt where compare_replicas finds anything. Collective over the
/// world.
void require_equal_replicas(Trainer& trainer);

}  // namespace normformer
