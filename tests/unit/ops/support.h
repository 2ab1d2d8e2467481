#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "normformer/ops/dropout.h"
#include "normformer/tensor/context.h"

#include "test_device.h"

namespace normformer::ops {

/// References are computed in this: its rounding does not show next to a double's.
using Real = long double;
using Reals = std::vector<Real>;

/// The unit roundoff: the largest relative error of one rounding to nearest.
inline Real unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 0x1p-53L;
    case DType::f32:
      return 0x1p-24L;
    case DType::f16:
      return 0x1p-11L;
    default:
      return 0x1p-8L;
  }
}

/// The largest error of one rounding to nearest where that is relative no more: half the smallest subnormal
/// of f16; of other types nothing that a test comes near.
inline Real underflow(DType dtype) { return dtype == DType::f16 ? 0x1p-25L : 0.0L; }

/// n draws of N(0, 1) * scale + shift.
inline std::vector<double> normals(unsigned seed, int64_t n, double scale = 1.0, double shift = 0.0) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> distribution;
  std::vector<double> values(static_cast<size_t>(n));
  for (double& value : values) value = scale * distribution(engine) + shift;
  return values;
}

/// A tensor of `dtype` with `values` rounded to it.
inline Tensor tensor_of(Context& context, DType dtype, const Shape& shape,
                        const std::vector<double>& values) {
  const Tensor wide = from_host<double>(context, values, shape);
  const Tensor made = context.empty(shape, dtype);
  if (made.numel() > 0) copy(context, wide, made);
  return made;
}

inline Tensor random_tensor(Context& context, DType dtype, const Shape& shape, unsigned seed,
                            double scale = 1.0, double shift = 0.0) {
  return tensor_of(context, dtype, shape, normals(seed, shape.numel(), scale, shift));
}

/// A tensor of `dtype` filled with a number that shows where an operation did not write.
inline Tensor unwritten(Context& context, DType dtype, const Shape& shape) {
  return tensor_of(context, dtype, shape, std::vector<double>(static_cast<size_t>(shape.numel()), 1e30));
}

inline Tensor converted(Context& context, const Tensor& from, DType dtype) {
  const Tensor to = context.empty(from.shape(), dtype);
  if (to.numel() > 0) copy(context, from, to);
  return to;
}

inline Reals reals(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  const std::vector<double> values = to_host(tensor);
  return Reals(values.begin(), values.end());
}

inline std::vector<double> doubles(const Reals& values) {
  return std::vector<double>(values.begin(), values.end());
}

/// Every element within one rounding to its own type of `want`, plus `roundings` roundings in the accumulator
/// type of numbers as large as `magnitudes` (one for each element, or one for all).
inline void expect_rounded(const Tensor& got, const Reals& want, const Reals& magnitudes, Real roundings,
                           const std::string& what) {
  const Reals values = reals(got);
  ASSERT_EQ(values.size(), want.size()) << what;
  const Real own = unit_roundoff(got.dtype());
  const Real inner = unit_roundoff(accumulator_of(got.dtype()));
  for (size_t i = 0; i < want.size(); ++i) {
    const Real magnitude = magnitudes.size() == 1 ? magnitudes[0] : magnitudes[i];
    const Real inner_error = roundings * inner * magnitude;
    const Real bound = own * (std::abs(want[i]) + inner_error) + inner_error + underflow(got.dtype());
    ASSERT_LE(std::abs(values[i] - want[i]), bound)
        << what << " element " << i << ": " << static_cast<double>(values[i]) << " for "
        << static_cast<double>(want[i]);
  }
}

/// Every element within `relative` of the largest |want|.
inline void expect_close(const Tensor& got, const Reals& want, Real relative, const std::string& what) {
  const Reals values = reals(got);
  ASSERT_EQ(values.size(), want.size()) << what;
  Real largest = 1e-30L;
  for (const Real value : want) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_LE(std::abs(values[i] - want[i]), relative * largest)
        << what << " element " << i << ": " << static_cast<double>(values[i]) << " for "
        << static_cast<double>(want[i]);
  }
}

