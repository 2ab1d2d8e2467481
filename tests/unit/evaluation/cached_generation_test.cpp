// Keys and values read from a cache against passes over whole texts, which need none.
#include <cmath>
#include <map>
#include <set>

#include <gtest/gtest.h>

#include "normformer/evaluation/generation.h"

#include "small_model.h"
#include "test_device.h"

namespace normformer::testing_support {
namespace {

// What a model's parts may be, beside small_config() itself.
const std::map<std::string, std::function<void(ModelConfig&)>> kVariants{
    {"NormFormer", [](ModelConfig&) {}},
    {"baseline",
     [](ModelConfig& m) {
       m.head_scale = HeadScale::none;
       m.post_attention_norm = m.ffn_norm = m.residual_scale = false;
     }},
    {"plain FFN norm, learned positions",
     [](ModelConfig& m) {
       m.ffn_norm_form = FfnNormForm::plain;
       m.positions = Positions::learned;
     }},
    {"fairseq's head scale, relu squared",
     [](ModelConfig& m) {
       m.head_scale = HeadScale::fairseq;
       m.activation = Activation::relu_squared;
       m.embedding_scale = false;
     }},
    {"Post-LN", [](ModelConfig& m) { m.norm_position = NormPosition::post; }},
    {"LayerNorms on queries, keys and values", [](ModelConfig& m) { m.qkv_norm = true; }}};

RunConfig variant(const std::string& name, Precision precision = Precision::fp64) {
  RunConfig config = small_config(precision);
  config.optimizer.lr = 0.03;
  kVariants.at(name)(config.model);
  return config;
}

struct Layout {
  MeshDegrees degrees;
  bool sequence = false;
  Sharding sharding = Sharding::optimizer;
  PipelineSchedule schedule = PipelineSchedule::one_f_one_b;
};

// Ranks that divide nothing; more ranks than a pass has tokens; parts that go to and fro.
const std::vector<Layout> kLayouts{{{}},
                                   {{.tensor = 2}},
                                   {{.tensor = 5}, true},
                                   {{.pipeline = 3}},
                                   {{.tensor = 2, .data = 2, .pipeline = 2}, true},
                                   {{.data = 3}, false, Sharding::parameters},
                                   {{.tensor = 3, .data = 2}, true, Sharding::gradients}};

RunConfig on_layout(RunConfig config, const Layout& layout) {
  config.parallel.sequence = layout.sequence;
  config.parallel.sharding = layout.sharding;
  config.parallel.schedule = layout.schedule;
  return config;
}

// Weights of which none is what it was drawn as: gains are no longer 1.
void train_a_little(SmallModel& small) {
  for (int i = 0; i < 3; ++i) small.trainer.step();
  small.model.prepare();
}

template <class Body>
void on_ranks(const RunConfig& config, const Layout& layout, Body&& body,
              DeviceKind device = DeviceKind::cpu) {
  run_local_world(static_cast<int>(num_ranks(layout.degrees)), [&](const Group& world) {
    SmallModel small(on_layout(config, layout), device, world, layout.degrees);
    train_a_little(small);
    body(small.model);
  });
}

std::vector<int32_t> text_of(int64_t sequence, int64_t length) {
  std::vector<int32_t> tokens;
  for (int64_t t = 0; t < length; ++t)
    tokens.push_back(static_cast<int32_t>((t * t * 7 + sequence * 3) % 41));
  return tokens;
}

MicroBatch generation_batch(ModelInstance& model, const std::vector<int32_t>& tokens, int64_t sequences,
                            int64_t length) {
  MicroBatch batch;
  batch.sequences = sequences;
  batch.length = length;
  batch.part = SequencePart::whole(length);
  batch.purpose = Purpose::generation;
  batch.tokens = from_host<int32_t>(model.context(), tokens, {static_cast<int64_t>(tokens.size())});
  return batch;
}

// This rank's logits behind a text, of a pass over all of it; empty where the last part is elsewhere.
std::vector<double> logits_behind(ModelInstance& model, const std::vector<int32_t>& text) {
  model.set_micro_batches({generation_batch(model, text, 1, static_cast<int64_t>(text.size()))});
  model.forward(1);
  return model.has_last_part() ? to_host(model.result(0)) : std::vector<double>();
}

// The same of several texts, by continuing what the cache has.
std::vector<std::vector<double>> logits_behind(ModelInstance& model, const KeyValueCache& cache,
                                               const std::vector<ContinuedSequence>& sequences,
                                               const std::vector<std::vector<int32_t>>& texts) {
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < texts.size(); ++i) {
    const auto first = texts[i].begin() + sequences[i].first;
    tokens.insert(tokens.end(), first, first + sequences[i].tokens);
  }
  MicroBatch batch =
      generation_batch(model, tokens, static_cast<int64_t>(texts.size()), model.environment().config.length);
  batch.continuation = make_continuation(model.context(), cache, sequences);
  model.set_micro_batches({batch});
  model.forward(1);
  std::vector<std::vector<double>> logits;
  for (int64_t i = 0; model.has_last_part() && i < model.result(0).dim(0); ++i)
    logits.push_back(to_host(model.result(0).rows(i, i + 1)));
  return logits;
}

// Texts of several lengths grow, each in its slot, by one token and by several.
void expect_whole_passes(ModelInstance& model) {
  const std::vector<int64_t> slots{2, 0, 3};
  const std::vector<std::vector<int64_t>> growth{{5, 1, 9}, {1, 1, 1}, {1, 1, 1}, {3, 5, 1}};
  const KeyValueCache cache = model.make_cache(4, 12);
  std::vector<int64_t> lengths(slots.size());
  for (const std::vector<int64_t>& grow : growth) {
    std::vector<ContinuedSequence> sequences;
    std::vector<std::vector<int32_t>> texts;
    for (size_t i = 0; i < slots.size(); ++i) {
      sequences.push_back({slots[i], lengths[i], grow[i]});
      lengths[i] += grow[i];
      texts.push_back(text_of(static_cast<int64_t>(i), lengths[i]));
    }
    const auto got = logits_behind(model, cache, sequences, texts);
    for (size_t i = 0; i < texts.size(); ++i) {
      const std::vector<double> want = logits_behind(model, texts[i]);
      double largest = 0.0;
      for (const double l : want) largest = std::max(largest, std::abs(l));
      for (size_t v = 0; v < want.size(); ++v)
        ASSERT_NEAR(got[i][v], want[v], 1e-12 * largest) << "text " << i << " of " << lengths[i];
    }
  }
}

TEST(KeyValueCache, LogitsAreThoseOfWholePassesOfEveryModelUnderEveryLayout) {
  for (const auto& [name, change] : kVariants) {
    for (const Layout& layout : kLayouts) {
      SCOPED_TRACE(name + " on " + to_string(layout.degrees));
      on_ranks(variant(name), layout, expect_whole_passes);
    }
  }
}

TEST(KeyValueCacheOnDevices, LogitsAreThoseOfWholePasses) {
  for (const std::string name : {"NormFormer", "LayerNorms on queries, keys and values"}) {
    SCOPED_TRACE(name);
    for (const Layout& layout : {Layout{}, Layout{{.tensor = 2}, true}})
      on_ranks(variant(name), layout, expect_whole_passes, test_device());
  }
}

TEST(KeyValueCache, ATextsBitsDoNotDependOnThoseBesideIt) {
  on_ranks(variant("NormFormer", Precision::fp32), {}, [](ModelInstance& model) {
    const std::vector<std::vector<int32_t>> texts{text_of(0, 4), text_of(1, 11), text_of(2, 2)};
    const std::vector<std::vector<ContinuedSequence>> passes{{{0, 0, 3}, {1, 0, 10}, {2, 0, 1}},
                                                             {{0, 3, 1}, {1, 10, 1}, {2, 1, 1}}};
    const KeyValueCache together = model.make_cache(3, 12);
    const KeyValueCache alone = model.make_cache(3, 12);
    for (const std::vector<ContinuedSequence>& pass : passes) {
      const auto all = logits_behind(model, together, pass, texts);
      for (size_t i = 0; i < texts.size(); ++i)
        EXPECT_EQ(logits_behind(model, alone, {pass[i]}, {texts[i]}).front(), all[i]) << "text " << i;
    }
  });
}

// 2 layers width b bytes a token, over all ranks that share a model.
TEST(KeyValueCache, RanksShareItsMemory) {
  for (const MeshDegrees& degrees : {MeshDegrees{}, MeshDegrees{.tensor = 2, .pipeline = 3}}) {
    const RunConfig config = small_config(Precision::bf16);
    run_local_world(static_cast<int>(num_ranks(degrees)), [&](const Group& world) {
      SmallModel small(config, DeviceKind::cpu, world, degrees);
      const KeyValueCache cache = small.model.make_cache(4, 12);
      int64_t bytes = 0;
      for (const auto& part : small.model.parts()) {
        for (int64_t layer = part->part().layers.begin; layer < part->part().layers.end; ++layer)
          bytes += cache.of_layer(layer).keys.nbytes() + cache.of_layer(layer).values.nbytes();
      }
      EXPECT_EQ(world.all_reduce_sum(bytes), 4 * 12 * 2 * config.model.layers * config.model.width * 2);
    });
  }
}

TEST(KeyValueCache, WhatItHasNoRoomForIsRefused) {
  SmallModel small(small_config(Precision::fp32), DeviceKind::cpu, make_self_world());
  const KeyValueCache cache = small.model.make_cache(2, 6);
  const auto continuation = [&](const ContinuedSequence& sequence) {
    make_continuation(small.context, cache, {sequence});
  };
  EXPECT_NO_THROW(continuation({1, 2, 4}));
  for (const ContinuedSequence& wrong :
       {ContinuedSequence{2, 0, 1}, ContinuedSequence{-1, 0, 1}, ContinuedSequence{0, -1, 1},
        ContinuedSequence{0, 0, 0}, ContinuedSequence{0, 2, 5}, ContinuedSequence{0, 7, 1}})
    EXPECT_THROW(continuation(wrong), LogicError);
  EXPECT_THROW(cache.of_layer(3), LogicError);
}

// Every token by a pass over the last `length` tokens of its text.
std::vector<int32_t> continued_by_whole_passes(ModelInstance& model, const std::vector<int32_t>& prompt,
                                               const GenerationOptions& options, int64_t number,
                                               int64_t sample) {
  const RandomStream stream =
      RandomStream{options.seed}.with("generation").with(static_cast<uint64_t>(number));
  const int64_t length = model.environment().config.length;
  std::vector<int32_t> text = prompt;
  std::vector<int32_t> made;
  while (static_cast<int64_t>(made.size()) < options.max_tokens) {
    const auto seen = std::min<int64_t>(length, static_cast<int64_t>(text.size()));
    const std::vector<double> logits = logits_behind(model, {text.end() - seen, text.end()});
    const int32_t token = sample_token(logits, options, stream.with(static_cast<uint64_t>(sample)),
                                       static_cast<int64_t>(made.size()));
    if (token == options.stop) break;
    made.push_back(token);
    text.push_back(token);
  }
  return made;
}

// Shorter than the model's length, as long, longer; none grows only within it.
const std::vector<std::vector<int32_t>> kPrompts{text_of(0, 3),  text_of(1, 11), text_of(2, 1),
                                                 text_of(3, 12), text_of(4, 30), text_of(5, 7)};

// Beyond the model's length of 12, with a token that ends some texts.
GenerationOptions options_for(double temperature) {
  return {.max_tokens = 14, .temperature = temperature, .top_p = 0.95, .seed = 9, .stop = 5, .samples = 2};
}

std::vector<std::vector<int32_t>> expected_texts(const RunConfig& config, const GenerationOptions& options) {
  std::vector<std::vector<int32_t>> texts;
  on_ranks(config, {}, [&](ModelInstance& model) {
    for (size_t p = 0; p < kPrompts.size(); ++p) {
      for (int64_t s = 0; s < options.samples; ++s)
        texts.push_back(continued_by_whole_passes(model, kPrompts[p], options, static_cast<int64_t>(p), s));
    }
  });
  return texts;
}

std::vector<std::vector<int32_t>> tokens_of(const std::vector<GeneratedText>& texts) {
  std::vector<std::vector<int32_t>> tokens;
  for (const GeneratedText& text : texts) tokens.push_back(text.tokens);
  return tokens;
}

TEST(Generate, TextsAreThoseOfWholePassesWhateverTheBatchAndTheLayout) {
  const RunConfig config = variant("NormFormer");
  for (const double temperature : {0.0, 1.3}) {
    GenerationOptions options = options_for(temperature);
    const auto expected = expected_texts(config, options);
    std::set<size_t> lengths;
    for (const auto& text : expected) lengths.insert(text.size());
    EXPECT_TRUE(temperature == 0.0 || lengths.size() > 1) << "no text ends early";
    for (const Layout& layout : kLayouts) {
      for (const int64_t batch : {1, 3, 16}) {
        options.batch = batch;
        on_ranks(config, layout, [&](ModelInstance& model) {
          EXPECT_EQ(tokens_of(generate(model, kPrompts, options)), expected)
              << batch << " at a time on " << to_string(layout.degrees);
        });
      }
    }
  }
}

TEST(GenerateOnDevices, TextsAreTheHosts) {
  const RunConfig config = variant("NormFormer");
  const GenerationOptions options = options_for(1.3);
  const auto expected = expected_texts(config, options);
  const auto expect_same = [&](ModelInstance& model) {
    EXPECT_EQ(tokens_of(generate(model, kPrompts, options)), expected);
  };
  on_ranks(config, {{.tensor = 2}}, expect_same, test_device());
}

TEST(Generate, SchedulesWithSeveralPartsARankWriteTheSame) {
  RunConfig config = variant("NormFormer");
  config.model.layers = 4;
  GenerationOptions options = options_for(1.0);
  const auto expected = expected_texts(config, options);
  Layout layout{{.tensor = 2, .pipeline = 2}, true};
  for (const auto schedule : {PipelineSchedule::interleaved, PipelineSchedule::zb_v}) {
    layout.schedule = schedule;
    config.parallel.virtual_stages = schedule == PipelineSchedule::interleaved ? 2 : 1;
    on_ranks(config, layout, [&](ModelInstance& model) {
      EXPECT_EQ(tokens_of(generate(model, kPrompts, options)), expected);
    });
  }
}

TEST(Generate, ObserversAreToldInOrder) {
  GenerationOptions options = options_for(1.0);
  options.batch = 2;
  on_ranks(variant("NormFormer"), {{.data = 2}}, [&](ModelInstance& model) {
    std::map<std::pair<int64_t, int64_t>, std::vector<int32_t>> grown;
    std::vector<GeneratedText> finished;
    const auto texts = generate(model, kPrompts, options,
                                {.grown =
                                     [&](const GeneratedText& text) {
                                       grown[{text.prompt, text.sample}].push_back(text.tokens.back());
                                     },
                                 .finished = [&](const GeneratedText& text) { finished.push_back(text); }});
    ASSERT_EQ(finished.size(), kPrompts.size() * 2);
    for (size_t i = 0; i < finished.size(); ++i) {
      EXPECT_EQ(finished[i].prompt, static_cast<int64_t>(i / 2));
      EXPECT_EQ(finished[i].sample, static_cast<int64_t>(i % 2));
      EXPECT_EQ(finished[i].tokens, texts[i].tokens);
      EXPECT_EQ((grown[{texts[i].prompt, texts[i].sample}]), texts[i].tokens);
    }
  });
}

TEST(Generate, NothingIsMadeWhereNothingIsAskedFor) {
  on_ranks(variant("baseline"), {{.data = 2}}, [&](ModelInstance& model) {
    EXPECT_TRUE(generate(model, {}, {}).empty());
    int finished = 0;
    const auto texts = generate(model, kPrompts, {.max_tokens = 0},
                                {.grown = {}, .finished = [&](const GeneratedText&) { ++finished; }});
    EXPECT_EQ(finished, 6);
    for (const GeneratedText& text : texts) EXPECT_TRUE(text.tokens.empty());
  });
}

}  // namespace
}  // namespace normformer::testing_support
