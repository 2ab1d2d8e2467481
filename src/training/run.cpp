#include "normformer/training/run.h"

#include <cmath>
#include <fstream>
#include <map>
#include <optional>

#include "normformer/comm/ledger_file.h"
#include "normformer/core/log.h"
#include "normformer/model/parts.h"
#include "normformer/ops/matmul.h"
#include "normformer/training/agreement.h"
#include "normformer/training/gathered_file.h"
#include "normformer/training/metrics.h"
#include "normformer/training/pipeline_drawing.h"
#include "normformer/training/replica_check.h"
#include "normformer/training/run_checkpoint.h"
#include "normformer/training/run_data.h"
#include "normformer/training/run_signals.h"
#include "normformer/training/starting_weights.h"
#include "normformer/training/statistics.h"
#include "normformer/training/tensorboard.h"
#include "normformer/training/trainer.h"
#include "normformer/training/watchdog.h"

namespace normformer {

namespace {

std::string describe(const SaveResult& save) {
  const SaveTimes& t = save.times;
  return fmt::format(
      "saved a checkpoint after update {}: {} copied in {:.3f} s, for which training stood still, as for "
      "{:.3f} s to "
      "agree; written in {:.2f} s and published in {:.3f} s beside it",
      save.update_count, with_prefix(static_cast<double>(save.bytes), "B"), t.copy, t.agree, t.write,
      t.publish);
}

// One rank's run, from opened data to the last checkpoint.
class TrainingRun {
 public:
  TrainingRun(const RunConfig& config, const RunOptions& options, Context& context, const Group& world);
  ExitCode run();

  /// Says in this rank's ledger, and to who watches from outside, that the run has ended in good order.
  void end(ExitCode code) {
    watchdog_.enter(RunPhase::ending);
    if (ledger_) ledger_->end_run();
    watchdog_.end(code == ExitCode::stopped ? RunState::stopped : RunState::finished);
  }

 private:
  void open_data();
  void prepare_folder();
  void open_ledger();
  void print_banner();
  void open_metrics();
  void restore();
  void draw_weights();
  void dump_gradients();
  void step();
  void settle();
  void enter(const std::optional<FinishedStep>& step);
  bool has_to_settle() const;
  bool is_due(int64_t every) const;
  void start_watching_stragglers(const Mesh& mesh);
  void watch_stragglers(const FinishedStep& step);
  void say_spike(const FinishedStep& step);
  bool has_to_go_back(const StepReport& report) const;
  void go_back(const FinishedStep& step);
  bool has_exploded(const FinishedStep& step);
  std::string limit_reached(const FinishedStep& step) const;
  void say_redone();
  void show_profile();
  void validate();
  void check_replicas();
  void record_distributions();
  void begin_save();
  void finish_save();
  void tell(const std::optional<SaveResult>& result);
  void leave_nothing_on_its_way();
  ExitCode end_exploded();
  ExitCode finish(ExitCode code);
  bool stop_is_wanted();
  bool save_is_wanted() const { return save_requests_ > saves_heard_; }
  std::string tokenizer_hash() const { return fmt::format("tokenizer {:016x}", tokenizer_->hash()); }
  bool is_root() const { return world_.rank() == 0; }
  void say(const std::string& message);

