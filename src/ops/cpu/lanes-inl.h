// Rows of doubles, floats and bf16 as vectors of the accumulator type. Compiled once for each instruction
// set: see highway's foreach_target.h, which is why the include guard toggles.
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

/// What a T that v is stored to gives back.
template <class T>
HWY_INLINE auto rounded_to(Lanes<Accumulator<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const hn::Rebind<uint32_t, Tag<float>> wide;
    return hn::BitCast(Tag<float>(), hn::And(bits_rounded_to_bf16(v), hn::Set(wide, 0xFFFF0000u)));
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
