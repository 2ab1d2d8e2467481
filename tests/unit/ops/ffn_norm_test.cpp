#include "normformer/ops/ffn_norm.h"

#include "normformer/ops/columns.h"
#include "normformer/ops/layer_norm.h"

#include "support.h"

namespace normformer::ops {
namespace {

constexpr double kEps = 1e-5;

/// out[N, M] += x[N, K] w[M, K]^T, by hand.
void add_product(const Reals& x, const Reals& w, int64_t n, int64_t k, int64_t m, Reals& out) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t l = 0; l < k; ++l) {
        out[static_cast<size_t>(i * m + j)] +=
            x[static_cast<size_t>(i * k + l)] * w[static_cast<size_t>(j * k + l)];
      }
    }
  }
}

Reals transposed(const Reals& x, int64_t rows, int64_t columns) {
  Reals t(x.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c)
      t[static_cast<size_t>(c * rows + r)] = x[static_cast<size_t>(r * columns + c)];
  }
  return t;
}

/// Columns [part.begin, part.end) of a matrix with `columns` columns.
Reals columns_of(const Reals& x, int64_t columns, Range part) {
  Reals out;
  for (size_t i = 0; i < x.size(); ++i) {
    if (part.contains(static_cast<int64_t>(i) % columns)) out.push_back(x[i]);
  }
  return out;
}

/// A whole FFN LayerNorm and fc2, and a cut of its features into shards.
struct Problem {
  int64_t tokens, features, width;
  std::vector<Range> shards;
  Reals h, gamma, beta, w2, b2, dy;

  Problem(int64_t n, int64_t f, int64_t d, std::vector<Range> cut)
      : tokens(n),
        features(f),
        width(d),
        shards(std::move(cut)),
        h(draw(1, n * f, 1.0, 0.6)),
        gamma(draw(2, f, 0.3, 1.0)),
        beta(draw(3, f, 0.5, 0.0)),
        w2(draw(4, d * f, 0.2, 0.0)),
        b2(draw(5, d, 0.5, 0.0)),
        dy(draw(6, n * d, 1.0, 0.0)) {}

  static Reals draw(unsigned seed, int64_t n, double scale, double shift) {
    const std::vector<double> values = normals(seed, n, scale, shift);
    return Reals(values.begin(), values.end());
  }
};

/// fc2(LN(h)), plainly.
Reals plain_forward(const Problem& p) {
  Reals normed;
  for (int64_t n = 0; n < p.tokens; ++n) {
    const Real* row = p.h.data() + n * p.features;
    Real mean = 0;
    Real variance = 0;
    for (int64_t f = 0; f < p.features; ++f) mean += row[f] / static_cast<Real>(p.features);
    for (int64_t f = 0; f < p.features; ++f)
      variance += (row[f] - mean) * (row[f] - mean) / static_cast<Real>(p.features);
    for (int64_t f = 0; f < p.features; ++f) {
      const auto i = static_cast<size_t>(f);
      normed.push_back(p.gamma[i] * (row[f] - mean) / std::sqrt(variance + Real(kEps)) + p.beta[i]);
    }
  }
  Reals y;
  for (int64_t n = 0; n < p.tokens; ++n) y.insert(y.end(), p.b2.begin(), p.b2.end());
  add_product(normed, p.w2, p.tokens, p.features, p.width, y);
  return y;
}

Tensor to_tensor(Context& context, const Reals& values, const Shape& shape) {
  return tensor_of(context, DType::f64, shape, doubles(values));
}

/// What one rank holds, and what the ranks' sums give all of them.
struct Folded {
  Tensor mean, rstd, c, w_beta, b2, y;
};

