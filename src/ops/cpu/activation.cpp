#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/activation.cpp"
#include <algorithm>
#include <vector>

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "normformer/tensor/dispatch.h"

#include "ops/cpu/column_sums.h"
#include "ops/cpu/dropout_mask.h"
#include "ops/cpu/lanes-inl.h"
#include "ops/cpu/math-inl.h"
#include "ops/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

template <class V>
struct Point {
  V value;
  V slope;
};

/// tanh |x| = (1 - e) / (1 + e) and its slope 4 e / (1 + e)^2, with e = exp(-2 |x|): to within a few
/// roundings of 1.
HWY_INLINE Point<Lanes<float>> tanh_point(Lanes<float> x) {
  const auto one = set<float>(1.0f);
  const auto e = exp_nonpositive(hn::Mul(set<float>(-2.0f), hn::Abs(x)));
  const auto inverse = hn::Div(one, hn::Add(one, e));
  const auto slope = hn::Mul(hn::Mul(set<float>(4.0f), e), hn::Mul(inverse, inverse));
  return {hn::CopySign(hn::Mul(hn::Sub(one, e), inverse), x), slope};
}

HWY_INLINE Point<Lanes<double>> tanh_point(Lanes<double> x) {
  const auto one = set<double>(1.0);
  const auto value = by_lane(x, [](double v) { return std::tanh(v); });
  return {value, hn::Mul(hn::Sub(one, value), hn::Add(one, value))};
}

/// The activation and its derivative at x.
template <ActivationKind kKind, class A>
HWY_INLINE Point<Lanes<A>> evaluate(Lanes<A> x) {
  if constexpr (kKind == ActivationKind::gelu) {
    const auto n = normal(x);
    const auto density = hn::Mul(n.density, set<A>(A(0.39894228040143267794)));  // / sqrt(2 pi)
    return {hn::Mul(x, n.cumulative), hn::MulAdd(x, density, n.cumulative)};
  } else if constexpr (kKind == ActivationKind::gelu_tanh) {
    // (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)), with the exponential of -2 |u| so that it cannot overflow.
    const auto two_scale = set<A>(A(1.5957691216057307118));  // 2 sqrt(2 / pi)
    const auto cubic = set<A>(A(0.044715));
    const auto one = set<A>(A(1));
    const auto square = hn::Mul(x, x);
    const auto two_u = hn::Mul(hn::Mul(two_scale, x), hn::MulAdd(cubic, square, one));
    const auto e = exp_nonpositive(hn::Neg(hn::Abs(two_u)));
    const auto inverse = hn::Div(one, hn::Add(one, e));
    const auto gate = hn::Mul(hn::IfThenElse(hn::Lt(two_u, zero<A>()), e, one), inverse);
    const auto gate_slope = hn::Mul(e, hn::Mul(inverse, inverse));
    const auto two_u_slope = hn::Mul(two_scale, hn::MulAdd(hn::Mul(cubic, set<A>(A(3))), square, one));
    return {hn::Mul(x, gate), hn::MulAdd(hn::Mul(x, gate_slope), two_u_slope, gate)};
  } else if constexpr (kKind == ActivationKind::tanh) {
    return tanh_point(x);
  } else {
    const auto positive = hn::IfThenElse(hn::Lt(x, zero<A>()), zero<A>(), x);  // a NaN stays one
    return {hn::Mul(positive, positive), hn::Add(positive, positive)};
  }
}

/// One row forward; multipliers null: nothing dropped, gamma null: none.
template <ActivationKind kKind, class T, class A = Accumulator<T>>
void forward_row(int64_t columns, const T* z, const T* bias, const A* multipliers, const T* gamma, T* out,
                 A* sums) {
  auto sum = zero<A>();
  auto squares = zero<A>();
  for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
    auto h = evaluate<kKind, A>(hn::Add(load_ahead(z + c, use), load(bias + c, use))).value;
    if (multipliers != nullptr) h = hn::Mul(h, load(multipliers + c, use));
    const auto used = only_used(h, use);
    sum = hn::Add(sum, used);
    squares = hn::MulAdd(used, used, squares);
    if (gamma != nullptr) h = hn::Mul(h, load(gamma + c, use));
    store(h, out + c, use);
  });
  if (sums != nullptr) {
    sums[0] = sum_lanes<A>(sum);
    sums[1] = sum_lanes<A>(squares);
  }
}

