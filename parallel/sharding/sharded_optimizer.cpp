#include "normformer/sharding/sharded_optimizer.h"

#include <cmath>
#include <limits>

#include "normformer/mesh/layout.h"

namespace normformer {

ShardedOptimizer::ShardedOptimizer(ParameterStore& store, Group data, Group embedding, Group world)
    : store_(&store), data_(std::move(data)), embedding_(std::move(embedding)), world_(std::move(world)) {
  int64_t total = 0;
  for (const Bucket& bucket : store.buckets()) {
    const Range mine = bucket_shard(bucket.flat.size(), data_.size(), data_.rank());
    shards_.push_back({{bucket.flat.begin + mine.begin, bucket.flat.begin + mine.end},
                       total,
                       shard_sizes(bucket.flat.size(), data_.size())});
    total += mine.size();
  }
  Context& context = store.context();
  const DType type = accumulator_of(store.dtype());
  if (type != store.dtype()) masters_ = context.zeros({total}, type, MemoryUse::optimizer);
  moment1_ = context.zeros({total}, type, MemoryUse::optimizer);
  moment2_ = context.zeros({total}, type, MemoryUse::optimizer);
}

Tensor ShardedOptimizer::master(const Shard& shard) const {
  return masters_.defined() ? masters_.flat(shard.state_offset, shard.flat.size())
                            : store_->flat_values().flat(shard.flat.begin, shard.flat.size());
}

Tensor ShardedOptimizer::gradient(const Shard& shard) const {
  return store_->flat_gradients().flat(shard.flat.begin, shard.flat.size());
}

void ShardedOptimizer::initialise(uint64_t seed) {
  Context& context = store_->context();
  for (const Parameter& p : store_->parameters()) {
    const Tensor drawn = context.empty({p.numel()}, accumulator_of(store_->dtype()), MemoryUse::workspace);
    draw_initial_values(context, p.spec, seed, drawn);
    copy(context, drawn, p.value);
    if (!masters_.defined()) continue;
    for (const Shard& shard : shards_) {
      const Range run = intersect(shard.flat, p.flat_range());
      if (run.empty()) continue;
      copy(context, drawn.flat(run.begin - p.offset, run.size()),
           masters_.flat(shard.state_offset + run.begin - shard.flat.begin, run.size()));
    }
  }
}

void ShardedOptimizer::reduce_gradients() {
  Context& context = store_->context();
  const TraceScope scope(context, TraceKind::step, "reduce gradients");
  // Backward finishes the last bucket first. Tied copies lie in different buckets on their two stages, so
  // they are summed whole before either stage cuts its bucket over data-parallel ranks.
  for (size_t i = shards_.size(); i-- > 0;) {
    const Bucket& bucket = store_->buckets()[i];
    const Tensor whole = store_->flat_gradients().flat(bucket.flat.begin, bucket.flat.size());
    if (bucket.sum_over.embedding && embedding_.defined())
      embedding_.all_reduce(context, whole, ReduceOp::sum);
    if (bucket.sum_over.data)
      data_.reduce_scatter_sum(context, whole, gradient(shards_[i]), shards_[i].counts);
  }
}

std::vector<ParameterPiece> ShardedOptimizer::owned_gradients() const {
  std::vector<ParameterPiece> pieces;
  for (const Shard& shard : shards_) {
    for (const Parameter& p : store_->parameters()) {
      const Range run = intersect(shard.flat, p.flat_range());
      if (!p.spec.owned || run.empty()) continue;
      pieces.push_back({&p,
                        {run.begin - p.offset, run.end - p.offset},
                        store_->flat_gradients().flat(run.begin, run.size())});
    }
  }
  return pieces;
}

// The same gradients in as few pieces as can be: each costs a GPU a wait.
std::vector<Tensor> ShardedOptimizer::owned_runs() const {
  std::vector<Range> runs;
  for (const Shard& shard : shards_) {
    for (const Parameter& p : store_->parameters()) {
      const Range run = intersect(shard.flat, p.flat_range());
      if (!p.spec.owned || run.empty()) continue;
      if (!runs.empty() && runs.back().end == run.begin)
        runs.back().end = run.end;
      else
        runs.push_back(run);
    }
  }
  std::vector<Tensor> tensors;
  for (const Range& run : runs) tensors.push_back(store_->flat_gradients().flat(run.begin, run.size()));
  return tensors;
}

double ShardedOptimizer::largest_gradient() {
  const TraceScope scope(store_->context(), TraceKind::step, "largest gradient");
  double largest = 0.0;
  for (const Tensor& run : owned_runs()) {
    largest = std::max(largest, ops::absolute_max(store_->context(), run));
  }
  return world_.all_reduce(largest, ReduceOp::max);
}

double ShardedOptimizer::gradient_norm(double largest) {
  if (!std::isfinite(largest)) return std::numeric_limits<double>::infinity();
  const TraceScope scope(store_->context(), TraceKind::step, "gradient norm");
  ops::OrderFreeSumOfSquares squares(largest);
  for (const Tensor& run : owned_runs()) squares.add(store_->context(), run);
  auto bins = squares.bins();
  for (double& bin : bins) bin = world_.all_reduce(bin, ReduceOp::sum);
  return std::sqrt(ops::OrderFreeSumOfSquares::value(bins));
}

void ShardedOptimizer::step(const ops::AdamW& update) {
  Context& context = store_->context();
  const TraceScope scope(context, TraceKind::step, "update weights");
  for (const Shard& shard : shards_) {
    const int64_t size = shard.flat.size();
    ops::adamw(context, update, gradient(shard), master(shard), moment1_.flat(shard.state_offset, size),
               moment2_.flat(shard.state_offset, size), store_->flat_values().flat(shard.flat.begin, size));
  }
  gather_values();
}

void ShardedOptimizer::publish_masters() {
  if (masters_.defined()) {
    for (const Shard& shard : shards_) {
      copy(store_->context(), master(shard), store_->flat_values().flat(shard.flat.begin, shard.flat.size()));
    }
  }
  gather_values();
}

void ShardedOptimizer::gather_values() {
  for (size_t i = 0; i < shards_.size(); ++i) {
    const Range flat = store_->buckets()[i].flat;
    const Tensor whole = store_->flat_values().flat(flat.begin, flat.size());
    data_.all_gather(store_->context(),
                     store_->flat_values().flat(shards_[i].flat.begin, shards_[i].flat.size()), whole,
                     shards_[i].counts);
  }
}

std::vector<StatePiece> ShardedOptimizer::state() const {
  std::vector<StatePiece> pieces;
  for (const Shard& shard : shards_) {
    for (const Parameter& p : store_->parameters()) {
      const Range run = intersect(shard.flat, p.flat_range());
      if (run.empty()) continue;
      const Range within{run.begin - p.offset, run.end - p.offset};
      const int64_t at = run.begin - shard.flat.begin;
      const auto add = [&](StateRole role, const Tensor& values) {
        pieces.push_back({role, {&p, within, values.flat(at, run.size())}});
      };
      add(StateRole::master, master(shard));
      add(StateRole::moment1, moment1_.flat(shard.state_offset, shard.flat.size()));
      add(StateRole::moment2, moment2_.flat(shard.state_offset, shard.flat.size()));
    }
  }
  return pieces;
}

}  // namespace normformer
