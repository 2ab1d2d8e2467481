// Elementary functions on lanes: own approximations in fp32, the C library lane by lane in fp64.
#if defined(NORMFORMER_OPS_CPU_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMFORMER_OPS_CPU_MATH_INL_H_
#undef NORMFORMER_OPS_CPU_MATH_INL_H_
#else
#define NORMFORMER_OPS_CPU_MATH_INL_H_
#endif

#include <cmath>

#include "ops/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

template <class Function>
HWY_INLINE Lanes<double> by_lane(Lanes<double> x, Function function) {
  alignas(HWY_MAX_BYTES) double lanes[kMaxLanes<double>];
  store(x, lanes, Whole{});
  for (size_t i = 0; i < hn::Lanes(Tag<double>()); ++i) lanes[i] = function(lanes[i]);
  return load(lanes, Whole{});
}

/// exp(x) for x <= 0; 0 below the smallest normal number. A NaN stays a NaN.
/// Relative error below 2e-7: x = n ln 2 + r with |r| <= ln 2 / 2, a minimax polynomial in r (relative error
/// 1.9e-9), and n added to the exponent's bits.
HWY_INLINE Lanes<float> exp_nonpositive(Lanes<float> x) {
  const Tag<float> tag;
  const hn::Rebind<int32_t, Tag<float>> integers;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits.
  const auto shift = hn::Set(tag, 12582912.0f);
  const auto shifted = hn::MulAdd(x, hn::Set(tag, 1.44269504f), shift);
  const auto n = hn::Sub(shifted, shift);
  // ln 2 in two pieces: n times the first is exact.
  const auto r =
      hn::NegMulAdd(n, hn::Set(tag, -2.12194440e-4f), hn::NegMulAdd(n, hn::Set(tag, 0.693359375f), x));
  // In pairs of coefficients, so that the processor has several to work on.
  const auto r2 = hn::Mul(r, r);
  const auto p01 = hn::Add(r, hn::Set(tag, 1.0f));
  const auto p23 = hn::MulAdd(hn::Set(tag, 0.166664200861f), r, hn::Set(tag, 0.49999992074f));
  const auto p45 = hn::MulAdd(hn::Set(tag, 0.00837482318096f), r, hn::Set(tag, 0.0416682266418f));
  const auto p456 = hn::MulAdd(hn::Set(tag, 0.00138368065458f), r2, p45);
  const auto p = hn::MulAdd(hn::MulAdd(p456, r2, p23), r2, p01);
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(integers, shifted));
  const auto scaled = hn::BitCast(tag, hn::Add(hn::BitCast(integers, p), exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(tag, -87.33654f)), scaled);
}

HWY_INLINE Lanes<double> exp_nonpositive(Lanes<double> x) {
  return by_lane(x, [](double v) { return std::exp(v); });
}

/// The normal distribution at x: its cumulative function, and exp(-x^2 / 2).
template <class V>
struct Normal {
  V cumulative;
  V density;
};

/// Absolute error of `cumulative` below 1e-7. For x < 0 it is exp(-x^2 / 2) times a polynomial in |x|:
/// minimax under that weight, with an error of 1.7e-8.
HWY_INLINE Normal<Lanes<float>> normal(Lanes<float> x) {
  const Tag<float> tag;
  const auto density = exp_nonpositive(hn::Mul(hn::Mul(x, x), hn::Set(tag, -0.5f)));
  const auto a = hn::Min(hn::Abs(x), hn::Set(tag, 9.0f));  // the density is zero long before
  const auto a2 = hn::Mul(a, a);
  const auto a4 = hn::Mul(a2, a2);
  const auto p01 = hn::MulAdd(hn::Set(tag, -0.398940595308f), a, hn::Set(tag, 0.49999998307f));
  const auto p23 = hn::MulAdd(hn::Set(tag, -0.132805417562f), a, hn::Set(tag, 0.249972490361f));
  const auto p45 = hn::MulAdd(hn::Set(tag, -0.025470666314f), a, hn::Set(tag, 0.0619230798599f));
  const auto p67 = hn::MulAdd(hn::Set(tag, -0.00258957536626f), a, hn::Set(tag, 0.00900288250299f));
  const auto p89 = hn::MulAdd(hn::Set(tag, -8.47347251987e-5f), a, hn::Set(tag, 0.000563478171584f));
  const auto pab = hn::MulAdd(hn::Set(tag, -3.15336036143e-7f), a, hn::Set(tag, 7.70457917749e-6f));
  const auto q0 = hn::MulAdd(p23, a2, p01);
  const auto q1 = hn::MulAdd(p67, a2, p45);
  const auto q2 = hn::MulAdd(pab, a2, p89);
  const auto tail = hn::Mul(hn::MulAdd(hn::MulAdd(q2, a4, q1), a4, q0), density);
  return {hn::IfThenElse(hn::Lt(x, hn::Zero(tag)), tail, hn::Sub(hn::Set(tag, 1.0f), tail)), density};
}

HWY_INLINE Normal<Lanes<double>> normal(Lanes<double> x) {
  return {by_lane(x, [](double v) { return 0.5 * std::erfc(-v * 0.70710678118654752440); }),
          by_lane(x, [](double v) { return std::exp(-0.5 * v * v); })};
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // the toggled guard
