#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "normformer/comm/group.h"

namespace normformer::detail {

/// Something on its way that moves on in calls only.
class Flight {
 public:
  virtual ~Flight() = default;

  /// Moves on with what can be moved on with now; true once all is done. `context` is where to compute.
  virtual bool step(Context& context) = 0;

  /// Whether it may be destroyed on its way.
  virtual bool may_be_dropped() const = 0;

 private:
  friend class Progress;
  std::mutex turn_;  // who holds it may call step
  bool landed_ = false;
  std::exception_ptr failure_;
  CostLedger costs_;  // of what the thread computed
};

/// The communication thread of a rank: it moves on what is on its way while the rank computes. It starts with
/// the first flight. Whoever waits for a flight helps.
class Progress {
 public:
  Progress() = default;
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Takes a flight up. Where too many are on their way, waits for some; `context` is the caller's.
  void launch(std::shared_ptr<Flight> flight, Context& context);

  /// Returns once the flight has landed, and enters what the thread computed for it in the context's costs.
  /// Rethrows what step threw.
  void wait(Flight& flight, Context& context);

  /// Whether the thread is there: somebody has asked for communication beside computing.
  bool is_running() const { return thread_.joinable(); }

 private:
  void fly();
  static void step(Flight& flight, Context& context);
  bool step_all(Context& context, bool is_thread);
  std::vector<std::shared_ptr<Flight>> in_flight();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::shared_ptr<Flight>> flights_;
  std::atomic<int> waiting_{0};
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace normformer::detail
