#include "normformer/ops/attention.h"

#include <limits>

#include "instruction_sets.h"
#include "support.h"

namespace normformer::ops {
namespace {

constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

struct Case {
  AttentionShape shape;
  bool documents = false;
  double dropout = 0.0;

  int64_t tokens() const { return shape.batch * shape.length; }
  int64_t channels() const { return shape.heads * shape.head_size; }
};

std::string name_of_case(DType dtype, const Case& c) {
  return std::string(name_of(dtype)) + " batch " + std::to_string(c.shape.batch) + " length " +
         std::to_string(c.shape.length) + " heads " + std::to_string(c.shape.heads) + " size " +
         std::to_string(c.shape.head_size) + (c.shape.causal ? " causal" : "") +
         (c.documents ? " documents" : "") + " dropout " + std::to_string(c.dropout);
}

Dropout dropout_of(const Case& c) {
  return {.probability = c.dropout, .stream = RandomStream{}.with(3).with("attention"), .first_sample = 6};
}

// Documents of growing lengths, cut differently in every sequence.
std::vector<int32_t> document_starts(const Case& c) {
  std::vector<int32_t> starts;
  for (int64_t b = 0; b < c.shape.batch; ++b) {
    int64_t start = 0;
    int64_t size = 1 + b;
    for (int64_t t = 0; t < c.shape.length; ++t) {
      if (t == start + size) {
        start = t;
        size = 2 * size + 3;
      }
      starts.push_back(static_cast<int32_t>(start));
    }
  }
  return starts;
}

// Attention with whole matrices of probabilities, in Real; and for every result a bound on what rounding may
// do to it: `own` is the unit roundoff of the element type, in which the operation keeps what it feeds into
// products, `inner` that of the accumulator type.
class Reference {
 public:
  struct Bounded {
    Reals values;
    Reals errors;
    explicit Bounded(int64_t n) : values(static_cast<size_t>(n)), errors(static_cast<size_t>(n)) {}
  };

  explicit Reference(const Case& c, Real own = 0, Real inner = 0, Real underflow = 0)
      : case_(c),
        own_(own > inner ? own : 0),  // nothing is narrowed where both types are one
        storage_(own),
        inner_(inner),
        underflow_(underflow),
        starts_(document_starts(c)),
        out(c.tokens() * c.channels()),
        lse(c.shape.batch * c.shape.heads * c.shape.length),
        dqkv(3 * c.tokens() * c.channels()) {}

  void forward(const Reals& qkv) {
    for_heads([&](int64_t b, int64_t h) { forward_head(qkv, b, h); });
  }

  // forward() comes first.
  void backward(const Reals& qkv, const Reals& dout) {
    for_heads([&](int64_t b, int64_t h) { backward_head(qkv, dout, b, h); });
  }

 private:
  const Case case_;
  const Real own_;
  const Real storage_;
  const Real inner_;
  const Real underflow_;
  std::vector<int32_t> starts_;

 public:
  Bounded out;
  Bounded lse;
  Bounded dqkv;

 private:
  const AttentionShape& shape() const { return case_.shape; }
  Real length() const { return static_cast<Real>(shape().length); }
  Real size() const { return static_cast<Real>(shape().head_size); }
  Real scale() const { return 1 / std::sqrt(size()); }

  template <class Body>
  void for_heads(Body&& body) {
    for (int64_t b = 0; b < shape().batch; ++b) {
      for (int64_t h = 0; h < shape().heads; ++h) body(b, h);
    }
  }

  size_t at(int part, int64_t b, int64_t t, int64_t h, int64_t c) const {
    return static_cast<size_t>((b * shape().length + t) * 3 * case_.channels() + part * case_.channels() +
                               h * shape().head_size + c);
  }
  size_t out_at(int64_t b, int64_t t, int64_t h, int64_t c) const {
    return static_cast<size_t>((b * shape().length + t) * case_.channels() + h * shape().head_size + c);
  }
  size_t lse_at(int64_t b, int64_t t, int64_t h) const {
    return static_cast<size_t>((b * shape().heads + h) * shape().length + t);
  }

  bool sees(int64_t b, int64_t q, int64_t k) const {
    if (shape().causal && k > q) return false;
    return !case_.documents || k >= starts_[static_cast<size_t>(b * shape().length + q)];
  }

  Real multiplier(int64_t b, int64_t h, int64_t q, int64_t k) const {
    if (case_.dropout == 0.0) return 1;
    const Dropout dropout = dropout_of(case_);
    const int64_t i = ((shape().first_head + h) * shape().length + q) * shape().length + k;
    const auto sample = static_cast<uint64_t>(dropout.first_sample + b);
    const uint32_t word =
        dropout.stream.words(static_cast<uint64_t>(i / 4), sample)[static_cast<size_t>(i % 4)];
    return static_cast<double>(word) >= case_.dropout * 0x1p32 ? 1 / (1 - Real(case_.dropout)) : 0;
  }

  // Scores of one query, and by how much rounding may move any of them.
  struct Scores {
    Reals values;
    Real error = 0;
    Real largest = -kInfinity;
    Real total = 0;  // of exp(score - largest)
  };

