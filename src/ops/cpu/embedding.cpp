#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/embedding.cpp"
#include <algorithm>
#include <cstring>
#include <vector>

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "normformer/tensor/dispatch.h"

#include "ops/cpu/dropout_mask.h"
#include "ops/cpu/lanes-inl.h"
#include "ops/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

/// Adds the rows of tokens in their order, channels [columns.begin, columns.end) only.
void embedding_backward_columns(const Tensor& tokens, const Tensor& dout, double factor, int64_t first_row,
                                const Tensor& dweight, Range columns) {
  const int32_t* ids = tokens.data<int32_t>();
  const int64_t width = dout.dim(1);
  const int64_t rows = dweight.dim(0);
  dispatch_floating(dout.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const auto factor_lanes = set<A>(A(factor));
    for (int64_t n = 0; n < dout.dim(0); ++n) {
      const int64_t row = ids[n] - first_row;
      if (row < 0 || row >= rows) continue;
      const T* from = dout.data<T>() + n * width + columns.begin;
      A* to = dweight.data<A>() + row * width + columns.begin;
      for_columns<A>(columns.size(), [&](int64_t c, auto use) HWY_ATTR {
        store(hn::MulAdd(factor_lanes, load_ahead(from + c, use), load(to + c, use)), to + c, use);
      });
    }
  });
}

void add_positions_rows(const Tensor& embedded, double factor, const Tensor& positions, int64_t first_row,
                        const Dropout& dropout, const Tensor& out, Range rows) {
  const int64_t columns = embedded.dim(1);
  dispatch_floating(embedded.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const auto factor_lanes = set<A>(A(factor));
    std::vector<A> drawn(static_cast<size_t>(dropout.active() ? columns : 0));
    const A* multipliers = dropout.active() ? drawn.data() : nullptr;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      if (dropout.active()) dropout_row(dropout, r, columns, drawn.data());
      const T* token = embedded.data<T>() + r * columns;
      const T* position = positions.data<T>() + ((first_row + r) % positions.dim(0)) * columns;
      T* to = out.data<T>() + r * columns;
      for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
        auto sum = hn::MulAdd(factor_lanes, load_ahead(token + c, use), load_ahead(position + c, use));
        if (multipliers != nullptr) sum = hn::Mul(sum, load(multipliers + c, use));
        store(sum, to + c, use);
      });
    }
  });
}

/// The rows of positions [at.begin, at.end) of every sequence, in the order of sequences.
void add_positions_backward_at(const Tensor& dout, int64_t length, int64_t first_row, const Dropout& dropout,
                               const Tensor& dsum, const Tensor& dpositions, Range at) {
  const int64_t columns = dout.dim(1);
  dispatch_floating(dout.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    std::vector<A> drawn(static_cast<size_t>(dropout.active() ? columns : 0));
    const A* multipliers = dropout.active() ? drawn.data() : nullptr;
    for (int64_t first = -(first_row % length); first < dout.dim(0); first += length) {
      for (int64_t position = at.begin; position < at.end && first + position < dout.dim(0); ++position) {
        const int64_t row = first + position;
        if (row < 0) continue;
        if (dropout.active()) dropout_row(dropout, row, columns, drawn.data());
        const T* from = dout.data<T>() + row * columns;
        T* to = dsum.data<T>() + row * columns;
        A* sum = dpositions ? dpositions.data<A>() + position * columns : nullptr;
        for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
          auto d = load_ahead(from + c, use);
          if (multipliers != nullptr) d = hn::Mul(d, load(multipliers + c, use));
          if (sum != nullptr) add_to(sum + c, d, use);
          store(d, to + c, use);
        });
      }
    }
  });
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(embedding_backward_columns);
HWY_EXPORT(add_positions_rows);
HWY_EXPORT(add_positions_backward_at);

namespace {

void check_tokens(const Tensor& tokens) {
  const int32_t* ids = tokens.data<int32_t>();
  for (int64_t n = 0; n < tokens.numel(); ++n) NF_CHECK(ids[n] >= 0, "token {} has the id {}", n, ids[n]);
}

}  // namespace

void embedding_forward(Context& context, const Tensor& tokens, const Tensor& weight, int64_t first_row,
                       const Tensor& out) {
  check_tokens(tokens);
  const int32_t* ids = tokens.data<int32_t>();
  const auto row_bytes = static_cast<size_t>(out.dim(1) * size_of(out.dtype()));
  const auto* table = weight.numel() > 0 ? static_cast<const std::byte*>(weight.raw()) : nullptr;
  auto* to = static_cast<std::byte*>(out.raw());
  context.threads().parallel_for(out.dim(0), row_grain(out.dim(1)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = ids[n] - first_row;
      std::byte* const here = to + static_cast<size_t>(n) * row_bytes;
      if (row >= 0 && row < weight.dim(0))
        std::memcpy(here, table + static_cast<size_t>(row) * row_bytes, row_bytes);
      else
        std::memset(here, 0, row_bytes);
    }
  });
}

void embedding_backward(Context& context, const Tensor& tokens, const Tensor& dout, double factor,
                        int64_t first_row, const Tensor& dweight) {
  check_tokens(tokens);
  // Shared by channels: each thread goes through all tokens, so that rows are added in their order.
  constexpr int64_t kLeastColumns = 64;
  const int64_t columns = round_up(ceil_div(dout.dim(1), context.threads().size()), kLeastColumns);
  context.threads().parallel_for(dout.dim(1), columns, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(embedding_backward_columns)
    (tokens, dout, factor, first_row, dweight, Range{begin, end});
  });
}

void add_positions_forward(Context& context, const Tensor& embedded, double factor, const Tensor& positions,
                           int64_t first_row, const Dropout& dropout, const Tensor& out) {
  context.threads().parallel_for(embedded.dim(0), row_grain(embedded.dim(1)),
                                 [&](int64_t begin, int64_t end) {
                                   HWY_DYNAMIC_DISPATCH(add_positions_rows)
                                   (embedded, factor, positions, first_row, dropout, out, Range{begin, end});
                                 });
}

void add_positions_backward(Context& context, const Tensor& dout, int64_t length, int64_t first_row,
                            const Dropout& dropout, const Tensor& dsum, const Tensor& dpositions) {
  const int64_t positions = std::min(length, first_row % length + dout.dim(0));
  context.threads().parallel_for(positions, row_grain(dout.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(add_positions_backward_at)
    (dout, length, first_row, dropout, dsum, dpositions, Range{begin, end});
  });
}

}  // namespace normformer::ops::cpu
#endif
