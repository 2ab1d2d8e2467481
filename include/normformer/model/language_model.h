#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "normformer/model/attention_block.h"
#include "normformer/model/environment.h"
#include "normformer/model/feed_forward_block.h"
#include "normformer/pipeline/stage.h"
#include "normformer/tensor_parallel/vocabulary.h"

namespace normformer {

/// A part of the model that one rank of the pipeline holds.
struct StagePart {
  Range layers;                 ///< global numbers
  bool first = true;            ///< holds the embeddings
  bool last = true;             ///< holds the final LayerNorm, the output logits and the loss
  bool holds_both_ends = true;  ///< one rank holds the first and the last part, if not this one then another
};

/// One part of a language model: the one place that says what is where. Embeddings in the first part, the
/// tied output in the last; where these are on different ranks both hold a copy of the token embedding, whose
/// gradients are summed over the embedding group (the first owns it), and where they are on one rank they
/// share it. The whole model is the part that is first and last.
class LanguageModelStage final : public Stage {
 public:
  /// Declares the part's parameters in the store, which the caller then allocates and fills; of one rank's
  /// parts the earlier first.
  LanguageModelStage(ModelEnvironment environment, StagePart part, ParameterStore& store);
  ~LanguageModelStage() override;

  /// To be called whenever weights have changed and before the next forward: folds FFN LayerNorms into their
  /// products, in one reduction for all layers. Collective over the tensor group.
  void prepare();

  /// Sets the micro-batches that the following calls refer to by number, and forgets what the last ones left.
  /// Every rank gets the same sizes; tokens are read on the first stage, targets and weights on the last,
  /// document_start on all.
  void set_micro_batches(std::vector<MicroBatch> batches);

  /// Sum of the negative log-likelihoods of all targets that count in the micro-batches forwarded since
  /// set_micro_batches; 0 on other stages than the last.
  double loss_sum() const;

  /// What the forward of micro-batch `index` computed on the last stage: [N] negative log-likelihoods, or for
  /// Purpose::generation the logits [sequences, V of this rank] after the last tokens. Undefined before, and
  /// for empty ones.
  const Tensor& result(int64_t index) const { return results_[static_cast<size_t>(index)]; }

  Tensor forward(int64_t micro_batch, const Tensor& input, std::unique_ptr<Stage::Saved>& saved) override;
  Tensor backward(int64_t micro_batch, Stage::Saved& saved, const Tensor& doutput) override;
  Tensor backward_input(int64_t micro_batch, Stage::Saved& saved, const Tensor& doutput) override;
  void backward_weight(int64_t micro_batch, Stage::Saved& saved) override;
  Shape boundary_shape(int64_t micro_batch) const override;
  DType boundary_dtype() const override { return environment_.dtype; }

  const ModelEnvironment& environment() const { return environment_; }
  const StagePart& part() const { return part_; }

 private:
  struct Layer;
  struct LayerSaved;
  struct SavedState;

  void hand_out_norms();
  ModelEnvironment environment_of_layer(int64_t layer) const;
  void compute_anew(const MicroBatch& batch, const Layer& layer, LayerSaved& saved) const;
  VocabularyRows vocabulary_rows() const;
  double embedding_factor() const;
  Tensor embed(const MicroBatch& batch, SavedState& saved) const;
  void embed_backward(const MicroBatch& batch, const SavedState& saved, const Tensor& dx) const;
  Tensor finish(int64_t micro_batch, const NormedStream<Replicated>& stream, SavedState& saved);
  Tensor last_tokens(const MicroBatch& batch, const Tensor& x) const;
  Tensor finish_backward(SavedState& saved) const;
  Tensor empty_boundary(int64_t micro_batch, bool exists) const;
  template <class AfterLayer>
  Tensor run_backward(int64_t micro_batch, SavedState& saved, const Tensor& doutput,
                      AfterLayer after_layer) const;

  ModelEnvironment environment_;
  StagePart part_;
  ParameterStore* store_;
  Parameter* embedding_ = nullptr;
  Parameter* positions_ = nullptr;  // learned positions
  Tensor sinusoidal_;               // [length, D], made when first needed
  std::vector<std::unique_ptr<Layer>> layers_;
  NormParameters first_norm_;  // Pre-LN: what reads the stage's input
  NormParameters final_norm_;
  Tensor folded_;  // [layers, 2, D]: c and w_beta of every layer
  std::vector<MicroBatch> batches_;
  std::vector<Tensor> results_;
};

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