template <ActivationKind kKind, class T>
void forward_rows(const Tensor& z, const Tensor& bias, const Dropout& dropout, const Tensor& gamma,
                  const Tensor& out, const Tensor& sums, Range rows) {
  using A = Accumulator<T>;
  const int64_t columns = z.dim(1);
  std::vector<A> multipliers(static_cast<size_t>(dropout.active() ? columns : 0));
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    if (dropout.active()) dropout_row(dropout, r, columns, multipliers.data());
    forward_row<kKind, T>(columns, z.data<T>() + r * columns, bias.data<T>(),
                          dropout.active() ? multipliers.data() : nullptr, gamma ? gamma.data<T>() : nullptr,
                          out.data<T>() + r * columns, sums ? sums.data<A>() + 2 * r : nullptr);
  }
}

void activation_forward_rows(ActivationKind kind, const Tensor& z, const Tensor& bias, const Dropout& dropout,
                             const Tensor& gamma, const Tensor& out, const Tensor& sums, Range rows) {
  dispatch_floating(z.dtype(), [&]<class T>() {
    switch (kind) {
      case ActivationKind::gelu:
        return forward_rows<ActivationKind::gelu, T>(z, bias, dropout, gamma, out, sums, rows);
      case ActivationKind::gelu_tanh:
        return forward_rows<ActivationKind::gelu_tanh, T>(z, bias, dropout, gamma, out, sums, rows);
      case ActivationKind::relu_squared:
        return forward_rows<ActivationKind::relu_squared, T>(z, bias, dropout, gamma, out, sums, rows);
      case ActivationKind::tanh:
        return forward_rows<ActivationKind::tanh, T>(z, bias, dropout, gamma, out, sums, rows);
    }
  });
}

/// What one row's backward needs of a norm.
template <class A>
struct RowNorm {
  A mean;
  A rstd;
  A mean_g;
  A mean_gx;
};

template <ActivationKind kKind, class T, class A = Accumulator<T>>
void backward_row(int64_t columns, const T* d, const T* z, const T* bias, const A* multipliers, T* dz,
                  A* dbias) {
  for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
    const auto point = evaluate<kKind, A>(hn::Add(load_ahead(z + c, use), load(bias + c, use)));
    auto gradient = hn::Mul(load_ahead(d + c, use), point.slope);
    if (multipliers != nullptr) gradient = hn::Mul(gradient, load(multipliers + c, use));
    add_to(dbias + c, gradient, use);
    store(gradient, dz + c, use);
  });
}

template <ActivationKind kKind, class T, class A = Accumulator<T>>
void backward_row_of_norm(int64_t columns, const T* d, const T* z, const T* bias, const A* multipliers,
                          const T* gamma, const RowNorm<A>& norm, T* dz, A* dbias, A* dgamma, A* dbeta) {
  const auto mean = set<A>(norm.mean);
  const auto rstd = set<A>(norm.rstd);
  const auto mean_g = set<A>(norm.mean_g);
  const auto mean_gx = set<A>(norm.mean_gx);
  for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
    const auto point = evaluate<kKind, A>(hn::Add(load_ahead(z + c, use), load(bias + c, use)));
    const auto multiplier = multipliers == nullptr ? set<A>(A(1)) : load(multipliers + c, use);
    const auto normed = hn::Mul(rstd, hn::Sub(hn::Mul(point.value, multiplier), mean));
    const auto d_lanes = load_ahead(d + c, use);
    const auto g = hn::Mul(load(gamma + c, use), d_lanes);
    const auto dh = hn::Mul(rstd, hn::NegMulAdd(normed, mean_gx, hn::Sub(g, mean_g)));
    const auto gradient = hn::Mul(hn::Mul(dh, multiplier), point.slope);
    add_to(dgamma + c, hn::Mul(d_lanes, normed), use);
    add_to(dbeta + c, d_lanes, use);
    add_to(dbias + c, gradient, use);
    store(gradient, dz + c, use);
  });
}

