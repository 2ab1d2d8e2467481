#include "normformer/core/activity.h"

namespace normformer {

namespace {
thread_local ActivityCounter* counter_of_thread = nullptr;
}  // namespace

void count_activity_in(ActivityCounter* counter) noexcept { counter_of_thread = counter; }

ActivityCounter* activity_counter() noexcept { return counter_of_thread; }

void note_activity() noexcept {
  if (counter_of_thread != nullptr) counter_of_thread->fetch_add(1, std::memory_order_relaxed);
}

}  // namespace normformer
