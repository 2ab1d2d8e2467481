#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace normformer {

/// How long a rank's own thread computes, or is kept from it: time that passes less what it waits for other
/// ranks (nanoseconds_waited). Where ranks' computing is on GPUs that talk to each other without their hosts,
/// this holds the waiting too, and all ranks take alike.
class ComputeClock {
 public:
  /// While one lives, time counts.
  class Running {
   public:
    explicit Running(ComputeClock& clock) : clock_(&clock) { clock.start(); }
    ~Running() { clock_->stop(); }
    Running(const Running&) = delete;
    Running& operator=(const Running&) = delete;

   private:
    ComputeClock* clock_;
  };

  /// Seconds since the last call, or the beginning.
  double take();

 private:
  void start();
  void stop();

  using Clock = std::chrono::steady_clock;
  bool runs_ = false;
  Clock::time_point begin_;
  int64_t waited_ = 0;  // when that was
  double seconds_ = 0.0;
};

/// A rank that computes longer than those that do the same work.
struct Straggler {
  int rank = 0;          ///< of the world
  double seconds = 0.0;  ///< the mean of a step
  double median = 0.0;   ///< of its peers' means, the lower one of an even number
  int64_t steps = 0;     ///< over how many

  double factor() const { return seconds / median; }
};

/// "rank 5 on host b computes 1.8 times as long as the median (1.21 s against 0.67 s) over the last 32 steps"
std::string describe(const Straggler& straggler, const std::string& host);

/// Compares how long ranks compute, over kSteps steps at a time.
class StragglerWatch {
 public:
  static constexpr int64_t kSteps = 32;
  static constexpr int64_t kQuietSteps = 100;  ///< from one naming of a rank to the next, at least

  /// `factor`: how many times the median a rank must take to be named; 0 names none. `peers[r]`: ranks with
  /// the same number do the same work; stages of a pipeline do not. A rank without a peer is never named.
  StragglerWatch(double factor, std::vector<int64_t> peers);

  /// Enters a step, with every rank's seconds. Ranks to be named now.
  std::vector<Straggler> enter_step(std::span<const double> seconds);

 private:
  double factor_;
  std::vector<int64_t> peers_;
  std::vector<double> sums_;  // of every rank, since the last comparison
  int64_t summed_ = 0;
  int64_t steps_ = 0;
  std::map<int, int64_t> named_;  // by rank, at which step
};

/// One step of all ranks.
struct ComputeSummary {
  double median = 0.0;  ///< seconds; the lower one of an even number
  double largest = 0.0;
  int slowest_rank = 0;  ///< the first that took so long
};

/// `seconds` has one of a rank at least.
ComputeSummary summarise_compute(std::span<const double> seconds);

}  // namespace normformer
