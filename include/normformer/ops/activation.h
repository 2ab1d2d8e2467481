#pragma once

#include "normformer/ops/dropout.h"
#include "normformer/tensor/context.h"

namespace normformer::ops {

/// gelu: x * (1 + erf(x / sqrt 2)) / 2. gelu_tanh: its tanh approximation (Hendrycks, Gimpel 2016).
/// relu_squared: max(x, 0)^2. tanh: of a classifier's head.
enum class ActivationKind { gelu, gelu_tanh, relu_squared, tanh };

// z is fc1's product without its bias, [N, F] of type T over this rank's F features; bias, gamma, beta [F] of
// T. Statistics and gradients of parameters are of accumulator_of(T). h below is drop(act(z + bias)).

/// out = h, or gamma * h where gamma is defined. Where `sums` [N, 2] is defined it receives, by row, the sum
/// of h and the sum of h^2 over this rank's features, taken before rounding. out may be z where nothing will
/// need z again.
void activation_forward(Context& context, ActivationKind kind, const Tensor& z, const Tensor& bias,
                        const Dropout& dropout, const Tensor& gamma, const Tensor& out, const Tensor& sums);

/// A LayerNorm over features that are split over ranks, as its backward needs it: LN(h) = gamma * xhat + beta
/// with xhat = rstd * (h - mean) over ALL ranks' features.
struct NormOfActivation {
  Tensor gamma;    ///< [F] of T
  Tensor mean;     ///< [N]
  Tensor rstd;     ///< [N]
  Tensor mean_g;   ///< [N]: mean over all ranks' features of g = gamma * dnormed
  Tensor mean_gx;  ///< [N]: mean over all ranks' features of g * xhat
  Tensor dgamma;   ///< [F], added to
  Tensor dbeta;    ///< [F], added to
};

/// From the gradient d of what followed h to the gradient of z; dbias[F] is added to. dz may be d.
/// Without a norm d is dh. With one, d is the gradient of LN(h), and
/// dh = rstd * (gamma * d - mean_g - xhat * mean_gx). h is computed anew from z. `norm` null means none.
void activation_backward(Context& context, ActivationKind kind, const Tensor& d, const Tensor& z,
                         const Tensor& bias, const Dropout& dropout, const NormOfActivation* norm,
                         const Tensor& dz, const Tensor& dbias);

}  // namespace normformer::ops
