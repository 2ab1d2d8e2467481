#include <cstring>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "device_array.h"

namespace simt {
namespace {

template <class T>
__global__ void set(T* values, T value) {
  values[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void touch_shared(char* out, size_t bytes) {
  *out = static_cast<char*>(dynamic_shared_memory())[bytes - 1];
}

class Device : public testing::Test {
 protected:
  void TearDown() override {
    set_dry_run(false);
    cudaGetLastError();
  }
};

TEST_F(Device, LaunchesBeyondTheLimitsAreRefused) {
  const DeviceArray<int> out(1);
  const auto with = [&](dim3 grid, dim3 block) { return launch(grid, block, 0, set<int>, out.data(), 1); };
  EXPECT_EQ(with(0, 1), cudaErrorInvalidConfiguration);
  EXPECT_EQ(with(1, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(with(dim3(1, 65536), 1), cudaErrorInvalidConfiguration);
  EXPECT_EQ(with(dim3(1, 1, 65536), 1), cudaErrorInvalidConfiguration);
  EXPECT_EQ(with(0x80000000u, 1), cudaErrorInvalidConfiguration);
  EXPECT_EQ(with(1, 1025), cudaErrorInvalidConfiguration);
  EXPECT_EQ(with(1, dim3(64, 17)), cudaErrorInvalidConfiguration);
  EXPECT_EQ(with(1, dim3(1, 1, 65)), cudaErrorInvalidConfiguration);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidConfiguration);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(Device, MoreThan48KiBOfSharedMemoryMustBeAskedFor) {
  constexpr size_t kMost = 227 << 10;
  const DeviceArray<char> out(1);
  const auto with = [&](size_t bytes) { return launch(1, 1, bytes, touch_shared, out.data(), bytes); };
  EXPECT_EQ(with(48 << 10), cudaSuccess);
  EXPECT_EQ(with((48 << 10) + 1), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFuncSetAttribute(touch_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost + 1),
            cudaErrorInvalidValue);
  EXPECT_EQ(cudaFuncSetAttribute(touch_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost),
            cudaSuccess);
  EXPECT_EQ(with(kMost), cudaSuccess);
  EXPECT_EQ(with(kMost + 1), cudaErrorInvalidValue);
  EXPECT_EQ(out.on_host()[0], -1);
}

TEST_F(Device, DescribesItself) {
  int count = 0;
  ASSERT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
  EXPECT_EQ(count, 1);
  EXPECT_EQ(cudaSetDevice(1), cudaErrorInvalidDevice);
  cudaDeviceProp properties{};
  ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
  EXPECT_STREQ(properties.name, "emulated GPU");
  int multiprocessors = 0;
  ASSERT_EQ(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), cudaSuccess);
  EXPECT_EQ(multiprocessors, properties.multiProcessorCount);
  EXPECT_STREQ(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation");
  EXPECT_STREQ(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory");
}

TEST_F(Device, LaunchesAreRecordedByKernel) {
  const DeviceArray<int> ints(512);
  const DeviceArray<float> floats(512);
  reset_launches();
  launch(4, 128, 0, set<int>, ints.data(), 1);
  launch(2, 256, 100, set<int>, ints.data(), 2);
  launch(1, 32, 0, set<float>, floats.data(), 1.0f);
  launch(1, 2000, 0, set<float>, floats.data(), 1.0f);  // refused
  const Launches seen = launches();
  EXPECT_EQ(seen.all.count, 3);
  ASSERT_EQ(seen.kernels.size(), 2u);
  for (const auto& [name, kernel] : seen.kernels) {
    const bool is_int = name.find("set<int>") != std::string::npos;
    EXPECT_TRUE(is_int || name.find("set<float>") != std::string::npos) << name;
    EXPECT_EQ(kernel.count, is_int ? 2 : 1);
    EXPECT_EQ(kernel.most_blocks, is_int ? 4 : 1);
    EXPECT_EQ(kernel.most_threads, is_int ? 256 : 32);
    EXPECT_EQ(kernel.most_shared_bytes, is_int ? 100u : 0u);
  }
  reset_launches();
  EXPECT_EQ(launches().all.count, 0);
}

TEST_F(Device, ADryRunOnlyChecksAndRecords) {
  set_dry_run(true);
  const DeviceArray<float> large(size_t{40} << 30);
  const DeviceArray<float> second(size_t{40} << 30);
  reset_launches();
  EXPECT_EQ(launch(1u << 30, 1024, 0, set<float>, large.data(), 1.0f), cudaSuccess);
  EXPECT_EQ(launch(1u << 30, 1025, 0, set<float>, large.data(), 1.0f), cudaErrorInvalidConfiguration);
  EXPECT_EQ(cudaMemset(second.data(), 1, size_t{160} << 30), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(large.data(), second.data(), size_t{160} << 30, cudaMemcpyDeviceToDevice),
            cudaSuccess);
  std::vector<float> host(100, 3.0f);
  EXPECT_EQ(cudaMemcpy(large.data(), host.data(), 400, cudaMemcpyHostToDevice), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(host.data(), large.data(), 400, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_THAT(host, testing::Each(0.0f));
  EXPECT_EQ(launches().all.count, 1);
  EXPECT_EQ(launches().all.most_blocks, int64_t{1} << 30);
}

}  // namespace
}  // namespace simt
