#include "ops/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/attention.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "normformer/core/checked.h"
#include "normformer/tensor/dispatch.h"

#include "ops/cpu/dropout_mask.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/math-inl.h"
#include "ops/cpu/pack-inl.h"
#include "ops/cpu/scratch.h"
#include "ops/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

// Blocks of scores, [queries, keys]: they stay in the second cache. Multiples of kStripRows and of any panel.
inline constexpr int64_t kForwardQueries = 48;
inline constexpr int64_t kForwardKeys = 256;
inline constexpr int64_t kBackwardQueries = 96;
inline constexpr int64_t kBackwardKeys = 128;

/// One head of one sequence: where its rows are, and what masks and drops its scores.
template <class T>
class Head {
 public:
  using A = Accumulator<T>;

  Head(const AttentionInput<T>& input, int64_t pair)
      : input_(input),
        sample_(pair / input.heads),
        head_(pair % input.heads),
        same_tokens_(input.queries == input.keys),
        starts_(input.document_start == nullptr ? nullptr : input.document_start + sample_ * queries()) {}

  int64_t queries() const { return input_.queries.size(); }
  int64_t keys() const { return input_.keys.size(); }
  int64_t size() const { return input_.head_size; }
  A scale() const { return A{1} / std::sqrt(static_cast<A>(size())); }

  /// The first channel of a row of a tensor that has rows of the queries, or of the keys.
  int64_t query_at(int64_t query, int64_t stride) const {
    return (sample_ * queries() + query) * stride + head_ * size();
  }
  int64_t key_at(int64_t key, int64_t stride) const {
    return (sample_ * keys() + key) * stride + head_ * size();
  }
  int64_t out_stride() const { return input_.heads * size(); }
  int64_t lse_at(int64_t query) const { return (sample_ * input_.heads + head_) * queries() + query; }

  const T* q() const { return input_.q + query_at(0, input_.q_stride); }
  const T* k() const { return input_.k + key_at(0, input_.kv_stride); }
  const T* v() const { return input_.v + key_at(0, input_.kv_stride); }

  /// The keys that a query attends to.
  Range keys_of(int64_t query) const {
    return {starts_ == nullptr ? 0 : input_.keys.rows_before(starts_[query]), end_of_keys(query)};
  }

  /// The least range of keys in which lies what any of the queries attends to.
  Range keys_of(Range queries) const {
    Range keys{0, end_of_keys(queries.end - 1)};
    if (starts_ != nullptr)
      keys.begin = input_.keys.rows_before(*std::min_element(starts_ + queries.begin, starts_ + queries.end));
    return keys;
  }

  /// The first query that may attend to a key.
  int64_t first_query_of(int64_t key) const {
    if (!input_.causal) return 0;
    return same_tokens_ ? key : input_.queries.rows_before(input_.keys.position_of(key));
  }

  bool drops() const { return input_.dropout.active(); }

  void dropout_multipliers(int64_t query, Range keys, A* multipliers) const {
    const int64_t split = std::clamp(input_.keys.first.size(), keys.begin, keys.end);
    fill_multipliers(query, {keys.begin, split}, multipliers);
    fill_multipliers(query, {split, keys.end}, multipliers + (split - keys.begin));
  }

 private:
  int64_t end_of_keys(int64_t query) const {
    if (!input_.causal) return keys();
    return same_tokens_ ? query + 1 : input_.keys.rows_before(input_.queries.position_of(query) + 1);
  }

  // Of keys that follow each other in the sequence.
  void fill_multipliers(int64_t query, Range keys, A* multipliers) const {
    if (keys.empty()) return;
    const Dropout& dropout = input_.dropout;
    const int64_t row = (input_.first_head + head_) * input_.length + input_.queries.position_of(query);
    cpu::dropout_multipliers(dropout.stream, dropout.first_sample + sample_,
                             row * input_.length + input_.keys.position_of(keys.begin), keys.size(),
                             dropout.probability, multipliers);
  }

  const AttentionInput<T>& input_;
  int64_t sample_;
  int64_t head_;
  bool same_tokens_;  // of queries and keys, which see each other by their rows then
  const int32_t* starts_;
};

/// What a thread works in.
struct Workspace {
  Scratch scores, probabilities, paired_probabilities, dscores, ds, paired_ds, multipliers, sums, statistics;
  Scratch queries, keys, keys_by_channel, values, values_by_channel, douts, query_rows, dout_rows, dk, dv;
};

/// Rows of one matrix with the channels of one head, and how to pack them.
template <class T>
class Rows {
 public:
  Rows(const T* data, int64_t stride, int64_t size) : data_(data), stride_(stride), size_(size) {}

  static int64_t panel() { return panel_columns<T>(); }
  int64_t steps() const { return ceil_div(size_, kPerStep<T>); }
  int64_t panels() const { return ceil_div(size_, panel()); }
  int64_t padded_size() const { return panels() * panel(); }

