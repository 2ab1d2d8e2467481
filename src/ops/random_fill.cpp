#include "normformer/ops/random_fill.h"

#include <cmath>
#include <numbers>

#include "normformer/tensor/dispatch.h"

#include "ops/checks.h"
#include "ops/row_blocks.h"

namespace normformer::ops {

namespace {

/// Sets element (r, c) of `part` to draw(its index in the logical matrix), rounded once.
template <class Draw>
void fill_by_index(Context& context, std::string_view operation, const Tensor& tensor, const Rectangle& part,
                   Draw&& draw) {
  NF_CHECK(tensor.defined(), "{}: the tensor is undefined", operation);
  Arguments arguments(context, operation, tensor.dtype());
  arguments.model("the tensor", tensor, tensor.shape());
  const Range whole_rows{0, part.global_rows};
  const Range whole_columns{0, part.global_columns};
  NF_CHECK(tensor.numel() == part.numel() && intersect(part.rows, whole_rows) == part.rows &&
               intersect(part.columns, whole_columns) == part.columns,
           "{}: {} for rows {}..{} and columns {}..{} of {} x {}", operation, to_string(tensor),
           part.rows.begin, part.rows.end, part.columns.begin, part.columns.end, part.global_rows,
           part.global_columns);
  context.costs().record(operation, 0, arguments.bytes());
  if (context.is_meta() || tensor.numel() == 0) return;
  const int64_t columns = part.columns.size();
  dispatch_floating(tensor.dtype(), [&]<class T>() {
    T* values = tensor.data<T>();
    context.threads().parallel_for(part.rows.size(), row_grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t index = (part.rows.begin + r) * part.global_columns + part.columns.begin;
        for (int64_t c = 0; c < columns; ++c) {
          const double value = draw(static_cast<uint64_t>(index + c));
          values[r * columns + c] = T(static_cast<Accumulator<T>>(value));
        }
      }
    });
  });
}

}  // namespace

void fill_normal(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                 double std) {
  fill_by_index(context, "fill_normal", tensor, part, [&](uint64_t index) {
    const auto words = stream.words(index / 2);
    const size_t first = 2 * (index % 2);
    const double radius = std::sqrt(-2.0 * std::log(to_unit_open(words[first])));
    return std * radius * std::cos(2.0 * std::numbers::pi * to_unit_open(words[first + 1]));
  });
}

void fill_uniform(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                  double bound) {
  fill_by_index(context, "fill_uniform", tensor, part, [&](uint64_t index) {
    return bound * (2.0 * to_unit_open(stream.words(index / 4)[index % 4]) - 1.0);
  });
}

void fill_constant(Context& context, const Tensor& tensor, double value) {
  NF_CHECK(tensor.defined(), "fill_constant: the tensor is undefined");
  const Rectangle whole{{0, tensor.numel()}, {0, 1}, tensor.numel(), 1};
  fill_by_index(context, "fill_constant", tensor, whole, [&](uint64_t) { return value; });
}

}  // namespace normformer::ops