Folded fold_forward(Context& context, const Problem& p) {
  const int64_t n = p.tokens;
  const int64_t d = p.width;
  Reals sums(static_cast<size_t>(2 * n));
  Reals z(static_cast<size_t>(n * d));
  Reals c(static_cast<size_t>(d));
  Reals w_beta(static_cast<size_t>(d));
  for (const Range shard : p.shards) {
    const Reals h = columns_of(p.h, p.features, shard);
    const Reals gamma = columns_of(p.gamma, p.features, shard);
    Reals scaled = h;
    for (size_t i = 0; i < h.size(); ++i) {
      const size_t row = i / gamma.size();
      sums[2 * row] += h[i];
      sums[2 * row + 1] += h[i] * h[i];
      scaled[i] *= gamma[i % gamma.size()];
    }
    const Reals w2 = columns_of(p.w2, p.features, shard);
    add_product(scaled, w2, n, shard.size(), d, z);
    const Tensor local_c = context.empty({d}, DType::f64);
    const Tensor local_w_beta = context.empty({d}, DType::f64);
    fold_norm_weights(
        context, to_tensor(context, w2, {d, shard.size()}), to_tensor(context, gamma, {shard.size()}),
        to_tensor(context, columns_of(p.beta, p.features, shard), {shard.size()}), local_c, local_w_beta);
    const Reals c_part = reals(local_c);
    const Reals w_beta_part = reals(local_w_beta);
    for (size_t i = 0; i < c.size(); ++i) {
      c[i] += c_part[i];
      w_beta[i] += w_beta_part[i];
    }
  }
  Folded out{context.empty({n}, DType::f64),  context.empty({n}, DType::f64), to_tensor(context, c, {d}),
             to_tensor(context, w_beta, {d}), to_tensor(context, p.b2, {d}),  to_tensor(context, z, {n, d})};
  norm_statistics(context, to_tensor(context, sums, {n, 2}), p.features, kEps, out.mean, out.rstd);
  unfold_norm(context, out.y, out.mean, out.rstd, out.c, out.w_beta, out.b2, out.y);
  return out;
}

std::vector<Problem> problems() {
  return {{5, 12, 7, {{0, 12}}},
          {5, 40, 7, {{0, 13}, {13, 40}}},
          {19, 37, 21, {{0, 5}, {5, 6}, {6, 37}}},
          {1, 1, 1, {{0, 1}}}};
}

TEST(FoldedFfnNorm, ForwardIsThePlainLayerNormAndLinear) {
  for (const Problem& p : problems()) {
    Context context(test_device(), 2);
    expect_close(fold_forward(context, p).y, plain_forward(p), 1e-12L, "y");
  }
}

TEST(FoldedFfnNorm, BackwardIsThatOfThePlainLayerNormAndLinear) {
  for (Problem p : problems()) {
    if (p.features == 1) continue;  // its gradients are zero but for rounding
    Context context(test_device(), 2);
    const int64_t n = p.tokens;
    const int64_t d = p.width;
    const Folded folded = fold_forward(context, p);
    const Tensor mean_g = unwritten(context, DType::f64, {n});
    const Tensor mean_gx = unwritten(context, DType::f64, {n});
    const Tensor dy_scaled = unwritten(context, DType::f64, {n, d});
    const Tensor u = unwritten(context, DType::f64, {d});
    const Tensor s = unwritten(context, DType::f64, {d});
    fold_norm_backward(context, to_tensor(context, p.dy, {n, d}), folded.y, folded.mean, folded.rstd,
                       folded.c, folded.w_beta, folded.b2, p.features, mean_g, mean_gx, dy_scaled, u, s);

    const auto loss = [&] { return dot(p.dy, plain_forward(p)); };
    const Reals dh_want = numeric_gradient(p.h, loss);
    const Reals dw_want = numeric_gradient(p.w2, loss);
    const Reals db_want = numeric_gradient(p.b2, loss);
    expect_close(s, db_want, 1e-9L, "s is the gradient of b2");

    for (const Range shard : p.shards) {
      const int64_t f = shard.size();
      const Reals gamma = columns_of(p.gamma, p.features, shard);
      Reals scaled = columns_of(p.h, p.features, shard);
      const Reals h = scaled;
      for (size_t i = 0; i < scaled.size(); ++i) scaled[i] *= gamma[i % gamma.size()];
      // dW2 = dy_scaled^T h', and what that lacks.
      Reals dw(static_cast<size_t>(d * f));
      add_product(transposed(reals(dy_scaled), n, d), transposed(scaled, n, f), d, n, f, dw);
      const Tensor dw_tensor = to_tensor(context, dw, {d, f});
      add_fold_correction(context, u, to_tensor(context, gamma, {f}), s,
                          to_tensor(context, columns_of(p.beta, p.features, shard), {f}), dw_tensor);
      expect_close(dw_tensor, columns_of(dw_want, p.features, shard), 1e-9L, "dW2");
      // dh = rstd (gamma (dy W2) - mean_g - xhat mean_gx): as activation_backward takes it.
      Reals dnormed(static_cast<size_t>(n * f));
      add_product(p.dy, transposed(columns_of(p.w2, p.features, shard), d, f), n, d, f, dnormed);
      const Reals mean = reals(folded.mean);
      const Reals rstd = reals(folded.rstd);
      const Reals g_means = reals(mean_g);
      const Reals gx_means = reals(mean_gx);
      Reals dh;
      for (size_t i = 0; i < h.size(); ++i) {
        const size_t row = i / gamma.size();
        const Real g = gamma[i % gamma.size()] * dnormed[i];
        dh.push_back(rstd[row] * (g - g_means[row] - rstd[row] * (h[i] - mean[row]) * gx_means[row]));
      }
      expect_close(to_tensor(context, dh, {n, f}), columns_of(dh_want, p.features, shard), 1e-9L, "dh");
    }
  }
}

