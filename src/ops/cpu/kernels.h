#pragma once

#include "normformer/ops/activation.h"
#include "normformer/ops/optimizer.h"
#include "normformer/ops/sublayer.h"
#include "normformer/tensor/context.h"

#include "ops/row_blocks.h"

// The CPU side of the operations of normformer/ops: the same arguments, already checked and accounted for.
// `partials` is workspace of accumulator_of(T), [RowBlocks(rows).count, what the kernel says].

namespace normformer::ops::cpu {

void layer_norm_forward(Context& context, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                        double eps, const Tensor& y, const Tensor& mean, const Tensor& rstd);

/// partials: [blocks, 2 D]
void layer_norm_backward(Context& context, const Tensor& dy, const Tensor& x, const Tensor& gamma,
                         const Tensor& mean, const Tensor& rstd, const Tensor& residual, const Tensor& dx,
                         const Tensor& dgamma, const Tensor& dbeta, const Tensor& partials);

void activation_forward(Context& context, ActivationKind kind, const Tensor& z, const Tensor& bias,
                        const Dropout& dropout, const Tensor& gamma, const Tensor& out, const Tensor& sums);

/// partials: [blocks, 3 F] with a norm, else [blocks, F]
void activation_backward(Context& context, ActivationKind kind, const Tensor& d, const Tensor& z,
                         const Tensor& bias, const Dropout& dropout, const NormOfActivation* norm,
                         const Tensor& dz, const Tensor& dbias, const Tensor& partials);

void norm_statistics(Context& context, const Tensor& sums, int64_t features, double eps, const Tensor& mean,
                     const Tensor& rstd);

void fold_norm_weights(Context& context, const Tensor& w2, const Tensor& gamma, const Tensor& beta,
                       const Tensor& c, const Tensor& w_beta);

void unfold_norm(Context& context, const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& c,
                 const Tensor& w_beta, const Tensor& b2, const Tensor& y);

/// partials: [blocks, 2 D]
void fold_norm_backward(Context& context, const Tensor& dy, const Tensor& y, const Tensor& mean,
                        const Tensor& rstd, const Tensor& c, const Tensor& w_beta, const Tensor& b2,
                        int64_t features, const Tensor& mean_g, const Tensor& mean_gx,
                        const Tensor& dy_scaled, const Tensor& u, const Tensor& s, const Tensor& partials);

void add_fold_correction(Context& context, const Tensor& u, const Tensor& gamma, const Tensor& s,
                         const Tensor& beta, const Tensor& dw);

void normalise(Context& context, const Tensor& h, const Tensor& mean, const Tensor& rstd, const Tensor& gamma,
               const Tensor& beta, const Tensor& out);

void normalise_backward_sums(Context& context, const Tensor& d, const Tensor& h, const Tensor& mean,
                             const Tensor& rstd, const Tensor& gamma, const Tensor& sums);

void split_means(Context& context, const Tensor& sums, int64_t features, const Tensor& mean_g,
                 const Tensor& mean_gx);

void head_scale_forward(Context& context, const Tensor& x, const Tensor& scales, const Tensor& y);

/// partials: [blocks, H S]
void head_scale_backward(Context& context, const Tensor& dy, const Tensor& x, const Tensor& scales,
                         const Tensor& dx, const Tensor& dscales, const Tensor& partials);

void sublayer_output_forward(Context& context, const SublayerOutput& parts, const Tensor& branch,
                             const Tensor& residual, const Tensor& out, const Tensor& mean,
                             const Tensor& rstd);

/// partials: [blocks, (number of defined gradients) D]; undefined where there are none
void sublayer_output_backward(Context& context, const SublayerOutput& parts, const Tensor& dout,
                              const Tensor& branch, const Tensor& residual, const Tensor& mean,
                              const Tensor& rstd, const Tensor& dbranch, const Tensor& dresidual,
                              const SublayerOutputGradients& gradients, const Tensor& partials);

void embedding_forward(Context& context, const Tensor& tokens, const Tensor& weight, int64_t first_row,
                       const Tensor& out);

void embedding_backward(Context& context, const Tensor& tokens, const Tensor& dout, double factor,
                        int64_t first_row, const Tensor& dweight);

void add_positions_forward(Context& context, const Tensor& embedded, double factor, const Tensor& positions,
                           const Dropout& dropout, const Tensor& out);

void add_positions_backward(Context& context, const Tensor& dout, int64_t length, const Dropout& dropout,
                            const Tensor& dsum, const Tensor& dpositions);

void logits_max(Context& context, const Tensor& logits, const Tensor& maxima);

void logits_sums(Context& context, const Tensor& logits, const Tensor& maxima, const Tensor& targets,
                 int64_t first_row, const Tensor& sums);

void cross_entropy_backward(Context& context, const Tensor& logits, const Tensor& maxima, const Tensor& sums,
                            const Tensor& targets, int64_t first_row, const Tensor& weights, double factor);

void adamw(Context& context, const AdamW& step, const Tensor& gradient, const Tensor& master,
           const Tensor& moment1, const Tensor& moment2, const Tensor& params);

double absolute_max(Context& context, const Tensor& x);

/// bins[b] += the cuts of x's squares at anchors[b].
void add_cut_squares(Context& context, const Tensor& x,
                     const std::array<double, OrderFreeSumOfSquares::kBins>& anchors,
                     std::array<double, OrderFreeSumOfSquares::kBins>& bins);

}  // namespace normformer::ops::cpu
