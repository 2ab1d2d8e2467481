#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/optimizer.cpp"
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "normformer/tensor/dispatch.h"

#include "ops/cpu/dispatch_accumulator.h"
#include "ops/cpu/lanes-inl.h"
#include "ops/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

/// An update's scalars as every element needs them:
///   m = beta1 m + rest1 g, v = beta2 v + rest2 g^2, p = keep p - rate m / (sqrt(v) spread + eps).
template <class A>
struct Scalars {
  A grad_factor, beta1, rest1, beta2, rest2, keep, rate, spread, eps;

  explicit Scalars(const AdamW& step)
      : grad_factor(A(step.grad_factor)),
        beta1(A(step.beta1)),
        rest1(A(1.0 - step.beta1)),
        beta2(A(step.beta2)),
        rest2(A(1.0 - step.beta2)),
        keep(A(1.0 - step.lr * step.weight_decay)),
        eps(A(step.eps)) {
    const auto t = static_cast<double>(step.update);
    const double correction1 = 1.0 - std::pow(step.beta1, t);
    const double correction2 = std::sqrt(1.0 - std::pow(step.beta2, t));
    rate = A(step.lr / correction1 * (step.fairseq_eps ? correction2 : 1.0));
    spread = A(step.fairseq_eps ? 1.0 : 1.0 / correction2);
  }
};

template <class Master, class T, class A = Accumulator<T>>
void adamw_run(int64_t n, const Scalars<A>& s, const A* gradient, Master* master, A* moment1, A* moment2,
               T* params) {
  const auto factor = set<A>(s.grad_factor);
  const auto beta1 = set<A>(s.beta1);
  const auto rest1 = set<A>(s.rest1);
  const auto beta2 = set<A>(s.beta2);
  const auto rest2 = set<A>(s.rest2);
  const auto keep = set<A>(s.keep);
  const auto rate = set<A>(s.rate);
  const auto spread = set<A>(s.spread);
  const auto eps = set<A>(s.eps);
  for_columns<A>(n, [&](int64_t i, auto use) HWY_ATTR {
    const auto g = hn::Mul(load_ahead(gradient + i, use), factor);
    const auto m = hn::MulAdd(beta1, load_ahead(moment1 + i, use), hn::Mul(rest1, g));
    const auto v = hn::MulAdd(beta2, load_ahead(moment2 + i, use), hn::Mul(rest2, hn::Mul(g, g)));
    const auto update = hn::Div(m, hn::MulAdd(hn::Sqrt(v), spread, eps));
    const auto p = hn::NegMulAdd(rate, update, hn::Mul(keep, load_ahead(master + i, use)));
    store(m, moment1 + i, use);
    store(v, moment2 + i, use);
    store(p, master + i, use);
    if (params != nullptr) store(p, params + i, use);
  });
}

void adamw_range(const AdamW& step, const Tensor& gradient, const Tensor& master, const Tensor& moment1,
                 const Tensor& moment2, const Tensor& params, Range range) {
  dispatch_floating(params ? params.dtype() : master.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const int64_t at = range.begin;
    T* own = params && params.raw() != master.raw() ? params.data<T>() + at : nullptr;
    const auto run = [&](auto* masters) HWY_ATTR {
      adamw_run(range.size(), Scalars<A>(step), gradient.data<A>() + at, masters + at, moment1.data<A>() + at,
                moment2.data<A>() + at, own);
    };
    if (master.dtype() == dtype_of<T>())
      run(master.data<T>());
    else
      run(master.data<A>());
  });
}

/// The largest |x|, or a NaN where there is one.
double absolute_max_range(const Tensor& x, Range range) {
  double result = 0.0;
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    // As integers the bits of |x| have the order of |x|, a NaN above infinity.
    const hn::RebindToSigned<Tag<A>> bits;
    const T* in = x.data<T>() + range.begin;
    auto largest = hn::Zero(bits);
    for_columns<A>(range.size(), [&](int64_t i, auto use) HWY_ATTR {
      largest = hn::Max(largest, hn::BitCast(bits, hn::Abs(load_ahead(in + i, use))));
    });
    alignas(HWY_MAX_BYTES) A lanes[kMaxLanes<A>];
    store(hn::BitCast(Tag<A>(), largest), lanes, Whole{});
    for (size_t i = 0; i < hn::Lanes(bits); ++i) {
      const auto magnitude = static_cast<double>(lanes[i]);
      if (!(magnitude <= result)) result = magnitude;
      if (std::isnan(result)) return;
    }
  });
  return result;
}

/// Eight or fewer doubles from where x's elements lie.
template <class Use>
HWY_INLINE Lanes<double> load_wide(const double* from, Use use) {
  return load(from, use);
}
HWY_INLINE Lanes<double> load_wide(const float* from, Whole) {
  const hn::Rebind<float, Tag<double>> narrow;
  return hn::PromoteTo(Tag<double>(), hn::LoadU(narrow, from));
}
HWY_INLINE Lanes<double> load_wide(const float* from, Part part) {
  alignas(HWY_MAX_BYTES) float local[kMaxLanes<double>] = {};
  std::memcpy(local, from, static_cast<size_t>(part.count) * sizeof(float));
  return load_wide(local, Whole{});
}

