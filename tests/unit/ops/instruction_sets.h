#pragma once

#include <gtest/gtest.h>
#include <hwy/highway.h>

namespace normformer::ops {

/// Calls body() with vectors of 256 bits, and without vectors: what processors without AVX-512 run on.
template <class Body>
void for_instruction_sets(Body&& body) {
  const int64_t here = hwy::SupportedTargets();
  for (const int64_t largest : {HWY_AVX2, HWY_SCALAR}) {
    // Smaller numbers are larger sets.
    const int64_t allowed = here & ~(largest - 1);
    SCOPED_TRACE(hwy::TargetName(largest));
    hwy::SetSupportedTargetsForTest(allowed);
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
}

}  // namespace normformer::ops
