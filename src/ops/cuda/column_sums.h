#pragma once

#include <span>

#include "normformer/tensor/context.h"

namespace normformer::ops::cuda {

/// What one quantity's sums of columns are added to: the sums of row blocks from column `first` of partials.
struct ColumnSum {
  int64_t first = 0;
  Tensor out;
};

inline constexpr int kMostColumnSums = 5;

/// out[c] += (or =) partials[0, first + c] + partials[1, first + c] + ..., for up to kMostColumnSums sums of
/// equally many columns; in an order that depends on the number of blocks alone. partials [blocks, ...] and
/// outs of A.
template <class A>
void add_blocks(Context& context, const Tensor& partials, std::span<const ColumnSum> sums,
                bool overwrite = false);

/// out[g] += the sum over blocks of partials' columns [first, first + columns) of group g: out.numel() groups
/// of equally many columns. All of A.
template <class A>
void add_blocks_by_group(Context& context, const Tensor& partials, int64_t first, int64_t columns,
                         const Tensor& out);

extern template void add_blocks<float>(Context&, const Tensor&, std::span<const ColumnSum>, bool);
extern template void add_blocks<double>(Context&, const Tensor&, std::span<const ColumnSum>, bool);
extern template void add_blocks_by_group<float>(Context&, const Tensor&, int64_t, int64_t, const Tensor&);
extern template void add_blocks_by_group<double>(Context&, const Tensor&, int64_t, int64_t, const Tensor&);

}  // namespace normformer::ops::cuda
