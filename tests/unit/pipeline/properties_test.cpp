// What the header promises of every schedule, at sizes drawn at random.
#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"
#include "normformer/pipeline/checker.h"
#include "normformer/pipeline/schedule.h"
#include "normformer/pipeline/simulator.h"

#include "lists.h"

namespace normformer {
namespace {

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }

 private:
  std::mt19937 engine_;
};

// One schedule and what is promised of it: [stage] what it keeps, where `keeps_exactly`, or at most.
struct Sample {
  std::string name;
  Schedule schedule;
  std::vector<int64_t> keeps;
  bool keeps_exactly = true;
};

Sample plain(std::string name, const Schedule& schedule, const std::function<int64_t(int64_t)>& keeps_at) {
  Sample sample{std::move(name), schedule, {}};
  for (int64_t s = 0; s < schedule.num_stages(); ++s) sample.keeps.push_back(keeps_at(s));
  return sample;
}

Sample draw_interleaved(Random& random, int64_t p, int64_t m) {
  const int64_t chunks = random.between(2, 4);
  const int64_t group = random.between(0, 1) == 0 ? p : random.between(p, 2 * p + m);
  Sample sample =
      plain(fmt::format("interleaved, {} chunks, groups of {}", chunks, group),
            interleaved_schedule(p, m, chunks, group), [&](int64_t s) {
              return std::min(chunks * m, 2 * (p - s - 1) + (chunks - 1) * std::min(group, m) + 1);
            });
  sample.keeps_exactly = m % group == 0 || m <= group;
  return sample;
}

Sample draw(Random& random) {
  const int64_t p = random.between(1, 10);
  const int64_t m = random.between(0, 40);
  switch (random.between(0, 5)) {
    case 0:
      return plain("gpipe", gpipe_schedule(p, m), [&](int64_t) { return m; });
    case 1:
      return plain("1f1b", one_f_one_b_schedule(p, m), [&](int64_t s) { return std::min(p - s, m); });
    case 2:
      return plain("zb-h1", zb_h1_schedule(p, m), [&](int64_t) { return std::min(p, m); });
    case 3:
      return plain("zb-h2", zb_h2_schedule(p, m), [&](int64_t) { return std::min(2 * p - 1, m); });
    case 4: {
      Sample sample = plain("zb-v", zb_v_schedule(p, m), [&](int64_t) { return std::min(2 * p, 2 * m); });
      sample.keeps_exactly = m >= 2 * p - 1;
      return sample;
    }
    default:
      return draw_interleaved(random, p, m);
  }
}

std::string describe(const Sample& sample) {
  return fmt::format("{}, {} stages, {} micro-batches", sample.name, sample.schedule.num_stages(),
                     sample.schedule.micro_batches);
}

TEST(ScheduleProperties, EveryScheduleIsSoundAndKeepsWhatItPromises) {
  Random random(1);
  for (int i = 0; i < 5000; ++i) {
    const Sample sample = draw(random);
    const auto kept = check_schedule(sample.schedule).peak_saved;
    ASSERT_EQ(kept.size(), sample.keeps.size());
    for (size_t s = 0; s < kept.size(); ++s) {
      ASSERT_LE(kept[s], sample.keeps[s]) << describe(sample) << ", stage " << s;
      ASSERT_TRUE(kept[s] == sample.keeps[s] || !sample.keeps_exactly) << describe(sample) << ", stage " << s;
    }
  }
}

// No action but the first stage's can begin before the forwards ahead of it are through, and where backwards
// are whole the last gradient must still come down to the first stage: no schedule of this kind can be
// faster.
double shortest_makespan(const Schedule& schedule, double forward, double input, double weight) {
  if (schedule.micro_batches == 0) return 0;
  const bool is_split = schedule.stages[0].back().kind == ActionKind::backward_weight;
  const auto p = static_cast<double>(schedule.num_stages());
  const auto passes = static_cast<double>(schedule.chunks * schedule.micro_batches);
  return passes * (forward + input + weight) + (p - 1) * (forward + (is_split ? 0 : input + weight));
}

