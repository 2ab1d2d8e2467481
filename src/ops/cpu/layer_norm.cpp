#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/layer_norm.cpp"
#include <algorithm>

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "normformer/tensor/dispatch.h"

#include "ops/cpu/column_sums.h"
#include "ops/cpu/normalise_row-inl.h"
#include "ops/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

void layer_norm_forward_rows(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps,
                             const Tensor& y, const Tensor& mean, const Tensor& rstd, Range rows) {
  const int64_t columns = x.dim(1);
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* row = x.data<T>() + r * columns;
      const A sum =
          sum_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR { return load_ahead(row + c, use); });
      normalise_row<T>(columns, row, sum, gamma.data<T>(), beta.data<T>(), eps, y.data<T>() + r * columns,
                       mean.data<A>() + r, rstd.data<A>() + r);
    }
  });
}

template <class T, class A = Accumulator<T>>
void backward_row(int64_t columns, const T* dy, const T* x, const T* gamma, A mean, A rstd, const T* residual,
                  T* dx, A* dgamma, A* dbeta) {
  const auto mean_lanes = set<A>(mean);
  const auto rstd_lanes = set<A>(rstd);
  auto sum_g = zero<A>();
  auto sum_gx = zero<A>();
  for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
    const auto dy_lanes = load_ahead(dy + c, use);
    const auto normed = hn::Mul(hn::Sub(load_ahead(x + c, use), mean_lanes), rstd_lanes);
    const auto g = hn::Mul(load(gamma + c, use), dy_lanes);
    sum_g = hn::Add(sum_g, g);
    sum_gx = hn::MulAdd(g, normed, sum_gx);
    add_to(dgamma + c, hn::Mul(dy_lanes, normed), use);
    add_to(dbeta + c, dy_lanes, use);
  });
  const auto mean_g = set<A>(sum_lanes<A>(sum_g) / A(columns));
  const auto mean_gx = set<A>(sum_lanes<A>(sum_gx) / A(columns));
  for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
    const auto normed = hn::Mul(hn::Sub(load(x + c, use), mean_lanes), rstd_lanes);
    const auto g = hn::Mul(load(gamma + c, use), load(dy + c, use));
    const auto inner = hn::NegMulAdd(normed, mean_gx, hn::Sub(g, mean_g));
    const auto around = residual == nullptr ? zero<A>() : load_ahead(residual + c, use);
    store(hn::MulAdd(rstd_lanes, inner, around), dx + c, use);
  });
}

void layer_norm_backward_rows(const Tensor& dy, const Tensor& x, const Tensor& gamma, const Tensor& mean,
                              const Tensor& rstd, const Tensor& residual, const Tensor& dx,
                              const Tensor& partials, int64_t block, Range rows) {
  const int64_t columns = x.dim(1);
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    A* dgamma = partials.data<A>() + block * 2 * columns;
    std::fill_n(dgamma, 2 * columns, A{0});
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t at = r * columns;
      backward_row<T>(columns, dy.data<T>() + at, x.data<T>() + at, gamma.data<T>(), mean.data<A>()[r],
                      rstd.data<A>()[r], residual ? residual.data<T>() + at : nullptr, dx.data<T>() + at,
                      dgamma, dgamma + columns);
    }
  });
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(layer_norm_forward_rows);
HWY_EXPORT(layer_norm_backward_rows);

void layer_norm_forward(Context& context, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                        double eps, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  context.threads().parallel_for(x.dim(0), row_grain(x.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(layer_norm_forward_rows)(x, gamma, beta, eps, y, mean, rstd, Range{begin, end});
  });
}

void layer_norm_backward(Context& context, const Tensor& dy, const Tensor& x, const Tensor& gamma,
                         const Tensor& mean, const Tensor& rstd, const Tensor& residual, const Tensor& dx,
                         const Tensor& dgamma, const Tensor& dbeta, const Tensor& partials) {
  for_row_blocks(context, RowBlocks(x.dim(0)), x.dim(0), [&](int64_t block, Range rows) {
    HWY_DYNAMIC_DISPATCH(layer_norm_backward_rows)
    (dy, x, gamma, mean, rstd, residual, dx, partials, block, rows);
  });
  add_blocks(context, partials, 0, dgamma);
  add_blocks(context, partials, x.dim(1), dbeta);
}

}  // namespace normformer::ops::cpu
#endif
