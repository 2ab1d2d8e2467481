#include "normformer/ops/cached_attention.h"

#include <algorithm>
#include <random>

#include "normformer/ops/attention.h"

#include "instruction_sets.h"
#include "support.h"

namespace normformer::ops {
namespace {

// A cache, and the sequences of which it holds all tokens but the last.
struct Case {
  int64_t slots;
  int64_t capacity;
  int64_t heads;
  int64_t head_size;
  std::vector<int32_t> of;    // of each sequence: its slot
  std::vector<int32_t> last;  // and the position of its last token

  int64_t channels() const { return heads * head_size; }
  int64_t sequences() const { return static_cast<int64_t>(of.size()); }
  Shape cache() const { return {slots, capacity, heads, head_size}; }
};

// One token of one channel; sequences in other than their slots' order, slots without one; longer than a
// GPU's tile of keys; heads of more channels than a block has threads.
const std::vector<Case> kCases{
    {1, 1, 1, 1, {0}, {0}},
    {4, 9, 3, 7, {2, 0, 3}, {0, 8, 3}},
    {3, 300, 2, 64, {1, 2}, {299, 127}},
    {2, 140, 1, 130, {1, 0}, {128, 5}},
    {5, 40, 4, 33, {4, 3, 2, 1, 0}, {39, 0, 17, 1, 38}},
};

struct Cache {
  Tensor keys;
  Tensor values;
};

Cache random_cache(Context& context, DType dtype, const Case& c) {
  return {random_tensor(context, dtype, c.cache(), 31), random_tensor(context, dtype, c.cache(), 32)};
}

Tensor places(Context& context, const std::vector<int32_t>& values) {
  return from_host<int32_t>(context, values, {static_cast<int64_t>(values.size())});
}

Tensor run(Context& context, DType dtype, const Case& c, const Cache& cache, const Tensor& qkv) {
  const Tensor out = unwritten(context, dtype, {c.sequences(), c.channels()});
  const Tensor slots = places(context, c.of);
  const Tensor positions = places(context, c.last);
  store_keys_and_values(context, qkv, slots, positions, cache.keys, cache.values);
  cached_attention_forward(context, qkv, slots, positions, cache.keys, cache.values, out);
  return out;
}

Tensor random_qkv(Context& context, DType dtype, const Case& c) {
  return random_tensor(context, dtype, {c.sequences(), 3 * c.channels()}, 33);
}

// One head of one token by the formula, with a bound on what rounding in the accumulator type may do to it.
struct Direct {
  Reals out;
  Reals errors;
};

Direct direct(const Case& c, const Reals& qkv, const Reals& keys, const Reals& values, int64_t sequence,
              int64_t head, Real inner) {
  const int64_t tokens = c.last[static_cast<size_t>(sequence)] + 1;
  const auto at = [&](int64_t position, int64_t channel) {
    const int64_t row = c.of[static_cast<size_t>(sequence)] * c.capacity + position;
    return static_cast<size_t>((row * c.heads + head) * c.head_size + channel);
  };
  Reals scores;
  Real largest = -1e30L;
  Real score_error = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    Real sum = 0;
    Real magnitude = 0;
    for (int64_t i = 0; i < c.head_size; ++i) {
      const Real term = qkv[static_cast<size_t>((sequence * 3 * c.heads + head) * c.head_size + i)] *
                        keys[at(t, i)] / std::sqrt(static_cast<Real>(c.head_size));
      sum += term;
      magnitude += std::abs(term);
    }
    scores.push_back(sum);
    largest = std::max(largest, sum);
    score_error = std::max(score_error, (c.head_size + 4) * inner * magnitude);
  }
  Real total = 0;
  for (Real& s : scores) total += s = std::exp(s - largest);
  // Scores are off, and so is exp by a few roundings; sums are of as many terms as there are tokens.
  const Real relative = 4 * score_error + (tokens + 16) * inner;
  Direct result;
  for (int64_t i = 0; i < c.head_size; ++i) {
    Real sum = 0;
    Real magnitude = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const Real term = scores[static_cast<size_t>(t)] / total * values[at(t, i)];
      sum += term;
      magnitude += std::abs(term);
    }
    result.out.push_back(sum);
    result.errors.push_back(2 * relative * magnitude);
  }
  return result;
}

