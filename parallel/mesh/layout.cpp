#include "normformer/mesh/layout.h"

#include <algorithm>

namespace normformer {

std::vector<int64_t> shard_sizes(int64_t total, int64_t degree) {
  std::vector<int64_t> sizes;
  for (int64_t r = 0; r < degree; ++r) sizes.push_back(even_part(total, degree, r).size());
  return sizes;
}

std::vector<Range> micro_batches(int64_t samples, int64_t micro_batch, int64_t data_degree,
                                 int64_t data_rank) {
  NF_CHECK(samples >= 0 && micro_batch >= 1 && data_degree >= 1 && data_rank >= 0 && data_rank < data_degree,
           "{} samples in micro-batches of {} for replica {} of {}", samples, micro_batch, data_rank,
           data_degree);
  const Range mine = replica_samples(samples, data_degree, data_rank);
  const int64_t number = ceil_div(replica_samples(samples, data_degree, 0).size(), micro_batch);
  std::vector<Range> cut;
  for (int64_t m = 0; m < number; ++m) {
    cut.push_back({std::min(mine.end, mine.begin + m * micro_batch),
                   std::min(mine.end, mine.begin + (m + 1) * micro_batch)});
  }
  return cut;
}

}  // namespace normformer
