#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "device_array.h"
#include "tensor/cuda/kernel.h"

namespace simt {
namespace {

using testing::AllOf;
using testing::Each;
using testing::HasSubstr;

__global__ void write_place(uint64_t* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] =
      blockIdx.x + 100 * blockIdx.y + 10'000 * blockIdx.z +
      uint64_t{1'000'000} * (threadIdx.x + 100 * threadIdx.y + 10'000 * threadIdx.z);
}

TEST(Block, EveryThreadOfEveryBlockRunsOnceAndKnowsItsPlace) {
  const dim3 grid(3, 4, 2);
  const dim3 block(5, 3, 2);
  const DeviceArray<uint64_t> out(24 * 30);
  ASSERT_EQ(launch(grid, block, 0, write_place, out.data()), cudaSuccess);
  const std::vector<uint64_t> values = out.on_host();
  size_t i = 0;
  for (uint64_t bz = 0; bz < grid.z; ++bz)
    for (uint64_t by = 0; by < grid.y; ++by)
      for (uint64_t bx = 0; bx < grid.x; ++bx)
        for (uint64_t tz = 0; tz < block.z; ++tz)
          for (uint64_t ty = 0; ty < block.y; ++ty)
            for (uint64_t tx = 0; tx < block.x; ++tx, ++i)
              ASSERT_EQ(values[i], bx + 100 * by + 10'000 * bz + 1'000'000 * (tx + 100 * ty + 10'000 * tz));
}

template <class A>
__global__ void sum_twice(const A* in, A* out) {
  const auto i = static_cast<size_t>(normformer::cuda::global_thread());
  const A first = normformer::cuda::block_sum(in[i]);
  out[i] = normformer::cuda::block_sum(in[i] * 2) + first;
}

TEST(Block, SumsOfBlocksOfEverySize) {
  for (unsigned threads = 32; threads <= 1024; threads += 32) {
    constexpr unsigned kBlocks = 3;
    std::vector<double> values(kBlocks * threads);
    std::iota(values.begin(), values.end(), 1.0);
    const DeviceArray<double> in(values);
    const DeviceArray<double> out(values.size());
    ASSERT_EQ(launch(kBlocks, threads, 0, sum_twice<double>, in.data(), out.data()), cudaSuccess);
    const std::vector<double> sums = out.on_host();
    for (unsigned b = 0; b < kBlocks; ++b) {
      const double first = b * threads + 1.0;
      const double sum = threads * first + threads * (threads - 1.0) / 2;
      for (unsigned t = 0; t < threads; ++t) ASSERT_EQ(sums[b * threads + t], 3 * sum) << threads;
    }
  }
}

// Each thread reads what its neighbour wrote before the barrier, round after round.
__global__ void pass_on(int* out, int rounds) {
  __shared__ int values[2][1024];
  const unsigned t = threadIdx.x;
  values[0][t] = static_cast<int>(t);
  for (int r = 0; r < rounds; ++r) {
    __syncthreads();
    values[(r + 1) % 2][t] = values[r % 2][(t + 1) % blockDim.x];
  }
  out[t] = values[rounds % 2][t];
}

TEST(Block, BarriersOfBlocksThatAreNoWholeWarps) {
  for (const unsigned threads : {1u, 7u, 33u, 100u, 1024u}) {
    const DeviceArray<int> out(threads);
    ASSERT_EQ(launch(1, threads, 0, pass_on, out.data(), 13), cudaSuccess);
    const std::vector<int> values = out.on_host();
    for (unsigned t = 0; t < threads; ++t) ASSERT_EQ(values[t], static_cast<int>((t + 13) % threads));
  }
}

// The same without the barrier between writing and reading.
__global__ void forget_barrier(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  for (int r = 1; r < 4; ++r) {
    __syncthreads();
    values[threadIdx.x] = r;
    out[threadIdx.x + 64 * (r - 1)] = values[63 - threadIdx.x];
  }
}

TEST(Block, AForgottenBarrierShows) {
  const DeviceArray<int> out(192);
  ASSERT_EQ(launch(1, 64, 0, forget_barrier, out.data()), cudaSuccess);
  const std::vector<int> values = out.on_host();
  // Whatever the order of threads: of two that read each other's, the first reads what was there before.
  EXPECT_THAT(values, testing::Not(AllOf(Each(testing::Gt(0)), testing::Contains(3))));
  const auto stale = [&](int round, int from) {
    int count = 0;
    for (int t = from; t < from + 32; ++t) count += values[64 * (round - 1) + t] != round ? 1 : 0;
    return count;
  };
  // The order changes, so neither half of the block is right all the time.
  EXPECT_GT(stale(1, 0) + stale(2, 0) + stale(3, 0), 0);
  EXPECT_GT(stale(1, 32) + stale(2, 32) + stale(3, 32), 0);
}

struct Shuffled {
  int direct, exclusive, up, down, rotated;
  double wide;
};

__global__ void shuffle(Shuffled* out, int width) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int value = static_cast<int>(threadIdx.x) * 10;
  Shuffled& mine = out[threadIdx.x];
  mine.direct = __shfl_sync(~0u, value, (lane * 7 + 3) % width, width);
  mine.exclusive = __shfl_xor_sync(~0u, value, width / 2, width);
  mine.up = __shfl_up_sync(~0u, value, 3, width);
  mine.down = __shfl_down_sync(~0u, value, 3, width);
  mine.rotated = __shfl_sync(~0u, value, lane + 1);
  mine.wide = __shfl_xor_sync(~0u, value + 0.5, 1);
}

