#include "normformer/training/trainer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "normformer/mesh/layout.h"
#include "normformer/model/parts.h"
#include "normformer/ops/embedding.h"
#include "normformer/pipeline/checker.h"
#include "normformer/pipeline/executor.h"
#include "normformer/training/agreement.h"
#include "normformer/training/learning_rate.h"

#include "graphed_stage.h"

namespace normformer {

std::string_view name_of(SkipReason reason) {
  switch (reason) {
    case SkipReason::none:
      return "none";
    case SkipReason::nonfinite:
      return "nonfinite";
    case SkipReason::overflow:
      return "overflow";
    case SkipReason::spike:
      return "spike";
  }
  return "?";
}

namespace {

Schedule checked_schedule(const RunConfig& config, int64_t stages, int64_t micro_batches) {
  Schedule schedule = make_schedule(config.parallel, stages, micro_batches);
  check_schedule(schedule);
  return schedule;
}

std::vector<Range> micro_batch_samples(const ModelInstance& model, int64_t samples, int64_t micro_batch) {
  return micro_batches(samples, micro_batch, model.mesh().data().size(), model.mesh().data().rank());
}

// Targets that count in this replica's micro-batches; 0 on ranks that do not answer for them.
int64_t counted_targets(const ModelInstance& model, const std::vector<MicroBatch>& batches) {
  int64_t count = 0;
  if (!model.answers_for_loss()) return count;
  for (const MicroBatch& batch : batches) count += batch.counted;
  return count;
}

// Of values [sequences, length], those of `part` of every sequence, in its order.
template <class T>
std::vector<T> values_of(const std::vector<T>& values, int64_t length, const SequencePart& part) {
  std::vector<T> chosen;
  for (auto row = values.begin(); row != values.end(); row += length) {
    for (const Range& run : {part.first, part.second})
      chosen.insert(chosen.end(), row + run.begin, row + run.end);
  }
  return chosen;
}

// Where ones are.
std::vector<int32_t> places_of(const std::vector<uint8_t>& ones) {
  std::vector<int32_t> places;
  for (size_t i = 0; i < ones.size(); ++i) {
    if (ones[i] != 0) places.push_back(static_cast<int32_t>(i));
  }
  return places;
}

template <class T>
std::vector<T> at_places(const std::vector<T>& values, const std::vector<int32_t>& places) {
  std::vector<T> chosen;
  for (const int32_t place : places) chosen.push_back(values[static_cast<size_t>(place)]);
  return chosen;
}

// Of a classifier: which token of each sequence it reads, as far as it is here.
struct ReadTokens {
  std::vector<int32_t> rows;     // among the tokens here; their number where it is not
  std::vector<uint8_t> is_here;  // of each sequence
  std::vector<int32_t> targets;
};

ReadTokens read_tokens(const Batch& batch, const SequencePart& part) {
  const std::vector<uint8_t> here = values_of(batch.loss_mask, batch.seq_len, part);
  const int64_t size = part.size();
  ReadTokens read;
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const auto in_batch = batch.loss_mask.begin() + s * batch.seq_len;
    const int64_t token = std::find(in_batch, in_batch + batch.seq_len, uint8_t{1}) - in_batch;
    NF_CHECK(token < batch.seq_len, "no token of sequence {} is to be read", s);
    const auto held = here.begin() + s * size;
    const int64_t place = std::find(held, held + size, uint8_t{1}) - held;
    read.is_here.push_back(place < size ? 1 : 0);
    read.rows.push_back(static_cast<int32_t>(place < size ? s * size + place : batch.sequences * size));
    read.targets.push_back(batch.targets[static_cast<size_t>(s * batch.seq_len + token)]);
  }
  return read;
}

// Counted from where a text begins; padding before it from the row's beginning.
std::vector<int32_t> places_in_text(const Batch& batch) {
  NF_CHECK(batch.document_start.size() == batch.inputs.size(), "a batch does not tell where its texts begin");
  std::vector<int32_t> places(batch.inputs.size());
  for (size_t i = 0; i < places.size(); ++i) {
    const auto token = static_cast<int32_t>(i % static_cast<size_t>(batch.seq_len));
    const int32_t start = batch.document_start[i];
    places[i] = token < start ? token : token - start;
  }
  return places;
}

template <class T>
Tensor to_device(Context& context, const std::vector<T>& values) {
  return from_host<T>(context, values, {static_cast<int64_t>(values.size())});
}

}  // namespace

