// LayerNorm of one row. Compiled once for each instruction set: see highway's
// foreach_target.h, which is why the include guard toggles.
#if defined(NORMFORMER_OPS_CPU_NORMALISE_ROW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMFORMER_OPS_CPU_NORMALISE_ROW_INL_H_
#undef NORMFORMER_OPS_CPU_NORMALISE_ROW_INL_H_
#else
#define NORMFORMER_OPS_CPU_NORMALISE_ROW_INL_H_
#endif

#include <cmath>

#include "ops/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

/// y = gamma * (x - mean) * rstd + beta of a row whose sum is known; writes its mean and rstd.
template <class T, class A = Accumulator<T>>
void normalise_row(int64_t columns, const T* x, A sum, const T* gamma, const T* beta, double eps, T* y,
                   A* mean, A* rstd) {
  const A m = sum / A(columns);
  const auto mean_lanes = set<A>(m);
  const A squares = sum_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
    const auto centred = only_used(hn::Sub(load(x + c, use), mean_lanes), use);
    return hn::Mul(centred, centred);
  });
  const A r = A(1) / std::sqrt(squares / A(columns) + A(eps));
  const auto rstd_lanes = set<A>(r);
  for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
    const auto normed = hn::Mul(hn::Sub(load(x + c, use), mean_lanes), rstd_lanes);
    store(hn::MulAdd(load(gamma + c, use), normed, load(beta + c, use)), y + c, use);
  });
  *mean = m;
  *rstd = r;
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // the toggled guard
