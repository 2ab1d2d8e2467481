#include "normformer/pipeline/executor.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "normformer/core/error.h"
#include "normformer/pipeline/checker.h"

#include "lists.h"
#include "toy_model.h"

namespace normformer {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

// Odd numbers of tokens, and none for every fourth micro-batch from the third on.
std::vector<int64_t> uneven_rows(int64_t micro_batches) {
  std::vector<int64_t> rows;
  for (int64_t m = 0; m < micro_batches; ++m) rows.push_back(m % 4 == 2 ? 0 : 1 + 2 * (m % 3));
  return rows;
}

// Every backward as its two halves, the weight gradients one micro-batch late.
Schedule with_split_backward(Schedule schedule) {
  for (auto& list : schedule.stages) {
    std::vector<Action> split;
    for (const Action& action : list) {
      if (action.kind == ActionKind::forward) {
        split.push_back(action);
        continue;
      }
      split.push_back({ActionKind::backward_input, action.micro_batch});
      if (action.micro_batch > 0) split.push_back({ActionKind::backward_weight, action.micro_batch - 1});
    }
    if (schedule.micro_batches > 0)
      split.push_back({ActionKind::backward_weight, schedule.micro_batches - 1});
    list = split;
  }
  return schedule;
}

// What one rank has after a run, by chunk.
struct RankResult {
  std::vector<double> loss;
  std::vector<std::vector<double>> gradient;
  std::vector<std::vector<int64_t>> weight_order;
  int64_t alive = 0;
  int64_t peak_alive = 0;
  int64_t live_bytes = 0;
};

// How forwards go ahead of what is known: not at all, with weights that stand, or with others, which are
// thrown away.
enum class Ahead { no, right, wrong };

RankResult run_rank(const Group& world, const Schedule& schedule, const ToyModel& whole, Ahead ahead) {
  Context context(DeviceKind::cpu);
  ToyModel model = whole;
  if (ahead == Ahead::wrong)
    for (auto& of_part : model.weights) std::reverse(of_part.begin(), of_part.end());
  RankResult result;
  std::vector<std::unique_ptr<ToyStage>> stages;
  std::vector<Stage*> parts;
  const auto count_alive = [&] {
    int64_t alive = 0;
    for (const auto& stage : stages) alive += stage->alive;
    return alive;
  };
  for (int64_t c = 0; c < schedule.chunks; ++c) {
    stages.push_back(std::make_unique<ToyStage>(context, model, schedule.part(world.rank(), c)));
    stages.back()->before = [&](int64_t) {
      result.peak_alive = std::max(result.peak_alive, count_alive() + 1);
    };
    parts.push_back(stages.back().get());
  }
  int asked = 0;
  const BeginAgain begin_again = [&] {
    ++asked;
    model = whole;
    for (const auto& stage : stages) EXPECT_EQ(stage->loss, 0.0) << "the last part has gone forward";
    return ahead == Ahead::wrong;
  };
  if (ahead == Ahead::no) {
    run_schedule(context, world, schedule, parts);
  } else {
    run_schedule(context, world, schedule, parts, schedule.micro_batches % 2 == 0, begin_again);
    EXPECT_EQ(asked, 1);
  }
  for (const auto& stage : stages) {
    result.loss.push_back(stage->loss);
    result.gradient.push_back(stage->gradient);
    result.weight_order.push_back(stage->weight_order);
  }
  result.alive = count_alive();
  world.barrier();  // a receiver may hold a message's memory until it leaves its receive
  result.live_bytes = context.memory().report().live;
  return result;
}

// Runs the schedule on ranks as threads and holds all it leaves against the model by plain loops.
void expect_exact(const Schedule& schedule, const std::vector<int64_t>& rows, Ahead ahead) {
  const ToyModel model(schedule.num_parts(), rows);
  const auto peak_saved = check_schedule(schedule).peak_saved;
  std::vector<RankResult> results(static_cast<size_t>(schedule.num_stages()));
  run_local_world(static_cast<int>(schedule.num_stages()), [&](const Group& world) {
    results[static_cast<size_t>(world.rank())] = run_rank(world, schedule, model, ahead);
  });
  std::vector<int64_t> in_order;
  for (int64_t m = 0; m < schedule.micro_batches; ++m) in_order.push_back(m);
  for (int64_t s = 0; s < schedule.num_stages(); ++s) {
    const RankResult& result = results[static_cast<size_t>(s)];
    for (int64_t c = 0; c < schedule.chunks; ++c) {
      const int64_t part = schedule.part(s, c);
      EXPECT_EQ(result.gradient[static_cast<size_t>(c)], model.gradient(part)) << "part " << part;
      EXPECT_EQ(result.weight_order[static_cast<size_t>(c)], in_order) << "part " << part;
      EXPECT_EQ(result.loss[static_cast<size_t>(c)], part == model.parts() - 1 ? model.loss() : 0.0);
    }
    EXPECT_EQ(result.alive, 0) << "stage " << s;
    EXPECT_EQ(result.peak_alive, peak_saved[static_cast<size_t>(s)]) << "stage " << s;
    EXPECT_EQ(result.live_bytes, 0) << "stage " << s;
  }
}

void expect_exact(const Schedule& schedule, const std::vector<int64_t>& rows) {
  for (const Ahead ahead : {Ahead::no, Ahead::right, Ahead::wrong}) expect_exact(schedule, rows, ahead);
}

class ExecutorSizes : public testing::TestWithParam<std::tuple<int64_t, int64_t>> {};

TEST_P(ExecutorSizes, EveryScheduleGivesTheGradientsOfTheWholeModel) {
  const auto [stages, micro_batches] = GetParam();
  const std::vector<int64_t> full(static_cast<size_t>(micro_batches), 2);
  for (const auto& rows : {full, uneven_rows(micro_batches)}) {
    expect_exact(gpipe_schedule(stages, micro_batches), rows);
    expect_exact(one_f_one_b_schedule(stages, micro_batches), rows);
    expect_exact(with_split_backward(one_f_one_b_schedule(stages, micro_batches)), rows);
    expect_exact(interleaved_schedule(stages, micro_batches, 2), rows);
    expect_exact(interleaved_schedule(stages, micro_batches, 3, stages + 1), rows);
    expect_exact(zb_h1_schedule(stages, micro_batches), rows);
    expect_exact(zb_h2_schedule(stages, micro_batches), rows);
    expect_exact(zb_v_schedule(stages, micro_batches), rows);
  }
}

INSTANTIATE_TEST_SUITE_P(Worlds, ExecutorSizes,
                         testing::Combine(testing::Range<int64_t>(1, 5),
                                          testing::Values<int64_t>(0, 1, 2, 3, 5, 8)));

TEST(Executor, RandomSchedulesRun) {
  std::mt19937 random(7);
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int i = 0; i < 30; ++i) {
    const int64_t stages = draw(1, 6);
    const int64_t micro_batches = draw(0, 20);
    const int64_t chunks = draw(2, 4);
    const auto rows = uneven_rows(micro_batches);
    expect_exact(interleaved_schedule(stages, micro_batches, chunks, draw(stages, 2 * stages)), rows);
    expect_exact(zb_v_schedule(stages, micro_batches), rows);
    expect_exact(zb_h2_schedule(stages, micro_batches), rows);
  }
}

