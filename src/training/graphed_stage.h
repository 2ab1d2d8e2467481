#pragma once

#include <functional>
#include <map>
#include <utility>

#include "normformer/pipeline/schedule.h"
#include "normformer/pipeline/stage.h"
#include "normformer/tensor/context.h"

namespace normformer {

/// A stage whose calls each reach the GPU as one CUDA graph, with the same bits. The stage must not
/// communicate, and must have run each size of micro-batch once before: what is made on first use needs the
/// GPU at once.
class GraphedStage final : public Stage {
 public:
  GraphedStage(Context& context, Stage& stage) : context_(&context), stage_(&stage) {}

  Tensor forward(int64_t micro_batch, const Tensor& input, std::unique_ptr<Saved>& saved) override;
  Tensor backward(int64_t micro_batch, Saved& saved, const Tensor& doutput) override;
  Tensor backward_input(int64_t micro_batch, Saved& saved, const Tensor& doutput) override;
  void backward_weight(int64_t micro_batch, Saved& saved) override;
  Shape boundary_shape(int64_t micro_batch) const override { return stage_->boundary_shape(micro_batch); }
  DType boundary_dtype() const override { return stage_->boundary_dtype(); }

 private:
  void run(ActionKind kind, int64_t micro_batch, const std::function<void()>& call);

  Context* context_;
  Stage* stage_;
  std::map<std::pair<ActionKind, int64_t>, GpuGraph> graphs_;  // by the micro-batch's number of tokens
};

}  // namespace normformer