TEST(Warp, ShufflesAgreeWithAPlainLoop) {
  for (const int width : {2, 4, 8, 16, 32}) {
    const DeviceArray<Shuffled> out(96);
    ASSERT_EQ(launch(1, 96, 0, shuffle, out.data(), width), cudaSuccess);
    const std::vector<Shuffled> values = out.on_host();
    for (int t = 0; t < 96; ++t) {
      const int lane = t % 32;
      const int warp = t - lane;
      const int segment = lane / width * width;
      const int within = lane - segment;
      const Shuffled& mine = values[static_cast<size_t>(t)];
      EXPECT_EQ(mine.direct, 10 * (warp + segment + (lane * 7 + 3) % width));
      EXPECT_EQ(mine.exclusive, 10 * (warp + (lane ^ (width / 2))));
      EXPECT_EQ(mine.up, 10 * (within >= 3 ? t - 3 : t));
      EXPECT_EQ(mine.down, 10 * (within + 3 < width ? t + 3 : t));
      EXPECT_EQ(mine.rotated, 10 * (warp + (lane + 1) % 32));
      EXPECT_EQ(mine.wide, 10 * (t ^ 1) + 0.5);
    }
  }
}

__global__ void vote(unsigned* out) {
  const unsigned lane = threadIdx.x;
  out[lane] = __ballot_sync(~0u, lane % 3 == 0);
  out[32 + lane] = __any_sync(~0u, lane == 17) + 2 * __any_sync(~0u, 0) + 4 * __all_sync(~0u, 1) +
                   8 * __all_sync(~0u, lane != 5);
}

TEST(Warp, Votes) {
  const DeviceArray<unsigned> out(64);
  ASSERT_EQ(launch(1, 32, 0, vote, out.data()), cudaSuccess);
  const std::vector<unsigned> values = out.on_host();
  for (size_t lane = 0; lane < 32; ++lane) {
    EXPECT_EQ(values[lane], 0x49249249u);
    EXPECT_EQ(values[32 + lane], 5u);
  }
}

// Both halves of a warp go their own way, then meet.
__global__ void meet_in_halves(int* out) {
  const unsigned half = threadIdx.x / 16;
  int sum = static_cast<int>(threadIdx.x);
  if (half == 0) {
    for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(0x0000FFFFu, sum, d);
  } else {
    sum *= 2;
    for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(0xFFFF0000u, sum, d);
    __syncwarp(0xFFFF0000u);
  }
  __syncwarp();
  out[threadIdx.x] = sum + __shfl_xor_sync(~0u, sum, 16);
}

