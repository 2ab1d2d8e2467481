#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "device_array.h"

namespace simt {
namespace {

using testing::Each;

TEST(Memory, NewMemoryHoldsNoNumbers) {
  const DeviceArray<float> floats(100);
  const DeviceArray<double> doubles(100);
  EXPECT_THAT(floats.on_host(), Each(testing::IsNan()));
  EXPECT_THAT(doubles.on_host(), Each(testing::IsNan()));
}

TEST(Memory, LargeMemoryIsNotFilled) {
  const DeviceArray<char> large(size_t{3} << 30);
  EXPECT_EQ(large.data()[size_t{2} << 30], 0);
}

TEST(Memory, SizesAreCountedAndLimited) {
  size_t before = 0;
  size_t total = 0;
  ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
  EXPECT_EQ(total, size_t{64} << 30);
  {
    const DeviceArray<char> some(1000);
    size_t during = 0;
    cudaMemGetInfo(&during, &total);
    EXPECT_EQ(during, before - 1000);
  }
  set_device_memory(1 << 20);
  void* block = nullptr;
  EXPECT_EQ(cudaMalloc(&block, (1 << 20) + 1), cudaErrorMemoryAllocation);
  EXPECT_EQ(block, nullptr);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  set_device_memory(size_t{64} << 30);
}

__global__ void write_byte(unsigned char* bytes, int64_t at) { bytes[at] = 7; }

TEST(Memory, EveryByteOfABlockCanBeUsed) {
  for (const int64_t bytes : {1, 15, 16, 17, 4095, 4096, 4097, 100'000}) {
    const DeviceArray<unsigned char> block(static_cast<size_t>(bytes));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(block.data()) % 16, 0u);
    ASSERT_EQ(launch(1, 1, 0, write_byte, block.data(), 0), cudaSuccess);
    ASSERT_EQ(launch(1, 1, 0, write_byte, block.data(), bytes - 1), cudaSuccess);
    EXPECT_EQ(block.on_host().back(), 7);
  }
}

void write_outside(int64_t bytes, int64_t at) {
  const DeviceArray<unsigned char> block(static_cast<size_t>(bytes));
  launch(1, 1, 0, write_byte, block.data(), at);
  cudaDeviceSynchronize();
}

TEST(MemoryDeathTest, WritesOutsideOfABlockAreFoundOut) {
  EXPECT_DEATH(write_outside(1000, 1008), "write_byte.*behind the 1000 bytes");
  EXPECT_DEATH(write_outside(1000, 1000), "past the end of the 1000 bytes");
  EXPECT_DEATH(write_outside(4096, 4096), "behind the 4096 bytes");
  EXPECT_DEATH(write_outside(4096, -1), "in front of the 4096 bytes");
}

void write_freed() {
  unsigned char* freed = nullptr;
  {
    const DeviceArray<unsigned char> block(100);
    freed = block.data();
  }
  launch(1, 1, 0, write_byte, freed, 0);
  cudaDeviceSynchronize();
}

TEST(MemoryDeathTest, WritesToFreedMemoryAreFoundOut) {
  EXPECT_DEATH(write_freed(), "in memory that was freed");
}

TEST(Memory, OnlyWhatWasAllocatedCanBeFreed) {
  char* block = nullptr;
  ASSERT_EQ(cudaMalloc(&block, 64), cudaSuccess);
  EXPECT_EQ(cudaFree(block + 16), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFreeHost(block), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFree(block), cudaSuccess);
  EXPECT_EQ(cudaFree(block), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFree(nullptr), cudaSuccess);
  cudaGetLastError();
}

TEST(Copy, RangesAndDirectionsAreChecked) {
  const DeviceArray<int> block(10);
  const DeviceArray<int> other(10);
  std::vector<int> host(20);
  EXPECT_EQ(cudaMemcpy(block.data(), host.data(), 44, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(block.data() + 9, host.data(), 8, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(host.data(), block.data(), 44, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(block.data(), host.data(), 40, cudaMemcpyDeviceToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(host.data(), host.data() + 10, 40, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemset(block.data(), 0, 41), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemset(host.data(), 0, 4), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemset(block.data(), 0, 40), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(other.data(), block.data(), 40, cudaMemcpyDeviceToDevice), cudaSuccess);
  EXPECT_THAT(other.on_host(), Each(0));
}

}  // namespace
}  // namespace simt
