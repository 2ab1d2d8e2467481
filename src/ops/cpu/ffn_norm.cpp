#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/ffn_norm.cpp"
#include <algorithm>
#include <cmath>

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "normformer/tensor/dispatch.h"

#include "ops/cpu/column_sums.h"
#include "ops/cpu/lanes-inl.h"
#include "ops/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

template <class T, class A = Accumulator<T>>
A dot(int64_t n, const T* a, const T* b) {
  return sum_columns<A>(
      n, [&](int64_t c, auto use) HWY_ATTR { return hn::Mul(load(a + c, use), load(b + c, use)); });
}

void fold_weights_rows(const Tensor& w2, const Tensor& gamma, const Tensor& beta, const Tensor& c,
                       const Tensor& w_beta, Range rows) {
  const int64_t columns = w2.dim(1);
  dispatch_floating(w2.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* row = w2.data<T>() + r * columns;
      c.data<A>()[r] = dot(columns, row, gamma.data<T>());
      w_beta.data<A>()[r] = dot(columns, row, beta.data<T>());
    }
  });
}

template <class T, class A = Accumulator<T>>
void unfold_row(int64_t columns, const T* z, A mean, A rstd, const A* c, const A* w_beta, const T* b2, T* y) {
  const auto scale = set<A>(rstd);
  const auto shift = set<A>(rstd * mean);
  for_columns<A>(columns, [&](int64_t i, auto use) HWY_ATTR {
    const auto e = hn::Add(load(w_beta + i, use), load(b2 + i, use));
    const auto rest = hn::NegMulAdd(shift, load(c + i, use), e);
    store(hn::MulAdd(scale, load_ahead(z + i, use), rest), y + i, use);
  });
}

void unfold_rows(const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& c,
                 const Tensor& w_beta, const Tensor& b2, const Tensor& y, Range rows) {
  const int64_t columns = z.dim(1);
  dispatch_floating(z.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      unfold_row<T>(columns, z.data<T>() + r * columns, mean.data<A>()[r], rstd.data<A>()[r], c.data<A>(),
                    w_beta.data<A>(), b2.data<T>(), y.data<T>() + r * columns);
    }
  });
}

/// The vectors of length D that fold_norm_backward reads in every row.
template <class T, class A = Accumulator<T>>
struct FoldVectors {
  const A* c;
  const A* w_beta;
  const T* b2;
};

/// Means of the row where kMeans, dy_scaled and sums over rows where kSums; what is not wanted may be null.
template <bool kMeans, bool kSums, class T, class A = Accumulator<T>>
void fold_backward_row(int64_t columns, const T* dy, const T* y, A mean, A rstd, const FoldVectors<T>& fold,
                       A features, A* mean_g, A* mean_gx, T* dy_scaled, A* u, A* s) {
  const auto scale = set<A>(rstd);
  const auto shift = set<A>(rstd * mean);
  auto sum_g = zero<A>();
  auto sum_gx = zero<A>();
  for_columns<A>(columns, [&](int64_t i, auto use) HWY_ATTR {
    const auto d = load_ahead(dy + i, use);
    if constexpr (kMeans) {
      const auto e = hn::Add(load(fold.w_beta + i, use), load(fold.b2 + i, use));
      sum_g = hn::MulAdd(d, load(fold.c + i, use), sum_g);
      sum_gx = hn::MulAdd(d, hn::Sub(load_ahead(y + i, use), e), sum_gx);
    }
    if constexpr (kSums) {
      store(hn::MulAdd(shift, d, load(u + i, use)), u + i, use);
      add_to(s + i, d, use);
      store(hn::Mul(scale, d), dy_scaled + i, use);
    }
  });
  if constexpr (kMeans) {
    *mean_g = sum_lanes<A>(sum_g) / features;
    *mean_gx = sum_lanes<A>(sum_gx) / features;
  }
}