TEST(Executor, ChunksOfARankRun) {
  expect_exact(interleaved_two_stages(), {3, 2});
  expect_exact(interleaved_two_stages(), {0, 2});
  expect_exact(lists(2, {"F0a F0b F1a B0b F1b B0a B1b B1a"}, 2), {3, 2});
  // Rank 1 sends a gradient before an activation, rank 0 takes them the other way round.
  expect_exact(lists(2, {"F0a F0b F1a F1b B0b B1b B0a B1a", "F0a F0b B0b F1a F1b B1b B0a B1a"}, 2), {3, 2});
}

TEST(Executor, AsksBehindForwardsThatAllAreBeforeTheOthersPlaces) {
  const auto places = [](const Schedule& schedule) { return places_to_ask(schedule); };
  using Places = std::vector<size_t>;
  EXPECT_EQ(places(gpipe_schedule(3, 4)), (Places{4, 4, 0}));
  EXPECT_EQ(places(one_f_one_b_schedule(3, 4)), (Places{3, 2, 0}));
  EXPECT_EQ(places(zb_h2_schedule(3, 6)), (Places{5, 3, 0}));
  // Rank 0 has the last part.
  EXPECT_EQ(places(zb_v_schedule(2, 3)), (Places{3, 4}));
  // Rank 1 forwards micro-batch 1 behind its place only, so rank 0 cannot have it in its second chunk.
  EXPECT_EQ(places(lists(2, {"F0a F0b F1a F1b B0b B1b B0a B1a", "F0a F0b B0b F1a F1b B1b B0a B1a"}, 2)),
            (Places{3, 1}));
  EXPECT_EQ(places(one_f_one_b_schedule(1, 2)), (Places{0}));
  EXPECT_EQ(places(one_f_one_b_schedule(2, 0)), (Places{0, 0}));
}

