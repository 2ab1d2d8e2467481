#include "normformer/ops/embedding.h"

#include "support.h"

namespace normformer::ops {
namespace {

Tensor tokens_of(Context& context, const std::vector<int32_t>& ids) {
  return from_host<int32_t>(context, ids, {static_cast<int64_t>(ids.size())});
}

TEST(Embedding, RowsOfThisRankAreCopiedAndOthersAreZero) {
  for (const DType dtype : kFloatingTypes) {
    Context context(test_device(), 2);
    const Tensor weight = random_tensor(context, dtype, {4, 33}, 1);
    const Tensor tokens = tokens_of(context, {10, 9, 13, 14, 12, 10, 0});
    const Tensor out = unwritten(context, dtype, {7, 33});
    embedding_forward(context, tokens, weight, 10, out);
    const Reals rows = reals(weight);
    const std::vector<int> held{0, -1, 3, -1, 2, 0, -1};
    const Reals got = reals(out);
    for (size_t n = 0; n < held.size(); ++n) {
      for (size_t c = 0; c < 33; ++c) {
        const Real want = held[n] < 0 ? 0 : rows[static_cast<size_t>(held[n]) * 33 + c];
        EXPECT_EQ(got[n * 33 + c], want);
      }
    }
  }
}

TEST(Embedding, ANegativeTokenIsRefused) {
  Context context(test_device());
  const Tensor weight = context.zeros({4, 3}, DType::f32);
  const Tensor out = context.zeros({2, 3}, DType::f32);
  if (test_device() != DeviceKind::cpu) GTEST_SKIP() << "a GPU is not waited for to look at its tokens";
  EXPECT_THROW(embedding_forward(context, tokens_of(context, {1, -1}), weight, 0, out), LogicError);
  EXPECT_THROW(embedding_backward(context, tokens_of(context, {1, -1}), out, 1.0, 0, weight), LogicError);
}

TEST(Embedding, BackwardAddsRowsInTheOrderOfTokens) {
  for (const DType dtype : kFloatingTypes) {
    for (const int threads : {1, 2, 3}) {
      Context context(test_device(), threads);
      const DType sums = accumulator_of(dtype);
      const int64_t width = 770;
      std::vector<int32_t> ids;
      for (int32_t i = 0; i < 65; ++i) ids.push_back((i * i + i / 7) % 11);
      const Tensor dout = random_tensor(context, dtype, {65, width}, 1);
      const Tensor dweight = random_tensor(context, sums, {5, width}, 2);
      const double factor = 0.25;  // a power of two: multiplying is exact, so the order alone makes the bits
      std::vector<double> want = to_host(dweight);
      const std::vector<double> d = to_host(dout);
      for (size_t n = 0; n < ids.size(); ++n) {
        const int row = ids[n] - 3;
        if (row < 0 || row >= 5) continue;
        for (size_t c = 0; c < 770; ++c) {
          double& sum = want[static_cast<size_t>(row) * 770 + c];
          sum += factor * d[n * 770 + c];
          if (sums == DType::f32) sum = static_cast<float>(sum);
        }
      }
      embedding_backward(context, tokens_of(context, ids), dout, factor, 3, dweight);
      EXPECT_TRUE(to_host(dweight) == want) << name_of(dtype);
    }
  }
}

TEST(Positions, ForwardAndBackwardMatchTheFormulas) {
  for (const double probability : {0.0, 0.3}) {
    for (const DType dtype : kFloatingTypes) {
      for (const int64_t width : {1, 5, 33, 770}) {
        Context context(test_device(), 2);
        const DType sums = accumulator_of(dtype);
        const int64_t length = 4;
        const int64_t rows = 3 * length;
        const Dropout dropout = odd_dropout(probability, width);
        const double factor = std::sqrt(static_cast<double>(width));
        const Tensor embedded = random_tensor(context, dtype, {rows, width}, 1, 0.2);
        const Tensor positions = random_tensor(context, dtype, {length, width}, 2);
        const Tensor dout = random_tensor(context, dtype, {rows, width}, 3);
        const Tensor out = unwritten(context, dtype, {rows, width});
        const Tensor dsum = unwritten(context, dtype, {rows, width});
        const Tensor dpositions = random_tensor(context, sums, {length, width}, 4);
        const Reals e = reals(embedded);
        const Reals p = reals(positions);
        const Reals d = reals(dout);
        Reals want;
        Reals dsum_want;
        Reals dpositions_want = reals(dpositions);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < width; ++c) {
            const auto i = static_cast<size_t>(r * width + c);
            const auto at = static_cast<size_t>(r % length * width + c);
            const Real kept = dropout_multiplier(dropout, r, c);
            want.push_back(kept * (Real(factor) * e[i] + p[at]));
            dsum_want.push_back(kept * d[i]);
            dpositions_want[at] += kept * d[i];
          }
        }
        add_positions_forward(context, embedded, factor, positions, 0, dropout, out);
        add_positions_backward(context, dout, length, 0, dropout, dsum, dpositions);
        const std::string what = name_of_case(dtype, rows, width);
        // |embedded| < 1 times the factor, rounded itself, and |position| < 5, divided by 0.7.
        expect_rounded(out, want, {2 * Real(factor) + 8}, 4, what + " out");
        expect_rounded(dsum, dsum_want, {8}, 3, what + " dsum");
        expect_rounded(dpositions, dpositions_want, {32}, 8, what + " dpositions");
        // Without learned positions, and in place.
        add_positions_backward(context, dout, length, 0, dropout, dout, Tensor());
        expect_same_bits(dout, dsum, "dsum in place");
        add_positions_forward(context, embedded, factor, positions, 0, dropout, embedded);
        expect_same_bits(embedded, out, "out in place");
      }
    }
  }
}

