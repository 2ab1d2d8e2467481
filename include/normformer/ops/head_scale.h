#pragma once

#include "normformer/tensor/context.h"

namespace normformer::ops {

// x, y and gradients are [N, H * S] of T: H groups (heads) of S consecutive channels; scales [H] of T;
// dscales [H] of accumulator_of(T).

/// y = x with the channels of head h multiplied by scales[h]. y may be x.
void head_scale_forward(Context& context, const Tensor& x, const Tensor& scales, const Tensor& y);

/// dx = dy with head h multiplied by scales[h]; dscales[h] += sum of dy * x over the head's channels and all
/// tokens, in an order that does not depend on the number of threads. dx may be dy.
void head_scale_backward(Context& context, const Tensor& dy, const Tensor& x, const Tensor& scales,
                         const Tensor& dx, const Tensor& dscales);

}  // namespace normformer::ops
