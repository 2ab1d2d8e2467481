#include <algorithm>
#include <exception>
#include <utility>

#include "normformer/comm/group.h"
#include "normformer/comm/ledger_file.h"

namespace normformer {

TrafficCall::TrafficCall(std::shared_ptr<LedgerFile> file, uint64_t number)
    : file_(std::move(file)), number_(number), exceptions_(std::uncaught_exceptions()) {}

TrafficCall& TrafficCall::operator=(TrafficCall&& other) noexcept {
  if (this != &other) {
    end();
    file_ = std::move(other.file_);
    number_ = other.number_;
    exceptions_ = other.exceptions_;
  }
  return *this;
}

TrafficCall::~TrafficCall() { end(); }

void TrafficCall::end() noexcept {
  if (file_ != nullptr && std::uncaught_exceptions() <= exceptions_) complete();
}

void TrafficCall::complete() noexcept {
  if (const auto file = std::move(file_)) file->complete(number_);
}

TrafficCall TrafficLedger::record(const TrafficEvent& event) {
  const std::lock_guard lock(mutex_);
  const auto same = [&](const TrafficRecord& known) {
    return known.kind == event.kind && known.group == event.group->name;
  };
  auto found = std::find_if(records_.begin(), records_.end(), same);
  if (found == records_.end()) {
    found = records_.insert(found, {event.group->name, std::string(event.kind), 0, 0});
  }
  found->calls += 1;
  found->bytes += event.bytes;
  if (keeps_events_) events_.push_back(event);
  return file_ == nullptr ? TrafficCall() : TrafficCall(file_, file_->issue(event));
}

int64_t TrafficLedger::number_start() {
  const std::lock_guard lock(mutex_);
  return ++starts_;
}

void TrafficLedger::record_wait(std::shared_ptr<const GroupMembers> group, int64_t start) {
  const std::lock_guard lock(mutex_);
  if (keeps_events_) events_.push_back({.group = std::move(group), .kind = "wait", .start = start});
}

void TrafficLedger::attach(std::shared_ptr<LedgerFile> file) {
  const std::lock_guard lock(mutex_);
  file_ = std::move(file);
}

std::vector<TrafficRecord> TrafficLedger::records() const {
  const std::lock_guard lock(mutex_);
  return records_;
}

void TrafficLedger::keep_events(bool keep) {
  const std::lock_guard lock(mutex_);
  keeps_events_ = keep;
}

std::vector<TrafficEvent> TrafficLedger::events() const {
  const std::lock_guard lock(mutex_);
  return events_;
}

void TrafficLedger::clear() {
  const std::lock_guard lock(mutex_);
  records_.clear();
  events_.clear();
}

}  // namespace normformer
