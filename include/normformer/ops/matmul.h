#pragma once

#include <string>

#include "normformer/tensor/context.h"

namespace normformer::ops {

// Shapes: N tokens, K input features, M output features. A linear's weight is [M, K], as in PyTorch.
// x, w, bias, y and their gradients share one type T; main gradients are of accumulator_of(T).

/// y[N, M] = x[N, K] w[M, K]^T (+ bias[M]); products are summed in the accumulator type and rounded once.
/// An undefined bias means none. FLOPs: 2 N M K.
void linear_forward(Context& context, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y);

/// dx[N, K] = dy[N, M] w[M, K]. FLOPs: 2 N M K.
void linear_backward_input(Context& context, const Tensor& dy, const Tensor& w, const Tensor& dx);

/// dw[M, K] += dy[N, M]^T x[N, K], straight into the main gradient. FLOPs: 2 N M K.
void linear_backward_weight(Context& context, const Tensor& dy, const Tensor& x, const Tensor& dw);

/// out[M] += sums of the columns of x[N, M], in an order that does not depend on the number of threads: a
/// bias' gradient. out is of accumulator_of(T).
void add_column_sums(Context& context, const Tensor& x, const Tensor& out);

/// "oneDNN 2.6.3, avx512_core_bf16" or "plain loops": what the products of this build run on, for the log.
std::string describe_matmul();

/// Whether products of bf16 run on bf16 instructions here; without them a bf16 run would be slower than fp32.
bool has_native_bf16();

}  // namespace normformer::ops
