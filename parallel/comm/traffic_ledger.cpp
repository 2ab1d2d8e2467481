#include <algorithm>

#include "normformer/comm/group.h"

namespace normformer {

void TrafficLedger::record(const TrafficEvent& event) {
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
