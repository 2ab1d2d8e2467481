#pragma once

#include "normformer/tensor/context.h"

namespace normformer::ops {

/// to[r, to_column + j] = from[r, from_column + j] for 0 <= j < columns and every row r. Both are matrices of
/// as many rows; from is of to's type, or of its accumulator type and is rounded.
void copy_columns(Context& context, const Tensor& from, int64_t from_column, const Tensor& to,
                  int64_t to_column, int64_t columns);

}  // namespace normformer::ops