  RunConfig config_;
  RunOptions options_;
  Context& context_;
  Group world_;
  RunFolder folder_;
  RunSignals signals_;
  Watchdog watchdog_;
  std::shared_ptr<LedgerFile> ledger_;  // null where it could not be made
  std::optional<RunDataset> train_data_;
  std::optional<RunDataset> valid_data_;
  std::optional<BpeTokenizer> tokenizer_;
  std::optional<ModelInstance> model_;
  std::optional<Trainer> trainer_;
  std::optional<RunCheckpoints> checkpoints_;
  std::optional<MetricsFile> metrics_;          // rank 0 only
  std::optional<StatisticsFile> statistics_;    // rank 0 only
  std::optional<TensorBoardFile> tensorboard_;  // rank 0 only
  std::optional<StatusLine> status_;            // rank 0 only
  Profiler profiler_;
  Speedometer speedometer_;
  // Rank 0's, with every rank's host.
  std::optional<StragglerWatch> stragglers_;
  std::vector<std::string> hosts_;
  int64_t parameters_ = 0;  // scalars of the whole model
  int64_t saving_at_ = -1;  // batch index of the newest checkpoint, or of the one that is being saved
  int64_t saved_at_ = -1;   // batch index of the newest checkpoint
  std::map<std::string, double> last_numbers_;  // of the step entered last, for checkpoints
  bool skipped_ = false;                        // of the step entered last
  std::string explosion_;                       // what is said of it; empty before the run exploded
  bool stop_wanted_ = false;                    // on any rank, in that step
  int64_t save_requests_ = 0;                   // that a rank had heard of, in that step
  int64_t saves_heard_ = 0;                     // of these, those that were followed
  int64_t steps_ = 0;                           // of this process
  int64_t redone_ = 0;
  int64_t rollbacks_ = 0;  // since the newest checkpoint
};

TrainingRun::TrainingRun(const RunConfig& config, const RunOptions& options, Context& context,
                         const Group& world)
    : config_(config),
      options_(options),
      context_(context),
      world_(world),
      folder_{config.checkpoint.folder},
      signals_(options.stop_on_terminal_signals),
      watchdog_({.limit_seconds = config.health.watchdog_seconds,
                 .run_folder = folder_.root,
                 .ledgers = folder_.ledgers(),
                 .rank = world.rank(),
                 .updates = config.train.updates}),
      profiler_(context, world, options.profile, folder_.trace(options.profile)),
      speedometer_(training_flops_per_token(config)) {}

void TrainingRun::say(const std::string& message) {
  if (status_) status_->show_message(message);
}

void TrainingRun::open_data() {
  run_agreed(world_, [&] {
    tokenizer_ = find_tokenizer(config_);
    train_data_.emplace(open_training_data(config_, tokenizer_));
    valid_data_ = open_validation_data(config_, tokenizer_, train_data_->classes());
  });
}

void TrainingRun::prepare_folder() {
  run_agreed(world_, [&] {
    if (!is_root()) return;
    std::error_code error;
    std::filesystem::create_directories(folder_.checkpoints(), error);
    if (error) {
      throw IoError(
          fmt::format("cannot make the run's folder {}: {}", folder_.root.string(), error.message()));
    }
    if (checkpoints_->any() && !options_.resume && options_.dump_gradients.empty()) {
      throw ConfigError(
          fmt::format("{} already holds checkpoints: add --resume to go on from the newest, or choose "
                      "another checkpoint.folder",
                      folder_.root.string()));
    }
    std::ofstream file(folder_.config());
    file << to_toml(config_);
    if (!file.flush())
      throw IoError(fmt::format("cannot write {}: {}", folder_.config().string(), system_reason()));
    if (tokenizer_) tokenizer_->save(folder_.tokenizer());
    if (!train_data_->classes().empty()) write_class_names(folder_.classes(), train_data_->classes());
    open_log_file(folder_.log().string());
  });
}

// What an earlier run on more ranks has left must not be taken for this one's. A run can do without a ledger,
// which not every file system lets map.
void TrainingRun::open_ledger() {
  if (is_root()) {
    std::error_code error;  // a folder that is not there is told below
    std::filesystem::remove_all(folder_.ledgers(), error);
    std::filesystem::create_directories(folder_.ledgers(), error);
  }
  world_.barrier();
  try {
    ledger_ = std::make_shared<LedgerFile>(folder_.ledgers() / ledger_file_name(world_.rank()), world_.rank(),
                                           world_.size());
  } catch (const IoError& e) {
    log_rank(LogLevel::warning, "this rank keeps no ledger: {}", e.what());
  }
  world_.ledger().attach(ledger_);
  watchdog_.open(ledger_);
}

void TrainingRun::print_banner() {
  const Mesh& mesh = model_->mesh();
  if (!is_root()) return;
  say(to_toml(config_));
  say(fmt::format(
      "{} parameters, {} ranks = tensor {} x context {} x pipeline {} x data {}, {} threads each, {} in {}",
      with_prefix(static_cast<double>(parameters_)), world_.size(), mesh.tensor().size(),
      mesh.context().size(), mesh.pipeline().size(), mesh.data().size(), context_.threads().size(),
      context_.is_cuda() ? context_.gpu().description().name : ops::describe_matmul(),
      name_of(model_->store().dtype())));
  say(fmt::format("{} tokens to train on, {} to validate on; the run's folder is {}",
                  with_prefix(static_cast<double>(train_data_->num_tokens())),
                  with_prefix(valid_data_ ? static_cast<double>(valid_data_->num_tokens()) : 0.0),
                  folder_.root.string()));
  if (config_.train.precision == Precision::bf16 && !context_.is_cuda() && !ops::has_native_bf16()) {
    say("this processor has no bf16 instructions: train.precision = \"fp32\" would be faster");
  }
  if (scales_loss(config_.train.precision) && !context_.is_cuda()) {
    say("processors compute fp16 in fp32: train.precision = \"fp32\" would be faster");
  }
  if (options_.stop_on_terminal_signals)
    say("Ctrl-C stops the run cleanly");
  else if (std::getenv("NORMFORMER_LAUNCHER") != nullptr)
    say("Ctrl-C stops the run cleanly");
  else
    say("SIGUSR1 to mpirun stops the run cleanly (kill -USR1); Ctrl-C ends it at once");
}

void TrainingRun::open_metrics() {
  if (!is_root()) return;
  const TrainingCounters counters = trainer_->counters();
  metrics_.emplace(folder_.metrics(), counters);
  metrics_->write_run(counters, parameters_, training_flops_per_token(config_));
  statistics_.emplace(folder_.statistics(), counters);
  if (!config_.metrics.tensorboard) return;
  tensorboard_.emplace(folder_.tensorboard(), counters);
  tensorboard_->write_config(counters, to_toml(config_));
}

void TrainingRun::restore() {
  watchdog_.enter(RunPhase::loading);
  if (options_.resume && checkpoints_->load_newest(*trainer_)) {
    saving_at_ = saved_at_ = trainer_->counters().batch_index;
    say(fmt::format("resumed after update {}", trainer_->counters().updates));
  } else {
    draw_weights();
  }
}

void TrainingRun::draw_weights() {
  trainer_->initialise();
  if (config_.train.init_from.empty()) return;
  say(describe(load_starting_weights(*trainer_, config_.train.init_from, tokenizer_hash())));
}

void TrainingRun::dump_gradients() {
  const StepReport report = trainer_->compute_gradients();
  for (const ParameterPiece& piece : trainer_->optimizer().owned_gradients()) {
    scale(context_, piece.values, report.gradient_factor());
  }
  write_gathered(context_, world_, trainer_->optimizer().owned_gradients(),
                 accumulator_of(model_->store().dtype()), options_.dump_gradients);
  say(fmt::format("wrote the gradients of batch {} (loss {:.6f}) to {}", trainer_->counters().batch_index,
                  report.loss, options_.dump_gradients.string()));
}

void TrainingRun::step() {
  const int64_t update = trainer_->counters().updates + 1;
  if (ledger_) ledger_->begin_update(update);
  profiler_.before_update(update);
  enter(trainer_->advance([this] {
    return RankWord{.wants_stop = signals_.requested_stop(),
                    .save_requests = signals_.save_requests(),
                    .save_progress = checkpoints_->writer().progress()};
  }));
  if (update == options_.profile.last) settle();
  if (profiler_.after_update(update)) show_profile();
}

void TrainingRun::settle() { enter(trainer_->settle()); }

// Whether weights and counters are needed, or may be, as they are behind the step made last.
bool TrainingRun::has_to_settle() const {
  return !config_.optimizer.optimistic || stop_wanted_ || save_is_wanted() ||
         trainer_->counters().updates >= config_.train.updates || is_due(config_.train.valid_every) ||
         is_due(config_.checkpoint.every) || is_due(config_.health.replica_check_every) ||
         is_due(config_.metrics.distributions_every);
}

bool TrainingRun::is_due(int64_t every) const {
  return every > 0 && trainer_->counters().updates % every == 0;
}

void TrainingRun::enter(const std::optional<FinishedStep>& step) {
  if (!step || !explosion_.empty()) return;
  const StepReport& report = step->report;
  const TrainingCounters& counters = step->counters;
  skipped_ = report.skipped;
  stop_wanted_ = step->stop_wanted;
  save_requests_ = step->save_requests;
  watchdog_.finish_update(counters.updates, report.loss);
  ++steps_;
  redone_ += report.redone ? 1 : 0;
  const int64_t batch = config_.train.global_batch;
  const int64_t tokens = predicts_some_tokens(config_.model)
                             ? batch * train_data_->row_length((counters.batch_index - 1) * batch)
                             : report.tokens;
  const Speed speed = speedometer_.enter_step(tokens, config_.train.updates - counters.updates);
  if (metrics_) metrics_->write_step(*step, speed);
  if (statistics_ && !report.skipped && !step->gradient_norms.empty())
    statistics_->write_gradients(counters, trainer_->gradient_norms().names(), step->gradient_norms);
  if (tensorboard_) tensorboard_->write_step(*step, speed);
  if (status_) status_->show_step(counters, report, speed);
  last_numbers_ = {{"loss", report.loss}, {"gradient_norm", report.gradient_norm}};
  tell(checkpoints_->writer().advance(step->save_progress));
  say_spike(*step);
  watch_stragglers(*step);
  if (has_exploded(*step)) return;
  if (has_to_go_back(report)) return go_back(*step);
  const std::string limit = limit_reached(*step);
  if (limit.empty()) return;
  leave_nothing_on_its_way();
  throw AgreedError(ExitCode::numeric, limit);
}

// Stages of a pipeline differ by nature.
void TrainingRun::start_watching_stragglers(const Mesh& mesh) {
  hosts_ = world_.all_gather_text(host_name());
  if (!is_root()) return;
  std::vector<int64_t> stages;
  for (int r = 0; r < world_.size(); ++r) stages.push_back(coordinates_of(mesh.degrees(), r).pipeline);
  stragglers_.emplace(config_.health.straggler_factor, std::move(stages));
}

void TrainingRun::watch_stragglers(const FinishedStep& step) {
  if (!stragglers_) return;
  for (const Straggler& straggler : stragglers_->enter_step(step.compute_seconds))
    say(describe(straggler, hosts_[static_cast<size_t>(straggler.rank)]));
}

void TrainingRun::say_spike(const FinishedStep& step) {
  if (!step.report.spike) return;
  say(fmt::format(
      "batch {} is a spike: loss {:.4f} and gradient norm {:.3f} are {:.1f} and {:.1f} robust standard "
      "deviations above the medians of {} batches",
      step.counters.batch_index, step.report.loss, step.report.gradient_norm, step.report.spike->loss,
      step.report.spike->gradient_norm, step.report.spike->batches));
}

bool TrainingRun::has_to_go_back(const StepReport& report) const {
  const HealthConfig& health = config_.health;
  return (report.reason == SkipReason::spike && health.on_spike == SpikePolicy::rollback) ||
         (report.reason == SkipReason::nonfinite && health.on_nonfinite == NonfinitePolicy::rollback);
}

// To the newest checkpoint, but not to its place in the data: batches up to this step's are left out. With
// optimistic updates a further step may have begun; it counts for nothing.
void TrainingRun::go_back(const FinishedStep& step) {
  leave_nothing_on_its_way();
  if (rollbacks_ >= config_.health.max_rollbacks) {
    throw AgreedError(
        ExitCode::numeric,
        fmt::format(
            "the run went back {} times without coming to a new checkpoint (health.max_rollbacks), and "
            "batch {} is no better ({}): lower optimizer.lr, lengthen optimizer.warmup_updates or save "
            "more often (checkpoint.every)",
            rollbacks_, step.counters.batch_index, name_of(step.report.reason)));
  }
  ++rollbacks_;
  const bool has_checkpoint = checkpoints_->load_newest(*trainer_);
  if (!has_checkpoint) {
    draw_weights();
    trainer_->set_counters({});
  }
  TrainingCounters counters = trainer_->counters();
  const int64_t first_left_out = counters.batch_index + 1;
  counters.batch_index = step.counters.batch_index;
  trainer_->set_counters(counters);
  if (metrics_) metrics_->write_rollback(step, counters, first_left_out);
  if (tensorboard_) tensorboard_->write_rollback(counters);
  say(fmt::format("went back from update {} to {} ({}): batches {} to {} are left out", step.counters.updates,
                  has_checkpoint ? fmt::format("the checkpoint after update {}", counters.updates)
                                 : std::string("the initial weights, there being no checkpoint"),
                  name_of(step.report.reason), first_left_out, counters.batch_index));
  speedometer_.resume();
}

bool TrainingRun::has_exploded(const FinishedStep& step) {
  const StepReport& report = step.report;
  const auto reason = find_explosion(explosion_rule(config_),
                                     {.loss = report.loss,
                                      .nonfinite = report.reason == SkipReason::nonfinite,
                                      .overflowed = report.reason == SkipReason::overflow,
                                      .loss_scale = step.counters.loss_scale.factor()},
                                     step.counters.trend);
  if (!reason) return false;
  if (metrics_) metrics_->write_explosion(step, *reason);
  explosion_ = fmt::format("exploded after update {} at lr {:.4g}: ", step.counters.updates, report.lr);
  if (*reason == ExplosionReason::nonfinite) explosion_ += "loss or gradient is not finite";
  if (*reason == ExplosionReason::loss_scale)
    explosion_ +=
        fmt::format("the loss scale fell below {} (train.loss_scale_min)", config_.train.loss_scale_min);
  if (*reason == ExplosionReason::rise)
    explosion_ +=
        fmt::format("the loss of the last {} updates is {:.3f} above its lowest (health.explosion_rise)",
                    ExplosionRule::kWindow, rise_of(step.counters.trend));
  return true;
}

// Why the run must end behind this step; empty where it may go on.
std::string TrainingRun::limit_reached(const FinishedStep& step) const {
  if (step.counters.skipped_in_a_row >= config_.train.max_skipped &&
      step.report.reason == SkipReason::spike) {
    return fmt::format(
        "{} batches in a row were skipped (train.max_skipped), the last for a spike: write health.on_spike = "
        "\"rollback\" or a higher health.spike_zscore",
        step.counters.skipped_in_a_row);
  }
  if (step.counters.skipped_in_a_row >= config_.train.max_skipped) {
    return fmt::format(
        "{} updates in a row had gradients that are not finite (train.max_skipped): lower "
        "optimizer.lr, lengthen optimizer.warmup_updates or set optimizer.clip_norm",
        step.counters.skipped_in_a_row);
  }
  if (step.report.skipped && step.counters.loss_scale.factor() < config_.train.loss_scale_min) {
    return fmt::format(
        "after {} overflows the loss scale fell below {} (train.loss_scale_min): lower "
        "optimizer.lr, set optimizer.clip_norm or write train.precision = \"bf16\", whose range "
        "is that of fp32",
        step.counters.loss_scale.overflows, config_.train.loss_scale_min);
  }
  return {};
}

void TrainingRun::say_redone() {
  if (!config_.optimizer.optimistic) return;
  say(fmt::format("{} of {} updates were wrong and made again or taken back (optimizer.optimistic)", redone_,
                  steps_));
}

void TrainingRun::show_profile() {
  say(fmt::format("traced: open {} in ui.perfetto.dev or chrome://tracing",
                  folder_.trace(options_.profile).string()));
  const Mesh& mesh = model_->mesh();
  if (mesh.pipeline().size() == 1) return;
  const auto drawing = draw_pipeline(mesh, trainer_->schedule(), profiler_.spans());
  run_agreed(world_, [&] {
    if (!drawing) return;
    const auto write = [&](const char* how, const std::string& picture) {
      const std::filesystem::path path = folder_.timeline(options_.profile, how);
      std::ofstream file(path);
      file << picture;
      if (!file.flush()) throw IoError(fmt::format("cannot write {}: {}", path.string(), system_reason()));
      say(fmt::format("drawn: {}", path.string()));
    };
    write("measured", drawing->measured);
    write("simulated", drawing->simulated);
  });
}

void TrainingRun::validate() {
  if (!valid_data_) return;
  const TraceScope scope(context_, TraceKind::step, "validation");
  const PhaseScope phase(watchdog_, RunPhase::validating);
  const int64_t all = valid_data_->num_samples();
  const int64_t sequences =
      config_.train.valid_sequences > 0 ? std::min(all, config_.train.valid_sequences) : all;
  const EvaluationResult result = evaluate(
      *model_, config_, [&](int64_t f, int64_t n) { return valid_data_->read_batch(f, n); }, sequences);
  const TrainingCounters counters = trainer_->counters();
  // Whether the run's files do not have it yet: one that is resumed at its end validates again.
  const bool is_new =
      metrics_ && metrics_->write_validation(counters, result, context_.memory().report().peak_live);
  if (is_new && tensorboard_) tensorboard_->write_validation(counters, result);
  const std::string of =
      result.correct
          ? fmt::format("accuracy {:.4f} over {} sequences", result.accuracy(), result.tokens)
          : fmt::format("perplexity {:.3f} over {} tokens", std::exp(result.mean()), result.tokens);
  say(fmt::format("validation after update {}: loss {:.4f}, {}", counters.updates, result.mean(), of));
}

// What replicas do not hold alike is not to be saved, nor trained further.
void TrainingRun::check_replicas() {
  if (config_.health.replica_check_every == 0) return;
  try {
    require_equal_replicas(*trainer_);
  } catch (const AgreedError&) {
    leave_nothing_on_its_way();
    throw;
  }
}

void TrainingRun::record_distributions() {
  if (config_.metrics.distributions_every == 0) return;
  const TraceScope scope(context_, TraceKind::step, "distributions of scales");
  const auto scales = scale_distributions(*trainer_, master_dtype(config_.train.precision));
  const bool is_new = statistics_ && statistics_->write_distributions(trainer_->counters(), scales);
  if (!is_new || !tensorboard_) return;
  for (const Distribution& d : scales) tensorboard_->write_distribution(trainer_->counters(), d);
}

void TrainingRun::begin_save() {
  finish_save();
  const TraceScope scope(context_, TraceKind::step, "saving a checkpoint");
  const PhaseScope phase(watchdog_, RunPhase::saving);
  check_replicas();
  saving_at_ = trainer_->counters().batch_index;
  tell(checkpoints_->begin_save(*trainer_, last_numbers_));
  if (!config_.checkpoint.async) finish_save();
}

void TrainingRun::finish_save() {
  if (!checkpoints_->writer().in_flight()) return;
  const TraceScope scope(context_, TraceKind::step, "waiting for a checkpoint");
  const PhaseScope phase(watchdog_, RunPhase::saving);
  tell(checkpoints_->writer().finish());
}

// What became of a save; nothing where it is on its way.
void TrainingRun::tell(const std::optional<SaveResult>& result) {
  if (!result) return;
  if (result->saved) {
    saved_at_ = saving_at_;
    rollbacks_ = 0;
    say(describe(*result));
    return;
  }
  saving_at_ = saved_at_;
  const std::string failure =
      fmt::format("no checkpoint was saved after update {}: {}; earlier ones are as they were",
                  result->update_count, result->reason);
  if (config_.checkpoint.on_failure == SaveFailure::stop) {
    leave_nothing_on_its_way();
    throw AgreedError(ExitCode::io_failure, failure);
  }
  log_root(LogLevel::error, "{}", failure);
}

// To be called before all ranks leave with an error, or go back.
void TrainingRun::leave_nothing_on_its_way() {
  trainer_->settle();
  finish_save();
}

// What exploded is not saved, so that the newest checkpoint is one to go on from.
ExitCode TrainingRun::end_exploded() {
  leave_nothing_on_its_way();
  say_redone();
  say(explosion_);
  return ExitCode::success;
}

// The run ends behind its last save.
ExitCode TrainingRun::finish(ExitCode code) {
  finish_save();
  say_redone();
  if (saved_at_ != trainer_->counters().batch_index) {
    throw AgreedError(
        ExitCode::io_failure,
        "the run has ended, but its last updates are in no checkpoint: make room, and start the "
        "same command with --resume");
  }
  if (code == ExitCode::stopped) say("stopped cleanly; the same command with --resume goes on from here");
  return code;
}

bool TrainingRun::stop_is_wanted() {
  return world_.all_reduce(signals_.requested_stop() ? 1.0 : 0.0, ReduceOp::max) > 0.0;
}

ExitCode TrainingRun::run() {
  if (is_root()) status_.emplace(config_.train.updates, config_.train.log_every);
  open_data();
  require_same(world_, "training data", fmt::format("{:016x}", train_data_->fingerprint()));
  checkpoints_.emplace(world_, folder_.checkpoints(), config_, tokenizer_hash(), train_data_->fingerprint());
  prepare_folder();
  open_ledger();
  const Mesh mesh = make_mesh(world_, config_.parallel);
  model_.emplace(context_, mesh, config_, true);
  trainer_.emplace(*model_, config_, [&](int64_t f, int64_t n) { return train_data_->read_batch(f, n); });
  parameters_ = model_->count_parameters();
  print_banner();
  restore();
  if (!options_.dump_gradients.empty()) {
    dump_gradients();
    return ExitCode::success;
  }
  open_metrics();
  start_watching_stragglers(mesh);

  bool validated = false;
  watchdog_.enter(RunPhase::training);
  speedometer_.resume();
  while (trainer_->counters().updates < config_.train.updates) {
    step();
    if (explosion_.empty() && !has_to_settle()) continue;
    if (explosion_.empty()) settle();
    if (!explosion_.empty()) return end_exploded();
    // A step that was skipped has left nothing to look at or to save.
    validated = !skipped_ && is_due(config_.train.valid_every);
    const bool saves = !skipped_ && (is_due(config_.checkpoint.every) || save_is_wanted());
    if (validated) validate();
    if (!skipped_ && is_due(config_.metrics.distributions_every)) record_distributions();
    const bool stops = stop_is_wanted();
    if (stops || saves)
      begin_save();
    else if (!skipped_ && is_due(config_.health.replica_check_every))
      check_replicas();
    if (saves) saves_heard_ = save_requests_;
    if (stops) return finish(ExitCode::stopped);
    if (validated || saves) speedometer_.resume();
  }
  if (!validated) validate();
  record_distributions();
  if (saving_at_ != trainer_->counters().batch_index) begin_save();
  return finish(ExitCode::success);
}

}  // namespace

ExitCode run_training(const RunConfig& config, const RunOptions& options, Context& context,
                      const Group& world) {
  TrainingRun run(config, options, context, world);
  const ExitCode code = run.run();
  run.end(code);
  return code;
}

}  // namespace normformer
