#pragma once

#include <vector>

#include "normformer/comm/group.h"
#include "normformer/core/checked.h"
#include "normformer/tensor_parallel/placed.h"

namespace normformer {

/// The doors between the residual stream and the tensor-parallel region of a layer, for one placement of the
/// stream. `tokens` is always the number of tokens of the whole micro-batch.
template <class Stream>
class StreamBoundary;

/// A value on the stream, and sums over all features that came with it.
template <class Stream>
struct WithStatistics {
  Placed<Stream> value;
  Placed<Stream> statistics;
};

/// A value on the stream whose reduction has begun.
template <class Stream>
class Arriving {
 public:
  Arriving() = default;
  Arriving(Placed<Stream> value, CommRequest request)
      : value_(std::move(value)), request_(std::move(request)) {}

  /// The value, once it is there.
  Placed<Stream> wait() {
    request_.wait();
    return std::move(value_);
  }

 private:
  Placed<Stream> value_;
  CommRequest request_;
};

/// The stream is replicated: entering costs nothing forward and a sum backward, leaving the opposite (Shoeybi
/// et al. 2019, operators f and g).
template <>
class StreamBoundary<Replicated> {
 public:
  StreamBoundary(Context& context, Group tensor) : context_(&context), tensor_(std::move(tensor)) {}

  const Group& tensor_group() const { return tensor_; }

  /// Which of the tokens are on this rank's stream.
  Range rows(int64_t tokens) const { return {0, tokens}; }

  /// The stream as input of column-parallel products.
  Placed<Replicated> enter(const Placed<Replicated>& x, int64_t) const { return x; }

  /// The gradient that column-parallel products return, on the stream. Collective over the tensor group.
  Placed<Replicated> enter_backward(const Placed<Partial>& dx) const { return reduce(dx); }
  Arriving<Replicated> start_enter_backward(const Placed<Partial>& dx) const;

  /// The gradient of all tokens that every rank has made whole, on the stream.
  Placed<Replicated> keep_own(const Placed<Replicated>& dx) const { return dx; }

  /// The output of a row-parallel product, on the stream. Collective over the tensor group.
  Placed<Replicated> leave(const Placed<Partial>& y) const { return reduce(y); }

  /// As leave, with statistics (sums over this rank's features, [N, 2]) that become sums over all features on
  /// the way. Collective over the tensor group.
  WithStatistics<Replicated> leave_with(const Placed<Partial>& y, const Placed<Partial>& statistics) const;

  /// The stream's gradient as row-parallel products take it.
  Placed<Replicated> leave_backward(const Placed<Replicated>& dy, int64_t) const { return dy; }

 private:
  Placed<Replicated> reduce(const Placed<Partial>& value) const;

  Context* context_;
  Group tensor_;
};

/// The stream's tokens are dealt out to the ranks, even_part of the micro-batch's rows each: entering gathers
/// them and scatters sums backward, leaving the opposite (Korthikanti et al. 2022, operators g and g-bar). No
/// more bytes than a sum, which is both. A rank may have no token.
template <>
class StreamBoundary<SequenceSharded> {
 public:
  StreamBoundary(Context& context, Group tensor) : context_(&context), tensor_(std::move(tensor)) {}

  const Group& tensor_group() const { return tensor_; }

  /// Which of the tokens are on this rank's stream.
  Range rows(int64_t tokens) const { return even_part(tokens, tensor_.size(), tensor_.rank()); }

  /// All tokens, as input of column-parallel products. Collective over the tensor group.
  Placed<Replicated> enter(const Placed<SequenceSharded>& x, int64_t tokens) const;

  /// The gradient that column-parallel products return, for this rank's tokens. Collective over the tensor
  /// group.
  Placed<SequenceSharded> enter_backward(const Placed<Partial>& dx) const { return leave(dx); }
  Arriving<SequenceSharded> start_enter_backward(const Placed<Partial>& dx) const;

  /// The gradient of all tokens that every rank has made whole, for this rank's tokens.
  Placed<SequenceSharded> keep_own(const Placed<Replicated>& dx) const;

  /// The output of a row-parallel product, for this rank's tokens. Collective over the tensor group.
  Placed<SequenceSharded> leave(const Placed<Partial>& y) const;

  /// As leave, with statistics (sums over this rank's features, [N, 2]) that become sums over all features of
  /// this rank's tokens on the way. Collective over the tensor group.
  WithStatistics<SequenceSharded> leave_with(const Placed<Partial>& y,
                                             const Placed<Partial>& statistics) const;

  /// The gradient of all tokens, as row-parallel products take it. Collective over the tensor group.
  Placed<Replicated> leave_backward(const Placed<SequenceSharded>& dy, int64_t tokens) const {
    return enter(dy, tokens);
  }

  /// As leave_backward of each of several vectors or matrices by token, in one exchange.
  /// Collective over the tensor group.
  std::vector<Placed<Replicated>> leave_backward_with(const std::vector<Placed<SequenceSharded>>& values,
                                                      int64_t tokens) const;

 private:
  RowShare own_rows_of(const Tensor& whole) const;

  Context* context_;
  Group tensor_;
};

/// StreamBoundary::start_enter_backward, or without `overlap` enter_backward, after which nothing is waited
/// for. Collective over the tensor group.
template <class Stream>
Arriving<Stream> start_enter_backward(const StreamBoundary<Stream>& boundary, const Placed<Partial>& dx,
                                      bool overlap) {
  if (overlap) return boundary.start_enter_backward(dx);
  return {boundary.enter_backward(dx), {}};
}

/// The sum over the group of a partial value, in place. Collective over the group.
Placed<Replicated> reduce_partial(Context& context, const Group& group, const Placed<Partial>& value);

}  // namespace normformer
