#include "ops/cpu/gemm.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/gemm.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "ops/cpu/pack-inl.h"
#include "ops/cpu/scratch.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

// After Goto, van de Geijn, "Anatomy of high-performance matrix multiplication", 2008: b is packed into
// panels of as many columns as a strip has, and strips of a block of rows, which stay in the second cache,
// pass by each panel. Rows of a are read where they are; only a transposed a is packed too.

inline constexpr int64_t kBlockSteps = 1024;      // steps after which sums in registers are added to c
inline constexpr int64_t kBlockRows = 96;         // rows of a that pass by a panel of b
inline constexpr int64_t kPackedBytes = 2 << 20;  // of b packed at a time

/// One part of a product. Steps is how its elements multiply.
template <class Steps, class Out>
class ProductPart {
 public:
  using T = typename Steps::Element;
  using A = Accumulator<T>;

  ProductPart(const GemmShape& shape, Range rows, Range columns, const T* a, const T* b, const Out* bias,
              Out* c)
      : shape_(shape),
        rows_(rows),
        columns_(columns),
        a_(a),
        b_(b),
        bias_(bias),
        c_(c),
        panel_(panel_columns<T>()),
        panels_(ceil_div(columns.size(), panel_)),
        steps_(ceil_div(shape.k, kPerStep<T>)) {
    const int64_t step_bytes = panels_ * panel_ * kPerStep<T> * static_cast<int64_t>(sizeof(T));
    packed_steps_ = std::min(steps_, round_up(std::max<int64_t>(1, kPackedBytes / step_bytes), kBlockSteps));
    constexpr int64_t kWay = 4096;  // rows so far apart fall on the same lines of the first cache
    waits_ = kNarrowed || shape.ldc * static_cast<int64_t>(sizeof(A)) % kWay == 0;
  }

  void run() {
    thread_local Scratch packed_b;
    thread_local Scratch packed_a;
    thread_local Scratch sums;
    thread_local Scratch wide_bias;
    packed_b_ = packed_b.take<Word<T>>(panels_ * spaced(packed_steps_ * panel_));
    packed_a_ = packed_a.take<Word<T>>(kBlockRows / kStripRows * spaced(kBlockSteps * kStripRows));
    if (waits_) {
      const int64_t rows = is_packed_at_once() ? kBlockRows : rows_.size();
      waiting_ = sums.take<A>(rows * panels_ * panel_);
    }
    if (bias_ != nullptr) widen_bias(wide_bias.take<A>(panels_ * panel_));
    for (int64_t first = 0; first < steps_; first += packed_steps_) {
      const Range steps{first, std::min(steps_, first + packed_steps_)};
      pack_b(steps);
      for (int64_t row = rows_.begin; row < rows_.end; row += kBlockRows) {
        const Range block{row, std::min(rows_.end, row + kBlockRows)};
        const Sums at = sums_of(block);
        if (waits_ && first == 0 && shape_.accumulate) read_rows(block, at);
        multiply_block(block, steps, at);
        if (waits_ && steps.end == steps_) write_rows(block, at);
      }
    }
  }

 private:
  static constexpr bool kNarrowed = !std::is_same_v<A, Out>;
  static constexpr int64_t kPadding = 64 / sizeof(Word<T>);
  static constexpr int64_t kAhead = 8 * kPerStep<T>;  // rows from what is packed to what is asked for

  // Where a block of rows is summed: in c itself, or beside it until the sums are whole.
  struct Sums {
    A* data;
    int64_t stride;
  };

  bool is_packed_at_once() const { return packed_steps_ == steps_; }

  Sums sums_of(Range rows) const {
    if constexpr (!kNarrowed) {
      if (!waits_) return {c_ + rows.begin * shape_.ldc + columns_.begin, shape_.ldc};
    }
    const int64_t stride = panels_ * panel_;
    return {waiting_ + (is_packed_at_once() ? 0 : (rows.begin - rows_.begin) * stride), stride};
  }

