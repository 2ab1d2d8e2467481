#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "normformer/checkpoints/checkpoint.h"

namespace normformer {

/// How one logical tensor differs between two checkpoints.
struct TensorDifference {
  std::string name;
  Role role = Role::parameter;
  std::string
      shape_fault;  ///< how shapes or types differ, or where it is missing; nothing else is known then
  int64_t elements = 0;
  int64_t different = 0;  ///< elements of other bits
  double largest = 0.0;   ///< |a - b|; NaN where one is and the other is not
  double relative = 0.0;  ///< 2-norm of a - b over that of a; infinite where a is zero
};

/// Compares all tensors of two checkpoints, whatever layouts wrote them; those that do not differ are left
/// out. Reads and verifies both through fixed buffers. Throws as CheckpointReader::read.
std::vector<TensorDifference> compare_tensors(const CheckpointReader& a, const CheckpointReader& b);

/// What CheckpointInfo and the configurations in it say differently: "update_count: 120 and 140". Names of
/// runs and folders are left out.
std::vector<std::string> compare_infos(const CheckpointInfo& a, const CheckpointInfo& b);

}  // namespace normformer
