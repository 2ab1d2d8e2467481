#pragma once

#include "normformer/ops/dropout.h"
#include "normformer/tensor/context.h"

namespace normformer::ops {

/// What stands between a sub-layer's last product and the residual stream; undefined tensors mean that a part
/// is absent. branch [N, D] of T is the reduced product without bias.
struct SublayerOutput {
  Tensor bias;        ///< [D] of T, added to the branch
  Tensor head_scale;  ///< [H] of T: scales of H groups of D / H channels (fairseq's head scale)
  Tensor norm_gamma;  ///< [D] of T: LayerNorm after the head scale (post-attention LayerNorm)
  Tensor norm_beta;   ///< [D] of T
  double norm_eps = 1e-5;
  Dropout dropout;        ///< on what is added to the residual
  Tensor residual_scale;  ///< [D] of T: multiplies the residual
};

/// The LayerNorm of a sub-layer's output, which the next sub-layer reads, as layer_norm_forward makes it of
/// the rounded output; an undefined gamma means that there is none.
struct NextNorm {
  Tensor gamma;  ///< [D] of T
  Tensor beta;   ///< [D] of T
  double eps = 1e-5;
  Tensor y;     ///< [N, D] of T: written
  Tensor mean;  ///< [N] of accumulator_of(T): written
  Tensor rstd;  ///< [N] of accumulator_of(T): written
};

/// out = residual_scale * residual + drop(LN(head_scale * (branch + bias))), one pass over rows, rounded
/// once. mean and rstd [N] (accumulator_of(T)) are written where there is a norm; else they may be undefined.
/// out may be residual. The next norm is made in the same pass, to the bits of a call of its own.
void sublayer_output_forward(Context& context, const SublayerOutput& parts, const Tensor& branch,
                             const Tensor& residual, const Tensor& out, const Tensor& mean,
                             const Tensor& rstd, const NextNorm& next = {});

/// Main gradients (accumulator_of(T)) of SublayerOutput's parameters, each added to; defined where the
/// parameter is.
struct SublayerOutputGradients {
  Tensor bias;
  Tensor head_scale;
  Tensor norm_gamma;
  Tensor norm_beta;
  Tensor residual_scale;
};

/// From dout to dbranch and dresidual. branch is as in the forward, and may be undefined
/// where there is neither head_scale nor norm; residual is read only where there is a
/// residual_scale. dbranch may be dout where dresidual is not; where there is no residual_scale, dresidual
/// equals dout and may be undefined (the caller then uses dout). Sums over tokens run in an order that does
/// not depend on the number of threads.
void sublayer_output_backward(Context& context, const SublayerOutput& parts, const Tensor& dout,
                              const Tensor& branch, const Tensor& residual, const Tensor& mean,
                              const Tensor& rstd, const Tensor& dbranch, const Tensor& dresidual,
                              const SublayerOutputGradients& gradients);

}  // namespace normformer::ops
