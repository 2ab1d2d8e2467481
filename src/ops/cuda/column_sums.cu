#include <array>

#include "ops/cuda/column_sums.h"
#include "ops/cuda/rows.h"
#include "ops/kernels.h"

namespace normformer::ops::cuda {

namespace {

constexpr int kLanes = 8;  // that share the row blocks of a column

template <class A>
struct Targets {
  A* out[kMostColumnSums];
  int64_t first[kMostColumnSums];
};

/// Block (x, y): 32 columns of sum y.
template <class A>
__global__ void __launch_bounds__(kLanes* kWarp)
    add_blocks_kernel(const A* partials, int64_t blocks, int64_t stride, int64_t columns,
                      const __grid_constant__ Targets<A> targets, bool overwrite) {
  __shared__ A sums[kLanes][kWarp];
  const int place = static_cast<int>(threadIdx.x) % kWarp;
  const int lane = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + place;
  A sum = 0;
  if (column < columns) {
    const A* in = partials + targets.first[blockIdx.y] + column;
#pragma unroll 16
    for (int64_t b = lane; b < blocks; b += kLanes) sum += in[b * stride];
  }
  sums[lane][place] = sum;
  __syncthreads();
  if (lane > 0 || column >= columns) return;
  for (int l = 1; l < kLanes; ++l) sum += sums[l][place];
  A* out = targets.out[blockIdx.y] + column;
  *out = (overwrite ? A{0} : *out) + sum;
}

constexpr int kGroupThreads = 256;

/// Block x: group x of `size` columns. Warps share the row blocks, lanes the columns.
template <class A>
__global__ void __launch_bounds__(kGroupThreads)
    add_groups_kernel(const A* partials, int64_t blocks, int64_t stride, int64_t size, A* out) {
  const A* in = partials + blockIdx.x * size;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  A sum = 0;
  for (int64_t b = threadIdx.x / kWarp; b < blocks; b += kGroupThreads / kWarp) {
    for (int64_t c = lane; c < size; c += kWarp) sum += in[b * stride + c];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] += sum;
}

template <class T, int N>
struct ColumnSumOp {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 1;
  using Elements = Pack<T, N>;
  struct Columns {};
  struct Row {};

  const T* x;
  int64_t width;

  __device__ Columns columns(int64_t) const { return {}; }
  __device__ Row row(int64_t) const { return {}; }
  __device__ Elements load(int64_t row, int64_t column) const { return pack_at<N>(x, row * width + column); }
  __device__ void finish(Columns, const Elements& elements, Row, int64_t, int64_t,
                         Sums<A, 1, N>& sums) const {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[0][i] += widen(elements.values[i]);
  }
};

}  // namespace

template <class A>
void add_blocks(Context& context, const Tensor& partials, std::span<const ColumnSum> sums, bool overwrite) {
  NF_CHECK(!sums.empty() && sums.size() <= kMostColumnSums, "{} sums of columns at once", sums.size());
  const int64_t columns = sums[0].out.numel();
  Targets<A> targets{};
  for (size_t s = 0; s < sums.size(); ++s) {
    NF_CHECK(sums[s].out.numel() == columns, "sums over different numbers of columns");
    targets.out[s] = sums[s].out.data<A>();
    targets.first[s] = sums[s].first;
  }
  launch(context,
         {.blocks = ceil_div(columns, int64_t{kWarp}),
          .threads = kLanes * kWarp,
          .blocks_y = static_cast<int64_t>(sums.size())},
         add_blocks_kernel<A>, partials.data<A>(), partials.dim(0), partials.dim(1), columns, targets,
         overwrite);
}

template <class A>
void add_blocks_by_group(Context& context, const Tensor& partials, int64_t first, int64_t columns,
                         const Tensor& out) {
  const int64_t groups = out.numel();
  launch(context, {.blocks = groups, .threads = kGroupThreads}, add_groups_kernel<A>,
         partials.data<A>() + first, partials.dim(0), partials.dim(1), columns / groups, out.data<A>());
}

template void add_blocks<float>(Context&, const Tensor&, std::span<const ColumnSum>, bool);
template void add_blocks<double>(Context&, const Tensor&, std::span<const ColumnSum>, bool);
template void add_blocks_by_group<float>(Context&, const Tensor&, int64_t, int64_t, const Tensor&);
template void add_blocks_by_group<double>(Context&, const Tensor&, int64_t, int64_t, const Tensor&);

void add_column_sums(Context& context, const Tensor& x, const Tensor& out) {
  const int64_t rows = x.dim(0);
  const int64_t columns = x.dim(1);
  if (x.numel() == 0) return;
  const Tensor partials =
      context.empty({RowBlocks(rows).count, columns}, accumulator_of(x.dtype()), MemoryUse::workspace);
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* from = x.data<T>();
    with_packs<T>(can_pack<kPack<T>>(columns, from, partials.data<A>()), [&]<int N>() {
      launch_tiles(context, ColumnSumOp<T, N>{from, columns}, rows, columns,
                   partials_in<A, 1>(partials, columns));
    });
    add_blocks<A>(context, partials, std::array{ColumnSum{0, out}});
  });
}

}  // namespace normformer::ops::cuda