/// The gradient of loss() with respect to x by central differences of fourth order: for functions of order
/// one the error is near 1e-12.
template <class Loss>
Reals numeric_gradient(Reals& x, Loss&& loss) {
  constexpr Real kStep = 0x1p-10L;
  Reals gradient;
  for (Real& value : x) {
    const Real kept = value;
    const auto at = [&](int steps) {
      value = kept + static_cast<Real>(steps) * kStep;
      return loss();
    };
    gradient.push_back((8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * kStep));
    value = kept;
  }
  return gradient;
}

inline Real dot(const Reals& a, const Reals& b) {
  Real sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// What an element is multiplied by, read off dropout.h word for word.
inline Real dropout_multiplier(const Dropout& dropout, int64_t row, int64_t column) {
  if (!dropout.active()) return 1;
  const int64_t whole_row = dropout.first_row + row;
  const int64_t t = whole_row % dropout.rows_per_sample;
  const int64_t token =
      t < dropout.split ? dropout.first_token + t : dropout.second_token + (t - dropout.split);
  const int64_t sample = dropout.first_sample + whole_row / dropout.rows_per_sample;
  const int64_t i = token * dropout.row_elements + dropout.first_column + column;
  const uint32_t word = dropout.stream.words(static_cast<uint64_t>(i / 4),
                                             static_cast<uint64_t>(sample))[static_cast<size_t>(i % 4)];
  return static_cast<double>(word) >= dropout.probability * 0x1p32 ? 1 / (1 - Real(dropout.probability)) : 0;
}

/// A dropout whose rows begin inside a sample, whose samples are in two runs of tokens and whose columns are
/// not aligned to the generator's blocks.
inline Dropout odd_dropout(double probability, int64_t columns) {
  return Dropout{.probability = probability,
                 .stream = RandomStream{}.with(11).with("site"),
                 .first_sample = 5,
                 .first_row = 4,
                 .rows_per_sample = 3,
                 .first_token = 7,
                 .split = 2,
                 .second_token = 21,
                 .row_elements = columns + 6,
                 .first_column = 3};
}

inline std::vector<uint8_t> bytes_of(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  std::vector<uint8_t> bytes(static_cast<size_t>(tensor.nbytes()));
  tensor.copy_out(bytes.data());
  return bytes;
}

inline void expect_same_bits(const Tensor& got, const Tensor& want, const std::string& what) {
  EXPECT_TRUE(bytes_of(got) == bytes_of(want)) << what << " differs";
}

inline std::string name_of_case(DType dtype, int64_t rows, int64_t columns) {
  return std::string(name_of(dtype)) + " " + std::to_string(rows) + "x" + std::to_string(columns);
}

inline const std::vector<DType> kFloatingTypes{DType::f64, DType::f32, DType::bf16, DType::f16};

struct Extent {
  int64_t rows;
  int64_t columns;
};
/// One element, less than a vector, a vector and a bit, many vectors and more than one block of rows,
/// nothing.
inline const std::vector<Extent> kExtents{{1, 1}, {3, 5}, {7, 33}, {65, 770}, {33, 776}, {5, 5200}, {0, 8}};

/// The costs that `call` enters on meta and on cpu must be the same.
template <class Call>
void expect_same_costs_on_meta(Call&& call) {
  Context cpu(DeviceKind::cpu);
  Context meta(DeviceKind::meta);
  call(cpu);
  call(meta);
  ASSERT_FALSE(meta.costs().operations().empty());
  ASSERT_EQ(cpu.costs().operations().size(), meta.costs().operations().size());
  for (const auto& [name, cost] : cpu.costs().operations()) {
    const auto found = meta.costs().operations().find(name);
    ASSERT_NE(found, meta.costs().operations().end()) << name;
    EXPECT_EQ(found->second.calls, cost.calls) << name;
    EXPECT_EQ(found->second.flops, cost.flops) << name;
    EXPECT_EQ(found->second.bytes, cost.bytes) << name;
    EXPECT_GT(cost.bytes, 0) << name;
  }
  EXPECT_EQ(cpu.memory().report().peak_live, meta.memory().report().peak_live);
}

}  // namespace normformer::ops