void fold_backward_rows(const Tensor& dy, const Tensor& y, const Tensor& mean, const Tensor& rstd,
                        const Tensor& c, const Tensor& w_beta, const Tensor& b2, int64_t features,
                        const Tensor& mean_g, const Tensor& mean_gx, const Tensor& dy_scaled,
                        const Tensor& partials, int64_t block, Range rows) {
  const int64_t columns = dy.dim(1);
  dispatch_floating(dy.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const FoldVectors<T> fold{c.data<A>(), w_beta.data<A>(), b2.data<T>()};
    const auto run = [&]<bool kMeans, bool kSums>() {
      A* u = kSums ? partials.data<A>() + block * 2 * columns : nullptr;
      if (kSums) std::fill_n(u, 2 * columns, A{0});
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const int64_t at = r * columns;
        fold_backward_row<kMeans, kSums, T>(
            columns, dy.data<T>() + at, kMeans ? y.data<T>() + at : nullptr, mean.data<A>()[r],
            rstd.data<A>()[r], fold, A(features), kMeans ? mean_g.data<A>() + r : nullptr,
            kMeans ? mean_gx.data<A>() + r : nullptr, kSums ? dy_scaled.data<T>() + at : nullptr, u,
            kSums ? u + columns : nullptr);
      }
    };
    if (!partials)
      run.template operator()<true, false>();
    else if (!y)
      run.template operator()<false, true>();
    else
      run.template operator()<true, true>();
  });
}

void fold_correction_rows(const Tensor& u, const Tensor& gamma, const Tensor& s, const Tensor& beta,
                          const Tensor& dw, Range rows) {
  const int64_t columns = dw.dim(1);
  dispatch_floating(gamma.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* gammas = gamma.data<T>();
    const T* betas = beta.data<T>();
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      A* row = dw.data<A>() + r * columns;
      const auto u_lanes = set<A>(u.data<A>()[r]);
      const auto s_lanes = set<A>(s.data<A>()[r]);
      for_columns<A>(columns, [&](int64_t i, auto use) HWY_ATTR {
        const auto correction = hn::NegMulAdd(u_lanes, load(gammas + i, use), load_ahead(row + i, use));
        store(hn::MulAdd(s_lanes, load(betas + i, use), correction), row + i, use);
      });
    }
  });
}

template <class T, class A = Accumulator<T>>
void normalise_row(int64_t columns, const T* h, A mean, A rstd, const T* gamma, const T* beta, T* out) {
  const auto mean_lanes = set<A>(mean);
  const auto rstd_lanes = set<A>(rstd);
  for_columns<A>(columns, [&](int64_t i, auto use) HWY_ATTR {
    const auto normed = hn::Mul(rstd_lanes, hn::Sub(load_ahead(h + i, use), mean_lanes));
    store(hn::MulAdd(load(gamma + i, use), normed, load(beta + i, use)), out + i, use);
  });
}

void normalise_rows(const Tensor& h, const Tensor& mean, const Tensor& rstd, const Tensor& gamma,
                    const Tensor& beta, const Tensor& out, Range rows) {
  const int64_t columns = h.dim(1);
  dispatch_floating(h.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      normalise_row<T>(columns, h.data<T>() + r * columns, mean.data<A>()[r], rstd.data<A>()[r],
                       gamma.data<T>(), beta.data<T>(), out.data<T>() + r * columns);
    }
  });
}

template <class T, class A = Accumulator<T>>
void backward_sums_row(int64_t columns, const T* d, const T* h, A mean, A rstd, const T* gamma, A* sums) {
  const auto mean_lanes = set<A>(mean);
  const auto rstd_lanes = set<A>(rstd);
  auto sum_g = zero<A>();
  auto sum_gx = zero<A>();
  for_columns<A>(columns, [&](int64_t i, auto use) HWY_ATTR {
    const auto g = hn::Mul(load(gamma + i, use), load_ahead(d + i, use));
    sum_g = hn::Add(sum_g, g);
    sum_gx = hn::MulAdd(g, hn::Mul(rstd_lanes, hn::Sub(load_ahead(h + i, use), mean_lanes)), sum_gx);
  });
  sums[0] = sum_lanes<A>(sum_g);
  sums[1] = sum_lanes<A>(sum_gx);
}