  // The distance from one packed panel, or strip, to the next. The padding keeps those that are written or
  // read side by side out of each other's lines of the first cache.
  static int64_t spaced(int64_t words) { return words + kPadding; }
  int64_t panel_words(Range steps) const { return spaced(steps.size() * panel_); }
  int64_t strip_words(Range steps) const { return spaced(steps.size() * kStripRows); }

  void pack_b(Range steps) {
    if (!shape_.transpose_b) {
      for (int64_t p = steps.begin; p < steps.end; ++p) pack_b_step(steps, p);
      return;
    }
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t first = columns_.begin + panel * panel_;
      pack_transposed(b_ + first * shape_.ldb, shape_.ldb, std::min(panel_, columns_.end - first), shape_.k,
                      steps, panel_, packed_b_ + panel * panel_words(steps));
    }
  }

  void pack_b_step(Range steps, int64_t p) {
    const int64_t k = p * kPerStep<T>;
    Word<T>* to = packed_b_ + (p - steps.begin) * panel_;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const T* first = b_ + k * shape_.ldb + columns_.begin + panel * panel_;
      const T* second = k + 1 < shape_.k ? first + shape_.ldb : nullptr;
      pack_step(first, second, std::min(panel_, columns_.size() - panel * panel_), panel_, to);
      to += panel_words(steps);
    }
    prefetch(b_ + std::min(k + kAhead, shape_.k - 1) * shape_.ldb + columns_.begin, columns_.size());
  }

  // Strips of rows as [strip][step][row]: of a transposed a, or where the last step lacks an element.
  void pack_a(Range rows, Range steps) {
    for (int64_t p = steps.begin; p < steps.end; ++p) {
      const int64_t k = p * kPerStep<T>;
      Word<T>* to = packed_a_ + (p - steps.begin) * kStripRows;
      for (int64_t first = rows.begin; first < rows.end; first += kStripRows) {
        const int64_t count = std::min<int64_t>(kStripRows, rows.end - first);
        if (shape_.transpose_a)
          pack_transposed_rows(first, count, k, to);
        else
          pack_rows(first, count, k, to);
        to += strip_words(steps);
      }
      if (shape_.transpose_a) {
        prefetch(a_ + std::min(k + kAhead, shape_.k - 1) * shape_.lda + rows.begin, rows.size());
      }
    }
  }

  void pack_transposed_rows(int64_t first, int64_t count, int64_t k, Word<T>* to) {
    const T* row = a_ + k * shape_.lda + first;
    const T* second = k + 1 < shape_.k ? row + shape_.lda : nullptr;
    if (count == kStripRows)
      join_rows(kStripRows, row, second, to);  // a number that the compiler knows
    else
      join_rows(count, row, second, to);
  }

  void pack_rows(int64_t first, int64_t count, int64_t k, Word<T>* to) {
    for (int64_t i = 0; i < count; ++i) {
      const T* row = a_ + (first + i) * shape_.lda + k;
      to[i] = k + kPerStep<T> <= shape_.k ? load_word(row) : joined<T>(row, nullptr);
    }
  }

  // Asks for elements that will be read soon from rows too far apart for the processor to guess.
  static void prefetch(const T* from, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
  }

  void widen_bias(A* to) {
    wide_bias_ = to;
    std::fill(to, to + panels_ * panel_, A{});
    for (int64_t j = 0; j < columns_.size(); ++j) to[j] = static_cast<A>(bias_[columns_.begin + j]);
  }

  void read_rows(Range rows, const Sums& sums) const {
    for (int64_t i = 0; i < rows.size(); ++i) {
      const Out* from = c_ + (rows.begin + i) * shape_.ldc + columns_.begin;
      A* to = sums.data + i * sums.stride;
      for_columns<A>(columns_.size(),
                     [&](int64_t j, auto use) HWY_ATTR { store(load(from + j, use), to + j, use); });
    }
  }

  void write_rows(Range rows, const Sums& sums) const {
    for (int64_t i = 0; i < rows.size(); ++i) {
      const A* from = sums.data + i * sums.stride;
      Out* to = c_ + (rows.begin + i) * shape_.ldc + columns_.begin;
      for_columns<A>(columns_.size(),
                     [&](int64_t j, auto use) HWY_ATTR { store(load(from + j, use), to + j, use); });
    }
  }

  void multiply_block(Range rows, Range packed, const Sums& sums) {
    for (int64_t first = packed.begin; first < packed.end; first += kBlockSteps) {
      const Range steps{first, std::min(packed.end, first + kBlockSteps)};
      const bool lacks_element = steps.end * kPerStep<T> > shape_.k;
      const bool pack = shape_.transpose_a || lacks_element;
      if (pack) pack_a(rows, steps);
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const Word<T>* b = packed_b_ + panel * panel_words(packed) + (steps.begin - packed.begin) * panel_;
        for (int64_t row = 0; row < rows.size(); row += kStripRows) {
          const int64_t count = std::min<int64_t>(kStripRows, rows.size() - row);
          const StripRows<T> a = pack ? packed_strip(row, steps) : strip_in_place(rows.begin + row, steps);
          add_strip(count, steps, a, reinterpret_cast<const T*>(b), panel, sums.data + row * sums.stride,
                    sums.stride);
        }
      }
    }
  }

  StripRows<T> packed_strip(int64_t row, Range steps) const {
    return {reinterpret_cast<const T*>(packed_a_ + row / kStripRows * strip_words(steps)), kPerStep<T>,
            kStripRows * kPerStep<T>};
  }

  StripRows<T> strip_in_place(int64_t row, Range steps) const {
    return {a_ + row * shape_.lda + steps.begin * kPerStep<T>, shape_.lda, kPerStep<T>};
  }

  void add_strip(int64_t rows, Range steps, const StripRows<T>& a, const T* b, int64_t panel, A* sums,
                 int64_t stride) {
    A* c = sums + panel * panel_;
    const int64_t columns = std::min(panel_, columns_.size() - panel * panel_);
    const int64_t b_stride = panel_ * kPerStep<T>;
    const bool add = steps.begin > 0 || shape_.accumulate;
    const A* start = steps.begin == 0 && bias_ != nullptr ? wide_bias_ + panel * panel_ : nullptr;
    if (waits_ || columns == panel_) {
      multiply_strip<Steps>(rows, steps.size(), a, b, b_stride, start, c, stride, add);
      return;
    }
    HWY_ALIGN A local[kStripRows * 2 * kMaxLanes<A>];
    multiply_strip<Steps>(rows, steps.size(), a, b, b_stride, start, local, panel_, false);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const A sum = local[i * panel_ + j];
        c[i * stride + j] = add ? c[i * stride + j] + sum : sum;
      }
    }
  }

  const GemmShape& shape_;
  Range rows_;
  Range columns_;
  const T* a_;
  const T* b_;
  const Out* bias_;
  Out* c_;
  int64_t panel_;
  int64_t panels_;
  int64_t steps_;
  int64_t packed_steps_;
  Word<T>* packed_b_ = nullptr;
  Word<T>* packed_a_ = nullptr;
  A* waiting_ = nullptr;
  A* wide_bias_ = nullptr;
  bool waits_;
};

