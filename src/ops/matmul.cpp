#include "normformer/ops/matmul.h"

#include "normformer/core/checked.h"
#include "normformer/tensor/dispatch.h"

#include "ops/checks.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/onednn.h"
#include "ops/kernels.h"

namespace normformer::ops {

namespace {

int64_t product_flops(int64_t n, int64_t k, int64_t m) { return checked_mul(2 * n, checked_mul(k, m)); }

}  // namespace

void linear_forward(Context& context, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  constexpr std::string_view kName = "linear_forward";
  const int64_t n = matrix_shape(kName, "x", x)[0];
  const int64_t k = x.dim(1);
  const int64_t m = matrix_shape(kName, "w", w)[0];
  Arguments arguments(context, kName, x.dtype());
  arguments.model("x", x, {n, k});
  arguments.model("w", w, {m, k});
  arguments.model("y", y, {n, m});
  if (bias) arguments.model("bias", bias, {m});
  context.costs().record(kName, product_flops(n, k, m), arguments.bytes());
  if (context.is_meta()) return;
  NF_ON_DEVICE(linear_forward, context, x, w, bias, y);
}

void linear_backward_input(Context& context, const Tensor& dy, const Tensor& w, const Tensor& dx) {
  constexpr std::string_view kName = "linear_backward_input";
  const int64_t n = matrix_shape(kName, "dy", dy)[0];
  const int64_t m = dy.dim(1);
  const int64_t k = matrix_shape(kName, "w", w)[1];
  Arguments arguments(context, kName, dy.dtype());
  arguments.model("dy", dy, {n, m});
  arguments.model("w", w, {m, k});
  arguments.model("dx", dx, {n, k});
  context.costs().record(kName, product_flops(n, k, m), arguments.bytes());
  if (context.is_meta()) return;
  NF_ON_DEVICE(linear_backward_input, context, dy, w, dx);
}

void linear_backward_weight(Context& context, const Tensor& dy, const Tensor& x, const Tensor& dw) {
  constexpr std::string_view kName = "linear_backward_weight";
  const int64_t n = matrix_shape(kName, "dy", dy)[0];
  const int64_t m = dy.dim(1);
  const int64_t k = matrix_shape(kName, "x", x)[1];
  Arguments arguments(context, kName, dy.dtype());
  arguments.model("dy", dy, {n, m});
  arguments.model("x", x, {n, k});
  arguments.accumulator("dw", dw, {m, k}, 2);
  context.costs().record(kName, product_flops(n, k, m), arguments.bytes());
  if (context.is_meta()) return;
  NF_ON_DEVICE(linear_backward_weight, context, dy, x, dw);
}

void add_column_sums(Context& context, const Tensor& x, const Tensor& out) {
  constexpr std::string_view kName = "add_column_sums";
  const int64_t n = matrix_shape(kName, "x", x)[0];
  const int64_t m = x.dim(1);
  Arguments arguments(context, kName, x.dtype());
  arguments.model("x", x, {n, m});
  arguments.accumulator("out", out, {m}, 2);
  context.costs().record(kName, x.numel(), arguments.bytes());
  if (context.is_meta()) return;
  NF_ON_DEVICE(add_column_sums, context, x, out);
}

std::string describe_matmul() {
  const std::string own =
      "own kernels, " + cpu::gemm_instructions() + (cpu::gemm_has_native_bf16() ? " with bf16" : "");
  return cpu::onednn::is_better_for_bf16() ? own + "; bf16 over " + cpu::onednn::describe() : own;
}

bool has_native_bf16() { return cpu::gemm_has_native_bf16() || cpu::onednn::is_better_for_bf16(); }

}  // namespace normformer::ops
