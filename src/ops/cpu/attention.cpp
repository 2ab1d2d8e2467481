#include "ops/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "normformer/core/checked.h"

#include "ops/cpu/dropout_mask.h"
#include "ops/cpu/gemm.h"

namespace normformer::ops::cpu {

namespace {

constexpr int64_t kBlock = 128;      // queries and keys of a block of scores
constexpr int64_t kLeastTasks = 16;  // fewer heads than this are cut into groups of key blocks

template <class In, class Out>
void gemm(const GemmShape& shape, const In* a, const In* b, const Out* bias, Out* c) {
  gemm_part(shape, {0, shape.m}, {0, shape.n}, a, b, bias, c);
}

// One head of one sequence: where its rows are and what masks and drops its scores.
template <class T>
class Head {
 public:
  using A = Accumulator<T>;

  Head(const AttentionInput<T>& input, int64_t pair)
      : shape_(input.shape),
        dropout_(input.dropout),
        sample_(pair / shape_.heads),
        head_(pair % shape_.heads),
        starts_(input.document_start == nullptr ? nullptr : input.document_start + sample_ * shape_.length) {}

  int64_t length() const { return shape_.length; }
  int64_t size() const { return shape_.head_size; }
  int64_t out_stride() const { return shape_.heads * size(); }
  int64_t qkv_stride() const { return 3 * out_stride(); }
  A scale() const { return A{1} / std::sqrt(static_cast<A>(size())); }

  // The first channel of a token's query (part 0), key (1) or value (2).
  int64_t qkv_at(int part, int64_t token) const {
    return (sample_ * length() + token) * qkv_stride() + part * out_stride() + head_ * size();
  }
  int64_t out_at(int64_t token) const { return (sample_ * length() + token) * out_stride() + head_ * size(); }
  int64_t lse_at(int64_t token) const { return (sample_ * shape_.heads + head_) * length() + token; }

  // The keys that a query attends to.
  Range keys_of(int64_t query) const {
    return {starts_ == nullptr ? 0 : starts_[query], shape_.causal ? query + 1 : length()};
  }

  bool any_pair(Range queries, Range keys) const {
    for (int64_t q = queries.begin; q < queries.end; ++q) {
      if (!intersect(keys_of(q), keys).empty()) return true;
    }
    return false;
  }

  bool drops() const { return dropout_.active(); }

  void dropout_multipliers(int64_t query, Range keys, A* multipliers) const {
    const int64_t row = (shape_.first_head + head_) * length() + query;
    cpu::dropout_multipliers(dropout_.stream, dropout_.first_sample + sample_, row * length() + keys.begin,
                             keys.size(), dropout_.probability, multipliers);
  }

 private:
  const AttentionShape& shape_;
  const Dropout& dropout_;
  int64_t sample_;
  int64_t head_;
  const int32_t* starts_;
};

Range block_at(int64_t length, int64_t block) {
  return {block * kBlock, std::min(length, (block + 1) * kBlock)};
}

template <class T>
class ForwardBlock {
 public:
  using A = Accumulator<T>;

  ForwardBlock(const AttentionInput<T>& input, const Head<T>& head, Range queries)
      : input_(input),
        head_(head),
        queries_(queries),
        scores_(kBlock * kBlock),
        probabilities_(kBlock * kBlock),
        multipliers_(kBlock),
        sums_(static_cast<size_t>(queries.size() * head.size())),
        largest_(kBlock, -std::numeric_limits<A>::infinity()),
        total_(kBlock) {}