TEST(Executor, AllMicroBatchesMayBeEmpty) { expect_exact(one_f_one_b_schedule(3, 4), {0, 0, 0, 0}); }

class ForwardSizes : public testing::TestWithParam<std::tuple<int, int64_t, int64_t, Placement>> {};

TEST_P(ForwardSizes, LossIsTheWholeModels) {
  const auto [ranks, chunks, micro_batches, placed] = GetParam();
  const ToyModel model(ranks * chunks, uneven_rows(micro_batches));
  std::vector<double> losses(static_cast<size_t>(ranks), -1.0);
  const int64_t num_micro_batches = micro_batches;
  const Schedule wiring{0, chunks, std::vector<std::vector<Action>>(static_cast<size_t>(ranks)), placed};
  run_local_world(ranks, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    std::vector<std::unique_ptr<ToyForwardStage>> stages;
    std::vector<ForwardStage*> parts;
    for (int64_t c = 0; c < wiring.chunks; ++c) {
      stages.push_back(std::make_unique<ToyForwardStage>(context, model, wiring.part(world.rank(), c)));
      parts.push_back(stages.back().get());
    }
    run_forward(context, world, num_micro_batches, parts, wiring.placement);
    losses[static_cast<size_t>(world.rank())] = stages.back()->loss();
    world.barrier();  // a receiver may hold a message's memory until it leaves its receive
    EXPECT_EQ(context.memory().report().live, 0);
  });
  EXPECT_EQ(losses[static_cast<size_t>(wiring.stage_of(model.parts() - 1))], model.loss());
}

INSTANTIATE_TEST_SUITE_P(Worlds, ForwardSizes,
                         testing::Combine(testing::Range(1, 5), testing::Values<int64_t>(1, 2, 3),
                                          testing::Values<int64_t>(0, 1, 3, 9),
                                          testing::Values(Placement::round_robin, Placement::v_shape)));

// One rank's transport without the others: whatever is received is zeros; counts the requests that the rank
// has not completed.
class CountingTransport : public detail::GroupImpl {
 public:
  struct Count {
    int64_t open = 0;
    int64_t peak = 0;
    int64_t sent = 0;
  };

  CountingTransport(int rank, int size, Count& count) : rank_(rank), size_(size), count_(count) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void exchange(std::span<const detail::Outgoing>, std::span<const detail::Incoming>, int) override {
    FAIL();
  }
  std::unique_ptr<detail::Transfer> start_exchange(std::span<const detail::Outgoing>,
                                                   std::span<const detail::Incoming>, int) override {
    throw CommError("only messages are counted");
  }
  std::unique_ptr<CommRequest::Impl> send(const Tensor&, int, int) override {
    ++count_.sent;
    count_.peak = std::max(count_.peak, ++count_.open);
    return std::make_unique<Request>(count_);
  }
  void receive(std::byte* data, int64_t bytes, int, int) override {
    std::memset(data, 0, static_cast<size_t>(bytes));
  }
  std::unique_ptr<detail::Transfer> start_receive(std::byte* data, int64_t bytes, int from,
                                                  int tag) override {
    receive(data, bytes, from, tag);
    return std::make_unique<Received>();
  }
  std::unique_ptr<GroupImpl> subgroup(std::span<const int>) override { return nullptr; }

