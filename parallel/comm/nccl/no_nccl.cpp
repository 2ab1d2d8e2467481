#include "normformer/comm/nccl.h"
#include "normformer/core/error.h"

// What stands in for nccl_world.cpp in a build without NCCL.

namespace normformer {

std::string describe_nccl() { return "this build has no NCCL"; }

bool has_nccl() { return false; }

Group make_nccl_world(Context&, const Group&, double) {
  throw ConfigError("device.transport = \"nccl\" cannot be had: " + describe_nccl() + "; write \"mpi\"");
}

}  // namespace normformer
