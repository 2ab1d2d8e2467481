#include "normformer/model/language_model.h"

#include <cmath>

#include <gtest/gtest.h>

#include "normformer/pipeline/executor.h"

#include "small_model.h"

namespace normformer::testing_support {
namespace {

std::vector<double> nll_of(SmallModel& small, const Batch& batch) {
  std::vector<double> nll;
  evaluate(
      small.model, small.config, [&](int64_t, int64_t) { return batch; }, batch.sequences,
      [&](int64_t, const Batch&, const TokenScores& scores) { nll = to_host(scores.nll); });
  return nll;
}

Batch one_sequence(const RunConfig& config) {
  Batch batch = counted_batch(config, 0, 1);
  batch.document_start.assign(static_cast<size_t>(config.model.length), 0);
  batch.loss_mask.assign(static_cast<size_t>(config.model.length), 1);
  return batch;
}

TEST(LanguageModel, ADocumentSeesNothingOfTheOneBefore) {
  RunConfig config = small_config(Precision::fp64);
  config.train.micro_batch = 1;
  SmallModel small(config, DeviceKind::cpu, make_self_world());
  constexpr int64_t kSecond = 7;  // where the second document starts
  Batch batch = one_sequence(config);
  for (int64_t t = kSecond; t < config.model.length; ++t) batch.document_start[t] = kSecond;
  const std::vector<double> before = nll_of(small, batch);
  batch.inputs[2] = (batch.inputs[2] + 1) % 41;
  const std::vector<double> after = nll_of(small, batch);
  for (int64_t t = 0; t < config.model.length; ++t) {
    if (t >= kSecond || t < 2)
      EXPECT_EQ(before[t], after[t]) << t;
    else
      EXPECT_NE(before[t], after[t]) << t;
  }
}

TEST(LanguageModel, MaskedTargetsCountNeitherInTheLossNorInTheGradient) {
  RunConfig config = small_config(Precision::fp64);
  config.train.global_batch = config.train.micro_batch = 1;
  config.model.residual_dropout = config.model.attention_dropout = 0.0;
  Batch batch = one_sequence(config);
  batch.loss_mask[3] = 0;
  const auto run = [&](const Batch& data) {
    Context context(DeviceKind::cpu);
    ModelInstance model(context, Mesh(make_self_world(), {}), config, true);
    Trainer trainer(model, config, [&](int64_t, int64_t) { return data; });
    trainer.initialise();
    const StepReport report = trainer.compute_gradients();
    EXPECT_EQ(report.tokens, config.model.length - 1);
    return std::pair(report.loss, to_host(model.store().flat_gradients()));
  };
  const auto expected = run(batch);
  batch.targets[3] = (batch.targets[3] + 5) % 41;  // must not matter
  EXPECT_EQ(run(batch), expected);
}

TEST(LanguageModel, BackwardInTwoHalvesGivesTheSameBits) {
  const RunConfig config = small_config(Precision::fp32);
  const auto gradients = [&](bool halves) {
    SmallModel small(config, DeviceKind::cpu, make_self_world());
    LanguageModelStage& stage = *small.model.parts().front();
    stage.set_micro_batches(
        {make_micro_batch(small.model, counted_batch(config, 0, 2), 0, 0, Purpose::training)});
    std::unique_ptr<Stage::Saved> saved;
    stage.forward(0, {}, saved);
    if (halves) {
      stage.backward_input(0, *saved, {});
      stage.backward_weight(0, *saved);
    } else {
      stage.backward(0, *saved, {});
    }
    return to_host(small.model.store().flat_gradients());
  };
  EXPECT_EQ(gradients(true), gradients(false));
}

// Tokens that ranks do not divide, and fewer tokens than ranks: some have none of the stream.
TEST(LanguageModel, AnyNumberOfTokensMayBeDealtOut) {
  RunConfig config = small_config(Precision::fp64);
  config.parallel.sequence = true;
  config.train.micro_batch = 1;
  config.train.global_batch = 3;
  for (const int64_t length : {2, 7}) {
    for (const FfnNormForm form : {FfnNormForm::folded, FfnNormForm::plain}) {
      config.model.length = length;
      config.model.head_scale = form == FfnNormForm::folded ? HeadScale::paper : HeadScale::fairseq;
      config.model.ffn_norm_form = form;
      const auto losses = [&](const Group& world, const MeshDegrees& degrees) {
        SmallModel small(config, DeviceKind::cpu, world, degrees);
        std::vector<double> made;
        for (int i = 0; i < 4; ++i) {
          const StepReport report = small.trainer.step();
          made.push_back(report.loss);
          made.push_back(report.gradient_norm);
        }
        return made;
      };
      const std::vector<double> expected = losses(make_self_world(), {});
      for (const MeshDegrees& degrees : {MeshDegrees{.tensor = 5}, MeshDegrees{.tensor = 3, .pipeline = 2}}) {
        run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
          const std::vector<double> got = losses(world, degrees);
          for (size_t i = 0; i < expected.size(); ++i)
            EXPECT_NEAR(got[i], expected[i], 1e-11 * expected[i]) << to_string(degrees) << " " << i;
        });
      }
    }
  }
}

