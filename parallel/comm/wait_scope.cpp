#include "wait_scope.h"

namespace normformer {

namespace {

// Of a thread, since each rank computes on one of its own: in tests several ranks are threads of one process.
thread_local int64_t waited = 0;
thread_local int depth = 0;

}  // namespace

int64_t nanoseconds_waited() { return waited; }

namespace detail {

WaitScope::WaitScope() {
  if (depth++ == 0) begin_ = std::chrono::steady_clock::now();
}

WaitScope::~WaitScope() {
  if (--depth > 0) return;
  const auto elapsed = std::chrono::steady_clock::now() - begin_;
  waited += std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count();
}

}  // namespace detail

}  // namespace normformer