  /// Steps along the channels, panels of tokens: to[panel][step][token].
  const T* pack_by_channel(Range tokens, Scratch& scratch) const {
    const int64_t words = steps() * panel();
    auto* to = scratch.take<Word<T>>(ceil_div(tokens.size(), panel()) * words);
    for (int64_t first = 0; first < tokens.size(); first += panel()) {
      pack_transposed(data_ + (tokens.begin + first) * stride_, stride_,
                      std::min(panel(), tokens.size() - first), size_, {0, steps()}, panel(),
                      to + first / panel() * words);
    }
    return reinterpret_cast<const T*>(to);
  }

  /// Steps along the tokens, panels of channels: to[panel][step][channel].
  const T* pack_by_token(Range tokens, Scratch& scratch) const {
    const int64_t token_steps = ceil_div(tokens.size(), kPerStep<T>);
    auto* to = scratch.take<Word<T>>(panels() * token_steps * panel());
    for (int64_t step = 0; step < token_steps; ++step) {
      const int64_t token = tokens.begin + step * kPerStep<T>;
      const T* first = data_ + token * stride_;
      const T* second = token + 1 < tokens.end ? first + stride_ : nullptr;
      for (int64_t p = 0; p < panels(); ++p) {
        const int64_t c = p * panel();
        pack_step(first + c, second == nullptr ? nullptr : second + c, std::min(panel(), size_ - c), panel(),
                  to + (p * token_steps + step) * panel());
      }
    }
    return reinterpret_cast<const T*>(to);
  }

  /// The same rows where every step is whole: copied if a step would reach beyond a row.
  Rows with_whole_steps(int64_t tokens, Scratch& scratch) const {
    if (size_ % kPerStep<T> == 0) return *this;
    const int64_t padded = size_ + 1;
    T* to = scratch.take<T>(tokens * padded);
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy(data_ + t * stride_, data_ + t * stride_ + size_, to + t * padded);
      to[t * padded + size_] = T{};
    }
    return Rows(to, padded, size_);
  }

  StripRows<T> strip(int64_t token) const { return {data_ + token * stride_, stride_, kPerStep<T>}; }

 private:
  const T* data_;
  int64_t stride_;
  int64_t size_;
};

/// Calls body(strip of queries, keys) for the strips of `queries`, with the part of the block `keys`, in
/// whole panels from its begin, in which lies what the strip attends to; strips without any are left out.
template <class T, class Body>
HWY_INLINE void for_strips(const Head<T>& head, Range queries, Range keys, Body&& body) {
  const int64_t panel = panel_columns<T>();
  for (int64_t first = queries.begin; first < queries.end; first += kStripRows) {
    const Range strip{first, std::min<int64_t>(queries.end, first + kStripRows)};
    const Range seen = intersect(head.keys_of(strip), keys);
    if (seen.empty()) continue;
    body(strip, Range{(seen.begin - keys.begin) / panel * panel, round_up(seen.end - keys.begin, panel)});
  }
}

/// scores[strip, columns] = rows of the strip times keys packed by channel.
template <class Steps, class T = typename Steps::Element>
HWY_INLINE void multiply_scores(const Rows<T>& rows, Range strip, Range columns, const T* packed,
                                Accumulator<T>* scores, int64_t stride) {
  const int64_t panel = panel_columns<T>();
  const int64_t panel_elements = rows.steps() * panel * kPerStep<T>;
  for (int64_t column = columns.begin; column < columns.end; column += panel) {
    multiply_strip<Steps>(strip.size(), rows.steps(), rows.strip(strip.begin),
                          packed + column / panel * panel_elements, panel * kPerStep<T>, nullptr,
                          scores + column, stride, false);
  }
}

/// sums[rows, channels] += a[rows, steps] times what is packed by token in panels of `panel_steps` steps,
/// from step `first` on.
template <class Steps, class T = typename Steps::Element>
HWY_INLINE void add_products(int64_t rows, int64_t steps, const StripRows<T>& a, const T* packed,
                             int64_t panel_steps, int64_t first, int64_t padded_size, Accumulator<T>* sums,
                             int64_t stride) {
  const int64_t panel = panel_columns<T>();
  for (int64_t c = 0; c < padded_size; c += panel) {
    const T* b = packed + (c / panel * panel_steps + first) * panel * kPerStep<T>;
    multiply_strip<Steps>(rows, steps, a, b, panel * kPerStep<T>, nullptr, sums + c, stride, true);
  }
}

template <class A>
void fill_zero(A* from, A* to) {
  std::fill(from, to, A{});
}

template <class A>
HWY_INLINE void multiply_row(A* row, int64_t count, A factor) {
  for_columns<A>(count, [&](int64_t j, auto use)
                            HWY_ATTR { store(hn::Mul(load(row + j, use), set<A>(factor)), row + j, use); });
}

template <class T, class A>
HWY_INLINE void write_row(const A* from, int64_t count, A factor, T* to) {
  for_columns<A>(count, [&](int64_t j, auto use)
                            HWY_ATTR { store(hn::Mul(load(from + j, use), set<A>(factor)), to + j, use); });
}

