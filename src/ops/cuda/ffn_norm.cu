#include <array>

#include "normformer/ops/ffn_norm.h"

#include "ops/cuda/column_sums.h"
#include "ops/cuda/rows.h"
#include "ops/kernels.h"

namespace normformer::ops::cuda {

namespace {

constexpr int kThreads = 256;

/// A thread a row.
LaunchShape by_row(int64_t rows) {
  return {.blocks = ceil_div(rows, int64_t{kThreads}), .threads = kThreads};
}

template <class A>
__global__ void statistics_kernel(const A* sums, int64_t rows, int64_t features, double eps, A* means,
                                  A* rstds) {
  const int64_t r = global_thread();
  if (r >= rows) return;
  // In fp64: the difference of the mean square and the squared mean may cancel.
  const double mean = static_cast<double>(sums[2 * r]) / static_cast<double>(features);
  const double square = static_cast<double>(sums[2 * r + 1]) / static_cast<double>(features);
  const double difference = square - mean * mean;
  const double variance = difference < 0.0 ? 0.0 : difference;
  means[r] = static_cast<A>(mean);
  rstds[r] = static_cast<A>(1.0 / std::sqrt(variance + eps));
}

template <class A>
__global__ void split_kernel(const A* sums, int64_t rows, A features, A* means_g, A* means_gx) {
  const int64_t r = global_thread();
  if (r >= rows) return;
  means_g[r] = sums[2 * r] / features;
  means_gx[r] = sums[2 * r + 1] / features;
}

/// c[row] and w_beta[row] as sums over W2's row.
template <class T, int N>
struct FoldWeights {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  struct Columns {
    Pack<T, N> gamma, beta;
  };
  struct Row {};
  using Elements = Pack<T, N>;

  const T* w2;
  const T* gamma;
  const T* beta;
  A* c;
  A* w_beta;
  int64_t width;

  __device__ Columns columns(int64_t column) const {
    return {pack_at<N>(gamma, column), pack_at<N>(beta, column)};
  }
  __device__ Row row(int64_t) const { return {}; }
  __device__ Elements load(int64_t row, int64_t column) const { return pack_at<N>(w2, row * width + column); }

  __device__ void terms(const Columns& of_columns, const Elements& weights, Row, int64_t, int64_t,
                        A (&sums)[2]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[0] += widen(weights.values[i]) * widen(of_columns.gamma.values[i]);
      sums[1] += widen(weights.values[i]) * widen(of_columns.beta.values[i]);
    }
  }

  __device__ void put(int64_t row, const A (&sums)[2]) const {
    c[row] = sums[0];
    w_beta[row] = sums[1];
  }
};

/// What the folded form reads of residual channels: c, and e = w_beta + b2.
template <class T, int N>
struct FoldColumns {
  Accumulator<T> c[N];
  Accumulator<T> e[N];
};

template <class T>
struct FoldVectors {
  const Accumulator<T>* c;
  const Accumulator<T>* w_beta;
  const T* b2;

  template <int N>
  __device__ FoldColumns<T, N> at(int64_t column) const {
    FoldColumns<T, N> made;
    load_pack<N>(c + column, made.c);
    load_pack<N>(w_beta + column, made.e);
    const auto biases = pack_at<N>(b2, column);
#pragma unroll
    for (int i = 0; i < N; ++i) made.e[i] += widen(biases.values[i]);
    return made;
  }
};

template <class T, int N>
struct Unfold {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 0;
  using Columns = FoldColumns<T, N>;
  struct Row {
    A mean, rstd;
  };
  using Elements = Pack<T, N>;

  const T* z;
  const A* means;
  const A* rstds;
  FoldVectors<T> vectors;
  T* y;
  int64_t width;

  __device__ Columns columns(int64_t column) const { return vectors.template at<N>(column); }
  __device__ Row row(int64_t row) const { return {means[row], rstds[row]}; }
  __device__ Elements load(int64_t row, int64_t column) const { return pack_at<N>(z, row * width + column); }

  __device__ void finish(const Columns& of_columns, const Elements& elements, const Row& of_row, int64_t row,
                         int64_t column, Sums<A, 0, N>&) const {
    const A shift = of_row.rstd * of_row.mean;
    A out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = of_row.rstd * widen(elements.values[i]) + (of_columns.e[i] - shift * of_columns.c[i]);
    }
    store_pack<N>(out, y + row * width + column);
  }
};

