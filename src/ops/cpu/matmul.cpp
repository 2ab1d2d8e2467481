#include <algorithm>
#include <array>

#include "normformer/core/checked.h"
#include "normformer/tensor/dispatch.h"

#include "ops/cpu/gemm.h"
#include "ops/cpu/onednn.h"
#include "ops/kernels.h"

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
  constexpr int64_t kFewRows = 48;  // which do not pay for what they have packed
  // More would not stay in the second cache; for few rows not long enough to be read from it at once.
  const int64_t most_columns = shape.m < kFewRows ? 2 * kGemmPanel : 768;
  constexpr int64_t kLeastColumns = 128;
  constexpr int64_t kLeastRows = 96;
  constexpr int64_t kMostRows = 4096;  // bounds the sums that wait to be narrowed
  const int64_t row_floor = ceil_div(shape.m, kMostRows);
  const int64_t column_floor = ceil_div(shape.n, most_columns);
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

/// A whole product over the pool's threads, which share gemm_part(): see there. k may be 0.
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

}  // namespace

void linear_forward(Context& context, const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y) {
  const int64_t n = x.dim(0);
  const int64_t k = x.dim(1);
  const int64_t m = w.dim(0);
  const GemmShape shape{.m = n, .n = m, .k = k, .lda = k, .ldb = k, .ldc = m, .transpose_b = true};
  dispatch_floating(x.dtype(), [&]<class T>() {
    const T* added = bias ? bias.data<T>() : nullptr;
    gemm(context.threads(), shape, x.data<T>(), w.data<T>(), added, y.data<T>());
  });
}

void linear_backward_input(Context& context, const Tensor& dy, const Tensor& w, const Tensor& dx) {
  const int64_t n = dy.dim(0);
  const int64_t m = dy.dim(1);
  const int64_t k = w.dim(1);
  const GemmShape shape{.m = n, .n = k, .k = m, .lda = m, .ldb = k, .ldc = k};
  dispatch_floating(dy.dtype(), [&]<class T>() {
    const T* no_bias = nullptr;
    gemm(context.threads(), shape, dy.data<T>(), w.data<T>(), no_bias, dx.data<T>());
  });
}

void linear_backward_weight(Context& context, const Tensor& dy, const Tensor& x, const Tensor& dw) {
  const int64_t n = dy.dim(0);
  const int64_t m = dy.dim(1);
  const int64_t k = x.dim(1);
  const GemmShape shape{
      .m = m, .n = k, .k = n, .lda = m, .ldb = k, .ldc = k, .transpose_a = true, .accumulate = true};
  dispatch_floating(dy.dtype(), [&]<class T>() {
    const Accumulator<T>* no_bias = nullptr;
    gemm(context.threads(), shape, dy.data<T>(), x.data<T>(), no_bias, dw.data<Accumulator<T>>());
  });
}

void add_column_sums(Context& context, const Tensor& x, const Tensor& out) {
  const int64_t rows = x.dim(0);
  const int64_t columns = x.dim(1);
  dispatch_floating(x.dtype(), [&]<class T>() {
    const T* from = x.data<T>();
    auto* sums = out.data<Accumulator<T>>();
    context.threads().parallel_for(columns, kColumnBlock, [&](int64_t begin, int64_t end) {
      add_column_block(rows, end - begin, columns, from + begin, sums + begin);
    });
  });
}

}  // namespace normformer::ops::cpu
