#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <numeric>

#include <fmt/ranges.h>

#include "normformer/checkpoints/safetensors.h"
#include "normformer/training/trainer.h"

namespace normformer::testing_support {

namespace {

// NORMFORMER_TEST_FIXTURES in the environment: where they are if not where the program was built.
std::filesystem::path fixtures_folder() {
  const char* elsewhere = std::getenv("NORMFORMER_TEST_FIXTURES");
  return std::filesystem::path(elsewhere != nullptr ? elsewhere : NORMFORMER_TEST_FIXTURES) / "oracle";
}

int64_t number_after(const std::string& text, const std::string& key) {
  const size_t at = text.find("\n" + key + " = ");
  NF_CHECK(at != std::string::npos, "the fixture has no {}", key);
  return std::stoll(text.substr(at + key.size() + 4));
}

// Everything of one rank's run.
struct Run {
  Run(const OracleFixture& f, const OracleLayout& layout, const Group& world)
      : fixture(f),
        config(configure(f, layout, world)),
        context(layout.device, layout.threads),
        model(context, make_mesh(world, config.parallel), config, true),
        expected(f.folder / "expected.safetensors"),
        tokens(expected.read(context.host(), "tokens")),
        targets(read_of("targets", predicts_some_tokens(config.model))),
        predicted(read_of("predicted", config.model.head == OutputHead::masked_language)),
        lengths(read_of("lengths", classifies())),
        trainer(model, config, [this](int64_t first, int64_t count) { return batch(first, count); }) {}

  static RunConfig configure(const OracleFixture& f, const OracleLayout& layout, const Group& world) {
    RunConfig c = f.config;
    c.parallel.tensor = layout.degrees.tensor;
    c.parallel.sequence = layout.sequence;
    c.parallel.context = layout.degrees.context;
    c.parallel.pipeline = layout.degrees.pipeline;
    c.parallel.data = layout.degrees.data;
    c.parallel.schedule = layout.schedule;
    c.parallel.virtual_stages = layout.virtual_stages;
    c.train.recompute = layout.recompute;
    c.parallel.sharding = layout.sharding;
    c.parallel.shard_group = layout.shard_group;
    c.model.ffn_norm_form = layout.form;
    c.train.precision = layout.precision;
    c.train.global_batch = f.sequences;
    c.train.micro_batch = layout.micro_batch;
    c.optimizer.decay = DecayStyle::constant;
    return resolve_layout(c, world.size());
  }

  bool classifies() const { return config.model.head == OutputHead::classification; }

  // Texts at the ends of their rows, with a token before them that nothing may see.
  Batch batch_of_texts(int64_t first, int64_t count) const {
    const int64_t length = config.model.length;
    const auto elements = static_cast<size_t>(count * length);
    Batch made{.sequences = count,
               .seq_len = length,
               .inputs = std::vector<int32_t>(elements, 7),
               .targets = std::vector<int32_t>(elements),
               .document_start = std::vector<int32_t>(elements),
               .loss_mask = std::vector<uint8_t>(elements)};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t sample = (first + i) % fixture.sequences;
      const int64_t* row = tokens.data<int64_t>() + sample * length;
      const int64_t start = length - lengths.data<int64_t>()[sample];
      for (int64_t t = start; t < length; ++t) {
        made.inputs[static_cast<size_t>(i * length + t)] = static_cast<int32_t>(row[t - start]);
        made.document_start[static_cast<size_t>(i * length + t)] = static_cast<int32_t>(start);
      }
      const bool causal = config.model.attention == AttentionMask::causal;
      const auto read = static_cast<size_t>(i * length + (causal ? length - 1 : start));
      made.loss_mask[read] = 1;
      made.targets[read] = static_cast<int32_t>(targets.data<int64_t>()[sample]);
    }
    return made;
  }

  // Global samples start over with every batch: the fixture trains on one batch again and again. A masked
  // model has targets of their own.
  Batch batch(int64_t first, int64_t count) const {
    if (classifies()) return batch_of_texts(first, count);
    const int64_t length = config.model.length;
    Batch made{.sequences = count,
               .seq_len = length,
               .inputs = {},
               .targets = {},
               .document_start = {},
               .loss_mask = {}};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t sample = (first + i) % fixture.sequences;
      const int64_t* row = tokens.data<int64_t>() + sample * tokens.dim(1);
      const int64_t* asked = targets ? targets.data<int64_t>() + sample * length : row + 1;
      for (int64_t t = 0; t < length; ++t) {
        made.inputs.push_back(static_cast<int32_t>(row[t]));
        made.targets.push_back(static_cast<int32_t>(asked[t]));
        if (!predicted) continue;
        made.loss_mask.push_back(static_cast<uint8_t>(predicted.data<int64_t>()[sample * length + t]));
      }
    }
    return made;
  }

