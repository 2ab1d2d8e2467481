#pragma once

#include <cstdint>

#include "normformer/ops/dropout.h"

namespace normformer::ops::cpu {

/// multipliers[j] = 0 where element first + j of sub-stream `sample` is dropped, else 1 / (1 - probability),
/// for 0 <= j < count: the rule of dropout.h. 0 < probability < 1.
void dropout_multipliers(RandomStream stream, int64_t sample, int64_t first, int64_t count,
                         double probability, float* multipliers);
void dropout_multipliers(RandomStream stream, int64_t sample, int64_t first, int64_t count,
                         double probability, double* multipliers);

/// The multipliers of one row of a local matrix.
template <class A>
void dropout_row(const Dropout& dropout, int64_t row, int64_t columns, A* multipliers) {
  const int64_t whole_row = dropout.first_row + row;
  const int64_t sample = dropout.first_sample + whole_row / dropout.rows_per_sample;
  const int64_t token = dropout.token_of(whole_row % dropout.rows_per_sample);
  dropout_multipliers(dropout.stream, sample, token * dropout.row_elements + dropout.first_column, columns,
                      dropout.probability, multipliers);
}

}  // namespace normformer::ops::cpu
