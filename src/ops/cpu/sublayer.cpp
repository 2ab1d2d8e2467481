#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/sublayer.cpp"
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "normformer/tensor/dispatch.h"

#include "ops/cpu/column_sums.h"
#include "ops/cpu/dropout_mask.h"
#include "ops/cpu/lanes-inl.h"
#include "ops/cpu/normalise_row-inl.h"
#include "ops/cpu/per_channel.h"
#include "ops/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

/// SublayerOutput's vectors of length D; null where a part is absent.
template <class T, class A = Accumulator<T>>
struct Vectors {
  const T* bias;
  const A* head_scale;  // repeated over channels
  const T* gamma;
  const T* beta;
  const T* residual_scale;
};

template <class T, class A = Accumulator<T>>
Vectors<T> vectors_of(const SublayerOutput& parts, const std::vector<A>& head_scale) {
  const auto pointer = [](const Tensor& t) { return t ? t.data<T>() : nullptr; };
  return {pointer(parts.bias), head_scale.empty() ? nullptr : head_scale.data(), pointer(parts.norm_gamma),
          pointer(parts.norm_beta), pointer(parts.residual_scale)};
}

/// branch + bias: what the head scale multiplies.
template <class T, class Use>
HWY_INLINE auto biased(const T* branch, const T* bias, int64_t c, Use use) {
  const auto x = load_ahead(branch + c, use);
  return bias == nullptr ? x : hn::Add(x, load(bias + c, use));
}

/// head_scale * (branch + bias): what is normalised.
template <class T, class A, class Use>
HWY_INLINE auto scaled(const T* branch, const Vectors<T, A>& v, int64_t c, Use use) {
  const auto x = biased(branch, v.bias, c, use);
  return v.head_scale == nullptr ? x : hn::Mul(x, load(v.head_scale + c, use));
}

/// One row forward; returns the sum of what it writes where that is wanted. `row` [D] holds what is
/// normalised, so that it is computed once.
template <class T, class A>
A forward_row(int64_t columns, const T* branch, const T* residual, const Vectors<T, A>& v, double eps,
              const A* multipliers, T* out, A* mean, A* rstd, A* row, bool wants_sum) {
  if (v.gamma != nullptr) {
    const A m = sum_columns<A>(columns,
                               [&](int64_t c, auto use) HWY_ATTR {
                                 const auto t = scaled(branch, v, c, use);
                                 store(t, row + c, use);
                                 return t;
                               }) /
                A(columns);
    const auto mean_lanes = set<A>(m);
    const A squares = sum_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
      const auto centred = only_used(hn::Sub(load(row + c, use), mean_lanes), use);
      return hn::Mul(centred, centred);
    });
    *mean = m;
    *rstd = A(1) / std::sqrt(squares / A(columns) + A(eps));
  }
  const auto mean_lanes = set<A>(v.gamma != nullptr ? *mean : A(0));
  const auto rstd_lanes = set<A>(v.gamma != nullptr ? *rstd : A(0));
  const auto write = [&](int64_t c, auto use) HWY_ATTR {
    auto added = zero<A>();
    if (v.gamma != nullptr) {
      const auto normed = hn::Mul(hn::Sub(load(row + c, use), mean_lanes), rstd_lanes);
      added = hn::MulAdd(load(v.gamma + c, use), normed, load(v.beta + c, use));
    } else {
      added = scaled(branch, v, c, use);
    }
    if (multipliers != nullptr) added = hn::Mul(added, load(multipliers + c, use));
    auto around = load_ahead(residual + c, use);
    if (v.residual_scale != nullptr) around = hn::Mul(around, load(v.residual_scale + c, use));
    const auto sum = hn::Add(around, added);
    store(sum, out + c, use);
    return only_used(rounded_to<T>(sum), use);
  };
  if (wants_sum) return sum_columns<A>(columns, write);
  for_columns<A>(columns, write);
  return A(0);
}

