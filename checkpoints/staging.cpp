#include "staging.h"

#include "normformer/core/error.h"

namespace normformer {

StagingRing::StagingRing(int64_t capacity)
    : capacity_(static_cast<size_t>(capacity)),
      memory_(static_cast<std::byte*>(allocator_->allocate(capacity, MemoryUse::communication))) {}

StagingRing::~StagingRing() {
  allocator_->release(memory_, static_cast<int64_t>(capacity_), MemoryUse::communication);
}

// Behind the newest chunk, or at the memory's begin where its end is too short.
bool StagingRing::find_place(size_t bytes) {
  if (chunks_.empty()) {
    reserved_ = {0, bytes};
    return true;
  }
  const size_t begin = chunks_.front().offset;
  const size_t end = chunks_.back().offset + chunks_.back().bytes;
  const bool wrapped = chunks_.back().offset < begin;
  const size_t offset = !wrapped && end + bytes > capacity_ ? 0 : end;
  if ((wrapped || offset == 0) && offset + bytes > begin) return false;
  reserved_ = {offset, bytes};
  return true;
}

std::span<std::byte> StagingRing::reserve(int64_t bytes) {
  const auto wanted = static_cast<size_t>(bytes);
  NF_CHECK(wanted <= capacity_, "a chunk of {} bytes in a ring of {}", wanted, capacity_);
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return stopped_ || find_place(wanted); });
  if (stopped_) return {};
  return {memory_ + reserved_.offset, wanted};
}

void StagingRing::commit() {
  {
    const std::lock_guard lock(mutex_);
    chunks_.push_back(reserved_);
  }
  changed_.notify_all();
}

std::span<const std::byte> StagingRing::oldest() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return stopped_ || !chunks_.empty(); });
  if (stopped_) return {};
  return {memory_ + chunks_.front().offset, chunks_.front().bytes};
}

void StagingRing::release() {
  {
    const std::lock_guard lock(mutex_);
    chunks_.pop_front();
  }
  changed_.notify_all();
}

void StagingRing::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  changed_.notify_all();
}

void StagingRing::restart() {
  const std::lock_guard lock(mutex_);
  chunks_.clear();
  stopped_ = false;
}

}  // namespace normformer
