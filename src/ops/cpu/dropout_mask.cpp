#include "ops/cpu/dropout_mask.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cpu/dropout_mask.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "ops/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace normformer::ops::cpu::HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

inline constexpr int64_t kMostBlocks = 1;

HWY_INLINE int64_t blocks_at_once() { return 1; }

/// The multipliers of the elements of one block.
template <class A>
HWY_INLINE void store_blocks(RandomStream stream, int64_t sample, int64_t block, uint32_t threshold, A scale,
                             A* to) {
  for (const uint32_t word : stream.words(static_cast<uint64_t>(block), static_cast<uint64_t>(sample)))
    *to++ = word >= threshold ? scale : A(0);
}

#else

using Words = Tag<uint32_t>;
using Counters = hn::Repartition<uint64_t, Words>;

// Vectors of counters in flight: a round is a chain of a multiplication and two xors, and one alone would
// wait.
inline constexpr size_t kVectors = HWY_TARGET == HWY_AVX3 ? 4 : 2;

inline constexpr int64_t kMostBlocks = kVectors * HWY_MAX_BYTES / sizeof(uint64_t);

HWY_INLINE int64_t blocks_at_once() { return static_cast<int64_t>(kVectors * hn::Lanes(Counters())); }

HWY_INLINE void store_multipliers(hn::Vec<Words> words, uint32_t threshold, float scale, float* to) {
  const Tag<float> tag;
  // Not below the threshold: of unsigned lanes there is a maximum everywhere, but no comparison.
  const auto kept = hn::RebindMask(tag, hn::Eq(hn::Max(words, hn::Set(Words(), threshold)), words));
  hn::StoreU(hn::IfThenElseZero(kept, hn::Set(tag, scale)), tag, to);
}

HWY_INLINE void store_multipliers(hn::Vec<Words> words, uint32_t threshold, double scale, double* to) {
  HWY_ALIGN uint32_t local[HWY_MAX_BYTES / sizeof(uint32_t)];
  hn::Store(words, Words(), local);
  for (size_t i = 0; i < hn::Lanes(Words()); ++i) to[i] = local[i] >= threshold ? scale : 0.0;
}

/// The counters of as many blocks as a vector has 64-bit lanes, or their words. Each of the four words rides
/// in the lower half of a 64-bit lane; what is above it is never read.
struct Blocks {
  hn::Vec<Counters> w0, w1, w2, w3;
};

/// Lane 2 j takes block j and lane 2 j + 1 block n / 2 + j of n, which interleaving brings into order.
HWY_INLINE Blocks counters_from(uint64_t block, uint64_t sample) {
  const Counters tag;
  const auto lane = hn::Iota(tag, 0);
  const auto odd = hn::Sub(hn::Zero(tag), hn::And(lane, hn::Set(tag, 1)));  // all ones where the lane is odd
  const auto half = hn::And(odd, hn::Set(tag, hn::Lanes(tag) / 2));
  const auto w0 = hn::Add(hn::Set(tag, block), hn::Add(half, hn::ShiftRight<1>(lane)));
  return {w0, hn::ShiftRight<32>(w0), hn::Set(tag, sample), hn::Set(tag, sample >> 32)};
}

/// One round of philox4x32.
HWY_INLINE Blocks next_round(const Blocks& b, hn::Vec<Counters> key0, hn::Vec<Counters> key1) {
  const Words words;
  const auto p0 = hn::MulEven(hn::BitCast(words, b.w0), hn::Set(words, 0xD2511F53u));
  const auto p1 = hn::MulEven(hn::BitCast(words, b.w2), hn::Set(words, 0xCD9E8D57u));
  return {hn::Xor(hn::Xor(hn::ShiftRight<32>(p1), b.w1), key0), p1,
          hn::Xor(hn::Xor(hn::ShiftRight<32>(p0), b.w3), key1), p0};
}

