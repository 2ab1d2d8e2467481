#include "normformer/model/key_value_cache.h"

#include <algorithm>
#include <utility>

namespace normformer {

KeyValueCache::KeyValueCache(Context& context, DType dtype, const Shape& shape, std::span<const Range> layers)
    : shape_(shape) {
  for (const Range range : layers) {
    for (int64_t layer = range.begin; layer < range.end; ++layer)
      layers_[layer] = {context.empty(shape, dtype), context.empty(shape, dtype)};
  }
}

const KeysAndValues& KeyValueCache::of_layer(int64_t layer) const {
  const auto found = layers_.find(layer);
  NF_CHECK(found != layers_.end(), "the cache has no layer {}", layer);
  return found->second;
}

bool Continuation::begins() const {
  return std::all_of(sequences.begin(), sequences.end(),
                     [](const ContinuedSequence& sequence) { return sequence.first == 0; });
}

Continuation make_continuation(Context& context, const KeyValueCache& cache,
                               std::vector<ContinuedSequence> sequences) {
  std::vector<int32_t> slots;
  std::vector<int32_t> positions;
  std::vector<int32_t> last_rows;
  for (const ContinuedSequence& s : sequences) {
    NF_CHECK(s.slot >= 0 && s.slot < cache.slots() && s.first >= 0 && s.tokens >= 1 &&
                 s.tokens <= cache.capacity() - s.first,
             "{} tokens from {} on of sequence {}, in a cache of {} tokens of {}", s.tokens, s.first, s.slot,
             cache.capacity(), cache.slots());
    for (int64_t position = s.first; position < s.first + s.tokens; ++position) {
      slots.push_back(static_cast<int32_t>(s.slot));
      positions.push_back(static_cast<int32_t>(position));
    }
    last_rows.push_back(static_cast<int32_t>(slots.size()) - 1);
  }
  const auto tensor_of = [&](std::span<const int32_t> values) {
    return from_host<int32_t>(context, values, {static_cast<int64_t>(values.size())});
  };
  return {&cache, std::move(sequences), tensor_of(slots), tensor_of(positions), tensor_of(last_rows)};
}

}  // namespace normformer
