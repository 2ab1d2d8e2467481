// The innermost loop of every matrix product: a strip of a few rows of c in registers, to which one step of
// the inner dimension after another is added. Compiled once for each instruction set: see highway's
// foreach_target.h, which is why the include guard toggles.
#if defined(NORMFORMER_OPS_CPU_STRIP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMFORMER_OPS_CPU_STRIP_INL_H_
#undef NORMFORMER_OPS_CPU_STRIP_INL_H_
#else
#define NORMFORMER_OPS_CPU_STRIP_INL_H_
#endif

#include <cstring>

#include "ops/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

/// Rows of a strip: with two vectors of columns they fill the registers.
#if HWY_TARGET == HWY_AVX3
inline constexpr int kStripRows = 12;
#else
inline constexpr int kStripRows = 6;
#endif

/// What a step along the inner dimension multiplies: one element of fp64 or fp32, or two neighbours of 16
/// bits, as instructions for bf16 take them.
template <class T>
inline constexpr int64_t kPerStep = kIs16Bit<T> ? 2 : 1;

/// The elements of a step as one word.
template <class T>
using Word = std::conditional_t<kIs16Bit<T>, uint32_t, T>;

template <class T>
HWY_INLINE Word<T> load_word(const T* from) {
  Word<T> word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

/// Columns of a strip.
template <class T>
HWY_INLINE int64_t panel_columns() {
  return 2 * static_cast<int64_t>(hn::Lanes(Tag<Accumulator<T>>()));
}

/// How a step of each type is multiplied and added.
template <class A>
struct FusedSteps {
  using Element = A;
  using Factor = Lanes<A>;
  static HWY_INLINE Factor broadcast(A word) { return hn::Set(Tag<A>(), word); }
  static HWY_INLINE Factor load(const A* from) { return hn::LoadU(Tag<A>(), from); }
  static HWY_INLINE Lanes<A> add(Lanes<A> sum, Factor a, Factor b) { return hn::MulAdd(a, b, sum); }
};

/// bf16 where there are no instructions for it: the two products one after the other.
struct WidenedSteps {
  using Element = bf16;
  using Words = hn::Rebind<uint32_t, Tag<float>>;
  struct Factor {
    Lanes<float> even;
    Lanes<float> odd;
  };
  static HWY_INLINE Factor widen(hn::Vec<Words> words) {
    const Tag<float> tag;
    return {hn::BitCast(tag, hn::ShiftLeft<16>(words)),
            hn::BitCast(tag, hn::And(words, hn::Set(Words(), 0xFFFF0000u)))};
  }
  static HWY_INLINE Factor broadcast(uint32_t word) { return widen(hn::Set(Words(), word)); }
  static HWY_INLINE Factor load(const bf16* from) {
    return widen(hn::LoadU(Words(), reinterpret_cast<const uint32_t*>(from)));
  }
  static HWY_INLINE Lanes<float> add(Lanes<float> sum, const Factor& a, const Factor& b) {
    return hn::MulAdd(a.odd, b.odd, hn::MulAdd(a.even, b.even, sum));
  }
};

/// f16, the two products one after the other.
struct HalfSteps {
  using Element = f16;
  using Words = hn::Rebind<uint32_t, Tag<float>>;
  using Factor = WidenedSteps::Factor;
  static HWY_INLINE Factor widen(hn::Vec<Words> words) {
    return {widen_halves(hn::And(words, hn::Set(Words(), 0xFFFFu))), widen_halves(hn::ShiftRight<16>(words))};
  }
  static HWY_INLINE Factor broadcast(uint32_t word) { return widen(hn::Set(Words(), word)); }
  static HWY_INLINE Factor load(const f16* from) {
    return widen(hn::LoadU(Words(), reinterpret_cast<const uint32_t*>(from)));
  }
  static HWY_INLINE Lanes<float> add(Lanes<float> sum, const Factor& a, const Factor& b) {
    return WidenedSteps::add(sum, a, b);
  }
};

#undef NORMFORMER_BF16_STEPS
#if HWY_TARGET == HWY_AVX3
#define NORMFORMER_BF16_STEPS 1
/// bf16 by AVX512-BF16. Written in assembly since Highway 1.0 has no target for it and the compiler's own
/// function would demand it of everything that it is inlined into.
struct NativeSteps {
  using Element = bf16;
  using Factor = hn::Vec<hn::Rebind<uint32_t, Tag<float>>>;
  static HWY_INLINE Factor broadcast(uint32_t word) {
    return hn::Set(hn::Rebind<uint32_t, Tag<float>>(), word);
  }
  static HWY_INLINE Factor load(const bf16* from) {
    return hn::LoadU(hn::Rebind<uint32_t, Tag<float>>(), reinterpret_cast<const uint32_t*>(from));
  }
  static HWY_INLINE Lanes<float> add(Lanes<float> sum, Factor a, Factor b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(b.raw), "v"(a.raw));
    return sum;
  }
};
#else
#define NORMFORMER_BF16_STEPS 0
#endif