TEST(ScheduleProperties, NoScheduleIsFasterThanItCanBe) {
  Random random(2);
  for (int i = 0; i < 2000; ++i) {
    const Sample sample = draw(random);
    const auto forward = static_cast<double>(random.between(1, 5));
    const auto input = static_cast<double>(random.between(1, 5));
    const auto weight = static_cast<double>(random.between(1, 5));
    const StageTimes times = equal_times(sample.schedule.num_parts(), forward, input, weight);
    ASSERT_GE(simulate(sample.schedule, times).makespan,
              shortest_makespan(sample.schedule, forward, input, weight))
        << describe(sample);
  }
}

// Breaks one list: drops an action, repeats one, or exchanges two of one kind and chunk.
void damage(Random& random, Schedule& schedule) {
  auto& list = schedule.stages[static_cast<size_t>(random.between(0, schedule.num_stages() - 1))];
  const auto any = [&] { return list.begin() + random.between(0, static_cast<int64_t>(list.size()) - 1); };
  const auto one = any();
  switch (random.between(0, 2)) {
    case 0:
      list.erase(one);
      return;
    case 1: {
      const Action again = *one;
      list.insert(any(), again);
      return;
    }
    default: {
      const auto other = std::find_if(list.begin(), list.end(), [&](const Action& action) {
        return action.kind == one->kind && action.chunk == one->chunk && action != *one;
      });
      std::swap(*one, *other);
    }
  }
}

TEST(ScheduleProperties, ADamagedScheduleIsRefused) {
  Random random(3);
  int64_t damaged = 0;
  while (damaged < 3000) {
    Sample sample = draw(random);
    // With one part no message would tell that forwards come in another order, and none needs to.
    if (sample.schedule.micro_batches < 2 || sample.schedule.num_parts() == 1) continue;
    damage(random, sample.schedule);
    ASSERT_THROW(check_schedule(sample.schedule), LogicError) << describe(sample);
    ++damaged;
  }
}

// The longest idle time of a stage between its first and its last action.
double idle_inside(const Simulation& simulation) {
  double longest = 0;
  for (const auto& stage : simulation.stages) {
    double idle = 0;
    for (size_t i = 1; i < stage.size(); ++i) idle += stage[i].start - stage[i - 1].end;
    longest = std::max(longest, idle);
  }
  return longest;
}

struct Times {
  double forward, input, weight;
};

TEST(Bubble, OfInterleavedSchedulesIsThePapers) {
  for (const auto& [f, b, w] : {Times{1, 1, 1}, Times{3, 2, 1}, Times{2, 5, 2}, Times{5, 1, 1}})
    for (int64_t p = 1; p <= 8; ++p)
      for (int64_t v = 1; v <= 4; ++v)
        for (const int64_t group : {p, p + 1, 2 * p})
          for (int64_t m = group; m <= 40; m += group) {
            const Simulation simulation =
                simulate(interleaved_schedule(p, m, v, group), equal_times(p * v, f, b, w));
            ASSERT_DOUBLE_EQ(simulation.bubble_fraction,
                             static_cast<double>(p - 1) / static_cast<double>(v * m + p - 1))
                << p << " stages, " << v << " chunks, groups of " << group << ", " << m << " micro-batches";
          }
}

TEST(Bubble, OfZbH1IsThePapers) {
  for (const auto& [f, b, w] : {Times{1, 1, 1}, Times{3, 2, 1}, Times{2, 5, 2}, Times{4, 1, 3}})
    for (int64_t p = 1; p <= 8; ++p)
      for (int64_t m = p; m <= 3 * p + 2; ++m)
        EXPECT_EQ(idle_inside(simulate(zb_h1_schedule(p, m), equal_times(p, f, b, w))),
                  static_cast<double>(p - 1) * (f + b - w))
            << p << " stages, " << m << " micro-batches";
}

