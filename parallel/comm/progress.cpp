#include "progress.h"

#include <chrono>

namespace normformer::detail {

namespace {

// Exchanges of one group are told apart by numbers that come round.
constexpr size_t kMostFlights = GroupImpl::kExchangeNumbers / 4;

// The thread looks so often: seldom enough to leave the processor to whoever computes, often enough to keep
// a network busy, whose buffers hold more than it moves in that time.
constexpr std::chrono::microseconds kPause{100};

// Who waits looks at once, and after so many looks lets others have the processor.
constexpr int kEagerLooks = 64;

}  // namespace

Progress::~Progress() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
  // Somebody did not wait, because of an exception: memory that a transport still uses must not go.
  for (auto& flight : flights_) {
    if (!flight->landed_ && !flight->may_be_dropped())
      static_cast<void>(new std::shared_ptr<Flight>(std::move(flight)));
  }
}

void Progress::launch(std::shared_ptr<Flight> flight, Context& context) {
  while (in_flight().size() >= kMostFlights) {
    if (!step_all(context, false)) std::this_thread::yield();
  }
  const std::lock_guard lock(mutex_);
  flights_.push_back(std::move(flight));
  if (!thread_.joinable()) thread_ = std::thread([this] { fly(); });
  wake_.notify_one();
}

void Progress::wait(Flight& flight, Context& context) {
  ++waiting_;
  for (int look = 0;; ++look) {
    {
      const std::lock_guard turn(flight.turn_);
      if (flight.landed_) break;
    }
    if (!step_all(context, false) && look > kEagerLooks) std::this_thread::yield();
  }
  --waiting_;
  context.costs().add(flight.costs_);
  if (flight.failure_) std::rethrow_exception(flight.failure_);
}

std::vector<std::shared_ptr<Flight>> Progress::in_flight() {
  const std::lock_guard lock(mutex_);
  return flights_;
}

void Progress::step(Flight& flight, Context& context) {
  try {
    flight.landed_ = flight.step(context);
  } catch (...) {
    flight.failure_ = std::current_exception();
    flight.landed_ = true;
  }
}

// Returns whether any flight has landed.
bool Progress::step_all(Context& context, bool is_thread) {
  bool any = false;
  for (const auto& flight : in_flight()) {
    const std::unique_lock turn(flight->turn_, std::try_to_lock);
    if (!turn.owns_lock()) continue;
    if (!flight->landed_) step(*flight, context);
    if (is_thread) {
      flight->costs_.add(context.costs());
      context.costs().clear();
    }
    any = any || flight->landed_;
  }
  if (!any) return false;
  const std::lock_guard lock(mutex_);
  std::erase_if(flights_, [](const std::shared_ptr<Flight>& flight) {
    const std::unique_lock turn(flight->turn_, std::try_to_lock);
    return turn.owns_lock() && flight->landed_;
  });
  return true;
}

void Progress::fly() {
  Context context(DeviceKind::cpu);
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return ending_ || !flights_.empty(); });
    if (ending_) return;
    lock.unlock();
    // Who waits moves everything on faster than this thread could beside it.
    if (waiting_ > 0 || !step_all(context, true)) std::this_thread::sleep_for(kPause);
    lock.lock();
  }
}

}  // namespace normformer::detail