  void add_keys(Range keys) {
    const T* qkv = input_.qkv;
    const int64_t ld = head_.qkv_stride();
    gemm({.m = queries_.size(),
          .n = keys.size(),
          .k = head_.size(),
          .lda = ld,
          .ldb = ld,
          .ldc = kBlock,
          .transpose_b = true},
         qkv + head_.qkv_at(0, queries_.begin), qkv + head_.qkv_at(1, keys.begin),
         static_cast<const A*>(nullptr), scores_.data());
    for (int64_t i = 0; i < queries_.size(); ++i) add_row(i, keys);
    gemm({.m = queries_.size(),
          .n = head_.size(),
          .k = keys.size(),
          .lda = kBlock,
          .ldb = ld,
          .ldc = head_.size(),
          .accumulate = true},
         probabilities_.data(), qkv + head_.qkv_at(2, keys.begin), static_cast<const A*>(nullptr),
         sums_.data());
  }

  void finish(T* out, A* lse) const {
    for (int64_t i = 0; i < queries_.size(); ++i) {
      const auto row = static_cast<size_t>(i);
      const A factor = A{1} / total_[row];
      T* to = out + head_.out_at(queries_.begin + i);
      const A* from = sums_.data() + i * head_.size();
      for (int64_t c = 0; c < head_.size(); ++c) to[c] = static_cast<T>(from[c] * factor);
      lse[head_.lse_at(queries_.begin + i)] = largest_[row] + std::log(total_[row]);
    }
  }

 private:
  // Makes probabilities of a row of scores, relative to the largest so far, and rescales what was summed.
  void add_row(int64_t i, Range keys) {
    const int64_t query = queries_.begin + i;
    const Range visible = intersect(head_.keys_of(query), keys);
    T* p = probabilities_.data() + i * kBlock;
    std::fill(p, p + keys.size(), T{});
    if (visible.empty()) return;
    const Range columns{visible.begin - keys.begin, visible.end - keys.begin};
    A* s = scores_.data() + i * kBlock;
    A& largest = largest_[static_cast<size_t>(i)];
    A& total = total_[static_cast<size_t>(i)];
    A new_largest = largest;
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      s[j] *= head_.scale();
      new_largest = std::max(new_largest, s[j]);
    }
    A sum = 0;
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      s[j] = std::exp(s[j] - new_largest);
      sum += s[j];
    }
    const A correction = std::exp(largest - new_largest);
    total = total * correction + sum;
    largest = new_largest;
    A* row = sums_.data() + i * head_.size();
    for (int64_t c = 0; c < head_.size(); ++c) row[c] *= correction;
    if (head_.drops()) {
      head_.dropout_multipliers(query, keys, multipliers_.data());
      for (int64_t j = columns.begin; j < columns.end; ++j) s[j] *= multipliers_[static_cast<size_t>(j)];
    }
    for (int64_t j = columns.begin; j < columns.end; ++j) p[j] = static_cast<T>(s[j]);
  }

  const AttentionInput<T>& input_;
  const Head<T>& head_;
  Range queries_;
  std::vector<A> scores_;
  std::vector<T> probabilities_;
  std::vector<A> multipliers_;
  std::vector<A> sums_;
  std::vector<A> largest_;
  std::vector<A> total_;
};

// The gradients from the pairs of some key blocks of one head.
template <class T>
class BackwardHead {
 public:
  using A = Accumulator<T>;

  BackwardHead(const AttentionInput<T>& input, const AttentionSaved<T>& saved, const Head<T>& head)
      : input_(input),
        saved_(saved),
        head_(head),
        delta_(static_cast<size_t>(head.length())),
        scores_(kBlock * kBlock),
        dp_(kBlock * kBlock),
        dropped_(kBlock * kBlock),
        ds_(kBlock * kBlock),
        multipliers_(kBlock, A{1}),
        dk_(static_cast<size_t>(kBlock * head.size())),
        dv_(static_cast<size_t>(kBlock * head.size())) {
    for (int64_t q = 0; q < head.length(); ++q) {
      const T* a = saved.dout + head.out_at(q);
      const T* b = saved.out + head.out_at(q);
      A sum = 0;
      for (int64_t c = 0; c < head.size(); ++c) sum += static_cast<A>(a[c]) * static_cast<A>(b[c]);
      delta_[static_cast<size_t>(q)] = sum;
    }
  }

