#include "normformer/ops/partial_attention.h"

#include <utility>

#include "normformer/ops/columns.h"

#include "attention_reference.h"
#include "instruction_sets.h"
#include "support.h"

namespace normformer::ops {
namespace {

// How context parallelism deals out a sequence: chunks `index` and 2 parts - 1 - index of 2 parts.
SequencePart part_of(int64_t length, int64_t parts, int64_t index) {
  return {even_part(length, 2 * parts, index), even_part(length, 2 * parts, 2 * parts - 1 - index)};
}

// The rows of a part of every sequence, of a tensor that has rows of `length` tokens each.
Tensor take_rows(Context& context, const Tensor& whole, int64_t length, const SequencePart& part) {
  const int64_t batch = whole.dim(0) / length;
  const Tensor taken = context.empty({batch * part.size(), whole.dim(1)}, whole.dtype());
  for (int64_t row = 0; row < taken.dim(0); ++row) {
    const int64_t from = row / part.size() * length + part.position_of(row % part.size());
    copy(context, whole.rows(from, from + 1), taken.rows(row, row + 1));
  }
  return taken;
}

void put_rows(Context& context, const Tensor& taken, int64_t length, const SequencePart& part,
              const Tensor& whole) {
  for (int64_t row = 0; row < taken.dim(0); ++row) {
    const int64_t to = row / part.size() * length + part.position_of(row % part.size());
    copy(context, taken.rows(row, row + 1), whole.rows(to, to + 1));
  }
}

std::vector<int32_t> starts_of_part(const Case& c, const SequencePart& part) {
  const std::vector<int32_t> whole = document_starts(c);
  std::vector<int32_t> starts;
  for (int64_t b = 0; b < c.shape.batch; ++b) {
    for (int64_t row = 0; row < part.size(); ++row)
      starts.push_back(whole[static_cast<size_t>(b * c.shape.length + part.position_of(row))]);
  }
  return starts;
}

PartialAttentionShape shape_of(const Case& c, const SequencePart& queries, const SequencePart& keys) {
  return {.batch = c.shape.batch,
          .length = c.shape.length,
          .queries = queries,
          .keys = keys,
          .heads = c.shape.heads,
          .head_size = c.shape.head_size,
          .first_head = c.shape.first_head,
          .causal = c.shape.causal};
}

// What one part has, computes and receives.
struct PartResults {
  SequencePart part;
  Tensor qkv, kv, starts, dout;
  Tensor sums, out, lse;
  Tensor dq, dkv, dqkv;
};

// The same results as attention's over the whole sequence, put together from parts: in the accumulator type
// where they are sums over blocks, and rounded.
struct Results {
  Tensor qkv, dout;
  Tensor out;
  std::vector<double> lse;  // [batch, heads, length]
  Tensor dqkv;
};

class Parts {
 public:
  Parts(Context& context, DType dtype, const Case& c, int64_t parts)
      : context_(context), dtype_(dtype), accumulator_(accumulator_of(dtype)), case_(c) {
    qkv_ = random_tensor(context, dtype, {c.tokens(), 3 * c.channels()}, 21);
    dout_ = random_tensor(context, dtype, {c.tokens(), c.channels()}, 22);
    for (int64_t i = 0; i < parts; ++i) parts_.push_back(make(part_of(c.shape.length, parts, i)));
  }

  // Each part meets the others' keys beginning with its own, and then backwards, as in a ring.
  Results run() {
    for (size_t i = 0; i < parts_.size(); ++i) {
      for (size_t step = 0; step < parts_.size(); ++step) forward(parts_[i], from(i, step));
      copy_rounded(parts_[i].sums, parts_[i].out);
    }
    for (size_t i = 0; i < parts_.size(); ++i) {
      for (size_t step = 0; step < parts_.size(); ++step) backward(parts_[i], from(i, step));
    }
    return collect();
  }

