#pragma once

// In place of NVIDIA's header of this name: as much of CUDA as this project uses, on the host.

#include "simt/control.h"
#include "simt/intrinsics.h"
#include "simt/kernel.h"
#include "simt/runtime_api.h"
#include "simt/vector_types.h"
