#pragma once

#include "simt/control.h"
#include "simt/runtime_api.h"

namespace simt {

/// What CUDA would say of such a launch.
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel);

/// Enters a launch into launches().
void record_launch(const cudaLaunchConfig_t& config, const void* kernel);

}  // namespace simt
