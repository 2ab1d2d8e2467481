#pragma once

#include <string>

#include "normformer/tensor/rectangle.h"
#include "normformer/tensor/tensor.h"

namespace normformer {

/// How a parameter's values are drawn before training.
struct InitialValue {
  enum class Kind { constant, normal, uniform };
  Kind kind = Kind::constant;
  double scale = 0.0;  ///< the constant, the standard deviation, or the bound

  static InitialValue constant(double value) { return {Kind::constant, value}; }
  static InitialValue normal(double std) { return {Kind::normal, std}; }
  static InitialValue uniform(double bound) { return {Kind::uniform, bound}; }
};

/// The ranks, by name, over which a parameter's gradient is still to be summed once this rank's backward is
/// done. There is no default: whoever declares a parameter says it.
struct GradientSum {
  bool tensor;     ///< the mesh's tensor group: each rank has added up its own tokens only
  bool replicas;   ///< the mesh's replicas: each has added up its own sequences, or parts of them
  bool embedding;  ///< the first and the last pipeline stage, which both hold the tied embedding
};

/// One rank's share of one logical parameter.
struct ParameterSpec {
  std::string name;     ///< of the logical tensor, as in files: layer numbers are global
  Shape logical_shape;  ///< of the whole tensor: [rows, columns] or [rows]
  Rectangle part;       ///< what this rank holds
  GradientSum sum_over;
  bool owned;  ///< whether this rank is the one that counts and saves these scalars, among all that hold
               ///< copies
  InitialValue initial;
  bool joins_previous =
      false;          ///< stored right behind the parameter declared before, so that both form one matrix
  int64_t unit = -1;  ///< the layer that it belongs to, which is gathered and reduced as one where replicas
                      ///< split more than optimizer state; -1: of none, always whole
  int64_t finished_with = -1;  ///< the layer whose backward adds the last of its gradient; -1: none's
};

/// A parameter's tensors on this rank: views into the flat buffers of a ParameterStore, which outlives them.
struct Parameter {
  ParameterSpec spec;
  int64_t offset = 0;  ///< first element in the store's flat buffers
  Tensor value;        ///< [rows, columns] or [rows], of the model's type
  Tensor gradient;     ///< main gradient of the same shape, of accumulator_of(type)

  int64_t numel() const { return spec.part.numel(); }
  Range flat_range() const { return {offset, offset + numel()}; }
};

}  // namespace normformer