TEST(Warp, PartsOfAWarpMeetOnTheirOwn) {
  const DeviceArray<int> out(32);
  ASSERT_EQ(launch(1, 32, 0, meet_in_halves, out.data()), cudaSuccess);
  EXPECT_THAT(out.on_host(), Each(120 + 2 * 376));
}

__global__ void copy_later(const float* from, float* out) {
  __shared__ float values[64];
  begin_copy(&values[threadIdx.x], threadIdx.x % 2 == 0 ? from + threadIdx.x : nullptr, sizeof(float));
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x ^ 3];
  __syncthreads();
  wait_for_copies();
  __syncthreads();
  out[64 + threadIdx.x] = values[threadIdx.x ^ 3];
}

TEST(Block, AsynchronousCopiesArriveWhenTheThreadWaits) {
  std::vector<float> values(64);
  std::iota(values.begin(), values.end(), 1.0f);
  const DeviceArray<float> from(values);
  const DeviceArray<float> out(128);
  ASSERT_EQ(launch(2, 64, 0, copy_later, from.data(), out.data()), cudaSuccess);
  const std::vector<float> seen = out.on_host();
  for (size_t t = 0; t < 64; ++t) {
    EXPECT_TRUE(std::isnan(seen[t]));
    EXPECT_EQ(seen[64 + t], t % 2 == 0 ? 0.0f : values[t ^ 3]);
  }
}

struct Fragment {
  std::array<float, 6> values;
};

__global__ void exchange(float* out) {
  for (unsigned round = 0; round < 5; ++round) {
    Fragment mine;
    for (unsigned i = 0; i < 6; ++i) {
      mine.values[i] = static_cast<float>(1000 * round + 10 * threadIdx.x + i);
    }
    std::array<Fragment, 32> all;
    warp_exchange(&mine, sizeof(mine), all.data());
    const auto* seen = static_cast<const Fragment*>(warp_view(&mine, sizeof(mine)));
    float sum = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      sum += all[lane].values[lane % 6] * static_cast<float>(lane + 1) - seen[lane].values[0];
    }
    out[round * blockDim.x + threadIdx.x] = sum;
  }
}

TEST(Warp, ExchangesWholeFragments) {
  const DeviceArray<float> out(5 * 64);
  ASSERT_EQ(launch(1, 64, 0, exchange, out.data()), cudaSuccess);
  const std::vector<float> values = out.on_host();
  for (unsigned round = 0; round < 5; ++round) {
    for (unsigned t = 0; t < 64; ++t) {
      float sum = 0;
      for (unsigned lane = 0; lane < 32; ++lane) {
        const auto first = static_cast<float>(1000 * round + 10 * (t / 32 * 32 + lane));
        sum += (first + static_cast<float>(lane % 6)) * static_cast<float>(lane + 1) - first;
      }
      ASSERT_EQ(values[round * 64 + t], sum);
    }
  }
}

__global__ void count_threads(int* counts, unsigned long long* sum) {
  atomicAdd(&counts[threadIdx.x % 2], 1);
  atomicAdd(sum, static_cast<unsigned long long>(threadIdx.x));
}

TEST(Block, CountsWithAtomicAdditions) {
  const DeviceArray<int> counts(std::vector<int>{0, 0});
  const DeviceArray<unsigned long long> sum(std::vector<unsigned long long>{0});
  ASSERT_EQ(launch(10, 33, 0, count_threads, counts.data(), sum.data()), cudaSuccess);
  EXPECT_THAT(counts.on_host(), testing::ElementsAre(170, 160));
  EXPECT_THAT(sum.on_host(), testing::ElementsAre(10 * 33 * 16));
}

__global__ void diverge(int limit) {
  if (static_cast<int>(threadIdx.x) < limit) __syncthreads();
}

TEST(Hang, ABarrierThatSomeThreadsLeaveOutIsNamed) {
  ASSERT_EQ(launch(dim3(2, 2), 64, 0, diverge, 40), cudaSuccess);
  const std::string words = failure();
  EXPECT_THAT(words, AllOf(HasSubstr("diverge(int), block ("), HasSubstr("waits for ever"),
                           HasSubstr("threads 40-63 have exited"),
                           HasSubstr("threads 0-39 wait at __syncthreads"), HasSubstr("block_test.cpp:")));
}

