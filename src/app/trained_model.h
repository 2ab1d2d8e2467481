#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "normformer/data/bpe_tokenizer.h"
#include "normformer/model/model_instance.h"
#include "normformer/training/run.h"

#include "ranks.h"

namespace normformer {

/// Which trained weights a command works with.
struct TrainedModelOptions {
  std::filesystem::path run;           ///< a run's folder: its newest checkpoint; or one "step-..." folder
  std::vector<std::string> overrides;  ///< of the configuration that it was trained with
  bool whole_sequences = false;        ///< each on one rank of its replica, whatever the configuration has

  void add_to(CLI::App& command);
};

/// A model loaded for evaluation, laid out over the ranks as the overrides say (every layout reads every
/// checkpoint).
struct TrainedModel {
  RunConfig config;
  std::unique_ptr<Context> context;
  std::unique_ptr<ModelInstance> model;
  std::optional<BpeTokenizer> tokenizer;
  std::string checkpoint;  ///< its name
  RunFolder folder;        ///< of the run

  /// The tokenizer, or DataError where the run's folder has none.
  const BpeTokenizer& require_tokenizer() const;
};

/// Throws AgreedError. Collective over the world.
TrainedModel load_trained_model(const TrainedModelOptions& options, const RankProcess& process);

}  // namespace normformer