/// Stores the multipliers of the blocks' words, in order.
template <class A>
HWY_INLINE void store_in_order(const Blocks& b, uint32_t threshold, A scale, A* to) {
  const Words words;
  const Counters counters;
  const auto w01 = hn::BitCast(
      counters, hn::OddEven(hn::BitCast(words, hn::ShiftLeft<32>(b.w1)), hn::BitCast(words, b.w0)));
  const auto w23 = hn::BitCast(
      counters, hn::OddEven(hn::BitCast(words, hn::ShiftLeft<32>(b.w3)), hn::BitCast(words, b.w2)));
  const auto lower = hn::BitCast(words, hn::InterleaveLower(counters, w01, w23));
  const auto upper = hn::BitCast(words, hn::InterleaveUpper(counters, w01, w23));
  store_multipliers(lower, threshold, scale, to);
  store_multipliers(upper, threshold, scale, to + hn::Lanes(words));
}

/// The multipliers of the elements of blocks_at_once() blocks from `block`.
template <class A>
HWY_INLINE void store_blocks(RandomStream stream, int64_t sample, int64_t block, uint32_t threshold, A scale,
                             A* to) {
  const Counters tag;
  const size_t n = hn::Lanes(tag);
  Blocks blocks[kVectors];
  for (size_t i = 0; i < kVectors; ++i)
    blocks[i] = counters_from(static_cast<uint64_t>(block) + i * n, static_cast<uint64_t>(sample));
  auto k0 = static_cast<uint32_t>(stream.key);
  auto k1 = static_cast<uint32_t>(stream.key >> 32);
  for (int round = 0; round < 10; ++round) {
    const auto key0 = hn::Set(tag, uint64_t{k0});
    const auto key1 = hn::Set(tag, uint64_t{k1});
    for (Blocks& b : blocks) b = next_round(b, key0, key1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (size_t i = 0; i < kVectors; ++i) store_in_order(blocks[i], threshold, scale, to + 4 * i * n);
}

#endif

template <class A>
void fill(RandomStream stream, int64_t sample, int64_t first, int64_t count, uint32_t threshold, A scale,
          A* out) {
  const int64_t step = 4 * blocks_at_once();
  int64_t block = first / 4;
  int64_t done = -(first % 4);  // elements of `block` that lie before the run
  for (; done < count; done += step, block += blocks_at_once()) {
    if (done >= 0 && done + step <= count) {
      store_blocks(stream, sample, block, threshold, scale, out + done);
      continue;
    }
    HWY_ALIGN A local[kMostBlocks * 4];
    store_blocks(stream, sample, block, threshold, scale, local);
    const int64_t begin = std::max<int64_t>(done, 0);
    const int64_t end = std::min(done + step, count);
    std::memcpy(out + begin, local + (begin - done), static_cast<size_t>(end - begin) * sizeof(A));
  }
}

void fill_float(RandomStream stream, int64_t sample, int64_t first, int64_t count, uint32_t threshold,
                float scale, float* out) {
  fill(stream, sample, first, count, threshold, scale, out);
}

void fill_double(RandomStream stream, int64_t sample, int64_t first, int64_t count, uint32_t threshold,
                 double scale, double* out) {
  fill(stream, sample, first, count, threshold, scale, out);
}

}  // namespace normformer::ops::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace normformer::ops::cpu {

HWY_EXPORT(fill_float);
HWY_EXPORT(fill_double);

void dropout_multipliers(RandomStream stream, int64_t sample, int64_t first, int64_t count,
                         double probability, float* multipliers) {
  HWY_DYNAMIC_DISPATCH(fill_float)
  (stream, sample, first, count, keep_threshold(probability), static_cast<float>(1.0 / (1.0 - probability)),
   multipliers);
}

void dropout_multipliers(RandomStream stream, int64_t sample, int64_t first, int64_t count,
                         double probability, double* multipliers) {
  HWY_DYNAMIC_DISPATCH(fill_double)
  (stream, sample, first, count, keep_threshold(probability), 1.0 / (1.0 - probability), multipliers);
}

}  // namespace normformer::ops::cpu
#endif
