#pragma once

#include <utility>

#include <cuda_runtime.h>

#include "normformer/tensor/context.h"

#include "tensor/cuda/check.h"

namespace normformer::cuda {

/// How many blocks of how many threads a kernel runs on.
struct LaunchShape {
  int64_t blocks = 1;
  int threads = 1;           ///< of a block; at most 1024
  int64_t shared_bytes = 0;  ///< of a block, for dynamic_shared(); at most kMostShared
  int64_t blocks_y = 1;      ///< a second dimension of blocks; at most 65535
};

/// What a block may have on every GPU that is compiled for (sm_80 has 164 KiB, 1 KiB of them the system's).
inline constexpr int64_t kMostShared = 163 * 1024;

/// LogicError where the hardware's limits are exceeded.
void check_launch(const LaunchShape& shape);

inline cudaStream_t stream_of(const Context& context) {
  return static_cast<cudaStream_t>(context.gpu().stream());
}

/// Enqueues a kernel on the context's GPU: the one place where kernels start. No blocks: nothing happens.
template <class... Parameters, class... Arguments>
void launch(Context& context, const LaunchShape& shape, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  check_launch(shape);
  if (shape.blocks == 0 || shape.blocks_y == 0) return;
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (shape.shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.blocks_y));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream_of(context);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
}

}  // namespace normformer::cuda
