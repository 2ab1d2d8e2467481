#include "normformer/training/straggler.h"

#include <algorithm>
#include <utility>

#include "normformer/comm/wait_time.h"
#include "normformer/core/error.h"

namespace normformer {

namespace {

// The lower one: of two ranks the slow one is then compared with the other alone.
double lower_median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>((values.size() - 1) / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

void ComputeClock::start() {
  runs_ = true;
  begin_ = Clock::now();
  waited_ = nanoseconds_waited();
}

void ComputeClock::stop() {
  const int64_t waited = nanoseconds_waited() - waited_;
  seconds_ +=
      std::chrono::duration<double>(Clock::now() - begin_).count() - 1e-9 * static_cast<double>(waited);
  runs_ = false;
}

double ComputeClock::take() {
  if (runs_) {
    stop();
    start();
  }
  return std::max(0.0, std::exchange(seconds_, 0.0));
}

std::string describe(const Straggler& straggler, const std::string& host) {
  return fmt::format(
      "rank {} on host {} computes {:.1f} times as long as the median of its stage ({:.3g} s against {:.3g} "
      "s) "
      "over the last {} steps",
      straggler.rank, host, straggler.factor(), straggler.seconds, straggler.median, straggler.steps);
}

StragglerWatch::StragglerWatch(double factor, std::vector<int64_t> peers)
    : factor_(factor), peers_(std::move(peers)), sums_(peers_.size(), 0.0) {}

std::vector<Straggler> StragglerWatch::enter_step(std::span<const double> seconds) {
  NF_CHECK(seconds.size() == sums_.size(), "the seconds of {} ranks of {}", seconds.size(), sums_.size());
  ++steps_;
  ++summed_;
  for (size_t r = 0; r < sums_.size(); ++r) sums_[r] += seconds[r];
  if (factor_ == 0.0 || summed_ < kSteps) return {};
  std::map<int64_t, std::vector<double>> of_peers;
  for (size_t r = 0; r < sums_.size(); ++r) of_peers[peers_[r]].push_back(sums_[r]);
  std::vector<Straggler> found;
  for (size_t r = 0; r < sums_.size(); ++r) {
    const double median = lower_median(of_peers[peers_[r]]);
    const auto rank = static_cast<int>(r);
    if (sums_[r] <= factor_ * median || of_peers[peers_[r]].size() < 2) continue;
    const auto last = named_.find(rank);
    if (last != named_.end() && steps_ - last->second < kQuietSteps) continue;
    named_[rank] = steps_;
    const auto steps = static_cast<double>(summed_);
    found.push_back({rank, sums_[r] / steps, median / steps, summed_});
  }
  std::fill(sums_.begin(), sums_.end(), 0.0);
  summed_ = 0;
  return found;
}

ComputeSummary summarise_compute(std::span<const double> seconds) {
  NF_CHECK(!seconds.empty(), "the computing of no rank");
  const auto slowest = std::max_element(seconds.begin(), seconds.end());
  return {lower_median({seconds.begin(), seconds.end()}), *slowest,
          static_cast<int>(slowest - seconds.begin())};
}

}  // namespace normformer