 private:
  PartResults make(const SequencePart& part) {
    PartResults p;
    const int64_t rows = case_.shape.batch * part.size();
    const int64_t channels = case_.channels();
    p.part = part;
    p.qkv = take_rows(context_, qkv_, case_.shape.length, part);
    p.dout = take_rows(context_, dout_, case_.shape.length, part);
    p.kv = context_.empty({rows, 2 * channels}, dtype_);
    copy_columns(context_, p.qkv, channels, p.kv, 0, 2 * channels);
    if (case_.documents) p.starts = from_host<int32_t>(context_, starts_of_part(case_, part), {rows});
    p.sums = context_.zeros({rows, channels}, accumulator_);
    p.out = context_.empty({rows, channels}, dtype_);
    const Shape lse{case_.shape.batch, case_.shape.heads, part.size()};
    p.lse = tensor_of(
        context_, accumulator_, lse,
        std::vector<double>(static_cast<size_t>(lse.numel()), -std::numeric_limits<double>::infinity()));
    p.dq = context_.zeros({rows, channels}, accumulator_);
    p.dkv = context_.zeros({rows, 2 * channels}, accumulator_);
    p.dqkv = context_.empty({rows, 3 * channels}, dtype_);
    return p;
  }

  PartResults& from(size_t part, size_t step) {
    return parts_[(part + parts_.size() - step) % parts_.size()];
  }

  void copy_rounded(const Tensor& sums, const Tensor& to) {
    if (to.numel() > 0) copy(context_, sums, to);
  }

  void forward(PartResults& mine, const PartResults& other) {
    partial_attention_forward(context_, shape_of(case_, mine.part, other.part), mine.qkv, other.kv,
                              mine.starts, dropout_of(case_), mine.sums, mine.lse);
  }

  void backward(PartResults& mine, PartResults& other) {
    partial_attention_backward(context_, shape_of(case_, mine.part, other.part), mine.dout, mine.qkv,
                               other.kv, mine.starts, dropout_of(case_), mine.out, mine.lse, mine.dq,
                               other.dkv);
  }

  Results collect() {
    const AttentionShape& s = case_.shape;
    Results r{qkv_, dout_, context_.zeros({case_.tokens(), case_.channels()}, dtype_),
              std::vector<double>(static_cast<size_t>(s.batch * s.heads * s.length)),
              context_.zeros({case_.tokens(), 3 * case_.channels()}, dtype_)};
    for (PartResults& p : parts_) {
      copy_columns(context_, p.dq, 0, p.dqkv, 0, case_.channels());
      copy_columns(context_, p.dkv, 0, p.dqkv, case_.channels(), 2 * case_.channels());
      put_rows(context_, p.out, s.length, p.part, r.out);
      put_rows(context_, p.dqkv, s.length, p.part, r.dqkv);
      if (p.lse.numel() == 0) continue;
      const std::vector<double> lse = to_host(p.lse);
      for (int64_t pair = 0; pair < s.batch * s.heads; ++pair) {
        for (int64_t row = 0; row < p.part.size(); ++row) {
          r.lse[static_cast<size_t>(pair * s.length + p.part.position_of(row))] =
              lse[static_cast<size_t>(pair * p.part.size() + row)];
        }
      }
    }
    return r;
  }