  // What only some models' fixtures have.
  Tensor read_of(const std::string& name, bool has) {
    return has ? expected.read(context.host(), name) : Tensor();
  }

  // Rounded to `type` first.
  void load_weights(DType type) {
    const SafetensorsReader weights(fixture.folder / "weights.safetensors");
    for (const StatePiece& state : trainer.optimizer().state()) {
      if (state.role != StateRole::master) continue;
      const Parameter& p = *state.piece.parameter;
      const Tensor stored = context.host().empty({p.numel()}, type);
      const Tensor part = context.host().empty({p.numel()}, state.piece.values.dtype());
      weights.read(p.spec.name, p.spec.part, stored);
      copy(context.host(), stored, part);
      copy(context, part.flat(state.piece.range.begin, state.piece.range.size()), state.piece.values);
    }
    trainer.weights_changed();
  }

  const OracleFixture& fixture;
  RunConfig config;
  Context context;
  ModelInstance model;
  SafetensorsReader expected;
  Tensor tokens;
  Tensor targets;    // of a masked model, or a classifier
  Tensor predicted;  // of a masked model
  Tensor lengths;    // of a classifier
  Trainer trainer;
};

double norm(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v * v;
  return std::sqrt(sum);
}

class Comparison {
 public:
  explicit Comparison(Run& run) : run_(run) {}

  void compare(const std::string& name, const std::vector<double>& got, const std::string& scale_name = {}) {
    const std::vector<double> want = to_host(run_.expected.read(run_.context.host(), name));
    const double scale =
        scale_name.empty() ? norm(want) : norm(to_host(run_.expected.read(run_.context.host(), scale_name)));
    NF_CHECK(got.size() == want.size(), "{}: {} values, not {}", name, got.size(), want.size());
    std::vector<double> difference(got.size());
    std::transform(got.begin(), got.end(), want.begin(), difference.begin(), std::minus<>());
    errors_[name] = norm(difference) / scale;
  }

  OracleErrors errors() && { return std::move(errors_); }

 private:
  Run& run_;
  OracleErrors errors_;
};

// Every token's nll on every rank, whoever computed it; of a classifier, every sequence's.
std::vector<double> all_nll(Run& run) {
  const int64_t length = run.config.model.length;
  const Tensor all = run.context.zeros({run.fixture.sequences, length}, DType::f64);
  const auto keep = [&](int64_t first_sample, const Batch& batch, const TokenScores& scores) {
    const Tensor rows = all.rows(first_sample, first_sample + batch.sequences);
    copy(run.context, scores.nll, rows);
  };
  evaluate(
      run.model, run.config, [&](int64_t f, int64_t n) { return run.batch(f, n); }, run.fixture.sequences,
      keep);
  run.model.mesh().world().all_reduce(run.context, all, ReduceOp::sum);
  const std::vector<double> by_token = to_host(all);
  if (!run.classifies()) return by_token;
  std::vector<double> by_sequence;
  for (auto row = by_token.begin(); row != by_token.end(); row += length)
    by_sequence.push_back(std::accumulate(row, row + length, 0.0));
  return by_sequence;
}

double mean_nll(Run& run) {
  const auto source = [&](int64_t first, int64_t count) { return run.batch(first, count); };
  return evaluate(run.model, run.config, source, run.fixture.sequences).mean();
}

// What keys have in common has no gradient in exact arithmetic: it is held against its weight's.
std::string scale_of(const std::string& name) {
  if (!name.ends_with("k_proj.bias") && !name.ends_with("k_ln.bias")) return {};
  return name.substr(0, name.size() - 4) + "weight";
}

void compare_gradients(Run& run, Comparison& comparison) {
  const StepReport report = run.trainer.compute_gradients();
  const DType type = accumulator_of(run.model.store().dtype());
  size_t seen = 0;
  gather_logical(run.context, run.model.mesh().world(), run.trainer.optimizer().owned_gradients(), type, 0,
                 [&](const std::string& name, const Tensor& sum) {
                   std::vector<double> mean = to_host(sum);
                   for (double& v : mean) v *= report.gradient_factor();
                   comparison.compare("grad." + name, mean, scale_of("grad." + name));
                   ++seen;
                 });
  const auto expected = std::count_if(run.expected.tensors().begin(), run.expected.tensors().end(),
                                      [](const SafetensorsEntry& e) { return e.name.starts_with("grad."); });
  if (run.model.mesh().world().rank() == 0) {
    NF_CHECK(static_cast<int64_t>(seen) == expected, "{} gradients, not {}", seen, expected);
  }
}

