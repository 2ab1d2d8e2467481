#include "normformer/sharding/parameter_store.h"

#include <algorithm>

#include "normformer/ops/random_fill.h"

namespace normformer {

namespace {

// Parameters start at multiples of this many elements, so that vector loads of any type are aligned.
constexpr int64_t kAlignment = 64;

bool same_sum(const GradientSum& a, const GradientSum& b) {
  return a.data == b.data && a.embedding == b.embedding;
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

void ParameterStore::place_parameters() {
  for (Parameter& p : parameters_) {
    if (!p.spec.joins_previous) flat_size_ = round_up(flat_size_, kAlignment);
    p.offset = flat_size_;
    flat_size_ = checked_add(flat_size_, p.numel());
  }
}

void ParameterStore::cut_buckets(int64_t bucket_bytes) {
  const int64_t wanted = std::max<int64_t>(1, bucket_bytes / size_of(accumulator_of(dtype_)));
  for (const Parameter& p : parameters_) {
    const bool starts = buckets_.empty() || !same_sum(buckets_.back().sum_over, p.spec.sum_over) ||
                        (buckets_.back().flat.size() >= wanted && !p.spec.joins_previous);
    if (starts) {
      // The gap of an aligned start belongs to the bucket before; it holds zeros and stays zero.
      const int64_t begin = buckets_.empty() ? 0 : p.offset;
      if (!buckets_.empty()) buckets_.back().flat.end = begin;
      buckets_.push_back({{begin, begin}, p.spec.sum_over});
    }
    buckets_.back().flat.end = p.offset + p.numel();
  }
}

void ParameterStore::allocate(int64_t bucket_bytes, bool with_gradients) {
  NF_CHECK(!values_.defined(), "a parameter store is allocated twice");
  place_parameters();
  cut_buckets(bucket_bytes);
  values_ = context_->zeros({flat_size_}, dtype_, MemoryUse::parameters);
  if (with_gradients)
    gradients_ = context_->zeros({flat_size_}, accumulator_of(dtype_), MemoryUse::gradients);
  for (Parameter& p : parameters_) {
    const Shape shape = local_shape(p.spec);
    p.value = values_.at(p.offset, shape);
    if (with_gradients) p.gradient = gradients_.at(p.offset, shape);
  }
}

Tensor ParameterStore::joined_value(const Parameter& first, const Shape& shape) const {
  return values_.at(first.offset, shape);
}

Tensor ParameterStore::joined_gradient(const Parameter& first, const Shape& shape) const {
  return has_gradients() ? gradients_.at(first.offset, shape) : Tensor();
}

void ParameterStore::zero_gradients() { fill_zero(*context_, gradients_); }

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
