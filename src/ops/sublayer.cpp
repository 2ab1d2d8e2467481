#include "normformer/ops/sublayer.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

namespace {

void check_parts(std::string_view operation, Arguments& arguments, const SublayerOutput& parts,
                 int64_t columns) {
  if (parts.bias) arguments.model("bias", parts.bias, {columns});
  if (parts.head_scale) {
    check_heads(operation, parts.head_scale, columns);
    arguments.model("head_scale", parts.head_scale, {parts.head_scale.numel()});
  }
  NF_CHECK(parts.norm_gamma.defined() == parts.norm_beta.defined(),
           "{}: norm_gamma and norm_beta come together", operation);
  if (parts.norm_gamma) {
    arguments.model("norm_gamma", parts.norm_gamma, {columns});
    arguments.model("norm_beta", parts.norm_beta, {columns});
  }
  if (parts.residual_scale) arguments.model("residual_scale", parts.residual_scale, {columns});
  check_dropout(operation, parts.dropout);
}

/// Checks the gradient of one parameter: there where the parameter is. Returns 1 where there is one.
int check_gradient(std::string_view operation, Arguments& arguments, std::string_view name,
                   const Tensor& parameter, const Tensor& gradient) {
  NF_CHECK(parameter.defined() == gradient.defined(), "{}: {} and its gradient come together", operation,
           name);
  if (!parameter) return 0;
  arguments.accumulator(name, gradient, parameter.shape(), 2);
  return 1;
}

void check_next_norm(Arguments& arguments, const NextNorm& next, const Shape& shape) {
  arguments.model("next gamma", next.gamma, {shape[1]});
  arguments.model("next beta", next.beta, {shape[1]});
  arguments.model("next y", next.y, shape);
  arguments.accumulator("next mean", next.mean, {shape[0]});
  arguments.accumulator("next rstd", next.rstd, {shape[0]});
}

}  // namespace

void sublayer_output_forward(Context& context, const SublayerOutput& parts, const Tensor& branch,
                             const Tensor& residual, const Tensor& out, const Tensor& mean,
                             const Tensor& rstd, const NextNorm& next) {
  constexpr std::string_view kName = "sublayer_output_forward";
  const Shape shape = matrix_shape(kName, "branch", branch);
  Arguments arguments(context, kName, branch.dtype());
  arguments.model("branch", branch, shape);
  arguments.model("residual", residual, shape);
  arguments.model("out", out, shape);
  check_parts(kName, arguments, parts, shape[1]);
  if (parts.norm_gamma) {
    arguments.accumulator("mean", mean, {shape[0]});
    arguments.accumulator("rstd", rstd, {shape[0]});
  }
  if (next.gamma) check_next_norm(arguments, next, shape);
  const int64_t flops = (parts.norm_gamma ? 12 : 4) + (next.gamma ? 8 : 0);
  context.costs().record(kName, flops * branch.numel(), arguments.bytes());
  if (context.is_meta() || branch.numel() == 0) return;
  NF_ON_DEVICE(sublayer_output_forward, context, parts, branch, residual, out, mean, rstd, next);
}

void sublayer_output_backward(Context& context, const SublayerOutput& parts, const Tensor& dout,
                              const Tensor& branch, const Tensor& residual, const Tensor& mean,
                              const Tensor& rstd, const Tensor& dbranch, const Tensor& dresidual,
                              const SublayerOutputGradients& gradients) {
  constexpr std::string_view kName = "sublayer_output_backward";
  const Shape shape = matrix_shape(kName, "dout", dout);
  Arguments arguments(context, kName, dout.dtype());
  arguments.model("dout", dout, shape);
  if (parts.norm_gamma || parts.head_scale) arguments.model("branch", branch, shape);
  if (parts.residual_scale) arguments.model("residual", residual, shape);
  arguments.model("dbranch", dbranch, shape);
  NF_CHECK(dresidual.defined() || !parts.residual_scale,
           "{}: dresidual is undefined though the residual is scaled", kName);
  if (dresidual) arguments.model("dresidual", dresidual, shape);
  check_parts(kName, arguments, parts, shape[1]);
  if (parts.norm_gamma) {
    arguments.accumulator("mean", mean, {shape[0]});
    arguments.accumulator("rstd", rstd, {shape[0]});
  }
  const int sums =
      check_gradient(kName, arguments, "bias", parts.bias, gradients.bias) +
      check_gradient(kName, arguments, "head_scale", parts.head_scale, gradients.head_scale) +
      check_gradient(kName, arguments, "norm_gamma", parts.norm_gamma, gradients.norm_gamma) +
      check_gradient(kName, arguments, "norm_beta", parts.norm_beta, gradients.norm_beta) +
      check_gradient(kName, arguments, "residual_scale", parts.residual_scale, gradients.residual_scale);
  context.costs().record(kName, (parts.norm_gamma ? 18 : 6) * dout.numel(), arguments.bytes());
  Tensor partials;
  if (sums > 0) {
    partials = context.empty({RowBlocks(shape[0]).count, sums * shape[1]}, accumulator_of(dout.dtype()),
                             MemoryUse::workspace);
  }
  if (context.is_meta() || dout.numel() == 0) return;
  NF_ON_DEVICE(sublayer_output_backward, context, parts, dout, branch, residual, mean, rstd, dbranch,
               dresidual, gradients, partials);
}

}  // namespace normformer::ops