template <ActivationKind kKind, class T>
void backward_rows(const Tensor& d, const Tensor& z, const Tensor& bias, const Dropout& dropout,
                   const NormOfActivation* norm, const Tensor& dz, const Tensor& partials, int64_t block,
                   Range rows) {
  using A = Accumulator<T>;
  const int64_t columns = z.dim(1);
  A* sums = partials.data<A>() + block * partials.dim(1);
  std::fill_n(sums, partials.dim(1), A{0});
  std::vector<A> drawn(static_cast<size_t>(dropout.active() ? columns : 0));
  const A* multipliers = dropout.active() ? drawn.data() : nullptr;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    if (dropout.active()) dropout_row(dropout, r, columns, drawn.data());
    const T* d_row = d.data<T>() + r * columns;
    const T* z_row = z.data<T>() + r * columns;
    T* dz_row = dz.data<T>() + r * columns;
    if (norm == nullptr) {
      backward_row<kKind, T>(columns, d_row, z_row, bias.data<T>(), multipliers, dz_row, sums);
    } else {
      const RowNorm<A> row_norm{norm->mean.data<A>()[r], norm->rstd.data<A>()[r], norm->mean_g.data<A>()[r],
                                norm->mean_gx.data<A>()[r]};
      backward_row_of_norm<kKind, T>(columns, d_row, z_row, bias.data<T>(), multipliers,
                                     norm->gamma.data<T>(), row_norm, dz_row, sums, sums + columns,
                                     sums + 2 * columns);
    }
  }
}

void activation_backward_rows(ActivationKind kind, const Tensor& d, const Tensor& z, const Tensor& bias,
                              const Dropout& dropout, const NormOfActivation* norm, const Tensor& dz,
                              const Tensor& partials, int64_t block, Range rows) {
  dispatch_floating(z.dtype(), [&]<class T>() {
    switch (kind) {
      case ActivationKind::gelu:
        return backward_rows<ActivationKind::gelu, T>(d, z, bias, dropout, norm, dz, partials, block, rows);
      case ActivationKind::gelu_tanh:
        return backward_rows<ActivationKind::gelu_tanh, T>(d, z, bias, dropout, norm, dz, partials, block,
                                                           rows);
      case ActivationKind::relu_squared:
        return backward_rows<ActivationKind::relu_squared, T>(d, z, bias, dropout, norm, dz, partials, block,
                                                              rows);
      case ActivationKind::tanh:
        return backward_rows<ActivationKind::tanh, T>(d, z, bias, dropout, norm, dz, partials, block, rows);
    }
  });
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(activation_forward_rows);
HWY_EXPORT(activation_backward_rows);

void activation_forward(Context& context, ActivationKind kind, const Tensor& z, const Tensor& bias,
                        const Dropout& dropout, const Tensor& gamma, const Tensor& out, const Tensor& sums) {
  context.threads().parallel_for(z.dim(0), row_grain(z.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(activation_forward_rows)
    (kind, z, bias, dropout, gamma, out, sums, Range{begin, end});
  });
}

void activation_backward(Context& context, ActivationKind kind, const Tensor& d, const Tensor& z,
                         const Tensor& bias, const Dropout& dropout, const NormOfActivation* norm,
                         const Tensor& dz, const Tensor& dbias, const Tensor& partials) {
  for_row_blocks(context, RowBlocks(z.dim(0)), z.dim(0), [&](int64_t block, Range rows) {
    HWY_DYNAMIC_DISPATCH(activation_backward_rows)
    (kind, d, z, bias, dropout, norm, dz, partials, block, rows);
  });
  add_blocks(context, partials, 0, dbias);
  if (norm == nullptr) return;
  add_blocks(context, partials, z.dim(1), norm->dgamma);
  add_blocks(context, partials, 2 * z.dim(1), norm->dbeta);
}

}  // namespace normformer::ops::cpu
#endif
