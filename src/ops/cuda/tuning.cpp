#include "ops/cuda/tuning.h"

#include <algorithm>
#include <array>

#include <fmt/format.h>

namespace normformer::ops::cuda {

float median_milliseconds(Gpu& gpu, const std::function<void()>& enqueue) {
  constexpr int kTrials = 5;
  std::array<float, kTrials> times{};
  for (float& t : times) {
    const GpuMoment begin = gpu.mark();
    enqueue();
    t = static_cast<float>(1e3 * gpu.seconds_between(begin, gpu.mark()));
  }
  std::sort(times.begin(), times.end());
  return times[kTrials / 2];
}

std::optional<KeptChoices> kept_choices_of(const Gpu& gpu, const std::string& library) {
  const auto folder = gpu.tunes_products() ? cache_folder() : std::nullopt;
  if (!folder) return std::nullopt;
  std::string name = fmt::format("{} {}", gpu.description().name, library);
  std::replace(name.begin(), name.end(), ' ', '-');
  return std::optional<KeptChoices>(std::in_place, *folder / name);
}

void FasterWay::run(const std::string& key, const std::function<bool()>& first,
                    const std::function<void()>& second) {
  const auto known = takes_first_.find(key);
  if (known != takes_first_.end() && !known->second) return second();
  if (!first()) return second();
  if (known != takes_first_.end()) return;
  const bool stays = first_is_faster(key, first, second);
  takes_first_.emplace(key, stays);
  // Whichever was timed last has left its result.
  if (!stays)
    second();
  else if (kept_)
    first();
}

bool FasterWay::first_is_faster(const std::string& key, const std::function<bool()>& first,
                                const std::function<void()>& second) {
  if (!kept_) return true;
  // Work enqueued so far may wait for another rank, which may wait for its turn to choose.
  gpu_.synchronize();
  const auto choice = kept_->find_or_choose(key, [&] {
    second();
    const float of_second = median_milliseconds(gpu_, second);
    const float of_first = median_milliseconds(gpu_, [&] { first(); });
    return std::string(of_first <= of_second ? "first" : "second");
  });
  return choice != "second";
}

}  // namespace normformer::ops::cuda