/// Where the left factor of a strip lies: the word of row i and step p begins at
/// data[i * row_stride + p * step_stride].
template <class T>
struct StripRows {
  const T* data;
  int64_t row_stride;
  int64_t step_stride;
};

/// c[kRows, panel_columns] = or += start[panel_columns] + a[kRows, steps] b[steps, panel_columns]. Words of a
/// step of b lie side by side, `b_stride` elements after those of the step before. A null `start` is zero.
template <class Steps, int kRows>
HWY_INLINE void multiply_rows(int64_t steps, const StripRows<typename Steps::Element>& a,
                              const typename Steps::Element* HWY_RESTRICT b, int64_t b_stride,
                              const Accumulator<typename Steps::Element>* start,
                              Accumulator<typename Steps::Element>* HWY_RESTRICT c, int64_t ldc, bool add) {
  using T = typename Steps::Element;
  using A = Accumulator<T>;
  const Tag<A> tag;
  const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
  Lanes<A> left[kRows];
  Lanes<A> right[kRows];
  const auto start_left = start == nullptr ? hn::Zero(tag) : hn::LoadU(tag, start);
  const auto start_right = start == nullptr ? hn::Zero(tag) : hn::LoadU(tag, start + lanes);
  for (int i = 0; i < kRows; ++i) {
    left[i] = start_left;
    right[i] = start_right;
    // By the time that the sums are there, so is where they go.
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + lanes, 1);
  }
  // A pointer for every third row: the others are within reach of an address's scaled index, and there are
  // not registers for a pointer each.
  constexpr int kGroups = (kRows + 2) / 3;
  const T* groups[kGroups];
  for (int g = 0; g < kGroups; ++g) groups[g] = a.data + 3 * g * a.row_stride;
  for (int64_t p = 0; p < steps; ++p) {
    const auto b_left = Steps::load(b);
    const auto b_right = Steps::load(b + lanes * kPerStep<T>);
    for (int i = 0; i < kRows; ++i) {
      const auto factor = Steps::broadcast(load_word(groups[i / 3] + (i % 3) * a.row_stride));
      left[i] = Steps::add(left[i], factor, b_left);
      right[i] = Steps::add(right[i], factor, b_right);
    }
    for (int g = 0; g < kGroups; ++g) groups[g] += a.step_stride;
    b += b_stride;
  }
  for (int i = 0; i < kRows; ++i) {
    A* row = c + i * ldc;
    if (add) {
      left[i] = hn::Add(left[i], hn::LoadU(tag, row));
      right[i] = hn::Add(right[i], hn::LoadU(tag, row + lanes));
    }
    hn::StoreU(left[i], tag, row);
    hn::StoreU(right[i], tag, row + lanes);
  }
}

/// The same for any number of rows up to kStripRows. An element's bits do not depend on that number.
template <class Steps>
HWY_NOINLINE void multiply_strip(int64_t rows, int64_t steps, StripRows<typename Steps::Element> a,
                                 const typename Steps::Element* b, int64_t b_stride,
                                 const Accumulator<typename Steps::Element>* start,
                                 Accumulator<typename Steps::Element>* c, int64_t ldc, bool add) {
  const auto run = [&]<int kRows>() HWY_ATTR {
    multiply_rows<Steps, kRows>(steps, a, b, b_stride, start, c, ldc, add);
    a.data += kRows * a.row_stride;
    c += kRows * ldc;
    rows -= kRows;
  };
  if (rows == kStripRows) return run.template operator()<kStripRows>();
  if constexpr (kStripRows > 8) {
    if (rows >= 8) run.template operator()<8>();
  }
  if (rows >= 4) run.template operator()<4>();
  if (rows >= 2) run.template operator()<2>();
  if (rows >= 1) run.template operator()<1>();
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // the toggled guard
