#pragma once

#include <chrono>

#include "normformer/comm/wait_time.h"

namespace normformer::detail {

/// While it lives, the calling thread waits for other ranks. One within another counts once.
class WaitScope {
 public:
  WaitScope();
  ~WaitScope();
  WaitScope(const WaitScope&) = delete;
  WaitScope& operator=(const WaitScope&) = delete;

 private:
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace normformer::detail
