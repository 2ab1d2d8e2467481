#include "normformer/ops/layer_norm.h"

#include "support.h"

namespace normformer::ops {
namespace {

constexpr double kEps = 1e-5;

struct Reference {
  Reals y, mean, rstd;
};

Reference reference(const Reals& x, const Reals& gamma, const Reals& beta, int64_t rows, int64_t columns) {
  Reference r;
  for (int64_t n = 0; n < rows; ++n) {
    const Real* row = x.data() + n * columns;
    Real mean = 0;
    Real variance = 0;
    for (int64_t c = 0; c < columns; ++c) mean += row[c] / static_cast<Real>(columns);
    for (int64_t c = 0; c < columns; ++c)
      variance += (row[c] - mean) * (row[c] - mean) / static_cast<Real>(columns);
    const Real rstd = 1 / std::sqrt(variance + Real(kEps));
    for (int64_t c = 0; c < columns; ++c) {
      const auto i = static_cast<size_t>(c);
      r.y.push_back(gamma[i] * (row[c] - mean) * rstd + beta[i]);
    }
    r.mean.push_back(mean);
    r.rstd.push_back(rstd);
  }
  return r;
}

struct Inputs {
  Tensor x, gamma, beta, dy, residual;

  Inputs(Context& context, DType dtype, int64_t rows, int64_t columns)
      : x(random_tensor(context, dtype, {rows, columns}, 1, 2.0, 0.5)),
        gamma(random_tensor(context, dtype, {columns}, 2, 0.3, 1.0)),
        beta(random_tensor(context, dtype, {columns}, 3)),
        dy(random_tensor(context, dtype, {rows, columns}, 4)),
        residual(random_tensor(context, dtype, {rows, columns}, 5)) {}
};

struct Outputs {
  Tensor y, mean, rstd, dx, dgamma, dbeta;
};

Outputs run(Context& context, const Inputs& in, bool with_residual) {
  const DType dtype = in.x.dtype();
  const DType sums = accumulator_of(dtype);
  const int64_t rows = in.x.dim(0);
  const int64_t columns = in.x.dim(1);
  Outputs out{unwritten(context, dtype, in.x.shape()), unwritten(context, sums, {rows}),
              unwritten(context, sums, {rows}),        unwritten(context, dtype, in.x.shape()),
              context.zeros({columns}, sums),          context.zeros({columns}, sums)};
  layer_norm_forward(context, in.x, in.gamma, in.beta, kEps, out.y, out.mean, out.rstd);
  layer_norm_backward(context, in.dy, in.x, in.gamma, out.mean, out.rstd,
                      with_residual ? in.residual : Tensor(), out.dx, out.dgamma, out.dbeta);
  return out;
}

TEST(LayerNorm, ForwardMatchesTheReference) {
  for (const DType dtype : kFloatingTypes) {
    for (const auto [rows, columns] : kExtents) {
      Context context(test_device(), 2);
      const Inputs in(context, dtype, rows, columns);
      const Outputs out = run(context, in, false);
      const Reference want = reference(reals(in.x), reals(in.gamma), reals(in.beta), rows, columns);
      const std::string what = name_of_case(dtype, rows, columns);
      // A sum of n terms in any order errs by at most (n - 1) u times the sum of their sizes; here 16 lanes
      // in four chains make that n / 32 + 12. The mean's error moves every centred element; values are
      // below 16.
      const Real roundings = static_cast<Real>(columns) / 32 + 24;
      expect_rounded(out.mean, want.mean, {16}, roundings, what + " mean");
      // d rstd / d variance is rstd^3 / 2: relative errors of the variance are halved. A variance near zero
      // is held off by eps = 1e-5, under which the square of the mean's error disappears.
      expect_rounded(out.rstd, want.rstd, want.rstd, 2 * roundings, what + " rstd");
      Reals magnitudes;
      for (size_t i = 0; i < want.y.size(); ++i) {
        magnitudes.push_back(16 * want.rstd[i / static_cast<size_t>(columns)] + std::abs(want.y[i]) + 4);
      }
      expect_rounded(out.y, want.y, magnitudes, 4 * roundings, what + " y");
    }
  }
}

TEST(LayerNorm, BackwardMatchesDifferencesOfTheReference) {
  for (const auto [rows, columns] : {Extent{1, 1}, Extent{3, 5}, Extent{7, 33}}) {
    Context context(test_device(), 2);
    const Inputs in(context, DType::f64, rows, columns);
    const Outputs out = run(context, in, true);
    Reals x = reals(in.x);
    Reals gamma = reals(in.gamma);
    Reals beta = reals(in.beta);
    const Reals dy = reals(in.dy);
    const auto loss = [&] { return dot(dy, reference(x, gamma, beta, rows, columns).y); };
    Reals dx = numeric_gradient(x, loss);
    const Reals residual = reals(in.residual);
    for (size_t i = 0; i < dx.size(); ++i) dx[i] += residual[i];
    const std::string what = name_of_case(DType::f64, rows, columns);
    expect_close(out.dx, dx, 1e-8L, what + " dx");
    expect_close(out.dgamma, numeric_gradient(gamma, loss), 1e-8L, what + " dgamma");
    expect_close(out.dbeta, numeric_gradient(beta, loss), 1e-8L, what + " dbeta");
  }
}

TEST(LayerNorm, BackwardOfNarrowTypesMatchesFp64) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const auto [rows, columns] : kExtents) {
      Context context(test_device(), 2);
      const Inputs in(context, dtype, rows, columns);
      const Outputs out = run(context, in, true);
      Inputs wide = in;
      for (Tensor* t : {&wide.x, &wide.gamma, &wide.beta, &wide.dy, &wide.residual})
        *t = converted(context, *t, DType::f64);
      const Outputs want = run(context, wide, true);
      const std::string what = name_of_case(dtype, rows, columns);
      // Each term is of xhat (below 5 sizes of rounding from x - mean at |x| < 16, rstd < 4 but for one
      // column, where xhat is the mean's rounding alone), g and their means over the row: columns / 32 + 24
      // roundings.
      const Real roundings = static_cast<Real>(columns) / 32 + 24;
      const Real rstd = columns == 1 ? 320 : 4;
      expect_rounded(out.dx, reals(want.dx), {16 * rstd}, 4 * roundings, what + " dx");
      // Sums over rows: at most `rows` additions one after the other of terms below 16.
      expect_rounded(out.dgamma, reals(want.dgamma), {16 * static_cast<Real>(rows + 1) * rstd},
                     roundings + static_cast<Real>(rows), what + " dgamma");
      expect_rounded(out.dbeta, reals(want.dbeta), {4 * static_cast<Real>(rows + 1)},
                     static_cast<Real>(rows) + 2, what + " dbeta");
    }
  }
}

