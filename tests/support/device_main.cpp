// main() of tests that run on any device. Ends with 77, skipped, where a GPU is wanted and there is none.

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include <gtest/gtest.h>

#include "test_device.h"

namespace normformer {

DeviceKind test_device() {
  const char* wanted = std::getenv("NORMFORMER_TEST_DEVICE");
  return wanted != nullptr && std::string_view(wanted) == "cuda" ? DeviceKind::cuda : DeviceKind::cpu;
}

}  // namespace normformer

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (normformer::test_device() == normformer::DeviceKind::cuda) {
    if (normformer::list_gpus().empty()) {
      std::printf("skipped: no GPU (%s)\n", normformer::describe_cuda().c_str());
      return 77;
    }
    normformer::Allocator::hand_out_exact_blocks(true);
  }
  return RUN_ALL_TESTS();
}
