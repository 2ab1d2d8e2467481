#pragma once

#include "normformer/model/environment.h"

namespace normformer {

/// What a head made of the tokens that it reads.
struct HeadResult {
  Tensor nll;                  ///< [read] of accumulator_of(T)
  Placed<Replicated> dhidden;  ///< [N, D], zero at other tokens; undefined without training
  Tensor logits = {};          ///< [sequences, classes] of T, of a classifier
};

/// A matrix of `count` rows: zeros, but for these, by their numbers (i32). Numbers behind the last row are
/// left out.
Tensor put_rows(Context& context, const Tensor& picked, const Tensor& rows, int64_t count);

}  // namespace normformer
