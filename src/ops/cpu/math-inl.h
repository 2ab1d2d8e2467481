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
/// 1.9e-9), and 2^n through the exponent's bits.
HWY_INLINE Lanes<float> exp_nonpositive(Lanes<float> x) {
  const Tag<float> tag;
  const hn::Rebind<int32_t, Tag<float>> integers;
  const auto n = hn::Round(hn::Mul(x, hn::Set(tag, 1.44269504f)));
  // ln 2 in two pieces: n times the first is exact.
  auto r = hn::NegMulAdd(n, hn::Set(tag, 0.693359375f), x);
  r = hn::NegMulAdd(n, hn::Set(tag, -2.12194440e-4f), r);
  auto p = hn::Set(tag, 0.00138368065458f);
  p = hn::MulAdd(p, r, hn::Set(tag, 0.00837482318096f));
  p = hn::MulAdd(p, r, hn::Set(tag, 0.0416682266418f));
  p = hn::MulAdd(p, r, hn::Set(tag, 0.166664200861f));
  p = hn::MulAdd(p, r, hn::Set(tag, 0.49999992074f));
  p = hn::MulAdd(p, r, hn::Set(tag, 1.00000003634f));
  p = hn::MulAdd(p, r, hn::Set(tag, 1.00000000055f));
  const auto exponent = hn::Add(hn::ConvertTo(integers, n), hn::Set(integers, 127));
  const auto power = hn::BitCast(tag, hn::ShiftLeft<23>(exponent));
  return hn::IfThenElse(hn::Lt(x, hn::Set(tag, -87.33654f)), hn::Zero(tag), hn::Mul(p, power));
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

/// Absolute error of `cumulative` below 1e-7. For x < 0 it is exp(-x^2 / 2) times a polynomial in
/// 1 / (1 + 0.4 |x| / sqrt 2), the form of Hastings (Abramowitz, Stegun, 7.1.26), refitted to 1.1e-8.
HWY_INLINE Normal<Lanes<float>> normal(Lanes<float> x) {
  const Tag<float> tag;
  const auto one = hn::Set(tag, 1.0f);
  const auto density = exp_nonpositive(hn::Mul(hn::Mul(x, x), hn::Set(tag, -0.5f)));
  const auto t = hn::Div(one, hn::MulAdd(hn::Abs(x), hn::Set(tag, 0.282842712475f), one));
  auto p = hn::Set(tag, 0.0387418719596f);
  p = hn::MulAdd(p, t, hn::Set(tag, -0.206199480502f));
  p = hn::MulAdd(p, t, hn::Set(tag, 0.363694330862f));
  p = hn::MulAdd(p, t, hn::Set(tag, -0.216027773757f));
  p = hn::MulAdd(p, t, hn::Set(tag, 0.228372210659f));
  p = hn::MulAdd(p, t, hn::Set(tag, 0.0574859016436f));
  p = hn::MulAdd(p, t, hn::Set(tag, 0.12207616588f));
  p = hn::MulAdd(p, t, hn::Set(tag, 0.11180774028f));
  p = hn::MulAdd(p, t, hn::Set(tag, 4.90222647809e-5f));
  const auto tail = hn::Mul(p, density);
  return {hn::IfThenElse(hn::Lt(x, hn::Zero(tag)), tail, hn::Sub(one, tail)), density};
}

HWY_INLINE Normal<Lanes<double>> normal(Lanes<double> x) {
  return {by_lane(x, [](double v) { return 0.5 * std::erfc(-v * 0.70710678118654752440); }),
          by_lane(x, [](double v) { return std::exp(-0.5 * v * v); })};
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // the toggled guard
