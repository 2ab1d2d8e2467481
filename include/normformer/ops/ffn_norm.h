#pragma once

#include "normformer/tensor/context.h"

namespace normformer::ops {

// LayerNorms whose F_total features are split over ranks: above all the one between the activation and fc2
// (docs/ffn-layernorm.md). N tokens, D residual channels, F this rank's features. T: the model's type, A:
// accumulator_of(T). With h' = gamma * h, z = h' W2^T summed over ranks, c = W2 gamma and e = W2 beta + b2
// (both summed over ranks):
//   fc2(LN(h)) = rstd * z - rstd * mean * c + e.

/// mean[N] and rstd[N] (A) from sums[N, 2] (A): sum of h and of h^2 over all F_total features. A variance
/// that rounding made negative counts as 0.
void norm_statistics(Context& context, const Tensor& sums, int64_t features, double eps, const Tensor& mean,
                     const Tensor& rstd);

/// c[D] = W2[D, F] gamma[F] and w_beta[D] = W2 beta over this rank's features; both A. Once a step for each
/// layer.
void fold_norm_weights(Context& context, const Tensor& w2, const Tensor& gamma, const Tensor& beta,
                       const Tensor& c, const Tensor& w_beta);

/// y = rstd * z - rstd * mean * c + w_beta + b2, rounded once to T; c, w_beta [D] of A, b2 [D] of T. y may be
/// z.
void unfold_norm(Context& context, const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& c,
                 const Tensor& w_beta, const Tensor& b2, const Tensor& y);

/// What the backward of the folded form takes from dy[N, D] and the kept y[N, D]:
///   mean_g[N] = dy . c / F_total, mean_gx[N] = dy . (y - w_beta - b2) / F_total,
///   dy_scaled[N, D] = rstd * dy (T), u[D] = sum over tokens of rstd * mean * dy, s[D] = sum over tokens of
///   dy
/// (u, s, means: A, written). Sums over tokens run in an order that does not depend on the number of threads.
/// The two lines may be had one by one, as where only some tokens' y are here: an undefined y leaves mean_g
/// and mean_gx alone, an undefined dy_scaled u and s.
void fold_norm_backward(Context& context, const Tensor& dy, const Tensor& y, const Tensor& mean,
                        const Tensor& rstd, const Tensor& c, const Tensor& w_beta, const Tensor& b2,
                        int64_t features, const Tensor& mean_g, const Tensor& mean_gx,
                        const Tensor& dy_scaled, const Tensor& u, const Tensor& s);

/// dw[D, F] += s beta^T - u gamma^T: what dW2 = dy_scaled^T h' lacks. dw, u, s of A; gamma, beta of T.
void add_fold_correction(Context& context, const Tensor& u, const Tensor& gamma, const Tensor& s,
                         const Tensor& beta, const Tensor& dw);

/// The plain form: out = gamma * rstd * (h - mean) + beta, [N, F] of T. out may be h.
void normalise(Context& context, const Tensor& h, const Tensor& mean, const Tensor& rstd, const Tensor& gamma,
               const Tensor& beta, const Tensor& out);

/// The plain form's backward sums over this rank's features, sums[N, 2] (A, written): of g = gamma * d and of
/// g * xhat with xhat = rstd * (h - mean).
void normalise_backward_sums(Context& context, const Tensor& d, const Tensor& h, const Tensor& mean,
                             const Tensor& rstd, const Tensor& gamma, const Tensor& sums);

/// sums[N, 2] (A, written): of h[N, F] and of h^2 over this rank's features.
void feature_sums(Context& context, const Tensor& h, const Tensor& sums);

/// The plain form's backward, given means[N, 2] (A) of g = gamma * d and g * xhat over all features:
///   dh = rstd * (g - mean_g - xhat * mean_gx) of T, dgamma[F] += sum over tokens of d * xhat, dbeta[F] += of
///   d (A).
/// dh may be d. The same bits for any number of threads.
void normalise_backward(Context& context, const Tensor& d, const Tensor& h, const Tensor& mean,
                        const Tensor& rstd, const Tensor& gamma, const Tensor& means, const Tensor& dh,
                        const Tensor& dgamma, const Tensor& dbeta);

/// mean_g[N], mean_gx[N] = columns of sums[N, 2] divided by `features`. All of A.
void split_means(Context& context, const Tensor& sums, int64_t features, const Tensor& mean_g,
                 const Tensor& mean_gx);

}  // namespace normformer::ops
