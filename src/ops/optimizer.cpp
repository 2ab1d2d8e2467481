#include "normformer/ops/optimizer.h"

#include <algorithm>
#include <cmath>

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

void adamw(Context& context, const AdamW& step, const Tensor& gradient, const Tensor& master,
           const Tensor& moment1, const Tensor& moment2, const Tensor& params) {
  constexpr std::string_view kName = "adamw";
  NF_CHECK(master.defined(), "{}: master is undefined", kName);
  const Shape shape{master.numel()};
  Arguments arguments(context, kName, params ? params.dtype() : master.dtype());
  arguments.accumulator("gradient", gradient, shape);
  if (is_16_bit(master.dtype())) {
    arguments.model("master", master, shape, 2);
    NF_CHECK(!params || context.is_meta() || params.raw() == master.raw(),
             "{}: params beside a master of their own type", kName);
  } else {
    arguments.accumulator("master", master, shape, 2);
  }
  arguments.accumulator("moment1", moment1, shape, 2);
  arguments.accumulator("moment2", moment2, shape, 2);
  if (params) arguments.model("params", params, shape);
  NF_CHECK(step.update >= 1, "{}: update {} of updates that count from 1", kName, step.update);
  context.costs().record(kName, 18 * master.numel(), arguments.bytes());
  if (context.is_meta() || master.numel() == 0) return;
  NF_ON_DEVICE(adamw, context, step, gradient, master, moment1, moment2, params);
}

double absolute_max(Context& context, const Tensor& x) {
  constexpr std::string_view kName = "absolute_max";
  NF_CHECK(x.defined(), "{}: x is undefined", kName);
  Arguments arguments(context, kName, x.dtype());
  arguments.model("x", x, x.shape());
  context.costs().record(kName, x.numel(), arguments.bytes());
  if (context.is_meta() || x.numel() == 0) return 0.0;
  return NF_ON_DEVICE(absolute_max, context, x);
}

void add_norm_sums(Context& context, const Tensor& x, const Tensor& sums) {
  constexpr std::string_view kName = "add_norm_sums";
  NF_CHECK(x.defined(), "{}: x is undefined", kName);
  Arguments arguments(context, kName, x.dtype());
  arguments.accumulator("x", x, x.shape());
  arguments.check("sums", sums, {2}, DType::f64, 2);
  context.costs().record(kName, 3 * x.numel(), arguments.bytes());
  if (context.is_meta() || x.numel() == 0) return;
  NF_ON_DEVICE(add_norm_sums, context, x, sums);
}

namespace {

// With 2^32 terms every sum of cuts at 2^(k - 52) stays below 2^(k + 1) where the terms are below 2^(k - 32):
// it is a multiple of 2^(k - 52) that fits the 53 bits of a double, so adding is exact. What a cut leaves is
// at most half of 2^(k - 52), which gives the next k: 2^(k' - 32) = 2^(k - 53).
constexpr int kTermBits = 32;
constexpr int kCut = 53 - kTermBits;
constexpr int kMostExponent = 490;
constexpr int kTop = 2 * kMostExponent + kTermBits;  // the grid's highest k
constexpr int kLeast = -1022;                        // cuts at the smallest subnormal number: nothing is left

// k of the grid's places: a sum that begins further down cuts its terms as one that begins higher up does,
// since the cuts in between are 0.
double anchor_at(int place) { return std::ldexp(1.5, std::max(kLeast, kTop - place * kCut)); }

// The lowest place whose terms may be as large as largest^2.
int first_place(double largest) {
  constexpr int kLast = (kTop - kLeast) / kCut + 1;
  if (largest == 0.0) return kLast;
  int exponent = 0;
  std::frexp(largest, &exponent);  // largest^2 < 2^(2 exponent)
  return std::min(kLast, (kTop - kTermBits - 2 * exponent) / kCut);
}

}  // namespace

OrderFreeSumOfSquares::OrderFreeSumOfSquares(double largest) {
  NF_CHECK(largest >= 0.0 && largest < std::ldexp(1.0, kMostExponent),
           "squares of numbers up to {} cannot be summed", largest);
  first_ = first_place(largest);
  for (int b = 0; b < kBins; ++b) anchors_[static_cast<size_t>(b)] = anchor_at(first_ + b);
}

void OrderFreeSumOfSquares::add(Context& context, const Tensor& x) {
  constexpr std::string_view kName = "sum_of_squares";
  NF_CHECK(x.defined(), "{}: x is undefined", kName);
  Arguments arguments(context, kName, x.dtype());
  arguments.accumulator("x", x, x.shape());
  context.costs().record(kName, 2 * x.numel(), arguments.bytes());
  if (context.is_meta() || x.numel() == 0) return;
  NF_ON_DEVICE(add_cut_squares, context, x, anchors_, bins_);
}

void OrderFreeSumOfSquares::add_bins(double largest, const Bins& bins) {
  const int first = first_place(largest);
  NF_CHECK(first >= first_, "bins of numbers up to {} do not fit", largest);
  for (int b = first - first_; b < kBins; ++b)
    bins_[static_cast<size_t>(b)] += bins[static_cast<size_t>(b - (first - first_))];
}

double OrderFreeSumOfSquares::value() const {
  double sum = 0.0;
  for (size_t b = kBins; b-- > 0;) sum += bins_[b];
  return sum;
}

}  // namespace normformer::ops
