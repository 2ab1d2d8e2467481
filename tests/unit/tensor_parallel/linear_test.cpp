#include "normformer/tensor_parallel/linear.h"

#include <gtest/gtest.h>

#include "normformer/comm/group.h"
#include "normformer/ops/random_fill.h"
#include "normformer/tensor_parallel/stream.h"

namespace normformer {
namespace {

constexpr int64_t kTokens = 5;
constexpr int64_t kWidth = 6;
constexpr int64_t kFeatures = 11;  // no multiple of any group size below

Tensor drawn(Context& context, int64_t rows, int64_t columns, Rectangle part, uint64_t what) {
  Tensor made = context.empty({part.rows.size(), part.columns.size()}, DType::f64);
  part.global_rows = rows;
  part.global_columns = columns;
  ops::fill_normal(context, made, part, RandomStream{what}, 1.0);
  return made;
}

Tensor whole(Context& context, int64_t rows, int64_t columns, uint64_t what) {
  return drawn(context, rows, columns, {{0, rows}, {0, columns}}, what);
}

struct Outcome {
  std::vector<double> y, dx, dw1, dw2;
};

// A column-parallel linear, then a row-parallel one, forward and backward; weight gradients of this rank, put
// in place.
Outcome run(const Group& group) {
  Context context(DeviceKind::cpu);
  const Range mine = even_part(kFeatures, group.size(), group.rank());
  LinearWeights first{drawn(context, kFeatures, kWidth, {mine, {0, kWidth}}, 1), {}, {}, {}};
  LinearWeights second{drawn(context, kWidth, kFeatures, {{0, kWidth}, mine}, 2), {}, {}, {}};
  first.weight_gradient = context.zeros(first.weight.shape(), DType::f64);
  second.weight_gradient = context.zeros(second.weight.shape(), DType::f64);
  const ColumnParallelLinear column(context, first);
  const RowParallelLinear row(context, second);
  const StreamBoundary<Replicated> boundary(context, group);

  const Placed<Replicated> x(whole(context, kTokens, kWidth, 3));
  const Placed<Replicated> dy(whole(context, kTokens, kWidth, 4));
  const Placed<FeatureSharded> hidden = column.forward(boundary.enter(x));
  const Placed<Replicated> y = boundary.leave(row.forward(hidden));
  const Placed<FeatureSharded> dhidden = row.backward_input(boundary.leave_backward(dy));
  const Placed<Replicated> dx = boundary.enter_backward(column.backward_input(dhidden));
  row.backward_weight(dy, hidden);
  column.backward_weight(dhidden, x);

  const Tensor dw1 = context.zeros({kFeatures, kWidth}, DType::f64);
  copy(context, first.weight_gradient, dw1.rows(mine.begin, mine.end));
  const Tensor dw2 = context.zeros({kFeatures, kWidth}, DType::f64);  // transposed, so that features are rows
  for (int64_t i = 0; i < kWidth; ++i) {
    for (int64_t j = 0; j < mine.size(); ++j) {
      dw2.data<double>()[(mine.begin + j) * kWidth + i] =
          second.weight_gradient.data<double>()[i * mine.size() + j];
    }
  }
  group.all_reduce(context, dw1, ReduceOp::sum);
  group.all_reduce(context, dw2, ReduceOp::sum);
  return {to_host(y.tensor()), to_host(dx.tensor()), to_host(dw1), to_host(dw2)};
}

void expect_near(const std::vector<double>& a, const std::vector<double>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-13);
}

TEST(ParallelLinear, AnySplitEqualsTheWhole) {
  const Outcome expected = run(make_self_world());
  for (const int ranks : {2, 3, 5}) {
    run_local_world(ranks, [&](const Group& world) {
      const Outcome got = run(world);
      expect_near(got.y, expected.y);
      expect_near(got.dx, expected.dx);
      expect_near(got.dw1, expected.dw1);
      expect_near(got.dw2, expected.dw2);
    });
  }
}

TEST(ParallelLinear, RowParallelRefusesABias) {
  Context context(DeviceKind::cpu);
  const Tensor weight = context.zeros({2, 3}, DType::f32);
  EXPECT_THROW(RowParallelLinear(context, {weight, context.zeros({2}, DType::f32), {}, {}}), LogicError);
}

}  // namespace
}  // namespace normformer