TEST(LayerNorm, InPlaceAndOnAnyNumberOfThreadsTheBitsAreTheSame) {
  for (const DType dtype : kFloatingTypes) {
    Context one(test_device(), 1);
    const Outputs want = run(one, Inputs(one, dtype, 65, 770), true);
    for (const int threads : {2, 3}) {
      Context context(test_device(), threads);
      const Outputs got = run(context, Inputs(context, dtype, 65, 770), true);
      expect_same_bits(got.y, want.y, "y");
      expect_same_bits(got.dx, want.dx, "dx");
      expect_same_bits(got.dgamma, want.dgamma, "dgamma");
      expect_same_bits(got.dbeta, want.dbeta, "dbeta");
    }
    const Inputs in(one, dtype, 65, 770);
    const Tensor dgamma = one.zeros({770}, accumulator_of(dtype));
    const Tensor dbeta = one.zeros({770}, accumulator_of(dtype));
    layer_norm_backward(one, in.dy, in.x, in.gamma, want.mean, want.rstd, in.residual, in.residual, dgamma,
                        dbeta);
    expect_same_bits(in.residual, want.dx, "dx in place of residual");
    layer_norm_backward(one, in.dy, in.x, in.gamma, want.mean, want.rstd,
                        random_tensor(one, dtype, {65, 770}, 5), in.dy, dgamma, dbeta);
    expect_same_bits(in.dy, want.dx, "dx in place of dy");
  }
}

TEST(LayerNorm, GradientsOfParametersAreAddedTo) {
  Context context(test_device());
  const Inputs in(context, DType::f64, 7, 33);
  Outputs out = run(context, in, false);
  const Reals dgamma = reals(out.dgamma);
  layer_norm_backward(context, in.dy, in.x, in.gamma, out.mean, out.rstd, Tensor(), out.dx, out.dgamma,
                      out.dbeta);
  const Reals twice = reals(out.dgamma);
  for (size_t i = 0; i < twice.size(); ++i) EXPECT_EQ(twice[i], 2 * dgamma[i]);
}

TEST(LayerNorm, MetaCountsAlike) {
  expect_same_costs_on_meta([](Context& context) {
    const Shape shape{65, 770};
    const Tensor x = context.empty(shape, DType::bf16);
    const Tensor row = context.empty({770}, DType::bf16);
    const Tensor sum = context.empty({770}, DType::f32);
    const Tensor column = context.empty({65}, DType::f32);
    if (!context.is_meta()) {
      fill_zero(context, x);
      context.costs().clear();
    }
    layer_norm_forward(context, x, row, row, kEps, x, column, column);
    layer_norm_backward(context, x, x, row, column, column, x, x, sum, sum);
  });
}

TEST(LayerNorm, WrongArgumentsAreNamed) {
  Context context(test_device());
  const Inputs in(context, DType::f32, 3, 5);
  const Tensor short_gamma = context.zeros({4}, DType::f32);
  const Tensor column = context.zeros({3}, DType::f32);
  try {
    layer_norm_forward(context, in.x, short_gamma, in.beta, kEps, in.x, column, column);
    FAIL() << "a gamma of four channels was taken for five";
  } catch (const LogicError& error) {
    EXPECT_NE(std::string(error.what()).find("gamma is f32[4], not f32[5]"), std::string::npos)
        << error.what();
  }
  EXPECT_THROW(layer_norm_forward(context, in.x, in.gamma, in.beta, kEps, in.x,
                                  context.zeros({3}, DType::f64), column),
               LogicError);
}

}  // namespace
}  // namespace normformer::ops
