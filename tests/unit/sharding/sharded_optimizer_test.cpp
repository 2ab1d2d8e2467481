#include "normformer/sharding/sharded_optimizer.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

namespace normformer {
namespace {

struct Model {
  Model(Context& context, const Group& world, DType dtype, int64_t bucket_bytes)
      : Model(context, world, dtype, accumulator_of(dtype), bucket_bytes) {}

  Model(Context& context, const Group& world, DType dtype, DType masters, int64_t bucket_bytes)
      : store(context, dtype) {
    for (const auto& [name, rows, columns] : std::vector<std::tuple<std::string, int64_t, int64_t>>{
             {"a", 5, 7}, {"b", 1, 3}, {"c", 11, 2}, {"d", 4, 4}}) {
      store.declare({.name = name,
                     .logical_shape = {rows, columns},
                     .part = {{0, rows}, {0, columns}, rows, columns},
                     .sum_over = {.tensor = false, .replicas = true, .embedding = false},
                     .owned = true,
                     .initial = InitialValue::normal(0.5)});
    }
    store.allocate(world, {.bucket_bytes = bucket_bytes});
    optimizer.emplace(store, masters, Mesh(world, {.data = world.size()}));
    optimizer->initialise(9);
  }

  // Gradients whose sum over any number of ranks is exact and the same: rank 0 has them all but for a share
  // of zeros.
  void set_gradients(const Group& world) {
    for (const Parameter& p : store.parameters()) {
      for (int64_t i = 0; i < p.numel(); ++i) {
        const double value = static_cast<double>((i * 37 + p.offset) % 101) / 64.0 - 0.75;
        const double mine = i % world.size() == world.rank() ? value : 0.0;
        if (p.gradient.dtype() == DType::f64)
          p.gradient.data<double>()[i] = mine;
        else
          p.gradient.data<float>()[i] = static_cast<float>(mine);
      }
    }
  }