  Scores scores_of(const Reals& qkv, int64_t b, int64_t h, int64_t q) const {
    Scores s;
    for (int64_t k = 0; k < shape().length; ++k) {
      Real sum = 0;
      Real magnitude = 0;
      for (int64_t c = 0; c < shape().head_size; ++c) {
        const Real term = qkv[at(0, b, q, h, c)] * qkv[at(1, b, k, h, c)];
        sum += term;
        magnitude += std::abs(term);
      }
      s.values.push_back(sees(b, q, k) ? sum * scale() : -kInfinity);
      if (!sees(b, q, k)) continue;
      s.error = std::max(s.error, (2 * size() + 4) * inner_ * magnitude * scale());
      s.largest = std::max(s.largest, s.values.back());
    }
    for (const Real value : s.values) s.total += std::exp(value - s.largest);
    return s;
  }

  // The largest relative error of a probability before it is narrowed: its score's and the normaliser's, the
  // rounding of what is exponentiated (as large as the spread of the scores), exp itself, a term of the sum.
  Real probability_error(const Scores& s) const {
    Real spread = 0;
    for (const Real value : s.values) {
      if (value > -kInfinity) spread = std::max(spread, s.largest - value);
    }
    const Real exponent = 2 * s.error + inner_ * (2 * std::abs(s.largest) + 2 * spread + 2);
    return std::expm1(exponent) + inner_ * (length() + 16);
  }

  void forward_head(const Reals& qkv, int64_t b, int64_t h) {
    for (int64_t q = 0; q < shape().length; ++q) {
      const Scores s = scores_of(qkv, b, h, q);
      const Real relative = probability_error(s) + own_ + inner_ * (2 * length() + 8);
      lse.values[lse_at(b, q, h)] = s.largest + std::log(s.total);
      lse.errors[lse_at(b, q, h)] = probability_error(s) + 4 * inner_ * std::abs(lse.values[lse_at(b, q, h)]);
      for (int64_t c = 0; c < shape().head_size; ++c) {
        Real sum = 0;
        Real magnitude = 0;
        Real lost = 0;  // by probabilities that underflow
        for (int64_t k = 0; k < shape().length; ++k) {
          const Real p = std::exp(s.values[static_cast<size_t>(k)] - s.largest) / s.total;
          const Real term = p == 0 ? 0 : p * multiplier(b, h, q, k) * qkv[at(2, b, k, h, c)];
          sum += term;
          magnitude += std::abs(term);
          if (p != 0) lost += underflow_ * multiplier(b, h, q, k) * std::abs(qkv[at(2, b, k, h, c)]);
        }
        out.values[out_at(b, q, h, c)] = sum;
        out.errors[out_at(b, q, h, c)] =
            (relative * magnitude + lost) * (1 + storage_) + storage_ * std::abs(sum) + underflow_;
      }
    }
  }

  void backward_head(const Reals& qkv, const Reals& dout, int64_t b, int64_t h) {
    const int64_t d = shape().head_size;
    for (int64_t q = 0; q < shape().length; ++q) {
      const Scores s = scores_of(qkv, b, h, q);
      const Real relative = 2 * probability_error(s);  // of exp(score - lse), where both are off
      Real delta = 0;
      Real delta_error = 0;
      for (int64_t c = 0; c < d; ++c) {
        const size_t i = out_at(b, q, h, c);
        delta += dout[i] * out.values[i];
        delta_error += std::abs(dout[i]) * (out.errors[i] + 2 * size() * inner_ * std::abs(out.values[i]));
      }
      for (int64_t k = 0; k < shape().length; ++k) {
        const Real p = std::exp(s.values[static_cast<size_t>(k)] - s.largest) / s.total;
        if (p == 0) continue;
        const Real m = multiplier(b, h, q, k);
        Real dp = 0;
        Real dp_magnitude = 0;
        for (int64_t c = 0; c < d; ++c) {
          const Real term = m * dout[out_at(b, q, h, c)] * qkv[at(2, b, k, h, c)];
          dp += term;
          dp_magnitude += std::abs(term);
        }
        const Real ds = p * (dp - delta);
        const Real sum_error = inner_ * (2 * length() + 8);  // of adding up the products below
        const Real dp_error = (2 * size() + 4) * inner_ * dp_magnitude + delta_error;
        const Real ds_error = p * ((relative + 4 * inner_) * (std::abs(dp) + std::abs(delta)) + dp_error) +
                              (own_ + sum_error) * std::abs(ds) + underflow_;
        const Real p_error = p * m * (relative + own_ + sum_error) + (m == 0 ? 0 : underflow_);
        for (int64_t c = 0; c < d; ++c) {
          add(at(2, b, k, h, c), p * m * dout[out_at(b, q, h, c)],
              p_error * std::abs(dout[out_at(b, q, h, c)]));
          const Real key = scale() * qkv[at(1, b, k, h, c)];
          const Real query = scale() * qkv[at(0, b, q, h, c)];
          add(at(0, b, q, h, c), ds * key, (1 + own_) * ds_error * std::abs(key));
          add(at(1, b, k, h, c), ds * query, (1 + own_) * ds_error * std::abs(query));
        }
      }
    }
  }

  void add(size_t i, Real value, Real error) {
    dqkv.values[i] += value;
    dqkv.errors[i] += error;
  }
};

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

void expect_within(const Tensor& got, const Reference::Bounded& want, Real storage, const std::string& what) {
  const Reals values = reals(got);
  ASSERT_EQ(values.size(), want.values.size()) << what;
  for (size_t i = 0; i < values.size(); ++i) {
    const Real bound =
        want.errors[i] * (1 + storage) + storage * std::abs(want.values[i]) + underflow(got.dtype());
    ASSERT_LE(std::abs(values[i] - want.values[i]), bound)
        << what << " element " << i << ": " << static_cast<double>(values[i]) << " for "
        << static_cast<double>(want.values[i]);
  }
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
