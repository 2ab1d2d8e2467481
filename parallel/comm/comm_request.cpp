#include <exception>

#include "normformer/comm/group.h"
#include "normformer/core/error.h"
#include "normformer/core/log.h"

namespace normformer {

CommRequest::CommRequest(std::unique_ptr<Impl> impl)
    : impl_(std::move(impl)), exceptions_(std::uncaught_exceptions()) {}

CommRequest& CommRequest::operator=(CommRequest&& other) noexcept {
  if (this != &other) {
    finish();
    impl_ = std::move(other.impl_);
    exceptions_ = other.exceptions_;
  }
  return *this;
}

CommRequest::~CommRequest() { finish(); }

void CommRequest::wait() {
  // Given up first, so that a failed message is not waited for again.
  if (const auto impl = std::move(impl_)) impl->wait();
}

void CommRequest::finish() noexcept {
  if (impl_ == nullptr || std::uncaught_exceptions() > exceptions_) return;
  try {
    wait();
  } catch (...) {
    log_line(LogLevel::error, describe_current_exception());
  }
}

}  // namespace normformer
