#pragma once

#include <limits>
#include <string>
#include <vector>

#include "normformer/ops/attention.h"

#include "support.h"

namespace normformer::ops {

inline constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

/// Attention of one shape, with what it is masked by.
struct Case {
  AttentionShape shape;
  bool documents = false;
  double dropout = 0.0;

  int64_t tokens() const { return shape.batch * shape.length; }
  int64_t channels() const { return shape.heads * shape.head_size; }
};

inline std::string name_of_case(DType dtype, const Case& c) {
  return std::string(name_of(dtype)) + " batch " + std::to_string(c.shape.batch) + " length " +
         std::to_string(c.shape.length) + " heads " + std::to_string(c.shape.heads) + " size " +
         std::to_string(c.shape.head_size) + (c.shape.causal ? " causal" : "") +
         (c.documents ? " documents" : "") + " dropout " + std::to_string(c.dropout);
}

inline Dropout dropout_of(const Case& c) {
  return {.probability = c.dropout, .stream = RandomStream{}.with(3).with("attention"), .first_sample = 6};
}

/// Documents of growing lengths, cut differently in every sequence.
inline std::vector<int32_t> document_starts(const Case& c) {
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

/// Attention with whole matrices of probabilities, in Real; and for every result a bound on what rounding may
/// do to it: `own` is the unit roundoff of the element type, in which the operation keeps what it feeds into
/// products, `inner` that of the accumulator type.
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

/// Every element within its bound, and the rounding to its own type.
inline void expect_within(const Tensor& got, const Reference::Bounded& want, Real storage,
                          const std::string& what) {
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

}  // namespace normformer::ops
