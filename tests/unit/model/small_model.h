#pragma once

#include <algorithm>
#include <vector>

#include "normformer/training/trainer.h"

namespace normformer::testing_support {

/// A NormFormer with every switch on and sizes that nothing divides.
inline RunConfig small_config(Precision precision) {
  RunConfig c;
  c.model.layers = 3;
  c.model.width = 20;
  c.model.heads = 5;
  c.model.ffn = 33;
  c.model.vocab = 41;
  c.model.length = 12;
  c.model.head_scale = HeadScale::paper;
  c.model.post_attention_norm = true;
  c.model.ffn_norm = true;
  c.model.residual_scale = true;
  c.model.residual_dropout = 0.1;
  c.model.attention_dropout = 0.1;
  c.train.global_batch = 5;
  c.train.micro_batch = 2;
  c.train.precision = precision;
  c.parallel.data = 1;
  return c;
}

/// A model that predicts masked tokens, with positions of its own.
inline RunConfig small_masked_config(Precision precision) {
  RunConfig c = small_config(precision);
  c.model.attention = AttentionMask::bidirectional;
  c.model.head = OutputHead::masked_language;
  c.model.init = Initialisation::bert;
  c.model.positions = Positions::learned;
  c.model.embedding_scale = false;
  return c;
}

/// The same as a classifier.
inline RunConfig small_classifier_config(Precision precision) {
  RunConfig c = small_masked_config(precision);
  c.model.head = OutputHead::classification;
  c.model.classes = 3;
  return c;
}

/// Texts of many lengths at the ends of their rows.
inline void make_texts(const RunConfig& config, int64_t first, Batch& batch) {
  const int64_t length = config.model.length;
  batch.document_start.resize(batch.inputs.size());
  batch.loss_mask.resize(batch.inputs.size());
  for (int64_t row = 0; row < batch.sequences; ++row) {
    const int64_t sample = first + row;
    const int64_t start = sample * sample * 7 % length;
    const int64_t read = config.model.attention == AttentionMask::causal ? length - 1 : start;
    for (int64_t t = start; t < length; ++t)
      batch.document_start[static_cast<size_t>(row * length + t)] = static_cast<int32_t>(start);
    batch.loss_mask[static_cast<size_t>(row * length + read)] = 1;
    batch.targets[static_cast<size_t>(row * length + read)] =
        static_cast<int32_t>(sample * 5 % config.model.classes);
  }
}

/// Hides some tokens, which are the targets then.
inline void mask_some(const RunConfig& config, int64_t first, Batch& batch) {
  batch.targets = batch.inputs;
  for (size_t i = 0; i < batch.inputs.size(); ++i) {
    const int64_t at = first * config.model.length + static_cast<int64_t>(i);
    batch.loss_mask.push_back(at * at % 11 < 4 ? 1 : 0);
    if (batch.loss_mask.back() == 1) batch.inputs[i] = static_cast<int32_t>(config.model.vocab - 1);
  }
}

/// Tokens that depend on their place alone.
inline Batch counted_batch(const RunConfig& config, int64_t first, int64_t count) {
  Batch batch{.sequences = count,
              .seq_len = config.model.length,
              .inputs = {},
              .targets = {},
              .document_start = {},
              .loss_mask = {}};
  for (int64_t i = 0; i < count * config.model.length; ++i) {
    const int64_t at = first * config.model.length + i;
    batch.inputs.push_back(static_cast<int32_t>(at * 7 % config.model.vocab));
    batch.targets.push_back(static_cast<int32_t>((at + 1) * 7 % config.model.vocab));
  }
  if (config.model.head == OutputHead::masked_language) mask_some(config, first, batch);
  if (config.model.head == OutputHead::classification) make_texts(config, first, batch);
  return batch;
}

/// The same, but for targets of global batch `poisoned` that nothing tells.
inline Batch poisoned_batch(const RunConfig& config, int64_t poisoned, int64_t first, int64_t count) {
  Batch batch = counted_batch(config, first, count);
  for (int64_t i = 0; i < count * config.model.length; ++i) {
    const int64_t sample = first + i / config.model.length;
    const int64_t at = first * config.model.length + i;
    if (sample / config.train.global_batch == poisoned)
      batch.targets[static_cast<size_t>(i)] = static_cast<int32_t>(at * at * 31 % config.model.vocab);
  }
  return batch;
}

/// A model on one rank of a world, with its trainer. No batch is poisoned where `poisoned` is negative.
struct SmallModel {
  SmallModel(const RunConfig& c, DeviceKind device, const Group& world, const MeshDegrees& degrees = {},
             int64_t poisoned = -1)
      : config(c),
        context(device),
        model(context, Mesh(world, degrees, c.parallel.shard_group), config, true),
        trainer(model, config,
                [this, poisoned](int64_t f, int64_t n) { return poisoned_batch(config, poisoned, f, n); }) {
    trainer.initialise();
  }

  RunConfig config;
  Context context;
  ModelInstance model;
  Trainer trainer;
};

}  // namespace normformer::testing_support