void expect_direct(DType dtype, const Case& c) {
  Context context(test_device());
  const Cache cache = random_cache(context, dtype, c);
  const Tensor qkv = random_qkv(context, dtype, c);
  const Reals got = reals(run(context, dtype, c, cache, qkv));
  const Reals keys = reals(cache.keys);
  const Reals values = reals(cache.values);
  for (int64_t s = 0; s < c.sequences(); ++s) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const Direct want = direct(c, reals(qkv), keys, values, s, h, unit_roundoff(accumulator_of(dtype)));
      for (int64_t i = 0; i < c.head_size; ++i) {
        const auto at = static_cast<size_t>(i);
        const Real value = got[static_cast<size_t>((s * c.heads + h) * c.head_size + i)];
        ASSERT_LE(std::abs(value - want.out[at]),
                  unit_roundoff(dtype) * (std::abs(want.out[at]) + want.errors[at]) + want.errors[at] +
                      underflow(dtype))
            << name_of_case(dtype, c.capacity, c.head_size) << " sequence " << s << " head " << h;
      }
    }
  }
}

TEST(CachedAttention, IsTheFormulaOverWhatTheCacheHolds) {
  for (const DType dtype : kFloatingTypes) {
    for (const Case& c : kCases) expect_direct(dtype, c);
  }
}

TEST(CachedAttention, EveryInstructionSetComputesIt) {
  if (test_device() != DeviceKind::cpu) GTEST_SKIP() << "of the host's instructions";
  for_instruction_sets([] {
    for (const DType dtype : kFloatingTypes) expect_direct(dtype, kCases[4]);
  });
}

// Token by token, and all at once.
TEST(CachedAttention, GivesTheRowsOfWholeSequences) {
  Context context(test_device());
  constexpr int64_t kTokens = 150;
  for (const int64_t at_once : {int64_t{1}, int64_t{50}, kTokens}) {
    const Case c{.slots = 2, .capacity = kTokens, .heads = 3, .head_size = 10, .of = {}, .last = {}};
    const AttentionShape shape{.length = kTokens, .heads = c.heads, .head_size = c.head_size};
    const Tensor qkv = random_tensor(context, DType::f64, {kTokens, 3 * c.channels()}, 7);
    const Tensor want = unwritten(context, DType::f64, {kTokens, c.channels()});
    const Tensor lse = unwritten(context, DType::f64, {1, c.heads, kTokens});
    attention_forward(context, shape, qkv, Tensor(), Dropout{}, want, lse);
    const Tensor got = unwritten(context, DType::f64, {kTokens, c.channels()});
    const Cache cache{unwritten(context, DType::f64, c.cache()), unwritten(context, DType::f64, c.cache())};
    for (int64_t first = 0; first < kTokens; first += at_once) {
      Case part = c;
      for (int64_t t = first; t < first + at_once; ++t) {
        part.of.push_back(1);
        part.last.push_back(static_cast<int32_t>(t));
      }
      copy(context, run(context, DType::f64, part, cache, qkv.rows(first, first + at_once)),
           got.rows(first, first + at_once));
    }
    expect_close(got, reals(want), 1e-13L, std::to_string(at_once) + " tokens at once");
  }
}

TEST(CachedAttention, StoresEachTokenInItsPlaceAndNothingElsewhere) {
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    for (const Case& c : kCases) {
      const Tensor qkv = random_qkv(context, dtype, c);
      const std::vector<double> rows = to_host(qkv);
      const Cache cache = random_cache(context, dtype, c);
      std::vector<double> keys = to_host(cache.keys);
      std::vector<double> values = to_host(cache.values);
      for (size_t s = 0; s < c.of.size(); ++s) {
        const auto row = rows.begin() + static_cast<int64_t>(s) * 3 * c.channels();
        const int64_t to = (c.of[s] * c.capacity + c.last[s]) * c.channels();
        std::copy_n(row + c.channels(), c.channels(), keys.begin() + to);
        std::copy_n(row + 2 * c.channels(), c.channels(), values.begin() + to);
      }
      store_keys_and_values(context, qkv, places(context, c.of), places(context, c.last), cache.keys,
                            cache.values);
      EXPECT_EQ(to_host(cache.keys), keys);
      EXPECT_EQ(to_host(cache.values), values);
    }
  }
}