void sublayer_forward_rows(const SublayerOutput& parts, const Tensor& branch, const Tensor& residual,
                           const Tensor& out, const Tensor& mean, const Tensor& rstd, const NextNorm& next,
                           Range rows) {
  const int64_t columns = branch.dim(1);
  dispatch_floating(branch.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const auto head_scale = scales_by_channel<T>(parts.head_scale, columns);
    const auto vectors = vectors_of<T>(parts, head_scale);
    const bool norm = parts.norm_gamma.defined();
    std::vector<A> row(static_cast<size_t>(norm ? columns : 0));
    std::vector<A> multipliers(static_cast<size_t>(parts.dropout.active() ? columns : 0));
    // As many rows at a time as stay in the cache: row by row, the streams from and to memory would take
    // turns every few KB.
    constexpr int64_t kBytesTogether = 256 * 1024;
    const auto together = std::max<int64_t>(1, kBytesTogether / (columns * int64_t{sizeof(T)}));
    std::vector<A> sums(static_cast<size_t>(std::min(together, rows.size())));
    for (int64_t first = rows.begin; first < rows.end; first += together) {
      const int64_t end = std::min(rows.end, first + together);
      for (int64_t r = first; r < end; ++r) {
        const int64_t at = r * columns;
        if (parts.dropout.active()) dropout_row(parts.dropout, r, columns, multipliers.data());
        sums[static_cast<size_t>(r - first)] =
            forward_row<T, A>(columns, branch.data<T>() + at, residual.data<T>() + at, vectors,
                              parts.norm_eps, parts.dropout.active() ? multipliers.data() : nullptr,
                              out.data<T>() + at, norm ? mean.data<A>() + r : nullptr,
                              norm ? rstd.data<A>() + r : nullptr, row.data(), next.gamma.defined());
      }
      if (!next.gamma) continue;
      for (int64_t r = first; r < end; ++r) {
        const int64_t at = r * columns;
        normalise_row<T>(columns, out.data<T>() + at, sums[static_cast<size_t>(r - first)],
                         next.gamma.data<T>(), next.beta.data<T>(), next.eps, next.y.data<T>() + at,
                         next.mean.data<A>() + r, next.rstd.data<A>() + r);
      }
    }
  });
}

/// Sums over a block's rows of the gradients of parameters; null where a part is absent.
template <class A>
struct Sums {
  A* bias = nullptr;
  A* head_scale = nullptr;
  A* gamma = nullptr;
  A* beta = nullptr;
  A* residual_scale = nullptr;
};

/// One row's tensors in the backward pass; null where a tensor is absent.
template <class T>
struct BackwardRow {
  const T* dout;
  const T* branch;
  const T* residual;
  T* dbranch;
  T* dresidual;
};

/// The gradient of what was dropped: dout * multipliers.
template <class T, class A, class Use>
HWY_INLINE auto undropped(const T* dout, const A* multipliers, int64_t c, Use use) {
  const auto d = load_ahead(dout + c, use);
  return multipliers == nullptr ? d : hn::Mul(d, load(multipliers + c, use));
}

template <class T, class A>
void backward_row(int64_t columns, const BackwardRow<T>& row, const Vectors<T, A>& v, const A* multipliers,
                  A mean, A rstd, const Sums<A>& sums) {
  const auto mean_lanes = set<A>(mean);
  const auto rstd_lanes = set<A>(rstd);
  auto sum_g = zero<A>();
  auto sum_gx = zero<A>();
  if (v.gamma != nullptr) {
    for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
      const auto d = undropped(row.dout, multipliers, c, use);
      const auto normed = hn::Mul(hn::Sub(scaled(row.branch, v, c, use), mean_lanes), rstd_lanes);
      const auto g = hn::Mul(load(v.gamma + c, use), d);
      sum_g = hn::Add(sum_g, g);
      sum_gx = hn::MulAdd(g, normed, sum_gx);
      add_to(sums.gamma + c, hn::Mul(d, normed), use);
      add_to(sums.beta + c, d, use);
    });
  }
  const auto mean_g = set<A>(sum_lanes<A>(sum_g) / A(columns));
  const auto mean_gx = set<A>(sum_lanes<A>(sum_gx) / A(columns));
  for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
    const auto dout = load_ahead(row.dout + c, use);
    auto d = undropped(row.dout, multipliers, c, use);
    if (v.gamma != nullptr) {
      const auto normed = hn::Mul(hn::Sub(scaled(row.branch, v, c, use), mean_lanes), rstd_lanes);
      const auto g = hn::Mul(load(v.gamma + c, use), d);
      d = hn::Mul(rstd_lanes, hn::NegMulAdd(normed, mean_gx, hn::Sub(g, mean_g)));
    }
    if (v.head_scale != nullptr) {
      add_to(sums.head_scale + c, hn::Mul(d, biased(row.branch, v.bias, c, use)), use);
      d = hn::Mul(d, load(v.head_scale + c, use));
    }
    if (v.bias != nullptr) add_to(sums.bias + c, d, use);
    auto around = dout;
    if (v.residual_scale != nullptr) {
      add_to(sums.residual_scale + c, hn::Mul(dout, load_ahead(row.residual + c, use)), use);
      around = hn::Mul(dout, load(v.residual_scale + c, use));
    }
    if (row.dresidual != nullptr) store(around, row.dresidual + c, use);
    store(d, row.dbranch + c, use);
  });
}

