#pragma once

#include <string_view>

#include "normformer/core/error.h"
#include "normformer/ops/dropout.h"
#include "normformer/tensor/context.h"

namespace normformer::ops {

/// Holds the arguments of one call of an operation against what its contract says, and sums up their bytes.
class Arguments {
 public:
  /// `dtype` is the operation's type T.
  Arguments(const Context& context, std::string_view operation, DType dtype)
      : operation_(operation), dtype_(dtype), device_(context.device()) {
    NF_CHECK(is_floating(dtype), "{} works on floating-point tensors, not on {}", operation, name_of(dtype));
  }

  /// LogicError unless `tensor` is defined, has this shape and type and lives on the context's device; then
  /// its bytes count as moved `times` times.
  void check(std::string_view name, const Tensor& tensor, const Shape& shape, DType dtype, int times = 1) {
    NF_CHECK(tensor.defined(), "{}: {} is undefined", operation_, name);
    NF_CHECK(tensor.shape() == shape && tensor.dtype() == dtype, "{}: {} is {}, not {}{}", operation_, name,
             to_string(tensor), name_of(dtype), to_string(shape));
    NF_CHECK(tensor.device() == device_, "{}: {} is on another device than its context", operation_, name);
    bytes_ += times * tensor.nbytes();
  }

  /// check() for a tensor of T.
  void model(std::string_view name, const Tensor& tensor, const Shape& shape, int times = 1) {
    check(name, tensor, shape, dtype_, times);
  }

  /// check() for a tensor of accumulator_of(T).
  void accumulator(std::string_view name, const Tensor& tensor, const Shape& shape, int times = 1) {
    check(name, tensor, shape, accumulator_of(dtype_), times);
  }

  /// The bytes of everything checked: what must move at the least.
  int64_t bytes() const { return bytes_; }

 private:
  std::string_view operation_;
  DType dtype_;
  DeviceKind device_;
  int64_t bytes_ = 0;
};

/// The rows and columns of a matrix argument; LogicError for another rank.
inline Shape matrix_shape(std::string_view operation, std::string_view name, const Tensor& tensor) {
  NF_CHECK(tensor.defined() && tensor.shape().rank() == 2, "{}: {} is {}, not a matrix", operation, name,
           tensor.defined() ? to_string(tensor) : "undefined");
  return tensor.shape();
}

/// LogicError unless `columns` channels fall into as many equal groups as there are scales.
inline void check_heads(std::string_view operation, const Tensor& scales, int64_t columns) {
  NF_CHECK(scales.defined() && scales.numel() > 0 && columns % scales.numel() == 0,
           "{}: {} channels do not fall into equal heads with {}", operation, columns,
           scales.defined() ? to_string(scales) : "undefined scales");
}

/// LogicError unless something can be kept and rows have a place in a sample.
inline void check_dropout(std::string_view operation, const Dropout& dropout) {
  NF_CHECK(dropout.probability >= 0.0 && dropout.probability < 1.0, "{}: a dropout probability of {}",
           operation, dropout.probability);
  NF_CHECK(dropout.rows_per_sample >= 1, "{}: dropout with {} rows in a sample", operation,
           dropout.rows_per_sample);
  NF_CHECK(dropout.first_row >= 0, "{}: dropout from row {} on", operation, dropout.first_row);
}

}  // namespace normformer::ops
