#include "normformer/sharding/sharded_optimizer.h"

#include <cmath>
#include <limits>

namespace normformer {

ShardedOptimizer::ShardedOptimizer(ParameterStore& store, DType masters, const Mesh& mesh)
    : store_(&store),
      tensor_(mesh.tensor()),
      embedding_(mesh.embedding()),
      is_first_block_(mesh.is_first_block()) {
  int64_t total = 0;
  for (const Bucket& bucket : store.buckets()) {
    state_offsets_.push_back(total);
    total += bucket.piece.size();
  }
  Context& context = store.context();
  const DType type = accumulator_of(store.dtype());
  NF_CHECK(masters == type || masters == store.dtype(), "masters of {} for weights of {}", name_of(masters),
           name_of(store.dtype()));
  if (masters != store.dtype()) masters_ = context.zeros({total}, type, MemoryUse::optimizer);
  moment1_ = context.zeros({total}, type, MemoryUse::optimizer);
  moment2_ = context.zeros({total}, type, MemoryUse::optimizer);
}

Tensor ShardedOptimizer::master(size_t bucket) const {
  const Bucket& b = store_->buckets()[bucket];
  return masters_.defined() ? masters_.flat(state_offsets_[bucket], b.piece.size()) : b.value_piece;
}

void ShardedOptimizer::initialise(uint64_t seed) {
  Context& context = store_->context();
  store_->await_values();
  fill_zero(context, moment1_);
  fill_zero(context, moment2_);
  for (const Parameter& p : store_->parameters()) {
    const Tensor drawn = context.empty({p.numel()}, accumulator_of(store_->dtype()), MemoryUse::workspace);
    draw_initial_values(context, p.spec, seed, drawn);
    if (p.value) copy(context, drawn, p.value);
    for (size_t i = 0; i < store_->buckets().size(); ++i) {
      const Bucket& b = store_->buckets()[i];
      const Range run = intersect(b.piece, p.flat_range());
      if (run.empty()) continue;
      const Tensor mine = drawn.flat(run.begin - p.offset, run.size());
      if (!p.value) copy(context, mine, b.value_piece.flat(run.begin - b.piece.begin, run.size()));
      if (masters_.defined()) copy(context, mine, master(i).flat(run.begin - b.piece.begin, run.size()));
    }
  }
}

void ShardedOptimizer::reduce_gradients() {
  Context& context = store_->context();
  const TraceScope scope(context, TraceKind::step, "reduce gradients");
  // Backward finishes the last bucket first. Tied copies lie in different buckets on their two stages, so
  // they are summed whole before either stage cuts its bucket over replicas; and so are copies of
  // a stream's vectors, so that norms and files may take them from one tensor rank.
  for (size_t i = store_->buckets().size(); i-- > 0;) {
    const Bucket& bucket = store_->buckets()[i];
    if (store_->splits_gradients(bucket)) continue;  // summed behind every micro-batch
    if (bucket.sum_over.tensor) tensor_.all_reduce(context, bucket.gradients, ReduceOp::sum);
    if (bucket.sum_over.embedding && embedding_.defined())
      embedding_.all_reduce(context, bucket.gradients, ReduceOp::sum);
    if (bucket.sum_over.replicas) store_->reduce_bucket(i);
  }
  store_->await_gradients();
}

// Calls visit(bucket, parameter, run) for what this rank updates of each parameter, in order.
template <class Visit>
void ShardedOptimizer::for_each_run(Visit&& visit) const {
  for (size_t i = 0; i < store_->buckets().size(); ++i) {
    for (const Parameter& p : store_->parameters()) {
      const Range run = intersect(store_->buckets()[i].piece, p.flat_range());
      if (!run.empty()) visit(i, p, run);
    }
  }
}

std::vector<ParameterPiece> ShardedOptimizer::owned_gradients() const {
  std::vector<ParameterPiece> pieces;
  for_each_run([&](size_t bucket, const Parameter& p, const Range& run) {
    if (!owns(p)) return;
    const Bucket& b = store_->buckets()[bucket];
    pieces.push_back({&p,
                      {run.begin - p.offset, run.end - p.offset},
                      b.gradient_piece.flat(run.begin - b.piece.begin, run.size())});
  });
  return pieces;
}

// The same gradients in as few pieces as can be: each costs a GPU a wait. What is held whole is contiguous
// over buckets too.
std::vector<Tensor> ShardedOptimizer::owned_runs() const {
  struct Run {
    size_t bucket;
    Range range;
  };
  std::vector<Run> runs;
  const auto is_whole = [&](size_t bucket) { return !store_->splits_gradients(store_->buckets()[bucket]); };
  for_each_run([&](size_t bucket, const Parameter& p, const Range& run) {
    if (!owns(p)) return;
    const bool goes_on = !runs.empty() && runs.back().range.end == run.begin &&
                         (runs.back().bucket == bucket || (is_whole(runs.back().bucket) && is_whole(bucket)));
    if (goes_on)
      runs.back().range.end = run.end;
    else
      runs.push_back({bucket, run});
  });
  std::vector<Tensor> tensors;
  for (const Run& run : runs) {
    const Bucket& b = store_->buckets()[run.bucket];
    const int64_t at = run.range.begin - b.piece.begin;
    tensors.push_back(is_whole(run.bucket) ? store_->whole_gradients(run.bucket, run.range)
                                           : b.gradient_piece.flat(at, run.range.size()));
  }
  return tensors;
}

double largest_of(std::span<const GradientSize> sizes) {
  double largest = 0.0;
  for (const GradientSize& size : sizes) largest = std::max(largest, size.largest);
  return largest;
}

double norm_of(std::span<const GradientSize> sizes) {
  const double largest = largest_of(sizes);
  if (!std::isfinite(largest)) return std::numeric_limits<double>::infinity();
  ops::OrderFreeSumOfSquares squares(largest);
  for (const GradientSize& size : sizes) squares.add_bins(size.largest, size.bins);
  return std::sqrt(squares.value());
}

GradientSize ShardedOptimizer::gradient_size() {
  const TraceScope scope(store_->context(), TraceKind::step, "size of gradients");
  const std::vector<Tensor> runs = owned_runs();
  GradientSize size;
  for (const Tensor& run : runs)
    size.largest = std::max(size.largest, ops::absolute_max(store_->context(), run));
  if (!std::isfinite(size.largest)) return size;
  ops::OrderFreeSumOfSquares squares(size.largest);
  for (const Tensor& run : runs) squares.add(store_->context(), run);
  size.bins = squares.bins();
  return size;
}

void ShardedOptimizer::step(const ops::AdamW& update) {
  Context& context = store_->context();
  const TraceScope scope(context, TraceKind::step, "update weights");
  store_->await_values();  // of the last update: a rank without a micro-batch has not used them
  for (size_t i = 0; i < store_->buckets().size(); ++i) {
    const Bucket& b = store_->buckets()[i];
    ops::adamw(context, update, b.gradient_piece, master(i), moment1_.flat(state_offsets_[i], b.piece.size()),
               moment2_.flat(state_offsets_[i], b.piece.size()), b.value_piece);
    if (!store_->splits_values(b)) store_->gather_values(i);
  }
}

Tensor ShardedOptimizer::kept_master(size_t bucket) const {
  return kept_masters_.flat(state_offsets_[bucket], store_->buckets()[bucket].piece.size());
}

void ShardedOptimizer::keep() {
  Context& context = store_->context();
  const TraceScope scope(context, TraceKind::step, "keep weights");
  if (!kept_masters_.defined()) {
    const DType type = masters_.defined() ? masters_.dtype() : store_->dtype();
    kept_masters_ = context.empty(moment1_.shape(), type, MemoryUse::optimizer);
    kept_moment1_ = context.empty(moment1_.shape(), moment1_.dtype(), MemoryUse::optimizer);
    kept_moment2_ = context.empty(moment2_.shape(), moment2_.dtype(), MemoryUse::optimizer);
  }
  for (size_t i = 0; i < store_->buckets().size(); ++i) copy(context, master(i), kept_master(i));
  copy(context, moment1_, kept_moment1_);
  copy(context, moment2_, kept_moment2_);
}

void ShardedOptimizer::restore() {
  Context& context = store_->context();
  const TraceScope scope(context, TraceKind::step, "take the update back");
  NF_CHECK(kept_masters_.defined(), "an update is taken back, but nothing was kept");
  store_->await_values();  // pieces are on their way to others
  for (size_t i = 0; i < store_->buckets().size(); ++i) copy(context, kept_master(i), master(i));
  copy(context, kept_moment1_, moment1_);
  copy(context, kept_moment2_, moment2_);
}

void ShardedOptimizer::publish_masters() {
  store_->await_values();
  for (size_t i = 0; i < store_->buckets().size(); ++i) {
    const Bucket& b = store_->buckets()[i];
    if (masters_.defined()) copy(store_->context(), master(i), b.value_piece);
    if (!store_->splits_values(b)) store_->gather_values(i);
  }
}

std::vector<StatePiece> ShardedOptimizer::state() const {
  std::vector<StatePiece> pieces;
  for_each_run([&](size_t bucket, const Parameter& p, const Range& run) {
    const Bucket& b = store_->buckets()[bucket];
    const Range within{run.begin - p.offset, run.end - p.offset};
    const int64_t at = run.begin - b.piece.begin;
    const auto add = [&](StateRole role, const Tensor& values) {
      pieces.push_back({role, {&p, within, values.flat(at, run.size())}});
    };
    add(StateRole::master, master(bucket));
    add(StateRole::moment1, moment1_.flat(state_offsets_[bucket], b.piece.size()));
    add(StateRole::moment2, moment2_.flat(state_offsets_[bucket], b.piece.size()));
  });
  return pieces;
}

}  // namespace normformer