template <class A>
HWY_INLINE void add_scaled_row(const A* from, int64_t count, A factor, A* to) {
  for_columns<A>(count, [&](int64_t j, auto use)
                            HWY_ATTR { add_to(to + j, hn::Mul(load(from + j, use), set<A>(factor)), use); });
}

/// A row of a result, times `factor`.
template <class T, class A>
HWY_INLINE void give_row(const A* from, int64_t count, A factor, const ResultRows<T>& to, int64_t at) {
  if (to.written != nullptr)
    write_row(from, count, factor, to.written + at);
  else
    add_scaled_row(from, count, factor, to.added + at);
}

/// The forward of some blocks of queries of one head. After Dao, Fu, Ermon, Rudra, Re, "FlashAttention",
/// 2022, algorithm 1, with softmax kept relative to the largest score so far (Milakov, Gimelshein, 2018).
template <class Steps>
class ForwardHead {
 public:
  using T = typename Steps::Element;
  using A = Accumulator<T>;

  ForwardHead(const AttentionInput<T>& input, int64_t pair, int64_t group, int64_t groups)
      : head_(input, pair),
        group_(group),
        groups_(groups),
        blocks_(ceil_div(head_.queries(), kForwardQueries)),
        queries_(Rows<T>(head_.q(), input.q_stride, head_.size())
                     .with_whole_steps(head_.queries(), workspace().queries)) {
    const int64_t last_block = group + (blocks_ - 1 - group) / groups * groups;
    tokens_ = head_.keys_of(block_at(last_block)).end;
    keys_ = Rows<T>(head_.k(), input.kv_stride, head_.size())
                .pack_by_channel({0, tokens_}, workspace().keys_by_channel);
    values_ =
        Rows<T>(head_.v(), input.kv_stride, head_.size()).pack_by_token({0, tokens_}, workspace().values);
    scores_ = workspace().scores.template take<A>(kForwardQueries * kForwardKeys);
    probabilities_ = workspace().probabilities.template take<T>(kForwardQueries * kForwardKeys);
    multipliers_ = workspace().multipliers.template take<A>(kForwardKeys);
    sums_ = workspace().sums.template take<A>(kForwardQueries * queries_.padded_size());
    largest_ = workspace().statistics.template take<A>(2 * kForwardQueries);
    total_ = largest_ + kForwardQueries;
  }

  void run(const ResultRows<T>& out, A* lse) {
    for (int64_t b = group_; b < blocks_; b += groups_) {
      const Range queries = block_at(b);
      fill_zero(sums_, sums_ + kForwardQueries * queries_.padded_size());
      std::fill(largest_, largest_ + kForwardQueries, -std::numeric_limits<A>::infinity());
      fill_zero(total_, total_ + kForwardQueries);
      const Range seen = head_.keys_of(queries);
      for (int64_t k = seen.begin / kForwardKeys * kForwardKeys; k < seen.end; k += kForwardKeys) {
        add_keys(queries, {k, std::min(seen.end, k + kForwardKeys)});
      }
      if (out.written != nullptr)
        write(queries, out, lse);
      else
        merge(queries, out, lse);
    }
  }

 private:
  static Workspace& workspace() {
    thread_local Workspace mine;
    return mine;
  }

  Range block_at(int64_t block) const {
    return {block * kForwardQueries, std::min(head_.queries(), (block + 1) * kForwardQueries)};
  }

  void add_keys(Range queries, Range keys) {
    const T* packed =
        keys_ + keys.begin / panel_columns<T>() * queries_.steps() * panel_columns<T>() * kPerStep<T>;
    for_strips(head_, queries, keys, [&](Range strip, Range columns) HWY_ATTR {
      const int64_t row = strip.begin - queries.begin;
      multiply_scores<Steps>(queries_, strip, columns, packed, scores_ + row * kForwardKeys, kForwardKeys);
      for (int64_t q = strip.begin; q < strip.end; ++q) add_row(q, q - queries.begin, keys, columns);
      const Range used{columns.begin, std::min(columns.end, keys.size())};
      const StripRows<T> a{probabilities_ + row * kForwardKeys + used.begin, kForwardKeys, kPerStep<T>};
      add_products<Steps>(strip.size(), ceil_div(used.size(), kPerStep<T>), a, values_,
                          ceil_div(tokens_, kPerStep<T>), (keys.begin + used.begin) / kPerStep<T>,
                          queries_.padded_size(), sums_ + row * queries_.padded_size(),
                          queries_.padded_size());
    });
  }

