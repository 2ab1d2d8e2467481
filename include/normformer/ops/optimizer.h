#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "normformer/tensor/context.h"

namespace normformer::ops {

/// One AdamW update's scalars (Loshchilov, Hutter 2019, algorithm 2; decoupled decay).
struct AdamW {
  double lr = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.98;
  double eps = 1e-8;
  double weight_decay = 0.0;
  double grad_factor = 1.0;  ///< multiplies the gradient first: 1 / tokens, clipping, loss scale
  int64_t update = 1;        ///< counts from 1; for the bias corrections
  bool fairseq_eps =
      false;  ///< eps joins sqrt(v) before the bias correction of v, as fairseq's fused Adam does
};

/// Updates flat shards of equal size: master weights, first and second moments and gradient, all of
/// accumulator_of(T); params of T receives the rounded master, and may be undefined or the master itself. The
/// master may be of a T of 16 bits, too: then it is widened, updated in fp32 and rounded once, and params is
/// undefined or the master itself (fairseq's --memory-efficient-fp16).
/// torch form: p -= lr * (wd * p + m_hat / (sqrt(v_hat) + eps)).
void adamw(Context& context, const AdamW& step, const Tensor& gradient, const Tensor& master,
           const Tensor& moment1, const Tensor& moment2, const Tensor& params);

/// The largest |x|; +inf where any element is infinite or not a number; 0 for no elements and on meta.
double absolute_max(Context& context, const Tensor& x);

/// sums[0] += sum of |x|, sums[1] += sum of x^2, for x of f32 or f64, in fp64; the same bits for any number
/// of threads. sums is f64 [2]; a GPU is not waited for.
void add_norm_sums(Context& context, const Tensor& x, const Tensor& sums);

/// A sum of squares that does not depend on the order or grouping of its terms: each term is cut at multiples
/// of powers of two out of one fixed grid, beginning where the largest term asks for it, and the cuts are
/// added exactly (Demmel, Nguyen, "Parallel reproducible summation", IEEE Trans. Comput. 64, 2015). Sums over
/// shards, buckets and ranks therefore have the same bits in every grouping, and nobody needs to know the
/// largest term of all before he adds his own: see add_bins. Absolute error: below 2^-60 of
/// largest^2 for each term, and of fp64 values the rounding of each square.
class OrderFreeSumOfSquares {
 public:
  static constexpr int kBins = 4;
  using Bins = std::array<double, kBins>;

  /// `largest` bounds |x| of every element that will be added. LogicError
  /// unless 0 <= largest < 2^490: above that fp64 has no room for the sum.
  explicit OrderFreeSumOfSquares(double largest);

  /// Adds the squares of x's elements (f32 or f64). At most 2^32 elements over all ranks.
  void add(Context& context, const Tensor& x);

  /// Adds what another sum holds whose `largest` is at most this one's: exact, whatever the order. With the
  /// largest of all, the result has the bits that adding every element here would give.
  void add_bins(double largest, const Bins& bins);

  /// The exact partial sums, of use together with the `largest` that they were made with.
  const Bins& bins() const { return bins_; }

  /// The sum of squares.
  double value() const;

 private:
  int first_ = 0;   // the grid's place of the first bin, counted downwards
  Bins anchors_{};  // 1.5 * 2^k: adding and subtracting one cuts a term at 2^(k - 52)
  Bins bins_{};
};

}  // namespace normformer::ops
