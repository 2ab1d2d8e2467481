#include "normformer/sharding/parameter_store.h"

#include <algorithm>
#include <utility>

#include "normformer/mesh/layout.h"
#include "normformer/ops/random_fill.h"

namespace normformer {

namespace {

// Parameters start at multiples of this many elements, so that vector loads of any type are aligned.
constexpr int64_t kAlignment = 64;

bool same_sum(const GradientSum& a, const GradientSum& b) {
  return a.tensor == b.tensor && a.replicas == b.replicas && a.embedding == b.embedding;
}

Shape local_shape(const ParameterSpec& spec) {
  if (spec.logical_shape.rank() == 1) return {spec.part.rows.size()};
  return {spec.part.rows.size(), spec.part.columns.size()};
}

}  // namespace

Parameter& ParameterStore::declare(ParameterSpec spec) {
  NF_CHECK(!values_.defined(), "{} is declared after the store was allocated", spec.name);
  NF_CHECK(find(spec.name) == nullptr, "{} is declared twice", spec.name);
  parameters_.push_back({std::move(spec), 0, {}, {}});
  return parameters_.back();
}

Parameter* ParameterStore::find(std::string_view name) {
  const auto found = std::find_if(parameters_.begin(), parameters_.end(),
                                  [&](const Parameter& p) { return p.spec.name == name; });
  return found == parameters_.end() ? nullptr : &*found;
}

std::vector<Parameter*> ParameterStore::in_flat_order() {
  std::vector<Parameter*> order;
  for (Parameter& p : parameters_) order.push_back(&p);
  std::stable_partition(order.begin(), order.end(),
                        [](const Parameter* p) { return !p->spec.sum_over.tensor; });
  return order;
}

void ParameterStore::place_parameters() {
  for (Parameter* p : in_flat_order()) {
    if (!p->spec.joins_previous) flat_size_ = round_up(flat_size_, kAlignment);
    p->offset = flat_size_;
    flat_size_ = checked_add(flat_size_, p->numel());
  }
}

void ParameterStore::cut_buckets() {
  const int64_t wanted = std::max<int64_t>(1, options_.bucket_bytes / size_of(accumulator_of(dtype_)));
  const bool by_unit = options_.sharding != Sharding::optimizer;
  for (const Parameter* p : in_flat_order()) {
    const int64_t unit = by_unit && !p->spec.sum_over.tensor ? p->spec.unit : -1;
    const bool starts = buckets_.empty() || !same_sum(buckets_.back().sum_over, p->spec.sum_over) ||
                        buckets_.back().unit != unit ||
                        (buckets_.back().size() >= wanted && !p->spec.joins_previous);
    if (starts) {
      // The gap of an aligned start belongs to the bucket before; it holds zeros and stays zero.
      const int64_t begin = buckets_.empty() ? 0 : p->offset;
      if (!buckets_.empty()) buckets_.back().flat.end = begin;
      buckets_.emplace_back();
      buckets_.back().flat = {begin, begin};
      buckets_.back().sum_over = p->spec.sum_over;
      buckets_.back().unit = unit;
    }
    buckets_.back().flat.end = p->offset + p->numel();
  }
  for (Bucket& b : buckets_) {
    const Range mine = bucket_shard(b.size(), sharding_.size(), sharding_.rank());
    b.piece = {b.flat.begin + mine.begin, b.flat.begin + mine.end};
    b.counts = shard_sizes(b.size(), sharding_.size());
  }
}

bool ParameterStore::splits_gradients(const Bucket& bucket) const {
  return bucket.unit >= 0 && options_.sharding != Sharding::optimizer;
}

bool ParameterStore::splits_values(const Bucket& bucket) const {
  return bucket.unit >= 0 && options_.sharding == Sharding::parameters;
}

namespace {

// Buffers of one kind: of whole buckets, and of this rank's pieces of those that are split.
struct Buffers {
  Tensor whole;
  Tensor pieces;
};

template <class Splits>
Buffers make_buffers(Context& context, const std::vector<Bucket>& buckets, DType dtype, MemoryUse use,
                     Splits&& splits) {
  int64_t whole = 0;
  int64_t pieces = 0;
  for (const Bucket& b : buckets) (splits(b) ? pieces : whole) += splits(b) ? b.piece.size() : b.size();
  return {context.zeros({whole}, dtype, use), context.zeros({pieces}, dtype, use)};
}

// Gives each bucket its place in the buffers.
template <class Splits>
void hand_out(const Buffers& buffers, std::vector<Bucket>& buckets, Tensor Bucket::*whole,
              Tensor Bucket::*piece, Splits&& splits) {
  int64_t whole_at = 0;
  int64_t piece_at = 0;
  for (Bucket& b : buckets) {
    if (splits(b)) {
      b.*piece = buffers.pieces.flat(piece_at, b.piece.size());
      piece_at += b.piece.size();
    } else {
      b.*whole = buffers.whole.flat(whole_at, b.size());
      b.*piece = (b.*whole).flat(b.piece.begin - b.flat.begin, b.piece.size());
      whole_at += b.size();
    }
  }
}

}  // namespace

void ParameterStore::allocate(const Group& sharding, const StoreOptions& options, const Group& replication) {
  NF_CHECK(!values_.defined(), "a parameter store is allocated twice");
  options_ = options;
  sharding_ = sharding;
  replication_ = replication;
  place_parameters();
  cut_buckets();
  open_gradients_.assign(buckets_.size(), 0);
  arrivals_.resize(buckets_.size());
  finished_.resize(buckets_.size());
  replicated_.assign(buckets_.size(), false);
  find_order_of_use();
  const auto values_split = [this](const Bucket& b) { return splits_values(b); };
  const auto gradients_split = [this](const Bucket& b) { return splits_gradients(b); };
  const Buffers values = make_buffers(*context_, buckets_, dtype_, MemoryUse::parameters, values_split);
  values_ = values.whole;
  value_pieces_ = values.pieces;
  hand_out(values, buckets_, &Bucket::values, &Bucket::value_piece, values_split);
  if (options.with_gradients) {
    const Buffers gradients =
        make_buffers(*context_, buckets_, accumulator_of(dtype_), MemoryUse::gradients, gradients_split);
    gradients_ = gradients.whole;
    gradient_pieces_ = gradients.pieces;
    hand_out(gradients, buckets_, &Bucket::gradients, &Bucket::gradient_piece, gradients_split);
  }
  for (const Bucket& b : buckets_) show(b);
}

// Points the bucket's parameters to where their values and gradients are; to nothing where they are not
// whole.
void ParameterStore::show(const Bucket& bucket) {
  const auto place = [&](const Tensor& whole, const Parameter& p) {
    return whole ? whole.at(p.offset - bucket.flat.begin, local_shape(p.spec)) : Tensor();
  };
  for (Parameter& p : parameters_) {
    if (intersect(p.flat_range(), bucket.flat).empty()) continue;
    p.value = place(bucket.values, p);
    p.gradient = place(bucket.gradients, p);
  }
}

template <class Body>
void ParameterStore::for_each_split(int64_t unit, bool (ParameterStore::*splits)(const Bucket&) const,
                                    Body&& body) {
  for (Bucket& bucket : buckets_) {
    if (bucket.unit == unit && (this->*splits)(bucket)) body(bucket);
  }
}

void ParameterStore::find_order_of_use() {
  units_.resize(buckets_.size());
  int64_t unit = -1;
  for (const Parameter* p : in_flat_order()) {
    const auto bucket = static_cast<size_t>(&bucket_of(*p) - buckets_.data());
    units_[bucket].push_back(p->spec.finished_with);
    if (p->spec.sum_over.tensor) continue;
    if (p->spec.unit >= 0) unit = p->spec.unit;
    // Behind a layer stands the LayerNorm of its output, which it makes.
    needed_[unit] = p->offset + p->numel();
  }
  for (std::vector<int64_t>& units : units_) {
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
  }
  count_unfinished();
}

void ParameterStore::gather_values(size_t bucket) {
  arrivals_[bucket].request = gather(buckets_[bucket], buckets_[bucket].values);
}

// Done at once where values do not overlap.
CommRequest ParameterStore::gather(const Bucket& bucket, const Tensor& whole) const {
  if (options_.overlap_values)
    return sharding_.start_all_gather(*context_, bucket.value_piece, whole, bucket.counts);
  sharding_.all_gather(*context_, bucket.value_piece, whole, bucket.counts);
  return {};
}

// Done at once where gradients do not overlap.
CommRequest ParameterStore::reduce(const Bucket& bucket, const Tensor& whole, const Tensor& piece) const {
  if (options_.overlap_gradients)
    return sharding_.start_reduce_scatter_sum(*context_, whole, piece, bucket.counts);
  sharding_.reduce_scatter_sum(*context_, whole, piece, bucket.counts);
  return {};
}

void ParameterStore::await_values() {
  for (size_t i = 0; i < buckets_.size(); ++i) {
    if (!splits_values(buckets_[i])) arrivals_[i].request.wait();
  }
}

void ParameterStore::await_values(int64_t unit) {
  if (!options_.overlap_values) return;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const Bucket& b = buckets_[i];
    const bool is_needed = b.flat.begin < needed_.at(unit) || b.sum_over.tensor;
    if (is_needed && !splits_values(b)) arrivals_[i].request.wait();
  }
}

