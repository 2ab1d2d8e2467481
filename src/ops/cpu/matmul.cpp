#include "ops/cpu/matmul.h"

#include <algorithm>
#include <array>

#include "normformer/core/checked.h"

#include "ops/cpu/onednn.h"

namespace normformer::ops::cpu {

namespace {

constexpr int64_t kColumnBlock = 512;
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

// How a product is cut into parts that threads share.
struct Cut {
  int64_t row_parts = 1;
  int64_t column_parts = 1;
};

// An estimate of the time that a cut takes, in multiply-adds: each part packs its columns of b (and its rows
// of a where they are transposed), and the last parts leave threads without work.
double estimated_time(const GemmShape& shape, int threads, const Cut& cut) {
  constexpr double kPackB = 20;
  constexpr double kPackA = 20;
  constexpr double kReadA = 3;
  constexpr double kTail = 0.25;
  const auto rows = static_cast<double>(ceil_div(shape.m, cut.row_parts));
  const auto columns = static_cast<double>(ceil_div(shape.n, cut.column_parts));
  const double part = rows * columns + kPackB * columns + (shape.transpose_a ? kPackA : kReadA) * rows;
  const int64_t rounds = ceil_div(cut.row_parts * cut.column_parts, threads);
  return (static_cast<double>(rounds) + kTail) * part;
}

Cut best_cut(const GemmShape& shape, int threads) {
  constexpr int64_t kMostColumns = 768;  // more would not stay in the second cache
  constexpr int64_t kLeastColumns = 128;
  constexpr int64_t kLeastRows = 96;
  constexpr int64_t kMostRows = 4096;  // bounds the sums that wait to be narrowed
  const int64_t row_floor = ceil_div(shape.m, kMostRows);
  const int64_t column_floor = ceil_div(shape.n, kMostColumns);
  Cut best{row_floor, column_floor};
  if (threads == 1) return best;
  const int64_t row_most = std::max(row_floor, std::min<int64_t>(shape.m / kLeastRows, 8 * threads));
  const int64_t column_most = std::max(column_floor, std::min<int64_t>(shape.n / kLeastColumns, 8 * threads));
  for (int64_t r = row_floor; r <= row_most; ++r) {
    for (int64_t c = column_floor; c <= column_most; ++c) {
      const Cut cut{r, c};
      if (estimated_time(shape, threads, cut) < estimated_time(shape, threads, best)) best = cut;
    }
  }
  return best;
}

// Columns of part `index`, in whole panels.
Range column_part(int64_t columns, int64_t parts, int64_t index) {
  const Range panels = even_part(ceil_div(columns, kGemmPanel), parts, index);
  return {panels.begin * kGemmPanel, std::min(columns, panels.end * kGemmPanel)};
}

// Fills c where there is nothing to multiply.
template <class Out>
void fill_with_bias(const GemmShape& s, const Out* bias, Out* c) {
  NF_CHECK(!s.accumulate || bias == nullptr, "a bias added to no product");
  if (s.accumulate) return;
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) c[i * s.ldc + j] = bias == nullptr ? Out{} : bias[j];
  }
}

// The same over oneDNN, cut by the shape alone since its bits depend on that of a part.
template <class Out>
void library_gemm(ThreadPool& threads, const GemmShape& shape, const bf16* a, const bf16* b, const Out* bias,
                  Out* c) {
  constexpr int64_t kTileRows = 512;
  constexpr int64_t kTileColumns = 1024;
  const int64_t row_tiles = ceil_div(shape.m, kTileRows);
  const int64_t column_tiles = ceil_div(shape.n, kTileColumns);
  threads.parallel_for(row_tiles * column_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const Range rows = even_part(shape.m, row_tiles, tile % row_tiles);
      const Range columns = even_part(shape.n, column_tiles, tile / row_tiles);
      GemmShape part = shape;
      part.m = rows.size();
      part.n = columns.size();
      onednn::bf16_gemm(part, a + rows.begin * (shape.transpose_a ? 1 : shape.lda),
                        b + columns.begin * (shape.transpose_b ? shape.ldb : 1),
                        bias == nullptr ? nullptr : bias + columns.begin,
                        c + rows.begin * shape.ldc + columns.begin);
    }
  });
}

}  // namespace

template <class In, class Out>
void gemm(ThreadPool& threads, const GemmShape& shape, const In* a, const In* b, const Out* bias, Out* c) {
  if (shape.m == 0 || shape.n == 0) return;
  if (shape.k == 0) return fill_with_bias(shape, bias, c);
  if constexpr (std::is_same_v<In, bf16>) {
    if (onednn::is_better_for_bf16()) return library_gemm(threads, shape, a, b, bias, c);
  }
  const Cut cut = best_cut(shape, threads.size());
  threads.parallel_for(cut.row_parts * cut.column_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Range columns = column_part(shape.n, cut.column_parts, part / cut.row_parts);
      if (columns.empty()) continue;
      gemm_part(shape, even_part(shape.m, cut.row_parts, part % cut.row_parts), columns, a, b, bias, c);
    }
  });
}

template <class T>
void add_column_sums(ThreadPool& threads, int64_t rows, int64_t columns, const T* x, Accumulator<T>* out) {
  threads.parallel_for(columns, kColumnBlock, [&](int64_t begin, int64_t end) {
    add_column_block(rows, end - begin, columns, x + begin, out + begin);
  });
}

template void gemm(ThreadPool&, const GemmShape&, const double*, const double*, const double*, double*);
template void gemm(ThreadPool&, const GemmShape&, const float*, const float*, const float*, float*);
template void gemm(ThreadPool&, const GemmShape&, const bf16*, const bf16*, const bf16*, bf16*);
template void gemm(ThreadPool&, const GemmShape&, const bf16*, const bf16*, const float*, float*);

template void add_column_sums(ThreadPool&, int64_t, int64_t, const double*, double*);
template void add_column_sums(ThreadPool&, int64_t, int64_t, const float*, float*);
template void add_column_sums(ThreadPool&, int64_t, int64_t, const bf16*, float*);

}  // namespace normformer::ops::cpu