MicroBatch make_micro_batch(ModelInstance& model, const Batch& batch, int64_t first_sample,
                            uint64_t batch_index, Purpose purpose) {
  Context& context = model.context();
  const bool first = model.has_first_part();
  const bool last = model.has_last_part();
  const SequencePart part =
      context_part(batch.seq_len, model.mesh().context().size(), model.mesh().context().rank());
  const auto held = [&](const auto& values) { return values_of(values, batch.seq_len, part); };
  const std::vector<uint8_t> counts = held(batch.loss_mask);
  MicroBatch made{.sequences = batch.sequences,
                  .length = batch.seq_len,
                  .part = part,
                  .first_sample = first_sample,
                  .batch_index = batch_index,
                  .purpose = purpose,
                  .tokens = {},
                  .targets = {},
                  .weights = {},
                  .predicted = {},
                  .document_start = {},
                  .counted = batch.loss_mask.empty() ? batch.sequences * part.size()
                                                     : std::count(counts.begin(), counts.end(), uint8_t{1})};
  const bool classifies = model.environment().config.head == OutputHead::classification;
  if (first) made.tokens = to_device(context, held(batch.inputs));
  if (first && classifies) made.positions = to_device(context, held(places_in_text(batch)));
  NF_CHECK(
      batch.sequences == 0 || !batch.loss_mask.empty() || !predicts_some_tokens(model.environment().config),
      "a batch does not tell which tokens are predicted");
  if (last && classifies) {
    const ReadTokens read = read_tokens(batch, part);
    made.predicted = to_device(context, read.rows);
    made.weights = to_device(context, read.is_here);
    made.targets = to_device(context, read.targets);
  } else if (last && predicts_some_tokens(model.environment().config)) {
    const std::vector<int32_t> places = places_of(counts);
    made.predicted = to_device(context, places);
    made.targets = to_device(context, at_places(held(batch.targets), places));
  } else if (last) {
    made.targets = to_device(context, held(batch.targets));
    if (!batch.loss_mask.empty()) made.weights = to_device(context, counts);
  }
  if (!batch.document_start.empty()) made.document_start = to_device(context, held(batch.document_start));
  return made;
}

Trainer::Trainer(ModelInstance& model, const RunConfig& config, BatchSource source)
    : model_(model),
      config_(config),
      source_(std::move(source)),
      optimizer_(model.store(), master_dtype(config.train.precision), model.mesh()),
      gradient_norms_(model, config),
      schedule_(checked_schedule(
          config, model.mesh().pipeline().size(),
          static_cast<int64_t>(
              micro_batch_samples(model, config.train.global_batch, config.train.micro_batch).size()))),
      loss_scale_rule_(loss_scale_rule(config.train)),
      spike_rule_(spike_rule(config.health)),
      explosion_rule_(explosion_rule(config)) {
  set_counters({});
}

Trainer::~Trainer() = default;

void Trainer::set_counters(const TrainingCounters& counters) {
  NF_CHECK(!unsettled_, "counters are set while a step is not settled");
  counters_ = counters;
  counters_.loss_scale = start_loss_scale(loss_scale_rule_, counters.loss_scale);
  counters_.recent = start_recent(spike_rule_, counters.recent);
  graphed_.clear();
}

void Trainer::initialise() {
  NF_CHECK(!unsettled_, "weights are drawn while a step is not settled");
  optimizer_.initialise(config_.train.seed);
  model_.prepare();
}

void Trainer::weights_changed() {
  NF_CHECK(!unsettled_, "weights are changed while a step is not settled");
  optimizer_.publish_masters();
  model_.prepare();
}

