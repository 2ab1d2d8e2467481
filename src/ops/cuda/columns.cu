#include <algorithm>

#include "normformer/core/checked.h"
#include "normformer/tensor/dispatch.h"

#include "ops/kernels.h"
#include "tensor/cuda/kernel.h"
#include "tensor/cuda/launch.h"

namespace normformer::ops::cuda {

using namespace normformer::cuda;

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 132 * 16;  // as in tensor/cuda/elementwise.cu

template <class T>
struct Columns {
  T* first;
  int64_t stride;
};

template <int N, class From, class To>
__global__ void copy_columns_kernel(Columns<const From> from, Columns<To> to, int64_t packs_of_row,
                                    int64_t packs) {
  for (int64_t p = global_thread(); p < packs; p += global_threads()) {
    const int64_t row = p / packs_of_row;
    const int64_t column = p % packs_of_row * N;
    Accumulator<From> in[N];
    load_pack<N>(from.first + row * from.stride + column, in);
    Accumulator<To> out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = static_cast<Accumulator<To>>(in[i]);
    store_pack<N>(out, to.first + row * to.stride + column);
  }
}

template <class From, class To>
void copy_from(Context& context, Columns<const From> from, Columns<To> to, int64_t rows, int64_t columns) {
  constexpr int kWide = std::min(kPack<From>, kPack<To>);
  const bool packs =
      from.stride % kWide == 0 && to.stride % kWide == 0 && can_pack<kWide>(columns, from.first, to.first);
  const int64_t of_row = packs ? columns / kWide : columns;
  const LaunchShape shape{.blocks = std::min(ceil_div(rows * of_row, int64_t{kThreads}), kMostBlocks),
                          .threads = kThreads};
  launch(context, shape, packs ? copy_columns_kernel<kWide, From, To> : copy_columns_kernel<1, From, To>,
         from, to, of_row, rows * of_row);
}

}  // namespace

void copy_columns(Context& context, const Tensor& from, int64_t from_column, const Tensor& to,
                  int64_t to_column, int64_t columns) {
  dispatch_floating(to.dtype(), [&]<class T>() {
    const Columns<T> target{to.data<T>() + to_column, to.dim(1)};
    const auto copy_rows = [&]<class From>(const From* source) {
      copy_from<From, T>(context, {source + from_column, from.dim(1)}, target, to.dim(0), columns);
    };
    if (from.dtype() == to.dtype())
      copy_rows(static_cast<const T*>(from.data<T>()));
    else
      copy_rows(static_cast<const Accumulator<T>*>(from.data<Accumulator<T>>()));
  });
}

}  // namespace normformer::ops::cuda
