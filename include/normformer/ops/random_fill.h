#pragma once

#include "normformer/core/philox.h"
#include "normformer/tensor/context.h"
#include "normformer/tensor/rectangle.h"

namespace normformer::ops {

// Element (r, c) of the logical matrix is drawn from its global index i = r * global_columns + c alone, so
// every split gives the same values. Computed in fp64, rounded once. With u(word) = (word + 1/2) / 2^32:

/// Fills a [rows, columns] tensor, the given part of the matrix, with N(0, std): std * sqrt(-2 ln u(a)) cos(2
/// pi u(b)) (Box, Muller 1958), where a and b are words 2 (i % 2) and 2 (i % 2) + 1 of stream.words(i / 2).
void fill_normal(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                 double std);

/// As fill_normal, uniform in (-bound, bound): bound * (2 u(a) - 1), where a is word i % 4 of stream.words(i
/// / 4).
void fill_uniform(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                  double bound);

/// Sets every element to `value`.
void fill_constant(Context& context, const Tensor& tensor, double value);

}  // namespace normformer::ops