void part_f64(const GemmShape& shape, Range rows, Range columns, const double* a, const double* b,
              const double* bias, double* c) {
  ProductPart<FusedSteps<double>, double>(shape, rows, columns, a, b, bias, c).run();
}

void part_f32(const GemmShape& shape, Range rows, Range columns, const float* a, const float* b,
              const float* bias, float* c) {
  ProductPart<FusedSteps<float>, float>(shape, rows, columns, a, b, bias, c).run();
}

template <class Out>
void part_bf16(const GemmShape& shape, Range rows, Range columns, const bf16* a, const bf16* b,
               const Out* bias, Out* c) {
#if NORMFORMER_BF16_STEPS
  if (gemm_has_native_bf16()) return ProductPart<NativeSteps, Out>(shape, rows, columns, a, b, bias, c).run();
#endif
  ProductPart<WidenedSteps, Out>(shape, rows, columns, a, b, bias, c).run();
}

void part_bf16_to_f32(const GemmShape& shape, Range rows, Range columns, const bf16* a, const bf16* b,
                      const float* bias, float* c) {
  part_bf16(shape, rows, columns, a, b, bias, c);
}

void part_bf16_to_bf16(const GemmShape& shape, Range rows, Range columns, const bf16* a, const bf16* b,
                       const bf16* bias, bf16* c) {
  part_bf16(shape, rows, columns, a, b, bias, c);
}