  Context& context_;
  DType dtype_;
  DType accumulator_;
  Case case_;
  Tensor qkv_;
  Tensor dout_;
  std::vector<PartResults> parts_;
};

void expect_reference(const std::vector<Case>& all, std::initializer_list<int64_t> degrees) {
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    const Real storage = unit_roundoff(dtype);
    for (const Case& c : all) {
      Reference want(c, storage, unit_roundoff(accumulator_of(dtype)), underflow(dtype));
      bool wanted = false;
      for (const int64_t parts : degrees) {
        const Results r = Parts(context, dtype, c, parts).run();
        if (!std::exchange(wanted, true)) {  // of the same numbers for every degree
          want.forward(reals(r.qkv));
          want.backward(reals(r.qkv), reals(r.dout));
        }
        const std::string name = name_of_case(dtype, c) + " in parts: " + std::to_string(parts);
        const Tensor lse =
            tensor_of(context, accumulator_of(dtype), {static_cast<int64_t>(r.lse.size())}, r.lse);
        expect_within(r.out, want.out, 0, "out, " + name);
        expect_within(lse, want.lse, 0, "lse, " + name);
        expect_within(r.dqkv, want.dqkv, storage, "dqkv, " + name);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

// Parts with empty runs, odd sizes, several blocks with a remainder, more channels than a GPU's block sums.
TEST(PartialAttention, PartsTogetherAreTheWhole) {
  const std::vector<AttentionShape> shapes{
      {.batch = 1, .length = 1, .heads = 1, .head_size = 1},
      {.batch = 2, .length = 5, .heads = 3, .head_size = 7, .first_head = 2},
      {.batch = 2, .length = 131, .heads = 2, .head_size = 16, .first_head = 4},
      {.batch = 1, .length = 170, .heads = 1, .head_size = 33},
      {.batch = 1, .length = 20, .heads = 1, .head_size = 130}};
  std::vector<Case> all;
  for (const AttentionShape& shape : shapes) {
    all.push_back({shape});
    all.push_back({shape, true});
    all.push_back({shape, false, 0.25});
    all.push_back({shape, true, 0.1});
    AttentionShape bidirectional = shape;
    bidirectional.causal = false;
    all.push_back({bidirectional});
    all.push_back({bidirectional, true, 0.1});
  }
  expect_reference(all, {1, 2, 3});
}

// Every head size that tensor-core kernels are made for, or are padded to, in lengths whose runs of keys
// begin at multiples of four and in others.
TEST(PartialAttention, WideHeads) {
  const std::vector<AttentionShape> shapes{{.batch = 1, .length = 160, .heads = 2, .head_size = 64},
                                           {.batch = 1, .length = 150, .heads = 1, .head_size = 72},
                                           {.batch = 1, .length = 128, .heads = 2, .head_size = 80},
                                           {.batch = 2, .length = 77, .heads = 1, .head_size = 96},
                                           {.batch = 1, .length = 192, .heads = 1, .head_size = 128}};
  std::vector<Case> all;
  for (const AttentionShape& shape : shapes) all.push_back({shape, true, 0.1});
  all.push_back({{.batch = 1, .length = 300, .heads = 1, .head_size = 64}});
  all.push_back({{.batch = 1, .length = 300, .heads = 1, .head_size = 64, .causal = false}, false, 0.1});
  expect_reference(all, {2});
}

TEST(PartialAttention, EveryInstructionSetComputesIt) {
  if (test_device() != DeviceKind::cpu) GTEST_SKIP() << "of the host's instructions";
  const AttentionShape shape{.batch = 2, .length = 67, .heads = 2, .head_size = 17, .first_head = 2};
  for_instruction_sets([&] { expect_reference({Case{shape}, Case{shape, true, 0.25}}, {2}); });
}

// All of it in one block gives the bits of attention, but for 16 bits' rounding once more.
TEST(PartialAttention, OneBlockIsAttention) {
  Context context(test_device());
  const Case c{{.batch = 2, .length = 70, .heads = 3, .head_size = 16, .first_head = 1}, true, 0.25};
  for (const DType dtype : {DType::f64, DType::f32}) {
    const Results r = Parts(context, dtype, c, 1).run();
    const Tensor starts = from_host<int32_t>(context, document_starts(c), {c.tokens()});
    const Tensor out = unwritten(context, dtype, {c.tokens(), c.channels()});
    const Tensor lse = unwritten(context, dtype, {2, 3, 70});
    const Tensor dqkv = unwritten(context, dtype, {c.tokens(), 3 * c.channels()});
    attention_forward(context, c.shape, r.qkv, starts, dropout_of(c), out, lse);
    attention_backward(context, c.shape, r.dout, r.qkv, starts, dropout_of(c), out, lse, dqkv);
    EXPECT_EQ(r.lse, to_host(lse));
    expect_close(r.out, reals(out), 4 * unit_roundoff(dtype), "out");
    expect_close(r.dqkv, reals(dqkv), 64 * unit_roundoff(dtype), "dqkv");
  }
}

TEST(PartialAttention, BitsDoNotDependOnTheNumberOfThreads) {
  for (const DType dtype : kFloatingTypes) {
    const Case c{{.batch = 1, .length = 300, .heads = 3, .head_size = 16}, true, 0.1};
    std::vector<std::vector<uint8_t>> first;
    for (const int threads : {1, 2, 3}) {
      Context context(test_device(), threads);
      const Results r = Parts(context, dtype, c, 2).run();
      const std::vector<std::vector<uint8_t>> bits{bytes_of(r.out), bytes_of(r.dqkv)};
      if (first.empty()) first = bits;
      EXPECT_EQ(bits, first) << threads << " threads, " << name_of(dtype);
    }
  }
}

TEST(PartialAttention, LaterKeysAreNotSeen) {
  Context context(test_device());
  const PartialAttentionShape shape{
      .length = 8, .queries = {{0, 2}, {3, 4}}, .keys = {{4, 6}, {7, 8}}, .head_size = 2};
  EXPECT_EQ(partial_attention_forward_flops(shape), 0);
  const Tensor qkv = random_tensor(context, DType::f32, {3, 6}, 1);
  const Tensor kv = random_tensor(context, DType::f32, {3, 4}, 2);
  const Tensor out = random_tensor(context, DType::f32, {3, 2}, 3);
  const Tensor lse = random_tensor(context, DType::f32, {1, 1, 3}, 4);
  const Tensor dq = random_tensor(context, DType::f32, {3, 2}, 5);
  const Tensor dkv = random_tensor(context, DType::f32, {3, 4}, 6);
  std::vector<std::vector<double>> before;
  for (const Tensor& t : {out, lse, dq, dkv}) before.push_back(to_host(t));
  partial_attention_forward(context, shape, qkv, kv, Tensor(), Dropout{}, out, lse);
  partial_attention_backward(context, shape, out, qkv, kv, Tensor(), Dropout{}, out, lse, dq, dkv);
  std::vector<std::vector<double>> after;
  for (const Tensor& t : {out, lse, dq, dkv}) after.push_back(to_host(t));
  EXPECT_EQ(after, before);
}

TEST(PartialAttention, CostsCountThePairsThatSeeEachOther) {
  const SequencePart queries{{2, 5}, {9, 13}};
  for (const SequencePart& keys : {queries, SequencePart{{0, 4}, {10, 16}}, SequencePart{{5, 9}, {13, 16}}}) {
    int64_t pairs = 0;
    for (int64_t q = 0; q < queries.size(); ++q) {
      for (int64_t k = 0; k < keys.size(); ++k)
        pairs += keys.position_of(k) <= queries.position_of(q) ? 1 : 0;
    }
    const PartialAttentionShape shape{
        .batch = 2, .length = 16, .queries = queries, .keys = keys, .heads = 3, .head_size = 5};
    EXPECT_EQ(partial_attention_forward_flops(shape), 4 * 5 * 6 * pairs);
    PartialAttentionShape bidirectional = shape;
    bidirectional.causal = false;
    EXPECT_EQ(partial_attention_forward_flops(bidirectional), 4 * 5 * 6 * queries.size() * keys.size());
  }
}

TEST(PartialAttention, MetaRecordsTheSameCosts) {
  for (const DType dtype : kFloatingTypes) {
    expect_same_costs_on_meta([&](Context& context) {
      const DType accumulator = accumulator_of(dtype);
      const PartialAttentionShape shape{.batch = 2,
                                        .length = 24,
                                        .queries = part_of(24, 2, 0),
                                        .keys = part_of(24, 2, 1),
                                        .heads = 3,
                                        .head_size = 4};
      const Tensor qkv = context.zeros({24, 36}, dtype);
      const Tensor kv = context.zeros({24, 24}, dtype);
      const Tensor starts = context.zeros({24}, DType::i32);
      const Tensor sums = context.zeros({24, 12}, accumulator);
      const Tensor dkv = context.zeros({24, 24}, accumulator);
      const Tensor out = context.zeros({24, 12}, dtype);
      const Tensor lse = context.zeros({2, 3, 12}, accumulator);
      copy_columns(context, qkv, 12, kv, 0, 24);
      partial_attention_forward(context, shape, qkv, kv, starts, Dropout{}, sums, lse);
      partial_attention_backward(context, shape, out, qkv, kv, starts, Dropout{}, out, lse, sums, dkv);
    });
  }
}

TEST(PartialAttention, ArgumentsThatDoNotFitAreRefused) {
  Context context(test_device());
  const PartialAttentionShape shape{.length = 4, .queries = {{0, 1}, {3, 4}}, .keys = {{1, 2}, {2, 3}}};
  const Tensor qkv = context.zeros({2, 3}, DType::bf16);
  const Tensor kv = context.zeros({2, 2}, DType::bf16);
  const Tensor out = context.zeros({2, 1}, DType::f32);
  const Tensor lse = context.zeros({1, 1, 2}, DType::f32);
  const auto forward = [&](const PartialAttentionShape& s, const Tensor& starts, const Tensor& to) {
    partial_attention_forward(context, s, qkv, kv, starts, Dropout{}, to, lse);
  };
  EXPECT_NO_THROW(forward(shape, Tensor(), out));
  EXPECT_THROW(forward(shape, Tensor(), context.zeros({2, 1}, DType::bf16)), LogicError);
  EXPECT_THROW(forward(shape, context.zeros({4}, DType::i32), out), LogicError);
  PartialAttentionShape twisted = shape;
  twisted.keys = {{2, 3}, {1, 2}};
  EXPECT_THROW(forward(twisted, Tensor(), out), LogicError);
  PartialAttentionShape beyond = shape;
  beyond.length = 3;
  EXPECT_THROW(forward(beyond, Tensor(), out), LogicError);
  if (test_device() == DeviceKind::cpu) {  // a GPU is not waited for to look at its documents
    EXPECT_THROW(forward(shape, from_host<int32_t>(context, std::vector<int32_t>{1, 0}, {2}), out),
                 LogicError);
  }
}

TEST(CopyColumns, RoundsWhatIsOfTheAccumulatorType) {
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    for (const DType from_type : {dtype, accumulator_of(dtype)}) {
      for (const int64_t first : {0, 3, 8}) {
        const Tensor from = random_tensor(context, from_type, {5, 24}, 1);
        const Tensor to = unwritten(context, dtype, {5, 32});
        std::vector<double> want = to_host(to);
        const std::vector<double> rounded = to_host(converted(context, from, dtype));
        copy_columns(context, from, 8, to, first, 16);
        for (size_t row = 0; row < 5; ++row) {
          for (size_t c = 0; c < 16; ++c)
            want[row * 32 + static_cast<size_t>(first) + c] = rounded[row * 24 + 8 + c];
        }
        EXPECT_EQ(to_host(to), want) << name_of(from_type) << " to " << name_of(dtype);
      }
    }
  }
  const Tensor wide = context.zeros({2, 4}, DType::f64);
  EXPECT_THROW(copy_columns(context, wide, 0, context.zeros({2, 4}, DType::bf16), 0, 4), LogicError);
  EXPECT_THROW(copy_columns(context, wide, 2, context.zeros({2, 4}, DType::f64), 0, 3), LogicError);
}

}  // namespace
}  // namespace normformer::ops
