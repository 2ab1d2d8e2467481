#pragma once

#include "normformer/ops/activation.h"
#include "normformer/ops/attention.h"
#include "normformer/ops/optimizer.h"
#include "normformer/ops/partial_attention.h"
#include "normformer/ops/sublayer.h"
#include "normformer/tensor/context.h"
#include "normformer/tensor/rectangle.h"

#include "ops/row_blocks.h"

namespace normformer::ops::cpu {
#include "ops/kernels.inc"
}  // namespace normformer::ops::cpu

namespace normformer::ops::cuda {
#include "ops/kernels.inc"
}  // namespace normformer::ops::cuda

/// Calls a function of kernels.inc for the context's device, under its name in traces. In a build without
/// CUDA no context is on cuda.
#if NORMFORMER_WITH_CUDA
#define NF_ON_DEVICE(kernel, context, ...) \
  (trace_operation((context), #kernel),    \
   (context).is_cuda() ? cuda::kernel((context), ##__VA_ARGS__) : cpu::kernel((context), ##__VA_ARGS__))
#else
#define NF_ON_DEVICE(kernel, context, ...) \
  (trace_operation((context), #kernel), cpu::kernel((context), ##__VA_ARGS__))
#endif