/// The sums of |x| and of x^2 in `range`.
std::array<double, 2> norm_sums_range(const Tensor& x, Range range) {
  std::array<double, 2> sums{};
  dispatch_accumulator(x.dtype(), [&]<class T>() {
    const T* in = x.data<T>() + range.begin;
    auto absolute = zero<double>();
    auto squares = zero<double>();
    for_columns<double>(range.size(), [&](int64_t i, auto use) HWY_ATTR {
      const auto value = load_wide(in + i, use);
      absolute = hn::Add(absolute, hn::Abs(value));
      squares = hn::MulAdd(value, value, squares);
    });
    sums = {sum_lanes<double>(absolute), sum_lanes<double>(squares)};
  });
  return sums;
}

/// bins[b] += cuts of the squares in `range`. Every addition to a bin is exact, whatever its order.
void cut_squares_range(const Tensor& x, const double* anchors, Range range, double* bins) {
  dispatch_accumulator(x.dtype(), [&]<class T>() {
    const T* in = x.data<T>() + range.begin;
    const auto a0 = set<double>(anchors[0]);
    const auto a1 = set<double>(anchors[1]);
    const auto a2 = set<double>(anchors[2]);
    const auto a3 = set<double>(anchors[3]);
    auto b0 = zero<double>();
    auto b1 = zero<double>();
    auto b2 = zero<double>();
    auto b3 = zero<double>();
    for_columns<double>(range.size(), [&](int64_t i, auto use) HWY_ATTR {
      const auto value = load_wide(in + i, use);
      const auto square = hn::Mul(value, value);
      const auto q0 = hn::Sub(hn::Add(square, a0), a0);
      const auto r0 = hn::Sub(square, q0);
      const auto q1 = hn::Sub(hn::Add(r0, a1), a1);
      const auto r1 = hn::Sub(r0, q1);
      const auto q2 = hn::Sub(hn::Add(r1, a2), a2);
      const auto r2 = hn::Sub(r1, q2);
      const auto q3 = hn::Sub(hn::Add(r2, a3), a3);
      b0 = hn::Add(b0, q0);
      b1 = hn::Add(b1, q1);
      b2 = hn::Add(b2, q2);
      b3 = hn::Add(b3, q3);
    });
    bins[0] += sum_lanes<double>(b0);
    bins[1] += sum_lanes<double>(b1);
    bins[2] += sum_lanes<double>(b2);
    bins[3] += sum_lanes<double>(b3);
  });
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(adamw_range);
HWY_EXPORT(absolute_max_range);
HWY_EXPORT(cut_squares_range);
HWY_EXPORT(norm_sums_range);

namespace {

constexpr int64_t kRun = 1 << 14;  // elements of a flat shard that one thread takes at a time

}  // namespace

void adamw(Context& context, const AdamW& step, const Tensor& gradient, const Tensor& master,
           const Tensor& moment1, const Tensor& moment2, const Tensor& params) {
  context.threads().parallel_for(master.numel(), kRun, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(adamw_range)
    (step, gradient, master, moment1, moment2, params, Range{begin, end});
  });
}

double absolute_max(Context& context, const Tensor& x) {
  std::vector<double> of_runs(static_cast<size_t>(ceil_div(x.numel(), kRun)));
  context.threads().parallel_for(x.numel(), kRun, [&](int64_t begin, int64_t end) {
    of_runs[static_cast<size_t>(begin / kRun)] =
        HWY_DYNAMIC_DISPATCH(absolute_max_range)(x, Range{begin, end});
  });
  double largest = 0.0;
  for (const double of_run : of_runs) {
    if (!std::isfinite(of_run)) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, of_run);
  }
  return largest;
}

void add_norm_sums(Context& context, const Tensor& x, const Tensor& sums) {
  std::vector<std::array<double, 2>> of_runs(static_cast<size_t>(ceil_div(x.numel(), kRun)));
  context.threads().parallel_for(x.numel(), kRun, [&](int64_t begin, int64_t end) {
    of_runs[static_cast<size_t>(begin / kRun)] = HWY_DYNAMIC_DISPATCH(norm_sums_range)(x, Range{begin, end});
  });
  for (const auto& of_run : of_runs) {
    for (size_t i = 0; i < 2; ++i) sums.data<double>()[i] += of_run[i];
  }
}

void add_cut_squares(Context& context, const Tensor& x,
                     const std::array<double, OrderFreeSumOfSquares::kBins>& anchors,
                     std::array<double, OrderFreeSumOfSquares::kBins>& bins) {
  using Bins = std::array<double, OrderFreeSumOfSquares::kBins>;
  std::vector<Bins> of_runs(static_cast<size_t>(ceil_div(x.numel(), kRun)), Bins{});
  context.threads().parallel_for(x.numel(), kRun, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(cut_squares_range)
    (x, anchors.data(), Range{begin, end}, of_runs[static_cast<size_t>(begin / kRun)].data());
  });
  for (const Bins& of_run : of_runs) {
    for (size_t b = 0; b < bins.size(); ++b) bins[b] += of_run[b];
  }
}

}  // namespace normformer::ops::cpu
#endif