__global__ void different_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

TEST(Hang, BarriersOfDifferentPlacesDoNotMeet) {
  ASSERT_EQ(launch(1, 64, 0, different_barriers), cudaSuccess);
  EXPECT_THAT(failure(), AllOf(HasSubstr("different_barriers"), HasSubstr("__syncthreads"),
                               HasSubstr("while others wait at the one in line")));
}

__global__ void exit_early(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}

TEST(Hang, AShuffleWithALaneThatHasExitedIsNamed) {
  const DeviceArray<float> out(32);
  ASSERT_EQ(launch(1, 32, 0, exit_early, out.data()), cudaSuccess);
  EXPECT_THAT(failure(), AllOf(HasSubstr("exit_early"), HasSubstr("threads 5 have exited"),
                               HasSubstr("threads 0-4, 6-31 wait for lanes of their warp in ")));
}

__global__ void shuffle_whole_warps(float* out) { out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1); }

TEST(Hang, AFullMaskOnAPartOfAWarpIsRefused) {
  const DeviceArray<float> out(40);
  ASSERT_EQ(launch(1, 40, 0, shuffle_whole_warps, out.data()), cudaSuccess);
  EXPECT_THAT(failure(), HasSubstr("the block's last warp has only 8 lanes"));
}

__global__ void shuffle_without_own_lane() { __shfl_sync(0xFFu, 1, 0); }

TEST(Hang, ALaneOutsideItsOwnMaskIsRefused) {
  ASSERT_EQ(launch(1, 32, 0, shuffle_without_own_lane), cudaSuccess);
  EXPECT_THAT(failure(), HasSubstr("lane 8 calls __shfl_sync for the lanes of mask 0xff"));
}

__global__ void read_outside_of_mask() {
  if (threadIdx.x < 8) __shfl_xor_sync(0xFFu, 1, 8);
}

TEST(Hang, ReadingALaneOutsideOfTheMaskIsRefused) {
  ASSERT_EQ(launch(1, 32, 0, read_outside_of_mask), cudaSuccess);
  EXPECT_THAT(failure(), HasSubstr("which is not in mask 0xff"));
}

__global__ void different_meetings() {
  if (threadIdx.x % 2 == 0) {
    __shfl_xor_sync(~0u, 1, 1);
  } else {
    __shfl_xor_sync(~0u, 1.0, 1);
  }
}

TEST(Hang, LanesThatMeetForDifferentThingsAreFoundOut) {
  ASSERT_EQ(launch(1, 32, 0, different_meetings), cudaSuccess);
  EXPECT_THAT(failure(),
              AllOf(HasSubstr("__shfl_xor_sync of 8 bytes"), HasSubstr("meets"), HasSubstr("4 bytes")));
}

__global__ void throw_after_barrier(int thread) {
  __syncthreads();
  if (static_cast<int>(threadIdx.x) == thread) throw std::out_of_range("far out");
  __syncthreads();
}

TEST(Failure, AnExceptionIsCarriedOutWithItsPlace) {
  ASSERT_EQ(launch(1, dim3(8, 1, 4), 0, throw_after_barrier, 3), cudaSuccess);
  try {
    cudaDeviceSynchronize();
    FAIL() << "no exception";
  } catch (const std::logic_error& e) {
    EXPECT_THAT(e.what(), AllOf(HasSubstr("throw_after_barrier(int), block (0, 0, 0), thread (3, 0, "),
                                HasSubstr("far out")));
    EXPECT_THROW(std::rethrow_if_nested(e), std::out_of_range);
  }
}

TEST(Failure, TheNextLaunchWorks) {
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(launch(2, 1024, 0, throw_after_barrier, 700), cudaSuccess);
    EXPECT_THAT(failure(), HasSubstr("far out"));
    const DeviceArray<int> out(1024);
    ASSERT_EQ(launch(1, 1024, 0, pass_on, out.data(), 1), cudaSuccess);
    EXPECT_EQ(out.on_host()[0], 1);
  }
}

