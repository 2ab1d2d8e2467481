#pragma once

#include <cstdint>
#include <vector>

#include "normformer/core/checked.h"
#include "normformer/core/sequence_part.h"

// Who holds what: pure arithmetic on even_part, so that whoever asks for any rank gets the answer which that
// rank gives itself. Ranges are in global indices, cover [0, total) in the order of ranks, and differ in size
// by at most one unit, the larger ones first; a rank beyond the last unit holds an empty range.
namespace normformer {

/// The attention heads of tensor rank `tensor_rank` of `tensor_degree`.
constexpr Range head_shard(int64_t heads, int64_t tensor_degree, int64_t tensor_rank) {
  return even_part(heads, tensor_degree, tensor_rank);
}

/// The channels of those heads: whole heads, so in units of `head_size`.
constexpr Range head_channel_shard(int64_t heads, int64_t head_size, int64_t tensor_degree,
                                   int64_t tensor_rank) {
  const Range held = head_shard(heads, tensor_degree, tensor_rank);
  return {held.begin * head_size, held.end * head_size};
}

/// The feed-forward features of a tensor rank.
constexpr Range feature_shard(int64_t features, int64_t tensor_degree, int64_t tensor_rank) {
  return even_part(features, tensor_degree, tensor_rank);
}

/// The rows of the embedding matrix of a tensor rank.
constexpr Range vocabulary_shard(int64_t vocabulary, int64_t tensor_degree, int64_t tensor_rank) {
  return even_part(vocabulary, tensor_degree, tensor_rank);
}

/// The elements of a flat bucket that replica `replica` of `replicas` reduces, updates and gathers.
constexpr Range bucket_shard(int64_t elements, int64_t replicas, int64_t replica) {
  return even_part(elements, replicas, replica);
}

/// The size of every rank's piece under even_part, in rank order: the counts of Group::reduce_scatter_sum and
/// Group::all_gather.
std::vector<int64_t> shard_sizes(int64_t total, int64_t degree);

/// The tokens of every sequence of `length` that context rank `context_rank` of `context_degree` has: cut
/// into twice as many chunks as there are ranks, the chunk of its own number and the one as far from the end,
/// so that every rank has as much to attend to under a causal mask. In order of ranks and rows they do not
/// cover [0, length), but together.
constexpr SequencePart context_part(int64_t length, int64_t context_degree, int64_t context_rank) {
  if (context_degree == 1) return SequencePart::whole(length);
  return {even_part(length, 2 * context_degree, context_rank),
          even_part(length, 2 * context_degree, 2 * context_degree - 1 - context_rank)};
}

/// The samples of a global batch that data rank `data_rank` of `data_degree` takes.
constexpr Range replica_samples(int64_t samples, int64_t data_degree, int64_t data_rank) {
  return even_part(samples, data_degree, data_rank);
}

/// A replica's samples, as ranges of the global batch, cut into micro-batches of `micro_batch` samples. The
/// last one may be smaller, and every replica has as many micro-batches as the first: those with fewer
/// samples end in empty ones, so that collectives still match.
std::vector<Range> micro_batches(int64_t samples, int64_t micro_batch, int64_t data_degree,
                                 int64_t data_rank);

}  // namespace normformer
