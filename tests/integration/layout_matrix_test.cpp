// Every way to lay out a run against one process: all pairs of choices, with dropout on, in fp64.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <tuple>

#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "normformer/training/trainer.h"

#include "small_model.h"

namespace normformer::testing_support {
namespace {

constexpr int64_t kMostRanks = 8;
constexpr int64_t kSteps = 20;

/// A pipeline with its schedule.
struct Pipeline {
  int64_t stages;
  PipelineSchedule schedule;
  int64_t virtual_stages = 1;
  int64_t interleave_group = 0;
  std::vector<int64_t> split = {};
};

const std::vector<Pipeline>& pipelines() {
  using S = PipelineSchedule;
  static const std::vector<Pipeline> all{{1, S::one_f_one_b},
                                         {1, S::zb_h1},
                                         {1, S::interleaved, 3},
                                         {2, S::gpipe},
                                         {2, S::one_f_one_b, 1, 0, {5, 2}},
                                         {2, S::interleaved, 2},
                                         {2, S::interleaved, 3, 4},
                                         {2, S::zb_h2},
                                         {2, S::zb_v, 1, 0, {1, 2, 3, 1}},
                                         {3, S::one_f_one_b},
                                         {3, S::interleaved, 2},
                                         {3, S::zb_h1},
                                         {3, S::zb_v}};
  return all;
}

constexpr std::array<int64_t, 4> kTensor{1, 2, 3, 4};
constexpr std::array<int64_t, 3> kData{1, 2, 3};
constexpr std::array<int64_t, 2> kContext{1, 2};
constexpr std::array<Sharding, 3> kSharding{Sharding::optimizer, Sharding::gradients, Sharding::parameters};
constexpr std::array<int64_t, 3> kShardGroup{0, 1, 2};  // 0 is all
constexpr std::array<std::pair<Recompute, int64_t>, 4> kRecompute{
    {{Recompute::none, 0}, {Recompute::selective, 0}, {Recompute::full, 0}, {Recompute::full, 1}}};
constexpr std::array<int64_t, 3> kMicroBatch{1, 2, 3};
constexpr double kSmallBuckets = 0.004;  // MiB: about one for each layer

/// What of communication goes on beside computing.
struct Overlap {
  bool gradients;
  bool parameters;
  bool pipeline;
  bool context;
  bool tensor;
};
constexpr std::array<Overlap, 7> kOverlap{{{false, false, false, false, false},
                                           {true, true, true, true, true},
                                           {true, false, false, false, false},
                                           {false, true, false, false, false},
                                           {false, false, true, false, false},
                                           {false, false, false, true, false},
                                           {false, false, false, false, true}}};

void set_overlap(ParallelConfig& config, const Overlap& overlap) {
  config.overlap_gradients = overlap.gradients;
  config.overlap_parameters = overlap.parameters;
  config.overlap_pipeline = overlap.pipeline;
  config.overlap_context = overlap.context;
  config.overlap_tensor = overlap.tensor;
}

constexpr std::array<FfnNormForm, 2> kForm{FfnNormForm::folded, FfnNormForm::plain};

/// A choice of each factor, by its place in the lists above.
enum Factor : size_t {
  tensor,
  sequence,
  pipeline,
  data,
  sharding,
  recompute,
  micro_batch,
  form,
  overlap,
  context,
  shard_group,
  kFactors
};
using Choice = std::array<size_t, kFactors>;

std::array<size_t, kFactors> levels() {
  return {kTensor.size(),     2,
          pipelines().size(), kData.size(),
          kSharding.size(),   kRecompute.size(),
          kMicroBatch.size(), kForm.size(),
          kOverlap.size(),    kContext.size(),
          kShardGroup.size()};
}

MeshDegrees degrees_of(const Choice& c) {
  return {.tensor = kTensor[c[tensor]],
          .context = kContext[c[context]],
          .data = kData[c[data]],
          .pipeline = pipelines()[c[pipeline]].stages};
}

RunConfig config_of(const Choice& c) {
  RunConfig config = small_config(Precision::fp64);
  const Pipeline& p = pipelines()[c[pipeline]];
  config.model.layers = 7;
  config.model.embedding_dropout = config.model.activation_dropout = 0.1;
  config.model.ffn_norm_form = kForm[c[form]];
  config.optimizer.lr = 3e-3;
  config.optimizer.warmup_updates = 2;
  config.optimizer.clip_norm = 0.5;
  config.metrics.gradient_norms_every = 1;
  config.train.global_batch = 5;
  config.train.micro_batch = kMicroBatch[c[micro_batch]];
  config.train.recompute = kRecompute[c[recompute]].first;
  config.train.recompute_layers = kRecompute[c[recompute]].second;
  config.parallel.tensor = kTensor[c[tensor]];
  config.parallel.sequence = c[sequence] == 1;
  config.parallel.context = kContext[c[context]];
  config.parallel.pipeline = p.stages;
  config.parallel.data = kData[c[data]];
  config.parallel.schedule = p.schedule;
  config.parallel.virtual_stages = p.virtual_stages;
  config.parallel.interleave_group = p.interleave_group;
  config.parallel.split = p.split;
  config.parallel.sharding = kSharding[c[sharding]];
  config.parallel.shard_group = kShardGroup[c[shard_group]];
  config.parallel.bucket_mib = kSmallBuckets;
  set_overlap(config.parallel, kOverlap[c[overlap]]);
  return config;
}

std::string describe(const Choice& c) { return to_toml(config_of(c)); }

/// A pair of factors with their levels.
using Pair = std::array<size_t, 4>;

std::set<Pair> pairs_of(const Choice& c) {
  std::set<Pair> pairs;
  for (size_t a = 0; a < kFactors; ++a) {
    for (size_t b = a + 1; b < kFactors; ++b) pairs.insert({a, c[a], b, c[b]});
  }
  return pairs;
}

// Groups of replicas that make up all of them.
bool groups_fit(const Choice& c) {
  const int64_t group = kShardGroup[c[shard_group]];
  return group == 0 || kData[c[data]] * kContext[c[context]] % group == 0;
}

// All choices that need no more ranks than there may be.
std::vector<Choice> possible_choices() {
  std::vector<Choice> all{{}};
  for (size_t factor = 0; factor < kFactors; ++factor) {
    std::vector<Choice> longer;
    for (const Choice& c : all) {
      for (size_t level = 0; level < levels()[factor]; ++level) {
        longer.push_back(c);
        longer.back()[factor] = level;
      }
    }
    all = std::move(longer);
  }
  std::erase_if(all, [](const Choice& c) { return num_ranks(degrees_of(c)) > kMostRanks || !groups_fit(c); });
  return all;
}

// Few choices in which every pair that can be is: each time one that has the most pairs which are still
// missing, among some drawn ones.
std::vector<Choice> all_pairs() {
  constexpr int kDrawn = 300;
  const std::vector<Choice> possible = possible_choices();
  std::set<Pair> missing;
  for (const Choice& c : possible) missing.merge(pairs_of(c));
  std::mt19937 random(1);
  std::vector<Choice> chosen;
  const auto gain = [&](const Choice& c) {
    const std::set<Pair> pairs = pairs_of(c);
    return std::count_if(pairs.begin(), pairs.end(), [&](const Pair& p) { return missing.contains(p); });
  };
  while (!missing.empty()) {
    Choice best{};
    for (int i = 0; i < kDrawn || gain(best) == 0; ++i) {
      const Choice& drawn = possible[random() % possible.size()];
      if (i == 0 || gain(drawn) > gain(best)) best = drawn;
    }
    for (const Pair& p : pairs_of(best)) missing.erase(p);
    chosen.push_back(best);
  }
  return chosen;
}

struct Outcome {
  std::map<std::string, std::vector<double>> gradients;  ///< of the first batch, summed over its tokens
  int64_t targets = 0;                                   ///< of the first batch
  std::vector<double> losses;
  std::vector<double> gradient_norms;
  std::vector<std::string> parameters;
  std::vector<std::vector<ParameterNorms>> parameter_norms;  ///< of every step
};

Outcome outcome_of(const RunConfig& config, const MeshDegrees& degrees, bool with_gradients = true) {
  Outcome outcome;
  run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
    SmallModel small(config, DeviceKind::cpu, world, degrees);
    std::map<std::string, std::vector<double>> gradients;
    if (with_gradients) {
      small.trainer.compute_gradients();
      gather_logical(small.context, world, small.trainer.optimizer().owned_gradients(), DType::f64, 0,
                     [&](const std::string& name, const Tensor& whole) { gradients[name] = to_host(whole); });
    }
    std::vector<FinishedStep> steps;
    for (int64_t i = 0; i < kSteps; ++i) {
      const std::optional<FinishedStep> finished = small.trainer.advance();
      steps.push_back(finished ? *finished : *small.trainer.settle());
    }
    if (world.rank() != 0) return;
    outcome.gradients = std::move(gradients);
    outcome.targets = steps.front().report.tokens;
    outcome.parameters = small.trainer.gradient_norms().names();
    for (const FinishedStep& step : steps) {
      outcome.losses.push_back(step.report.loss);
      outcome.gradient_norms.push_back(step.report.gradient_norm);
      outcome.parameter_norms.push_back(step.gradient_norms);
    }
  });
  return outcome;
}