  // Makes probabilities of a row of scores, relative to the largest so far, and rescales what was summed.
  void add_row(int64_t query, int64_t i, Range keys, Range columns) {
    const Range visible = intersect(head_.keys_of(query), keys);
    T* p = probabilities_ + i * kForwardKeys;
    if (visible.empty()) return fill_zero(p + columns.begin, p + columns.end);
    const int64_t first = visible.begin - keys.begin;
    const int64_t count = visible.size();
    fill_zero(p + columns.begin, p + first);
    fill_zero(p + first + count, p + columns.end);
    A* s = scores_ + i * kForwardKeys + first;
    const A largest = std::max(largest_[i], max_of(s, count));
    if (largest_[i] != largest) {
      const A correction = std::exp((largest_[i] - largest) * head_.scale());
      total_[i] *= correction;
      multiply_row(sums_ + i * queries_.padded_size(), queries_.padded_size(), correction);
      largest_[i] = largest;
    }
    total_[i] += exponentiate(s, count, largest, p + first);
    if (head_.drops()) drop(query, visible, s, p + first);
  }

  static A max_of(const A* s, int64_t count) {
    const Tag<A> tag;
    const auto lanes = static_cast<int64_t>(hn::Lanes(tag));
    auto largest = set<A>(-std::numeric_limits<A>::infinity());
    int64_t j = 0;
    for (; j + lanes <= count; j += lanes) largest = hn::Max(largest, hn::LoadU(tag, s + j));
    A result = hn::GetLane(hn::MaxOfLanes(tag, largest));
    for (; j < count; ++j) result = std::max(result, s[j]);
    return result;
  }

  // s and p become exp((s - largest) * scale); their sum.
  A exponentiate(A* s, int64_t count, A largest, T* p) const {
    const auto scale = set<A>(head_.scale());
    return sum_columns<A>(count, [&](int64_t j, auto use) HWY_ATTR {
      const auto e = exp_nonpositive(hn::Mul(hn::Sub(load(s + j, use), set<A>(largest)), scale));
      if (head_.drops())
        store(e, s + j, use);
      else
        store(e, p + j, use);
      return only_used(e, use);
    });
  }

  void drop(int64_t query, Range keys, const A* exponentials, T* p) {
    head_.dropout_multipliers(query, keys, multipliers_);
    for_columns<A>(keys.size(), [&](int64_t j, auto use) HWY_ATTR {
      store(hn::Mul(load(exponentials + j, use), load(multipliers_ + j, use)), p + j, use);
    });
  }

  A lse_of(int64_t i) const { return largest_[i] * head_.scale() + std::log(total_[i]); }

  void write(Range queries, const ResultRows<T>& out, A* lse) const {
    for (int64_t q = queries.begin; q < queries.end; ++q) {
      const int64_t i = q - queries.begin;
      write_row(sums_ + i * queries_.padded_size(), head_.size(), A{1} / total_[i],
                out.written + head_.query_at(q, out.stride));
      lse[head_.lse_at(q)] = lse_of(i);
    }
  }

  // As write(), into what earlier blocks of keys gave; a query that sees none of these keys is left alone.
  void merge(Range queries, const ResultRows<T>& out, A* lse) const {
    for (int64_t q = queries.begin; q < queries.end; ++q) {
      const int64_t i = q - queries.begin;
      if (total_[i] == A{0}) continue;
      A& merged = lse[head_.lse_at(q)];
      const A before = merged;
      const A here = lse_of(i);
      const A larger = std::max(before, here);
      merged = larger + std::log(std::exp(before - larger) + std::exp(here - larger));
      A* to = out.added + head_.query_at(q, out.stride);
      multiply_row(to, head_.size(), std::exp(before - merged));
      add_scaled_row(sums_ + i * queries_.padded_size(), head_.size(), std::exp(here - merged) / total_[i],
                     to);
    }
  }

  const Head<T> head_;
  const int64_t group_;
  const int64_t groups_;
  const int64_t blocks_;
  const Rows<T> queries_;
  int64_t tokens_;
  const T* keys_;
  const T* values_;
  A* scores_;
  T* probabilities_;
  A* multipliers_;
  A* sums_;
  A* largest_;
  A* total_;
};

/// The backward of some blocks of keys of one head: algorithm 4 of the same paper.
template <class Steps>
class BackwardHead {
 public:
  using T = typename Steps::Element;
  using A = Accumulator<T>;

