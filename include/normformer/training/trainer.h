#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "normformer/data/token_dataset.h"
#include "normformer/model/model_instance.h"
#include "normformer/pipeline/schedule.h"
#include "normformer/sharding/sharded_optimizer.h"
#include "normformer/training/explosion.h"
#include "normformer/training/gradient_norms.h"
#include "normformer/training/loss_scale.h"
#include "normformer/training/spike.h"
#include "normformer/training/straggler.h"

namespace normformer {

/// Where a run stands: two counters make it resumable. A skipped update moves only the first.
struct TrainingCounters {
  int64_t batch_index = 0;       ///< global batches taken: decides data and dropout
  int64_t updates = 0;           ///< updates made: decides learning rate and Adam's bias corrections
  int64_t tokens = 0;            ///< targets that counted
  int64_t skipped_in_a_row = 0;  ///< batches since the last update; overflows of scaled losses do not count
  LossScale loss_scale = {};     ///< of the next batch
  RecentBatches recent = {};     ///< what the next batch is compared with
  LossTrend trend = {};          ///< what an explosion is told by
  bool operator==(const TrainingCounters&) const = default;
};

/// Why a batch moved no weights.
enum class SkipReason {
  none,       ///< it did
  nonfinite,  ///< its loss or a gradient was not finite
  overflow,   ///< the same, of a scaled loss: the scale falls
  spike,      ///< its loss or gradient norm was far above the others', and such batches are not to count
};

/// "nonfinite", "overflow", "spike"; "none".
std::string_view name_of(SkipReason reason);

/// What one step did, the same on every rank.
struct StepReport {
  double loss = 0.0;           ///< mean negative log-likelihood of the batch, before the update
  int64_t tokens = 0;          ///< targets that counted
  double gradient_norm = 0.0;  ///< of the mean loss, before clipping; inf where not finite
  double lr = 0.0;
  bool skipped = false;                   ///< the weights did not move
  bool redone = false;                    ///< an optimistic update was wrong and taken back
  double loss_scale = 1.0;                ///< what the gradient of the summed loss was multiplied by
  SkipReason reason = SkipReason::none;   ///< why it was skipped
  std::optional<SpikeScores> spike = {};  ///< where it was one, whatever became of it
  std::optional<double> accuracy = {};    ///< of a classifier: share of sequences put into their class

  /// What makes of the gradients in the store those of the mean loss.
  double gradient_factor() const {
    return 1.0 / static_cast<double>(std::max<int64_t>(1, tokens)) / loss_scale;
  }
};

/// What a rank tells all others once a step, when its gradients are there.
struct RankWord {
  bool wants_stop = false;
  int64_t save_requests = 0;  ///< that it has heard of so far
  int64_t save_progress = 0;  ///< CheckpointWriter::progress
};

/// A step that is over: nothing takes back what it did.
struct FinishedStep {
  StepReport report;
  TrainingCounters counters;                 ///< behind it
  bool stop_wanted = false;                  ///< by any rank
  int64_t save_requests = 0;                 ///< the most of all ranks
  int64_t save_progress = 0;                 ///< the least of all ranks
  std::vector<double> compute_seconds = {};  ///< of every world rank, as ComputeClock measures: of the passes
                                             ///< of this step and the update before it
  std::vector<ParameterNorms> gradient_norms =
      {};  ///< of the mean loss, in the order of Trainer::gradient_norms;
           ///< empty unless metrics.gradient_norms_every asks for them
};

/// Where batches come from: global samples [first, first + count) as rows.
using BatchSource = std::function<Batch(int64_t first, int64_t count)>;

/// `batch` as a micro-batch, as far as this rank has its tokens. Tensors are made on the context's device,
/// and only those that this stage reads. `first_sample` is the batch's first sequence's place in the global
/// batch.
MicroBatch make_micro_batch(ModelInstance& model, const Batch& batch, int64_t first_sample,
                            uint64_t batch_index, Purpose purpose);

/// Trains one model: batches in, updates out. Everything about files, logs and stopping is in TrainingRun.
///
/// With optimizer.optimistic a rank does not wait for the norm and the finiteness of all gradients
/// (optimistic update with post-validation; Qi et al. 2024, section 4): advance() updates as if neither
/// clipping nor a skip were needed and keeps what it overwrites. The next advance(), before its first
/// backward, or settle() decides; a wrong update is taken back and made right, or left out, and what was
/// computed with its weights is computed again. Every number is as without. A rank that cannot read its batch
/// then throws its own error: others are not told.
class Trainer {
 public:
  /// `config` is resolved; `source` must give the same batches on every rank.
  Trainer(ModelInstance& model, const RunConfig& config, BatchSource source);
  ~Trainer();

  /// Draws initial weights from the seed, as if nothing had been trained; the counters stay. LogicError where
  /// a step is not settled. Collective over the world.
  void initialise();

  /// Whether no update stands that may still be wrong.
  bool is_settled() const { return unsettled_ == nullptr; }

