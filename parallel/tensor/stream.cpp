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

Arriving<Replicated> StreamBoundary<Replicated>::start_enter_backward(const Placed<Partial>& dx) const {
  return {Placed<Replicated>(dx.tensor()), tensor_.start_all_reduce_sum(*context_, dx.tensor())};
}

WithStatistics<Replicated> StreamBoundary<Replicated>::leave_with(const Placed<Partial>& y,
                                                                  const Placed<Partial>& statistics) const {
  const std::array<Tensor, 2> both = {y.tensor(), statistics.tensor()};
  tensor_.all_reduce_sum(*context_, both);
  return {Placed<Replicated>(y.tensor()), Placed<Replicated>(statistics.tensor())};
}

namespace {

// How many rows every rank of a group has.
std::vector<int64_t> rows_of_ranks(const Group& group, int64_t tokens) {
  std::vector<int64_t> rows;
  for (int r = 0; r < group.size(); ++r) rows.push_back(even_part(tokens, group.size(), r).size());
  return rows;
}

// Of a vector's or a matrix's shape.
Shape with_rows(const Shape& shape, int64_t rows) {
  return shape.rank() == 1 ? Shape{rows} : Shape{rows, shape[1]};
}

}  // namespace

// A part of its own: as a view it would keep the whole alive.
RowShare StreamBoundary<SequenceSharded>::own_rows_of(const Tensor& whole) const {
  const Shape shape = with_rows(whole.shape(), rows(whole.dim(0)).size());
  return {whole, context_->empty(shape, whole.dtype())};
}

Placed<Replicated> StreamBoundary<SequenceSharded>::enter(const Placed<SequenceSharded>& x,
                                                          int64_t tokens) const {
  return leave_backward_with({x}, tokens).front();
}

Placed<SequenceSharded> StreamBoundary<SequenceSharded>::keep_own(const Placed<Replicated>& dx) const {
  const RowShare share = own_rows_of(dx.tensor());
  const Range mine = rows(dx.tensor().dim(0));
  copy(*context_, dx.tensor().rows(mine.begin, mine.end), share.part);
  return Placed<SequenceSharded>(share.part);
}

Placed<SequenceSharded> StreamBoundary<SequenceSharded>::leave(const Placed<Partial>& y) const {
  const RowShare share = own_rows_of(y.tensor());
  tensor_.reduce_scatter_rows(*context_, {&share, 1}, rows_of_ranks(tensor_, y.tensor().dim(0)));
  return Placed<SequenceSharded>(share.part);
}

Arriving<SequenceSharded> StreamBoundary<SequenceSharded>::start_enter_backward(
    const Placed<Partial>& dx) const {
  const RowShare share = own_rows_of(dx.tensor());
  return {
      Placed<SequenceSharded>(share.part),
      tensor_.start_reduce_scatter_rows(*context_, {&share, 1}, rows_of_ranks(tensor_, dx.tensor().dim(0)))};
}

WithStatistics<SequenceSharded> StreamBoundary<SequenceSharded>::leave_with(
    const Placed<Partial>& y, const Placed<Partial>& statistics) const {
  const std::array<RowShare, 2> both = {own_rows_of(y.tensor()), own_rows_of(statistics.tensor())};
  tensor_.reduce_scatter_rows(*context_, both, rows_of_ranks(tensor_, y.tensor().dim(0)));
  return {Placed<SequenceSharded>(both[0].part), Placed<SequenceSharded>(both[1].part)};
}

std::vector<Placed<Replicated>> StreamBoundary<SequenceSharded>::leave_backward_with(
    const std::vector<Placed<SequenceSharded>>& values, int64_t tokens) const {
  std::vector<RowShare> shares;
  std::vector<Placed<Replicated>> gathered;
  for (const Placed<SequenceSharded>& value : values) {
    const Tensor& part = value.tensor();
    const Tensor whole = context_->empty(with_rows(part.shape(), tokens), part.dtype());
    shares.push_back({whole, part});
    gathered.emplace_back(whole);
  }
  tensor_.all_gather_rows(*context_, shares, rows_of_ranks(tensor_, tokens));
  return gathered;
}

}  // namespace normformer
