#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>

#include "normformer/tensor/memory.h"

namespace normformer {

/// A bounded queue of chunks of bytes in memory: one thread fills it, another empties it in the same order. A
/// chunk's bytes lie together. Memory is taken when it is written first, and kept.
class StagingRing {
 public:
  explicit StagingRing(int64_t capacity);
  ~StagingRing();
  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  int64_t capacity() const { return static_cast<int64_t>(capacity_); }

  /// Room for a chunk of at most capacity() bytes, once there is some; empty after stop(). Then the chunk is
  /// to be filled and committed. For the thread that fills.
  std::span<std::byte> reserve(int64_t bytes);
  void commit();

  /// The oldest chunk, once there is one; empty after stop(). Then it is to be released. For the thread that
  /// empties.
  std::span<const std::byte> oldest();
  void release();

  /// Whoever waits, or will, gets nothing.
  void stop();

  /// Empties the ring and lets it go on after a stop(); nobody may be using it.
  void restart();

 private:
  struct Chunk {
    size_t offset;
    size_t bytes;
  };

  bool find_place(size_t bytes);

  size_t capacity_;
  std::shared_ptr<Allocator> allocator_ = std::make_shared<Allocator>(DeviceKind::cpu);
  std::byte* memory_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Chunk> chunks_;  // filled, the oldest first
  Chunk reserved_{0, 0};
  bool stopped_ = false;
};

}  // namespace normformer
