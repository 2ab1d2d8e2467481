// The meta device foretells memory, costs and traffic of the same code on the CPU, to the byte.
#include <initializer_list>
#include <map>
#include <mutex>
#include <vector>

#include <gtest/gtest.h>

#include "normformer/mesh/layout.h"

#include "small_model.h"

namespace normformer::testing_support {
namespace {

struct Account {
  MemoryReport memory;
  std::map<std::string, OperationCost, std::less<>> costs;
  std::vector<TrafficRecord> traffic;
};

Account account_of_two_steps(const RunConfig& config, DeviceKind device, const Group& world,
                             const MeshDegrees& degrees) {
  SmallModel small(config, device, world, degrees);
  for (int i = 0; i < 2; ++i) small.trainer.step();
  return {small.context.memory().report(), small.context.costs().operations(), world.ledger().records()};
}

void expect_alike(const Account& real, const Account& meta) {
  EXPECT_EQ(real.memory.peak_live, meta.memory.peak_live);
  EXPECT_EQ(real.memory.peak_reserved, meta.memory.peak_reserved);
  EXPECT_EQ(real.memory.at_peak_by_use, meta.memory.at_peak_by_use);
  ASSERT_EQ(real.costs.size(), meta.costs.size());
  for (const auto& [name, cost] : real.costs) {
    EXPECT_EQ(cost.calls, meta.costs.at(name).calls) << name;
    EXPECT_EQ(cost.flops, meta.costs.at(name).flops) << name;
    EXPECT_EQ(cost.bytes, meta.costs.at(name).bytes) << name;
  }
  EXPECT_EQ(real.traffic, meta.traffic);
}

void expect_foretold(const RunConfig& config, const MeshDegrees& degrees) {
  const auto ranks = static_cast<int>(num_ranks(degrees));
  std::vector<Account> real(static_cast<size_t>(ranks));
  run_local_world(ranks, [&](const Group& world) {
    real[static_cast<size_t>(world.rank())] = account_of_two_steps(config, DeviceKind::cpu, world, degrees);
  });
  for (int rank = 0; rank < ranks; ++rank) {
    SCOPED_TRACE(to_string(degrees) + ", rank " + std::to_string(rank));
    expect_alike(real[static_cast<size_t>(rank)],
                 account_of_two_steps(config, DeviceKind::meta, make_meta_world(rank, ranks), degrees));
  }
}

TEST(Meta, ForetellsEveryRankOfALayout) {
  for (const Precision precision :
       {Precision::fp32, Precision::bf16, Precision::fp16, Precision::fp16_memory_efficient}) {
    for (const MeshDegrees& degrees : {MeshDegrees{}, MeshDegrees{.tensor = 2}, MeshDegrees{.data = 2},
                                       MeshDegrees{.tensor = 2, .context = 1, .data = 2, .pipeline = 2}}) {
      expect_foretold(small_config(precision), degrees);
    }
  }
}

TEST(Meta, ForetellsMaskedModels) {
  for (const Precision precision : {Precision::fp32, Precision::bf16}) {
    RunConfig config = small_masked_config(precision);
    expect_foretold(config, {});
    expect_foretold(config, {.tensor = 2, .context = 2});
    config.parallel.sequence = true;
    config.parallel.schedule = PipelineSchedule::zb_h1;
    expect_foretold(config, {.tensor = 2, .context = 1, .data = 2, .pipeline = 2});
  }
}

TEST(Meta, ForetellsClassifiers) {
  for (const AttentionMask attention : {AttentionMask::bidirectional, AttentionMask::causal}) {
    RunConfig config = small_classifier_config(Precision::bf16);
    config.model.layers = 4;
    config.model.attention = attention;
    expect_foretold(config, {});
    expect_foretold(config, {.tensor = 2, .context = 2});
    config.parallel.sequence = true;
    config.parallel.schedule = PipelineSchedule::zb_v;
    expect_foretold(config, {.tensor = 2, .context = 1, .data = 2, .pipeline = 2});
  }
}

TEST(Meta, ForetellsSchedulesAndRecomputation) {
  RunConfig config = small_config(Precision::bf16);
  config.model.layers = 4;
  for (const auto schedule :
       {PipelineSchedule::interleaved, PipelineSchedule::zb_h1, PipelineSchedule::zb_v}) {
    config.parallel.schedule = schedule;
    config.parallel.virtual_stages = schedule == PipelineSchedule::interleaved ? 2 : 1;
    for (const Recompute recompute : {Recompute::none, Recompute::selective, Recompute::full}) {
      config.train.recompute = recompute;
      expect_foretold(config, {.tensor = 2, .pipeline = 2});
    }
  }
}

TEST(Meta, ForetellsSharding) {
  RunConfig config = small_config(Precision::bf16);
  config.model.layers = 4;
  for (const Sharding sharding : {Sharding::gradients, Sharding::parameters}) {
    config.parallel.sharding = sharding;
    config.parallel.schedule = PipelineSchedule::one_f_one_b;
    expect_foretold(config, {.data = 3});
    config.parallel.shard_group = 2;
    expect_foretold(config, {.data = 4});
    config.parallel.shard_group = 0;
    config.parallel.schedule = PipelineSchedule::zb_v;
    expect_foretold(config, {.tensor = 2, .data = 2, .pipeline = 2});
  }
}

TEST(Meta, ForetellsOptimisticUpdates) {
  RunConfig config = small_config(Precision::bf16);
  config.model.layers = 4;
  config.optimizer.optimistic = true;
  expect_foretold(config, {.data = 2});
  config.parallel.schedule = PipelineSchedule::zb_v;
  config.parallel.sharding = Sharding::parameters;
  expect_foretold(config, {.tensor = 2, .data = 2, .pipeline = 2});
}

TEST(Meta, AnOptimisticUpdateKeepsTheStateTwice) {
  for (const Precision precision : {Precision::fp32, Precision::bf16, Precision::fp16_memory_efficient}) {
    RunConfig config = small_config(precision);
    const auto account = [&](bool optimistic) {
      config.optimizer.optimistic = optimistic;
      SmallModel small(config, DeviceKind::meta, make_meta_world(1, 3), {.data = 3});
      small.trainer.step();
      small.trainer.step();
      int64_t scalars = 0;
      for (const Bucket& b : small.model.store().buckets()) scalars += b.piece.size();
      return std::pair(small.context.memory().report(), scalars);
    };
    const auto [without, scalars] = account(false);
    const auto [with, same_scalars] = account(true);
    EXPECT_EQ(scalars, same_scalars);
    const auto optimizer = static_cast<size_t>(MemoryUse::optimizer);
    const int64_t of_master = precision == Precision::fp16_memory_efficient ? 2 : 4;
    EXPECT_EQ(with.live_by_use[optimizer] - without.live_by_use[optimizer],
              Allocator::size_class(of_master * scalars) + 2 * Allocator::size_class(4 * scalars));
  }
}

// ZeRO, Rajbhandari et al. 2020, section 5 and 7: what replicas split, and what that costs in traffic.
TEST(Meta, ShardingDividesMemoryAndMultipliesTrafficByTheMicroBatches) {
  constexpr int kReplicas = 4;
  constexpr int64_t kMicroBatches = 3;
  RunConfig config = small_config(Precision::bf16);
  config.model.layers = 6;
  config.train.micro_batch = 1;
  config.train.global_batch = kMicroBatches * kReplicas;
  const auto account = [&](Sharding sharding) {
    config.parallel.sharding = sharding;
    SmallModel small(config, DeviceKind::meta, make_meta_world(1, kReplicas), {.data = kReplicas});
    int64_t of_layers = 0;
    int64_t of_pieces = 0;
    int64_t others = 0;
    for (const Bucket& b : small.model.store().buckets()) {
      (b.unit >= 0 ? of_layers : others) += b.size();
      if (b.unit >= 0) of_pieces += b.piece.size();
    }
    const MemoryReport at_rest = small.context.memory().report();
    small.model.mesh().world().ledger().clear();
    small.trainer.step();
    std::map<std::string, int64_t> traffic;
    for (const TrafficRecord& r : small.model.mesh().world().ledger().records()) traffic[r.kind] += r.bytes;
    return std::tuple(at_rest, traffic, of_layers, of_pieces, others);
  };
  const auto [whole, whole_traffic, none, no_pieces, everything] = account(Sharding::optimizer);
  const auto [gradients, gradient_traffic, layers, pieces, others] = account(Sharding::gradients);
  const auto [parameters, parameter_traffic, layers3, pieces3, others3] = account(Sharding::parameters);
  ASSERT_EQ(none + no_pieces, 0);
  ASSERT_EQ(std::tuple(layers, pieces, others), std::tuple(layers3, pieces3, others3));
  const auto held = [](const MemoryReport& report, MemoryUse use) {
    return static_cast<double>(report.live_by_use[static_cast<size_t>(use)]);
  };
  // To the byte, as blocks are given out: whole buckets in one, this rank's pieces in another.
  const auto blocks = [](int64_t bytes_each, int64_t some, int64_t more) {
    return static_cast<double>(Allocator::size_class(bytes_each * some) +
                               Allocator::size_class(bytes_each * more));
  };
  EXPECT_LE(pieces, (layers + 6 * kReplicas) / kReplicas);
  EXPECT_EQ(held(gradients, MemoryUse::gradients), blocks(4, others, pieces));
  EXPECT_EQ(held(gradients, MemoryUse::parameters), held(whole, MemoryUse::parameters));
  EXPECT_EQ(held(parameters, MemoryUse::gradients), held(gradients, MemoryUse::gradients));
  EXPECT_EQ(held(parameters, MemoryUse::parameters), blocks(2, others, pieces));
  EXPECT_LT(held(parameters, MemoryUse::parameters), 0.5 * held(whole, MemoryUse::parameters));

  // Payloads in bytes, exactly: a reduction a step, or one a micro-batch; a gathering a step, or one each way
  // a micro-batch.
  EXPECT_EQ(whole_traffic.at("reduce_scatter"), 4 * everything);
  EXPECT_EQ(whole_traffic.at("all_gather"), 2 * everything);
  EXPECT_EQ(gradient_traffic.at("reduce_scatter"), 4 * (kMicroBatches * layers + others));
  EXPECT_EQ(gradient_traffic.at("all_gather"), 2 * (layers + others));
  EXPECT_EQ(parameter_traffic.at("reduce_scatter"), 4 * (kMicroBatches * layers + others));
  EXPECT_EQ(parameter_traffic.at("all_gather"), 2 * (2 * kMicroBatches * layers + others));
}

// Hybrid sharding: memory as among the replicas of a group; what the group reduces goes over the copies once
// a step, in pieces.
TEST(Meta, GroupsDivideMemoryByTheirSizeAndExchangeTheirPieces) {
  constexpr int kReplicas = 12;
  constexpr int64_t kMicroBatches = 3;
  RunConfig config = small_config(Precision::bf16);
  config.model.layers = 6;
  config.train.micro_batch = 1;
  config.train.global_batch = kMicroBatches * kReplicas;
  for (const int64_t group : {1, 2, 3, 4, 6}) {
    for (const Sharding sharding : {Sharding::optimizer, Sharding::gradients, Sharding::parameters}) {
      SCOPED_TRACE(fmt::format("sharding {} in groups of {}", static_cast<int>(sharding), group));
      config.parallel.sharding = sharding;
      config.parallel.shard_group = group;
      SmallModel small(config, DeviceKind::meta, make_meta_world(5, kReplicas), {.data = kReplicas});
      int64_t layers = 0;
      int64_t others = 0;
      int64_t pieces_of_layers = 0;
      int64_t pieces = 0;
      for (const Bucket& b : small.model.store().buckets()) {
        EXPECT_EQ(b.piece.size(), even_part(b.size(), group, 5 % group).size());
        (b.unit >= 0 ? layers : others) += b.size();
        pieces += b.piece.size();
        if (b.unit >= 0) pieces_of_layers += b.piece.size();
      }
      const MemoryReport at_rest = small.context.memory().report();
      const auto held = [&](MemoryUse use) { return at_rest.live_by_use[static_cast<size_t>(use)]; };
      const auto block = [](int64_t bytes_each, int64_t some) {
        return some == 0 ? 0 : Allocator::size_class(bytes_each * some);
      };
      const auto blocks = [&](int64_t bytes_each, bool splits) {
        return splits ? block(bytes_each, others) + block(bytes_each, pieces_of_layers)
                      : block(bytes_each, others + layers);
      };
      const bool splits_values = sharding == Sharding::parameters;
      const bool splits_gradients = sharding != Sharding::optimizer;
      EXPECT_EQ(held(MemoryUse::optimizer), 3 * block(4, pieces));
      EXPECT_EQ(held(MemoryUse::gradients), blocks(4, splits_gradients));
      EXPECT_EQ(held(MemoryUse::parameters), blocks(2, splits_values));

      TrafficLedger& ledger = small.model.mesh().world().ledger();
      ledger.clear();
      small.trainer.step();
      std::map<std::string, int64_t> traffic;
      for (const TrafficRecord& r : ledger.records()) traffic[r.group + " " + r.kind] += r.bytes;
      const int64_t reduced = 4 * ((splits_gradients ? kMicroBatches : 1) * layers + others);
      const int64_t gathered = 2 * ((splits_values ? 2 * kMicroBatches : 1) * layers + others);
      EXPECT_EQ(traffic["sharding reduce_scatter"], group > 1 ? reduced : 0);
      EXPECT_EQ(traffic["sharding all_gather"], group > 1 ? gathered : 0);
      EXPECT_EQ(traffic["replication all_reduce"], 4 * pieces);
      EXPECT_EQ(traffic.count("data reduce_scatter") + traffic.count("data all_gather"), 0u);
    }
  }
}

TEST(Meta, ForetellsSequenceParallelism) {
  for (const Precision precision : {Precision::fp32, Precision::bf16}) {
    RunConfig config = small_config(precision);
    config.parallel.sequence = true;
    for (const MeshDegrees& degrees : {MeshDegrees{.tensor = 2}, MeshDegrees{.tensor = 5},
                                       MeshDegrees{.tensor = 2, .context = 1, .data = 2, .pipeline = 2}}) {
      for (const Recompute recompute : {Recompute::none, Recompute::selective, Recompute::full}) {
        config.train.recompute = recompute;
        expect_foretold(config, degrees);
      }
    }
  }
}

TEST(Meta, ForetellsContextParallelism) {
  for (const Precision precision : {Precision::fp32, Precision::bf16}) {
    RunConfig config = small_config(precision);
    config.model.positions = Positions::learned;
    config.model.length = 13;
    expect_foretold(config, {.context = 2});
    config.train.recompute = Recompute::full;
    expect_foretold(config, {.context = 2, .pipeline = 2});
    config.parallel.sequence = true;
    config.parallel.sharding = Sharding::parameters;
    expect_foretold(config, {.tensor = 2, .context = 3, .data = 2});
  }
}

// What the ring of a layer moves (docs/context.md), micro-batch by micro-batch; nothing else is new but that
// gradients are summed over more ranks.
TEST(Meta, SplitSequencesMoveKeysAndValuesAndTheirGradients) {
  constexpr int64_t kRanks = 4;
  RunConfig config = small_config(Precision::bf16);
  config.model.length = 16 * kRanks;
  SmallModel small(config, DeviceKind::meta, make_meta_world(1, kRanks), {.context = kRanks});
  TrafficLedger& ledger = small.model.mesh().world().ledger();
  ledger.clear();
  small.trainer.compute_gradients();
  std::map<std::string, TrafficRecord> records;
  for (const TrafficRecord& r : ledger.records()) records[r.group + " " + r.kind] = r;
  const int64_t block = config.train.global_batch * 16 * 2 * config.model.width;  // elements of a step
  const int64_t micro_batches = 3;
  for (const char* kind : {"context send", "context receive"}) {
    EXPECT_EQ(records.at(kind).bytes, config.model.layers * (kRanks - 1) * block * (2 + 2 + 4)) << kind;
    EXPECT_EQ(records.at(kind).calls, config.model.layers * (kRanks - 1) * 3 * micro_batches) << kind;
  }
  EXPECT_TRUE(records.contains("replicas reduce_scatter"));
  EXPECT_FALSE(records.contains("data reduce_scatter"));
}

// Of four ranks each keeps a fourth of the tokens.
TEST(Meta, ContextParallelismSavesMemory) {
  RunConfig config = small_config(Precision::bf16);
  config.model.width = 40;
  config.model.ffn = 160;
  config.model.length = 64;
  const auto activations = [&](const MeshDegrees& degrees) {
    const auto ranks = static_cast<int>(num_ranks(degrees));
    const Account account =
        account_of_two_steps(config, DeviceKind::meta, make_meta_world(0, ranks), degrees);
    return account.memory.at_peak_by_use[static_cast<size_t>(MemoryUse::activations)];
  };
  EXPECT_LT(activations({.context = 4}), 0.3 * static_cast<double>(activations({})));
}

RunConfig baseline_of(RunConfig config) {
  config.model.head_scale = HeadScale::none;
  config.model.post_attention_norm = config.model.ffn_norm = config.model.residual_scale = false;
  return config;
}

std::map<std::string, int64_t> calls_of_gradients(const RunConfig& config, const MeshDegrees& degrees) {
  const auto ranks = static_cast<int>(num_ranks(degrees));
  SmallModel small(config, DeviceKind::meta, make_meta_world(ranks - 1, ranks), degrees);
  TrafficLedger& ledger = small.model.mesh().world().ledger();
  ledger.clear();
  small.trainer.compute_gradients();
  std::map<std::string, int64_t> calls;
  for (const TrafficRecord& record : ledger.records()) calls[record.group + " " + record.kind] = record.calls;
  return calls;
}

// What NormFormer adds travels with what the baseline exchanges anyway, save for the folding of weights: one
// reduction a step behind the update, or one a layer where weights come only when they are used.
TEST(Meta, NormFormerHasNoCollectiveThatTheBaselineDoesNotHave) {
  RunConfig config = small_config(Precision::bf16);
  config.parallel.overlap_parameters = false;
  for (const bool sequence : {false, true}) {
    config.parallel.sequence = sequence;
    for (const HeadScale head_scale : {HeadScale::paper, HeadScale::fairseq}) {
      config.model.head_scale = head_scale;
      for (const Recompute recompute : {Recompute::none, Recompute::selective, Recompute::full}) {
        config.train.recompute = recompute;
        for (const MeshDegrees& degrees :
             {MeshDegrees{.tensor = 2}, MeshDegrees{.tensor = 2, .context = 1, .data = 2, .pipeline = 2}}) {
          const auto calls = calls_of_gradients(config, degrees);
          EXPECT_EQ(calls, calls_of_gradients(baseline_of(config), degrees)) << to_string(degrees);
          EXPECT_EQ(calls.contains("tensor all_gather"), sequence);
          EXPECT_EQ(calls.contains("tensor reduce_scatter"), sequence);
        }
      }
    }
  }
}

TEST(Meta, WeightsThatComeForUseAreFoldedOnceALayerAndStep) {
  RunConfig config = small_config(Precision::bf16);
  config.model.layers = 5;
  const MeshDegrees degrees{.tensor = 2, .context = 1, .data = 2, .pipeline = 1};
  for (const int64_t micro_batch : {1, 2}) {
    config.train.micro_batch = micro_batch;
    auto calls = calls_of_gradients(config, degrees);
    calls["tensor all_reduce"] -= config.model.layers;
    EXPECT_EQ(calls, calls_of_gradients(baseline_of(config), degrees));
  }
}

// Of a group of four each rank keeps a fourth of what the stream's passes keep.
TEST(Meta, SequenceParallelismSavesMemory) {
  RunConfig config = small_config(Precision::bf16);
  config.model.width = 40;
  config.model.ffn = 40;
  config.model.length = 48;
  const auto activations = [&](bool sequence) {
    config.parallel.sequence = sequence;
    const Account account =
        account_of_two_steps(config, DeviceKind::meta, make_meta_world(0, 4), {.tensor = 4});
    return account.memory.at_peak_by_use[static_cast<size_t>(MemoryUse::activations)];
  };
  EXPECT_LT(activations(true), 0.7 * static_cast<double>(activations(false)));
}

// What is not kept is not held: by tensors of [tokens, width], as the blocks' Saved lists them.
TEST(Meta, RecomputationSavesMemoryAndCostsOperations) {
  RunConfig config = small_config(Precision::bf16);
  config.model.layers = 6;
  config.model.width = 40;
  config.model.ffn = 160;
  config.model.length = 48;
  const auto account = [&](Recompute recompute, int64_t layers) {
    config.train.recompute = recompute;
    config.train.recompute_layers = layers;
    return account_of_two_steps(config, DeviceKind::meta, make_meta_world(0, 1), {});
  };
  const auto activations = [](const Account& a) {
    return a.memory.at_peak_by_use[static_cast<size_t>(MemoryUse::activations)];
  };
  const Account none = account(Recompute::none, 0);
  const Account selective = account(Recompute::selective, 0);
  const Account some = account(Recompute::full, 3);
  const Account full = account(Recompute::full, 0);
  EXPECT_LT(activations(selective), 0.8 * static_cast<double>(activations(none)));
  EXPECT_LT(activations(some), activations(none));
  EXPECT_LT(activations(full), activations(some));
  EXPECT_LT(activations(full), 0.5 * static_cast<double>(activations(none)));
  const auto calls = [](const Account& a, const char* operation) { return a.costs.at(operation).calls; };
  EXPECT_EQ(calls(selective, "linear_forward"), calls(none, "linear_forward"));
  EXPECT_EQ(calls(selective, "activation_forward"), 2 * calls(none, "activation_forward"));
  EXPECT_EQ(calls(full, "attention_forward"), 2 * calls(none, "attention_forward"));
  EXPECT_EQ(2 * calls(some, "attention_forward"), 3 * calls(none, "attention_forward"));
}

// What the allocator holds for buffers of so many bytes.
int64_t held_for(std::initializer_list<int64_t> buffers) {
  Context context(DeviceKind::meta);
  std::vector<Tensor> kept;
  for (const int64_t bytes : buffers) kept.push_back(context.empty({bytes}, DType::u8));
  return context.memory().report().live;
}

// docs/mixed-precision.md: bytes of a weight, a main gradient, and of a master (none where it is the weight)
// and each moment.
TEST(Meta, BytesOfAParameterUnderEveryPrecision) {
  struct Bytes {
    Precision precision;
    int64_t weight, gradient, master, moment;
  };
  for (const Bytes& bytes : {Bytes{Precision::fp64, 8, 8, 0, 8}, Bytes{Precision::fp32, 4, 4, 0, 4},
                             Bytes{Precision::bf16, 2, 4, 4, 4}, Bytes{Precision::fp16, 2, 4, 4, 4},
                             Bytes{Precision::fp16_memory_efficient, 2, 4, 0, 4}}) {
    SmallModel small(small_config(bytes.precision), DeviceKind::meta, make_meta_world(0, 1));
    const auto live = small.context.memory().report().live_by_use;
    const int64_t n = small.model.store().flat_values().numel();  // with the gaps of aligned starts
    EXPECT_EQ(live[static_cast<size_t>(MemoryUse::parameters)], held_for({bytes.weight * n}));
    EXPECT_EQ(live[static_cast<size_t>(MemoryUse::gradients)], held_for({bytes.gradient * n}));
    EXPECT_EQ(live[static_cast<size_t>(MemoryUse::optimizer)],
              held_for({bytes.master * n, bytes.moment * n, bytes.moment * n}));
  }
}

// LayerNorms of the stream are made in the pass that makes the stream: a call of their own is left to the
// first of a Pre-LN stage, whose input comes from no sub-layer.
TEST(Meta, OnlyTheFirstLayerNormOfAStageIsACallOfItsOwn) {
  for (const NormPosition position : {NormPosition::pre, NormPosition::post}) {
    RunConfig config = small_config(Precision::bf16);
    config.model.norm_position = position;
    const int64_t micro_batches = 3;  // of 2, 2 and 1 sequences
    for (int rank = 0; rank < 2; ++rank) {
      SmallModel small(config, DeviceKind::meta, make_meta_world(rank, 2), {.pipeline = 2});
      small.trainer.step();
      const auto& costs = small.context.costs().operations();
      const auto calls = [&](const char* operation) {
        const auto found = costs.find(operation);
        return found == costs.end() ? 0 : found->second.calls;
      };
      const int64_t layers = small.model.parts().front()->part().layers.size();
      EXPECT_EQ(calls("sublayer_output_forward"), 2 * layers * micro_batches);
      EXPECT_EQ(calls("layer_norm_forward"), position == NormPosition::pre ? micro_batches : 0);
      const bool final_norm = position == NormPosition::pre && rank == 1;
      EXPECT_EQ(calls("layer_norm_backward"), (2 * layers + (final_norm ? 1 : 0)) * micro_batches);
    }
  }
}

// Shapes and counts of the paper's models (arXiv 2110.09456, Table 1; a vocabulary of 51,200 rows).
TEST(Meta, ThePapersModelsHaveThePapersParameters) {
  struct Size {
    int64_t layers, width, heads, baseline, normformer, with_residual_scale;
  };
  for (const Size& size : {Size{12, 768, 12, 124377600, 124469904, 124479120},
                           Size{24, 1024, 16, 354740224, 354986368, 355010944},
                           Size{24, 2048, 32, 1313460224, 1313952512, 1314001664},
                           Size{32, 2560, 32, 2648724480, 2649544704, 2649626624}}) {
    RunConfig config;
    config.model.layers = size.layers;
    config.model.width = size.width;
    config.model.heads = size.heads;
    config.model.ffn = 4 * size.width;
    config.model.vocab = 51200;
    config.model.length = 2048;
    const auto count = [&] {
      Context context(DeviceKind::meta);
      return ModelInstance(context, Mesh(make_self_world(), {}), config, true).count_parameters();
    };
    EXPECT_EQ(count(), size.baseline);
    config.model.head_scale = HeadScale::paper;
    config.model.post_attention_norm = true;
    config.model.ffn_norm = true;
    EXPECT_EQ(count(), size.normformer);
    config.model.residual_scale = true;
    EXPECT_EQ(count(), size.with_residual_scale);
  }
}

// RoBERTa-base of the paper, 125.42M (arXiv 2110.09456, Table 1): with the final LayerNorm and the whole
// head, but positions 0 to 511 only, of which fairseq's table has two rows more.
TEST(Meta, TheMaskedModelHasThePapersParameters) {
  RunConfig config;
  config.model.layers = 12;
  config.model.width = 768;
  config.model.heads = 12;
  config.model.ffn = 3072;
  config.model.vocab = 51200;
  config.model.length = 512;
  config.model.attention = AttentionMask::bidirectional;
  config.model.head = OutputHead::masked_language;
  config.model.positions = Positions::learned;
  Context context(DeviceKind::meta);
  const int64_t parameters =
      ModelInstance(context, Mesh(make_self_world(), {}), config, true).count_parameters();
  constexpr int64_t kLayers = 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768);
  constexpr int64_t kHead = 768 * 768 + 3 * 768 + 51200;
  EXPECT_EQ(parameters, 51200 * 768 + 512 * 768 + kLayers + 2 * 768 + kHead);
  EXPECT_EQ(parameters + 2 * 768, 125'415'680);
  // The same body with the head that it is fine-tuned with.
  config.model.head = OutputHead::classification;
  config.model.classes = 3;
  const int64_t of_classifier =
      ModelInstance(context, Mesh(make_self_world(), {}), config, true).count_parameters();
  EXPECT_EQ(of_classifier, parameters - kHead + 768 * 768 + 768 + 3 * 768 + 3);
}

}  // namespace
}  // namespace normformer::testing_support
