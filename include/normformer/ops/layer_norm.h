#pragma once

#include "normformer/tensor/context.h"

namespace normformer::ops {

// x, y and their gradients are [N, D] of type T, gamma and beta [D] of T; statistics [N] and gradients of
// gamma and beta are of accumulator_of(T). Biased variance; D is the whole normalised width.

/// y = gamma * (x - mean) * rstd + beta by rows (Ba, Kiros, Hinton 2016), two-pass statistics; keeps mean and
/// rstd.
void layer_norm_forward(Context& context, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                        double eps, const Tensor& y, const Tensor& mean, const Tensor& rstd);

/// dx = residual + d(layer_norm)/dx of dy; dgamma and dbeta are added to. An undefined `residual` counts as
/// zero: it is the gradient that goes around the LayerNorm on the residual stream. dx may be dy or residual.
void layer_norm_backward(Context& context, const Tensor& dy, const Tensor& x, const Tensor& gamma,
                         const Tensor& mean, const Tensor& rstd, const Tensor& residual, const Tensor& dx,
                         const Tensor& dgamma, const Tensor& dbeta);

}  // namespace normformer::ops
