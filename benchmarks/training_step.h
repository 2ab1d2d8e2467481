#pragma once

#include <chrono>
#include <cstdint>
#include <utility>

#include "normformer/core/philox.h"
#include "normformer/training/trainer.h"

namespace normformer::benchmarks {

/// Seconds that `body` takes on the wall.
template <class Body>
double seconds_of(Body&& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Sequences [first, first + count) of tokens drawn evenly from the vocabulary.
inline Batch random_batch(const RunConfig& config, int64_t first, int64_t count) {
  const RandomStream stream = RandomStream{1}.with("benchmark tokens");
  const int64_t tokens = count * config.model.length;
  Batch batch{.sequences = count,
              .seq_len = config.model.length,
              .inputs = {},
              .targets = {},
              .document_start = {},
              .loss_mask = {}};
  for (int64_t i = 0; i <= tokens; ++i) {
    const auto id = static_cast<int32_t>(stream.u64(static_cast<uint64_t>(first * config.model.length + i)) %
                                         static_cast<uint64_t>(config.model.vocab));
    if (i < tokens) batch.inputs.push_back(id);
    if (i > 0) batch.targets.push_back(id);
  }
  return batch;
}

/// A model of one rank with its trainer, on any device. `source` is asked for batches as a Trainer asks.
struct Setup {
  Setup(const RunConfig& c, DeviceKind device, int threads, BatchSource source)
      : config(c),
        context(device, threads),
        model(context, Mesh(device == DeviceKind::meta ? make_meta_world(0, 1) : make_self_world(), {}),
              config, true),
        trainer(model, config, std::move(source)) {}

  Setup(const RunConfig& c, DeviceKind device, int threads)
      : Setup(c, device, threads, [c](int64_t f, int64_t n) { return random_batch(c, f, n); }) {}

  RunConfig config;
  Context context;
  ModelInstance model;
  Trainer trainer;
};

/// The most bytes that training takes at once, as the meta device foretells it.
inline int64_t foretold_bytes(const RunConfig& config) {
  Setup meta(config, DeviceKind::meta, 1);
  meta.trainer.initialise();
  for (int i = 0; i < 2; ++i) meta.trainer.step();
  return meta.context.memory().report().peak_reserved;
}

}  // namespace normformer::benchmarks