TEST(Bubble, OfZbH2IsThePapers) {
  for (const auto& [f, b, w] : {Times{1, 1, 1}, Times{3, 2, 1}, Times{2, 5, 2}, Times{4, 1, 3}})
    for (int64_t p = 1; p <= 8; ++p)
      for (int64_t m = 2 * p - 1; m <= 4 * p + 2; ++m)
        EXPECT_EQ(idle_inside(simulate(zb_h2_schedule(p, m), equal_times(p, f, b, w))),
                  std::max(0.0, static_cast<double>(p - 1) * (f + b - 2 * w)))
            << p << " stages, " << m << " micro-batches";
}

TEST(Bubble, OfZbVIsNone) {
  for (int64_t p = 1; p <= 8; ++p)
    for (int64_t m = 2 * p - 1; m <= 4 * p + 2; ++m)
      EXPECT_EQ(idle_inside(simulate(zb_v_schedule(p, m), equal_times(2 * p, 1, 1, 1))), 0)
          << p << " ranks, " << m << " micro-batches";
}

// With equal times a step without barrier is as long as the busiest stage from its first to its last action,
// and with it as long as from the first stage's first to the last stage's last.
TEST(Bubble, ABarrierCostsZeroBubbleSchedulesTheWayToTheLastStage) {
  for (int64_t p = 1; p <= 6; ++p)
    for (int64_t m = 2 * p - 1; m <= 4 * p; ++m) {
      const StageTimes times = equal_times(p, 1, 1, 1);
      const auto steps_between = static_cast<double>(p - 1);
      const auto busy = static_cast<double>(3 * m);
      EXPECT_EQ(steady_step_time(zb_h2_schedule(p, m), times), busy) << p << " " << m;
      EXPECT_EQ(barrier_cost(zb_h2_schedule(p, m), times), steps_between) << p << " " << m;
      EXPECT_EQ(steady_step_time(zb_v_schedule(p, m), equal_times(2 * p, 1, 1, 1)), 2 * busy)
          << p << " " << m;
      EXPECT_EQ(barrier_cost(zb_v_schedule(p, m), equal_times(2 * p, 1, 1, 1)), steps_between)
          << p << " " << m;
      EXPECT_EQ(steady_step_time(zb_h1_schedule(p, m), times), busy + steps_between) << p << " " << m;
      EXPECT_EQ(barrier_cost(zb_h1_schedule(p, m), times), 0) << p << " " << m;
      EXPECT_EQ(barrier_cost(one_f_one_b_schedule(p, m), times), 0) << p << " " << m;
    }
}

// The mean over many steps tends to the exact one, and a barrier never saves time.
TEST(Bubble, StepsWithoutBarrierTendToTheSteadyStep) {
  Random random(4);
  for (int i = 0; i < 200; ++i) {
    const Sample sample = draw(random);
    if (sample.schedule.micro_batches == 0 || sample.schedule.num_stages() > 4) continue;
    StageTimes times =
        equal_times(sample.schedule.num_parts(), 0, 0, 0, static_cast<double>(random.between(0, 2)));
    for (auto* kind : {&times.forward, &times.backward_input, &times.backward_weight})
      for (double& time : *kind) time = static_cast<double>(random.between(1, 9));
    const double steady = steady_step_time(sample.schedule, times);
    const double makespan = simulate(sample.schedule, times).makespan;
    const int64_t steps = 60;
    const double many = simulate(repeated(sample.schedule, steps), times).makespan;
    EXPECT_GE(makespan, steady) << describe(sample);
    EXPECT_GE(many + 1e-9, steady * static_cast<double>(steps)) << describe(sample);
    EXPECT_LE(many, steady * static_cast<double>(steps) + 2 * makespan) << describe(sample);
  }
}

TEST(Bubble, ZeroBubbleSchedulesAreAsShortAsCanBe) {
  for (int64_t p = 1; p <= 8; ++p)
    for (int64_t m = 2 * p - 1; m <= 4 * p + 2; ++m)
      for (const Schedule& schedule : {zb_h1_schedule(p, m), zb_h2_schedule(p, m), zb_v_schedule(p, m)})
        EXPECT_EQ(simulate(schedule, equal_times(schedule.num_parts(), 1, 1, 1)).makespan,
                  shortest_makespan(schedule, 1, 1, 1))
            << p << " stages, " << m << " micro-batches";
}

}  // namespace
}  // namespace normformer
