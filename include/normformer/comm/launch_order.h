#pragma once

#include <span>
#include <vector>

#include "normformer/comm/group.h"

namespace normformer {

/// What one rank calls, in its order.
struct RankEvents {
  int rank = 0;  ///< in the world
  std::vector<TrafficEvent> events;
};

/// Throws LogicError, naming ranks, positions (from 0) and calls, unless these ranks can make all of their
/// calls: any two of them order the collectives of the groups that they share alike (kind, group, members,
/// root, bytes; texts of "control" may differ in length), every message sent is received with as many bytes,
/// in the order of its channel (group, sender, receiver, tag), and no rank waits for ever where neither
/// sending nor starting blocks and everything else does, until all of the group have called or the message is
/// sent. Some of a world's ranks may be left out: they are taken to be in time.
void check_launch_order(std::span<const RankEvents> ranks);

}  // namespace normformer
