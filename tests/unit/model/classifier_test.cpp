// What only a classifier does: texts that padding leaves as they are, and the classes that it puts them in.
#include <algorithm>
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

RunConfig config_with(AttentionMask attention, Positions positions) {
  RunConfig config = small_classifier_config(Precision::fp64);
  config.model.attention = attention;
  config.model.positions = positions;
  config.model.residual_dropout = config.model.attention_dropout = 0.0;  // which is of places in rows
  return config;
}

// Texts of 1 to 7 tokens in rows of `length`, behind tokens `padding`.
Batch padded_texts(const RunConfig& config, int64_t first, int64_t count, int64_t length, int32_t padding) {
  const auto elements = static_cast<size_t>(count * length);
  Batch batch{.sequences = count,
              .seq_len = length,
              .inputs = std::vector<int32_t>(elements, padding),
              .targets = std::vector<int32_t>(elements),
              .document_start = std::vector<int32_t>(elements),
              .loss_mask = std::vector<uint8_t>(elements)};
  for (int64_t row = 0; row < count; ++row) {
    const int64_t sample = first + row;
    const int64_t start = length - 1 - sample * 3 % 7;
    for (int64_t t = start; t < length; ++t) {
      const auto at = static_cast<size_t>(row * length + t);
      batch.inputs[at] = static_cast<int32_t>((sample * 11 + (t - start) * 5) % config.model.vocab);
      batch.document_start[at] = static_cast<int32_t>(start);
    }
    const bool causal = config.model.attention == AttentionMask::causal;
    const auto read = static_cast<size_t>(row * length + (causal ? length - 1 : start));
    batch.loss_mask[read] = 1;
    batch.targets[read] = static_cast<int32_t>(sample % config.model.classes);
  }
  return batch;
}

struct Outcome {
  StepReport report;
  std::map<std::string, std::vector<double>> gradients;
};

Outcome outcome_of(const RunConfig& config, const BatchSource& source) {
  Context context(DeviceKind::cpu);
  ModelInstance model(context, Mesh(make_self_world(), {}), config, true);
  Trainer trainer(model, config, source);
  trainer.initialise();
  Outcome outcome{trainer.compute_gradients(), {}};
  for (const Parameter& p : model.store().parameters()) outcome.gradients[p.spec.name] = to_host(p.gradient);
  return outcome;
}

double largest_of(const std::vector<double>& values) {
  double largest = 0.0;
  for (const double v : values) largest = std::max(largest, std::abs(v));
  return largest;
}

TEST(Classifier, PaddingChangesNothing) {
  for (const AttentionMask attention : {AttentionMask::bidirectional, AttentionMask::causal}) {
    for (const Positions positions : {Positions::learned, Positions::sinusoidal}) {
      const RunConfig config = config_with(attention, positions);
      const auto padded = [&](int64_t length, int32_t padding) {
        return outcome_of(config, [&, length, padding](int64_t first, int64_t count) {
          return padded_texts(config, first, count, length, padding);
        });
      };
      const Outcome expected = padded(7, 0);
      EXPECT_GT(expected.report.loss, 0.5);
      for (const Outcome& got : {padded(7, 40), padded(8, 3), padded(config.model.length, 17)}) {
        EXPECT_EQ(got.report.tokens, config.train.global_batch);
        EXPECT_NEAR(got.report.loss, expected.report.loss, 1e-14 * expected.report.loss);
        EXPECT_EQ(got.report.accuracy, expected.report.accuracy);
        for (const auto& [name, values] : expected.gradients) {
          // Keys' biases have no gradient in exact arithmetic.
          const double scale = name.ends_with("k_proj.bias") ? 1.0 : largest_of(values);
          for (size_t i = 0; i < values.size(); ++i)
            ASSERT_NEAR(got.gradients.at(name)[i], values[i], 1e-12 * scale) << name << " " << i;
        }
      }
    }
  }
}