void normalise_backward_sums_rows(const Tensor& d, const Tensor& h, const Tensor& mean, const Tensor& rstd,
                                  const Tensor& gamma, const Tensor& sums, Range rows) {
  const int64_t columns = d.dim(1);
  dispatch_floating(d.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      backward_sums_row<T>(columns, d.data<T>() + r * columns, h.data<T>() + r * columns, mean.data<A>()[r],
                           rstd.data<A>()[r], gamma.data<T>(), sums.data<A>() + 2 * r);
    }
  });
}

void feature_sums_rows(const Tensor& h, const Tensor& sums, Range rows) {
  const int64_t columns = h.dim(1);
  dispatch_floating(h.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* row = h.data<T>() + r * columns;
      auto sum = zero<A>();
      auto squares = zero<A>();
      for_columns<A>(columns, [&](int64_t i, auto use) HWY_ATTR {
        const auto value = load_ahead(row + i, use);
        sum = hn::Add(sum, value);
        squares = hn::MulAdd(value, value, squares);
      });
      sums.data<A>()[2 * r] = sum_lanes<A>(sum);
      sums.data<A>()[2 * r + 1] = sum_lanes<A>(squares);
    }
  });
}

template <class T, class A = Accumulator<T>>
void normalise_backward_row(int64_t columns, const T* d, const T* h, A mean, A rstd, const T* gamma,
                            const A* means, T* dh, A* dgamma, A* dbeta) {
  const auto mean_lanes = set<A>(mean);
  const auto rstd_lanes = set<A>(rstd);
  const auto mean_g = set<A>(means[0]);
  const auto mean_gx = set<A>(means[1]);
  for_columns<A>(columns, [&](int64_t i, auto use) HWY_ATTR {
    const auto d_lanes = load_ahead(d + i, use);
    const auto normed = hn::Mul(rstd_lanes, hn::Sub(load_ahead(h + i, use), mean_lanes));
    const auto g = hn::Mul(load(gamma + i, use), d_lanes);
    add_to(dgamma + i, hn::Mul(d_lanes, normed), use);
    add_to(dbeta + i, d_lanes, use);
    store(hn::Mul(rstd_lanes, hn::NegMulAdd(normed, mean_gx, hn::Sub(g, mean_g))), dh + i, use);
  });
}

void normalise_backward_rows(const Tensor& d, const Tensor& h, const Tensor& mean, const Tensor& rstd,
                             const Tensor& gamma, const Tensor& means, const Tensor& dh,
                             const Tensor& partials, int64_t block, Range rows) {
  const int64_t columns = d.dim(1);
  dispatch_floating(d.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    A* dgamma = partials.data<A>() + block * 2 * columns;
    std::fill_n(dgamma, 2 * columns, A{0});
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t at = r * columns;
      normalise_backward_row<T>(columns, d.data<T>() + at, h.data<T>() + at, mean.data<A>()[r],
                                rstd.data<A>()[r], gamma.data<T>(), means.data<A>() + 2 * r,
                                dh.data<T>() + at, dgamma, dgamma + columns);
    }
  });
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(fold_weights_rows);
HWY_EXPORT(unfold_rows);
HWY_EXPORT(fold_backward_rows);
HWY_EXPORT(fold_correction_rows);
HWY_EXPORT(normalise_rows);
HWY_EXPORT(normalise_backward_sums_rows);
HWY_EXPORT(feature_sums_rows);
HWY_EXPORT(normalise_backward_rows);

namespace {

constexpr int64_t kRowsOfScalars = 4096;  // of a loop that does next to nothing for a row

}  // namespace

void norm_statistics(Context& context, const Tensor& sums, int64_t features, double eps, const Tensor& mean,
                     const Tensor& rstd) {
  dispatch_accumulator(sums.dtype(), [&]<class A>() {
    const A* in = sums.data<A>();
    A* means = mean.data<A>();
    A* rstds = rstd.data<A>();
    const auto n = static_cast<double>(features);
    context.threads().parallel_for(sums.dim(0), kRowsOfScalars, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        // In fp64: the difference of the mean square and the squared mean may cancel.
        const double m = static_cast<double>(in[2 * r]) / n;
        const double square = static_cast<double>(in[2 * r + 1]) / n;
        const double variance = std::max(square - m * m, 0.0);
        means[r] = static_cast<A>(m);
        rstds[r] = static_cast<A>(1.0 / std::sqrt(variance + eps));
      }
    });
  });
}