/// The identities themselves, without differences in between: against sums over all features.
TEST(FoldedFfnNorm, MeansFromTheOutputAreTheMeansOverFeatures) {
  for (const Problem& p : problems()) {
    Context context(test_device());
    const int64_t n = p.tokens;
    const int64_t d = p.width;
    const Folded folded = fold_forward(context, p);
    const Tensor mean_g = context.empty({n}, DType::f64);
    const Tensor mean_gx = context.empty({n}, DType::f64);
    const Tensor dy_scaled = context.empty({n, d}, DType::f64);
    const Tensor u = context.empty({d}, DType::f64);
    const Tensor s = context.empty({d}, DType::f64);
    fold_norm_backward(context, to_tensor(context, p.dy, {n, d}), folded.y, folded.mean, folded.rstd,
                       folded.c, folded.w_beta, folded.b2, p.features, mean_g, mean_gx, dy_scaled, u, s);
    // The plain form's way to the same means: sums over each shard's features.
    Reals sums(static_cast<size_t>(2 * n));
    for (const Range shard : p.shards) {
      const int64_t f = shard.size();
      Reals dnormed(static_cast<size_t>(n * f));
      add_product(p.dy, transposed(columns_of(p.w2, p.features, shard), d, f), n, d, f, dnormed);
      const Tensor local = unwritten(context, DType::f64, {n, 2});
      normalise_backward_sums(context, to_tensor(context, dnormed, {n, f}),
                              to_tensor(context, columns_of(p.h, p.features, shard), {n, f}), folded.mean,
                              folded.rstd, to_tensor(context, columns_of(p.gamma, p.features, shard), {f}),
                              local);
      const Reals part = reals(local);
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += part[i];
    }
    const Tensor g = context.empty({n}, DType::f64);
    const Tensor gx = context.empty({n}, DType::f64);
    split_means(context, to_tensor(context, sums, {n, 2}), p.features, g, gx);
    Real size = 0;
    for (const Real value : p.dy) size = std::max(size, std::abs(value));
    for (int64_t i = 0; i < n; ++i) {
      const auto row = static_cast<size_t>(i);
      EXPECT_NEAR(to_host(mean_g)[row], to_host(g)[row], 1e-12 * static_cast<double>(size));
      EXPECT_NEAR(to_host(mean_gx)[row], to_host(gx)[row], 1e-12 * static_cast<double>(size));
      for (int64_t j = 0; j < d; ++j) {
        const auto at = static_cast<size_t>(i * d + j);
        EXPECT_NEAR(to_host(dy_scaled)[at], static_cast<double>(reals(folded.rstd)[row] * p.dy[at]), 1e-12);
      }
    }
    Reals u_want(static_cast<size_t>(d));
    for (size_t i = 0; i < p.dy.size(); ++i) {
      const size_t row = i / static_cast<size_t>(d);
      u_want[i % static_cast<size_t>(d)] += reals(folded.rstd)[row] * reals(folded.mean)[row] * p.dy[i];
    }
    expect_close(u, u_want, 1e-13L, "u");
  }
}

