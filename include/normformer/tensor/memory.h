#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/tensor/gpu.h"

namespace normformer {

/// Where tensors live. `meta` has shapes and accounts but no memory: the planner is the trainer on it.
enum class DeviceKind { cpu, cuda, meta };

/// "cpu", "cuda", "meta"
std::string_view name_of(DeviceKind device);

/// What an allocation is for, so that a report can say what holds the memory.
enum class MemoryUse { parameters, gradients, optimizer, activations, workspace, communication };
inline constexpr int kNumMemoryUses = 6;

/// "parameters", "gradients", ...
std::string_view name_of(MemoryUse use);

/// What an allocator has handed out, in bytes.
struct MemoryReport {
  int64_t live = 0;           ///< held by tensors now
  int64_t peak_live = 0;      ///< the most ever held by tensors at once
  int64_t reserved = 0;       ///< taken from the system now, free blocks kept for reuse included
  int64_t peak_reserved = 0;  ///< the high-water mark: the most ever taken from the system
  std::array<int64_t, kNumMemoryUses> live_by_use{};
  std::array<int64_t, kNumMemoryUses> at_peak_by_use{};  ///< what held the memory when peak_live was reached
};

/// Hands out 64-byte aligned blocks and keeps freed ones for reuse, by size class; counts every byte.
/// On `meta` it counts exactly alike and hands out nothing. On `cuda` a block may be handed out again before
/// work on it is done: what comes later in the GPU's queue finds it free. Where the device has no memory
/// left, blocks that nobody holds are given back first. One per rank; safe from several threads.
class Allocator : public std::enable_shared_from_this<Allocator> {
 public:
  /// `gpu` for `cuda`, else null.
  explicit Allocator(DeviceKind device, std::shared_ptr<Gpu> gpu = nullptr)
      : device_(device), gpu_(std::move(gpu)) {}
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  /// A block of at least `bytes` bytes; null on `meta` and for 0 bytes. Its contents are arbitrary.
  /// Throws Error with a report of what holds the memory where the system has none left.
  void* allocate(int64_t bytes, MemoryUse use);

  /// Takes back a block of allocate(bytes, use).
  void release(void* block, int64_t bytes, MemoryUse use) noexcept;

  /// Gives blocks that no tensor holds back to the system.
  void trim();

  MemoryReport report() const;

  /// The GPU whose memory this is; null elsewhere.
  Gpu* gpu() const { return gpu_.get(); }

  /// For tests of kernels: from now on every allocator hands out blocks exactly as large as was asked for,
  /// and keeps none, so that whatever guards a block's ends sees an access beyond them.
  static void hand_out_exact_blocks(bool exact);

  /// Starts the peaks anew from what is held now.
  void reset_peaks();

  /// What allocate(bytes) really takes: a multiple of 512 bytes, or of a sixteenth of the power of two below;
  /// `bytes` itself for exact blocks.
  static int64_t size_class(int64_t bytes);

 private:
  void account(int64_t change, MemoryUse use);
  void* take_from_device(int64_t bytes);
  void give_to_device(void* block) noexcept;
  bool may_trim() const;
  void trim_locked() noexcept;
  [[noreturn]] void out_of_memory(int64_t bytes, MemoryUse use) const;

  const DeviceKind device_;
  const std::shared_ptr<Gpu> gpu_;
  mutable std::mutex mutex_;
  std::map<int64_t, std::vector<void*>>
      free_;  // by size class; on meta the pointers are null, their number counts
  MemoryReport report_;
};

/// A report as a few lines for people.
std::string to_string(const MemoryReport& report);

}  // namespace normformer