TEST(LanguageModel, LogitsBehindASequenceComeFromWhicheverRankHasItsLastToken) {
  RunConfig config = small_config(Precision::fp64);
  config.parallel.sequence = true;
  const auto logits = [&](const Group& world) {
    SmallModel small(config, DeviceKind::cpu, world, {.tensor = world.size()});
    const Batch batch = counted_batch(config, 0, 3);
    small.model.set_micro_batches({make_micro_batch(small.model, batch, 0, 0, Purpose::generation)});
    small.model.forward(1);
    return to_host(small.model.result(0));
  };
  const std::vector<double> expected = logits(make_self_world());
  run_local_world(2, [&](const Group& world) {
    const std::vector<double> got = logits(world);
    const Range mine = even_part(config.model.vocab, world.size(), world.rank());
    for (int64_t sequence = 0; sequence < 3; ++sequence) {
      for (int64_t v = mine.begin; v < mine.end; ++v) {
        EXPECT_NEAR(got[static_cast<size_t>(sequence * mine.size() + v - mine.begin)],
                    expected[static_cast<size_t>(sequence * config.model.vocab + v)], 1e-12);
      }
    }
  });
}

// The first moments of the first update are (1 - beta1) times the gradients that it took.
double norm_of_what_was_taken(const RunConfig& config, StepReport& report) {
  const MeshDegrees degrees{.tensor = 2, .data = 2};
  double norm = 0.0;
  run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
    SmallModel small(config, DeviceKind::cpu, world, degrees);
    const StepReport mine = small.trainer.step();
    double squares = 0.0;
    for (const StatePiece& state : small.trainer.optimizer().state()) {
      if (state.role != StateRole::moment1 || !state.piece.parameter->spec.owned) continue;
      for (const double m : to_host(state.piece.values)) squares += m * m;
    }
    squares = world.all_reduce(squares, ReduceOp::sum);
    if (world.rank() != 0) return;
    norm = std::sqrt(squares) / (1.0 - config.optimizer.beta1);
    report = mine;
  });
  return norm;
}

TEST(Trainer, GradientsAreClippedToTheNormAskedFor) {
  RunConfig config = small_config(Precision::fp64);
  StepReport report;
  config.optimizer.clip_norm = 0.0;
  const double unclipped = norm_of_what_was_taken(config, report);
  EXPECT_NEAR(unclipped, report.gradient_norm, 1e-12 * unclipped);
  config.optimizer.clip_norm = 2.0 * unclipped;
  EXPECT_NEAR(norm_of_what_was_taken(config, report), unclipped, 1e-12 * unclipped);
  config.optimizer.clip_norm = 0.3 * unclipped;
  const double clipped = norm_of_what_was_taken(config, report);
  EXPECT_NEAR(clipped, config.optimizer.clip_norm * unclipped / (unclipped + 1e-6), 1e-12 * unclipped);
  EXPECT_NEAR(report.gradient_norm, unclipped, 1e-12 * unclipped);
}

// With a LayerNorm right behind it, fairseq's head scale has no effect where all heads are scaled alike.
TEST(LanguageModel, ACommonFactorOnFairseqsHeadScalesIsANullDirection) {
  RunConfig config = small_config(Precision::fp64);
  config.model.head_scale = HeadScale::fairseq;
  config.model.norm_eps = 1e-30;
  config.train.micro_batch = 1;
  SmallModel small(config, DeviceKind::cpu, make_self_world());
  const Batch batch = counted_batch(config, 0, 1);
  const std::vector<double> before = nll_of(small, batch);
  for (const Parameter& p : small.model.store().parameters()) {
    if (p.spec.name.ends_with("c_attn")) scale(small.context, p.value, 3.0);
  }
  small.model.prepare();
  const std::vector<double> after = nll_of(small, batch);
  for (size_t t = 0; t < before.size(); ++t) EXPECT_NEAR(before[t], after[t], 1e-12);
}

TEST(LanguageModel, InitialWeightsHaveTheirDistributions) {
  RunConfig config = small_config(Precision::fp32);
  config.model.width = 240;
  config.model.heads = 5;
  config.model.ffn = 480;
  config.model.vocab = 500;
  const auto deviation = [&](const std::string& name) {
    SmallModel small(config, DeviceKind::cpu, make_self_world());
    for (const Parameter& p : small.model.store().parameters()) {
      if (p.spec.name != name) continue;
      double sum = 0.0;
      double squares = 0.0;
      const std::vector<double> values = to_host(p.value);
      for (const double v : values) {
        sum += v;
        squares += v * v;
      }
      const auto n = static_cast<double>(values.size());
      EXPECT_NEAR(sum / n, 0.0, 5.0 * std::sqrt(squares / n / n));
      return std::sqrt(squares / n);
    }
    ADD_FAILURE() << "no parameter " << name;
    return 0.0;
  };
  const std::string layer = "decoder.layers.1.";
  // fairseq: embeddings N(0, d^-1/2); xavier_uniform with gain 1 / sqrt 2 for q, k, v and 1 for the output;
  // nn.Linear's own U(1 / sqrt(inputs)) for fc1 and fc2. A uniform in (-b, b) has standard deviation b /
  // sqrt 3.
  EXPECT_NEAR(deviation("decoder.embed_tokens.weight"), std::sqrt(1.0 / 240), 0.001);
  EXPECT_NEAR(deviation(layer + "self_attn.k_proj.weight"), std::sqrt(6.0 / 480 / 2 / 3), 0.001);
  EXPECT_NEAR(deviation(layer + "self_attn.out_proj.weight"), std::sqrt(6.0 / 480 / 3), 0.001);
  EXPECT_NEAR(deviation(layer + "fc2.weight"), std::sqrt(1.0 / 480 / 3), 0.001);
  config.model.init = Initialisation::gpt2;
  EXPECT_NEAR(deviation("decoder.embed_tokens.weight"), 0.02, 0.0005);
  EXPECT_NEAR(deviation(layer + "fc1.weight"), 0.02, 0.0005);
  EXPECT_NEAR(deviation(layer + "fc2.weight"), 0.02 / std::sqrt(6.0), 0.0005);
}

}  // namespace
}  // namespace normformer::testing_support