TEST(FfnNorm, NormaliseIsThePlainForm) {
  for (const DType dtype : kFloatingTypes) {
    for (const auto [rows, columns] : kExtents) {
      Context context(test_device(), 2);
      const Tensor h = random_tensor(context, dtype, {rows, columns}, 1, 1.0, 0.5);
      const Tensor gamma = random_tensor(context, dtype, {columns}, 2);
      const Tensor beta = random_tensor(context, dtype, {columns}, 3);
      const Tensor mean = random_tensor(context, accumulator_of(dtype), {rows}, 4);
      const Tensor rstd = random_tensor(context, accumulator_of(dtype), {rows}, 5, 0.1, 1.0);
      Reals want;
      const Reals in = reals(h);
      const auto n = static_cast<size_t>(columns);
      for (size_t i = 0; i < in.size(); ++i) {
        want.push_back(reals(gamma)[i % n] * reals(rstd)[i / n] * (in[i] - reals(mean)[i / n]) +
                       reals(beta)[i % n]);
        if (i > 600) break;  // the reference is slow on purpose; rows beyond look alike
      }
      normalise(context, h, mean, rstd, gamma, beta, h);
      const auto checked = static_cast<int64_t>(want.size());
      // Four roundings of numbers below 4 * 1.5 * 8.
      expect_rounded(h.flat(0, checked), want, {48}, 4, name_of_case(dtype, rows, columns));
    }
  }
}

/// Of features that two ranks share, against the LayerNorm of all of them.
TEST(FfnNorm, ThePlainFormOverPartsIsTheLayerNormOfAll) {
  const int64_t n = 37;
  const int64_t f = 53;
  Context context(test_device(), 2);
  const auto matrix = [&](unsigned seed) {
    return random_tensor(context, DType::f64, {n, f}, seed, 0.3, 1.0);
  };
  const auto vector = [&](unsigned seed) { return random_tensor(context, DType::f64, {f}, seed, 0.5, 1.0); };
  const Tensor x = matrix(1);
  const Tensor dy = matrix(2);
  const Tensor gamma = vector(3);
  const Tensor beta = vector(4);
  const Tensor y = context.empty({n, f}, DType::f64);
  const Tensor dx = context.empty({n, f}, DType::f64);
  const Tensor mean = context.empty({n}, DType::f64);
  const Tensor rstd = context.empty({n}, DType::f64);
  const Tensor dgamma = vector(5);
  const Tensor dbeta = vector(6);
  layer_norm_forward(context, x, gamma, beta, 1e-5, y, mean, rstd);
  layer_norm_backward(context, dy, x, gamma, mean, rstd, {}, dx, dgamma, dbeta);

  const std::vector<Range> parts = {{0, 16}, {16, f}};
  const auto part_of = [&](const Tensor& whole, Range part) {
    const Tensor cut = context.empty({n, part.size()}, DType::f64);
    copy_columns(context, whole, part.begin, cut, 0, part.size());
    return cut;
  };
  const auto sum_over_parts = [&](auto&& sums_of) {
    const Tensor all = context.zeros({n, 2}, DType::f64);
    for (const Range part : parts) {
      const Tensor mine = unwritten(context, DType::f64, {n, 2});
      sums_of(part, mine);
      add(context, mine, all);
    }
    return all;
  };
  const Tensor sums =
      sum_over_parts([&](Range part, const Tensor& mine) { feature_sums(context, part_of(x, part), mine); });
  const Tensor mean_here = unwritten(context, DType::f64, {n});
  const Tensor rstd_here = unwritten(context, DType::f64, {n});
  norm_statistics(context, sums, f, 1e-5, mean_here, rstd_here);
  expect_close(mean_here, reals(mean), 1e-14L, "mean");
  expect_close(rstd_here, reals(rstd), 1e-13L, "rstd");
  const Tensor means = sum_over_parts([&](Range part, const Tensor& mine) {
    normalise_backward_sums(context, part_of(dy, part), part_of(x, part), mean, rstd,
                            gamma.flat(part.begin, part.size()), mine);
  });
  scale(context, means, 1.0 / static_cast<double>(f));
  for (const Range part : parts) {
    const Tensor d = part_of(dy, part);
    const Tensor dgamma_here =
        random_tensor(context, DType::f64, {f}, 5, 0.5, 1.0).flat(part.begin, part.size());
    const Tensor dbeta_here =
        random_tensor(context, DType::f64, {f}, 6, 0.5, 1.0).flat(part.begin, part.size());
    normalise_backward(context, d, part_of(x, part), mean, rstd, gamma.flat(part.begin, part.size()), means,
                       d, dgamma_here, dbeta_here);
    expect_close(d, reals(part_of(dx, part)), 1e-13L, "dh");
    expect_close(dgamma_here, reals(dgamma.flat(part.begin, part.size())), 1e-12L, "dgamma");
    expect_close(dbeta_here, reals(dbeta.flat(part.begin, part.size())), 1e-12L, "dbeta");
  }
}