 private:
  class Request : public CommRequest::Impl {
   public:
    explicit Request(Count& count) : count_(count) {}
    void wait() override { --count_.open; }

   private:
    Count& count_;
  };

  class Received : public detail::Transfer {
   public:
    bool test() override { return true; }
  };

  int rank_;
  int size_;
  Count& count_;
};

Group counting_group(int rank, int size, CountingTransport::Count& count) {
  GroupMembers members{"pipeline", {}};
  for (int r = 0; r < size; ++r) members.world_ranks.push_back(r);
  return Group(std::make_unique<CountingTransport>(rank, size, count), members,
               std::make_shared<TrafficLedger>());
}

CountingTransport::Count count_sends(int rank, const Schedule& schedule) {
  CountingTransport::Count count;
  const auto size = static_cast<int>(schedule.num_stages());
  const ToyModel model(schedule.num_parts(),
                       std::vector<int64_t>(static_cast<size_t>(schedule.micro_batches), 1));
  Context context(DeviceKind::cpu);
  std::vector<std::unique_ptr<ToyStage>> stages;
  std::vector<Stage*> parts;
  for (int64_t c = 0; c < schedule.chunks; ++c) {
    stages.push_back(std::make_unique<ToyStage>(context, model, schedule.part(rank, c)));
    parts.push_back(stages.back().get());
  }
  run_schedule(context, counting_group(rank, size, count), schedule, parts);
  EXPECT_EQ(count.open, 0);
  return count;
}

TEST(Executor, OpenSendsOf1F1BDependOnStagesOnly) {
  // Stage 0 of 4 has sent micro-batches 0 to 3 when the gradient of 0 shows that 0, 1 and 2 have arrived.
  EXPECT_EQ(count_sends(0, one_f_one_b_schedule(4, 8)).peak, 4);
  for (int rank = 0; rank < 4; ++rank) {
    const auto few = count_sends(rank, one_f_one_b_schedule(4, 8));
    const auto many = count_sends(rank, one_f_one_b_schedule(4, 100));
    EXPECT_EQ(many.peak, few.peak) << "stage " << rank;
    EXPECT_LE(many.peak, 4) << "stage " << rank;
    EXPECT_EQ(many.sent, rank == 0 || rank == 3 ? 100 : 200);
  }
}

TEST(Executor, OpenSendsOfAVDependOnStagesOnlyAndNothingIsSentToOneself) {
  for (int rank = 0; rank < 4; ++rank) {
    const auto few = count_sends(rank, zb_v_schedule(4, 20));
    const auto many = count_sends(rank, zb_v_schedule(4, 100));
    EXPECT_EQ(many.peak, few.peak) << "rank " << rank;
    EXPECT_LE(many.peak, 2 * 4) << "rank " << rank;
    EXPECT_EQ(many.sent, rank == 0 || rank == 3 ? 200 : 400);
  }
  EXPECT_EQ(count_sends(0, interleaved_schedule(1, 5, 3)).sent, 0);
}

TEST(Executor, OpenSendsOfAForwardRunAreAsManyAsStages) {
  CountingTransport::Count count;
  const ToyModel model(4, std::vector<int64_t>(100, 1));
  Context context(DeviceKind::cpu);
  ToyForwardStage stage(context, model, 1);
  run_forward(context, counting_group(1, 4, count), 100, stage);
  EXPECT_EQ(count.open, 0);
  EXPECT_EQ(count.peak, 4);
  EXPECT_EQ(count.sent, 100);
}

