// Whether cuDNN has kernels for the attention of our models on GPUs that this machine need not have.

#include <string>
#include <vector>

#include <dlfcn.h>
#include <gtest/gtest.h>

#include "ops/cuda/cudnn_attention.h"

namespace normformer::ops::cuda {
namespace {

struct Device {
  std::string name;
  int compute_capability;
  std::string description;
};

/// What cuDNN 9 writes of a device with these properties.
std::string describe(const std::string& name, int capability, int multiprocessors, int shared_bytes,
                     int l2_bytes, int64_t memory) {
  return R"({"cudnnVersion":91900,"schemaVersion":1,"deviceName":")" + name + R"(","deviceVer":)" +
         std::to_string(10 * capability) + R"(,"multiProcessorCount":)" + std::to_string(multiprocessors) +
         R"(,"maxSharedMemoryPerBlockOptin":)" + std::to_string(shared_bytes) + R"(,"l2CacheSize":)" +
         std::to_string(l2_bytes) + R"(,"totalGlobalMem":)" + std::to_string(memory) +
         R"(,"driverVer":13000,"cudaDeviceId":0,"pciDeviceId":0,"isTccDriver":0,"supportCoopLaunch":1,)"
         R"("maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],"regsPerBlock":65536,)"
         R"("warpSize":32,"maxSharedMemoryPerBlock":49152,"reservedSharedMemoryPerBlock":1024,)"
         R"("maxRegistersPerSM":65536,"maxCtasPerSM":32,"maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,)"
         R"("smClockRateKHz":1800000,"memClockRateKHz":2600000})";
}

std::vector<Device> devices() {
  return {{"A100", 80, describe("NVIDIA A100-SXM4-80GB", 80, 108, 166912, 41943040, 85'000'000'000)},
          {"H100", 90, describe("NVIDIA H100 80GB HBM3", 90, 132, 232448, 52428800, 85'000'000'000)},
          {"H200", 90, describe("NVIDIA H200", 90, 132, 232448, 62914560, 150'000'000'000)}};
}

class CudnnPlans : public testing::TestWithParam<Device> {
 protected:
  // cuDNN looks for the driver's library before it answers, but asks nothing of it: the one to link with
  // does.
  static void SetUpTestSuite() {
    if (dlopen("libcuda.so.1", RTLD_NOW) == nullptr) dlopen(NORMFORMER_CUDA_DRIVER_STUB, RTLD_NOW);
  }

  static void expect_plans(const AttentionShape& shape) {
    for (const DType dtype : {DType::bf16, DType::f16}) {
      for (const auto direction : {AttentionDirection::forward, AttentionDirection::backward}) {
        EXPECT_EQ(
            cudnn_refusal(shape, dtype, direction, GetParam().description, GetParam().compute_capability), "")
            << name_of(dtype) << (direction == AttentionDirection::forward ? " forward" : " backward")
            << " of batch " << shape.batch << ", length " << shape.length << ", heads " << shape.heads
            << " of " << shape.head_size << (shape.causal ? ", causal" : "");
      }
    }
  }
};

TEST_P(CudnnPlans, ThereAreSomeForEveryModelOfThePaper) {
  const std::vector<AttentionShape> models{{.heads = 12, .head_size = 64},   // 125M
                                           {.heads = 16, .head_size = 64},   // 355M
                                           {.heads = 32, .head_size = 64},   // 1.3B
                                           {.heads = 32, .head_size = 80}};  // 2.7B
  for (AttentionShape shape : models) {
    for (shape.length = 1024; shape.length <= 2048; shape.length *= 2) {
      for (shape.batch = 1; shape.batch <= 16; ++shape.batch) expect_plans(shape);
    }
  }
}

TEST_P(CudnnPlans, ThereAreSomeForAShareOfTheHeadsAndOtherSizes) {
  for (const int64_t head_size : {8, 16, 32, 64, 72, 80, 96, 104, 128}) {
    for (const int64_t heads : {1, 2, 4, 8}) {
      for (const bool causal : {true, false}) {
        expect_plans({.batch = 4, .length = 2048, .heads = heads, .head_size = head_size, .causal = causal});
      }
    }
  }
}

TEST_P(CudnnPlans, ARefusalSaysWhy) {
  const AttentionShape odd{.batch = 1, .length = 128, .heads = 1, .head_size = 7};
  EXPECT_NE(cudnn_refusal(odd, DType::bf16, AttentionDirection::forward, GetParam().description,
                          GetParam().compute_capability),
            "");
  EXPECT_NE(
      cudnn_refusal({.length = 128, .head_size = 64}, DType::bf16, AttentionDirection::forward, "{}", 90),
      "");
}

INSTANTIATE_TEST_SUITE_P(Devices, CudnnPlans, testing::ValuesIn(devices()),
                         [](const auto& device) { return device.param.name; });

}  // namespace
}  // namespace normformer::ops::cuda