  // Writes the gradients of the block's keys and values; adds to dq[length, head_size].
  void run(Range keys, A* dq, T* dqkv) {
    std::fill(dk_.begin(), dk_.end(), A{0});
    std::fill(dv_.begin(), dv_.end(), A{0});
    for (int64_t block = 0; block < ceil_div(head_.length(), kBlock); ++block) {
      const Range queries = block_at(head_.length(), block);
      if (head_.any_pair(queries, keys)) add_queries(queries, keys, dq);
    }
    for (int64_t j = 0; j < keys.size(); ++j) {
      T* dk = dqkv + head_.qkv_at(1, keys.begin + j);
      T* dv = dqkv + head_.qkv_at(2, keys.begin + j);
      const auto row = static_cast<size_t>(j * head_.size());
      for (int64_t c = 0; c < head_.size(); ++c) {
        dk[c] = static_cast<T>(dk_[row + static_cast<size_t>(c)]);
        dv[c] = static_cast<T>(dv_[row + static_cast<size_t>(c)]);
      }
    }
  }

 private:
  void add_queries(Range queries, Range keys, A* dq) {
    const int64_t d = head_.size();
    const int64_t ld = head_.qkv_stride();
    const A* none = nullptr;
    const T* q = input_.qkv + head_.qkv_at(0, queries.begin);
    const T* k = input_.qkv + head_.qkv_at(1, keys.begin);
    const T* v = input_.qkv + head_.qkv_at(2, keys.begin);
    const T* dout = saved_.dout + head_.out_at(queries.begin);
    const int64_t m = queries.size();
    const int64_t n = keys.size();
    gemm({.m = m, .n = n, .k = d, .lda = ld, .ldb = ld, .ldc = kBlock, .transpose_b = true}, q, k, none,
         scores_.data());
    gemm({.m = m, .n = n, .k = d, .lda = head_.out_stride(), .ldb = ld, .ldc = kBlock, .transpose_b = true},
         dout, v, none, dp_.data());
    for (int64_t i = 0; i < m; ++i) differentiate_row(i, queries.begin + i, keys);
    gemm({.m = n,
          .n = d,
          .k = m,
          .lda = kBlock,
          .ldb = head_.out_stride(),
          .ldc = d,
          .transpose_a = true,
          .accumulate = true},
         dropped_.data(), dout, none, dv_.data());
    gemm(
        {.m = n, .n = d, .k = m, .lda = kBlock, .ldb = ld, .ldc = d, .transpose_a = true, .accumulate = true},
        ds_.data(), q, none, dk_.data());
    gemm({.m = m, .n = d, .k = n, .lda = kBlock, .ldb = ld, .ldc = d, .accumulate = true}, ds_.data(), k,
         none, dq + queries.begin * d);
  }

  // Probabilities after dropout, and gradients of scores, of one row.
  void differentiate_row(int64_t i, int64_t query, Range keys) {
    T* dropped = dropped_.data() + i * kBlock;
    T* ds = ds_.data() + i * kBlock;
    std::fill(dropped, dropped + keys.size(), T{});
    std::fill(ds, ds + keys.size(), T{});
    const Range visible = intersect(head_.keys_of(query), keys);
    if (visible.empty()) return;
    if (head_.drops()) head_.dropout_multipliers(query, keys, multipliers_.data());
    const A* s = scores_.data() + i * kBlock;
    const A* dp = dp_.data() + i * kBlock;
    const A lse = saved_.lse[head_.lse_at(query)];
    const A delta = delta_[static_cast<size_t>(query)];
    for (int64_t j = visible.begin - keys.begin; j < visible.end - keys.begin; ++j) {
      const A multiplier = multipliers_[static_cast<size_t>(j)];
      const A p = std::exp(s[j] * head_.scale() - lse);
      dropped[j] = static_cast<T>(p * multiplier);
      ds[j] = static_cast<T>(p * (dp[j] * multiplier - delta) * head_.scale());
    }
  }

