#include "graphed_stage.h"

namespace normformer {

void GraphedStage::run(ActionKind kind, int64_t micro_batch, const std::function<void()>& call) {
  const int64_t tokens = boundary_shape(micro_batch)[0];
  // A trace wants a time for each operation; a graph has but one.
  if (tokens == 0 || context_->trace().is_on()) return call();
  context_->gpu().run_as_graph(graphs_[{kind, tokens}], call);
}

Tensor GraphedStage::forward(int64_t micro_batch, const Tensor& input, std::unique_ptr<Saved>& saved) {
  Tensor output;
  run(ActionKind::forward, micro_batch, [&] { output = stage_->forward(micro_batch, input, saved); });
  return output;
}

Tensor GraphedStage::backward(int64_t micro_batch, Saved& saved, const Tensor& doutput) {
  Tensor dinput;
  run(ActionKind::backward, micro_batch, [&] { dinput = stage_->backward(micro_batch, saved, doutput); });
  return dinput;
}

Tensor GraphedStage::backward_input(int64_t micro_batch, Saved& saved, const Tensor& doutput) {
  Tensor dinput;
  run(ActionKind::backward_input, micro_batch,
      [&] { dinput = stage_->backward_input(micro_batch, saved, doutput); });
  return dinput;
}

void GraphedStage::backward_weight(int64_t micro_batch, Saved& saved) {
  run(ActionKind::backward_weight, micro_batch, [&] { stage_->backward_weight(micro_batch, saved); });
}

}  // namespace normformer