std::vector<std::string> agree(const Group& world, const std::vector<std::string>& mine) {
  const std::string text = fmt::format("{}", fmt::join(mine, "\n"));
  std::vector<std::string> lines;
  for (const std::string& one : world.all_gather_text(text)) {
    if (!one.empty()) lines.push_back(one);
  }
  return lines;
}

}  // namespace

std::vector<std::string> oracle_fixture_names() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(fixtures_folder())) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

OracleFixture load_oracle_fixture(const std::string& name) {
  OracleFixture fixture{.folder = fixtures_folder() / name, .config = {}, .sequences = 0, .steps = 0};
  const std::filesystem::path path = fixture.folder / "model.toml";
  std::ifstream file(path);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const size_t tail = text.find("[fixture]");
  NF_CHECK(tail != std::string::npos, "{} has no [fixture]", path.string());
  fixture.config = parse_run_config(text.substr(0, tail), path.string(), {});
  fixture.sequences = number_after(text.substr(tail), "batch");
  fixture.steps = number_after(text.substr(tail), "steps");
  return fixture;
}

std::vector<MeshDegrees> oracle_degrees() {
  const auto degrees = [](int64_t tp, int64_t pp, int64_t dp) {
    return MeshDegrees{.tensor = tp, .context = 1, .data = dp, .pipeline = pp};
  };
  return {degrees(1, 1, 1),
          degrees(2, 1, 1),
          degrees(1, 2, 1),
          degrees(1, 1, 2),
          degrees(2, 2, 1),
          degrees(2, 1, 2),
          degrees(1, 2, 2),
          degrees(2, 2, 2),
          degrees(3, 1, 1),
          degrees(1, 3, 1),
          degrees(1, 1, 3),
          {.context = 2},
          {.context = 3},
          {.tensor = 2, .context = 2},
          {.context = 2, .data = 2},
          {.tensor = 2, .context = 2, .pipeline = 2}};
}

std::string to_string(const OracleLayout& layout) {
  return fmt::format(
      "tp{}{} cp{} pp{} dp{} {} micro-batch {} schedule {} virtual stages {} recompute {} sharding {} of {}",
      layout.degrees.tensor, layout.sequence ? "+sp" : "", layout.degrees.context, layout.degrees.pipeline,
      layout.degrees.data, layout.form == FfnNormForm::plain ? "plain" : "folded", layout.micro_batch,
      static_cast<int>(layout.schedule), layout.virtual_stages, static_cast<int>(layout.recompute),
      static_cast<int>(layout.sharding), layout.shard_group);
}

OracleErrors oracle_errors(const OracleFixture& fixture, const OracleLayout& layout, const Group& world) {
  Run run(fixture, layout, world);
  Comparison comparison(run);
  run.load_weights(layout.weights);
  comparison.compare("nll", all_nll(run));
  compare_gradients(run, comparison);
  std::vector<double> losses;
  for (int64_t i = 0; i < fixture.steps; ++i) losses.push_back(run.trainer.step().loss);
  losses.push_back(mean_nll(run));
  comparison.compare("losses", losses);
  return std::move(comparison).errors();
}

std::vector<std::string> compare_with_oracle(const OracleFixture& fixture, const OracleLayout& layout,
                                             const Group& world, double tolerance) {
  std::vector<std::string> failures;
  for (const auto& [name, error] : oracle_errors(fixture, layout, world)) {
    if (!(error <= tolerance)) failures.push_back(fmt::format("{}: relative error {:.3g}", name, error));
  }
  return agree(world, failures);
}

std::vector<double> dropout_losses(const OracleFixture& fixture, const OracleLayout& layout,
                                   const Group& world, int64_t steps) {
  OracleFixture dropped = fixture;
  dropped.config.model.embedding_dropout = 0.1;
  dropped.config.model.residual_dropout = 0.1;
  dropped.config.model.attention_dropout = 0.1;
  dropped.config.model.activation_dropout = 0.1;
  Run run(dropped, layout, world);
  run.trainer.initialise();
  std::vector<double> losses;
  const auto enter = [&](const std::optional<FinishedStep>& step) {
    if (step) losses.push_back(step->report.loss);
  };
  for (int64_t i = 0; i < steps; ++i) enter(run.trainer.advance());
  enter(run.trainer.settle());
  losses.push_back(mean_nll(run));
  return losses;
}

}  // namespace normformer::testing_support