double norm_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v * v;
  return std::sqrt(sum);
}

// What keys have in common has no gradient in exact arithmetic; its rounding errors are held against its
// weight's.
bool is_zero(const std::string& name) { return name.ends_with("k_proj.bias") || name.ends_with("k_ln.bias"); }

double scale_of(const Outcome& expected, const std::string& name) {
  const std::string of = is_zero(name) ? name.substr(0, name.size() - 4) + "weight" : name;
  return norm_of(expected.gradients.at(of));
}

// Of every parameter and step; and of the first step what its gathered gradients give.
void expect_same_parameter_norms(const Outcome& got, const Outcome& expected) {
  ASSERT_EQ(got.parameters, expected.parameters);
  const auto targets = static_cast<double>(expected.targets);
  ASSERT_EQ(got.targets, expected.targets);
  for (size_t i = 0; i < expected.parameter_norms.size(); ++i) {
    ASSERT_EQ(got.parameter_norms[i].size(), expected.parameters.size());
    double squares = 0;
    for (size_t p = 0; p < expected.parameters.size(); ++p) {
      const std::string& name = expected.parameters[p];
      const ParameterNorms& norms = got.parameter_norms[i][p];
      squares += norms.l2 * norms.l2;
      if (is_zero(name)) continue;  // rounding errors alone
      EXPECT_NEAR(norms.l1, expected.parameter_norms[i][p].l1, 1e-10 * norms.l1) << name << ", step " << i;
      EXPECT_NEAR(norms.l2, expected.parameter_norms[i][p].l2, 1e-10 * norms.l2) << name << ", step " << i;
      if (i > 0) continue;
      double l1 = 0;
      for (const double g : expected.gradients.at(name)) l1 += std::abs(g) / targets;
      EXPECT_NEAR(norms.l1, l1, 1e-10 * l1) << name;
      EXPECT_NEAR(norms.l2, norm_of(expected.gradients.at(name)) / targets, 1e-10 * norms.l2) << name;
    }
    EXPECT_NEAR(std::sqrt(squares), got.gradient_norms[i], 1e-12 * got.gradient_norms[i]);
  }
}