/// A part of a product of f16: blocks of the factors are widened to fp32 and multiplied as such.
template <class Out>
class HalfProductPart {
 public:
  HalfProductPart(const GemmShape& shape, Range rows, Range columns, const f16* a, const f16* b,
                  const Out* bias, Out* c)
      : shape_(shape), rows_(rows), columns_(columns), a_(a), b_(b), bias_(bias), c_(c) {}

  void run() {
    thread_local Scratch wide_bias;
    thread_local Scratch wide_a;
    thread_local Scratch wide_b;
    const Sums sums = place_sums();
    const float* bias = bias_ == nullptr ? nullptr : widen_bias(wide_bias.take<float>(columns_.size()));
    // Blocks of as many steps as fp32 products sum in registers: that is why the bits are theirs.
    for (int64_t first = 0; first < shape_.k; first += kBlockSteps) {
      const Range steps{first, std::min(shape_.k, first + kBlockSteps)};
      const float* b = widen_factor(b_, shape_.ldb, columns_, steps, !shape_.transpose_b, wide_b);
      for (int64_t row = rows_.begin; row < rows_.end; row += kWideRows) {
        const Range block{row, std::min(rows_.end, row + kWideRows)};
        const float* a = widen_factor(a_, shape_.lda, block, steps, shape_.transpose_a, wide_a);
        multiply(block, steps, a, b, bias, sums);
      }
    }
    if constexpr (!std::is_same_v<Out, float>) write_sums(sums);
  }

 private:
  static constexpr int64_t kWideRows = 4 * kBlockRows;

  struct Sums {
    float* data;
    int64_t stride;
  };

  Sums place_sums() const {
    if constexpr (std::is_same_v<Out, float>) {
      return {c_ + rows_.begin * shape_.ldc + columns_.begin, shape_.ldc};
    } else {
      thread_local Scratch sums;
      return {sums.take<float>(rows_.size() * columns_.size()), columns_.size()};
    }
  }

  const float* widen_bias(float* to) const {
    convert_row(bias_ + columns_.begin, columns_.size(), to);
    return to;
  }

  // The elements of a factor's rows (or columns) `outer` along `steps`, as they lie but side by side.
  static const float* widen_factor(const f16* matrix, int64_t stride, Range outer, Range steps,
                                   bool steps_are_rows, Scratch& scratch) {
    const Range rows = steps_are_rows ? steps : outer;
    const Range columns = steps_are_rows ? outer : steps;
    auto* wide = scratch.take<float>(rows.size() * columns.size());
    for (int64_t i = 0; i < rows.size(); ++i) {
      convert_row(matrix + (rows.begin + i) * stride + columns.begin, columns.size(),
                  wide + i * columns.size());
    }
    return wide;
  }

  template <class From, class To>
  static void convert_row(const From* from, int64_t n, To* to) {
    for_columns<float>(n, [&](int64_t j, auto use) HWY_ATTR { store(load(from + j, use), to + j, use); });
  }

