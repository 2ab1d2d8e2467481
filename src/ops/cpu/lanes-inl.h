// Rows of doubles, floats, bf16 and f16 as vectors of the accumulator type. Compiled once for each
// instruction set: see highway's foreach_target.h, which is why the include guard toggles.
#if defined(NORMFORMER_OPS_CPU_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMFORMER_OPS_CPU_LANES_INL_H_
#undef NORMFORMER_OPS_CPU_LANES_INL_H_
#else
#define NORMFORMER_OPS_CPU_LANES_INL_H_
#endif

#include <cstring>
#include <type_traits>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "normformer/tensor/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

template <class A>
using Tag = hn::ScalableTag<A>;
template <class A>
using Lanes = hn::Vec<Tag<A>>;

template <class A>
inline constexpr int64_t kMaxLanes = HWY_MAX_BYTES / sizeof(A);

/// Which lanes of a step along a row are in use: all, or the first `count`.
struct Whole {};
struct Part {
  int64_t count;
};

template <class A>
HWY_INLINE Lanes<A> set(A value) {
  return hn::Set(Tag<A>(), value);
}

template <class A>
HWY_INLINE Lanes<A> zero() {
  return hn::Zero(Tag<A>());
}

HWY_INLINE Lanes<float> load(const float* from, Whole) { return hn::LoadU(Tag<float>(), from); }
HWY_INLINE Lanes<double> load(const double* from, Whole) { return hn::LoadU(Tag<double>(), from); }
HWY_INLINE Lanes<float> load(const bf16* from, Whole) {
  const hn::Rebind<uint16_t, Tag<float>> narrow;
  const hn::Rebind<uint32_t, Tag<float>> wide;
  const auto bits = hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(Tag<float>(), hn::ShiftLeft<16>(hn::PromoteTo(wide, bits)));
}

#undef NORMFORMER_F16C
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
#define NORMFORMER_F16C 1
using HalfTag = hn::Rebind<hwy::float16_t, Tag<float>>;
#else
#define NORMFORMER_F16C 0  // Highway's own conversions round otherwise
#endif
/// The f16 in the lower half of each word; the upper half is zero.
HWY_INLINE Lanes<float> widen_halves(hn::Vec<hn::Rebind<uint32_t, Tag<float>>> words) {
  const Tag<float> tag;
#if NORMFORMER_F16C
  const hn::Rebind<int32_t, Tag<float>> wide_signed;
  const hn::Rebind<uint16_t, Tag<float>> narrow;
  return hn::PromoteTo(tag, hn::BitCast(HalfTag(), hn::DemoteTo(narrow, hn::BitCast(wide_signed, words))));
#else
  const hn::Rebind<uint32_t, Tag<float>> wide;
  const auto fraction = hn::ShiftLeft<13>(hn::And(words, hn::Set(wide, 0x7FFFu)));
  const auto sign = hn::ShiftLeft<16>(hn::And(words, hn::Set(wide, 0x8000u)));
  const auto number = hn::Mul(hn::BitCast(tag, fraction), hn::Set(tag, 0x1p112f));
  // What is not finite: a NaN made quiet, as instructions for f16 make it.
  const auto infinity = hn::Set(wide, 0x0F800000u);
  const auto quiet = hn::IfThenElseZero(hn::Gt(fraction, infinity), hn::Set(wide, 0x00400000u));
  const auto special = hn::Or(hn::Or(fraction, hn::Set(wide, 0x7F800000u)), quiet);
  const auto magnitude = hn::IfThenElse(hn::Lt(fraction, infinity), hn::BitCast(wide, number), special);
  return hn::BitCast(tag, hn::Or(sign, magnitude));
#endif
}
HWY_INLINE Lanes<float> load(const f16* from, Whole) {
#if NORMFORMER_F16C
  return hn::PromoteTo(Tag<float>(), hn::LoadU(HalfTag(), reinterpret_cast<const hwy::float16_t*>(from)));
#else
  const hn::Rebind<uint16_t, Tag<float>> narrow;
  const hn::Rebind<uint32_t, Tag<float>> wide;
  return widen_halves(hn::PromoteTo(wide, hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(from))));
#endif
}

HWY_INLINE void store(Lanes<float> v, float* to, Whole) { hn::StoreU(v, Tag<float>(), to); }
HWY_INLINE void store(Lanes<double> v, double* to, Whole) { hn::StoreU(v, Tag<double>(), to); }
/// v's bits rounded as bf16(float) rounds; a bf16 is their upper half.
HWY_INLINE auto bits_rounded_to_bf16(Lanes<float> v) {
  const hn::Rebind<uint32_t, Tag<float>> wide;
  const auto u = hn::BitCast(wide, v);
  const auto even = hn::And(hn::ShiftRight<16>(u), hn::Set(wide, 1u));
  const auto rounded = hn::Add(u, hn::Add(even, hn::Set(wide, 0x7FFFu)));
  const auto quiet = hn::Or(u, hn::Set(wide, 0x00400000u));
  return hn::IfThenElse(hn::RebindMask(wide, hn::IsNaN(v)), quiet, rounded);
}
HWY_INLINE void store(Lanes<float> v, bf16* to, Whole) {
  const hn::Rebind<int32_t, Tag<float>> wide_signed;
  const hn::Rebind<uint16_t, Tag<float>> narrow;
  const auto upper = hn::BitCast(wide_signed, hn::ShiftRight<16>(bits_rounded_to_bf16(v)));
  hn::StoreU(hn::DemoteTo(narrow, upper), narrow, reinterpret_cast<uint16_t*>(to));
}

