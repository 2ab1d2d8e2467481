#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "normformer/data/labelled_dataset.h"
#include "normformer/training/trainer.h"

namespace normformer {

/// What a classifier makes of texts.
struct ClassifiedTexts {
  EvaluationResult result;              ///< means nothing of texts without labels
  std::vector<int32_t> predictions;     ///< the likeliest class of each text, on rank 0
  std::vector<double> log_likelihoods;  ///< [texts * classes], natural logarithms, on rank 0
};

/// GLUE's measures beside accuracy (Wang et al. 2018, table 1).
struct ClassScores {
  /// Matthews' correlation of predictions with targets, of any number of classes as Gorodkin (2004) has it; 0
  /// where one of them names one class only.
  double matthews = 0.0;
  /// Of two classes: twice the texts of class 1 that were found over those that are it and those that were
  /// said to be, 0 where there are none.
  std::optional<double> f1 = std::nullopt;
};

/// Compares the classes of texts, at least one, with what was predicted, each a number below `classes`.
ClassScores score_classes(std::span<const int32_t> targets, std::span<const int32_t> predictions,
                          int64_t classes);

/// Classifies all texts of a sequential data set. Collective over the world.
ClassifiedTexts classify(ModelInstance& model, const RunConfig& config, const LabelledDataset& texts);

}  // namespace normformer