__global__ void use_dynamic_shared(float* out) {
  auto* values = normformer::cuda::dynamic_shared<float>();
  out[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = 1.0f;
}

TEST(DynamicShared, IsPoisonedForEveryBlockAndAligned) {
  const DeviceArray<float> out(64);
  ASSERT_EQ(launch(3, 64, 64 * sizeof(float), use_dynamic_shared, out.data()), cudaSuccess);
  EXPECT_THAT(out.on_host(), Each(testing::IsNan()));
}

__global__ void write_shared(size_t at) { normformer::cuda::dynamic_shared<char>()[at] = 1; }

__global__ void give_address(uint64_t* out) {
  *out = reinterpret_cast<uint64_t>(normformer::cuda::dynamic_shared<char>());
}

TEST(DynamicShared, IsAlignedWhateverItsSize) {
  for (const size_t bytes : {1, 16, 100, 129, 48 << 10}) {
    const DeviceArray<uint64_t> out(1);
    ASSERT_EQ(launch(1, 1, bytes, give_address, out.data()), cudaSuccess);
    EXPECT_EQ(out.on_host()[0] % 128, 0u);
  }
}

TEST(DynamicShared, AWriteJustBehindItIsFoundAtTheEndOfTheBlock) {
  ASSERT_EQ(launch(1, 1, 100, write_shared, 99), cudaSuccess);
  EXPECT_EQ(failure(), "no failure");
  ASSERT_EQ(launch(1, 1, 100, write_shared, 100), cudaSuccess);
  EXPECT_THAT(failure(), AllOf(HasSubstr("write_shared"), HasSubstr("outside of its 100 bytes")));
  ASSERT_EQ(launch(1, 1, 100, write_shared, -1), cudaSuccess);
  EXPECT_THAT(failure(), HasSubstr("outside of its 100 bytes"));
}

void write_shared_now(size_t bytes, size_t at) {
  launch(1, 1, bytes, write_shared, at);
  cudaDeviceSynchronize();
}

TEST(DynamicSharedDeathTest, AnAccessFurtherBehindItFaults) {
  EXPECT_DEATH(write_shared_now(4096, 4096),
               "write_shared.*outside of its 4096 bytes of dynamic shared memory");
  EXPECT_DEATH(write_shared_now(100, 128), "outside of its 100 bytes");
  EXPECT_DEATH(write_shared_now(0, 0), "outside of its 0 bytes");
}

__global__ void recurse(int* depth) {
  volatile char room[1024];
  room[0] = 1;
  if (*depth + room[0] > 0) recurse(depth);
  room[1] = room[0];
}

TEST(StackDeathTest, ARunawayThreadIsNamed) {
  const DeviceArray<int> depth(std::vector<int>{1});
  EXPECT_DEATH(
      {
        launch(1, 1, 0, recurse, depth.data());
        cudaDeviceSynchronize();
      },
      "recurse.*out of its stack");
}

TEST(Threads, LaunchFromSeveralHostThreadsAtOnce) {
  std::vector<std::thread> threads;
  std::array<int, 4> wrong{};
  for (size_t i = 0; i < wrong.size(); ++i) {
    threads.emplace_back([&, i] {
      cudaStream_t stream = nullptr;
      cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
      double* values = nullptr;
      cudaHostAlloc(&values, 256 * sizeof(double), cudaHostAllocDefault);
      for (int repeat = 0; repeat < 50; ++repeat) {
        std::fill_n(values, 256, static_cast<double>(i) + 1);
        const DeviceArray<double> in(256);
        cudaMemcpyAsync(in.data(), values, 256 * sizeof(double), cudaMemcpyHostToDevice, stream);
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(2);
        config.blockDim = dim3(128);
        config.stream = stream;
        cudaLaunchKernelEx(&config, sum_twice<double>, in.data(), in.data());
        cudaMemcpyAsync(values, in.data(), 256 * sizeof(double), cudaMemcpyDeviceToHost, stream);
        cudaStreamSynchronize(stream);
        for (int v = 0; v < 256; ++v) wrong[i] += values[v] != 3 * 128 * (static_cast<double>(i) + 1) ? 1 : 0;
      }
      cudaFreeHost(values);
      cudaStreamDestroy(stream);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(wrong, Each(0));
}

}  // namespace
}  // namespace simt
