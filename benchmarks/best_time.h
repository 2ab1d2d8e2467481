#pragma once

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

#include <time.h>

namespace normformer::benchmarks {

/// What is counted: time on the wall, or for work on one thread that thread's time on a processor, which
/// other programs on the machine disturb less.
enum class Clock { wall, thread };

inline double now(Clock clock) {
  timespec time{};
  clock_gettime(clock == Clock::wall ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

/// Seconds of one call. Waits before it, so that threads which spin for a while after their work are asleep.
template <class Call>
double seconds_of(Clock clock, Call&& call) {
  std::this_thread::sleep_for(std::chrono::milliseconds(3));
  const double start = now(clock);
  call();
  return now(clock) - start;
}

/// The least seconds of each of two calls, taken in turns so that a busy machine troubles both alike.
struct BestTimes {
  double ours = std::numeric_limits<double>::infinity();
  double ceiling = std::numeric_limits<double>::infinity();
};

template <class Ours, class Ceiling>
BestTimes best_times(Clock clock, double seconds, Ours&& ours, Ceiling&& ceiling) {
  constexpr int kLeastRounds = 4;
  constexpr int kMostRounds = 100;  // the waits of more would outlast all that is measured
  BestTimes best;
  double spent = 0;
  for (int round = 0; round < kLeastRounds || (spent < seconds && round < kMostRounds); ++round) {
    const double a = seconds_of(clock, ours);
    const double b = seconds_of(clock, ceiling);
    best.ours = std::min(best.ours, a);
    best.ceiling = std::min(best.ceiling, b);
    spent += a + b;
  }
  return best;
}

}  // namespace normformer::benchmarks