/// Where a block's sums stand in its row of partials: in the order of SublayerOutputGradients.
template <class A>
Sums<A> sums_of(const SublayerOutput& parts, A* partials, int64_t columns) {
  const auto next = [&](const Tensor& parameter) -> A* {
    if (!parameter) return nullptr;
    A* const here = partials;
    partials += columns;
    std::fill_n(here, columns, A{0});
    return here;
  };
  Sums<A> sums;
  sums.bias = next(parts.bias);
  sums.head_scale = next(parts.head_scale);
  sums.gamma = next(parts.norm_gamma);
  sums.beta = next(parts.norm_beta);
  sums.residual_scale = next(parts.residual_scale);
  return sums;
}

void sublayer_backward_rows(const SublayerOutput& parts, const Tensor& dout, const Tensor& branch,
                            const Tensor& residual, const Tensor& mean, const Tensor& rstd,
                            const Tensor& dbranch, const Tensor& dresidual, const Tensor& partials,
                            int64_t block, Range rows) {
  const int64_t columns = dout.dim(1);
  dispatch_floating(dout.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const auto head_scale = scales_by_channel<T>(parts.head_scale, columns);
    const auto vectors = vectors_of<T>(parts, head_scale);
    const bool norm = parts.norm_gamma.defined();
    const Sums<A> sums =
        sums_of<A>(parts, partials ? partials.data<A>() + block * partials.dim(1) : nullptr, columns);
    std::vector<A> multipliers(static_cast<size_t>(parts.dropout.active() ? columns : 0));
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t at = r * columns;
      if (parts.dropout.active()) dropout_row(parts.dropout, r, columns, multipliers.data());
      const BackwardRow<T> row{dout.data<T>() + at,
                               norm || parts.head_scale ? branch.data<T>() + at : nullptr,
                               parts.residual_scale ? residual.data<T>() + at : nullptr,
                               dbranch.data<T>() + at, dresidual ? dresidual.data<T>() + at : nullptr};
      backward_row<T, A>(columns, row, vectors, parts.dropout.active() ? multipliers.data() : nullptr,
                         norm ? mean.data<A>()[r] : A(0), norm ? rstd.data<A>()[r] : A(0), sums);
    }
  });
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(sublayer_forward_rows);
HWY_EXPORT(sublayer_backward_rows);

void sublayer_output_forward(Context& context, const SublayerOutput& parts, const Tensor& branch,
                             const Tensor& residual, const Tensor& out, const Tensor& mean,
                             const Tensor& rstd, const NextNorm& next) {
  context.threads().parallel_for(branch.dim(0), row_grain(branch.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(sublayer_forward_rows)
    (parts, branch, residual, out, mean, rstd, next, Range{begin, end});
  });
}

void sublayer_output_backward(Context& context, const SublayerOutput& parts, const Tensor& dout,
                              const Tensor& branch, const Tensor& residual, const Tensor& mean,
                              const Tensor& rstd, const Tensor& dbranch, const Tensor& dresidual,
                              const SublayerOutputGradients& gradients, const Tensor& partials) {
  for_row_blocks(context, RowBlocks(dout.dim(0)), dout.dim(0), [&](int64_t block, Range rows) {
    HWY_DYNAMIC_DISPATCH(sublayer_backward_rows)
    (parts, dout, branch, residual, mean, rstd, dbranch, dresidual, partials, block, rows);
  });
  const int64_t columns = dout.dim(1);
  int64_t at = 0;
  const auto next = [&] { return std::exchange(at, at + columns); };
  if (parts.bias) add_blocks(context, partials, next(), gradients.bias);
  if (parts.head_scale) add_blocks_by_group(context, partials, next(), columns, gradients.head_scale);
  if (parts.norm_gamma) add_blocks(context, partials, next(), gradients.norm_gamma);
  if (parts.norm_beta) add_blocks(context, partials, next(), gradients.norm_beta);
  if (parts.residual_scale) add_blocks(context, partials, next(), gradients.residual_scale);
}

}  // namespace normformer::ops::cpu
#endif
