// In place of src/ops/cuda/matmul.cpp: emulated memory is the host's, so the host multiplies.

#include "ops/kernels.h"

namespace normformer::ops::cuda {

void linear_forward(Context& context, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  context.gpu().synchronize();
  cpu::linear_forward(context, x, w, bias, y);
}

void linear_backward_input(Context& context, const Tensor& dy, const Tensor& w, const Tensor& dx) {
  context.gpu().synchronize();
  cpu::linear_backward_input(context, dy, w, dx);
}

void linear_backward_weight(Context& context, const Tensor& dy, const Tensor& x, const Tensor& dw) {
  context.gpu().synchronize();
  cpu::linear_backward_weight(context, dy, x, dw);
}

}  // namespace normformer::ops::cuda
