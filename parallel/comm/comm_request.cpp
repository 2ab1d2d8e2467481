#include <exception>

#include "normformer/comm/group.h"
#include "normformer/core/error.h"
#include "normformer/core/log.h"

#include "wait_scope.h"

namespace normformer {

CommRequest::CommRequest(std::unique_ptr<Impl> impl, TrafficCall call)
    : impl_(std::move(impl)), call_(std::move(call)), exceptions_(std::uncaught_exceptions()) {}

CommRequest& CommRequest::operator=(CommRequest&& other) noexcept {
  if (this != &other) {
    finish();
    impl_ = std::move(other.impl_);
    call_ = std::move(other.call_);
    exceptions_ = other.exceptions_;
  }
  return *this;
}

CommRequest::~CommRequest() { finish(); }

void CommRequest::wait() {
  // Given up first, so that a failed message is not waited for again.
  const TrafficCall call = std::move(call_);
  const detail::WaitScope waiting;
  if (const auto impl = std::move(impl_)) impl->wait();
}

void CommRequest::finish() noexcept {
  if (impl_ == nullptr) return;
  if (std::uncaught_exceptions() > exceptions_) return call_.abandon();
  try {
    wait();
  } catch (...) {
    log_line(LogLevel::error, describe_current_exception());
  }
}

}  // namespace normformer
