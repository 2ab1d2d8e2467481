#pragma once

#include <utility>

#include "normformer/tensor/tensor.h"

namespace normformer {

/// Every rank of the tensor-parallel group holds the same whole value. As a gradient: the whole gradient.
struct Replicated {};

/// The value is the sum of what the ranks hold. Only a reduction makes anything else of it.
struct Partial {};

/// Each rank holds its own features (columns) of every token.
struct FeatureSharded {};

/// Each rank holds its own tokens (rows), all features of them (Korthikanti et al. 2022, section 4.2.2).
struct SequenceSharded {};

/// A tensor together with what its tensor-parallel group holds of it, as a type: an operation that is wrong
/// for a placement does not compile. The rules are those of a linear algebra over placements
/// (docs/placements.md).
template <class Placement>
class Placed {
 public:
  Placed() = default;
  explicit Placed(Tensor tensor) : tensor_(std::move(tensor)) {}
  const Tensor& tensor() const { return tensor_; }
  bool defined() const { return tensor_.defined(); }

 private:
  Tensor tensor_;
};

}  // namespace normformer