void ParameterStore::prefetch_values(int64_t unit) {
  if (!options_.overlap_values) return;
  for_each_split(unit, &ParameterStore::splits_values, [&](Bucket& b) { start_arrival(b); });
}

void ParameterStore::start_arrival(const Bucket& bucket) {
  Arrival& arrival = arrivals_[static_cast<size_t>(&bucket - buckets_.data())];
  if (arrival.values) return;
  NF_CHECK(!bucket.values, "the values of unit {} are opened twice", bucket.unit);
  arrival.values = context_->empty({bucket.size()}, dtype_, MemoryUse::parameters);
  arrival.request = gather(bucket, arrival.values);
}

void ParameterStore::open_values(int64_t unit) {
  for_each_split(unit, &ParameterStore::splits_values, [&](Bucket& b) {
    start_arrival(b);
    Arrival& arrival = arrivals_[static_cast<size_t>(&b - buckets_.data())];
    arrival.request.wait();
    b.values = std::exchange(arrival.values, {});
    show(b);
  });
  await_values(unit);
}

void ParameterStore::close_values(int64_t unit) {
  for_each_split(unit, &ParameterStore::splits_values, [&](Bucket& b) {
    b.values = {};
    show(b);
  });
}

void ParameterStore::open_gradients(int64_t unit) {
  for_each_split(unit, &ParameterStore::splits_gradients, [&](Bucket& b) {
    if (open_gradients_[static_cast<size_t>(&b - buckets_.data())]++ > 0) return;
    b.gradients = context_->zeros({b.size()}, accumulator_of(dtype_), MemoryUse::gradients);
    show(b);
  });
}