/// Narrow types against fp64 on the same rounded inputs.
TEST(FfnNorm, NarrowTypesMatchFp64) {
  struct Outputs {
    Tensor c, w_beta, y, mean_g, mean_gx, dy_scaled, u, s, dw, sums;
  };
  struct Inputs {
    Tensor w2, gamma, beta, b2, z, mean, rstd, dy, h;
  };
  const auto run = [](Context& context, const Inputs& in) {
    const DType dtype = in.z.dtype();
    const DType sum_type = accumulator_of(dtype);
    const int64_t n = in.z.dim(0);
    const int64_t d = in.z.dim(1);
    const int64_t f = in.w2.dim(1);
    Outputs out{unwritten(context, sum_type, {d}), unwritten(context, sum_type, {d}),
                unwritten(context, dtype, {n, d}), unwritten(context, sum_type, {n}),
                unwritten(context, sum_type, {n}), unwritten(context, dtype, {n, d}),
                unwritten(context, sum_type, {d}), unwritten(context, sum_type, {d}),
                context.zeros({d, f}, sum_type),   unwritten(context, sum_type, {n, 2})};
    fold_norm_weights(context, in.w2, in.gamma, in.beta, out.c, out.w_beta);
    unfold_norm(context, in.z, in.mean, in.rstd, out.c, out.w_beta, in.b2, out.y);
    fold_norm_backward(context, in.dy, in.z, in.mean, in.rstd, out.c, out.w_beta, in.b2, f, out.mean_g,
                       out.mean_gx, out.dy_scaled, out.u, out.s);
    add_fold_correction(context, out.u, in.gamma, out.s, in.beta, out.dw);
    normalise_backward_sums(context, in.h, in.h, in.mean, in.rstd, in.gamma, out.sums);
    return out;
  };
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const auto [n, d] : kExtents) {
      const int64_t f = d < 1000 ? 2 * d + 3 : 259;  // w2 is not to be all that the test computes
      Context context(test_device(), 2);
      const DType sum_type = accumulator_of(dtype);
      const Inputs in{random_tensor(context, dtype, {d, f}, 1, 0.1),
                      random_tensor(context, dtype, {f}, 2, 0.3, 1.0),
                      random_tensor(context, dtype, {f}, 3),
                      random_tensor(context, dtype, {d}, 4),
                      random_tensor(context, dtype, {n, d}, 5),
                      random_tensor(context, sum_type, {n}, 6, 0.2, 0.3),
                      random_tensor(context, sum_type, {n}, 7, 0.1, 1.0),
                      random_tensor(context, dtype, {n, d}, 8),
                      random_tensor(context, dtype, {n, f}, 9)};
      Inputs wide = in;
      for (Tensor* t :
           {&wide.w2, &wide.gamma, &wide.beta, &wide.b2, &wide.z, &wide.mean, &wide.rstd, &wide.dy, &wide.h})
        *t = converted(context, *t, DType::f64);
      const Outputs got = run(context, in);
      const Outputs want = run(context, wide);
      const std::string what = name_of_case(dtype, n, d);
      // Dot products of f terms below 0.5 * 4, of d terms below 5 * 16: at most a quarter of their additions,
      // and 8 more, one after the other; c then errs by f / 4 roundings of 2 f.
      const auto F = static_cast<Real>(f);
      const auto D = static_cast<Real>(d);
      const auto N = static_cast<Real>(n);
      const Real c_error = 2 * F;
      const Real c_roundings = F / 4 + 8;
      expect_rounded(got.c, reals(want.c), {c_error}, c_roundings, what + " c");
      expect_rounded(got.w_beta, reals(want.w_beta), {c_error}, c_roundings, what + " w_beta");
      expect_rounded(got.y, reals(want.y), {2 * c_error + 16}, c_roundings + 4, what + " y");
      const Real dots = 5 * (c_error + 16);
      expect_rounded(got.mean_g, reals(want.mean_g), {dots}, c_roundings + D / 4 + 8, what + " mean_g");
      expect_rounded(got.mean_gx, reals(want.mean_gx), {dots}, c_roundings + D / 4 + 8, what + " mean_gx");
      expect_rounded(got.dy_scaled, reals(want.dy_scaled), {8}, 1, what + " dy_scaled");
      expect_rounded(got.u, reals(want.u), {8 * (N + 1)}, N + 4, what + " u");
      expect_rounded(got.s, reals(want.s), {5 * (N + 1)}, N + 4, what + " s");
      expect_rounded(got.dw, reals(want.dw), {64 * (N + 1)}, N + 8, what + " dw");
      expect_rounded(got.sums, reals(want.sums), {64 * F}, F / 4 + 8, what + " sums");
    }
  }
}

