#pragma once

#include "normformer/core/philox.h"
#include "normformer/tensor/context.h"
#include "normformer/tensor/rectangle.h"

namespace normformer::ops {

/// Fills a [rows, columns] tensor with N(0, std): element (r, c) of the logical matrix is drawn from its
/// global index alone (Box-Muller on two words of the stream), so every split gives the same values. Computed
/// in fp64, rounded once.
void fill_normal(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                 double std);

/// As fill_normal, uniform in (-bound, bound).
void fill_uniform(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                  double bound);

/// Sets every element to `value`.
void fill_constant(Context& context, const Tensor& tensor, double value);

}  // namespace normformer::ops
