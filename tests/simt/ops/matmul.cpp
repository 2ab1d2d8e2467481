// In place of src/ops/cuda/matmul.cpp: emulated memory is the host's, so the host multiplies.

#include "ops/kernels.h"
#include "simt/control.h"

namespace normformer::ops::cuda {

namespace {

// Waits for the operands; false where nothing is to be computed.
bool are_ready(Context& context) {
  context.gpu().synchronize();
  return !simt::dry_run();
}

}  // namespace

void linear_forward(Context& context, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  if (are_ready(context)) cpu::linear_forward(context, x, w, bias, y);
}

void linear_backward_input(Context& context, const Tensor& dy, const Tensor& w, const Tensor& dx) {
  if (are_ready(context)) cpu::linear_backward_input(context, dy, w, dx);
}

void linear_backward_weight(Context& context, const Tensor& dy, const Tensor& x, const Tensor& dw) {
  if (are_ready(context)) cpu::linear_backward_weight(context, dy, x, dw);
}

}  // namespace normformer::ops::cuda