// Rows cut anywhere, also inside a sequence, are treated as they are in the whole.
TEST(Positions, ShardsOfRowsEqualTheWhole) {
  for (const double probability : {0.0, 0.3}) {
    for (const int64_t width : {5, 64}) {
      Context context(test_device(), 2);
      const int64_t length = 4;
      const int64_t rows = 3 * length;
      Dropout dropout = odd_dropout(probability, width);
      const int64_t before = dropout.first_row;
      const Tensor embedded = random_tensor(context, DType::f64, {rows, width}, 1);
      const Tensor positions = random_tensor(context, DType::f64, {length, width}, 2);
      const Tensor whole = unwritten(context, DType::f64, {rows, width});
      const Tensor dwhole = unwritten(context, DType::f64, {rows, width});
      const Tensor dpositions = context.zeros({length, width}, DType::f64);
      add_positions_forward(context, embedded, 2.0, positions, 0, dropout, whole);
      add_positions_backward(context, embedded, length, 0, dropout, dwhole, dpositions);
      const Tensor sums = context.zeros({length, width}, DType::f64);
      for (const Range cut : {Range{0, 0}, Range{0, 6}, Range{6, 7}, Range{7, 11}, Range{11, 12}}) {
        const Tensor part = embedded.rows(cut.begin, cut.end);
        const Tensor out = unwritten(context, DType::f64, {cut.size(), width});
        dropout.first_row = before + cut.begin;
        add_positions_forward(context, part, 2.0, positions, cut.begin, dropout, out);
        expect_same_bits(out, whole.rows(cut.begin, cut.end), "out");
        add_positions_backward(context, part, length, cut.begin, dropout, out, sums);
        expect_same_bits(out, dwhole.rows(cut.begin, cut.end), "dsum");
      }
      const std::vector<double> got = to_host(sums);
      const std::vector<double> want = to_host(dpositions);
      for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-13);
    }
  }
}

TEST(Positions, TheBitsDoNotDependOnThreads) {
  std::vector<Tensor> sums;
  for (const int threads : {1, 2, 3}) {
    Context context(test_device(), threads);
    const Tensor dout = random_tensor(context, DType::f32, {90, 77}, 1);
    const Tensor dpositions = context.zeros({30, 77}, DType::f32);
    add_positions_backward(context, dout, 30, 0, odd_dropout(0.3, 77), dout, dpositions);
    sums.push_back(dpositions);
    expect_same_bits(sums.back(), sums.front(), "dpositions");
  }
}

TEST(Positions, SinusoidsAreFairseqs) {
  Context context(test_device());
  const Tensor table = sinusoidal_positions(context, 3, 5, DType::f64);
  // Two frequencies, 1 and exp(-ln 10000); the first token is position 2; sines, then cosines, then a zero.
  const std::vector<double> want{
      0.9092974268256817,  0.00019999999866666666, -0.4161468365471424, 0.99999998,  0,
      0.1411200080598672,  0.0002999999955,        -0.9899924966004454, 0.999999955, 0,
      -0.7568024953079282, 0.00039999998933333342, -0.6536436208636119, 0.99999992,  0};
  const std::vector<double> got = to_host(table);
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-15) << i;
  EXPECT_THROW(sinusoidal_positions(context, 3, 3, DType::f32), LogicError);
}

TEST(Embedding, MetaCountsAlike) {
  expect_same_costs_on_meta([](Context& context) {
    const Tensor tokens = context.empty({12}, DType::i32);
    if (!context.is_meta()) std::fill_n(tokens.data<int32_t>(), 12, 1);
    const Tensor weight = context.empty({7, 5}, DType::bf16);
    const Tensor dweight = context.empty({7, 5}, DType::f32);
    const Tensor x = context.empty({12, 5}, DType::bf16);
    const Tensor table = sinusoidal_positions(context, 4, 5, DType::bf16);
    const Tensor dtable = context.empty({4, 5}, DType::f32);
    embedding_forward(context, tokens, weight, 0, x);
    add_positions_forward(context, x, 2.0, table, 0, odd_dropout(0.1, 5), x);
    add_positions_backward(context, x, 4, 0, odd_dropout(0.1, 5), x, dtable);
    embedding_backward(context, tokens, x, 1.0, 0, dweight);
  });
}

}  // namespace
}  // namespace normformer::ops
