#include "normformer/ops/attention.h"

#include "attention_reference.h"
#include "instruction_sets.h"
#include "support.h"

namespace normformer::ops {
namespace {

// The operation's results for one case.
struct Results {
  Tensor qkv;
  Tensor dout;
  Tensor out;
  Tensor lse;
  Tensor dqkv;
};

Results run(Context& context, DType dtype, const Case& c) {
  Results r;
  const AttentionShape& s = c.shape;
  r.qkv = random_tensor(context, dtype, {c.tokens(), 3 * c.channels()}, 21);
  r.dout = random_tensor(context, dtype, {c.tokens(), c.channels()}, 22);
  r.out = unwritten(context, dtype, {c.tokens(), c.channels()});
  r.lse = unwritten(context, accumulator_of(dtype), {s.batch, s.heads, s.length});
  r.dqkv = unwritten(context, dtype, {c.tokens(), 3 * c.channels()});
  const Tensor starts =
      c.documents ? from_host<int32_t>(context, document_starts(c), {c.tokens()}) : Tensor();
  attention_forward(context, s, r.qkv, starts, dropout_of(c), r.out, r.lse);
  attention_backward(context, s, r.dout, r.qkv, starts, dropout_of(c), r.out, r.lse, r.dqkv);
  return r;
}

// Single tokens, odd sizes, several blocks with a remainder, several sequences and heads.
std::vector<Case> cases() {
  std::vector<Case> all;
  const std::vector<AttentionShape> shapes{
      {.batch = 1, .length = 1, .heads = 1, .head_size = 1},
      {.batch = 2, .length = 5, .heads = 3, .head_size = 7, .first_head = 2},
      {.batch = 1, .length = 131, .heads = 2, .head_size = 16, .first_head = 4},
      {.batch = 1, .length = 300, .heads = 1, .head_size = 33},
      {.batch = 2, .length = 70, .heads = 9, .head_size = 8},
      {.batch = 1, .length = 66, .heads = 1, .head_size = 64},
      {.batch = 1, .length = 20, .heads = 1, .head_size = 130}};
  for (AttentionShape shape : shapes) {
    for (const bool causal : {true, false}) {
      shape.causal = causal;
      all.push_back({shape});
      all.push_back({shape, true});
      all.push_back({shape, false, 0.25});
      all.push_back({shape, true, 0.1});
    }
  }
  return all;
}

/// Every head size that tensor-core kernels are made for, or are padded to, over more than one block of keys.
std::vector<Case> wide_heads() {
  std::vector<Case> all;
  const std::vector<AttentionShape> shapes{{.batch = 1, .length = 150, .heads = 1, .head_size = 72},
                                           {.batch = 1, .length = 100, .heads = 2, .head_size = 80},
                                           {.batch = 1, .length = 130, .heads = 1, .head_size = 96},
                                           {.batch = 2, .length = 77, .heads = 1, .head_size = 120},
                                           {.batch = 1, .length = 260, .heads = 1, .head_size = 128}};
  for (const AttentionShape& shape : shapes) all.push_back({shape, true, 0.1});
  return all;
}

void expect_reference(const std::vector<Case>& all) {
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    for (const Case& c : all) {
      const Results r = run(context, dtype, c);
      const Real storage = unit_roundoff(dtype);
      Reference want(c, storage, unit_roundoff(accumulator_of(dtype)), underflow(dtype));
      want.forward(reals(r.qkv));
      want.backward(reals(r.qkv), reals(r.dout));
      const std::string name = name_of_case(dtype, c);
      expect_within(r.out, want.out, 0, "out, " + name);
      expect_within(r.lse, want.lse, 0, "lse, " + name);
      expect_within(r.dqkv, want.dqkv, storage, "dqkv, " + name);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(Attention, IsWhatWholeMatricesOfProbabilitiesGive) { expect_reference(cases()); }

TEST(Attention, WideHeads) { expect_reference(wide_heads()); }

TEST(Attention, EveryInstructionSetComputesIt) {
  if (test_device() != DeviceKind::cpu) GTEST_SKIP() << "of the host's instructions";
  const AttentionShape shape{.batch = 2, .length = 67, .heads = 2, .head_size = 17, .first_head = 2};
  for_instruction_sets([&] { expect_reference({Case{shape}, Case{shape, true, 0.25}}); });
}

TEST(Attention, BackwardIsTheDerivativeOfForward) {
  Context context(test_device());
  const AttentionShape shape{.batch = 2, .length = 6, .heads = 2, .head_size = 3, .first_head = 1};
  for (const Case& c : {Case{shape}, Case{shape, true}, Case{shape, false, 0.4}, Case{shape, true, 0.3}}) {
    const Results r = run(context, DType::f64, c);
    Reals qkv = reals(r.qkv);
    const Reals dout = reals(r.dout);
    const Reals gradient = numeric_gradient(qkv, [&] {
      Reference reference(c);
      reference.forward(qkv);
      return dot(reference.out.values, dout);
    });
    expect_close(r.dqkv, gradient, 1e-10L, name_of_case(DType::f64, c));
  }
}

TEST(Attention, LargeScoresDoNotOverflow) {
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    // The last key outweighs the others by far in excess of what exp can hold.
    const Tensor qkv = tensor_of(context, dtype, {3, 3}, {1000, 1, 1, 1000, 2, 2, 1000, 3, 3});
    const Tensor out = unwritten(context, dtype, {3, 1});
    const Tensor lse = unwritten(context, accumulator_of(dtype), {1, 1, 3});
    attention_forward(context, {.length = 3}, qkv, Tensor(), Dropout{}, out, lse);
    EXPECT_EQ(to_host(out), (std::vector<double>{1, 2, 3}));
    EXPECT_EQ(to_host(lse), (std::vector<double>{1000, 2000, 3000}));
  }
}

TEST(Attention, BitsDoNotDependOnTheNumberOfThreads) {
  for (const DType dtype : kFloatingTypes) {
    for (const Case& c : {Case{{.batch = 1, .length = 300, .heads = 3, .head_size = 16}, true, 0.1},
                          Case{{.batch = 2, .length = 270, .heads = 1, .head_size = 24, .causal = false}}}) {
      std::vector<std::vector<uint8_t>> first;
      for (const int threads : {1, 1, 2, 3}) {
        Context context(test_device(), threads);
        const Results r = run(context, dtype, c);
        const std::vector<std::vector<uint8_t>> bits{bytes_of(r.out), bytes_of(r.lse), bytes_of(r.dqkv)};
        if (first.empty()) first = bits;
        EXPECT_EQ(bits, first) << threads << " threads, " << name_of_case(dtype, c);
      }
    }
  }
}

TEST(Attention, MasksAreThoseOfTheHeadsWhereverTheyAre) {
  // Heads 2 and 3 of four by themselves against the same heads among all four.
  Context context(test_device());
  const AttentionShape all{.batch = 2, .length = 37, .heads = 4, .head_size = 8};
  AttentionShape half = all;
  half.heads = 2;
  half.first_head = 2;
  const Case whole{all, false, 0.5};
  const Case part{half, false, 0.5};
  const Results w = run(context, DType::f64, whole);
  const std::vector<double> qkv = to_host(w.qkv);
  std::vector<double> part_qkv;
  for (int64_t row = 0; row < 3 * part.tokens(); ++row) {
    const auto from = qkv.begin() + row * whole.channels() + part.channels();
    part_qkv.insert(part_qkv.end(), from, from + part.channels());
  }
  const Tensor small = from_host<double>(context, part_qkv, {part.tokens(), 3 * part.channels()});
  const Tensor out = unwritten(context, DType::f64, {part.tokens(), part.channels()});
  const Tensor lse = unwritten(context, DType::f64, {2, 2, 37});
  attention_forward(context, half, small, Tensor(), dropout_of(part), out, lse);
  const std::vector<double> got = to_host(out);
  const std::vector<double> want = to_host(w.out);
  for (int64_t t = 0; t < part.tokens(); ++t) {
    for (int64_t c = 0; c < part.channels(); ++c) {
      ASSERT_DOUBLE_EQ(got[static_cast<size_t>(t * part.channels() + c)],
                       want[static_cast<size_t>(t * whole.channels() + part.channels() + c)]);
    }
  }
}

TEST(Attention, NothingIsAnAnswerToNothing) {
  Context context(test_device(), 2);
  for (const AttentionShape& shape : {AttentionShape{.batch = 0, .length = 4, .heads = 2, .head_size = 3},
                                      AttentionShape{.batch = 2, .length = 0, .heads = 2, .head_size = 3}}) {
    EXPECT_EQ(run(context, DType::f32, Case{shape}).out.numel(), 0);
  }
}

TEST(Attention, MetaRecordsTheSameCosts) {
  for (const DType dtype : kFloatingTypes) {
    expect_same_costs_on_meta([&](Context& context) {
      const AttentionShape shape{.batch = 2, .length = 140, .heads = 3, .head_size = 4};
      const Tensor qkv = context.zeros({280, 36}, dtype);
      const Tensor out = context.zeros({280, 12}, dtype);
      const Tensor lse = context.zeros({2, 3, 140}, accumulator_of(dtype));
      const Tensor starts = context.zeros({280}, DType::i32);
      attention_forward(context, shape, qkv, starts, Dropout{}, out, lse);
      attention_backward(context, shape, out, qkv, starts, Dropout{}, out, lse, qkv);
      const int64_t pairs = 2 * 3 * 140 * 141 / 2;
      EXPECT_EQ(attention_forward_flops(shape), 4 * 4 * pairs);
      EXPECT_EQ(context.costs().operations().at("attention_forward").flops, 4 * 4 * pairs);
      EXPECT_EQ(context.costs().operations().at("attention_backward").flops, 10 * 4 * pairs);
    });
  }
}

TEST(Attention, ArgumentsThatDoNotFitAreRefused) {
  Context context(test_device());
  const AttentionShape shape{.batch = 1, .length = 4, .heads = 1, .head_size = 2};
  const Tensor qkv = context.zeros({4, 6}, DType::f32);
  const Tensor out = context.zeros({4, 2}, DType::f32);
  const Tensor lse = context.zeros({1, 1, 4}, DType::f32);
  const auto forward = [&](const Tensor& starts, const Dropout& dropout, const Tensor& to) {
    attention_forward(context, shape, qkv, starts, dropout, to, lse);
  };
  EXPECT_NO_THROW(forward(Tensor(), Dropout{}, out));
  EXPECT_THROW(forward(Tensor(), Dropout{}, context.zeros({4, 3}, DType::f32)), LogicError);
  EXPECT_THROW(forward(Tensor(), Dropout{.probability = 1.0, .stream = {}}, out), LogicError);
  EXPECT_THROW(forward(context.zeros({3}, DType::i32), Dropout{}, out), LogicError);
  const std::vector<int32_t> later{0, 2, 2, 2};  // token 1 would attend to nothing
  if (test_device() == DeviceKind::cpu) {        // a GPU is not waited for to look at its documents
    EXPECT_THROW(forward(from_host<int32_t>(context, later, {4}), Dropout{}, out), LogicError);
  }
}

}  // namespace
}  // namespace normformer::ops
