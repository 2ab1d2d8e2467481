// What only the model knows of split sequences: documents, masked targets, positions, evaluation.
#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "normformer/sharding/parameter_piece.h"

#include "small_model.h"

namespace normformer::testing_support {
namespace {

RunConfig config_with(Positions positions) {
  RunConfig config = small_config(Precision::fp64);
  config.model.positions = positions;
  config.model.length = 13;
  config.model.embedding_dropout = config.model.activation_dropout = 0.1;
  return config;
}

// Documents that end at other places in every sequence; the target behind each end does not count.
Batch batch_with_documents(const RunConfig& config, int64_t first, int64_t count) {
  Batch batch = counted_batch(config, first, count);
  for (int64_t s = first; s < first + count; ++s) {
    for (int64_t t = 0, start = 0; t < config.model.length; ++t) {
      if ((t + s) % 5 == 0) start = t;
      batch.document_start.push_back(static_cast<int32_t>(start));
      batch.loss_mask.push_back((t + 1 + s) % 5 == 0 ? 0 : 1);
    }
  }
  return batch;
}

struct Outcome {
  double loss = 0.0;
  int64_t tokens = 0;
  std::map<std::string, std::vector<double>> gradients;
};

Outcome outcome_of(const RunConfig& config, const MeshDegrees& degrees) {
  Outcome outcome;
  run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
    Context context(DeviceKind::cpu);
    ModelInstance model(context, Mesh(world, degrees), config, true);
    Trainer trainer(model, config, [&](int64_t f, int64_t n) { return batch_with_documents(config, f, n); });
    trainer.initialise();
    const StepReport report = trainer.compute_gradients();
    std::map<std::string, std::vector<double>> gradients;
    gather_logical(context, world, trainer.optimizer().owned_gradients(), DType::f64, 0,
                   [&](const std::string& name, const Tensor& whole) { gradients[name] = to_host(whole); });
    if (world.rank() == 0) outcome = {report.loss, report.tokens, std::move(gradients)};
  });
  return outcome;
}

double largest_of(const std::vector<double>& values) {
  double largest = 0.0;
  for (const double v : values) largest = std::max(largest, std::abs(v));
  return largest;
}

TEST(ContextParallelModel, DocumentsMasksAndPositionsAreThoseOfTheWhole) {
  for (const Positions positions : {Positions::learned, Positions::sinusoidal}) {
    RunConfig config = config_with(positions);
    const Outcome expected = outcome_of(config, {});
    EXPECT_LT(expected.tokens, config.train.global_batch * config.model.length);
    for (const bool sequence : {false, true}) {
      config.parallel.sequence = sequence;
      for (const MeshDegrees& degrees : {MeshDegrees{.context = 2}, MeshDegrees{.context = 5},
                                         MeshDegrees{.tensor = 3, .context = 2, .pipeline = 2}}) {
        SCOPED_TRACE(to_string(degrees));
        const Outcome got = outcome_of(config, degrees);
        EXPECT_EQ(got.tokens, expected.tokens);
        EXPECT_NEAR(got.loss, expected.loss, 1e-13 * expected.loss);
        ASSERT_EQ(got.gradients.size(), expected.gradients.size());
        for (const auto& [name, values] : expected.gradients) {
          // Keys' biases have no gradient in exact arithmetic.
          const double scale = name.ends_with("k_proj.bias") ? 1.0 : largest_of(values);
          for (size_t i = 0; i < values.size(); ++i)
            ASSERT_NEAR(got.gradients.at(name)[i], values[i], 1e-11 * scale) << name << " " << i;
        }
      }
    }
  }
}

// All nlls in the order of tokens, and what evaluate() returns.
struct Evaluated {
  EvaluationResult result;
  std::vector<double> nll;
};

Evaluated evaluated_on(const MeshDegrees& degrees, int64_t length) {
  constexpr int64_t kSequences = 5;
  Evaluated evaluated;
  RunConfig config = config_with(Positions::learned);
  const RunConfig whole = config;
  config.model.length = length;
  std::mutex mutex;
  run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
    SmallModel small(whole, DeviceKind::cpu, world, degrees);
    std::vector<double> nll(static_cast<size_t>(kSequences * length), 0.0);
    const auto visit = [&](int64_t first, const Batch& batch, const TokenScores& scores) {
      ASSERT_EQ(scores.nll.numel(), batch.sequences * length);
      const std::vector<double> seen = to_host(scores.nll);
      std::copy(seen.begin(), seen.end(), nll.begin() + first * length);
    };
    const auto source = [&](int64_t first, int64_t count) { return counted_batch(config, first, count); };
    const EvaluationResult result = evaluate(small.model, whole, source, kSequences, visit);
    const std::lock_guard lock(mutex);
    evaluated.result = result;
    evaluated.nll.resize(nll.size());
    for (size_t i = 0; i < nll.size(); ++i) evaluated.nll[i] += nll[i];  // visited once
  });
  return evaluated;
}

// Also where there are fewer tokens than chunks, as at the end of a text.
TEST(ContextParallelModel, WhoeverVisitsGetsWholeSequencesInOrder) {
  for (const int64_t length : {1, 2, 3, 7, 13}) {
    const Evaluated expected = evaluated_on({}, length);
    EXPECT_EQ(expected.result.tokens, 5 * length);
    for (const MeshDegrees& degrees :
         {MeshDegrees{.context = 3}, MeshDegrees{.tensor = 2, .context = 2, .data = 2},
          MeshDegrees{.context = 2, .pipeline = 3}}) {
      SCOPED_TRACE(to_string(degrees) + ", length " + std::to_string(length));
      const Evaluated got = evaluated_on(degrees, length);
      EXPECT_EQ(got.result.tokens, expected.result.tokens);
      EXPECT_NEAR(got.result.nll_sum, expected.result.nll_sum, 1e-12 * expected.result.nll_sum);
      ASSERT_EQ(got.nll.size(), expected.nll.size());
      for (size_t i = 0; i < got.nll.size(); ++i) ASSERT_NEAR(got.nll[i], expected.nll[i], 1e-12) << i;
    }
  }
}

TEST(ContextParallelModel, ParametersAreCountedOnce) {
  for (const MeshDegrees& degrees : {MeshDegrees{}, MeshDegrees{.tensor = 2, .context = 2, .data = 2}}) {
    run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
      SmallModel small(small_config(Precision::fp32), DeviceKind::cpu, world, degrees);
      SmallModel alone(small_config(Precision::fp32), DeviceKind::cpu, make_self_world());
      EXPECT_EQ(small.model.count_parameters(), alone.model.count_parameters());
    });
  }
}

}  // namespace
}  // namespace normformer::testing_support
