#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "normformer/model/environment.h"
#include "normformer/pipeline/stage.h"

namespace normformer {

/// A part of the model that one rank of the pipeline holds.
struct StagePart {
  Range layers;                 ///< global numbers
  bool first = true;            ///< holds the embeddings
  bool last = true;             ///< holds the final LayerNorm, the head and the loss
  bool holds_both_ends = true;  ///< one rank holds the first and the last part, if not this one then another
};

/// One part of a language model: the one place that says what is where. Embeddings in the first part, the
/// tied output in the last; where these are on different ranks both hold a copy of the token embedding, whose
/// gradients are summed over the embedding group (the first owns it), and where they are on one rank they
/// share it; a classifier's last part has no need of it. The whole model is the part that is first and last.
class LanguageModelStage : public Stage {
 public:
  /// To be called whenever weights have changed and before the next forward: folds FFN LayerNorms into their
  /// products, in one reduction for all layers; where values come only for use, each in its next forward.
  /// Collective over the tensor group.
  virtual void prepare() = 0;

  /// Sets the micro-batches that the following calls refer to by number, and forgets what the last ones left.
  /// Every rank gets the same sizes; tokens are read on the first stage, targets and weights on the last,
  /// document_start on all.
  virtual void set_micro_batches(std::vector<MicroBatch> batches);

  /// Sum of the negative log-likelihoods of all targets here that count in the micro-batches forwarded since
  /// set_micro_batches; 0 on other stages than the last.
  double loss_sum() const;

  /// What the forward of micro-batch `index` computed on the last stage: [N] negative log-likelihoods, or
  /// those of its predicted tokens, or for Purpose::generation the logits [sequences, V of this rank] after
  /// the last tokens. Undefined before, and for empty ones.
  const Tensor& result(int64_t index) const { return results_[static_cast<size_t>(index)]; }

  /// Of a classifier: what the forward of micro-batch `index` gave on the last stage, [sequences * classes]
  /// on the host; zeros for sequences whose token another rank has read. Empty before, for empty
  /// micro-batches, and on meta. Waits for a GPU.
  std::vector<double> logits(int64_t index) const;

  /// Of a classifier: how many of the sequences here in the micro-batches forwarded since set_micro_batches
  /// have no likelier class than their target, nor one as likely before it; 0 on other stages than the last.
  int64_t correct() const;

  /// For Purpose::scoring also [N] of result's type: minus the id of the likeliest token in each target's
  /// place, the first of equals.
  const Tensor& minus_likeliest(int64_t index) const { return minus_likeliest_[static_cast<size_t>(index)]; }

  DType boundary_dtype() const override { return environment_.dtype; }

  const ModelEnvironment& environment() const { return environment_; }
  const StagePart& part() const { return part_; }

 protected:
  LanguageModelStage(ModelEnvironment environment, StagePart part)
      : environment_(std::move(environment)), part_(part) {}

  size_t num_micro_batches() const { return batches_.size(); }
  const MicroBatch& batch(int64_t index) const { return batches_[static_cast<size_t>(index)]; }
  void set_result(int64_t index, Tensor result) { results_[static_cast<size_t>(index)] = std::move(result); }
  void set_logits(int64_t index, Tensor logits) { logits_[static_cast<size_t>(index)] = std::move(logits); }
  void set_minus_likeliest(int64_t index, Tensor ids) {
    minus_likeliest_[static_cast<size_t>(index)] = std::move(ids);
  }

 private:
  ModelEnvironment environment_;
  StagePart part_;
  std::vector<MicroBatch> batches_;
  std::vector<Tensor> results_;
  std::vector<Tensor> logits_;
  std::vector<Tensor> minus_likeliest_;
};

/// Declares the part's parameters in the store, which the caller then allocates and fills; of one rank's
/// parts the earlier first. The residual stream is placed as environment.sequence says; between stages goes
/// what this rank has of it.
std::unique_ptr<LanguageModelStage> make_language_model_stage(const ModelEnvironment& environment,
                                                              const StagePart& part, ParameterStore& store);

/// A stage as the pipeline drives it where nothing is saved: evaluation and generation. Refers to the stage.
class ForwardOnlyStage final : public ForwardStage {
 public:
  explicit ForwardOnlyStage(LanguageModelStage& stage) : stage_(&stage) {}
  Tensor forward(int64_t micro_batch, const Tensor& input) override;
  Shape boundary_shape(int64_t micro_batch) const override { return stage_->boundary_shape(micro_batch); }
  DType boundary_dtype() const override { return stage_->boundary_dtype(); }

 private:
  LanguageModelStage* stage_;
};

}  // namespace normformer
