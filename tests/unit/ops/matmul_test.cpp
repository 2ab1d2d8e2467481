#include "normformer/ops/matmul.h"

#include <algorithm>

#include <gmock/gmock.h>

#include "instruction_sets.h"
#include "ops/cpu/onednn.h"
#include "support.h"

namespace normformer::ops {
namespace {

struct Extents {
  int64_t n;
  int64_t k;
  int64_t m;
};

// Ones, odd numbers, nothing, the rows of a vocabulary, more than is packed at once in every direction, rows
// of a power of two.
const std::vector<Extents> kProducts{{1, 1, 1},      {3, 5, 7},      {0, 4, 5},       {5, 4, 0},
                                     {3, 0, 5},      {17, 33, 65},   {130, 3, 1},     {1, 768, 3},
                                     {2, 3, 50257},  {50257, 1, 3},  {600, 20, 1100}, {9, 1030, 5},
                                     {3, 40000, 33}, {40000, 3, 33}, {14, 5, 1024},   {1024, 15, 2048}};

std::string name_of_product(DType dtype, const Extents& e) {
  return std::string(name_of(dtype)) + " " + std::to_string(e.n) + "x" + std::to_string(e.k) + "x" +
         std::to_string(e.m);
}

// c[rows, columns] = start + the sum over p of a(i, p) b(p, j), and the sum of its terms' magnitudes.
struct Product {
  Reals values;
  Reals magnitudes;
};

template <class A, class B>
Product product(int64_t rows, int64_t inner, int64_t columns, const Reals& start, A&& a, B&& b) {
  Product made;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      Real sum = start.empty() ? 0 : start[static_cast<size_t>(i * columns + j)];
      Real magnitude = std::abs(sum);
      for (int64_t p = 0; p < inner; ++p) {
        const Real term = a(i, p) * b(p, j);
        sum += term;
        magnitude += std::abs(term);
      }
      made.values.push_back(sum);
      made.magnitudes.push_back(magnitude);
    }
  }
  return made;
}

Real at(const Reals& matrix, int64_t columns, int64_t i, int64_t j) {
  return matrix[static_cast<size_t>(i * columns + j)];
}

// A product and an addition round once a term, the bias once more.
Real roundings_of(int64_t inner) { return static_cast<Real>(2 * inner + 2); }

void expect_forward(const std::vector<Extents>& products) {
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    for (const Extents& e : products) {
      for (const bool with_bias : {false, true}) {
        const Tensor x = random_tensor(context, dtype, {e.n, e.k}, 1);
        const Tensor w = random_tensor(context, dtype, {e.m, e.k}, 2);
        const Tensor bias = with_bias ? random_tensor(context, dtype, {e.m}, 3) : Tensor();
        const Tensor y = unwritten(context, dtype, {e.n, e.m});
        linear_forward(context, x, w, bias, y);
        Reals start(static_cast<size_t>(e.n * e.m));
        if (with_bias) {
          const Reals b = reals(bias);
          for (size_t i = 0; i < start.size(); ++i) start[i] = b[i % static_cast<size_t>(e.m)];
        }
        const Reals xs = reals(x);
        const Reals ws = reals(w);
        const Product want = product(
            e.n, e.k, e.m, start, [&](int64_t i, int64_t p) { return at(xs, e.k, i, p); },
            [&](int64_t p, int64_t j) { return at(ws, e.k, j, p); });
        expect_rounded(y, want.values, want.magnitudes, roundings_of(e.k), name_of_product(dtype, e));
      }
    }
  }
}

void expect_backward_input(const std::vector<Extents>& products) {
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    for (const Extents& e : products) {
      const Tensor dy = random_tensor(context, dtype, {e.n, e.m}, 4);
      const Tensor w = random_tensor(context, dtype, {e.m, e.k}, 5);
      const Tensor dx = unwritten(context, dtype, {e.n, e.k});
      linear_backward_input(context, dy, w, dx);
      const Reals dys = reals(dy);
      const Reals ws = reals(w);
      const Product want = product(
          e.n, e.m, e.k, {}, [&](int64_t i, int64_t p) { return at(dys, e.m, i, p); },
          [&](int64_t p, int64_t j) { return at(ws, e.k, p, j); });
      expect_rounded(dx, want.values, want.magnitudes, roundings_of(e.m), name_of_product(dtype, e));
    }
  }
}

