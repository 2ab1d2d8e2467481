#include "normformer/tensor_parallel/stream.h"

#include <array>

namespace normformer {

Placed<Replicated> reduce_partial(Context& context, const Group& group, const Placed<Partial>& value) {
  group.all_reduce(context, value.tensor(), ReduceOp::sum);
  return Placed<Replicated>(value.tensor());
}

Placed<Replicated> StreamBoundary<Replicated>::reduce(const Placed<Partial>& value) const {
  return reduce_partial(*context_, tensor_, value);
}

Placed<Replicated> StreamBoundary<Replicated>::leave_with(const Placed<Partial>& y,
                                                          const Placed<Partial>& statistics) const {
  const std::array<Tensor, 2> both = {y.tensor(), statistics.tensor()};
  tensor_.all_reduce_sum(*context_, both);
  return Placed<Replicated>(y.tensor());
}

}  // namespace normformer
