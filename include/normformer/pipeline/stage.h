#pragma once

#include <cstdint>
#include <memory>

#include "normformer/tensor/tensor.h"

namespace normformer {

/// What is common to all parts of a model cut for a pipeline: what crosses the boundary between two. Every
/// part answers alike.
class StageBoundary {
 public:
  virtual ~StageBoundary() = default;

  /// [tokens, width] of the micro-batch's tensor between two parts, forward and back; 0 tokens for an empty
  /// micro-batch, which is computed all the same, on defined tensors without rows, so that collectives inside
  /// a part match over replicas; but it is never sent.
  virtual Shape boundary_shape(int64_t micro_batch) const = 0;

  /// The type of its elements.
  virtual DType boundary_dtype() const = 0;
};

/// One part of a model as the pipeline drives it in training; the model implements it. The first part reads
/// its micro-batch itself, the last one computes the loss itself. Calls come from the rank's thread only, in
/// the order of a checked schedule.
///
/// Tensors are handles: who still needs the elements keeps a copy. The pipeline drops its handles of an input
/// or a gradient when the call returns, of an output when the neighbour has it. So a part puts into `Saved`
/// what it goes back with, the input included, and must not write to a tensor that it has returned or was
/// given: where two parts on one rank follow each other, both may hold it.
class Stage : public StageBoundary {
 public:
  /// What one micro-batch's way back needs. The pipeline owns it, from forward to the end of backward or of
  /// backward_weight, and destroys it then; a part may empty it piece by piece before.
  struct Saved {
    virtual ~Saved() = default;
  };

  /// Input of boundary_shape, undefined on the first part, to output of boundary_shape, undefined on the last
  /// part. Sets `saved`.
  virtual Tensor forward(int64_t micro_batch, const Tensor& input, std::unique_ptr<Saved>& saved) = 0;

  /// Gradient of the output, undefined on the last part, to gradient of the input, undefined on the first
  /// part; leaves in `saved` what backward_weight needs, doutput included.
  virtual Tensor backward_input(int64_t micro_batch, Saved& saved, const Tensor& doutput) = 0;

  /// Adds the micro-batch's weight gradients, after its backward_input and perhaps many actions later.
  virtual void backward_weight(int64_t micro_batch, Saved& saved) = 0;

  /// Both of the above with the same result to the last bit, layer by layer, so that little is kept between.
  virtual Tensor backward(int64_t micro_batch, Saved& saved, const Tensor& doutput) = 0;
};

/// One part of a model that only goes forward (evaluation, scoring). The contract of Stage::forward, with
/// nothing saved.
class ForwardStage : public StageBoundary {
 public:
  virtual Tensor forward(int64_t micro_batch, const Tensor& input) = 0;
};

}  // namespace normformer
