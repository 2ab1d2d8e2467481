#include "launches.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <unordered_map>

#include "block.h"
#include "symbols.h"

namespace simt {

namespace {

constexpr size_t kSharedWithoutAsking = 48 << 10;
constexpr size_t kMostShared = 227 << 10;

std::atomic<bool> dry{false};

std::mutex mutex;
std::unordered_map<const void*, size_t> shared_limits;
std::unordered_map<const void*, KernelLaunches> recorded;

size_t shared_limit(const void* kernel) {
  const std::lock_guard lock(mutex);
  const auto found = shared_limits.find(kernel);
  return found == shared_limits.end() ? kSharedWithoutAsking : found->second;
}

void enter(KernelLaunches& launches, const cudaLaunchConfig_t& config) {
  const dim3& grid = config.gridDim;
  const dim3& block = config.blockDim;
  ++launches.count;
  launches.most_blocks = std::max(launches.most_blocks, int64_t{grid.x} * grid.y * grid.z);
  launches.most_threads = std::max(launches.most_threads, static_cast<int>(block.x * block.y * block.z));
  launches.most_shared_bytes = std::max(launches.most_shared_bytes, config.dynamicSmemBytes);
}

void add(KernelLaunches& all, const KernelLaunches& some) {
  all.count += some.count;
  all.most_blocks = std::max(all.most_blocks, some.most_blocks);
  all.most_threads = std::max(all.most_threads, some.most_threads);
  all.most_shared_bytes = std::max(all.most_shared_bytes, some.most_shared_bytes);
}

}  // namespace

void set_dry_run(bool new_value) { dry = new_value; }
bool dry_run() { return dry; }

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  constexpr unsigned kMostBlocks = 0x7FFFFFFF;
  constexpr unsigned kMostBlocksInY = 65535;
  constexpr unsigned kMostThreadsInZ = 64;
  const dim3& grid = config.gridDim;
  const dim3& block = config.blockDim;
  const bool grid_fits = grid.x >= 1 && grid.x <= kMostBlocks && grid.y >= 1 && grid.y <= kMostBlocksInY &&
                         grid.z >= 1 && grid.z <= kMostBlocksInY;
  const bool block_fits = block.x >= 1 && block.x <= kMostThreads && block.y >= 1 &&
                          block.y <= kMostThreads && block.z >= 1 && block.z <= kMostThreadsInZ &&
                          block.x * block.y * block.z <= kMostThreads;
  if (!grid_fits || !block_fits) return cudaErrorInvalidConfiguration;
  return config.dynamicSmemBytes <= shared_limit(kernel) ? cudaSuccess : cudaErrorInvalidValue;
}

void record_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const std::lock_guard lock(mutex);
  enter(recorded[kernel], config);
}

Launches launches() {
  const std::lock_guard lock(mutex);
  Launches made;
  for (const auto& [kernel, some] : recorded) {
    add(made.all, some);
    add(made.kernels[name_of_function(kernel)], some);
  }
  return made;
}

void reset_launches() {
  const std::lock_guard lock(mutex);
  recorded.clear();
}

cudaError_t detail::set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMostShared) return cudaErrorInvalidValue;
  const std::lock_guard lock(mutex);
  shared_limits[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

}  // namespace simt