std::vector<MicroBatch> Trainer::next_micro_batches() const {
  const TraceScope scope(model_.context(), TraceKind::step, "read the batch");
  const int64_t first = counters_.batch_index * config_.train.global_batch;
  std::vector<MicroBatch> made;
  for (const Range& samples :
       micro_batch_samples(model_, config_.train.global_batch, config_.train.micro_batch)) {
    made.push_back(make_micro_batch(model_, source_(first + samples.begin, samples.size()), samples.begin,
                                    static_cast<uint64_t>(counters_.batch_index), Purpose::training));
    made.back().loss_scale = counters_.loss_scale.factor();
  }
  return made;
}

// The first step makes what is made on first use; the steps behind it may go to the GPU as graphs.
std::vector<Stage*> Trainer::pipeline_parts() {
  std::vector<Stage*> parts;
  for (const auto& part : model_.parts()) parts.push_back(part.get());
  if (config_.device.cuda_graphs && model_.context().is_cuda()) {
    for (size_t i = 0; has_run_ && graphed_.size() < parts.size(); ++i)
      graphed_.push_back(std::make_unique<GraphedStage>(model_.context(), *parts[i]));
    for (size_t i = 0; i < graphed_.size(); ++i) parts[i] = graphed_[i].get();
  }
  has_run_ = true;
  return parts;
}

namespace {

// What a rank tells all others about its gradients.
struct RankNumbers {
  double loss_sum = 0.0;
  double correct = 0.0;
  double wants_stop = 0.0;
  double save_requests = 0.0;
  double save_progress = 0.0;
  double compute_seconds = 0.0;
  GradientSize gradients = {};

  static constexpr size_t kScalars = 7;
  static constexpr size_t kCount = kScalars + ops::OrderFreeSumOfSquares::kBins;
  std::array<double, kCount> packed() const;
  static RankNumbers unpacked(std::span<const double> numbers);
};

std::array<double, RankNumbers::kCount> RankNumbers::packed() const {
  std::array<double, kCount> numbers = {loss_sum,      correct,         wants_stop,       save_requests,
                                        save_progress, compute_seconds, gradients.largest};
  std::copy(gradients.bins.begin(), gradients.bins.end(), numbers.begin() + kScalars);
  return numbers;
}

RankNumbers RankNumbers::unpacked(std::span<const double> numbers) {
  RankNumbers made{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], {numbers[6], {}}};
  std::copy(numbers.begin() + kScalars, numbers.end(), made.gradients.bins.begin());
  return made;
}

}  // namespace

// This rank's gradients are there: starts to gather what all ranks must know before the update may stand.
void Trainer::agree_on_gradients(Unsettled& step, const std::function<RankWord()>& word) {
  const RankWord said = word ? word() : RankWord{};
  const GradientSize size = optimizer_.gradient_size();
  const bool answers = model_.answers_for_loss();
  const RankNumbers mine{.loss_sum = answers ? model_.loss_sum() : 0.0,
                         .correct = answers ? static_cast<double>(model_.correct()) : 0.0,
                         .wants_stop = said.wants_stop ? 1.0 : 0.0,
                         .save_requests = static_cast<double>(said.save_requests),
                         .save_progress = static_cast<double>(said.save_progress),
                         .compute_seconds = compute_clock_.take(),
                         .gradients = size};
  step.request = model_.mesh().world().start_gather(model_.context(), mine.packed(), step.numbers);
  if (measures_norms()) step.norms = gradient_norms_.start(optimizer_);
}

bool Trainer::measures_norms() const {
  const int64_t every = config_.metrics.gradient_norms_every;
  return every > 0 && (counters_.updates + 1) % every == 0;
}

