#pragma once

#include <source_location>

#include <cuda_runtime.h>

namespace normformer::cuda {

/// Throws Error with the place and the runtime's words unless `result` is success.
void check(cudaError_t result, const std::source_location& where = std::source_location::current());

}  // namespace normformer::cuda
