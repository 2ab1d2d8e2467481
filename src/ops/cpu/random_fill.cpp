#include "normformer/ops/random_fill.h"

#include "normformer/tensor/dispatch.h"

#include "ops/kernels.h"
#include "ops/random_draws.h"

namespace normformer::ops::cpu {

namespace {

/// Sets element (r, c) of `part` to draw(its index in the logical matrix), rounded once.
template <class Draw>
void fill_by_index(Context& context, const Tensor& tensor, const Rectangle& part, Draw&& draw) {
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
  fill_by_index(context, tensor, part, [&](uint64_t index) { return normal_draw(stream, index, std); });
}

void fill_uniform(Context& context, const Tensor& tensor, const Rectangle& part, RandomStream stream,
                  double bound) {
  fill_by_index(context, tensor, part, [&](uint64_t index) { return uniform_draw(stream, index, bound); });
}

void fill_constant(Context& context, const Tensor& tensor, double value) {
  const Rectangle whole{{0, tensor.numel()}, {0, 1}, tensor.numel(), 1};
  fill_by_index(context, tensor, whole, [&](uint64_t) { return value; });
}

}  // namespace normformer::ops::cpu
