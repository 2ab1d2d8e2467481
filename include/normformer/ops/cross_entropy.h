#pragma once

#include "normformer/tensor/context.h"

namespace normformer::ops {

// Softmax cross-entropy over a vocabulary whose rows are split over ranks, in three local steps with a
// reduction between each (Shoeybi et al. 2019, section 3). logits: [N, V] of T over rows [first_row,
// first_row + V) of the vocabulary; targets: i32 [N], ids of the whole vocabulary; everything else is of
// accumulator_of(T).

/// maxima[N] = the largest logit of each row of this rank.
void logits_max(Context& context, const Tensor& logits, const Tensor& maxima);

/// ids[N]: of each row, minus the id of the first of this rank's columns whose logit equals maxima[n], which
/// are over all ranks, or minus infinity where there is none. The maximum over all ranks is minus the id of
/// the likeliest token, the first of equals. Exact for vocabularies below 2^24.
void logits_first_max(Context& context, const Tensor& logits, const Tensor& maxima, int64_t first_row,
                      const Tensor& ids);

/// sums[N, 2]: the sum of exp(logit - maximum) over this rank's columns; the target's logit - maximum where
/// this rank holds the target, else 0. maxima are over all ranks.
void logits_sums(Context& context, const Tensor& logits, const Tensor& maxima, const Tensor& targets,
                 int64_t first_row, const Tensor& sums);

/// nll[N] = log(sums[:, 0]) - sums[:, 1], with sums over all ranks: -log p(target).
void cross_entropy(Context& context, const Tensor& sums, const Tensor& nll);

/// logits become their own gradient: weight * factor * (softmax - onehot(target)). `weights` u8 [N], where
/// defined, is 1 for tokens that count and 0 for the others.
void cross_entropy_backward(Context& context, const Tensor& logits, const Tensor& maxima, const Tensor& sums,
                            const Tensor& targets, int64_t first_row, const Tensor& weights, double factor);

/// The sum of values[N] over tokens that count (all where `weights` is undefined), added in fp64 in the order
/// of tokens. 0 on meta.
double weighted_sum(Context& context, const Tensor& values, const Tensor& weights);

}  // namespace normformer::ops