/// `WithMeans` false leaves y, and means of rows, alone.
template <class T, int N, bool WithMeans = true>
struct FoldBackward {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 2;  // u, s
  using Columns = FoldColumns<T, N>;
  struct Row {
    A mean, rstd;
  };
  struct Elements {
    Pack<T, N> dy, y;
  };

  const T* dy;
  const T* y;
  const A* means;
  const A* rstds;
  FoldVectors<T> vectors;
  A of_each;  ///< 1 / features
  A* means_g;
  A* means_gx;
  T* dy_scaled;
  int64_t width;

  __device__ Columns columns(int64_t column) const { return vectors.template at<N>(column); }
  __device__ Row row(int64_t row) const { return {means[row], rstds[row]}; }
  __device__ Elements load(int64_t row, int64_t column) const {
    if constexpr (WithMeans)
      return {pack_at<N>(dy, row * width + column), pack_at<N>(y, row * width + column)};
    else
      return {pack_at<N>(dy, row * width + column), {}};
  }

  __device__ void terms(const Columns& of_columns, const Elements& elements, const Row&, int64_t, int64_t,
                        A (&sums)[2]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A d = widen(elements.dy.values[i]);
      sums[0] += d * of_columns.c[i];
      sums[1] += d * (widen(elements.y.values[i]) - of_columns.e[i]);
    }
  }

  __device__ void put(int64_t row, const A (&sums)[2]) const {
    means_g[row] = sums[0] * of_each;
    means_gx[row] = sums[1] * of_each;
  }

  __device__ void take(Row&, const A (&)[2]) const {}

  __device__ void finish(const Columns&, const Elements& elements, const Row& of_row, int64_t row,
                         int64_t column, Sums<A, kColumnSums, N>& sums) const {
    const A shift = of_row.rstd * of_row.mean;
    A out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A d = widen(elements.dy.values[i]);
      sums[0][i] += shift * d;
      sums[1][i] += d;
      out[i] = of_row.rstd * d;
    }
    store_pack<N>(out, dy_scaled + row * width + column);
  }
};

template <class T, int N>
struct FoldCorrection {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 0;
  struct Columns {
    Pack<T, N> gamma, beta;
  };
  struct Row {
    A u, s;
  };
  struct Elements {
    A dw[N];
  };

  const A* u;
  const T* gamma;
  const A* s;
  const T* beta;
  A* dw;
  int64_t width;

  __device__ Columns columns(int64_t column) const {
    return {pack_at<N>(gamma, column), pack_at<N>(beta, column)};
  }
  __device__ Row row(int64_t row) const { return {u[row], s[row]}; }
  __device__ Elements load(int64_t row, int64_t column) const {
    Elements made;
    load_pack<N>(dw + row * width + column, made.dw);
    return made;
  }

  __device__ void finish(const Columns& of_columns, const Elements& elements, const Row& of_row, int64_t row,
                         int64_t column, Sums<A, 0, N>&) const {
    A out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = elements.dw[i] - of_row.u * widen(of_columns.gamma.values[i]) +
               of_row.s * widen(of_columns.beta.values[i]);
    }
    store_pack<N>(out, dw + row * width + column);
  }
};

template <class T, int N>
struct Normalise {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  static constexpr int kColumnSums = 0;
  struct Columns {
    Pack<T, N> gamma, beta;
  };
  struct Row {
    A mean, rstd;
  };
  using Elements = Pack<T, N>;

  const T* h;
  const A* means;
  const A* rstds;
  const T* gamma;
  const T* beta;
  T* out;
  int64_t width;

  __device__ Columns columns(int64_t column) const {
    return {pack_at<N>(gamma, column), pack_at<N>(beta, column)};
  }
  __device__ Row row(int64_t row) const { return {means[row], rstds[row]}; }
  __device__ Elements load(int64_t row, int64_t column) const { return pack_at<N>(h, row * width + column); }

  __device__ void finish(const Columns& of_columns, const Elements& elements, const Row& of_row, int64_t row,
                         int64_t column, Sums<A, 0, N>&) const {
    A normed[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      normed[i] =
          widen(of_columns.gamma.values[i]) * (of_row.rstd * (widen(elements.values[i]) - of_row.mean)) +
          widen(of_columns.beta.values[i]);
    }
    store_pack<N>(normed, out + row * width + column);
  }
};