TEST(CachedAttention, BitsDependNeitherOnOtherSequencesNorOnThreads) {
  for (const DType dtype : kFloatingTypes) {
    const Case& all = kCases[4];
    Context context(test_device());
    const Cache cache = random_cache(context, dtype, all);
    const Tensor qkv = random_qkv(context, dtype, all);
    const Tensor want = run(context, dtype, all, cache, qkv);
    for (const int threads : {2, 3}) {
      Context shared(test_device(), threads);
      const Tensor got =
          run(shared, dtype, all, random_cache(shared, dtype, all), random_qkv(shared, dtype, all));
      expect_same_bits(got, want, std::to_string(threads) + " threads");
    }
    for (int64_t s = 0; s < all.sequences(); ++s) {
      Case one = all;
      one.of = {all.of[static_cast<size_t>(s)]};
      one.last = {all.last[static_cast<size_t>(s)]};
      expect_same_bits(run(context, dtype, one, cache, qkv.rows(s, s + 1)), want.rows(s, s + 1),
                       "sequence " + std::to_string(s));
    }
  }
}

TEST(CachedAttention, LargeScoresDoNotOverflow) {
  Context context(test_device());
  for (const DType dtype : kFloatingTypes) {
    const Cache cache{tensor_of(context, dtype, {1, 3, 1, 1}, {1, 2, 0}),
                      tensor_of(context, dtype, {1, 3, 1, 1}, {1, 2, 0})};
    const Tensor qkv = tensor_of(context, dtype, {1, 3}, {1000, 3, 3});
    EXPECT_EQ(to_host(run(context, dtype, {1, 3, 1, 1, {0}, {2}}, cache, qkv)), std::vector<double>{3});
  }
}

TEST(CachedAttention, MetaRecordsTheSameCosts) {
  for (const DType dtype : kFloatingTypes) {
    expect_same_costs_on_meta([&](Context& context) {
      const Tensor keys = context.zeros({3, 20, 2, 4}, dtype);
      const Tensor values = context.zeros({3, 20, 2, 4}, dtype);
      const Tensor qkv = context.zeros({5, 24}, dtype);
      const Tensor out = context.zeros({5, 8}, dtype);
      const Tensor places_of = context.zeros({5}, DType::i32);
      store_keys_and_values(context, qkv, places_of, places_of, keys, values);
      cached_attention_forward(context, qkv, places_of, places_of, keys, values, out);
      const OperationCost& cost = context.costs().operations().at("cached_attention_forward");
      EXPECT_EQ(cost.flops, 4 * 5 * 20 * 8);
      EXPECT_EQ(cost.bytes, (5 * 24 + 5 * 8 + 2 * 5 * 20 * 8) * size_of(dtype) + 2 * 5 * 4);
    });
  }
}

TEST(CachedAttention, NothingIsAnAnswerToNothing) {
  Context context(test_device());
  const Case c{2, 3, 1, 2, {}, {}};
  EXPECT_EQ(
      run(context, DType::f32, c, random_cache(context, DType::f32, c), random_qkv(context, DType::f32, c))
          .numel(),
      0);
}

TEST(CachedAttention, ArgumentsThatDoNotFitAreRefused) {
  Context context(test_device());
  const Case c{2, 3, 1, 2, {0}, {0}};
  const Cache cache = random_cache(context, DType::f32, c);
  const Tensor qkv = random_qkv(context, DType::f32, c);
  EXPECT_NO_THROW(run(context, DType::f32, c, cache, qkv));
  EXPECT_THROW(run(context, DType::f32, c, cache, context.zeros({1, 5}, DType::f32)), LogicError);
  EXPECT_THROW(run(context, DType::f32, c, {cache.keys, context.zeros({2, 3, 2, 1}, DType::f32)}, qkv),
               LogicError);
  EXPECT_THROW(run(context, DType::f32, c, {cache.keys.view({6, 2}), cache.values}, qkv), LogicError);
  if (test_device() != DeviceKind::cpu) return;  // a GPU is not waited for to look where tokens belong
  for (const auto& [slot, position] : {std::pair(-1, 0), std::pair(2, 0), std::pair(0, -1), std::pair(0, 3)})
    EXPECT_THROW(run(context, DType::f32, {2, 3, 1, 2, {slot}, {position}}, cache, qkv), LogicError);
}

}  // namespace
}  // namespace normformer::ops
