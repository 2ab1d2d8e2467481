#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/head_scale.cpp"
#include <algorithm>

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "normformer/tensor/dispatch.h"

#include "ops/cpu/column_sums.h"
#include "ops/cpu/lanes-inl.h"
#include "ops/cpu/per_channel.h"
#include "ops/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

void head_scale_forward_rows(const Tensor& x, const Tensor& scales, const Tensor& y, Range rows) {
  const int64_t columns = x.dim(1);
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const auto factors = scales_by_channel<T>(scales, columns);
    const A* factor = factors.data();
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* in = x.data<T>() + r * columns;
      T* out = y.data<T>() + r * columns;
      for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
        store(hn::Mul(load_ahead(in + c, use), load(factor + c, use)), out + c, use);
      });
    }
  });
}

void head_scale_backward_rows(const Tensor& dy, const Tensor& x, const Tensor& scales, const Tensor& dx,
                              const Tensor& partials, int64_t block, Range rows) {
  const int64_t columns = x.dim(1);
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const auto factors = scales_by_channel<T>(scales, columns);
    const A* factor = factors.data();
    A* sums = partials.data<A>() + block * columns;
    std::fill_n(sums, columns, A{0});
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* gradient = dy.data<T>() + r * columns;
      const T* in = x.data<T>() + r * columns;
      T* out = dx.data<T>() + r * columns;
      for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
        const auto d = load_ahead(gradient + c, use);
        store(hn::MulAdd(d, load_ahead(in + c, use), load(sums + c, use)), sums + c, use);
        store(hn::Mul(d, load(factor + c, use)), out + c, use);
      });
    }
  });
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(head_scale_forward_rows);
HWY_EXPORT(head_scale_backward_rows);

void head_scale_forward(Context& context, const Tensor& x, const Tensor& scales, const Tensor& y) {
  context.threads().parallel_for(x.dim(0), row_grain(x.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(head_scale_forward_rows)(x, scales, y, Range{begin, end});
  });
}

void head_scale_backward(Context& context, const Tensor& dy, const Tensor& x, const Tensor& scales,
                         const Tensor& dx, const Tensor& dscales, const Tensor& partials) {
  for_row_blocks(context, RowBlocks(x.dim(0)), x.dim(0), [&](int64_t block, Range rows) {
    HWY_DYNAMIC_DISPATCH(head_scale_backward_rows)(dy, x, scales, dx, partials, block, rows);
  });
  add_blocks_by_group(context, partials, 0, x.dim(1), dscales);
}

}  // namespace normformer::ops::cpu
#endif
