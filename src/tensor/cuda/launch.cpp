#include "tensor/cuda/launch.h"

#include <limits>

namespace normformer::cuda {

void check_launch(const LaunchShape& shape) {
  constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();
  NF_CHECK(shape.blocks >= 0 && shape.blocks <= kMostBlocks, "a launch of {} blocks", shape.blocks);
  NF_CHECK(shape.blocks_y >= 0 && shape.blocks_y <= 65535, "a launch of {} blocks in the second dimension",
           shape.blocks_y);
  NF_CHECK(shape.threads >= 1 && shape.threads <= 1024, "a launch of {} threads a block", shape.threads);
  NF_CHECK(shape.shared_bytes >= 0 && shape.shared_bytes <= kMostShared,
           "a launch with {} bytes of shared memory a block", shape.shared_bytes);
}

}  // namespace normformer::cuda