void expect_same_run(const Outcome& got, const Outcome& expected) {
  ASSERT_EQ(got.gradients.size(), expected.gradients.size());
  for (const auto& [name, values] : expected.gradients) {
    ASSERT_TRUE(got.gradients.contains(name)) << name;
    std::vector<double> difference = got.gradients.at(name);
    ASSERT_EQ(difference.size(), values.size()) << name;
    for (size_t i = 0; i < values.size(); ++i) difference[i] -= values[i];
    EXPECT_LE(norm_of(difference), 1e-11 * scale_of(expected, name)) << name;
  }
  for (size_t i = 0; i < expected.losses.size(); ++i) {
    EXPECT_NEAR(got.losses[i], expected.losses[i], 1e-12 * expected.losses[i]) << "loss of step " << i;
    EXPECT_NEAR(got.gradient_norms[i], expected.gradient_norms[i], 1e-10 * expected.gradient_norms[i])
        << "gradient norm of step " << i;
  }
  expect_same_parameter_norms(got, expected);
}

// Every n-th of the layouts: for models that differ in few operations from one that was trained under all.
std::vector<Choice> some_pairs(size_t n, size_t first = 0) {
  const std::vector<Choice> all = all_pairs();
  std::vector<Choice> some;
  for (size_t i = first; i < all.size(); i += n) some.push_back(all[i]);
  return some;
}

TEST(LayoutMatrix, AllPairsOfChoicesEqualOneProcess) {
  RunConfig alone = config_of({});
  alone.train.micro_batch = alone.train.global_batch;
  const Outcome expected = outcome_of(alone, {});
  EXPECT_LT(expected.losses.back(), expected.losses.front());
  const std::vector<Choice> choices = all_pairs();
  for (const Choice& c : choices) {
    SCOPED_TRACE(describe(c));
    expect_same_run(outcome_of(config_of(c), degrees_of(c)), expected);
    if (HasFailure()) return;
  }
  std::printf("%zu layouts\n", choices.size());
}

