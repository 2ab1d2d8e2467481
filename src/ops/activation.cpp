#include "normformer/ops/activation.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

void activation_forward(Context& context, ActivationKind kind, const Tensor& z, const Tensor& bias,
                        const Dropout& dropout, const Tensor& gamma, const Tensor& out, const Tensor& sums) {
  constexpr std::string_view kName = "activation_forward";
  const Shape shape = matrix_shape(kName, "z", z);
  Arguments arguments(context, kName, z.dtype());
  arguments.model("z", z, shape);
  arguments.model("bias", bias, {shape[1]});
  if (gamma) arguments.model("gamma", gamma, {shape[1]});
  arguments.model("out", out, shape);
  if (sums) arguments.accumulator("sums", sums, {shape[0], 2});
  check_dropout(kName, dropout);
  context.costs().record(kName, 20 * z.numel(), arguments.bytes());
  if (context.is_meta() || shape[0] == 0) return;
  NF_ON_DEVICE(activation_forward, context, kind, z, bias, dropout, gamma, out, sums);
}

void activation_backward(Context& context, ActivationKind kind, const Tensor& d, const Tensor& z,
                         const Tensor& bias, const Dropout& dropout, const NormOfActivation* norm,
                         const Tensor& dz, const Tensor& dbias) {
  constexpr std::string_view kName = "activation_backward";
  const Shape shape = matrix_shape(kName, "z", z);
  const Shape row{shape[1]};
  const Shape column{shape[0]};
  Arguments arguments(context, kName, z.dtype());
  arguments.model("d", d, shape);
  arguments.model("z", z, shape);
  arguments.model("bias", bias, row);
  arguments.model("dz", dz, shape);
  arguments.accumulator("dbias", dbias, row, 2);
  if (norm != nullptr) {
    arguments.model("gamma", norm->gamma, row);
    arguments.accumulator("mean", norm->mean, column);
    arguments.accumulator("rstd", norm->rstd, column);
    arguments.accumulator("mean_g", norm->mean_g, column);
    arguments.accumulator("mean_gx", norm->mean_gx, column);
    arguments.accumulator("dgamma", norm->dgamma, row, 2);
    arguments.accumulator("dbeta", norm->dbeta, row, 2);
  }
  check_dropout(kName, dropout);
  context.costs().record(kName, (norm == nullptr ? 24 : 34) * z.numel(), arguments.bytes());
  const int64_t sums = norm == nullptr ? 1 : 3;
  const Tensor partials = context.empty({RowBlocks(shape[0]).count, sums * shape[1]},
                                        accumulator_of(z.dtype()), MemoryUse::workspace);
  if (context.is_meta() || z.numel() == 0) return;
  NF_ON_DEVICE(activation_backward, context, kind, d, z, bias, dropout, norm, dz, dbias, partials);
}

}  // namespace normformer::ops