namespace {

// Units whose gradients are summed while others are computed; each holds a unit's gradients and more.
constexpr size_t kMostReductions = 2;

}  // namespace

void ParameterStore::reduce_gradients(int64_t unit) {
  for_each_split(unit, &ParameterStore::splits_gradients, [&](Bucket& b) {
    int& open = open_gradients_[static_cast<size_t>(&b - buckets_.data())];
    NF_CHECK(open > 0, "the gradients of unit {} are reduced, but not open", unit);
    const DType type = accumulator_of(dtype_);
    Reduction reduction{&b, std::exchange(b.gradients, {}), {}, {}};
    reduction.sum = context_->empty({b.piece.size()}, type, MemoryUse::gradients);
    reduction.request = reduce(b, reduction.whole, reduction.sum);
    reductions_.push_back(std::move(reduction));
    const size_t most = options_.overlap_gradients ? kMostReductions : 0;
    while (reductions_.size() > most) end_oldest_reduction();
    if (--open > 0) b.gradients = context_->zeros({b.size()}, type, MemoryUse::gradients);
    show(b);
  });
}

void ParameterStore::end_oldest_reduction() {
  Reduction& oldest = reductions_.front();
  oldest.request.wait();
  add(*context_, oldest.sum, oldest.bucket->gradient_piece);
  const Bucket& bucket = *oldest.bucket;
  reductions_.pop_front();
  replicate_finished(bucket.unit);
}

// Behind the last of a finished unit's reductions, that is never sooner on one rank than on another.
void ParameterStore::replicate_finished(int64_t unit) {
  if (!finished_units_.contains(unit)) return;
  for_each_split(unit, &ParameterStore::splits_gradients, [&](Bucket& b) {
    const bool is_under_way = std::any_of(reductions_.begin(), reductions_.end(),
                                          [&](const Reduction& r) { return r.bucket == &b; });
    if (!is_under_way) start_replication(static_cast<size_t>(&b - buckets_.data()));
  });
}

void ParameterStore::await_gradients() {
  while (!reductions_.empty()) end_oldest_reduction();
  for (size_t i = 0; i < buckets_.size(); ++i) {
    if (splits_gradients(buckets_[i])) start_replication(i);
  }
  while (!replications_.empty()) end_oldest_replication();
  replicated_.assign(buckets_.size(), false);
}