  void multiply(Range block, Range steps, const float* a, const float* b, const float* bias,
                const Sums& sums) const {
    const GemmShape wide{.m = block.size(),
                         .n = columns_.size(),
                         .k = steps.size(),
                         .lda = shape_.transpose_a ? block.size() : steps.size(),
                         .ldb = shape_.transpose_b ? steps.size() : columns_.size(),
                         .ldc = sums.stride,
                         .transpose_a = shape_.transpose_a,
                         .transpose_b = shape_.transpose_b,
                         .accumulate = shape_.accumulate || steps.begin > 0};
    ProductPart<FusedSteps<float>, float>(wide, {0, block.size()}, {0, columns_.size()}, a, b,
                                          steps.begin == 0 ? bias : nullptr,
                                          sums.data + (block.begin - rows_.begin) * sums.stride)
        .run();
  }

  void write_sums(const Sums& sums) const {
    for (int64_t i = 0; i < rows_.size(); ++i) {
      convert_row(sums.data + i * sums.stride, columns_.size(),
                  c_ + (rows_.begin + i) * shape_.ldc + columns_.begin);
    }
  }

  const GemmShape& shape_;
  Range rows_;
  Range columns_;
  const f16* a_;
  const f16* b_;
  const Out* bias_;
  Out* c_;
};

void part_f16_to_f32(const GemmShape& shape, Range rows, Range columns, const f16* a, const f16* b,
                     const float* bias, float* c) {
  HalfProductPart<float>(shape, rows, columns, a, b, bias, c).run();
}

void part_f16_to_f16(const GemmShape& shape, Range rows, Range columns, const f16* a, const f16* b,
                     const f16* bias, f16* c) {
  HalfProductPart<f16>(shape, rows, columns, a, b, bias, c).run();
}

bool has_bf16_steps() { return NORMFORMER_BF16_STEPS == 1; }

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(part_f64);
HWY_EXPORT(part_f32);
HWY_EXPORT(part_bf16_to_f32);
HWY_EXPORT(part_bf16_to_bf16);
HWY_EXPORT(part_f16_to_f32);
HWY_EXPORT(part_f16_to_f16);
HWY_EXPORT(has_bf16_steps);
HWY_EXPORT(target_name);

template <>
void gemm_part(const GemmShape& shape, Range rows, Range columns, const double* a, const double* b,
               const double* bias, double* c) {
  HWY_DYNAMIC_DISPATCH(part_f64)(shape, rows, columns, a, b, bias, c);
}

template <>
void gemm_part(const GemmShape& shape, Range rows, Range columns, const float* a, const float* b,
               const float* bias, float* c) {
  HWY_DYNAMIC_DISPATCH(part_f32)(shape, rows, columns, a, b, bias, c);
}

template <>
void gemm_part(const GemmShape& shape, Range rows, Range columns, const bf16* a, const bf16* b,
               const float* bias, float* c) {
  HWY_DYNAMIC_DISPATCH(part_bf16_to_f32)(shape, rows, columns, a, b, bias, c);
}

template <>
void gemm_part(const GemmShape& shape, Range rows, Range columns, const bf16* a, const bf16* b,
               const bf16* bias, bf16* c) {
  HWY_DYNAMIC_DISPATCH(part_bf16_to_bf16)(shape, rows, columns, a, b, bias, c);
}

template <>
void gemm_part(const GemmShape& shape, Range rows, Range columns, const f16* a, const f16* b,
               const float* bias, float* c) {
  HWY_DYNAMIC_DISPATCH(part_f16_to_f32)(shape, rows, columns, a, b, bias, c);
}

template <>
void gemm_part(const GemmShape& shape, Range rows, Range columns, const f16* a, const f16* b, const f16* bias,
               f16* c) {
  HWY_DYNAMIC_DISPATCH(part_f16_to_f16)(shape, rows, columns, a, b, bias, c);
}

std::string gemm_instructions() { return HWY_DYNAMIC_DISPATCH(target_name)(); }

bool gemm_has_native_bf16() {
#if defined(__x86_64__)
  static const bool processor_has = __builtin_cpu_supports("avx512bf16");
  return processor_has && HWY_DYNAMIC_DISPATCH(has_bf16_steps)();
#else
  return false;
#endif
}

}  // namespace normformer::ops::cpu
#endif
