#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "normformer/comm/group.h"
#include "normformer/mesh/parameter.h"

namespace normformer {

/// A run of values that belong to one parameter: elements `range` of the rank's part, flattened row by row.
struct ParameterPiece {
  const Parameter* parameter;
  Range range;
  Tensor values;
};

/// Copies `values`, elements `range` of the flattened rectangle `part`, to their places in `whole` [rows *
/// columns of the logical matrix, flattened], of the same type. Host memory.
void scatter_piece(const Rectangle& part, Range range, const Tensor& values, const Tensor& whole);

/// A logical tensor of which some rank holds pieces.
struct LogicalTensor {
  std::string name;
  Shape shape;
};

/// The logical tensors that all ranks' pieces together make up, by name. Collective over the group.
std::vector<LogicalTensor> list_logical(const Group& group, std::span<const ParameterPiece> mine);

/// Brings logical tensors together on rank `root`, one at a time in the order of their names, from pieces of
/// all ranks that cover each scalar exactly once; calls visit(name, tensor of the logical shape) on root for
/// each. All pieces are of `dtype`. Root needs memory for one logical tensor and its largest piece.
/// Collective over the group.
void gather_logical(Context& context, const Group& group, std::span<const ParameterPiece> mine, DType dtype,
                    int root, const std::function<void(const std::string& name, const Tensor& whole)>& visit);

}  // namespace normformer
