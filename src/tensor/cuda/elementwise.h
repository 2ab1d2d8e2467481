#pragma once

#include <span>

#include "normformer/tensor/context.h"

// The GPU's side of the functions of the same names in normformer/tensor/context.h: arguments checked and
// accounted for.

namespace normformer::cuda {

/// Between any two different floating-point types.
void convert(Context& context, const Tensor& from, const Tensor& to);

void scale(Context& context, const Tensor& x, double factor);

void sum_in_order(Context& context, std::span<const Tensor> pieces, const Tensor& out);

void max_in_order(Context& context, std::span<const Tensor> pieces, const Tensor& out);

}  // namespace normformer::cuda
