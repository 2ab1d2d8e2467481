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

// A column-parallel linear, then a row-parallel one, forward and backward, on a stream; weight gradients of
// this rank, put in place.
template <class Stream>
Outcome run(const Group& group) {
  Context context(DeviceKind::cpu);
  const Range mine = even_part(kFeatures, group.size(), group.rank());
  LinearWeights first{drawn(context, kFeatures, kWidth, {mine, {0, kWidth}}, 1), {}, {}, {}};
  LinearWeights second{drawn(context, kWidth, kFeatures, {{0, kWidth}, mine}, 2), {}, {}, {}};
  first.weight_gradient = context.zeros(first.weight.shape(), DType::f64);
  second.weight_gradient = context.zeros(second.weight.shape(), DType::f64);
  const ColumnParallelLinear column(context, first);
  const RowParallelLinear row(context, second);
  const StreamBoundary<Stream> boundary(context, group);

  const Range rows = boundary.rows(kTokens);
  const Placed<Stream> x(whole(context, kTokens, kWidth, 3).rows(rows.begin, rows.end));
  const Placed<Stream> dy(whole(context, kTokens, kWidth, 4).rows(rows.begin, rows.end));
  const Placed<Replicated> input = boundary.enter(x, kTokens);
  const Placed<FeatureSharded> hidden = column.forward(input);
  const Placed<Stream> y = boundary.leave(row.forward(hidden));
  EXPECT_EQ(y.tensor().dim(0), rows.size());
  const Placed<Replicated> doutput = boundary.leave_backward(dy, kTokens);
  const Placed<FeatureSharded> dhidden = row.backward_input(doutput);
  const Placed<Stream> dx = boundary.enter_backward(column.backward_input(dhidden));
  EXPECT_EQ(dx.tensor().dim(0), rows.size());
  row.backward_weight(doutput, hidden);
  column.backward_weight(dhidden, input);

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
  return {to_host(boundary.enter(y, kTokens).tensor()), to_host(boundary.enter(dx, kTokens).tensor()),
          to_host(dw1), to_host(dw2)};
}

void expect_near(const std::vector<double>& a, const std::vector<double>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-13);
}

template <class Stream>
void expect_any_split_equals_the_whole() {
  const Outcome expected = run<Replicated>(make_self_world());
  for (const int ranks : {1, 2, 3, 5, 7}) {
    run_local_world(ranks, [&](const Group& world) {
      const Outcome got = run<Stream>(world);
      expect_near(got.y, expected.y);
      expect_near(got.dx, expected.dx);
      expect_near(got.dw1, expected.dw1);
      expect_near(got.dw2, expected.dw2);
    });
  }
}

TEST(ParallelLinear, AnySplitEqualsTheWhole) { expect_any_split_equals_the_whole<Replicated>(); }

// Of seven ranks two have no token.
TEST(ParallelLinear, AnySplitEqualsTheWholeWithTokensDealtOut) {
  expect_any_split_equals_the_whole<SequenceSharded>();
}

TEST(StreamBoundary, AShardHasTheBitsOfItsRows) {
  for (const int ranks : {1, 2, 3, 7}) {
    run_local_world(ranks, [&](const Group& world) {
      Context context(DeviceKind::cpu);
      const auto term = [&](int64_t columns, uint64_t what) {
        return Placed<Partial>(whole(context, kTokens, columns, what + static_cast<uint64_t>(world.rank())));
      };
      const StreamBoundary<Replicated> replicated(context, world);
      const StreamBoundary<SequenceSharded> sharded(context, world);
      const Range rows = sharded.rows(kTokens);
      const auto all = replicated.leave_with(term(kWidth, 10), term(2, 20));
      const auto own = sharded.leave_with(term(kWidth, 10), term(2, 20));
      EXPECT_EQ(to_host(own.value.tensor()), to_host(all.value.tensor().rows(rows.begin, rows.end)));
      EXPECT_EQ(to_host(own.statistics.tensor()),
                to_host(all.statistics.tensor().rows(rows.begin, rows.end)));

      const Placed<SequenceSharded> vector(
          whole(context, kTokens, 1, 30).view({kTokens}).rows(rows.begin, rows.end));
      const auto gathered = sharded.leave_backward_with({own.value, vector, own.statistics}, kTokens);
      EXPECT_EQ(to_host(gathered[0].tensor()), to_host(all.value.tensor()));
      EXPECT_EQ(to_host(gathered[1].tensor()), to_host(whole(context, kTokens, 1, 30)));
      EXPECT_EQ(to_host(gathered[2].tensor()), to_host(all.statistics.tensor()));
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
