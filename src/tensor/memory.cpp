#include "normformer/tensor/memory.h"

#include <atomic>
#include <bit>
#include <cstdlib>

#include <sys/mman.h>

#include "normformer/core/checked.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

void* take_from_system(int64_t bytes) {
  const int64_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
  void* block =
      std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(round_up(bytes, alignment)));
  // Fewer page faults and TLB misses on tensors of many megabytes; only a hint, so its result does not
  // matter.
  if (block != nullptr && alignment == kHugePage) madvise(block, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  return block;
}

}  // namespace

std::string_view name_of(DeviceKind device) {
  switch (device) {
    case DeviceKind::cpu:
      return "cpu";
    case DeviceKind::cuda:
      return "cuda";
    case DeviceKind::meta:
      return "meta";
  }
  return "?";
}

std::string_view name_of(MemoryUse use) {
  switch (use) {
    case MemoryUse::parameters:
      return "parameters";
    case MemoryUse::gradients:
      return "gradients";
    case MemoryUse::optimizer:
      return "optimizer";
    case MemoryUse::activations:
      return "activations";
    case MemoryUse::workspace:
      return "workspace";
    case MemoryUse::communication:
      return "communication";
  }
  return "?";
}

namespace {
std::atomic<bool> exact_blocks{false};
}  // namespace

void Allocator::hand_out_exact_blocks(bool exact) { exact_blocks = exact; }

int64_t Allocator::size_class(int64_t bytes) {
  if (exact_blocks) return bytes;
  constexpr int64_t kSmallStep = 512;
  const auto below = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(bytes)));
  return round_up(bytes, std::max(kSmallStep, below / 16));
}

Allocator::~Allocator() { trim(); }

void Allocator::account(int64_t change, MemoryUse use) {
  report_.live += change;
  report_.live_by_use[static_cast<size_t>(use)] += change;
  if (report_.live > report_.peak_live) {
    report_.peak_live = report_.live;
    report_.at_peak_by_use = report_.live_by_use;
  }
}

void* Allocator::allocate(int64_t bytes, MemoryUse use) {
  NF_CHECK(bytes >= 0, "an allocation of {} bytes", bytes);
  if (bytes == 0) return nullptr;
  const int64_t size = size_class(bytes);
  const std::lock_guard lock(mutex_);
  void* block = nullptr;
  const auto cached = free_.find(size);
  if (cached != free_.end() && !cached->second.empty()) {
    block = cached->second.back();
    cached->second.pop_back();
  } else {
    if (device_ != DeviceKind::meta) {
      block = take_from_device(size);
      if (block == nullptr && may_trim()) {
        trim_locked();
        block = take_from_device(size);
      }
      if (block == nullptr) out_of_memory(bytes, use);
    }
    report_.reserved += size;
    report_.peak_reserved = std::max(report_.peak_reserved, report_.reserved);
  }
  account(size, use);
  return block;
}

void Allocator::release(void* block, int64_t bytes, MemoryUse use) noexcept {
  if (bytes == 0) return;
  const int64_t size = size_class(bytes);
  const std::lock_guard lock(mutex_);
  account(-size, use);
  free_[size].push_back(block);
  if (exact_blocks && may_trim()) trim_locked();
}

// What goes into a graph has not been started yet and may use any block that is free here.
bool Allocator::may_trim() const { return gpu_ == nullptr || !gpu_->is_capturing(); }

void* Allocator::take_from_device(int64_t bytes) {
  return device_ == DeviceKind::cuda ? gpu_->allocate(bytes) : take_from_system(bytes);
}

void Allocator::give_to_device(void* block) noexcept {
  if (device_ == DeviceKind::cuda) {
    gpu_->free(block);
  } else {
    std::free(block);
  }
}

void Allocator::out_of_memory(int64_t bytes, MemoryUse use) const {
  constexpr double kMiB = 1 << 20;
  std::string device;
  if (device_ == DeviceKind::cuda) {
    const Gpu::Memory memory = gpu_->memory();
    device = fmt::format(" on GPU {} ({:.0f} of {:.0f} MiB are free, other processes counted)",
                         gpu_->description().index, static_cast<double>(memory.free) / kMiB,
                         static_cast<double>(memory.total) / kMiB);
  }
  throw Error(ExitCode::internal,
              fmt::format("out of memory{}: {:.1f} MiB of {} were wanted; held: {}. Lower train.micro_batch, "
                          "set train.recompute, or split the "
                          "model over more ranks (parallel.tensor, parallel.pipeline, parallel.context)",
                          device, static_cast<double>(bytes) / kMiB, name_of(use), to_string(report_)));
}

void Allocator::trim() {
  const std::lock_guard lock(mutex_);
  trim_locked();
}

void Allocator::trim_locked() noexcept {
  for (auto& [size, blocks] : free_) {
    report_.reserved -= size * static_cast<int64_t>(blocks.size());
    for (void* block : blocks) give_to_device(block);
  }
  free_.clear();
}

MemoryReport Allocator::report() const {
  const std::lock_guard lock(mutex_);
  return report_;
}

void Allocator::reset_peaks() {
  const std::lock_guard lock(mutex_);
  report_.peak_live = report_.live;
  report_.peak_reserved = report_.reserved;
  report_.at_peak_by_use = report_.live_by_use;
}

std::string to_string(const MemoryReport& report) {
  constexpr double kMiB = 1 << 20;
  std::string text = fmt::format(
      "peak {:.1f} MiB live ({:.1f} MiB reserved, {:.1f} MiB of them in free blocks now):",
      report.peak_live / kMiB, report.peak_reserved / kMiB, (report.reserved - report.live) / kMiB);
  for (int i = 0; i < kNumMemoryUses; ++i) {
    text += fmt::format(" {} {:.1f}", name_of(static_cast<MemoryUse>(i)), report.at_peak_by_use[i] / kMiB);
  }
  return text;
}

}  // namespace normformer