  ParameterStore store;
  std::optional<ShardedOptimizer> optimizer;
};

struct Outcome {
  double norm = 0.0;
  std::vector<std::vector<double>> weights;
  bool operator==(const Outcome&) const = default;
};

std::vector<GradientSize> sizes_of_all(const Group& world, ShardedOptimizer& optimizer) {
  Context context(DeviceKind::cpu);
  const GradientSize mine = optimizer.gradient_size();
  std::vector<double> numbers = {mine.largest};
  numbers.insert(numbers.end(), mine.bins.begin(), mine.bins.end());
  std::vector<double> all;
  world.start_gather(context, numbers, all).wait();
  std::vector<GradientSize> sizes;
  for (auto rank = all.begin(); rank != all.end(); rank += static_cast<std::ptrdiff_t>(numbers.size())) {
    sizes.push_back({.largest = *rank});
    std::copy_n(rank + 1, mine.bins.size(), sizes.back().bins.begin());
  }
  return sizes;
}

Outcome train(const Group& world, DType dtype, DType masters, int64_t bucket_bytes) {
  Context context(DeviceKind::cpu);
  Model model(context, world, dtype, masters, bucket_bytes);
  Outcome outcome;
  for (int64_t update = 1; update <= 3; ++update) {
    model.store.zero_gradients();
    model.set_gradients(world);
    model.optimizer->reduce_gradients();
    outcome.norm = norm_of(sizes_of_all(world, *model.optimizer));
    model.optimizer->step({.lr = 0.01, .weight_decay = 0.1, .grad_factor = 0.5, .update = update});
  }
  for (const Parameter& p : model.store.parameters()) outcome.weights.push_back(to_host(p.value));
  return outcome;
}

TEST(ShardedOptimizer, NeitherRanksNorBucketsChangeABit) {
  for (const auto& [dtype, masters] : {std::pair{DType::f64, DType::f64},
                                       {DType::f32, DType::f32},
                                       {DType::bf16, DType::f32},
                                       {DType::f16, DType::f32},
                                       {DType::f16, DType::f16}}) {
    const Outcome expected = train(make_self_world(), dtype, masters, 1 << 20);
    EXPECT_GT(expected.norm, 0.0);
    for (const int ranks : {1, 2, 3, 5}) {
      for (const int64_t bucket_bytes : {1, 200, 1 << 20}) {
        run_local_world(ranks, [&](const Group& world) {
          EXPECT_EQ(train(world, dtype, masters, bucket_bytes), expected)
              << ranks << " ranks, buckets of " << bucket_bytes;
        });
      }
    }
  }
}

TEST(ShardedOptimizer, NormIsTheNormOfTheSum) {
  run_local_world(3, [](const Group& world) {
    Context context(DeviceKind::cpu);
    Model model(context, world, DType::f64, 100);
    model.set_gradients(world);
    model.optimizer->reduce_gradients();
    double expected = 0.0;
    for (const Parameter& p : model.store.parameters()) {
      for (int64_t i = 0; i < p.numel(); ++i) {
        const double value = static_cast<double>((i * 37 + p.offset) % 101) / 64.0 - 0.75;
        expected += value * value;
      }
    }
    EXPECT_NEAR(norm_of(sizes_of_all(world, *model.optimizer)), std::sqrt(expected), 1e-14);
  });
}

void expect_parts_of_gradients_added(const MeshDegrees& degrees) {
  run_local_world(4, [&](const Group& world) {
    Context context(DeviceKind::cpu);
    ParameterStore store(context, DType::f64);
    for (const bool tensor : {true, false}) {
      store.declare({.name = tensor ? "vector" : "shard",
                     .logical_shape = {7},
                     .part = {{0, 7}, {0, 1}, 7, 1},
                     .sum_over = {.tensor = tensor, .replicas = true, .embedding = false},
                     .owned = true,
                     .initial = InitialValue::constant(0.0)});
    }
    const Mesh mesh(world, degrees);
    store.allocate(mesh.replicas(), {});
    ShardedOptimizer optimizer(store, DType::f64, mesh);
    for (const Parameter& p : store.parameters())
      std::fill_n(p.gradient.data<double>(), p.numel(), static_cast<double>(1 << world.rank()));
    optimizer.reduce_gradients();
    // Ranks 0 and 2 are replicas of each other, and 1 and 3.
    const double of_replicas = world.rank() % 2 == 0 ? 1 + 4 : 2 + 8;
    int64_t seen = 0;
    for (const ParameterPiece& piece : optimizer.owned_gradients()) {
      const double expected = piece.parameter->spec.sum_over.tensor ? 1 + 2 + 4 + 8 : of_replicas;
      for (const double value : to_host(piece.values)) EXPECT_EQ(value, expected);
      seen += piece.range.size();
    }
    EXPECT_GT(seen, 0);
  });
}

TEST(ShardedOptimizer, PartsOfAGradientAreAddedOverTensorGroupAndReplicas) {
  expect_parts_of_gradients_added({.tensor = 2, .data = 2});
  expect_parts_of_gradients_added({.tensor = 2, .context = 2});
}

TEST(ShardedOptimizer, OneBadGradientIsKnownToAllRanks) {
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    run_local_world(3, [&](const Group& world) {
      Context context(DeviceKind::cpu);
      Model model(context, world, DType::f32, 100);
      if (world.rank() == 1) model.store.parameters()[2].gradient.data<float>()[4] = bad;
      model.optimizer->reduce_gradients();
      EXPECT_EQ(largest_of(sizes_of_all(world, *model.optimizer)), std::numeric_limits<double>::infinity());
    });
  }
}

TEST(ShardedOptimizer, MastersKeepWhatSixteenBitsCannot) {
  Context context(DeviceKind::cpu);
  Model model(context, make_self_world(), DType::bf16, 1 << 20);
  double largest_difference = 0.0;
  for (const StatePiece& state : model.optimizer->state()) {
    if (state.role != StateRole::master) continue;
    const Parameter& p = *state.piece.parameter;
    const auto masters = to_host(state.piece.values);
    const auto values = to_host(p.value);
    for (int64_t i = 0; i < state.piece.range.size(); ++i) {
      const double master = masters[i];
      EXPECT_EQ(values[state.piece.range.begin + i], static_cast<float>(bf16(static_cast<float>(master))));
      largest_difference =
          std::max(largest_difference, std::abs(master - values[state.piece.range.begin + i]));
    }
  }
  EXPECT_GT(largest_difference, 0.0);
}

TEST(ShardedOptimizer, WithoutMastersTheWeightsAreTheState) {
  Context context(DeviceKind::cpu);
  Model model(context, make_self_world(), DType::f16, DType::f16, 1 << 20);
  int64_t masters = 0;
  for (const StatePiece& state : model.optimizer->state()) {
    if (state.role != StateRole::master) {
      EXPECT_EQ(state.piece.values.dtype(), DType::f32);
      continue;
    }
    const Tensor& value = state.piece.parameter->value;
    EXPECT_EQ(state.piece.values.dtype(), DType::f16);
    EXPECT_EQ(state.piece.values.data<f16>(), value.data<f16>() + state.piece.range.begin);
    masters += state.piece.range.size();
  }
  EXPECT_EQ(masters, model.store.owned_scalars());
  EXPECT_THROW(Model(context, make_self_world(), DType::f16, DType::f64, 1 << 20), LogicError);
}

}  // namespace
}  // namespace normformer
