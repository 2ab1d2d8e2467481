#pragma once

#include "normformer/tensor/context.h"

namespace normformer {

/// Where the tests of this program compute: on cuda where NORMFORMER_TEST_DEVICE says so, else on cpu. Only
/// in programs that link normformer_device_gtest_main.
DeviceKind test_device();

}  // namespace normformer