// Tokens before a text have no gradient at all, to the last bit.
TEST(Classifier, PaddingIsNotTrained) {
  const RunConfig config = config_with(AttentionMask::bidirectional, Positions::learned);
  constexpr int32_t kPadding = 39;
  const auto source = [&](int64_t first, int64_t count) {
    return padded_texts(config, first, count, config.model.length, kPadding);
  };
  const Batch batch = source(0, config.train.global_batch);
  for (size_t i = 0; i < batch.inputs.size(); ++i)
    ASSERT_TRUE(batch.inputs[i] != kPadding || batch.document_start[i] == 0);
  const std::vector<double> gradient = outcome_of(config, source).gradients.at("decoder.embed_tokens.weight");
  for (int64_t c = 0; c < config.model.width; ++c)
    EXPECT_EQ(gradient[static_cast<size_t>(kPadding * config.model.width + c)], 0.0);
}

// All texts' logits, and what evaluate() returns.
struct Evaluated {
  EvaluationResult result;
  std::vector<double> logits;
};

Evaluated evaluated_on(const MeshDegrees& degrees, int64_t texts) {
  const RunConfig config = config_with(AttentionMask::bidirectional, Positions::learned);
  Evaluated evaluated;
  evaluated.logits.resize(static_cast<size_t>(texts * config.model.classes));
  std::mutex mutex;
  run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
    SmallModel small(config, DeviceKind::cpu, world, degrees);
    const auto visit = [&](int64_t first, const std::vector<double>& logits) {
      const std::lock_guard lock(mutex);
      for (size_t i = 0; i < logits.size(); ++i)
        evaluated.logits[static_cast<size_t>(first * config.model.classes) + i] += logits[i];
    };
    const auto source = [&](int64_t first, int64_t count) {
      return padded_texts(config, first, count, 9, 1);
    };
    const EvaluationResult result = evaluate(small.model, config, source, texts, {}, visit);
    const std::lock_guard lock(mutex);
    evaluated.result = result;
  });
  return evaluated;
}

TEST(Classifier, EveryLayoutGivesTheSameClasses) {
  constexpr int64_t kTexts = 13;
  const Evaluated expected = evaluated_on({}, kTexts);
  int64_t correct = 0;
  double nll = 0.0;
  for (int64_t text = 0; text < kTexts; ++text) {
    const double* row = expected.logits.data() + 3 * text;
    const auto target = text % 3;
    if (std::max_element(row, row + 3) - row == target) ++correct;
    nll += std::log(std::exp(row[0]) + std::exp(row[1]) + std::exp(row[2])) - row[target];
  }
  EXPECT_EQ(expected.result.tokens, kTexts);
  EXPECT_EQ(expected.result.correct, correct);
  EXPECT_NEAR(expected.result.nll_sum, nll, 1e-12 * nll);
  for (const MeshDegrees& degrees :
       {MeshDegrees{.tensor = 3}, MeshDegrees{.context = 3}, MeshDegrees{.pipeline = 2},
        MeshDegrees{.data = 3}, MeshDegrees{.tensor = 2, .context = 2, .data = 2}}) {
    SCOPED_TRACE(to_string(degrees));
    const Evaluated got = evaluated_on(degrees, kTexts);
    EXPECT_EQ(got.result.tokens, kTexts);
    EXPECT_EQ(got.result.correct, correct);
    EXPECT_NEAR(got.result.nll_sum, nll, 1e-12 * nll);
    for (size_t i = 0; i < got.logits.size(); ++i) EXPECT_NEAR(got.logits[i], expected.logits[i], 1e-12);
  }
}

TEST(Classifier, ABatchMustTellWhatIsRead) {
  const RunConfig config = config_with(AttentionMask::bidirectional, Positions::learned);
  SmallModel small(config, DeviceKind::cpu, make_self_world());
  Batch batch = padded_texts(config, 0, 2, 9, 1);
  std::fill(batch.loss_mask.begin() + 9, batch.loss_mask.end(), uint8_t{0});
  EXPECT_THROW(make_micro_batch(small.model, batch, 0, 0, Purpose::evaluation), LogicError);
  batch = padded_texts(config, 0, 2, 9, 1);
  batch.document_start.clear();
  EXPECT_THROW(make_micro_batch(small.model, batch, 0, 0, Purpose::evaluation), LogicError);
}

}  // namespace
}  // namespace normformer::testing_support