// Waits for the numbers of all ranks; everyone draws the same conclusions.
void Trainer::conclude(Unsettled& step) const {
  step.request.wait();
  double loss_sum = 0.0;
  double correct = 0.0;
  double save_progress = std::numeric_limits<double>::infinity();
  std::vector<GradientSize> sizes;
  const std::span<const double> numbers(step.numbers);
  for (size_t at = 0; at < numbers.size(); at += RankNumbers::kCount) {
    const RankNumbers rank = RankNumbers::unpacked(numbers.subspan(at, RankNumbers::kCount));
    loss_sum += rank.loss_sum;
    correct += rank.correct;
    step.stop_wanted = step.stop_wanted || rank.wants_stop > 0.0;
    step.save_requests = std::max(step.save_requests, static_cast<int64_t>(rank.save_requests));
    save_progress = std::min(save_progress, rank.save_progress);
    step.compute_seconds.push_back(rank.compute_seconds);
    sizes.push_back(rank.gradients);
  }
  step.save_progress = static_cast<int64_t>(save_progress);
  StepReport& report = step.report;
  const auto counted = static_cast<double>(std::max<int64_t>(1, report.tokens));
  report.loss = loss_sum / counted;
  if (config_.model.head == OutputHead::classification) report.accuracy = correct / counted;
  report.gradient_norm = norm_of(sizes) * report.gradient_factor();
  judge(step, std::isfinite(largest_of(sizes)) && std::isfinite(report.loss));
}

// Whether the step's weights may move, by its own numbers and those of the batches before it.
void Trainer::judge(Unsettled& step, bool is_finite) const {
  StepReport& report = step.report;
  if (!is_finite) {
    report.reason = loss_scale_rule_.active() ? SkipReason::overflow : SkipReason::nonfinite;
  } else {
    const auto scores = spike_scores(spike_rule_, step.before.recent, report.loss, report.gradient_norm);
    if (scores && is_spike(spike_rule_, *scores)) report.spike = scores;
    if (report.spike && config_.health.on_spike != SpikePolicy::log) report.reason = SkipReason::spike;
  }
  report.skipped = report.reason != SkipReason::none;
}

// Gradients of the next batch, with all ranks in step.
void Trainer::compute_at_once(Unsettled& step, const std::function<RankWord()>& word) {
  const Group& world = model_.mesh().world();
  std::vector<MicroBatch> batches;
  run_agreed(world, [&] { batches = next_micro_batches(); });
  step.report.tokens = world.all_reduce_sum(counted_targets(model_, batches));
  model_.store().zero_gradients();
  model_.set_micro_batches(batches);
  run_schedule(model_.context(), model_.mesh().pipeline(), schedule_, pipeline_parts(),
               config_.parallel.overlap_pipeline);
  optimizer_.reduce_gradients();
  agree_on_gradients(step, word);
}

// Gradients of the next batch, begun with weights that may be wrong; the step before is settled on the way.
std::optional<FinishedStep> Trainer::compute_before_settling(Unsettled& step,
                                                             const std::function<RankWord()>& word) {
  std::vector<MicroBatch> batches = next_micro_batches();
  const auto counted = static_cast<double>(counted_targets(model_, batches));
  std::vector<double> counts;
  CommRequest counting = model_.mesh().world().start_gather(model_.context(), {&counted, 1}, counts);
  model_.set_micro_batches(batches);
  std::optional<FinishedStep> finished;
  const auto begin_again = [&] {
    finished = settle();
    model_.store().zero_gradients();  // not before: a wrong update was to be made again with them
    if (!finished || !finished->report.redone) return false;
    for (MicroBatch& batch : batches) batch.loss_scale = counters_.loss_scale.factor();
    model_.set_micro_batches(batches);
    return true;
  };
  run_schedule(model_.context(), model_.mesh().pipeline(), schedule_, pipeline_parts(),
               config_.parallel.overlap_pipeline, begin_again);
  optimizer_.reduce_gradients();
  counting.wait();
  for (const double count : counts) step.report.tokens += static_cast<int64_t>(count);
  agree_on_gradients(step, word);
  return finished;
}

StepReport Trainer::compute_gradients() {
  NF_CHECK(!unsettled_, "gradients are computed while a step is not settled");
  Unsettled step;
  step.before = counters_;
  step.report.loss_scale = counters_.loss_scale.factor();
  compute_at_once(step, {});
  conclude(step);
  return step.report;
}

StepReport Trainer::step() {
  NF_CHECK(!unsettled_, "a step begins while one is not settled");
  const std::optional<FinishedStep> finished = advance();
  return finished ? finished->report : settle()->report;
}