  BackwardHead(const AttentionInput<T>& input, const AttentionSaved<T>& saved, int64_t pair)
      : head_(input, pair),
        lse_(saved.lse + head_.lse_at(0)),
        keys_(head_.k(), input.kv_stride, head_.size()),
        values_(head_.v(), input.kv_stride, head_.size()),
        queries_(Rows<T>(head_.q(), input.q_stride, head_.size())
                     .with_whole_steps(head_.queries(), workspace().query_rows)),
        douts_(Rows<T>(saved.dout + head_.query_at(0, head_.out_stride()), head_.out_stride(), head_.size())
                   .with_whole_steps(head_.queries(), workspace().dout_rows)),
        padded_(queries_.padded_size()),
        dq_stride_(round_up(head_.size(), kGemmPanel)) {
    constexpr int64_t kScores = kBackwardQueries * kBackwardKeys;
    Workspace& mine = workspace();
    packed_queries_ = queries_.pack_by_token({0, head_.queries()}, mine.queries);
    packed_douts_ = douts_.pack_by_token({0, head_.queries()}, mine.douts);
    scores_ = mine.scores.template take<A>(kScores);
    dprobabilities_ = mine.dscores.template take<A>(kScores);
    probabilities_ = mine.probabilities.template take<T>(kScores);
    ds_ = mine.ds.template take<T>(kScores);
    multipliers_ = mine.multipliers.template take<A>(kBackwardKeys);
    dk_ = mine.dk.template take<A>(kBackwardKeys * padded_);
    dv_ = mine.dv.template take<A>(kBackwardKeys * padded_);
    delta_ = mine.statistics.template take<A>(head_.queries());
    for (int64_t q = 0; q < head_.queries(); ++q) {
      const T* dout = saved.dout + head_.query_at(q, head_.out_stride());
      const T* out = saved.out + head_.query_at(q, head_.out_stride());
      delta_[q] = sum_columns<A>(head_.size(), [&](int64_t j, auto use) HWY_ATTR {
        return hn::Mul(load(dout + j, use), load(out + j, use));
      });
    }
  }

  // Blocks group, group + groups, ...; adds to dq[queries, size in whole kGemmPanel], whose scale is left
  // out.
  void run(int64_t group, int64_t groups, A* dq, const ResultRows<T>& dk, const ResultRows<T>& dv) {
    for (int64_t k = group * kBackwardKeys; k < head_.keys(); k += groups * kBackwardKeys) {
      run_block({k, std::min(head_.keys(), k + kBackwardKeys)}, dq, dk, dv);
    }
  }

 private:
  static Workspace& workspace() {
    thread_local Workspace mine;
    return mine;
  }

  void run_block(Range keys, A* dq, const ResultRows<T>& dk, const ResultRows<T>& dv) {
    Workspace& mine = workspace();
    block_keys_ = keys_.pack_by_token(keys, mine.keys);
    block_keys_by_channel_ = keys_.pack_by_channel(keys, mine.keys_by_channel);
    block_values_by_channel_ = values_.pack_by_channel(keys, mine.values_by_channel);
    fill_zero(dk_, dk_ + kBackwardKeys * padded_);
    fill_zero(dv_, dv_ + kBackwardKeys * padded_);
    const int64_t first = head_.first_query_of(keys.begin) / kBackwardQueries * kBackwardQueries;
    for (int64_t q = first; q < head_.queries(); q += kBackwardQueries) {
      const Range queries{q, std::min(head_.queries(), q + kBackwardQueries)};
      if (!intersect(head_.keys_of(queries), keys).empty()) add_queries(queries, keys, dq);
    }
    for (int64_t j = 0; j < keys.size(); ++j) {
      const int64_t key = keys.begin + j;
      give_row(dk_ + j * padded_, head_.size(), head_.scale(), dk, head_.key_at(key, dk.stride));
      give_row(dv_ + j * padded_, head_.size(), A{1}, dv, head_.key_at(key, dv.stride));
    }
  }

  void add_queries(Range queries, Range keys, A* dq) {
    const int64_t width = round_up(keys.size(), panel_columns<T>());
    const int64_t count = queries.size();
    fill_zero(probabilities_, probabilities_ + count * kBackwardKeys);
    fill_zero(ds_, ds_ + count * kBackwardKeys);
    for_strips(head_, queries, keys, [&](Range strip, Range columns) HWY_ATTR {
      const int64_t at = (strip.begin - queries.begin) * kBackwardKeys;
      multiply_scores<Steps>(queries_, strip, columns, block_keys_by_channel_, scores_ + at, kBackwardKeys);
      multiply_scores<Steps>(douts_, strip, columns, block_values_by_channel_, dprobabilities_ + at,
                             kBackwardKeys);
      for (int64_t q = strip.begin; q < strip.end; ++q) differentiate_row(q, q - queries.begin, keys);
      const Range used{columns.begin, std::min(columns.end, keys.size())};
      add_products<Steps>(strip.size(), ceil_div(used.size(), kPerStep<T>),
                          {ds_ + at + used.begin, kBackwardKeys, kPerStep<T>}, block_keys_,
                          ceil_div(keys.size(), kPerStep<T>), used.begin / kPerStep<T>, padded_,
                          dq + strip.begin * dq_stride_, dq_stride_);
    });
    Workspace& mine = workspace();
    const T* p = by_query(probabilities_, count, width, mine.paired_probabilities);
    const T* ds = by_query(ds_, count, width, mine.paired_ds);
    for (int64_t first = 0; first < keys.size(); first += kStripRows) {
      const int64_t strip = std::min<int64_t>(kStripRows, keys.size() - first);
      const int64_t skipped = std::max<int64_t>(0, head_.first_query_of(keys.begin + first) - queries.begin);
      const int64_t step = skipped / kPerStep<T>;
      const int64_t steps = ceil_div(count, kPerStep<T>) - step;
      if (steps <= 0) continue;
      const int64_t at = (step * kBackwardKeys + first) * kPerStep<T>;
      const int64_t stride = kBackwardKeys * kPerStep<T>;
      const int64_t total_steps = ceil_div(head_.queries(), kPerStep<T>);
      const int64_t first_step = queries.begin / kPerStep<T> + step;
      add_products<Steps>(strip, steps, {p + at, kPerStep<T>, stride}, packed_douts_, total_steps, first_step,
                          padded_, dv_ + first * padded_, padded_);
      add_products<Steps>(strip, steps, {ds + at, kPerStep<T>, stride}, packed_queries_, total_steps,
                          first_step, padded_, dk_ + first * padded_, padded_);
    }
  }

