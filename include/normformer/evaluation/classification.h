#pragma once

#include <cstdint>
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

/// Classifies all texts of a sequential data set. Collective over the world.
ClassifiedTexts classify(ModelInstance& model, const RunConfig& config, const LabelledDataset& texts);

}  // namespace normformer
