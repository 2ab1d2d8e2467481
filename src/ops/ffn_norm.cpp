#include "normformer/ops/ffn_norm.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

void norm_statistics(Context& context, const Tensor& sums, int64_t features, double eps, const Tensor& mean,
                     const Tensor& rstd) {
  constexpr std::string_view kName = "norm_statistics";
  const int64_t rows = matrix_shape(kName, "sums", sums)[0];
  Arguments arguments(context, kName, sums.dtype());
  arguments.accumulator("sums", sums, {rows, 2});
  arguments.accumulator("mean", mean, {rows});
  arguments.accumulator("rstd", rstd, {rows});
  NF_CHECK(features > 0, "{}: {} features", kName, features);
  context.costs().record(kName, 8 * rows, arguments.bytes());
  if (context.is_meta() || rows == 0) return;
  NF_ON_DEVICE(norm_statistics, context, sums, features, eps, mean, rstd);
}

void fold_norm_weights(Context& context, const Tensor& w2, const Tensor& gamma, const Tensor& beta,
                       const Tensor& c, const Tensor& w_beta) {
  constexpr std::string_view kName = "fold_norm_weights";
  const Shape shape = matrix_shape(kName, "w2", w2);
  Arguments arguments(context, kName, w2.dtype());
  arguments.model("w2", w2, shape);
  arguments.model("gamma", gamma, {shape[1]});
  arguments.model("beta", beta, {shape[1]});
  arguments.accumulator("c", c, {shape[0]});
  arguments.accumulator("w_beta", w_beta, {shape[0]});
  context.costs().record(kName, 4 * w2.numel(), arguments.bytes());
  if (context.is_meta() || shape[0] == 0) return;
  NF_ON_DEVICE(fold_norm_weights, context, w2, gamma, beta, c, w_beta);
}

void unfold_norm(Context& context, const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& c,
                 const Tensor& w_beta, const Tensor& b2, const Tensor& y) {
  constexpr std::string_view kName = "unfold_norm";
  const Shape shape = matrix_shape(kName, "z", z);
  Arguments arguments(context, kName, z.dtype());
  arguments.model("z", z, shape);
  arguments.accumulator("mean", mean, {shape[0]});
  arguments.accumulator("rstd", rstd, {shape[0]});
  arguments.accumulator("c", c, {shape[1]});
  arguments.accumulator("w_beta", w_beta, {shape[1]});
  arguments.model("b2", b2, {shape[1]});
  arguments.model("y", y, shape);
  context.costs().record(kName, 5 * z.numel(), arguments.bytes());
  if (context.is_meta() || z.numel() == 0) return;
  NF_ON_DEVICE(unfold_norm, context, z, mean, rstd, c, w_beta, b2, y);
}

void fold_norm_backward(Context& context, const Tensor& dy, const Tensor& y, const Tensor& mean,
                        const Tensor& rstd, const Tensor& c, const Tensor& w_beta, const Tensor& b2,
                        int64_t features, const Tensor& mean_g, const Tensor& mean_gx,
                        const Tensor& dy_scaled, const Tensor& u, const Tensor& s) {
  constexpr std::string_view kName = "fold_norm_backward";
  const Shape shape = matrix_shape(kName, "dy", dy);
  const Shape column{shape[0]};
  const Shape row{shape[1]};
  const bool with_means = y.defined();
  const bool with_sums = dy_scaled.defined();
  NF_CHECK(with_means || with_sums, "{}: nothing to compute", kName);
  Arguments arguments(context, kName, dy.dtype());
  arguments.model("dy", dy, shape);
  arguments.accumulator("mean", mean, column);
  arguments.accumulator("rstd", rstd, column);
  arguments.accumulator("c", c, row);
  arguments.accumulator("w_beta", w_beta, row);
  arguments.model("b2", b2, row);
  if (with_means) {
    arguments.model("y", y, shape);
    arguments.accumulator("mean_g", mean_g, column);
    arguments.accumulator("mean_gx", mean_gx, column);
  }
  if (with_sums) {
    arguments.model("dy_scaled", dy_scaled, shape);
    arguments.accumulator("u", u, row);
    arguments.accumulator("s", s, row);
  }
  NF_CHECK(features > 0, "{}: {} features", kName, features);
  const int64_t flops = (with_means ? 6 : 0) + (with_sums ? 4 : 0);
  context.costs().record(kName, flops * dy.numel(), arguments.bytes());
  Tensor partials;
  if (with_sums) {
    partials = context.empty({RowBlocks(shape[0]).count, 2 * shape[1]}, accumulator_of(dy.dtype()),
                             MemoryUse::workspace);
  }
  if (context.is_meta()) return;
  if (dy.numel() == 0) {  // written, not added to
    for (const Tensor* sum : {&u, &s}) {
      if (with_sums) fill_zero(context, *sum);
    }
    for (const Tensor* sum : {&mean_g, &mean_gx}) {
      if (with_means) fill_zero(context, *sum);
    }
    return;
  }
  NF_ON_DEVICE(fold_norm_backward, context, dy, y, mean, rstd, c, w_beta, b2, features, mean_g, mean_gx,
               dy_scaled, u, s, partials);
}