  // Steps of queries side by side for each key; the matrix itself where a step is one element.
  static const T* by_query(const T* matrix, int64_t queries, int64_t keys, Scratch& scratch) {
    if constexpr (kPerStep<T> == 1) {
      return matrix;
    } else {
      auto* to = scratch.take<Word<T>>(kBackwardQueries / kPerStep<T> * kBackwardKeys);
      for (int64_t q = 0; q < queries; q += kPerStep<T>) {
        const T* first = matrix + q * kBackwardKeys;
        join_rows(keys, first, q + 1 < queries ? first + kBackwardKeys : nullptr,
                  to + q / kPerStep<T> * kBackwardKeys);
      }
      return reinterpret_cast<const T*>(to);
    }
  }

  // Probabilities after dropout, and gradients of scores but for their scale, of one row.
  void differentiate_row(int64_t query, int64_t i, Range keys) {
    const Range visible = intersect(head_.keys_of(query), keys);
    if (visible.empty()) return;
    const int64_t at = i * kBackwardKeys + visible.begin - keys.begin;
    if (head_.drops()) head_.dropout_multipliers(query, visible, multipliers_);
    const A* s = scores_ + at;
    const A* dp = dprobabilities_ + at;
    T* p = probabilities_ + at;
    T* ds = ds_ + at;
    const auto scale = set<A>(head_.scale());
    const auto lse = set<A>(lse_[query]);
    const auto delta = set<A>(delta_[query]);
    const auto differentiate = [&](int64_t j, auto use, auto multiplier) HWY_ATTR {
      const auto e = exp_nonpositive(hn::MulSub(load(s + j, use), scale, lse));
      const auto dropped = hn::Mul(load(dp + j, use), multiplier);
      store(hn::Mul(e, multiplier), p + j, use);
      store(hn::Mul(e, hn::Sub(dropped, delta)), ds + j, use);
    };
    if (head_.drops()) {
      for_columns<A>(visible.size(), [&](int64_t j, auto use)
                                         HWY_ATTR { differentiate(j, use, load(multipliers_ + j, use)); });
    } else {
      for_columns<A>(visible.size(),
                     [&](int64_t j, auto use) HWY_ATTR { differentiate(j, use, set<A>(A{1})); });
    }
  }

  const Head<T> head_;
  const A* lse_;
  const Rows<T> keys_;
  const Rows<T> values_;
  const Rows<T> queries_;
  const Rows<T> douts_;
  const int64_t padded_;
  const int64_t dq_stride_;
  const T* packed_queries_;
  const T* packed_douts_;
  const T* block_keys_ = nullptr;
  const T* block_keys_by_channel_ = nullptr;
  const T* block_values_by_channel_ = nullptr;
  A* scores_;
  A* dprobabilities_;
  T* probabilities_;
  T* ds_;
  A* multipliers_;
  A* dk_;
  A* dv_;
  A* delta_;
};

/// Adds up the groups' gradients of queries, in order, and gives them.
template <class T>
void write_dq(const AttentionInput<T>& input, int64_t pair, int64_t groups, int64_t group_stride,
              Accumulator<T>* parts, const ResultRows<T>& dq) {
  using A = Accumulator<T>;
  const Head<T> head(input, pair);
  for (int64_t q = 0; q < head.queries(); ++q) {
    A* row = parts + q * round_up(head.size(), kGemmPanel);
    for (int64_t g = 1; g < groups; ++g) {
      for_columns<A>(head.size(), [&](int64_t j, auto use) HWY_ATTR {
        add_to(row + j, load(row + g * group_stride + j, use), use);
      });
    }
    give_row(row, head.size(), head.scale(), dq, head.query_at(q, dq.stride));
  }
}

template <class T>
struct OwnSteps {
  using Type = FusedSteps<T>;
};
template <>
struct OwnSteps<bf16> {
  using Type = WidenedSteps;
};
template <>
struct OwnSteps<f16> {
  using Type = HalfSteps;
};

