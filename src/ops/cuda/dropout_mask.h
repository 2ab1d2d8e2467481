#pragma once

// For .cu files: the mask of normformer/ops/dropout.h.

#include "normformer/ops/dropout.h"

#include "tensor/cuda/kernel.h"

namespace normformer::ops::cuda {

using namespace normformer::cuda;

/// A Dropout as a kernel takes it. A is what multipliers are computed in.
template <class A>
struct DropoutMask {
  explicit DropoutMask(const Dropout& dropout)
      : stream(dropout.stream),
        first_sample(dropout.first_sample),
        first_row(dropout.first_row),
        rows_per_sample(dropout.rows_per_sample),
        first_token(dropout.first_token),
        split(dropout.split),
        second_token(dropout.second_token),
        row_elements(dropout.row_elements),
        first_column(dropout.first_column),
        threshold(dropout.active() ? keep_threshold(dropout.probability) : 0),
        kept(dropout.active() ? static_cast<A>(1.0 / (1.0 - dropout.probability)) : A{1}),
        active(dropout.active()) {}

  RandomStream stream;
  int64_t first_sample;
  int64_t first_row;
  int64_t rows_per_sample;
  int64_t first_token;
  int64_t split;
  int64_t second_token;
  int64_t row_elements;
  int64_t first_column;
  uint32_t threshold;
  A kept;
  bool active;

  /// Dropout::token_of.
  __device__ int64_t token_of(int64_t t) const {
    return t < split ? first_token + t : second_token + (t - split);
  }

  /// What elements `column` ... `column + N - 1` of a local row are multiplied by. One call of the generator
  /// gives up to four neighbours.
  template <int N>
  __device__ void multipliers(int64_t row, int64_t column, A (&to)[N]) const {
    if (!active) {
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = A{1};
      return;
    }
    const int64_t whole_row = first_row + row;
    const int64_t token = token_of(whole_row % rows_per_sample);
    const auto sample = static_cast<uint64_t>(first_sample + whole_row / rows_per_sample);
    const auto first = static_cast<uint64_t>(token * row_elements + first_column + column);
    multipliers_of<N>(sample, first, to);
  }

  /// The same for elements first ... first + N - 1 of a sample.
  template <int N>
  __device__ void multipliers_of(uint64_t sample, uint64_t first, A (&to)[N]) const {
    uint64_t block = first / 4;
    auto words = stream.words(block, sample);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint64_t index = first + static_cast<uint64_t>(i);
      if (index / 4 != block) {
        block = index / 4;
        words = stream.words(block, sample);
      }
      to[i] = word_at(words, static_cast<int>(index % 4)) >= threshold ? kept : A{0};
    }
  }

 private:
  // Not indexed: an index that the compiler does not know would move the words out of registers.
  static __device__ uint32_t word_at(const std::array<uint32_t, 4>& words, int i) {
    const uint32_t low = i % 2 == 0 ? words[0] : words[1];
    const uint32_t high = i % 2 == 0 ? words[2] : words[3];
    return i < 2 ? low : high;
  }
};

}  // namespace normformer::ops::cuda
