#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/cached_attention.cpp"
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "normformer/tensor/dispatch.h"

#include "ops/cpu/math-inl.h"
#include "ops/cpu/scratch.h"
#include "ops/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

/// The rows of one head of one sequence.
template <class T>
struct CachedHead {
  const T* keys;
  const T* values;
  int64_t stride;  ///< from token to token
  int64_t tokens;
  int64_t size;
};

/// The scores of a query, which become e to the power of what they are below the largest; their sum.
template <class T>
Accumulator<T> soften_scores(const CachedHead<T>& head, const T* query, Accumulator<T>* scores) {
  using A = Accumulator<T>;
  const A scale = A{1} / std::sqrt(static_cast<A>(head.size));
  A largest = -std::numeric_limits<A>::infinity();
  for (int64_t t = 0; t < head.tokens; ++t) {
    const T* key = head.keys + t * head.stride;
    scores[t] = scale * sum_columns<A>(head.size, [&](int64_t c, auto use) HWY_ATTR {
                  return hn::Mul(load(query + c, use), load_ahead(key + c, use));
                });
    largest = std::max(largest, scores[t]);
  }
  const auto subtracted = set<A>(largest);
  for_columns<A>(head.tokens, [&](int64_t t, auto use) HWY_ATTR {
    store(exp_nonpositive(hn::Sub(load(scores + t, use), subtracted)), scores + t, use);
  });
  return sum_columns<A>(head.tokens, [&](int64_t t, auto use) HWY_ATTR { return load(scores + t, use); });
}

template <class T>
void attend(const CachedHead<T>& head, const T* query, T* out) {
  using A = Accumulator<T>;
  thread_local Scratch scratch;
  A* weights = scratch.take<A>(head.tokens);
  const auto share = set<A>(A{1} / soften_scores(head, query, weights));
  for_columns<A>(head.size, [&](int64_t c, auto use) HWY_ATTR {
    auto sum = zero<A>();
    for (int64_t t = 0; t < head.tokens; ++t) {
      sum = hn::MulAdd(set<A>(weights[t]), load(head.values + t * head.stride + c, use), sum);
    }
    store(hn::Mul(sum, share), out + c, use);
  });
}

/// Pairs of a token and a head.
void attend_pairs(const Tensor& qkv, const Tensor& slots, const Tensor& positions, const Tensor& keys,
                  const Tensor& values, const Tensor& out, Range pairs) {
  const int64_t heads = keys.dim(2);
  const int64_t size = keys.dim(3);
  const int64_t channels = heads * size;
  dispatch_floating(qkv.dtype(), [&]<class T>() {
    for (int64_t pair = pairs.begin; pair < pairs.end; ++pair) {
      const int64_t token = pair / heads;
      const int64_t channel = pair % heads * size;
      const int64_t first = slots.data<int32_t>()[token] * keys.dim(1) * channels + channel;
      const CachedHead<T> head{keys.data<T>() + first, values.data<T>() + first, channels,
                               positions.data<int32_t>()[token] + int64_t{1}, size};
      attend(head, qkv.data<T>() + token * 3 * channels + channel,
             out.data<T>() + token * channels + channel);
    }
  });
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(attend_pairs);

void store_keys_and_values(Context& context, const Tensor& qkv, const Tensor& slots, const Tensor& positions,
                           const Tensor& keys, const Tensor& values) {
  const auto row_bytes = static_cast<size_t>(keys.dim(2) * keys.dim(3) * size_of(keys.dtype()));
  const auto* from = static_cast<const std::byte*>(qkv.raw());
  auto* to_keys = static_cast<std::byte*>(keys.raw());
  auto* to_values = static_cast<std::byte*>(values.raw());
  context.threads().parallel_for(qkv.dim(0), row_grain(qkv.dim(1)), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t place = slots.data<int32_t>()[token] * keys.dim(1) + positions.data<int32_t>()[token];
      const std::byte* row = from + static_cast<size_t>(token) * 3 * row_bytes;
      const size_t to = static_cast<size_t>(place) * row_bytes;
      std::memcpy(to_keys + to, row + row_bytes, row_bytes);
      std::memcpy(to_values + to, row + 2 * row_bytes, row_bytes);
    }
  });
}

void cached_attention_forward(Context& context, const Tensor& qkv, const Tensor& slots,
                              const Tensor& positions, const Tensor& keys, const Tensor& values,
                              const Tensor& out) {
  const int64_t pairs = qkv.dim(0) * keys.dim(2);
  const int64_t grain = row_grain(keys.dim(1) * keys.dim(3));
  context.threads().parallel_for(pairs, grain, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(attend_pairs)(qkv, slots, positions, keys, values, out, Range{begin, end});
  });
}

}  // namespace normformer::ops::cpu
#endif