/// Calls body.operator()<Steps>() with how elements of T multiply on this processor.
template <class T, class Body>
void with_steps(Body&& body) {
#if NORMFORMER_BF16_STEPS
  if constexpr (std::is_same_v<T, bf16>) {
    if (gemm_has_native_bf16()) return body.template operator()<NativeSteps>();
  }
#endif
  body.template operator()<typename OwnSteps<T>::Type>();
}

template <class T>
void forward_task(const AttentionInput<T>& input, int64_t pair, int64_t group, int64_t groups,
                  const ResultRows<T>& out, Accumulator<T>* lse) {
  with_steps<T>([&]<class Steps>() { ForwardHead<Steps>(input, pair, group, groups).run(out, lse); });
}

template <class T>
void backward_task(const AttentionInput<T>& input, const AttentionSaved<T>& saved, int64_t pair,
                   int64_t group, int64_t groups, Accumulator<T>* dq, const ResultRows<T>& dk,
                   const ResultRows<T>& dv) {
  with_steps<T>(
      [&]<class Steps>() { BackwardHead<Steps>(input, saved, pair).run(group, groups, dq, dk, dv); });
}

/// The tasks of one element type, behind plain functions for the dispatch.
template <class T>
AttentionTasks<T> tasks() {
  return {forward_task<T>, backward_task<T>, write_dq<T>};
}

AttentionTasks<double> tasks_f64() { return tasks<double>(); }
AttentionTasks<float> tasks_f32() { return tasks<float>(); }
AttentionTasks<bf16> tasks_bf16() { return tasks<bf16>(); }
AttentionTasks<f16> tasks_f16() { return tasks<f16>(); }

int64_t backward_blocks(int64_t keys) { return ceil_div(keys, kBackwardKeys); }

int64_t forward_blocks(int64_t queries) { return ceil_div(queries, kForwardQueries); }

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(tasks_f64);
HWY_EXPORT(tasks_f32);
HWY_EXPORT(tasks_bf16);
HWY_EXPORT(tasks_f16);
HWY_EXPORT(forward_blocks);
HWY_EXPORT(backward_blocks);

namespace {

constexpr int64_t kLeastTasks = 16;  // fewer heads than this are cut into groups of key blocks

template <class T>
AttentionTasks<T> chosen_tasks() {
  if constexpr (std::is_same_v<T, double>)
    return HWY_DYNAMIC_DISPATCH(tasks_f64)();
  else if constexpr (std::is_same_v<T, float>)
    return HWY_DYNAMIC_DISPATCH(tasks_f32)();
  else if constexpr (std::is_same_v<T, bf16>)
    return HWY_DYNAMIC_DISPATCH(tasks_bf16)();
  else
    return HWY_DYNAMIC_DISPATCH(tasks_f16)();
}

int64_t groups_of(int64_t pairs, int64_t wanted, int64_t blocks) {
  return std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(1, pairs)), 1, std::max<int64_t>(1, blocks));
}

template <class T>
AttentionInput<T> input_of(const AttentionShape& shape, const Tensor& qkv, const Tensor& document_start,
                           const Dropout& dropout) {
  const int64_t channels = shape.heads * shape.head_size;
  const T* first = qkv.data<T>();
  return {.heads = shape.heads,
          .head_size = shape.head_size,
          .first_head = shape.first_head,
          .length = shape.length,
          .causal = shape.causal,
          .queries = SequencePart::whole(shape.length),
          .keys = SequencePart::whole(shape.length),
          .dropout = dropout,
          .document_start = document_start ? document_start.data<int32_t>() : nullptr,
          .q = first,
          .q_stride = 3 * channels,
          .k = first + channels,
          .v = first + 2 * channels,
          .kv_stride = 3 * channels};
}

template <class T>
AttentionInput<T> input_of(const PartialAttentionShape& shape, const Tensor& qkv, const Tensor& kv,
                           const Tensor& document_start, const Dropout& dropout) {
  const int64_t channels = shape.heads * shape.head_size;
  return {.heads = shape.heads,
          .head_size = shape.head_size,
          .first_head = shape.first_head,
          .length = shape.length,
          .causal = shape.causal,
          .queries = shape.queries,
          .keys = shape.keys,
          .dropout = dropout,
          .document_start = document_start ? document_start.data<int32_t>() : nullptr,
          .q = qkv.data<T>(),
          .q_stride = 3 * channels,
          .k = kv.data<T>(),
          .v = kv.data<T>() + channels,
          .kv_stride = 2 * channels};
}

template <class T>
void forward_heads(ThreadPool& threads, const AttentionInput<T>& input, int64_t pairs,
                   const ResultRows<T>& out, Accumulator<T>* lse) {
  const AttentionTasks<T> tasks = chosen_tasks<T>();
  const int64_t blocks = HWY_DYNAMIC_DISPATCH(forward_blocks)(input.queries.size());
  // A row's bits do not depend on the other rows, so this cut may follow the number of threads.
  const int64_t groups = threads.size() == 1 ? 1 : groups_of(pairs, 4 * threads.size(), blocks);
  threads.parallel_for(groups * pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      tasks.forward(input, task / groups, task % groups, groups, out, lse);
  });
}