HWY_INLINE void store(Lanes<float> v, f16* to, Whole) {
#if NORMFORMER_F16C
  hn::StoreU(hn::DemoteTo(HalfTag(), v), HalfTag(), reinterpret_cast<hwy::float16_t*>(to));
#else
  alignas(HWY_MAX_BYTES) float wide[kMaxLanes<float>];
  hn::Store(v, Tag<float>(), wide);
  for (size_t i = 0; i < hn::Lanes(Tag<float>()); ++i) to[i] = f16(wide[i]);
#endif
}

/// What a T that v is stored to gives back.
template <class T>
HWY_INLINE auto rounded_to(Lanes<Accumulator<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const hn::Rebind<uint32_t, Tag<float>> wide;
    return hn::BitCast(Tag<float>(), hn::And(bits_rounded_to_bf16(v), hn::Set(wide, 0xFFFF0000u)));
  } else if constexpr (std::is_same_v<T, f16>) {
    alignas(HWY_MAX_BYTES) f16 rounded[kMaxLanes<float>];
    store(v, rounded, Whole{});
    return load(rounded, Whole{});
  } else {
    return v;
  }
}

/// The first part.count elements; the other lanes are zero.
template <class T>
HWY_INLINE Lanes<Accumulator<T>> load(const T* from, Part part) {
  alignas(HWY_MAX_BYTES) T local[kMaxLanes<Accumulator<T>>] = {};
  std::memcpy(local, from, static_cast<size_t>(part.count) * sizeof(T));
  return load(local, Whole{});
}

template <class T>
HWY_INLINE void store(Lanes<Accumulator<T>> v, T* to, Part part) {
  alignas(HWY_MAX_BYTES) T local[kMaxLanes<Accumulator<T>>];
  store(v, local, Whole{});
  std::memcpy(to, local, static_cast<size_t>(part.count) * sizeof(T));
}

/// As load, of a matrix that is gone through once: asks for what lies some way ahead, since the processor
/// itself stops at the end of each page.
template <class T, class Use>
HWY_INLINE auto load_ahead(const T* from, Use use) {
  constexpr int64_t kBytesAhead = 2048;
  hwy::Prefetch(reinterpret_cast<const char*>(from) + kBytesAhead);
  return load(from, use);
}

/// to[] += v.
template <class T, class Use>
HWY_INLINE void add_to(T* to, Lanes<T> v, Use use) {
  store(hn::Add(load(to, use), v), to, use);
}

/// v with the lanes that are not in use set to zero.
template <class V>
HWY_INLINE V only_used(V v, Whole) {
  return v;
}
template <class V>
HWY_INLINE V only_used(V v, Part part) {
  const hn::DFromV<V> tag;
  return hn::IfThenElseZero(hn::FirstN(tag, static_cast<size_t>(part.count)), v);
}

/// The sum of all lanes.
template <class A>
HWY_INLINE A sum_lanes(Lanes<A> v) {
  return hn::GetLane(hn::SumOfLanes(Tag<A>(), v));
}

/// Calls body(column, use) along a row of n columns, a vector of A at a time.
template <class A, class Body>
HWY_INLINE void for_columns(int64_t n, Body&& body) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(Tag<A>()));
  int64_t c = 0;
  for (; c + lanes <= n; c += lanes) body(c, Whole{});
  if (c < n) body(c, Part{n - c});
}

/// The sum of term(column, use) along a row of n columns. Lanes that are not in use must be zero.
template <class A, class Term>
HWY_INLINE A sum_columns(int64_t n, Term&& term) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(Tag<A>()));
  // Four chains of additions: one alone would wait for itself.
  auto s0 = zero<A>();
  auto s1 = zero<A>();
  auto s2 = zero<A>();
  auto s3 = zero<A>();
  int64_t c = 0;
  for (; c + 4 * lanes <= n; c += 4 * lanes) {
    s0 = hn::Add(s0, term(c, Whole{}));
    s1 = hn::Add(s1, term(c + lanes, Whole{}));
    s2 = hn::Add(s2, term(c + 2 * lanes, Whole{}));
    s3 = hn::Add(s3, term(c + 3 * lanes, Whole{}));
  }
  for (; c + lanes <= n; c += lanes) s0 = hn::Add(s0, term(c, Whole{}));
  if (c < n) s1 = hn::Add(s1, term(c, Part{n - c}));
  return sum_lanes<A>(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // the toggled guard