void expect_backward_weight(const std::vector<Extents>& products) {
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    for (const Extents& e : products) {
      const Tensor dy = random_tensor(context, dtype, {e.n, e.m}, 6);
      const Tensor x = random_tensor(context, dtype, {e.n, e.k}, 7);
      const Tensor dw = random_tensor(context, accumulator_of(dtype), {e.m, e.k}, 8);
      const Reals before = reals(dw);
      linear_backward_weight(context, dy, x, dw);
      const Reals dys = reals(dy);
      const Reals xs = reals(x);
      const Product want = product(
          e.m, e.n, e.k, before, [&](int64_t i, int64_t p) { return at(dys, e.m, p, i); },
          [&](int64_t p, int64_t j) { return at(xs, e.k, p, j); });
      expect_rounded(dw, want.values, want.magnitudes, roundings_of(e.n), name_of_product(dtype, e));
    }
  }
}

TEST(Matmul, ForwardIsTheProductWithTheTransposedWeightPlusBias) { expect_forward(kProducts); }

TEST(Matmul, BackwardInputIsTheProductWithTheWeight) { expect_backward_input(kProducts); }

TEST(Matmul, BackwardWeightAddsToTheMainGradient) { expect_backward_weight(kProducts); }

TEST(Matmul, EveryInstructionSetComputesIt) {
  if (test_device() != DeviceKind::cpu) GTEST_SKIP() << "of the host's instructions";
  const std::vector<Extents> products{{1, 1, 1}, {17, 33, 65}, {40, 7, 130}, {9, 1030, 5}};
  const std::string best = describe_matmul();
  for_instruction_sets([&] {
    EXPECT_NE(describe_matmul(), best);
    expect_forward(products);
    expect_backward_input(products);
    expect_backward_weight(products);
  });
}

// What takes over products of bf16 where the processor has matrix tiles.
template <class Out>
void expect_library_gemm(const cpu::GemmShape& shape, bool with_bias) {
  Context context(DeviceKind::cpu);
  const DType out = dtype_of<Out>();
  const Tensor a = random_tensor(context, DType::bf16, {shape.m, shape.k}, 11);
  const Tensor b = random_tensor(context, DType::bf16, {shape.n, shape.k}, 12);
  const Tensor bias = random_tensor(context, out, {shape.n}, 13);
  const Tensor c = random_tensor(context, out, {shape.m, shape.n}, 14);
  const Reals before = reals(c);
  const Reals added = reals(bias);
  cpu::onednn::bf16_gemm(shape, a.data<bf16>(), b.data<bf16>(), with_bias ? bias.data<Out>() : nullptr,
                         c.data<Out>());
  Reals start(before.size());
  for (size_t i = 0; i < start.size(); ++i) {
    if (shape.accumulate) start[i] += before[i];
    if (with_bias) start[i] += added[i % static_cast<size_t>(shape.n)];
  }
  const Reals as = reals(a);
  const Reals bs = reals(b);
  const Product want = product(
      shape.m, shape.k, shape.n, start, [&](int64_t i, int64_t p) { return at(as, shape.k, i, p); },
      [&](int64_t p, int64_t j) { return at(bs, shape.k, j, p); });
  expect_rounded(c, want.values, want.magnitudes, roundings_of(shape.k), "oneDNN");
}

TEST(Matmul, TheLibraryComputesTheSame) {
  if (!cpu::onednn::has_native_bf16()) GTEST_SKIP() << "without oneDNN, or without instructions for bf16";
  cpu::GemmShape shape{.m = 37, .n = 29, .k = 51, .lda = 51, .ldb = 51, .ldc = 29, .transpose_b = true};
  expect_library_gemm<bf16>(shape, false);
  expect_library_gemm<bf16>(shape, true);
  expect_library_gemm<float>(shape, true);
  shape.accumulate = true;
  expect_library_gemm<float>(shape, false);
}

TEST(Matmul, ColumnSumsAddToTheBiasGradient) {
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    for (const Extents& e : kProducts) {
      const Tensor x = random_tensor(context, dtype, {e.n, e.m}, 9);
      const Tensor out = random_tensor(context, accumulator_of(dtype), {e.m}, 10);
      const Reals before = reals(out);
      add_column_sums(context, x, out);
      const Reals xs = reals(x);
      const Product want = product(
          1, e.n, e.m, before, [](int64_t, int64_t) { return Real{1}; },
          [&](int64_t p, int64_t j) { return at(xs, e.m, p, j); });
      expect_rounded(out, want.values, want.magnitudes, static_cast<Real>(e.n + 2),
                     name_of_product(dtype, e));
    }
  }
}