/// Where the gradients go.
template <class T>
struct Gradients {
  ResultRows<T> dq, dk, dv;
};

template <class T>
void backward_heads(ThreadPool& threads, const AttentionInput<T>& input, const AttentionSaved<T>& saved,
                    const Gradients<T>& gradients, const Tensor& workspace) {
  using A = Accumulator<T>;
  const AttentionTasks<T> tasks = chosen_tasks<T>();
  const int64_t groups = workspace.dim(0);
  const int64_t pairs = workspace.dim(1);
  const int64_t head_elements = workspace.dim(2) * workspace.dim(3);
  A* dq_parts = workspace.data<A>();
  threads.parallel_for(groups * pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      A* dq = dq_parts + task * head_elements;
      std::fill(dq, dq + head_elements, A{});
      tasks.backward(input, saved, task % pairs, task / pairs, groups, dq, gradients.dk, gradients.dv);
    }
  });
  threads.parallel_for(pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      A* parts = dq_parts + pair * head_elements;
      tasks.write_dq(input, pair, groups, pairs * head_elements, parts, gradients.dq);
    }
  });
}

// Gradients of queries are summed in it: [groups of key blocks, pairs, queries, head_size in whole panels].
Shape workspace_shape(int64_t pairs, int64_t queries, int64_t keys, int64_t head_size) {
  const int64_t groups = groups_of(pairs, kLeastTasks, HWY_DYNAMIC_DISPATCH(backward_blocks)(keys));
  return {groups, pairs, queries, round_up(head_size, kGemmPanel)};
}

}  // namespace

void attention_forward(Context& context, const AttentionShape& shape, const Tensor& qkv,
                       const Tensor& document_start, const Dropout& dropout, const Tensor& out,
                       const Tensor& lse) {
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    const AttentionInput<T> input = input_of<T>(shape, qkv, document_start, dropout);
    const ResultRows<T> rows{out.data<T>(), nullptr, shape.heads * shape.head_size};
    forward_heads(context.threads(), input, shape.batch * shape.heads, rows, lse.data<Accumulator<T>>());
  });
}

Shape attention_backward_workspace(Context&, const AttentionShape& s) {
  return workspace_shape(s.batch * s.heads, s.length, s.length, s.head_size);
}

void attention_backward(Context& context, const AttentionShape& shape, const Tensor& dout, const Tensor& qkv,
                        const Tensor& document_start, const Dropout& dropout, const Tensor& out,
                        const Tensor& lse, const Tensor& dqkv, const Tensor& workspace) {
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    const int64_t channels = shape.heads * shape.head_size;
    const AttentionInput<T> input = input_of<T>(shape, qkv, document_start, dropout);
    const AttentionSaved<T> saved{
        .dout = dout.data<T>(), .out = out.data<T>(), .lse = lse.data<Accumulator<T>>()};
    const auto part = [&](int64_t i) {
      return ResultRows<T>{dqkv.data<T>() + i * channels, nullptr, 3 * channels};
    };
    backward_heads<T>(context.threads(), input, saved, {part(0), part(1), part(2)}, workspace);
  });
}

void partial_attention_forward(Context& context, const PartialAttentionShape& shape, const Tensor& qkv,
                               const Tensor& kv, const Tensor& document_start, const Dropout& dropout,
                               const Tensor& out, const Tensor& lse) {
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const AttentionInput<T> input = input_of<T>(shape, qkv, kv, document_start, dropout);
    const ResultRows<T> rows{nullptr, out.data<A>(), shape.heads * shape.head_size};
    forward_heads(context.threads(), input, shape.batch * shape.heads, rows, lse.data<A>());
  });
}

Shape partial_attention_backward_workspace(Context&, const PartialAttentionShape& s) {
  return workspace_shape(s.batch * s.heads, s.queries.size(), s.keys.size(), s.head_size);
}

void partial_attention_backward(Context& context, const PartialAttentionShape& shape, const Tensor& dout,
                                const Tensor& qkv, const Tensor& kv, const Tensor& document_start,
                                const Dropout& dropout, const Tensor& out, const Tensor& lse,
                                const Tensor& dq, const Tensor& dkv, const Tensor& workspace) {
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    using A = Accumulator<T>;
    const int64_t channels = shape.heads * shape.head_size;
    const AttentionInput<T> input = input_of<T>(shape, qkv, kv, document_start, dropout);
    const AttentionSaved<T> saved{.dout = dout.data<T>(), .out = out.data<T>(), .lse = lse.data<A>()};
    backward_heads<T>(context.threads(), input, saved,
                      {.dq = {nullptr, dq.data<A>(), channels},
                       .dk = {nullptr, dkv.data<A>(), 2 * channels},
                       .dv = {nullptr, dkv.data<A>() + channels, 2 * channels}},
                      workspace);
  });
}

}  // namespace normformer::ops::cpu
#endif