  const AttentionInput<T>& input_;
  const AttentionSaved<T>& saved_;
  const Head<T>& head_;
  std::vector<A> delta_;
  std::vector<A> scores_;
  std::vector<A> dp_;
  std::vector<T> dropped_;
  std::vector<T> ds_;
  std::vector<A> multipliers_;
  std::vector<A> dk_;
  std::vector<A> dv_;
};

// Adds up the groups' gradients of queries, in order.
template <class T>
void write_dq(const Head<T>& head, int64_t groups, int64_t group_stride, Accumulator<T>* parts, T* dqkv) {
  const int64_t d = head.size();
  for (int64_t g = 1; g < groups; ++g) {
    const Accumulator<T>* other = parts + g * group_stride;
    for (int64_t i = 0; i < head.length() * d; ++i) parts[i] += other[i];
  }
  for (int64_t q = 0; q < head.length(); ++q) {
    T* to = dqkv + head.qkv_at(0, q);
    for (int64_t c = 0; c < d; ++c) to[c] = static_cast<T>(parts[q * d + c]);
  }
}

}  // namespace

template <class T>
void attention_forward(ThreadPool& threads, const AttentionInput<T>& input, T* out, Accumulator<T>* lse) {
  const AttentionShape& shape = input.shape;
  const int64_t blocks = ceil_div(shape.length, kBlock);
  threads.parallel_for(shape.batch * shape.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Head<T> head(input, task / blocks);
      const Range queries = block_at(shape.length, task % blocks);
      ForwardBlock<T> block(input, head, queries);
      for (int64_t b = 0; b < blocks; ++b) {
        const Range keys = block_at(shape.length, b);
        if (head.any_pair(queries, keys)) block.add_keys(keys);
      }
      block.finish(out, lse);
    }
  });
}

Shape attention_dq_parts(const AttentionShape& s) {
  const int64_t pairs = s.batch * s.heads;
  const int64_t wanted = ceil_div(kLeastTasks, std::max<int64_t>(1, pairs));
  const int64_t groups = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, ceil_div(s.length, kBlock)));
  return {groups, pairs, s.length, s.head_size};
}

template <class T>
void attention_backward(ThreadPool& threads, const AttentionInput<T>& input, const AttentionSaved<T>& saved,
                        Accumulator<T>* dq_parts, T* dqkv) {
  using A = Accumulator<T>;
  const AttentionShape& shape = input.shape;
  const Shape parts = attention_dq_parts(shape);
  const int64_t groups = parts[0];
  const int64_t pairs = parts[1];
  const int64_t head_elements = shape.length * shape.head_size;
  threads.parallel_for(groups * pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / pairs;
      const Head<T> head(input, task % pairs);
      BackwardHead<T> backward(input, saved, head);
      A* dq = dq_parts + task * head_elements;
      std::fill(dq, dq + head_elements, A{0});
      for (int64_t b = group; b < ceil_div(shape.length, kBlock); b += groups) {
        backward.run(block_at(shape.length, b), dq, dqkv);
      }
    }
  });
  threads.parallel_for(pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      write_dq(Head<T>(input, pair), groups, pairs * head_elements, dq_parts + pair * head_elements, dqkv);
    }
  });
}

template void attention_forward(ThreadPool&, const AttentionInput<double>&, double*, double*);
template void attention_forward(ThreadPool&, const AttentionInput<float>&, float*, float*);
template void attention_forward(ThreadPool&, const AttentionInput<bf16>&, bf16*, float*);
template void attention_backward(ThreadPool&, const AttentionInput<double>&, const AttentionSaved<double>&,
                                 double*, double*);
template void attention_backward(ThreadPool&, const AttentionInput<float>&, const AttentionSaved<float>&,
                                 float*, float*);
template void attention_backward(ThreadPool&, const AttentionInput<bf16>&, const AttentionSaved<bf16>&,
                                 float*, bf16*);

}  // namespace normformer::ops::cpu
