#include "normformer/sharding/parameter_piece.h"

#include <gtest/gtest.h>

#include "normformer/tensor/context.h"

namespace normformer {
namespace {

TEST(GatherLogical, PutsColumnPartsAndRunsInPlace) {
  // Two ranks hold columns of a [3, 5] matrix; rank 0's part in two runs. Element (r, c) has the value 10 r +
  // c.
  run_local_world(2, [](const Group& world) {
    Context context(DeviceKind::cpu);
    Parameter w;
    w.spec.name = "w";
    w.spec.logical_shape = {3, 5};
    const Range columns = world.rank() == 0 ? Range{0, 2} : Range{2, 5};
    w.spec.part = {{0, 3}, columns, 3, 5};
    std::vector<double> values;
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t c = columns.begin; c < columns.end; ++c) values.push_back(static_cast<double>(10 * r + c));
    }
    const Tensor mine = from_host<double>(context, values, {w.numel()});
    std::vector<ParameterPiece> pieces;
    if (world.rank() == 0) {
      pieces.push_back({&w, {3, 6}, mine.flat(3, 3)});
      pieces.push_back({&w, {0, 3}, mine.flat(0, 3)});
    } else {
      pieces.push_back({&w, {0, 9}, mine});
    }
    Parameter bias;
    bias.spec.name = "bias";
    bias.spec.logical_shape = {2};
    bias.spec.part = {{0, 2}, {0, 1}, 2, 1};
    const Tensor bias_values = context.zeros({2}, DType::f64);
    if (world.rank() == 1) pieces.push_back({&bias, {0, 2}, bias_values});
    std::vector<std::string> names;
    gather_logical(context, world, pieces, DType::f64, 0, [&](const std::string& name, const Tensor& whole) {
      names.push_back(name);
      if (name == "bias") {
        EXPECT_EQ(whole.shape(), Shape({2}));
        return;
      }
      ASSERT_EQ(whole.shape(), Shape({3, 5}));
      for (int64_t i = 0; i < 15; ++i)
        EXPECT_EQ(whole.data<double>()[i], static_cast<double>(10 * (i / 5) + i % 5));
    });
    EXPECT_EQ(names,
              (world.rank() == 0 ? std::vector<std::string>{"bias", "w"} : std::vector<std::string>{}));
  });
}

}  // namespace
}  // namespace normformer