std::vector<std::vector<uint8_t>> all_products(int threads, DType dtype, const Extents& e) {
  Context context(test_device(), threads);
  const Tensor x = random_tensor(context, dtype, {e.n, e.k}, 1);
  const Tensor w = random_tensor(context, dtype, {e.m, e.k}, 2);
  const Tensor bias = random_tensor(context, dtype, {e.m}, 3);
  const Tensor y = context.empty({e.n, e.m}, dtype);
  const Tensor dx = context.empty({e.n, e.k}, dtype);
  const Tensor dw = random_tensor(context, accumulator_of(dtype), {e.m, e.k}, 4);
  const Tensor db = random_tensor(context, accumulator_of(dtype), {e.m}, 5);
  linear_forward(context, x, w, bias, y);
  linear_backward_input(context, y, w, dx);
  linear_backward_weight(context, y, x, dw);
  add_column_sums(context, y, db);
  return {bytes_of(y), bytes_of(dx), bytes_of(dw), bytes_of(db)};
}

TEST(Matmul, BitsDoNotDependOnTheNumberOfThreads) {
  for (const DType dtype : kFloatingTypes) {
    for (const Extents& e : {Extents{1500, 70, 1300}, Extents{33, 768, 2304}, Extents{1, 65, 3001}}) {
      const auto one = all_products(1, dtype, e);
      EXPECT_EQ(one, all_products(1, dtype, e)) << "the same call twice, " << name_of_product(dtype, e);
      EXPECT_EQ(one, all_products(2, dtype, e)) << name_of_product(dtype, e);
      EXPECT_EQ(one, all_products(3, dtype, e)) << name_of_product(dtype, e);
    }
  }
}

// What a token gets does not depend on which others are in the batch with it.
TEST(Matmul, BitsOfARowDoNotDependOnTheOtherRows) {
  if (test_device() != DeviceKind::cpu) GTEST_SKIP() << "cuBLASLt goes by the number of rows, too";
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    const Tensor x = random_tensor(context, dtype, {131, 1300}, 1);
    const Tensor w = random_tensor(context, dtype, {77, 1300}, 2);
    const Tensor bias = random_tensor(context, dtype, {77}, 3);
    const Tensor y = context.empty({131, 77}, dtype);
    const Tensor part = context.empty({8, 77}, dtype);
    linear_forward(context, x, w, bias, y);
    linear_forward(context, x.rows(120, 128), w, bias, part);
    EXPECT_EQ(bytes_of(part), bytes_of(y.rows(120, 128))) << name_of(dtype);
  }
}

TEST(Matmul, MetaRecordsTheSameCosts) {
  for (const DType dtype : kFloatingTypes) {
    expect_same_costs_on_meta([&](Context& context) {
      const Tensor x = context.empty({6, 5}, dtype);
      const Tensor w = context.empty({7, 5}, dtype);
      const Tensor y = context.empty({6, 7}, dtype);
      const Tensor dw = context.empty({7, 5}, accumulator_of(dtype));
      const Tensor db = context.empty({7}, accumulator_of(dtype));
      linear_forward(context, x, w, Tensor(), y);
      linear_backward_input(context, y, w, x);
      linear_backward_weight(context, y, x, dw);
      add_column_sums(context, y, db);
      EXPECT_EQ(context.costs().operations().at("linear_forward").flops, 2 * 6 * 5 * 7);
      EXPECT_EQ(context.costs().operations().at("linear_backward_input").flops, 2 * 6 * 5 * 7);
      EXPECT_EQ(context.costs().operations().at("linear_backward_weight").flops, 2 * 6 * 5 * 7);
    });
  }
}

TEST(Matmul, ArgumentsThatDoNotFitAreRefused) {
  Context context(test_device());
  const Tensor x = context.zeros({2, 3}, DType::f32);
  const Tensor w = context.zeros({4, 3}, DType::f32);
  const Tensor y = context.zeros({2, 4}, DType::f32);
  EXPECT_THROW(linear_forward(context, x, y, Tensor(), w), LogicError);
  EXPECT_THROW(linear_forward(context, x, w, context.zeros({3}, DType::f32), y), LogicError);
  EXPECT_THROW(linear_forward(context, x, context.zeros({4, 3}, DType::bf16), Tensor(), y), LogicError);
  EXPECT_THROW(linear_backward_weight(context, context.zeros({2, 4}, DType::bf16),
                                      context.zeros({2, 3}, DType::bf16), context.zeros({4, 3}, DType::bf16)),
               LogicError);
  EXPECT_THROW(linear_backward_input(context, Tensor(), w, x), LogicError);
  EXPECT_THROW(add_column_sums(context, x, context.zeros({2}, DType::f32)), LogicError);
}

TEST(Matmul, SaysWhatItRunsOn) {
  EXPECT_THAT(describe_matmul(), ::testing::StartsWith("own kernels, "));
  EXPECT_EQ(has_native_bf16(), describe_matmul().find("bf16") != std::string::npos);
}

}  // namespace
}  // namespace normformer::ops