std::optional<FinishedStep> Trainer::advance(const std::function<RankWord()>& word) {
  const TraceScope scope(model_.context(), TraceKind::step, "step");
  const ComputeClock::Running running(compute_clock_);
  auto step = std::make_unique<Unsettled>();
  std::optional<FinishedStep> finished;
  if (config_.optimizer.optimistic)
    finished = compute_before_settling(*step, word);
  else
    compute_at_once(*step, word);
  step->before = counters_;
  step->report.loss_scale = counters_.loss_scale.factor();
  step->report.lr = learning_rate(config_.optimizer, config_.train.updates, counters_.updates + 1);
  if (!config_.optimizer.optimistic) {
    conclude(*step);
    if (!step->report.skipped) update_weights(step->report, clip_factor(step->report));
    return finish(*step);
  }
  optimizer_.keep();
  update_weights(step->report, 1.0);
  count(step->report);
  unsettled_ = std::move(step);
  return finished;
}

std::optional<FinishedStep> Trainer::settle() {
  if (!unsettled_) return std::nullopt;
  const TraceScope scope(model_.context(), TraceKind::step, "settle the update");
  const std::unique_ptr<Unsettled> step = std::move(unsettled_);
  conclude(*step);
  StepReport& report = step->report;
  const double clip = clip_factor(report);
  report.redone = report.skipped || clip != 1.0;
  counters_ = step->before;
  if (report.redone) {
    optimizer_.restore();
    if (report.skipped)
      weights_changed();
    else
      update_weights(report, clip);
  }
  return finish(*step);
}

FinishedStep Trainer::finish(Unsettled& step) {
  count(step.report);
  std::vector<ParameterNorms> norms;
  if (step.norms) norms = gradient_norms_.finish(*step.norms, step.report.gradient_factor());
  if (!step.report.skipped) {
    enter_batch(spike_rule_, counters_.recent, step.report.loss, step.report.gradient_norm);
    enter_loss(explosion_rule_, counters_.trend, step.report.loss);
  }
  return {.report = step.report,
          .counters = counters_,
          .stop_wanted = step.stop_wanted,
          .save_requests = step.save_requests,
          .save_progress = step.save_progress,
          .compute_seconds = std::move(step.compute_seconds),
          .gradient_norms = std::move(norms)};
}

void Trainer::count(const StepReport& report) {
  counters_.batch_index += 1;
  counters_.updates += report.skipped ? 0 : 1;
  counters_.tokens += report.tokens;
  const bool overflowed = report.reason == SkipReason::overflow;
  counters_.skipped_in_a_row = report.skipped && !overflowed ? counters_.skipped_in_a_row + 1 : 0;
  const double scale = counters_.loss_scale.value;
  if (report.reason != SkipReason::spike)
    counters_.loss_scale = next_loss_scale(loss_scale_rule_, counters_.loss_scale, overflowed);
  // A graph has the scale that it was recorded with.
  if (counters_.loss_scale.value != scale) graphed_.clear();
}

// torch.nn.utils.clip_grad_norm_: the factor is max / (norm + 1e-6), at most 1.
double Trainer::clip_factor(const StepReport& report) const {
  const double largest = config_.optimizer.clip_norm;
  return largest > 0.0 ? std::min(1.0, largest / (report.gradient_norm + 1e-6)) : 1.0;
}

// The update behind the one that the counters tell.
void Trainer::update_weights(const StepReport& report, double clip) {
  const OptimizerConfig& o = config_.optimizer;
  optimizer_.step({.lr = report.lr,
                   .beta1 = o.beta1,
                   .beta2 = o.beta2,
                   .eps = o.eps,
                   .weight_decay = o.weight_decay,
                   .grad_factor = report.gradient_factor() * clip,
                   .update = counters_.updates + 1,
                   .fairseq_eps = o.eps_form == AdamEps::fairseq});
  model_.prepare();
}