void add_fold_correction(Context& context, const Tensor& u, const Tensor& gamma, const Tensor& s,
                         const Tensor& beta, const Tensor& dw) {
  constexpr std::string_view kName = "add_fold_correction";
  const Shape shape = matrix_shape(kName, "dw", dw);
  Arguments arguments(context, kName, gamma.dtype());
  arguments.accumulator("u", u, {shape[0]});
  arguments.model("gamma", gamma, {shape[1]});
  arguments.accumulator("s", s, {shape[0]});
  arguments.model("beta", beta, {shape[1]});
  arguments.accumulator("dw", dw, shape, 2);
  context.costs().record(kName, 4 * dw.numel(), arguments.bytes());
  if (context.is_meta() || dw.numel() == 0) return;
  NF_ON_DEVICE(add_fold_correction, context, u, gamma, s, beta, dw);
}

void normalise(Context& context, const Tensor& h, const Tensor& mean, const Tensor& rstd, const Tensor& gamma,
               const Tensor& beta, const Tensor& out) {
  constexpr std::string_view kName = "normalise";
  const Shape shape = matrix_shape(kName, "h", h);
  Arguments arguments(context, kName, h.dtype());
  arguments.model("h", h, shape);
  arguments.accumulator("mean", mean, {shape[0]});
  arguments.accumulator("rstd", rstd, {shape[0]});
  arguments.model("gamma", gamma, {shape[1]});
  arguments.model("beta", beta, {shape[1]});
  arguments.model("out", out, shape);
  context.costs().record(kName, 4 * h.numel(), arguments.bytes());
  if (context.is_meta() || h.numel() == 0) return;
  NF_ON_DEVICE(normalise, context, h, mean, rstd, gamma, beta, out);
}

void normalise_backward_sums(Context& context, const Tensor& d, const Tensor& h, const Tensor& mean,
                             const Tensor& rstd, const Tensor& gamma, const Tensor& sums) {
  constexpr std::string_view kName = "normalise_backward_sums";
  const Shape shape = matrix_shape(kName, "d", d);
  Arguments arguments(context, kName, d.dtype());
  arguments.model("d", d, shape);
  arguments.model("h", h, shape);
  arguments.accumulator("mean", mean, {shape[0]});
  arguments.accumulator("rstd", rstd, {shape[0]});
  arguments.model("gamma", gamma, {shape[1]});
  arguments.accumulator("sums", sums, {shape[0], 2});
  context.costs().record(kName, 6 * d.numel(), arguments.bytes());
  if (context.is_meta() || shape[0] == 0) return;
  NF_ON_DEVICE(normalise_backward_sums, context, d, h, mean, rstd, gamma, sums);
}

void feature_sums(Context& context, const Tensor& h, const Tensor& sums) {
  constexpr std::string_view kName = "feature_sums";
  const Shape shape = matrix_shape(kName, "h", h);
  Arguments arguments(context, kName, h.dtype());
  arguments.model("h", h, shape);
  arguments.accumulator("sums", sums, {shape[0], 2});
  context.costs().record(kName, 3 * h.numel(), arguments.bytes());
  if (context.is_meta() || shape[0] == 0) return;
  NF_ON_DEVICE(feature_sums, context, h, sums);
}

void normalise_backward(Context& context, const Tensor& d, const Tensor& h, const Tensor& mean,
                        const Tensor& rstd, const Tensor& gamma, const Tensor& means, const Tensor& dh,
                        const Tensor& dgamma, const Tensor& dbeta) {
  constexpr std::string_view kName = "normalise_backward";
  const Shape shape = matrix_shape(kName, "d", d);
  Arguments arguments(context, kName, d.dtype());
  arguments.model("d", d, shape);
  arguments.model("h", h, shape);
  arguments.accumulator("mean", mean, {shape[0]});
  arguments.accumulator("rstd", rstd, {shape[0]});
  arguments.model("gamma", gamma, {shape[1]});
  arguments.accumulator("means", means, {shape[0], 2});
  arguments.model("dh", dh, shape);
  arguments.accumulator("dgamma", dgamma, {shape[1]}, 2);
  arguments.accumulator("dbeta", dbeta, {shape[1]}, 2);
  context.costs().record(kName, 10 * d.numel(), arguments.bytes());
  const Tensor partials = context.empty({RowBlocks(shape[0]).count, 2 * shape[1]}, accumulator_of(d.dtype()),
                                        MemoryUse::workspace);
  if (context.is_meta() || d.numel() == 0) return;
  NF_ON_DEVICE(normalise_backward, context, d, h, mean, rstd, gamma, means, dh, dgamma, dbeta, partials);
}

void split_means(Context& context, const Tensor& sums, int64_t features, const Tensor& mean_g,
                 const Tensor& mean_gx) {
  constexpr std::string_view kName = "split_means";
  const int64_t rows = matrix_shape(kName, "sums", sums)[0];
  Arguments arguments(context, kName, sums.dtype());
  arguments.accumulator("sums", sums, {rows, 2});
  arguments.accumulator("mean_g", mean_g, {rows});
  arguments.accumulator("mean_gx", mean_gx, {rows});
  NF_CHECK(features > 0, "{}: {} features", kName, features);
  context.costs().record(kName, 2 * rows, arguments.bytes());
  if (context.is_meta() || rows == 0) return;
  NF_ON_DEVICE(split_means, context, sums, features, mean_g, mean_gx);
}

}  // namespace normformer::ops
