#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/cross_entropy.cpp"
#include <algorithm>
#include <cmath>
#include <limits>

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "normformer/tensor/dispatch.h"

#include "ops/cpu/dispatch_accumulator.h"
#include "ops/cpu/lanes-inl.h"
#include "ops/cpu/math-inl.h"
#include "ops/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

template <class T, class A = Accumulator<T>>
A max_of_row(int64_t columns, const T* row) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(Tag<A>()));
  auto m0 = set<A>(-std::numeric_limits<A>::infinity());
  auto m1 = m0;
  auto m2 = m0;
  auto m3 = m0;
  int64_t c = 0;
  for (; c + 4 * lanes <= columns; c += 4 * lanes) {
    m0 = hn::Max(m0, load(row + c, Whole{}));
    m1 = hn::Max(m1, load(row + c + lanes, Whole{}));
    m2 = hn::Max(m2, load(row + c + 2 * lanes, Whole{}));
    m3 = hn::Max(m3, load(row + c + 3 * lanes, Whole{}));
  }
  const auto m = hn::Max(hn::Max(m0, m1), hn::Max(m2, m3));
  A largest = hn::GetLane(hn::MaxOfLanes(Tag<A>(), m));
  for (; c < columns; ++c) largest = std::max(largest, static_cast<A>(row[c]));
  return largest;
}

void logits_max_rows(const Tensor& logits, const Tensor& maxima, Range rows) {
  const int64_t columns = logits.dim(1);
  dispatch_floating(logits.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      maxima.data<A>()[r] = max_of_row<T>(columns, logits.data<T>() + r * columns);
    }
  });
}

void logits_sums_rows(const Tensor& logits, const Tensor& maxima, const Tensor& targets, int64_t first_row,
                      const Tensor& sums, Range rows) {
  const int64_t columns = logits.dim(1);
  dispatch_floating(logits.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* row = logits.data<T>() + r * columns;
      const A maximum = maxima.data<A>()[r];
      const auto maximum_lanes = set<A>(maximum);
      A* out = sums.data<A>() + 2 * r;
      out[0] = sum_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR {
        return only_used(exp_nonpositive(hn::Sub(load_ahead(row + c, use), maximum_lanes)), use);
      });
      const int64_t target = targets.data<int32_t>()[r] - first_row;
      out[1] = target >= 0 && target < columns ? static_cast<A>(row[target]) - maximum : A(0);
    }
  });
}

/// weight: what multiplies softmax - onehot; target outside of [0, columns): held by another rank.
template <class T, class A = Accumulator<T>>
void backward_row(int64_t columns, T* row, A maximum, A sum, int64_t target, A weight) {
  const auto maximum_lanes = set<A>(maximum);
  const auto scale = set<A>(weight / sum);
  const auto gradient = [&](int64_t c, auto use) HWY_ATTR {
    return hn::Mul(exp_nonpositive(hn::Sub(load_ahead(row + c, use), maximum_lanes)), scale);
  };
  // Before the row is overwritten, so that the target's gradient is rounded only once.
  const bool here = target >= 0 && target < columns;
  const A at_target = here ? hn::GetLane(gradient(target, Part{1})) - weight : A(0);
  for_columns<A>(columns, [&](int64_t c, auto use) HWY_ATTR { store(gradient(c, use), row + c, use); });
  if (here) row[target] = T(at_target);
}

void cross_entropy_backward_rows(const Tensor& logits, const Tensor& maxima, const Tensor& sums,
                                 const Tensor& targets, int64_t first_row, const Tensor& weights,
                                 double factor, Range rows) {
  const int64_t columns = logits.dim(1);
  dispatch_floating(logits.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      T* row = logits.data<T>() + r * columns;
      if (weights && weights.data<uint8_t>()[r] == 0) {
        std::fill_n(row, columns, T{});
        continue;
      }
      backward_row<T>(columns, row, maxima.data<A>()[r], sums.data<A>()[2 * r],
                      targets.data<int32_t>()[r] - first_row, A(factor));
    }
  });
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

namespace {

template <class T, class A = Accumulator<T>>
A minus_id_of_first(int64_t columns, const T* row, A maximum, int64_t first_row) {
  const T* found = std::find_if(row, row + columns, [&](T x) { return static_cast<A>(x) == maximum; });
  return found == row + columns ? -std::numeric_limits<A>::infinity()
                                : -static_cast<A>(first_row + (found - row));
}

}  // namespace

HWY_EXPORT(logits_max_rows);
HWY_EXPORT(logits_sums_rows);
HWY_EXPORT(cross_entropy_backward_rows);

void logits_max(Context& context, const Tensor& logits, const Tensor& maxima) {
  context.threads().parallel_for(logits.dim(0), row_grain(logits.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(logits_max_rows)(logits, maxima, Range{begin, end});
  });
}

void logits_first_max(Context& context, const Tensor& logits, const Tensor& maxima, int64_t first_row,
                      const Tensor& ids) {
  const int64_t columns = logits.dim(1);
  dispatch_floating(logits.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    context.threads().parallel_for(logits.dim(0), row_grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        ids.data<A>()[r] =
            minus_id_of_first<T>(columns, logits.data<T>() + r * columns, maxima.data<A>()[r], first_row);
      }
    });
  });
}

void logits_sums(Context& context, const Tensor& logits, const Tensor& maxima, const Tensor& targets,
                 int64_t first_row, const Tensor& sums) {
  context.threads().parallel_for(logits.dim(0), row_grain(logits.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(logits_sums_rows)(logits, maxima, targets, first_row, sums, Range{begin, end});
  });
}

void cross_entropy(Context& context, const Tensor& sums, const Tensor& nll) {
  dispatch_accumulator(sums.dtype(), [&]<class A>() {
    const A* in = sums.data<A>();
    A* out = nll.data<A>();
    constexpr int64_t kRows = 1024;
    context.threads().parallel_for(sums.dim(0), kRows, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) out[r] = std::log(in[2 * r]) - in[2 * r + 1];
    });
  });
}

double weighted_sum(Context&, const Tensor& values, const Tensor& weights) {
  double total = 0.0;
  dispatch_accumulator(values.dtype(), [&]<class A>() {
    const A* in = values.data<A>();
    const uint8_t* counts = weights ? weights.data<uint8_t>() : nullptr;
    for (int64_t n = 0; n < values.numel(); ++n) {
      if (counts == nullptr || counts[n] != 0) total += static_cast<double>(in[n]);
    }
  });
  return total;
}

void cross_entropy_backward(Context& context, const Tensor& logits, const Tensor& maxima, const Tensor& sums,
                            const Tensor& targets, int64_t first_row, const Tensor& weights, double factor) {
  context.threads().parallel_for(logits.dim(0), row_grain(logits.dim(1)), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(cross_entropy_backward_rows)
    (logits, maxima, sums, targets, first_row, weights, factor, Range{begin, end});
  });
}

}  // namespace normformer::ops::cpu
#endif