namespace {

// Negative log-likelihoods of all tokens here: 0 where a token is not predicted.
Tensor of_all_tokens(Context& context, const MicroBatch& batch, const Tensor& result) {
  if (!batch.predicted.defined()) return result;
  const Tensor all = context.zeros({batch.num_tokens(), 1}, result.dtype());
  ops::embedding_backward(context, batch.predicted, result.view({result.numel(), 1}), 1.0, 0, all);
  return all.view({batch.num_tokens()});
}

// A micro-batch's values in the order of its tokens, [sequences * length], from those of this rank's part of
// every sequence. Collective over the context group.
Tensor of_whole_sequences(ModelInstance& model, const MicroBatch& batch, const Tensor& mine) {
  Context& context = model.context();
  const Group& group = model.mesh().context();
  if (group.size() == 1) return mine;
  std::vector<int64_t> counts;
  for (int r = 0; r < group.size(); ++r)
    counts.push_back(batch.sequences * context_part(batch.length, group.size(), r).size());
  const Shape all{batch.sequences * batch.length};
  const Tensor by_rank = context.empty(all, mine.dtype());
  group.all_gather(context, mine, by_rank, counts);
  const Tensor whole = context.empty(all, mine.dtype());
  int64_t at = 0;
  for (int r = 0; r < group.size(); ++r) {
    const SequencePart part = context_part(batch.length, group.size(), r);
    for (int64_t s = 0; s < batch.sequences; ++s) {
      for (const Range& run : {part.first, part.second}) {
        copy(context, by_rank.flat(at, run.size()), whole.flat(s * batch.length + run.begin, run.size()));
        at += run.size();
      }
    }
  }
  return whole;
}

// Collective over the context group.
TokenScores token_scores(ModelInstance& model, const MicroBatch& batch, int64_t index) {
  const Tensor nll = of_all_tokens(model.context(), batch, model.result(index));
  TokenScores scores{of_whole_sequences(model, batch, nll), {}};
  if (batch.purpose == Purpose::scoring) {
    scores.minus_likeliest = of_whole_sequences(model, batch, model.minus_likeliest(index));
  }
  return scores;
}

}  // namespace

EvaluationResult evaluate(ModelInstance& model, const RunConfig& config, const BatchSource& source,
                          int64_t sequences, const ScoreVisitor& visit, const LogitsVisitor& visit_logits,
                          Purpose purpose) {
  const std::vector<Range> samples = micro_batch_samples(model, sequences, config.train.micro_batch);
  const bool classifies = config.model.head == OutputHead::classification;
  EvaluationResult mine;
  int64_t correct = 0;
  // Some micro-batches at a time fill the pipeline; their tokens and losses need little memory.
  const size_t window = 4 * static_cast<size_t>(model.mesh().pipeline().size());
  for (size_t begin = 0; begin < samples.size(); begin += window) {
    const size_t end = std::min(samples.size(), begin + window);
    std::vector<Batch> read;
    std::vector<MicroBatch> batches;
    run_agreed(model.mesh().world(), [&] {
      for (size_t i = begin; i < end; ++i) {
        read.push_back(source(samples[i].begin, samples[i].size()));
        batches.push_back(make_micro_batch(model, read.back(), samples[i].begin, 0, purpose));
      }
    });
    const int64_t targets = counted_targets(model, batches);
    model.set_micro_batches(batches);
    model.forward(static_cast<int64_t>(end - begin));
    if (!model.answers_for_loss()) continue;
    mine.nll_sum += model.loss_sum();
    mine.tokens += targets;
    correct += model.correct();
    for (size_t i = begin; visit_logits && i < end; ++i) {
      if (!samples[i].empty()) visit_logits(samples[i].begin, model.logits(static_cast<int64_t>(i - begin)));
    }
    for (size_t i = begin; visit && i < end; ++i) {
      if (samples[i].empty()) continue;
      const TokenScores scores = token_scores(model, batches[i - begin], static_cast<int64_t>(i - begin));
      if (model.mesh().context().rank() == 0) visit(samples[i].begin, read[i - begin], scores);
    }
  }
  const Group& world = model.mesh().world();
  EvaluationResult all{world.all_reduce(mine.nll_sum, ReduceOp::sum), world.all_reduce_sum(mine.tokens)};
  if (classifies) all.correct = world.all_reduce_sum(correct);
  return all;
}

}  // namespace normformer
