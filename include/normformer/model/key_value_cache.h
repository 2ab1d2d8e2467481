#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "normformer/core/checked.h"
#include "normformer/tensor/context.h"

namespace normformer {

/// What attention has made of sequences' tokens in one layer, with this rank's heads: both
/// [slots, capacity, heads, head_size], after the LayerNorms where the model has qkv_norm.
struct KeysAndValues {
  Tensor keys;
  Tensor values;
};

/// The keys and values of sequences that grow, by layers: the room that one rank has for them, whose contents
/// those who fill it know. Each sequence has a slot of its own.
class KeyValueCache {
 public:
  /// For the layers in `layers`, ranges of global numbers.
  KeyValueCache(Context& context, DType dtype, const Shape& shape, std::span<const Range> layers);

  /// LogicError for a layer that it was not made for.
  const KeysAndValues& of_layer(int64_t layer) const;

  int64_t slots() const { return shape_[0]; }
  int64_t capacity() const { return shape_[1]; }

 private:
  Shape shape_;
  std::map<int64_t, KeysAndValues> layers_;
};

/// Consecutive tokens of one sequence: the cache has those before them.
struct ContinuedSequence {
  int64_t slot = 0;
  int64_t first = 0;   ///< position of the first of them
  int64_t tokens = 1;  ///< at least 1
};

/// How the rows of a micro-batch continue sequences, each by a number of tokens of its own: one sequence's
/// behind the other's, without padding. Refers to the cache.
struct Continuation {
  const KeyValueCache* cache = nullptr;
  std::vector<ContinuedSequence> sequences;
  Tensor slots;      ///< i32 [num_tokens()]: of each row its sequence's
  Tensor positions;  ///< i32 [num_tokens()]: and its place there
  Tensor last_rows;  ///< i32 [sequences]: the row of each one's last token

  int64_t num_tokens() const { return slots.dim(0); }

  /// Whether there is nothing before any of these tokens.
  bool begins() const;
};

/// LogicError where the cache has no room for them.
Continuation make_continuation(Context& context, const KeyValueCache& cache,
                               std::vector<ContinuedSequence> sequences);

}  // namespace normformer
