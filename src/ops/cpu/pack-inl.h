// Packing of matrices into panels: what strip-inl.h multiplies by. Compiled once for each instruction set:
// see highway's foreach_target.h, which is why the include guard toggles.
#if defined(NORMFORMER_OPS_CPU_PACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef NORMFORMER_OPS_CPU_PACK_INL_H_
#undef NORMFORMER_OPS_CPU_PACK_INL_H_
#else
#define NORMFORMER_OPS_CPU_PACK_INL_H_
#endif

#include <algorithm>

#include "normformer/core/checked.h"

#include "ops/cpu/strip-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

/// The word of a step whose elements are in two rows; the second may be missing.
template <class T>
HWY_INLINE Word<T> joined(const T* first, const T* second) {
  if constexpr (kPerStep<T> == 2) {
    return static_cast<uint32_t>(first->bits) |
           (second == nullptr ? 0u : static_cast<uint32_t>(second->bits) << 16);
  } else {
    return *first;
  }
}

/// `count` words side by side from the elements of one row or two.
template <class T>
HWY_INLINE void join_rows(int64_t count, const T* first, const T* second, Word<T>* HWY_RESTRICT to) {
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kPerStep<T> == 1) {
    const hn::FixedTag<T, 16 / sizeof(T)> tag;
    constexpr int64_t kMany = 16 / sizeof(T);
    for (; i + kMany <= count; i += kMany) hn::StoreU(hn::LoadU(tag, first + i), tag, to + i);
  }
  if constexpr (kPerStep<T> == 2) {
    const hn::FixedTag<uint16_t, 8> elements;
    const hn::FixedTag<uint16_t, 4> half;
    const hn::FixedTag<uint32_t, 4> words;
    if (second != nullptr) {
      const auto* a = reinterpret_cast<const uint16_t*>(first);
      const auto* b = reinterpret_cast<const uint16_t*>(second);
      for (; i + 8 <= count; i += 8) {
        const auto x = hn::LoadU(elements, a + i);
        const auto y = hn::LoadU(elements, b + i);
        hn::StoreU(hn::BitCast(words, hn::InterleaveLower(elements, x, y)), words, to + i);
        hn::StoreU(hn::BitCast(words, hn::InterleaveUpper(elements, x, y)), words, to + i + 4);
      }
      if (i + 4 <= count) {
        const auto x = hn::ZeroExtendVector(elements, hn::LoadU(half, a + i));
        const auto y = hn::ZeroExtendVector(elements, hn::LoadU(half, b + i));
        hn::StoreU(hn::BitCast(words, hn::InterleaveLower(elements, x, y)), words, to + i);
        i += 4;
      }
    }
  }
#endif
  for (; i < count; ++i) to[i] = joined(first + i, second == nullptr ? nullptr : second + i);
}

/// Rows and words of the squares that transpose_words turns.
inline constexpr int64_t kTransposed = 4;

/// to[i * to_stride + j] = word i of row j, for 0 <= i, j < kTransposed.
template <class T>
HWY_INLINE void transpose_words(const T* rows, int64_t row_stride, Word<T>* HWY_RESTRICT to,
                                int64_t to_stride) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (sizeof(Word<T>) == 4) {
    const hn::FixedTag<uint32_t, 4> tag;
    const hn::FixedTag<uint64_t, 2> wide;
    const auto row = [&](int64_t j) HWY_ATTR {
      return hn::LoadU(tag, reinterpret_cast<const uint32_t*>(rows + j * row_stride));
    };
    const auto a = row(0);
    const auto b = row(1);
    const auto c = row(2);
    const auto d = row(3);
    const auto ab = hn::BitCast(wide, hn::InterleaveLower(tag, a, b));
    const auto cd = hn::BitCast(wide, hn::InterleaveLower(tag, c, d));
    const auto ab_upper = hn::BitCast(wide, hn::InterleaveUpper(tag, a, b));
    const auto cd_upper = hn::BitCast(wide, hn::InterleaveUpper(tag, c, d));
    const auto put = [&](int64_t i, auto words) HWY_ATTR {
      hn::StoreU(hn::BitCast(tag, words), tag, reinterpret_cast<uint32_t*>(to + i * to_stride));
    };
    put(0, hn::InterleaveLower(wide, ab, cd));
    put(1, hn::InterleaveUpper(wide, ab, cd));
    put(2, hn::InterleaveLower(wide, ab_upper, cd_upper));
    put(3, hn::InterleaveUpper(wide, ab_upper, cd_upper));
    return;
  }
#endif
  for (int64_t i = 0; i < kTransposed; ++i) {
    for (int64_t j = 0; j < kTransposed; ++j) {
      to[i * to_stride + j] = load_word(rows + j * row_stride + i * kPerStep<T>);
    }
  }
}

/// One step of a panel, to[panel], from `columns` elements of one row or two; the rest is zero.
template <class T>
HWY_INLINE void pack_step(const T* first, const T* second, int64_t columns, int64_t panel, Word<T>* to) {
  join_rows(columns, first, second, to);
  if (columns < panel) std::fill(to + columns, to + panel, Word<T>{});
}

/// Steps of a panel that are packed together: they stay in the first cache while one row comes after another.
inline constexpr int64_t kPackedPiece = 64;

/// pack_transposed() of so many steps at most, which asks for as many behind them.
template <class T>
void pack_transposed_piece(const T* matrix, int64_t row_stride, int64_t count, int64_t k, Range steps,
                           int64_t panel, Word<T>* to) {
  const int64_t whole = std::min(steps.end, k / kPerStep<T>);  // steps of which no element is missing
  for (int64_t j = 0; j < count; j += kTransposed) {
    const T* rows = matrix + j * row_stride;
    const int64_t several = std::min<int64_t>(kTransposed, count - j);
    int64_t p = steps.begin;
    Word<T>* word = to + j;
    if (several == kTransposed) {
      for (; p + kTransposed <= whole; p += kTransposed) {
        for (int64_t i = 0; i < kTransposed; ++i)
          hwy::Prefetch(rows + i * row_stride + (p + kPackedPiece) * kPerStep<T>);
        transpose_words(rows + p * kPerStep<T>, row_stride, word, panel);
        word += kTransposed * panel;
      }
    }
    for (; p < steps.end; ++p) {
      for (int64_t i = 0; i < several; ++i) {
        const T* row = rows + i * row_stride + p * kPerStep<T>;
        word[i] = p < whole ? load_word(row) : joined<T>(row, nullptr);
      }
      word += panel;
    }
  }
  if (count == panel) return;
  for (int64_t p = 0; p < steps.size(); ++p)
    std::fill(to + p * panel + count, to + (p + 1) * panel, Word<T>{});
}

/// A panel of the transposed matrix: to[p - steps.begin][j] is step p of row j, for j < count; the rest is
/// zero. Rows have k elements.
template <class T>
void pack_transposed(const T* matrix, int64_t row_stride, int64_t count, int64_t k, Range steps,
                     int64_t panel, Word<T>* to) {
  for (int64_t first = steps.begin; first < steps.end; first += kPackedPiece) {
    const Range piece{first, std::min(steps.end, first + kPackedPiece)};
    pack_transposed_piece(matrix, row_stride, count, k, piece, panel, to + (first - steps.begin) * panel);
  }
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // the toggled guard