template <class T, int N>
struct NormaliseBackwardSums {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  using Columns = Pack<T, N>;  // gamma
  struct Row {
    A mean, rstd;
  };
  struct Elements {
    Pack<T, N> d, h;
  };

  const T* d;
  const T* h;
  const A* means;
  const A* rstds;
  const T* gamma;
  A* sums;
  int64_t width;

  __device__ Columns columns(int64_t column) const { return pack_at<N>(gamma, column); }
  __device__ Row row(int64_t row) const { return {means[row], rstds[row]}; }
  __device__ Elements load(int64_t row, int64_t column) const {
    return {pack_at<N>(d, row * width + column), pack_at<N>(h, row * width + column)};
  }

  __device__ void terms(const Columns& gammas, const Elements& elements, const Row& of_row, int64_t, int64_t,
                        A (&to)[2]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A g = widen(gammas.values[i]) * widen(elements.d.values[i]);
      to[0] += g;
      to[1] += g * (of_row.rstd * (widen(elements.h.values[i]) - of_row.mean));
    }
  }

  __device__ void put(int64_t row, const A (&from)[2]) const {
    sums[2 * row] = from[0];
    sums[2 * row + 1] = from[1];
  }
};

template <class T, int N>
struct FeatureSums {
  using A = Accumulator<T>;
  static constexpr int kN = N;
  struct Columns {};
  struct Row {};
  using Elements = Pack<T, N>;

  const T* h;
  A* sums;
  int64_t width;

  __device__ Columns columns(int64_t) const { return {}; }
  __device__ Row row(int64_t) const { return {}; }
  __device__ Elements load(int64_t row, int64_t column) const { return pack_at<N>(h, row * width + column); }

  __device__ void terms(const Columns&, const Elements& elements, const Row&, int64_t, int64_t,
                        A (&to)[2]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A value = widen(elements.values[i]);
      to[0] += value;
      to[1] += value * value;
    }
  }

  __device__ void put(int64_t row, const A (&from)[2]) const {
    sums[2 * row] = from[0];
    sums[2 * row + 1] = from[1];
  }
};

}  // namespace

void norm_statistics(Context& context, const Tensor& sums, int64_t features, double eps, const Tensor& mean,
                     const Tensor& rstd) {
  const int64_t rows = sums.dim(0);
  dispatch_floating(sums.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    launch(context, by_row(rows), statistics_kernel<A>, sums.data<A>(), rows, features, eps, mean.data<A>(),
           rstd.data<A>());
  });
}

void fold_norm_weights(Context& context, const Tensor& w2, const Tensor& gamma, const Tensor& beta,
                       const Tensor& c, const Tensor& w_beta) {
  const int64_t columns = w2.dim(1);
  dispatch_floating(w2.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* weights = w2.data<T>();
    const T* gammas = gamma.data<T>();
    const T* betas = beta.data<T>();
    with_packs<T>(can_pack<kPack<T>>(columns, weights, gammas, betas), [&]<int N>() {
      const FoldWeights<T, N> op{weights, gammas, betas, c.data<A>(), w_beta.data<A>(), columns};
      launch_row_sums(context, op, w2.dim(0), columns);
    });
  });
}

void unfold_norm(Context& context, const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& c,
                 const Tensor& w_beta, const Tensor& b2, const Tensor& y) {
  const int64_t columns = z.dim(1);
  dispatch_floating(z.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* in = z.data<T>();
    T* out = y.data<T>();
    const FoldVectors<T> v{c.data<A>(), w_beta.data<A>(), b2.data<T>()};
    with_packs<T>(can_pack<kPack<T>>(columns, in, v.c, v.w_beta, v.b2, out), [&]<int N>() {
      const Unfold<T, N> op{in, mean.data<A>(), rstd.data<A>(), v, out, columns};
      launch_tiles(context, op, z.dim(0), columns);
    });
  });
}