void fold_norm_weights(Context& context, const Tensor& w2, const Tensor& gamma, const Tensor& beta,
                       const Tensor& c, const Tensor& w_beta) {
  context.threads().parallel_for(w2.dim(0), row_grain(w2.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(fold_weights_rows)(w2, gamma, beta, c, w_beta, Range{begin, end});
  });
}

void unfold_norm(Context& context, const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& c,
                 const Tensor& w_beta, const Tensor& b2, const Tensor& y) {
  context.threads().parallel_for(z.dim(0), row_grain(z.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(unfold_rows)(z, mean, rstd, c, w_beta, b2, y, Range{begin, end});
  });
}

void fold_norm_backward(Context& context, const Tensor& dy, const Tensor& y, const Tensor& mean,
                        const Tensor& rstd, const Tensor& c, const Tensor& w_beta, const Tensor& b2,
                        int64_t features, const Tensor& mean_g, const Tensor& mean_gx,
                        const Tensor& dy_scaled, const Tensor& u, const Tensor& s, const Tensor& partials) {
  for_row_blocks(context, RowBlocks(dy.dim(0)), dy.dim(0), [&](int64_t block, Range rows) {
    HWY_DYNAMIC_DISPATCH(fold_backward_rows)
    (dy, y, mean, rstd, c, w_beta, b2, features, mean_g, mean_gx, dy_scaled, partials, block, rows);
  });
  if (!partials) return;
  add_blocks(context, partials, 0, u, true);
  add_blocks(context, partials, dy.dim(1), s, true);
}

void add_fold_correction(Context& context, const Tensor& u, const Tensor& gamma, const Tensor& s,
                         const Tensor& beta, const Tensor& dw) {
  context.threads().parallel_for(dw.dim(0), row_grain(dw.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(fold_correction_rows)(u, gamma, s, beta, dw, Range{begin, end});
  });
}

void normalise(Context& context, const Tensor& h, const Tensor& mean, const Tensor& rstd, const Tensor& gamma,
               const Tensor& beta, const Tensor& out) {
  context.threads().parallel_for(h.dim(0), row_grain(h.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(normalise_rows)(h, mean, rstd, gamma, beta, out, Range{begin, end});
  });
}

void normalise_backward_sums(Context& context, const Tensor& d, const Tensor& h, const Tensor& mean,
                             const Tensor& rstd, const Tensor& gamma, const Tensor& sums) {
  context.threads().parallel_for(d.dim(0), row_grain(d.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(normalise_backward_sums_rows)(d, h, mean, rstd, gamma, sums, Range{begin, end});
  });
}

void feature_sums(Context& context, const Tensor& h, const Tensor& sums) {
  context.threads().parallel_for(h.dim(0), row_grain(h.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(feature_sums_rows)(h, sums, Range{begin, end});
  });
}

void normalise_backward(Context& context, const Tensor& d, const Tensor& h, const Tensor& mean,
                        const Tensor& rstd, const Tensor& gamma, const Tensor& means, const Tensor& dh,
                        const Tensor& dgamma, const Tensor& dbeta, const Tensor& partials) {
  for_row_blocks(context, RowBlocks(d.dim(0)), d.dim(0), [&](int64_t block, Range rows) {
    HWY_DYNAMIC_DISPATCH(normalise_backward_rows)
    (d, h, mean, rstd, gamma, means, dh, partials, block, rows);
  });
  add_blocks(context, partials, 0, dgamma);
  add_blocks(context, partials, d.dim(1), dbeta);
}

void split_means(Context& context, const Tensor& sums, int64_t features, const Tensor& mean_g,
                 const Tensor& mean_gx) {
  dispatch_accumulator(sums.dtype(), [&]<class A>() {
    const A* in = sums.data<A>();
    A* g = mean_g.data<A>();
    A* gx = mean_gx.data<A>();
    const auto n = static_cast<A>(features);
    context.threads().parallel_for(sums.dim(0), kRowsOfScalars, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        g[r] = in[2 * r] / n;
        gx[r] = in[2 * r + 1] / n;
      }
    });
  });
}

}  // namespace normformer::ops::cpu
#endif
