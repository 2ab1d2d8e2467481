#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include <fmt/format.h>

#include "normformer/config/run_config.h"
#include "normformer/core/checked.h"
#include "normformer/core/error.h"

#include "suggest.h"

namespace normformer {

namespace {

/// Degrees of parallelism, or the largest that a model and its batch allow.
struct Degrees {
  int64_t tensor;
  int64_t context;
  int64_t pipeline;
  int64_t data;
};

Degrees largest_degrees(const RunConfig& c) {
  const int64_t vocab = c.model.vocab > 0 ? c.model.vocab : std::numeric_limits<int64_t>::max();
  // Sequences are split where that was asked for, and never more: it is for what does not fit otherwise.
  const int64_t context = std::clamp<int64_t>(c.model.length / 2, 1, c.parallel.context);
  return {std::min({c.model.heads, c.model.ffn, vocab}), context, c.model.layers / c.parallel.parts_of_rank(),
          c.train.global_batch};
}

std::vector<int64_t> divisors_of(int64_t n) {
  std::vector<int64_t> divisors;
  for (int64_t d = 1; d <= n / d; ++d) {
    if (n % d != 0) continue;
    divisors.push_back(d);
    if (d != n / d) divisors.push_back(n / d);
  }
  std::sort(divisors.begin(), divisors.end());
  return divisors;
}

std::vector<Degrees> fitting_layouts(const Degrees& largest, int64_t world) {
  std::vector<Degrees> layouts;
  for (const int64_t tensor : divisors_of(world)) {
    if (tensor > largest.tensor) continue;
    for (const int64_t context : divisors_of(world / tensor)) {
      if (context > largest.context) continue;
      const int64_t rest = world / tensor / context;
      for (const int64_t pipeline : divisors_of(rest)) {
        if (pipeline <= largest.pipeline && rest / pipeline <= largest.data)
          layouts.push_back({tensor, context, pipeline, rest / pipeline});
      }
    }
  }
  return layouts;
}

/// How far a layout is from what was asked for, in factors of two.
double distance(const ParallelConfig& asked, const Degrees& layout) {
  const auto factors = [](int64_t a, int64_t b) {
    return std::abs(std::log2(static_cast<double>(a)) - std::log2(static_cast<double>(b)));
  };
  const double data = asked.data > 0 ? factors(asked.data, layout.data) : 0.0;
  return factors(asked.tensor, layout.tensor) + factors(asked.context, layout.context) +
         factors(asked.pipeline, layout.pipeline) + data;
}

/// The product of the largest degrees, or `world` where that is less.
int64_t most_ranks(const Degrees& largest, int64_t world) {
  int64_t ranks = 1;
  for (const int64_t degree : {largest.tensor, largest.context, largest.pipeline, largest.data}) {
    ranks = std::min(world, checked_mul(ranks, std::min(degree, world)));
  }
  return ranks;
}

/// All layouts that fit, the nearest to what was asked for first.
std::vector<Degrees> nearest_first(const RunConfig& config, int64_t world) {
  std::vector<Degrees> layouts = fitting_layouts(largest_degrees(config), world);
  std::stable_sort(layouts.begin(), layouts.end(), [&](const Degrees& a, const Degrees& b) {
    return distance(config.parallel, a) < distance(config.parallel, b);
  });
  return layouts;
}

std::string nearest_layouts(const RunConfig& config, int64_t world) {
  constexpr size_t shown = 4;
  std::vector<Degrees> layouts = nearest_first(config, world);
  if (layouts.empty()) {
    const Degrees largest = largest_degrees(config);
    int64_t fewer = std::min(world - 1, most_ranks(largest, world));  // one rank always has a layout
    while (fitting_layouts(largest, fewer).empty()) --fewer;
    return fmt::format("no layout of this model fits {} ranks; {} would", world,
                       fewer == 1 ? "1 rank" : fmt::format("{} ranks", fewer));
  }
  layouts.resize(std::min(layouts.size(), shown));
  std::vector<std::string> words;
  for (const Degrees& l : layouts)
    words.push_back(fmt::format("{} x {} x {} x {}", l.tensor, l.context, l.pipeline, l.data));
  return fmt::format("layouts of this model that fit {} {} (parallel.tensor x context x pipeline x data): {}",
                     world, world == 1 ? "rank" : "ranks", join(words));
}

/// Why the degrees cannot be, as one sentence; "" where they can. `data` is the degree after the left-over
/// rule.
std::string misfit(const RunConfig& c, int64_t world) {
  const ParallelConfig& p = c.parallel;
  if (p.tensor > c.model.heads) {
    return fmt::format("parallel.tensor = {} is more than model.heads = {}, so some ranks would have no head",
                       p.tensor, c.model.heads);
  }
  if (p.tensor > c.model.ffn) {
    return fmt::format("parallel.tensor = {} is more than model.ffn = {}", p.tensor, c.model.ffn);
  }
  if (c.model.vocab > 0 && p.tensor > c.model.vocab) {
    return fmt::format("parallel.tensor = {} is more than model.vocab = {}", p.tensor, c.model.vocab);
  }
  if (p.parts() > c.model.layers) {
    const std::string of_rank =
        p.parts_of_rank() > 1 ? fmt::format(" with {} parts on each rank", p.parts_of_rank()) : "";
    return fmt::format("model.layers = {} are too few layers for the stages of parallel.pipeline = {}{}",
                       c.model.layers, p.pipeline, of_rank);
  }
  const int64_t shared = checked_mul(checked_mul(p.tensor, p.context), p.pipeline);
  if (p.data == 0 && world % shared != 0) {
    return fmt::format(
        "parallel.tensor x context x pipeline = {} x {} x {} = {} does not divide the number of ranks, {}",
        p.tensor, p.context, p.pipeline, shared, world);
  }
  if (p.data > 0 && (shared > world || shared * p.data != world)) {
    return fmt::format(
        "parallel.tensor x context x pipeline x data = {} x {} x {} x {} is not the number of ranks, {}",
        p.tensor, p.context, p.pipeline, p.data, world);
  }
  const int64_t data = world / shared;
  if (data > c.train.global_batch) {
    return fmt::format("train.global_batch = {} is too small for {} data-parallel replicas",
                       c.train.global_batch, data);
  }
  return "";
}

/// Whether groups of parallel.shard_group make up all replicas; parallel.data is resolved.
bool groups_fit(const ParallelConfig& p) {
  return p.shard_group == 0 || checked_mul(p.data, p.context) % p.shard_group == 0;
}

std::string groups_misfit(const ParallelConfig& p) {
  const int64_t replicas = checked_mul(p.data, p.context);
  std::vector<std::string> divisors;
  for (const int64_t d : divisors_of(replicas)) divisors.push_back(fmt::format("{}", d));
  return fmt::format(
      "parallel.shard_group = {} does not divide the number of replicas, parallel.data x context = {} x {} = "
      "{}; what does: {}",
      p.shard_group, p.data, p.context, replicas, join(divisors));
}

}  // namespace

RunConfig resolve_layout(RunConfig config, int64_t world) {
  const ParallelConfig& p = config.parallel;
  NF_CHECK(world >= 1 && p.tensor >= 1 && p.context >= 1 && p.pipeline >= 1 && p.data >= 0,
           "degrees {} x {} x {} x {} on {} ranks", p.tensor, p.context, p.pipeline, p.data, world);
  if (config.model.ffn == 0) config.model.ffn = checked_mul(4, config.model.width);
  const std::string reason = misfit(config, world);
  if (!reason.empty()) throw ConfigError(fmt::format("{}; {}", reason, nearest_layouts(config, world)));
  config.parallel.data = world / (p.tensor * p.context * p.pipeline);
  if (!groups_fit(p)) throw ConfigError(groups_misfit(p));
  return config;
}

RunConfig nearest_layout(RunConfig config, int64_t world) {
  if (config.model.ffn == 0) config.model.ffn = checked_mul(4, config.model.width);
  if (!misfit(config, world).empty()) {
    // Neither matters to what is computed, and both are made for the stages that there were.
    config.parallel.schedule = PipelineSchedule::one_f_one_b;
    config.parallel.virtual_stages = 1;
    config.parallel.split.clear();
    const std::vector<Degrees> layouts = nearest_first(config, world);
    if (!layouts.empty()) {
      config.parallel.tensor = layouts.front().tensor;
      config.parallel.context = layouts.front().context;
      config.parallel.pipeline = layouts.front().pipeline;
      config.parallel.data = layouts.front().data;
    }
  }
  const int64_t shard_group = std::exchange(config.parallel.shard_group, 0);
  config = resolve_layout(std::move(config), world);
  config.parallel.shard_group = shard_group;
  if (!groups_fit(config.parallel)) config.parallel.shard_group = 0;
  return config;
}

}  // namespace normformer
