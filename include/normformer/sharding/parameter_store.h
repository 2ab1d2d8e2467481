#pragma once

#include <cstdint>
#include <deque>
#include <string_view>
#include <vector>

#include "normformer/mesh/parameter.h"
#include "normformer/tensor/context.h"

namespace normformer {

/// A run of consecutive parameters in the flat buffers whose gradients are reduced, and values gathered,
/// together.
struct Bucket {
  Range flat;
  GradientSum sum_over;
};

/// One rank's parameters in two flat buffers, values and main gradients, cut into buckets. Parameters are
/// declared first, in the order of the forward pass, then allocated together; references to them stay valid.
/// Owns the memory.
class ParameterStore {
 public:
  /// Values are of `dtype`, main gradients of its accumulator type.
  ParameterStore(Context& context, DType dtype) : context_(&context), dtype_(dtype) {}
  ParameterStore(const ParameterStore&) = delete;
  ParameterStore& operator=(const ParameterStore&) = delete;

  /// Adds a parameter. LogicError for a name declared before, or after allocate().
  Parameter& declare(ParameterSpec spec);

  /// The parameter of that name; null where none was declared.
  Parameter* find(std::string_view name);

  /// Makes the buffers: values undefined, gradients zero. Buckets are of about `bucket_bytes` of main
  /// gradients, and all parameters of one have the same gradient sum. With `with_gradients` false
  /// (evaluation) there are no gradients.
  void allocate(int64_t bucket_bytes, bool with_gradients = true);

  /// Values, or gradients, of consecutive parameters declared with joins_previous, as one matrix.
  Tensor joined_value(const Parameter& first, const Shape& shape) const;
  Tensor joined_gradient(const Parameter& first, const Shape& shape) const;

  const std::deque<Parameter>& parameters() const { return parameters_; }
  const std::vector<Bucket>& buckets() const { return buckets_; }
  const Tensor& flat_values() const { return values_; }
  const Tensor& flat_gradients() const { return gradients_; }
  bool has_gradients() const { return gradients_.defined(); }
  DType dtype() const { return dtype_; }
  Context& context() const { return *context_; }

  void zero_gradients();

  /// Scalars of the logical parameters that this rank owns.
  int64_t owned_scalars() const;

 private:
  void place_parameters();
  void cut_buckets(int64_t bucket_bytes);

  Context* context_;
  DType dtype_;
  std::deque<Parameter> parameters_;
  std::vector<Bucket> buckets_;
  int64_t flat_size_ = 0;
  Tensor values_;
  Tensor gradients_;
};

/// Draws one parameter's part as its spec says, from the run's seed and the parameter's name alone, into
/// `out` (of f32 or f64, as many elements as the part).
void draw_initial_values(Context& context, const ParameterSpec& spec, uint64_t seed, const Tensor& out);

}  // namespace normformer
