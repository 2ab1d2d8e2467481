#include <algorithm>
#include <array>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "normformer/planning/plan.h"
#include "normformer/training/metrics.h"

namespace normformer {

namespace {

// What all numbers of a table are given in.
struct ByteUnit {
  double bytes;
  const char* name;
};

ByteUnit unit_for(int64_t largest) {
  constexpr std::array<ByteUnit, 3> kUnits = {{{1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}}};
  const auto fits = std::find_if(kUnits.begin(), kUnits.end() - 1, [&](const ByteUnit& unit) {
    return static_cast<double>(largest) >= unit.bytes;
  });
  return *fits;
}

std::string in(const ByteUnit& unit, int64_t bytes) {
  return fmt::format("{:.2f}", static_cast<double>(bytes) / unit.bytes);
}

std::string with_unit(int64_t bytes) {
  const ByteUnit unit = unit_for(bytes);
  return fmt::format("{} {}", in(unit, bytes), unit.name);
}

// "2,648,724,480"
std::string grouped(int64_t number) {
  return number < 1000 ? std::to_string(number)
                       : fmt::format("{},{:03}", grouped(number / 1000), number % 1000);
}

std::string describe(const Range& layers) {
  return layers.size() == 1 ? std::to_string(layers.begin)
                            : fmt::format("{}-{}", layers.begin, layers.end - 1);
}

std::string describe_layers(const StagePlan& stage) {
  std::vector<std::string> parts;
  for (const Range& layers : stage.layers) parts.push_back(describe(layers));
  return fmt::format("{}", fmt::join(parts, ", "));
}

std::string describe_model(const Plan& plan) {
  const RunConfig& c = plan.config;
  const ParallelConfig& p = c.parallel;
  const std::string schedule =
      p.pipeline == 1 ? "" : fmt::format(", schedule {}", toml_value(c, "parallel.schedule"));
  const std::string context = p.context == 1 ? "" : fmt::format(" context {} x", p.context);
  const std::string groups = p.shard_group == 0 ? "" : fmt::format(" in groups of {}", p.shard_group);
  return fmt::format(
      "parameters  {} ({}), precision {}, recompute {}\n"
      "layout      tensor {}{} x{} pipeline {} x data {}{}, sharding {}{}\n"
      "batch       {} sequences of {} tokens; micro-batches of {}, {} a step on each replica\n",
      with_prefix(static_cast<double>(plan.parameters)), grouped(plan.parameters),
      toml_value(c, "train.precision"), toml_value(c, "train.recompute"), p.tensor,
      p.sequence && p.tensor > 1 ? " with sequence" : "", context, p.pipeline, p.data, schedule,
      toml_value(c, "parallel.sharding"), groups, c.train.global_batch, c.model.length, c.train.micro_batch,
      plan.micro_batches);
}

std::string describe_memory(const Plan& plan) {
  int64_t largest = 0;
  for (const StagePlan& stage : plan.stages) largest = std::max(largest, stage.largest.memory.peak_reserved);
  const ByteUnit unit = unit_for(largest);
  std::string text = fmt::format(
      "\npeak memory in {} of the rank of each stage that needs most; \"taken\" includes blocks kept for "
      "reuse\n"
      "{:>5}  {:<14}",
      unit.name, "stage", "layers");
  for (int use = 0; use < kNumMemoryUses; ++use)
    text += fmt::format("{:>15}", normformer::name_of(static_cast<MemoryUse>(use)));
  text += fmt::format("{:>12}{:>12}\n", "total", "taken");
  for (size_t s = 0; s < plan.stages.size(); ++s) {
    const MemoryReport& memory = plan.stages[s].largest.memory;
    text += fmt::format("{:>5}  {:<14}", s, describe_layers(plan.stages[s]));
    for (const int64_t bytes : memory.at_peak_by_use) text += fmt::format("{:>15}", in(unit, bytes));
    text += fmt::format("{:>12}{:>12}\n", in(unit, memory.peak_live), in(unit, memory.peak_reserved));
  }
  int64_t staging = 0;
  for (const StagePlan& stage : plan.stages) staging = std::max(staging, stage.largest.staging_bytes);
  return text +
         fmt::format("and {} of host memory for checkpoints on their way to the disk\n", with_unit(staging));
}

std::string describe_traffic(const Plan& plan) {
  if (plan.ranks == 1) return "\ntraffic of a step: none, on one rank\n";
  const ByteUnit unit = unit_for(plan.busiest.traffic_bytes());
  std::string text =
      fmt::format("\ntraffic of a step of the busiest rank, {} (stage {}): {} of payload\n",
                  plan.busiest.rank, plan.busiest.at.pipeline, with_unit(plan.busiest.traffic_bytes()));
  text += fmt::format("  {:<12}{:<16}{:>9}{:>13}\n", "group", "kind", "calls", unit.name);
  std::vector<TrafficRecord> records = plan.busiest.traffic;
  std::stable_sort(records.begin(), records.end(),
                   [](const TrafficRecord& a, const TrafficRecord& b) { return a.bytes > b.bytes; });
  for (const TrafficRecord& r : records)
    text += fmt::format("  {:<12}{:<16}{:>9}{:>13}\n", r.group, r.kind, r.calls, in(unit, r.bytes));
  return text;
}

std::string describe_work(const Plan& plan) {
  std::string text = fmt::format(
      "\nFLOPs of a step: {} for the model; the busiest rank computes {}, {:.2f} times an even share\n",
      with_prefix(plan.model_flops), with_prefix(static_cast<double>(plan.most_flops)),
      static_cast<double>(plan.most_flops) * static_cast<double>(plan.ranks) / plan.model_flops);
  if (!plan.pipeline) return text;
  return text +
         fmt::format(
             "pipeline: the bubble is {:.1f} % of all ranks' time of a step, were times in proportion to "
             "FLOPs "
             "and messages free; the barrier between steps (norm and finiteness of all gradients come before "
             "any update) costs {:.1f} % of the step{}\n",
             100 * plan.pipeline->bubble_fraction, 100 * plan.pipeline->barrier_share,
             plan.config.optimizer.optimistic
                 ? ", which optimizer.optimistic = true saves in steps whose update stands"
                 : "");
}

std::string describe_training(const Plan& plan) {
  const TrainConfig& train = plan.config.train;
  return fmt::format("training: {} updates take {} tokens and {:.2e} FLOPs of the model\n",
                     grouped(train.updates),
                     grouped(train.updates * train.global_batch * plan.config.model.length),
                     static_cast<double>(train.updates) * plan.model_flops);
}

std::string describe_sharding(const Plan& plan) {
  if (!plan.sharding) return "";
  const double factor =
      static_cast<double>(plan.sharding->bytes) / static_cast<double>(plan.sharding->bytes_of_optimizer);
  const bool parameters = plan.config.parallel.sharding == Sharding::parameters;
  return fmt::format(
      "sharding: {} moves {} over the {} group, {:.1f} times what \"optimizer\" (ZeRO-1) does, as "
      "gradients are reduced{} for each of {} micro-batches{}\n",
      toml_value(plan.config, "parallel.sharding"), with_unit(plan.sharding->bytes), plan.sharding->group,
      factor, parameters ? " and weights gathered" : "", plan.micro_batches,
      plan.pipeline ? ": a pipeline, which wants many micro-batches, is better off with \"optimizer\"" : "");
}

std::string describe_order(const Plan& plan) {
  const OrderPlan& order = plan.order;
  if (!order.violation.empty()) return fmt::format("order of calls: NOT SOUND: {}\n", order.violation);
  if (plan.ranks == 1) return "order of calls: one rank waits for nobody\n";
  const std::string which =
      order.ranks == plan.ranks
          ? fmt::format("all {} ranks", plan.ranks)
          : fmt::format(
                "{} of {} ranks (the first and last of tensor, context and data groups, of every stage)",
                order.ranks, plan.ranks);
  return fmt::format("order of calls: sound; the {} calls of {} fit together\n", grouped(order.calls), which);
}

}  // namespace

std::string describe(const Plan& plan) {
  return describe_model(plan) + describe_memory(plan) + describe_traffic(plan) + describe_work(plan) +
         describe_training(plan) + describe_sharding(plan) + describe_order(plan);
}

}  // namespace normformer
