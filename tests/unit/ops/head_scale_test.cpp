#include "normformer/ops/head_scale.h"

#include "support.h"

namespace normformer::ops {
namespace {

struct Heads {
  int64_t rows, heads, size;
};
const std::vector<Heads> kHeads{{1, 1, 1}, {3, 5, 1}, {7, 3, 11}, {65, 12, 64}, {0, 2, 4}, {65, 1, 770}};

struct Outputs {
  Tensor y, dx, dscales;
};

Outputs run(Context& context, DType dtype, const Heads& shape, const Tensor& x, const Tensor& scales,
            const Tensor& dy) {
  Outputs out{unwritten(context, dtype, x.shape()), unwritten(context, dtype, x.shape()),
              context.zeros({shape.heads}, accumulator_of(dtype))};
  head_scale_forward(context, x, scales, out.y);
  head_scale_backward(context, dy, x, scales, out.dx, out.dscales);
  return out;
}

TEST(HeadScale, ForwardAndBackwardMatchTheFormulas) {
  for (const DType dtype : kFloatingTypes) {
    for (const Heads& shape : kHeads) {
      Context context(test_device(), 2);
      const int64_t columns = shape.heads * shape.size;
      const Tensor x = random_tensor(context, dtype, {shape.rows, columns}, 1);
      const Tensor dy = random_tensor(context, dtype, {shape.rows, columns}, 2);
      const Tensor scales = random_tensor(context, dtype, {shape.heads}, 3, 0.3, 1.0);
      const Outputs out = run(context, dtype, shape, x, scales, dy);
      const Reals in = reals(x);
      const Reals d = reals(dy);
      const Reals s = reals(scales);
      Reals y;
      Reals dx;
      Reals dscales(s.size());
      for (size_t i = 0; i < in.size(); ++i) {
        const auto head = i % static_cast<size_t>(columns) / static_cast<size_t>(shape.size);
        y.push_back(in[i] * s[head]);
        dx.push_back(d[i] * s[head]);
        dscales[head] += in[i] * d[i];
      }
      const std::string what = name_of_case(dtype, shape.rows, columns);
      expect_rounded(out.y, y, {8}, 1, what + " y");
      expect_rounded(out.dx, dx, {8}, 1, what + " dx");
      // One after the other: a block's rows, its channels, the blocks; terms below 16.
      const auto terms = static_cast<Real>(shape.rows * shape.size);
      expect_rounded(out.dscales, dscales, {16 * (terms + 1)}, static_cast<Real>(16 + shape.size) + 8, what);
    }
  }
}

TEST(HeadScale, InPlaceAndOnAnyNumberOfThreadsTheBitsAreTheSame) {
  const Heads shape{65, 12, 64};
  for (const DType dtype : kFloatingTypes) {
    std::vector<Outputs> all;
    for (const int threads : {1, 2, 3}) {
      Context context(test_device(), threads);
      const Tensor x = random_tensor(context, dtype, {65, 768}, 1);
      const Tensor dy = random_tensor(context, dtype, {65, 768}, 2);
      const Tensor scales = random_tensor(context, dtype, {12}, 3);
      all.push_back(run(context, dtype, shape, x, scales, dy));
      expect_same_bits(all.back().dscales, all.front().dscales, "all.back().dscales");
      head_scale_backward(context, dy, x, scales, dy, context.zeros({12}, accumulator_of(dtype)));
      expect_same_bits(dy, all.front().dx, "dy");
      head_scale_forward(context, x, scales, x);
      expect_same_bits(x, all.front().y, "x");
    }
  }
}

TEST(HeadScale, MetaCountsAlikeAndUnequalHeadsAreRefused) {
  expect_same_costs_on_meta([](Context& context) {
    const Tensor x = context.empty({7, 12}, DType::bf16);
    const Tensor scales = context.empty({3}, DType::bf16);
    head_scale_forward(context, x, scales, x);
    head_scale_backward(context, x, x, scales, x, context.empty({3}, DType::f32));
  });
  Context context(DeviceKind::cpu);
  const Tensor x = context.zeros({7, 12}, DType::f32);
  EXPECT_THROW(head_scale_forward(context, x, context.zeros({5}, DType::f32), x), LogicError);
}

}  // namespace
}  // namespace normformer::ops
