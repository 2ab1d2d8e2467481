#pragma once

#include <cstdint>
#include <vector>

#include "normformer/checkpoints/checkpoint.h"
#include "normformer/tensor/context.h"

namespace normformer {

/// A layout of the toy model: tensor-parallel ranks hold rectangles, and data-parallel ranks a run of each.
struct ToyLayout {
  int64_t tensor = 1;
  int64_t data = 1;
  int64_t ranks() const { return tensor * data; }
};

/// One rank's pieces of a few small tensors of odd sizes, split by rows, by columns or not at all, in several
/// roles and types. Where `filled`, each element's value tells tensor, role, place and `version`; else it is
/// -1.
std::vector<TensorPiece> toy_pieces(Context& context, ToyLayout layout, int64_t rank, int version,
                                    bool filled);

/// How many elements of these pieces do not have the values of `version`.
int64_t count_wrong(const std::vector<TensorPiece>& pieces, int version);

/// What belongs to version `version`, which has been updated as many times.
CheckpointInfo toy_info(int version);

}  // namespace normformer