TEST(Executor, AFailingStageEndsTheRun) {
  const ToyModel model(3, {1, 1, 1, 1});
  const auto run = [&] {
    run_local_world(3, [&](const Group& world) {
      Context context(DeviceKind::cpu);
      ToyStage stage(context, model, world.rank());
      stage.before = [&](int64_t m) {
        if (world.rank() == 1 && m == 2) throw NumericError("micro-batch 2 diverged");
      };
      run_schedule(context, world, one_f_one_b_schedule(3, 4), stage);
    });
  };
  EXPECT_THAT(run, ThrowsMessage<NumericError>(HasSubstr("micro-batch 2 diverged")));
}

TEST(Executor, UnsoundOrUnfitSchedulesAreRefusedBeforeAnythingRuns) {
  const ToyModel model(1, {1, 1});
  Context context(DeviceKind::cpu);
  ToyStage stage(context, model, 0);
  const Group world = make_self_world();
  EXPECT_THROW(run_schedule(context, world, lists(2, {"F0 F1 B0"}), stage), LogicError);
  EXPECT_THROW(run_schedule(context, world, gpipe_schedule(2, 2), stage), LogicError);
  EXPECT_THROW(run_schedule(context, world, lists(1, {"F0a F0b B0b B0a"}, 2), stage), LogicError);
  EXPECT_THROW(run_forward(context, world, 1, std::span<ForwardStage* const>()), LogicError);
  EXPECT_EQ(stage.loss, 0);
  EXPECT_THAT(stage.gradient, Each(0.0));
}

// Parts that do nothing but allocate; `returned_rows` lets them break their contract.
class HollowStage : public Stage {
 public:
  struct Nothing : Saved {};

  HollowStage(Context& context, bool is_first, bool is_last, int64_t returned_rows = 5)
      : context_(context), is_first_(is_first), is_last_(is_last), returned_rows_(returned_rows) {}
  Shape boundary_shape(int64_t) const override { return {5, 2}; }
  DType boundary_dtype() const override { return DType::bf16; }
  Tensor forward(int64_t, const Tensor&, std::unique_ptr<Saved>& saved) override {
    saved = std::make_unique<Nothing>();
    return make(is_last_);
  }
  Tensor backward_input(int64_t, Saved&, const Tensor&) override { return make(is_first_); }
  void backward_weight(int64_t, Saved&) override {}
  Tensor backward(int64_t, Saved&, const Tensor&) override { return make(is_first_); }

 private:
  Tensor make(bool is_outermost) {
    return is_outermost ? Tensor() : context_.empty({returned_rows_, 2}, DType::bf16);
  }

  Context& context_;
  bool is_first_;
  bool is_last_;
  int64_t returned_rows_;
};

TEST(Executor, PartsThatBreakTheirContractAreRefused) {
  Context context(DeviceKind::meta);
  const Schedule schedule = gpipe_schedule(2, 1);
  HollowStage wrong_shape(context, true, false, 4);
  EXPECT_THROW(run_schedule(context, make_meta_world(0, 2), schedule, wrong_shape), LogicError);
  HollowStage returns_nothing(context, true, true);
  EXPECT_THROW(run_schedule(context, make_meta_world(0, 2), schedule, returns_nothing), LogicError);
  HollowStage returns_too_much(context, false, false);
  EXPECT_THROW(run_schedule(context, make_meta_world(1, 2), schedule, returns_too_much), LogicError);
}

TEST(Executor, MetaRunAccountsEveryMessage) {
  Context context(DeviceKind::meta);
  const Group world = make_meta_world(1, 4);
  HollowStage stage(context, false, false);
  run_schedule(context, world, one_f_one_b_schedule(4, 8), stage);
  int64_t checked = 0;
  for (const TrafficRecord& record : world.ledger().records()) {
    EXPECT_TRUE(record.kind == "send" || record.kind == "receive") << record.kind;
    EXPECT_EQ(record.calls, 16);  // an activation and a gradient a micro-batch
    EXPECT_EQ(record.bytes, 16 * 5 * 2 * 2);
    ++checked;
  }
  EXPECT_EQ(checked, 2);
}

}  // namespace
}  // namespace normformer
