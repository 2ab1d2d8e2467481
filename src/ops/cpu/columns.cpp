#include "normformer/core/checked.h"
#include "normformer/tensor/dispatch.h"

#include "ops/kernels.h"

namespace normformer::ops::cpu {

namespace {

template <class From, class To>
void copy_row(const From* from, To* to, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) to[c] = To(from[c]);
}

}  // namespace

void copy_columns(Context& context, const Tensor& from, int64_t from_column, const Tensor& to,
                  int64_t to_column, int64_t columns) {
  constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread
  const auto copy_rows = [&]<class From, class To>(const From* source, To* target) {
    context.threads().parallel_for(to.dim(0), ceil_div(kGrain, columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        copy_row(source + r * from.dim(1) + from_column, target + r * to.dim(1) + to_column, columns);
      }
    });
  };
  dispatch_floating(to.dtype(), [&]<class T>() {
    if (from.dtype() == to.dtype())
      copy_rows(from.data<T>(), to.data<T>());
    else
      copy_rows(from.data<Accumulator<T>>(), to.data<T>());
  });
}

}  // namespace normformer::ops::cpu
