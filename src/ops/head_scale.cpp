#include "normformer/ops/head_scale.h"

#include "ops/checks.h"
#include "ops/kernels.h"

namespace normformer::ops {

void head_scale_forward(Context& context, const Tensor& x, const Tensor& scales, const Tensor& y) {
  constexpr std::string_view kName = "head_scale_forward";
  const Shape shape = matrix_shape(kName, "x", x);
  Arguments arguments(context, kName, x.dtype());
  arguments.model("x", x, shape);
  check_heads(kName, scales, shape[1]);
  arguments.model("scales", scales, {scales.numel()});
  arguments.model("y", y, shape);
  context.costs().record(kName, x.numel(), arguments.bytes());
  if (context.is_meta() || x.numel() == 0) return;
  NF_ON_DEVICE(head_scale_forward, context, x, scales, y);
}

void head_scale_backward(Context& context, const Tensor& dy, const Tensor& x, const Tensor& scales,
                         const Tensor& dx, const Tensor& dscales) {
  constexpr std::string_view kName = "head_scale_backward";
  const Shape shape = matrix_shape(kName, "x", x);
  Arguments arguments(context, kName, x.dtype());
  arguments.model("dy", dy, shape);
  arguments.model("x", x, shape);
  check_heads(kName, scales, shape[1]);
  arguments.model("scales", scales, {scales.numel()});
  arguments.model("dx", dx, shape);
  arguments.accumulator("dscales", dscales, {scales.numel()}, 2);
  context.costs().record(kName, 3 * x.numel(), arguments.bytes());
  const Tensor partials =
      context.empty({RowBlocks(shape[0]).count, shape[1]}, accumulator_of(x.dtype()), MemoryUse::workspace);
  if (context.is_meta() || x.numel() == 0) return;
  NF_ON_DEVICE(head_scale_backward, context, dy, x, scales, dx, dscales, partials);
}

}  // namespace normformer::ops
