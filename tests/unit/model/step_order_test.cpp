// The calls of one step of every rank, on meta: any two ranks order what they share alike, whatever the
// layout; and real ranks make the same calls.
#include <vector>

#include <gtest/gtest.h>

#include "normformer/comm/launch_order.h"

#include "small_model.h"

namespace normformer::testing_support {
namespace {

std::vector<TrafficEvent> events_of_a_step(const RunConfig& config, DeviceKind device, const Group& world,
                                           const MeshDegrees& degrees) {
  world.ledger().keep_events(true);
  SmallModel small(config, device, world, degrees);
  small.trainer.advance();
  if (config.optimizer.optimistic) small.trainer.advance();  // settles the first on its way
  small.trainer.settle();
  return world.ledger().events();
}

std::vector<RankEvents> on_meta(const RunConfig& config, const MeshDegrees& degrees) {
  const auto ranks = static_cast<int>(num_ranks(degrees));
  std::vector<RankEvents> all;
  for (int r = 0; r < ranks; ++r)
    all.push_back({r, events_of_a_step(config, DeviceKind::meta, make_meta_world(r, ranks), degrees)});
  return all;
}

RunConfig config_of(PipelineSchedule schedule, Sharding sharding, Recompute recompute, bool sequence) {
  RunConfig config = small_config(Precision::bf16);
  config.model.layers = 9;
  config.parallel.schedule = schedule;
  config.parallel.virtual_stages = schedule == PipelineSchedule::interleaved ? 2 : 1;
  config.parallel.sharding = sharding;
  config.parallel.sequence = sequence;
  config.parallel.bucket_mib = 0.002;  // several, each of which may be reduced early
  config.train.recompute = recompute;
  return config;
}

constexpr PipelineSchedule kSchedules[] = {PipelineSchedule::gpipe,       PipelineSchedule::one_f_one_b,
                                           PipelineSchedule::interleaved, PipelineSchedule::zb_h1,
                                           PipelineSchedule::zb_h2,       PipelineSchedule::zb_v};
constexpr Sharding kShardings[] = {Sharding::optimizer, Sharding::gradients, Sharding::parameters};
constexpr Recompute kRecomputes[] = {Recompute::none, Recompute::selective, Recompute::full};

// Five sequences in micro-batches of two: three replicas have one micro-batch each, and a fourth an empty
// one.
const MeshDegrees kLayouts[] = {{.tensor = 2},
                                {.tensor = 5},
                                {.data = 3},
                                {.data = 4},
                                {.pipeline = 2},
                                {.pipeline = 4},
                                {.tensor = 2, .pipeline = 3},
                                {.tensor = 3, .data = 2},
                                {.data = 2, .pipeline = 2},
                                {.data = 4, .pipeline = 4},
                                {.tensor = 2, .data = 2, .pipeline = 4},
                                {.tensor = 2, .data = 3, .pipeline = 2},
                                {.tensor = 4, .data = 2, .pipeline = 2},
                                {.context = 3},
                                {.tensor = 2, .context = 2, .data = 2, .pipeline = 2}};

TEST(StepOrder, IsSoundInEveryLayout) {
  int layouts = 0;
  for (const MeshDegrees& degrees : kLayouts) {
    for (const PipelineSchedule schedule : kSchedules) {
      if (degrees.pipeline == 1 && schedule != PipelineSchedule::one_f_one_b) continue;
      for (const Sharding sharding : kShardings) {
        if (degrees.data == 1 && sharding != Sharding::optimizer) continue;
        for (const Recompute recompute : kRecomputes) {
          const bool sequence = (layouts + static_cast<int>(recompute)) % 2 == 1;
          SCOPED_TRACE(fmt::format("{}, schedule {}, sharding {}, recompute {}, sequence {}",
                                   to_string(degrees), static_cast<int>(schedule), static_cast<int>(sharding),
                                   static_cast<int>(recompute), sequence));
          RunConfig config = config_of(schedule, sharding, recompute, sequence);
          EXPECT_NO_THROW(check_launch_order(on_meta(config, degrees)));
          ++layouts;
          if (degrees.data != 4) continue;
          for (const int64_t group : {1, 2}) {
            config.parallel.shard_group = group;
            EXPECT_NO_THROW(check_launch_order(on_meta(config, degrees))) << "in groups of " << group;
          }
        }
      }
    }
  }
  EXPECT_GT(layouts, 200);
}

// Sums over copies do not wait for the end of the backward, where gradients overlap.
TEST(StepOrder, CopiesAreSummedBesideTheBackward) {
  for (const Sharding sharding : kShardings) {
    RunConfig config = config_of(PipelineSchedule::one_f_one_b, sharding, Recompute::none, false);
    config.parallel.shard_group = 2;
    for (const bool overlap : {true, false}) {
      SCOPED_TRACE(fmt::format("sharding {}, overlap {}", static_cast<int>(sharding), overlap));
      config.parallel.overlap_gradients = overlap;
      const std::vector<TrafficEvent> events =
          events_of_a_step(config, DeviceKind::meta, make_meta_world(3, 4), {.data = 4});
      size_t last_reduction = 0;
      for (size_t i = 0; i < events.size(); ++i)
        if (events[i].kind == "reduce_scatter") last_reduction = i;
      int64_t beside = 0;
      for (size_t i = 0; i < last_reduction; ++i)
        beside += events[i].group->name == "replication" && events[i].start > 0 && events[i].kind != "wait";
      EXPECT_EQ(beside > 3, overlap) << beside;
    }
  }
}

TEST(StepOrder, IsSoundWhereASecondStepBeginsBeforeTheFirstIsSettled) {
  for (const MeshDegrees& degrees : kLayouts) {
    for (const PipelineSchedule schedule : kSchedules) {
      if (degrees.pipeline == 1 && schedule != PipelineSchedule::one_f_one_b) continue;
      RunConfig config = config_of(schedule, Sharding::parameters, Recompute::none, false);
      config.optimizer.optimistic = true;
      EXPECT_NO_THROW(check_launch_order(on_meta(config, degrees))) << to_string(degrees);
    }
  }
}

// A breach that the check must see in a real step: one rank leaves out, doubles or exchanges a call.
TEST(StepOrder, AChangedCallOfAStepIsSeen) {
  const RunConfig config = config_of(PipelineSchedule::zb_v, Sharding::gradients, Recompute::none, true);
  const std::vector<RankEvents> sound = on_meta(config, {.tensor = 2, .data = 2, .pipeline = 2});
  ASSERT_GT(sound[5].events.size(), 50u);
  for (size_t at = 0; at < sound[5].events.size(); at += 7) {
    // What is only begun may be waited for in a later step.
    if (sound[5].events[at].kind == "wait") continue;
    std::vector<RankEvents> changed = sound;
    changed[5].events.erase(changed[5].events.begin() + static_cast<std::ptrdiff_t>(at));
    EXPECT_THROW(check_launch_order(changed), LogicError) << at;
    changed = sound;
    changed[5].events[at].bytes += 1;
    if (changed[5].events[at].kind != "control") {
      EXPECT_THROW(check_launch_order(changed), LogicError) << at;
    }
  }
}

bool same_event(const TrafficEvent& a, const TrafficEvent& b) {
  return a.group->name == b.group->name && a.group->world_ranks == b.group->world_ranks && a.kind == b.kind &&
         a.bytes == b.bytes && a.peer == b.peer && a.tag == b.tag && a.start == b.start;
}

void expect_meta_as_real(const RunConfig& config, const MeshDegrees& degrees) {
  SCOPED_TRACE(to_string(degrees));
  const auto ranks = static_cast<int>(num_ranks(degrees));
  std::vector<RankEvents> real(static_cast<size_t>(ranks));
  run_local_world(ranks, [&](const Group& world) {
    real[static_cast<size_t>(world.rank())] = {world.rank(),
                                               events_of_a_step(config, DeviceKind::cpu, world, degrees)};
  });
  const std::vector<RankEvents> meta = on_meta(config, degrees);
  for (size_t r = 0; r < real.size(); ++r) {
    ASSERT_EQ(real[r].events.size(), meta[r].events.size()) << "rank " << r;
    EXPECT_FALSE(real[r].events.empty());
    for (size_t i = 0; i < real[r].events.size(); ++i)
      ASSERT_TRUE(same_event(real[r].events[i], meta[r].events[i])) << "rank " << r << ", call " << i;
  }
  check_launch_order(real);
}

TEST(StepOrder, OfRealRanksIsThatOfMeta) {
  for (const PipelineSchedule schedule : kSchedules)
    expect_meta_as_real(config_of(schedule, Sharding::optimizer, Recompute::selective, true),
                        {.tensor = 2, .data = 2, .pipeline = 2});
  for (const Sharding sharding : kShardings) {
    RunConfig config = config_of(PipelineSchedule::one_f_one_b, sharding, Recompute::full, false);
    config.parallel.shard_group = 2;
    expect_meta_as_real(config, {.data = 4});
    expect_meta_as_real(config, {.context = 2, .data = 2});
    config.parallel.shard_group = 0;
    expect_meta_as_real(config, {.data = 4});
    expect_meta_as_real(config, {.tensor = 2, .data = 3});
    expect_meta_as_real(config, {.data = 2, .pipeline = 3});
  }
  RunConfig optimistic = config_of(PipelineSchedule::zb_h2, Sharding::parameters, Recompute::none, true);
  optimistic.optimizer.optimistic = true;
  expect_meta_as_real(optimistic, {.tensor = 2, .data = 2, .pipeline = 2});
}

}  // namespace
}  // namespace normformer::testing_support
