#include "normformer/training/profile.h"

#include <filesystem>
#include <fstream>
#include <map>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "normformer/core/error.h"

namespace normformer {
namespace {

TEST(ProfiledUpdates, AreOneOrARange) {
  EXPECT_EQ(parse_profiled_updates("12"), (ProfiledUpdates{12, 12}));
  EXPECT_EQ(parse_profiled_updates("10-12"), (ProfiledUpdates{10, 12}));
  for (const char* bad :
       {"", "0", "-3", "12-", "-", "12-10", "1-2-3", "x", "1x", " 1", "99999999999999999999"}) {
    EXPECT_THROW(parse_profiled_updates(bad), ConfigError) << bad;
  }
}

// What a trace has to say of work under spans within each other.
std::vector<TraceSpan> trace_some_work(Context& context) {
  context.trace().start(context);
  {
    const TraceScope step(context, TraceKind::step, "step");
    {
      const TraceScope module(context, TraceKind::module, "layer", "forward", {.micro_batch = 3});
      const Tensor some = context.zeros({1000}, DType::f32);
      scale(context, some, 2.0);
    }
    const TraceScope reduce(context, TraceKind::communication, "all_reduce", {},
                            {.bytes = 8, .group = "data"});
  }
  return context.trace().finish(context);
}

TEST(Trace, SpansLieWithinEachOtherInOrder) {
  Context context(DeviceKind::cpu);
  const std::vector<TraceSpan> spans = trace_some_work(context);
  std::vector<std::string> names;
  for (const TraceSpan& s : spans) names.push_back(s.name);
  EXPECT_EQ(names, (std::vector<std::string>{"step", "layer forward", "fill_zero", "scale", "all_reduce"}));
  const auto lies_in = [&](size_t inner, size_t outer) {
    return spans[inner].begin_us >= spans[outer].begin_us &&
           spans[inner].begin_us + spans[inner].duration_us <=
               spans[outer].begin_us + spans[outer].duration_us;
  };
  EXPECT_TRUE(lies_in(1, 0));
  EXPECT_TRUE(lies_in(2, 1));
  EXPECT_TRUE(lies_in(3, 1));
  EXPECT_TRUE(lies_in(4, 0));
  EXPECT_GE(spans[4].begin_us, spans[1].begin_us + spans[1].duration_us);
  EXPECT_EQ(spans[1].details.micro_batch, 3);
  EXPECT_EQ(spans[2].details.bytes, 4000);
  EXPECT_EQ(spans[3].details.flops, 1000);
  EXPECT_EQ(spans[3].details.bytes, 8000);
  EXPECT_EQ(spans[4].group, "data");
}

TEST(Trace, NothingIsRecordedOutsideStartAndFinish) {
  Context context(DeviceKind::cpu);
  EXPECT_FALSE(context.trace().is_on());
  { const TraceScope scope(context, TraceKind::step, "too early"); }
  {
    const TraceScope open_before(context, TraceKind::step, "open before");
    context.trace().start(context);
  }
  const auto* left_open = new TraceScope(context, TraceKind::step, "left open");
  EXPECT_TRUE(context.trace().finish(context).empty());
  delete left_open;
  EXPECT_FALSE(context.trace().is_on());
  EXPECT_THROW(context.trace().finish(context), LogicError);
}

TEST(TraceEvents, AreJsonThatTheViewersRead) {
  std::vector<TraceSpan> spans(2);
  spans[0] = {.name = "a \"quoted\" name",
              .kind = TraceKind::operation,
              .lane = TraceLane::host,
              .begin_us = 10,
              .duration_us = 2,
              .details = {.flops = 4000, .bytes = 8000},
              .group = {}};
  spans[1] = spans[0];
  spans[1].lane = TraceLane::gpu_compute;
  spans[1].begin_us = 11;
  const std::string text = trace_events(5, "node1", spans);
  const auto events = nlohmann::json::parse("[" + text + "null]");
  std::map<std::string, int> places;
  std::vector<nlohmann::json> timed;
  for (const auto& event : events) {
    if (event.is_null()) continue;
    EXPECT_EQ(event["pid"], 5);
    if (event["ph"] == "X") timed.push_back(event);
    if (event["name"] == "thread_name") places[event["args"]["name"]] = event["tid"];
  }
  EXPECT_EQ(places.size(), 2U);
  ASSERT_EQ(timed.size(), 2U);
  EXPECT_EQ(timed[0]["name"], "a \"quoted\" name");
  EXPECT_EQ(timed[0]["cat"], "operation");
  EXPECT_EQ(timed[0]["tid"], places["host"]);
  EXPECT_EQ(timed[1]["tid"], places["GPU: compute"]);
  EXPECT_EQ(timed[1]["ts"], 11.0);
  EXPECT_EQ(timed[1]["dur"], 2.0);
  // A rate is told where the work was done, not where it was enqueued.
  EXPECT_FALSE(timed[0]["args"].contains("GB/s"));
  EXPECT_DOUBLE_EQ(timed[1]["args"]["GB/s"].get<double>(), 4.0);
  EXPECT_DOUBLE_EQ(timed[1]["args"]["GFLOP/s"].get<double>(), 2.0);
}

TEST(Profiler, TracesTheUpdatesThatAreAskedForIntoOneFile) {
  const auto file =
      std::filesystem::temp_directory_path() / fmt::format("normformer_trace_{}.json", getpid());
  Context context(DeviceKind::cpu);
  Profiler profiler(context, make_self_world(), {2, 3}, file);
  for (int64_t update = 1; update <= 4; ++update) {
    profiler.before_update(update);
    EXPECT_EQ(context.trace().is_on(), update == 2 || update == 3);
    { const TraceScope scope(context, TraceKind::step, fmt::format("step {}", update)); }
    EXPECT_EQ(profiler.after_update(update), update == 3);
  }
  std::ifstream stream(file);
  const auto trace = nlohmann::json::parse(stream);
  std::vector<std::string> steps;
  for (const auto& event : trace["traceEvents"]) {
    if (event["ph"] == "X") steps.push_back(event["name"]);
  }
  EXPECT_EQ(steps, (std::vector<std::string>{"step 2", "step 3"}));
  std::filesystem::remove(file);
}

}  // namespace
}  // namespace normformer
