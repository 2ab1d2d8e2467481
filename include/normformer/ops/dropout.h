#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "normformer/core/philox.h"

namespace normformer::ops {

/// Which elements of a matrix are dropped: a pure function of what each element is, never of which rank holds
/// it.
///
/// A local matrix is rows `first_row` and on of `rows_per_sample` rows of each of the samples from
/// `first_sample` on: with w = first_row + r, its row r is row t = w % rows_per_sample of sample
/// `first_sample
/// + w / rows_per_sample`. That is token `first_token + t`, or from t = `split` on `second_token + t -
/// split`; column c is global column `first_column + c` of `row_elements`. The element's index within its
/// sample is i = token * row_elements + column; its random word is word i % 4 of stream.words(i / 4, sample).
/// It is kept where word >= probability * 2^32, and then multiplied by 1 / (1 - probability).
struct Dropout {
  double probability = 0.0;  ///< in [0, 1); 0 means that nothing is dropped and nothing else here is read
  RandomStream stream;       ///< for this seed, batch index, layer and site
  int64_t first_sample = 0;  ///< position in the global batch of the first sample
  int64_t first_row = 0;     ///< where in the samples' rows the local matrix begins, which may be inside one
  int64_t rows_per_sample = 1;
  int64_t first_token = 0;
  int64_t split = std::numeric_limits<int64_t>::max();
  int64_t second_token = 0;
  int64_t row_elements = 1;
  int64_t first_column = 0;

  bool active() const { return probability > 0.0; }

  /// The token in its sample of row t of those that a sample has here.
  constexpr int64_t token_of(int64_t t) const {
    return t < split ? first_token + t : second_token + (t - split);
  }
};

/// The least random word that keeps an element. Where probability * 2^32 leaves 32 bits the last word is kept
/// all the same.
inline uint32_t keep_threshold(double probability) {
  return static_cast<uint32_t>(std::min(std::ceil(probability * 0x1p32), 0x1p32 - 1));
}

}  // namespace normformer::ops
