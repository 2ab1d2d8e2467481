#include "normformer/sharding/parameter_store.h"

#include <gtest/gtest.h>

namespace normformer {
namespace {

ParameterSpec matrix(const std::string& name, int64_t rows, int64_t columns, bool joins = false,
                     bool embedding = false) {
  return {.name = name,
          .logical_shape = {rows, columns},
          .part = {{0, rows}, {0, columns}, rows, columns},
          .sum_over = {.tensor = false, .replicas = true, .embedding = embedding},
          .owned = true,
          .initial = InitialValue::normal(1.0),
          .joins_previous = joins};
}

TEST(ParameterStore, JoinedParametersAreOneMatrix) {
  Context context(DeviceKind::cpu);
  ParameterStore store(context, DType::f32);
  const Parameter& before = store.declare(matrix("before", 1, 5));
  const Parameter& q = store.declare(matrix("q", 3, 7));
  const Parameter& k = store.declare(matrix("k", 3, 7, true));
  store.allocate(make_self_world(), {});
  EXPECT_EQ(q.offset % 16, 0);
  EXPECT_EQ(before.offset, 0);
  const Tensor both = store.joined_value(q, {6, 7});
  k.value.data<float>()[0] = 42.0f;
  EXPECT_EQ(both.data<float>()[21], 42.0f);
}

TEST(ParameterStore, BucketsCoverEverythingAndNeverMixSums) {
  for (const int64_t bytes : {1, 300, 1 << 20}) {
    Context context(DeviceKind::cpu);
    ParameterStore store(context, DType::bf16);
    store.declare(matrix("embedding", 10, 7, false, true));
    for (int i = 0; i < 9; ++i) store.declare(matrix(fmt::format("w{}", i), 3, 5 + i, i % 3 == 2));
    store.allocate(make_self_world(), {.bucket_bytes = bytes});
    int64_t next = 0;
    for (const Bucket& bucket : store.buckets()) {
      EXPECT_EQ(bucket.flat.begin, next);
      next = bucket.flat.end;
      for (const Parameter& p : store.parameters()) {
        const Range shared = intersect(p.flat_range(), bucket.flat);
        if (shared.empty()) continue;
        EXPECT_EQ(shared, p.flat_range());
        EXPECT_EQ(p.spec.sum_over.embedding, bucket.sum_over.embedding);
      }
    }
    EXPECT_EQ(next, store.flat_values().numel());
    EXPECT_EQ(store.flat_gradients().dtype(), DType::f32);
    EXPECT_EQ(store.buckets().size() > 2, bytes < 1 << 20);
  }
}

TEST(ParameterStore, SumsOverTheTensorGroupShareABucketBehindAllOthers) {
  Context context(DeviceKind::cpu);
  ParameterStore store(context, DType::f32);
  for (int layer = 0; layer < 3; ++layer) {
    ParameterSpec norm = matrix(fmt::format("norm{}", layer), 7, 1);
    norm.sum_over.tensor = true;
    store.declare(norm);
    store.declare(matrix(fmt::format("q{}", layer), 3, 5));
    store.declare(matrix(fmt::format("k{}", layer), 3, 5, true));
  }
  store.allocate(make_self_world(), {});
  ASSERT_EQ(store.buckets().size(), 2);
  EXPECT_FALSE(store.buckets()[0].sum_over.tensor);
  EXPECT_TRUE(store.buckets()[1].sum_over.tensor);
  for (const Parameter& p : store.parameters()) {
    const Bucket& bucket = store.buckets()[p.spec.sum_over.tensor ? 1 : 0];
    EXPECT_EQ(intersect(p.flat_range(), bucket.flat), p.flat_range()) << p.spec.name;
  }
  EXPECT_EQ(store.find("k2")->offset, store.find("q2")->offset + 15);
}

TEST(ParameterStore, DeclaringTwiceOrTooLateIsRefused) {
  Context context(DeviceKind::cpu);
  ParameterStore store(context, DType::f32);
  store.declare(matrix("w", 2, 2));
  EXPECT_THROW(store.declare(matrix("w", 2, 2)), LogicError);
  store.allocate(make_self_world(), {.bucket_bytes = 1});
  EXPECT_THROW(store.declare(matrix("v", 2, 2)), LogicError);
}

TEST(ParameterStore, InitialValuesDependOnNameAndSeedAloneNotOnTheSplit) {
  Context context(DeviceKind::cpu);
  ParameterSpec spec = matrix("w", 5, 6);
  const Tensor whole = context.empty({5, 6}, DType::f64);
  draw_initial_values(context, spec, 3, whole);
  spec.part = {{2, 5}, {1, 4}, 5, 6};
  const Tensor part = context.empty({3, 3}, DType::f64);
  draw_initial_values(context, spec, 3, part);
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t c = 0; c < 3; ++c)
      EXPECT_EQ(part.data<double>()[3 * r + c], whole.data<double>()[6 * (r + 2) + c + 1]);
  }
  const Tensor other = context.empty({5, 6}, DType::f64);
  draw_initial_values(context, matrix("v", 5, 6), 3, other);
  EXPECT_NE(to_host(other), to_host(whole));
}

}  // namespace
}  // namespace normformer