  /// One update on the next global batch, settled. Throws AgreedError where a rank cannot read it. Collective
  /// over the world.
  StepReport step();

  /// One update on the next global batch, and the step that is over since the last call: this one, or with
  /// optimizer.optimistic the one before, if that was not settled. `word` may be empty; it is asked
  /// when this rank's gradients are there. Throws as step. Collective over the world.
  std::optional<FinishedStep> advance(const std::function<RankWord()>& word = {});

  /// Ends the step whose update may still be wrong, if there is one: to be called before weights are used
  /// otherwise, and before optimizer state and counters are relied on. Collective over the world.
  std::optional<FinishedStep> settle();

  /// The first half of step: gradients of the next batch, summed over the world, scaled and undivided (see
  /// StepReport::gradient_factor), in the store; the report has all but the learning rate. The counters do
  /// not move. LogicError where a step is not settled. Collective over the world.
  StepReport compute_gradients();

  /// To be called after weights were written from outside into the optimizer's masters. LogicError where a
  /// step is not settled. Collective over the world.
  void weights_changed();

  /// Where the run stands; taking for granted that an update which is not settled will stand.
  const TrainingCounters& counters() const { return counters_; }

  /// Goes on from there; a loss scale starts where there was none. LogicError where a step is not settled.
  void set_counters(const TrainingCounters& counters);
  ShardedOptimizer& optimizer() { return optimizer_; }
  const GradientNorms& gradient_norms() const { return gradient_norms_; }
  const Schedule& schedule() const { return schedule_; }
  ModelInstance& model() { return model_; }

 private:
  // A step whose gradients are there, and the numbers of all ranks that decide about its update.
  struct Unsettled {
    StepReport report;
    TrainingCounters before;
    bool stop_wanted = false;
    int64_t save_requests = 0;
    int64_t save_progress = 0;
    std::vector<double> compute_seconds;
    std::vector<double> numbers;  // of every rank
    CommRequest request;          // of these
    std::optional<GradientNorms::Pending> norms;
  };

  std::vector<MicroBatch> next_micro_batches() const;
  std::vector<Stage*> pipeline_parts();
  void agree_on_gradients(Unsettled& step, const std::function<RankWord()>& word);
  void compute_at_once(Unsettled& step, const std::function<RankWord()>& word);
  std::optional<FinishedStep> compute_before_settling(Unsettled& step, const std::function<RankWord()>& word);
  bool measures_norms() const;
  void conclude(Unsettled& step) const;
  void judge(Unsettled& step, bool is_finite) const;
  double clip_factor(const StepReport& report) const;
  void update_weights(const StepReport& report, double clip);
  void count(const StepReport& report);
  FinishedStep finish(Unsettled& step);

  ModelInstance& model_;
  RunConfig config_;
  BatchSource source_;
  ShardedOptimizer optimizer_;
  GradientNorms gradient_norms_;
  Schedule schedule_;
  LossScaleRule loss_scale_rule_;
  SpikeRule spike_rule_;
  ExplosionRule explosion_rule_;
  ComputeClock compute_clock_;
  TrainingCounters counters_;
  std::vector<std::unique_ptr<Stage>> graphed_;  // from the second step on, with device.cuda_graphs
  bool has_run_ = false;
  std::unique_ptr<Unsettled> unsettled_;  // its update is made, and may be wrong
};

/// Sum of negative log-likelihoods and count of targets over samples [0, sequences) of `source`, computed
/// over all ranks.
struct EvaluationResult {
  double nll_sum = 0.0;
  int64_t tokens = 0;
  std::optional<int64_t> correct = {};  ///< of a classifier: sequences put into their class
  double mean() const { return tokens == 0 ? 0.0 : nll_sum / static_cast<double>(tokens); }
  double accuracy() const {
    return tokens == 0 ? 0.0 : static_cast<double>(correct.value_or(0)) / static_cast<double>(tokens);
  }
};

/// What was found of a micro-batch's tokens, in their order: [sequences * seq_len] each.
struct TokenScores {
  Tensor nll;
  Tensor minus_likeliest;  ///< see LanguageModelStage; undefined for Purpose::evaluation
};

/// Called with each micro-batch's first sample, its batch and the scores of all its tokens, on one of the
/// ranks that answer for them.
using ScoreVisitor = std::function<void(int64_t first_sample, const Batch& batch, const TokenScores& scores)>;

/// Of a classifier: called with each micro-batch's first sample and the logits [sequences * classes] of its
/// sequences, on every rank that answers for some of them; zeros for those of others.
using LogitsVisitor = std::function<void(int64_t first_sample, const std::vector<double>& logits)>;

/// Evaluates without dropout; `purpose` is evaluation or, of models that predict every token, scoring.
/// Visitors may be empty, on every rank alike. Collective over the world.
EvaluationResult evaluate(ModelInstance& model, const RunConfig& config, const BatchSource& source,
                          int64_t sequences, const ScoreVisitor& visit = {},
                          const LogitsVisitor& visit_logits = {}, Purpose purpose = Purpose::evaluation);

}  // namespace normformer
