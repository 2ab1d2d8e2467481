#include "ops/cuda/column_sums.h"
#include "ops/cuda/rows.h"
#include "ops/kernels.h"

namespace normformer::ops::cuda {

namespace {

template <class T, int N>
struct HeadScale {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 0;
  using Columns = A;  // the scale of all N
  struct Row {};
  using Elements = Pack<T, N>;

  const T* x;
  Heads<T> heads;
  T* y;
  int64_t width;

  __device__ Columns columns(int64_t column) const { return heads.scale_of(column); }
  __device__ Row row(int64_t) const { return {}; }
  __device__ Elements load(int64_t row, int64_t column) const { return pack_at<N>(x, row * width + column); }

  __device__ void finish(Columns scale, const Elements& elements, Row, int64_t row, int64_t column,
                         Sums<A, 0, N>&) const {
    A out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = scale * widen(elements.values[i]);
    store_pack<N>(out, y + row * width + column);
  }
};

template <class T, int N>
struct HeadScaleBackward {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 1;
  using Columns = A;  // the scale of all N
  struct Row {};
  struct Elements {
    Pack<T, N> dy, x;
  };

  const T* dy;
  const T* x;
  Heads<T> heads;
  T* dx;
  int64_t width;

  __device__ Columns columns(int64_t column) const { return heads.scale_of(column); }
  __device__ Row row(int64_t) const { return {}; }
  __device__ Elements load(int64_t row, int64_t column) const {
    return {pack_at<N>(dy, row * width + column), pack_at<N>(x, row * width + column)};
  }

  __device__ void finish(Columns scale, const Elements& elements, Row, int64_t row, int64_t column,
                         Sums<A, 1, N>& sums) const {
    A out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A d = widen(elements.dy.values[i]);
      sums[0][i] += d * widen(elements.x.values[i]);
      out[i] = scale * d;
    }
    store_pack<N>(out, dx + row * width + column);
  }
};

}  // namespace

void head_scale_forward(Context& context, const Tensor& x, const Tensor& scales, const Tensor& y) {
  const int64_t columns = x.dim(1);
  dispatch_floating(x.dtype(), [&]<class T>() {
    const T* in = x.data<T>();
    T* out = y.data<T>();
    const Heads<T> heads(scales, columns);
    with_packs<T>(can_pack<kPack<T>>(columns, in, out) && heads.hold_packs_of(kPack<T>), [&]<int N>() {
      launch_tiles(context, HeadScale<T, N>{in, heads, out, columns}, x.dim(0), columns);
    });
  });
}

void head_scale_backward(Context& context, const Tensor& dy, const Tensor& x, const Tensor& scales,
                         const Tensor& dx, const Tensor& dscales, const Tensor& partials) {
  const int64_t columns = x.dim(1);
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* d = dy.data<T>();
    const T* in = x.data<T>();
    T* out = dx.data<T>();
    const Heads<T> heads(scales, columns);
    const bool packs =
        can_pack<kPack<T>>(columns, d, in, out, partials.data<A>()) && heads.hold_packs_of(kPack<T>);
    with_packs<T>(packs, [&]<int N>() {
      launch_tiles(context, HeadScaleBackward<T, N>{d, in, heads, out, columns}, x.dim(0), columns,
                   partials_in<A, 1>(partials, columns));
    });
    add_blocks_by_group<A>(context, partials, 0, columns, dscales);
  });
}

}  // namespace normformer::ops::cuda
