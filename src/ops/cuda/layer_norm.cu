#include <array>

#include "ops/cuda/column_sums.h"
#include "ops/cuda/rows.h"
#include "ops/kernels.h"

namespace normformer::ops::cuda {

namespace {

template <class T, int N>
struct LayerNorm {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  using Elements = Pack<T, N>;

  const T* x;
  const T* gamma;
  const T* beta;
  T* y;
  int64_t width;

  __device__ Elements load(int64_t row, int64_t column) const { return pack_at<N>(x, row * width + column); }

  __device__ void values(const Elements& elements, int64_t, A (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen(elements.values[i]);
  }

  __device__ void finish(const Elements&, A (&values)[N], int64_t row, int64_t column, A mean, A rstd) const {
    normalise_values(gamma, beta, column, mean, rstd, values);
    store_pack<N>(values, y + row * width + column);
  }
};

template <class T, int N>
struct LayerNormBackward {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 2;  // of gamma, beta
  using Columns = Pack<T, N>;            // gamma
  struct Row {
    A mean, rstd, mean_g, mean_gx;
  };
  struct Elements {
    Pack<T, N> dy, x, residual;
  };

  const T* dy;
  const T* x;
  const T* gamma;
  const A* means;
  const A* rstds;
  const T* residual;
  T* dx;
  int64_t width;
  A of_each;              ///< 1 / width
  A* row_sums = nullptr;  ///< mean_g, mean_gx where another kernel sums them up

  __device__ Columns columns(int64_t column) const { return pack_at<N>(gamma, column); }

  __device__ Row row(int64_t row) const {
    if (row_sums == nullptr) return {means[row], rstds[row], A(0), A(0)};
    return {means[row], rstds[row], row_sums[2 * row], row_sums[2 * row + 1]};
  }

  __device__ Elements load(int64_t row, int64_t column) const {
    const int64_t at = row * width + column;
    return {pack_at<N>(dy, at), pack_at<N>(x, at), pack_or<N>(residual, at, 0.0)};
  }

  __device__ void terms(const Columns& gammas, const Elements& elements, const Row& of_row, int64_t, int64_t,
                        A (&sums)[2]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A normed = (widen(elements.x.values[i]) - of_row.mean) * of_row.rstd;
      const A g = widen(gammas.values[i]) * widen(elements.dy.values[i]);
      sums[0] += g;
      sums[1] += g * normed;
    }
  }

  __device__ void put(int64_t row, const A (&sums)[2]) const {
    if (row_sums == nullptr) return;
    row_sums[2 * row] = sums[0] * of_each;
    row_sums[2 * row + 1] = sums[1] * of_each;
  }

  __device__ void take(Row& of_row, const A (&sums)[2]) const {
    of_row.mean_g = sums[0] * of_each;
    of_row.mean_gx = sums[1] * of_each;
  }

  __device__ void finish(const Columns& gammas, const Elements& elements, const Row& of_row, int64_t row,
                         int64_t column, Sums<A, kColumnSums, N>& sums) const {
    A out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A d = widen(elements.dy.values[i]);
      const A normed = (widen(elements.x.values[i]) - of_row.mean) * of_row.rstd;
      const A g = widen(gammas.values[i]) * d;
      sums[0][i] += d * normed;
      sums[1][i] += d;
      out[i] =
          of_row.rstd * (g - of_row.mean_g - normed * of_row.mean_gx) + widen(elements.residual.values[i]);
    }
    store_pack<N>(out, dx + row * width + column);
  }
};

}  // namespace

void layer_norm_forward(Context& context, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                        double eps, const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  const int64_t columns = x.dim(1);
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* in = x.data<T>();
    const T* gammas = gamma.data<T>();
    const T* betas = beta.data<T>();
    T* out = y.data<T>();
    with_packs<T>(can_pack<kPack<T>>(columns, in, gammas, betas, out), [&]<int N>() {
      launch_norm_rows(context, LayerNorm<T, N>{in, gammas, betas, out, columns}, x.dim(0), columns, eps,
                       mean.data<A>(), rstd.data<A>());
    });
  });
}

void layer_norm_backward(Context& context, const Tensor& dy, const Tensor& x, const Tensor& gamma,
                         const Tensor& mean, const Tensor& rstd, const Tensor& residual, const Tensor& dx,
                         const Tensor& dgamma, const Tensor& dbeta, const Tensor& partials) {
  const int64_t columns = x.dim(1);
  dispatch_floating(x.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* d = dy.data<T>();
    const T* in = x.data<T>();
    const T* gammas = gamma.data<T>();
    const T* around = data_or_null<T>(residual);
    T* out = dx.data<T>();
    const bool packs = can_pack<kPack<T>>(columns, d, in, gammas, around, out, partials.data<A>());
    with_packs<T>(packs, [&]<int N>() {
      const LayerNormBackward<T, N> op{d,      in,  gammas,  mean.data<A>(),     rstd.data<A>(),
                                       around, out, columns, of_each<A>(columns)};
      launch_by_rows<N == 8 ? 2 : 3>(context, op, x.dim(0), columns, partials_in<A, 2>(partials, columns));
    });
    add_blocks<A>(context, partials, std::array{ColumnSum{0, dgamma}, ColumnSum{columns, dbeta}});
  });
}

void normalise_backward(Context& context, const Tensor& d, const Tensor& h, const Tensor& mean,
                        const Tensor& rstd, const Tensor& gamma, const Tensor& means, const Tensor& dh,
                        const Tensor& dgamma, const Tensor& dbeta, const Tensor& partials) {
  const int64_t columns = h.dim(1);
  dispatch_floating(h.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* from = d.data<T>();
    const T* in = h.data<T>();
    const T* gammas = gamma.data<T>();
    T* out = dh.data<T>();
    const bool packs = can_pack<kPack<T>>(columns, from, in, gammas, out, partials.data<A>());
    with_packs<T>(packs, [&]<int N>() {
      const LayerNormBackward<T, N> op{from,    in,  gammas,  mean.data<A>(), rstd.data<A>(),
                                       nullptr, out, columns, A(1),           means.data<A>()};
      launch_tiles(context, op, h.dim(0), columns, partials_in<A, 2>(partials, columns));
    });
    add_blocks<A>(context, partials, std::array{ColumnSum{0, dgamma}, ColumnSum{columns, dbeta}});
  });
}

}  // namespace normformer::ops::cuda