// LayerNorms on queries, keys and values, over the degrees that split their channels or tokens.
TEST(LayoutMatrix, NormedQueriesKeysAndValuesEqualOneProcess) {
  const auto with_norms = [](RunConfig config) {
    config.model.qkv_norm = true;
    return config;
  };
  RunConfig alone = with_norms(config_of({}));
  alone.train.micro_batch = alone.train.global_batch;
  const Outcome expected = outcome_of(alone, {});
  for (const Choice& c : some_pairs(6)) {
    SCOPED_TRACE(describe(c));
    expect_same_run(outcome_of(with_norms(config_of(c)), degrees_of(c)), expected);
    if (HasFailure()) return;
  }
}

// The same choices for a model that sees all of a sequence and predicts some of its tokens.
RunConfig masked_config_of(const Choice& c) {
  const ModelConfig masked = small_masked_config(Precision::fp64).model;
  RunConfig config = config_of(c);
  config.model.attention = masked.attention;
  config.model.head = masked.head;
  config.model.init = masked.init;
  config.model.positions = masked.positions;
  config.model.embedding_scale = masked.embedding_scale;
  return config;
}

TEST(LayoutMatrix, MaskedModelsEqualOneProcess) {
  RunConfig alone = masked_config_of({});
  alone.train.micro_batch = alone.train.global_batch;
  const Outcome expected = outcome_of(alone, {});
  EXPECT_TRUE(expected.gradients.contains("decoder.lm_head.dense.weight"));
  EXPECT_LT(expected.losses.back(), expected.losses.front());
  for (const Choice& c : some_pairs(2)) {
    SCOPED_TRACE(describe(c));
    expect_same_run(outcome_of(masked_config_of(c), degrees_of(c)), expected);
    if (HasFailure()) return;
  }
}

// And for one that classifies texts of several lengths, of which a rank of a context group may have no token.
RunConfig classifier_config_of(const Choice& c, AttentionMask attention) {
  RunConfig config = masked_config_of(c);
  config.model.attention = attention;
  config.model.head = OutputHead::classification;
  config.model.classes = 3;
  return config;
}

TEST(LayoutMatrix, ClassifiersEqualOneProcess) {
  for (const AttentionMask attention : {AttentionMask::bidirectional, AttentionMask::causal}) {
    RunConfig alone = classifier_config_of({}, attention);
    alone.train.micro_batch = alone.train.global_batch;
    const Outcome expected = outcome_of(alone, {});
    EXPECT_TRUE(expected.gradients.contains("decoder.classification_head.out_proj.weight"));
    const size_t first = attention == AttentionMask::causal ? 1 : 0;
    for (const Choice& c : some_pairs(4, first)) {
      SCOPED_TRACE(describe(c));
      expect_same_run(outcome_of(classifier_config_of(c, attention), degrees_of(c)), expected);
      if (HasFailure()) return;
    }
  }
}

// What only moves work elsewhere in time changes no bit, in the types that are trained in.
TEST(LayoutMatrix, BucketsRecomputationAndOverlapChangeNoBit) {
  Choice with_tensor{};
  with_tensor[tensor] = with_tensor[data] = 1;
  with_tensor[pipeline] = 8;
  Choice with_context{};
  with_context[context] = with_context[data] = 1;
  with_context[pipeline] = 5;
  Choice with_groups{};
  with_groups[context] = with_groups[data] = 1;
  with_groups[shard_group] = 2;
  for (const Choice& c : {with_tensor, with_context, with_groups}) {
    for (const Precision precision : {Precision::fp32, Precision::bf16, Precision::fp16_memory_efficient}) {
      for (const Sharding sharding : kSharding) {
        RunConfig config = config_of(c);
        config.train.precision = precision;
        config.parallel.sharding = sharding;
        const Outcome expected = outcome_of(config, degrees_of(c), false);
        for (size_t i = 0; i < 2 * kOverlap.size(); ++i) {
          std::tie(config.train.recompute, config.train.recompute_layers) = kRecompute[i % kRecompute.size()];
          config.parallel.bucket_mib = i % 3 == 0 ? 64.0 : kSmallBuckets;
          set_overlap(config.parallel, kOverlap[i % kOverlap.size()]);
          const Outcome got = outcome_of(config, degrees_of(c), false);
          EXPECT_EQ(got.losses, expected.losses) << to_toml(config);
          EXPECT_EQ(got.gradient_norms, expected.gradient_norms) << to_toml(config);
        }
      }
    }
  }
}

}  // namespace
}  // namespace normformer::testing_support