// Means of the rows whose y is here and sums of all rows, one by one: the bits of both at once, on a GPU the
// same to rounding, since its blocks are then others.
TEST(FoldedFfnNorm, BackwardInTwoHalvesGivesTheSame) {
  for (const DType dtype : kFloatingTypes) {
    for (const auto [n, d] : kExtents) {
      Context context(test_device(), 2);
      const DType sum_type = accumulator_of(dtype);
      const Tensor dy = random_tensor(context, dtype, {n, d}, 1);
      const Tensor y = random_tensor(context, dtype, {n, d}, 2);
      const Tensor mean = random_tensor(context, sum_type, {n}, 3, 0.2, 0.3);
      const Tensor rstd = random_tensor(context, sum_type, {n}, 4, 0.1, 1.0);
      const Tensor c = random_tensor(context, sum_type, {d}, 5);
      const Tensor b2 = random_tensor(context, dtype, {d}, 6);
      struct Results {
        Tensor mean_g, mean_gx, dy_scaled, u, s;
      };
      const auto results = [&] {
        return Results{unwritten(context, sum_type, {n}), unwritten(context, sum_type, {n}),
                       unwritten(context, dtype, {n, d}), unwritten(context, sum_type, {d}),
                       unwritten(context, sum_type, {d})};
      };
      const Results whole = results();
      fold_norm_backward(context, dy, y, mean, rstd, c, c, b2, 9, whole.mean_g, whole.mean_gx,
                         whole.dy_scaled, whole.u, whole.s);
      const Results halves = results();
      fold_norm_backward(context, dy, y, mean, rstd, c, c, b2, 9, halves.mean_g, halves.mean_gx, Tensor(),
                         Tensor(), Tensor());
      fold_norm_backward(context, dy, Tensor(), mean, rstd, c, c, b2, 9, Tensor(), Tensor(), halves.dy_scaled,
                         halves.u, halves.s);
      const std::string what = name_of_case(dtype, n, d);
      // Sums of terms below 5 * 16, and of terms below 8.
      const auto expect_same = [&](const Tensor& got, const Tensor& want, int64_t terms, const char* name) {
        if (context.is_cuda())
          expect_rounded(got, reals(want), {80 * static_cast<Real>(terms)}, static_cast<Real>(terms) + 8,
                         what + name);
        else
          expect_same_bits(got, want, what + name);
      };
      expect_same(halves.mean_g, whole.mean_g, d, " mean_g");
      expect_same(halves.mean_gx, whole.mean_gx, d, " mean_gx");
      expect_same(halves.u, whole.u, n, " u");
      expect_same(halves.s, whole.s, n, " s");
      expect_same_bits(halves.dy_scaled, whole.dy_scaled, what + " dy_scaled");
    }
  }
}

