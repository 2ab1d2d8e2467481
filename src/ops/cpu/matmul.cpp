#include "ops/cpu/matmul.h"

#include <algorithm>
#include <array>

#include "normformer/core/checked.h"

namespace normformer::ops::cpu {

namespace {

// A tile large enough that packing its operands costs little, small enough to stay in the second cache.
constexpr int64_t kTileRows = 512;
constexpr int64_t kTileColumns = 512;

constexpr int64_t kColumnBlock = 128;
constexpr int64_t kRowBlock = 64;

template <class T>
void add_column_block(int64_t rows, int64_t columns, int64_t ld, const T* x, Accumulator<T>* out) {
  using A = Accumulator<T>;
  std::array<A, kColumnBlock> total{};
  for (int64_t start = 0; start < rows; start += kRowBlock) {
    std::array<A, kColumnBlock> sums{};
    for (int64_t i = start; i < std::min(rows, start + kRowBlock); ++i) {
      const T* row = x + i * ld;
      for (int64_t j = 0; j < columns; ++j) sums[static_cast<size_t>(j)] += static_cast<A>(row[j]);
    }
    for (size_t j = 0; j < sums.size(); ++j) total[j] += sums[j];
  }
  for (int64_t j = 0; j < columns; ++j) out[j] += total[static_cast<size_t>(j)];
}

}  // namespace

template <class In, class Out>
void tiled_gemm(ThreadPool& threads, const GemmShape& shape, const In* a, const In* b, const Out* bias,
                Out* c) {
  if (shape.m == 0 || shape.n == 0) return;
  const int64_t row_tiles = ceil_div(shape.m, kTileRows);
  const int64_t column_tiles = ceil_div(shape.n, kTileColumns);
  threads.parallel_for(row_tiles * column_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const Range rows = even_part(shape.m, row_tiles, tile % row_tiles);
      const Range columns = even_part(shape.n, column_tiles, tile / row_tiles);
      GemmShape part = shape;
      part.m = rows.size();
      part.n = columns.size();
      gemm(part, a + rows.begin * (shape.transpose_a ? 1 : shape.lda),
           b + columns.begin * (shape.transpose_b ? shape.ldb : 1),
           bias == nullptr ? nullptr : bias + columns.begin, c + rows.begin * shape.ldc + columns.begin);
    }
  });
}

template <class T>
void add_column_sums(ThreadPool& threads, int64_t rows, int64_t columns, const T* x, Accumulator<T>* out) {
  threads.parallel_for(columns, kColumnBlock, [&](int64_t begin, int64_t end) {
    add_column_block(rows, end - begin, columns, x + begin, out + begin);
  });
}

template void tiled_gemm(ThreadPool&, const GemmShape&, const double*, const double*, const double*, double*);
template void tiled_gemm(ThreadPool&, const GemmShape&, const float*, const float*, const float*, float*);
template void tiled_gemm(ThreadPool&, const GemmShape&, const bf16*, const bf16*, const bf16*, bf16*);
template void tiled_gemm(ThreadPool&, const GemmShape&, const bf16*, const bf16*, const float*, float*);

template void add_column_sums(ThreadPool&, int64_t, int64_t, const double*, double*);
template void add_column_sums(ThreadPool&, int64_t, int64_t, const float*, float*);
template void add_column_sums(ThreadPool&, int64_t, int64_t, const bf16*, float*);

}  // namespace normformer::ops::cpu
