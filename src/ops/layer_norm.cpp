#include "normformer/ops/layer_norm.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

void layer_norm_forward(Context& context, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                        double eps, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  constexpr std::string_view kName = "layer_norm_forward";
  const Shape shape = matrix_shape(kName, "x", x);
  const int64_t rows = shape[0];
  const int64_t columns = shape[1];
  Arguments arguments(context, kName, x.dtype());
  arguments.model("x", x, shape);
  arguments.model("gamma", gamma, {columns});
  arguments.model("beta", beta, {columns});
  arguments.model("y", y, shape);
  arguments.accumulator("mean", mean, {rows});
  arguments.accumulator("rstd", rstd, {rows});
  context.costs().record(kName, 8 * x.numel(), arguments.bytes());
  if (context.is_meta() || x.numel() == 0) return;
  NF_ON_DEVICE(layer_norm_forward, context, x, gamma, beta, eps, y, mean, rstd);
}

void layer_norm_backward(Context& context, const Tensor& dy, const Tensor& x, const Tensor& gamma,
                         const Tensor& mean, const Tensor& rstd, const Tensor& residual, const Tensor& dx,
                         const Tensor& dgamma, const Tensor& dbeta) {
  constexpr std::string_view kName = "layer_norm_backward";
  const Shape shape = matrix_shape(kName, "x", x);
  const int64_t rows = shape[0];
  const int64_t columns = shape[1];
  Arguments arguments(context, kName, x.dtype());
  arguments.model("dy", dy, shape);
  arguments.model("x", x, shape);
  arguments.model("gamma", gamma, {columns});
  arguments.accumulator("mean", mean, {rows});
  arguments.accumulator("rstd", rstd, {rows});
  if (residual) arguments.model("residual", residual, shape);
  arguments.model("dx", dx, shape);
  arguments.accumulator("dgamma", dgamma, {columns}, 2);
  arguments.accumulator("dbeta", dbeta, {columns}, 2);
  context.costs().record(kName, 14 * x.numel(), arguments.bytes());
  const Tensor partials =
      context.empty({RowBlocks(rows).count, 2 * columns}, accumulator_of(x.dtype()), MemoryUse::workspace);
  if (context.is_meta() || x.numel() == 0) return;
  NF_ON_DEVICE(layer_norm_backward, context, dy, x, gamma, mean, rstd, residual, dx, dgamma, dbeta, partials);
}

}  // namespace normformer::ops