// A bucket that is held in pieces, once: its pieces have all of the step's gradients.
void ParameterStore::start_replication(size_t bucket) {
  if (!replication_.defined() || replicated_[bucket]) return;
  replicated_[bucket] = true;
  const Tensor& piece = buckets_[bucket].gradient_piece;
  if (!options_.overlap_gradients) return replication_.all_reduce(*context_, piece, ReduceOp::sum);
  replications_.push_back(replication_.start_all_reduce_sum(*context_, piece));
  while (replications_.size() > kMostReductions) end_oldest_replication();
}

void ParameterStore::end_oldest_replication() {
  replications_.front().wait();
  replications_.pop_front();
}

void ParameterStore::count_unfinished() {
  unfinished_.clear();
  finished_units_.clear();
  for (const std::vector<int64_t>& units : units_) unfinished_.push_back(units.size());
}

void ParameterStore::finish_gradients(int64_t unit) {
  if (!options_.overlap_gradients) return;
  finished_units_.insert(unit);
  replicate_finished(unit);
  for (size_t i = buckets_.size(); i-- > 0;) {
    const Bucket& b = buckets_[i];
    // What is summed over other groups first waits for the end.
    if (splits_gradients(b) || b.sum_over.tensor || b.sum_over.embedding || !b.sum_over.replicas) continue;
    if (!std::binary_search(units_[i].begin(), units_[i].end(), unit) || --unfinished_[i] > 0) continue;
    finished_[i] = reduce(b, b.gradients, b.gradient_piece);
    replicate_previous();
    unreplicated_ = i;
  }
}

// One bucket behind: while a bucket is summed over the sharding group, the one before it is over the copies.
void ParameterStore::replicate_previous() {
  if (!replication_.defined() || !unreplicated_) return;
  CommRequest& request = finished_[*unreplicated_];
  request.wait();
  request = replication_.start_all_reduce_sum(*context_, buckets_[*unreplicated_].gradient_piece);
  unreplicated_.reset();
}

void ParameterStore::reduce_bucket(size_t bucket) {
  const Bucket& b = buckets_[bucket];
  replicate_previous();
  if (finished_[bucket].pending()) return finished_[bucket].wait();
  sharding_.reduce_scatter_sum(*context_, b.gradients, b.gradient_piece, b.counts);
  if (replication_.defined()) replication_.all_reduce(*context_, b.gradient_piece, ReduceOp::sum);
}

const Bucket& ParameterStore::bucket_of(const Parameter& parameter) const {
  const auto found = std::find_if(buckets_.begin(), buckets_.end(),
                                  [&](const Bucket& b) { return parameter.offset < b.flat.end; });
  NF_CHECK(found != buckets_.end(), "{} lies in no bucket", parameter.spec.name);
  return *found;
}

Tensor ParameterStore::joined_value(const Parameter& first, const Shape& shape) const {
  const Bucket& bucket = bucket_of(first);
  return bucket.values.at(first.offset - bucket.flat.begin, shape);
}

Tensor ParameterStore::joined_gradient(const Parameter& first, const Shape& shape) const {
  const Bucket& bucket = bucket_of(first);
  return bucket.gradients ? bucket.gradients.at(first.offset - bucket.flat.begin, shape) : Tensor();
}

Tensor ParameterStore::whole_gradients(size_t bucket, const Range& run) const {
  int64_t at = run.begin - buckets_[bucket].flat.begin;
  for (size_t i = 0; i < bucket; ++i) at += splits_gradients(buckets_[i]) ? 0 : buckets_[i].size();
  return gradients_.flat(at, run.size());
}

void ParameterStore::zero_gradients() {
  count_unfinished();
  fill_zero(*context_, gradients_);
  if (gradient_pieces_.numel() > 0) fill_zero(*context_, gradient_pieces_);
}

int64_t ParameterStore::owned_scalars() const {
  int64_t count = 0;
  for (const Parameter& p : parameters_) count += p.spec.owned ? p.numel() : 0;
  return count;
}

void draw_initial_values(Context& context, const ParameterSpec& spec, uint64_t seed, const Tensor& out) {
  const RandomStream stream = RandomStream{seed}.with("initial weights").with(spec.name);
  const Tensor matrix = out.view({spec.part.rows.size(), spec.part.columns.size()});
  switch (spec.initial.kind) {
    case InitialValue::Kind::constant:
      return ops::fill_constant(context, matrix, spec.initial.scale);
    case InitialValue::Kind::normal:
      return ops::fill_normal(context, matrix, spec.part, stream, spec.initial.scale);
    case InitialValue::Kind::uniform:
      return ops::fill_uniform(context, matrix, spec.part, stream, spec.initial.scale);
  }
}

}  // namespace normformer
