#pragma once

#include "normformer/comm/group.h"
#include "normformer/tensor_parallel/placed.h"

namespace normformer {

/// The doors between the residual stream and the tensor-parallel region of a layer, for one placement of the
/// stream. The stream is replicated here: entering costs nothing forward and a sum backward, leaving the
/// opposite (Shoeybi et al. 2019, operators f and g).
template <class Stream>
class StreamBoundary;

template <>
class StreamBoundary<Replicated> {
 public:
  StreamBoundary(Context& context, Group tensor) : context_(&context), tensor_(std::move(tensor)) {}

  const Group& tensor_group() const { return tensor_; }

  /// The stream as input of column-parallel products.
  Placed<Replicated> enter(const Placed<Replicated>& x) const { return x; }

  /// The gradient that column-parallel products return, on the stream. Collective over the tensor group.
  Placed<Replicated> enter_backward(const Placed<Partial>& dx) const { return reduce(dx); }

  /// The output of a row-parallel product, on the stream. Collective over the tensor group.
  Placed<Replicated> leave(const Placed<Partial>& y) const { return reduce(y); }

  /// As leave, with statistics (sums over this rank's features, [N, 2]) that become sums over all features on
  /// the way. Collective over the tensor group.
  Placed<Replicated> leave_with(const Placed<Partial>& y, const Placed<Partial>& statistics) const;

  /// The stream's gradient as row-parallel products take it.
  Placed<Replicated> leave_backward(const Placed<Replicated>& dy) const { return dy; }

 private:
  Placed<Replicated> reduce(const Placed<Partial>& value) const;

  Context* context_;
  Group tensor_;
};

/// The sum over the group of a partial value, in place. Collective over the group.
Placed<Replicated> reduce_partial(Context& context, const Group& group, const Placed<Partial>& value);

}  // namespace normformer