void fold_norm_backward(Context& context, const Tensor& dy, const Tensor& y, const Tensor& mean,
                        const Tensor& rstd, const Tensor& c, const Tensor& w_beta, const Tensor& b2,
                        int64_t features, const Tensor& mean_g, const Tensor& mean_gx,
                        const Tensor& dy_scaled, const Tensor& u, const Tensor& s, const Tensor& partials) {
  const int64_t columns = dy.dim(1);
  dispatch_floating(dy.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* from = dy.data<T>();
    const T* kept = data_or_null<T>(y);
    T* out = data_or_null<T>(dy_scaled);
    A* column_sums = data_or_null<A>(partials);
    const FoldVectors<T> v{c.data<A>(), w_beta.data<A>(), b2.data<T>()};
    const bool packs = can_pack<kPack<T>>(columns, from, kept, v.c, v.w_beta, v.b2, out, column_sums);
    with_packs<T>(packs, [&]<int N>() {
      const auto made = [&]<bool WithMeans>() {
        return FoldBackward<T, N, WithMeans>{from,
                                             kept,
                                             mean.data<A>(),
                                             rstd.data<A>(),
                                             v,
                                             of_each<A>(features),
                                             data_or_null<A>(mean_g),
                                             data_or_null<A>(mean_gx),
                                             out,
                                             columns};
      };
      if (out == nullptr)
        return launch_row_sums(context, made.template operator()<true>(), dy.dim(0), columns);
      const auto to = partials_in<A, 2>(partials, columns);
      if (kept == nullptr)
        launch_tiles(context, made.template operator()<false>(), dy.dim(0), columns, to);
      else
        launch_by_rows<2>(context, made.template operator()<true>(), dy.dim(0), columns, to);
    });
    if (out == nullptr) return;
    add_blocks<A>(context, partials, std::array{ColumnSum{0, u}, ColumnSum{columns, s}}, true);
  });
}

void add_fold_correction(Context& context, const Tensor& u, const Tensor& gamma, const Tensor& s,
                         const Tensor& beta, const Tensor& dw) {
  const int64_t columns = dw.dim(1);
  dispatch_floating(gamma.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* gammas = gamma.data<T>();
    const T* betas = beta.data<T>();
    A* to = dw.data<A>();
    with_packs<T>(can_pack<kPack<T>>(columns, gammas, betas, to), [&]<int N>() {
      const FoldCorrection<T, N> op{u.data<A>(), gammas, s.data<A>(), betas, to, columns};
      launch_tiles(context, op, dw.dim(0), columns);
    });
  });
}

void normalise(Context& context, const Tensor& h, const Tensor& mean, const Tensor& rstd, const Tensor& gamma,
               const Tensor& beta, const Tensor& out) {
  const int64_t columns = h.dim(1);
  dispatch_floating(h.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* in = h.data<T>();
    const T* gammas = gamma.data<T>();
    const T* betas = beta.data<T>();
    T* to = out.data<T>();
    with_packs<T>(can_pack<kPack<T>>(columns, in, gammas, betas, to), [&]<int N>() {
      const Normalise<T, N> op{in, mean.data<A>(), rstd.data<A>(), gammas, betas, to, columns};
      launch_tiles(context, op, h.dim(0), columns);
    });
  });
}

void normalise_backward_sums(Context& context, const Tensor& d, const Tensor& h, const Tensor& mean,
                             const Tensor& rstd, const Tensor& gamma, const Tensor& sums) {
  const int64_t columns = d.dim(1);
  dispatch_floating(d.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* from = d.data<T>();
    const T* in = h.data<T>();
    const T* gammas = gamma.data<T>();
    with_packs<T>(can_pack<kPack<T>>(columns, from, in, gammas), [&]<int N>() {
      const NormaliseBackwardSums<T, N> op{from,           in,     mean.data<A>(), rstd.data<A>(), gammas,
                                           sums.data<A>(), columns};
      launch_row_sums(context, op, d.dim(0), columns);
    });
  });
}

void feature_sums(Context& context, const Tensor& h, const Tensor& sums) {
  const int64_t columns = h.dim(1);
  dispatch_floating(h.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const T* in = h.data<T>();
    with_packs<T>(can_pack<kPack<T>>(columns, in), [&]<int N>() {
      launch_row_sums(context, FeatureSums<T, N>{in, sums.data<A>(), columns}, h.dim(0), columns);
    });
  });
}

void split_means(Context& context, const Tensor& sums, int64_t features, const Tensor& mean_g,
                 const Tensor& mean_gx) {
  const int64_t rows = sums.dim(0);
  dispatch_floating(sums.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    launch(context, by_row(rows), split_kernel<A>, sums.data<A>(), rows, static_cast<A>(features),
           mean_g.data<A>(), mean_gx.data<A>());
  });
}

}  // namespace normformer::ops::cuda