TEST(FfnNorm, AVarianceThatRoundingMadeNegativeCountsAsZero) {
  Context context(test_device());
  const Tensor sums = tensor_of(context, DType::f32, {2, 2}, {4.0, 3.999, 6.0, 10.0});
  const Tensor mean = context.empty({2}, DType::f32);
  const Tensor rstd = context.empty({2}, DType::f32);
  norm_statistics(context, sums, 4, 0.25, mean, rstd);
  EXPECT_EQ(to_host(mean), (std::vector<double>{1.0, 1.5}));
  EXPECT_EQ(to_host(rstd)[0], 2.0);
  EXPECT_EQ(to_host(rstd)[1], static_cast<float>(1.0 / std::sqrt(0.5)));
}

TEST(FfnNorm, SumsOverTokensDoNotDependOnThreads) {
  std::vector<std::vector<uint8_t>> u_bits;
  std::vector<std::vector<uint8_t>> s_bits;
  for (const int threads : {1, 2, 3}) {
    Context context(test_device(), threads);
    const int64_t n = 333;
    const int64_t d = 77;
    const Tensor row = random_tensor(context, DType::f32, {d}, 1);
    const Tensor column = random_tensor(context, DType::f32, {n}, 2);
    const Tensor dy = random_tensor(context, DType::f32, {n, d}, 3);
    const Tensor u = context.empty({d}, DType::f32);
    const Tensor s = context.empty({d}, DType::f32);
    const Tensor means = context.empty({n}, DType::f32);
    fold_norm_backward(context, dy, dy, column, column, row, row, row, 9, means, means, dy, u, s);
    u_bits.push_back(bytes_of(u));
    s_bits.push_back(bytes_of(s));
  }
  EXPECT_EQ(u_bits[0], u_bits[1]);
  EXPECT_EQ(u_bits[0], u_bits[2]);
  EXPECT_EQ(s_bits[0], s_bits[1]);
  EXPECT_EQ(s_bits[0], s_bits[2]);
}

TEST(FfnNorm, MetaCountsAlike) {
  expect_same_costs_on_meta([](Context& context) {
    const Tensor w2 = context.empty({7, 33}, DType::bf16);
    const Tensor feature = context.empty({33}, DType::bf16);
    const Tensor b2 = context.empty({7}, DType::bf16);
    const Tensor width = context.empty({7}, DType::f32);
    const Tensor width2 = context.empty({7}, DType::f32);
    const Tensor token = context.empty({5}, DType::f32);
    const Tensor token2 = context.empty({5}, DType::f32);
    const Tensor sums = context.empty({5, 2}, DType::f32);
    const Tensor y = context.empty({5, 7}, DType::bf16);
    const Tensor h = context.empty({5, 33}, DType::bf16);
    const Tensor dw = context.empty({7, 33}, DType::f32);
    norm_statistics(context, sums, 33, kEps, token, token2);
    fold_norm_weights(context, w2, feature, feature, width, width2);
    unfold_norm(context, y, token, token2, width, width2, b2, y);
    fold_norm_backward(context, y, y, token, token2, width, width2, b2, 33, token, token2, y, width, width2);
    add_fold_correction(context, width, feature, width2, feature, dw);
    normalise(context, h, token, token2, feature, feature, h);
    normalise_backward_sums(context, h, h, token, token2, feature, sums);
    split_means(context, sums, 33, token, token2);
  });
}

}  // namespace
}  // namespace normformer::ops
