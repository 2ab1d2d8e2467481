#pragma once

#include <algorithm>
#include <cstdint>

#include "normformer/tensor/context.h"

#include "ops/cpu/dispatch_accumulator.h"
#include "ops/row_blocks.h"

namespace normformer::ops::cpu {

namespace detail {

template <class A>
void add_blocks(Context& context, const Tensor& partials, int64_t first, const Tensor& out, bool overwrite) {
  const int64_t blocks = partials.dim(0);
  const int64_t stride = partials.dim(1);
  const A* in = partials.data<A>() + first;
  A* sums = out.data<A>();
  constexpr int64_t kColumns = 512;
  context.threads().parallel_for(out.numel(), kColumns, [&](int64_t begin, int64_t end) {
    A local[kColumns] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const A* row = in + b * stride;
      for (int64_t c = begin; c < end; ++c) local[c - begin] += row[c];
    }
    for (int64_t c = begin; c < end; ++c) sums[c] = (overwrite ? A{0} : sums[c]) + local[c - begin];
  });
}

template <class A>
void add_blocks_by_group(Context& context, const Tensor& partials, int64_t first, int64_t columns,
                         const Tensor& out) {
  const int64_t groups = out.numel();
  const int64_t size = columns / groups;
  const int64_t blocks = partials.dim(0);
  const int64_t stride = partials.dim(1);
  const A* in = partials.data<A>() + first;
  A* sums = out.data<A>();
  context.threads().parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      A total = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const A* row = in + b * stride + g * size;
        A group = 0;
        for (int64_t c = 0; c < size; ++c) group += row[c];
        total += group;
      }
      sums[g] += total;
    }
  });
}

}  // namespace detail

/// out[c] += (or =) partials[0, first + c] + partials[1, first + c] + ..., added in the order of blocks.
inline void add_blocks(Context& context, const Tensor& partials, int64_t first, const Tensor& out,
                       bool overwrite = false) {
  dispatch_accumulator(out.dtype(),
                       [&]<class A>() { detail::add_blocks<A>(context, partials, first, out, overwrite); });
}

/// out[g] += the sum over blocks of partials' columns [first, first + columns) of group g: out.numel() groups
/// of equally many columns.
inline void add_blocks_by_group(Context& context, const Tensor& partials, int64_t first, int64_t columns,
                                const Tensor& out) {
  dispatch_accumulator(out.dtype(), [&]<class A>() {
    detail::add_blocks_by_group<A>(context, partials, first, columns, out);
  });
}

/// Calls body(block, rows of the block) for each block, on some thread.
template <class Body>
void for_row_blocks(Context& context, const RowBlocks& blocks, int64_t rows, Body&& body) {
  context.threads().parallel_for(blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      body(b, Range{b * blocks.rows_per_block, std::min(rows, (b + 1) * blocks.rows_per_block)});
    }
  });
}

}  // namespace normformer::ops::cpu
