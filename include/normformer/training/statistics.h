#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/training/trainer.h"

namespace normformer {

/// How the scalars of one parameter are distributed: what a line of kind "distributions" of a run's
/// statistics.jsonl tells of each learned scale and gain (NormFormer, section 4.3 and figure 4).
struct Distribution {
  std::string name;   ///< of the parameter, as in checkpoints
  int64_t count = 0;  ///< scalars, of the whole logical parameter
  double min = 0.0;
  double p5 = 0.0;  ///< percentiles, linear between neighbours of the sorted scalars
  double p25 = 0.0;
  double p50 = 0.0;
  double p75 = 0.0;
  double p95 = 0.0;
  double max = 0.0;
  double mean = 0.0;
  double std = 0.0;             ///< of the population: divided by count
  std::vector<double> edges;    ///< ascending; one more than counts. Key "bins" in JSON
  std::vector<int64_t> counts;  ///< scalars in [edges[i], edges[i + 1]); the last bin has its upper edge too
};

/// Of at least one value, all finite; 30 bins, equally wide from the least to the largest, or one where these
/// are equal.
Distribution distribution_of(std::string name, std::span<const double> values);

/// Whether a parameter is a learned scale or a LayerNorm's gain, of which runs record distributions.
bool is_scale(std::string_view parameter);

/// Distributions of the model's scales and gains (is_scale) as they are now, from its masters of type
/// `masters`, by parameter; one that holds what is not finite is left out. On rank 0; empty elsewhere.
/// Collective over the world.
std::vector<Distribution> scale_distributions(Trainer& trainer, DType masters);

class JsonLines;

/// What a run records about its parameters, beside its metrics: a JSON object a line
/// (docs/report.md). Written by rank 0 only; as MetricsFile keeps its lines when a run is resumed.
class StatisticsFile {
 public:
  /// Opens for appending and drops records of batches behind `counters.batch_index`. Throws IoError.
  StatisticsFile(const std::filesystem::path& path, const TrainingCounters& counters);
  ~StatisticsFile();

  /// Norms of a step's gradients; `names` are their parameters.
  void write_gradients(const TrainingCounters& counters, std::span<const std::string> names,
                       std::span<const ParameterNorms> norms);

  /// Whether it was written: nothing is where there is a record of as many batches.
  bool write_distributions(const TrainingCounters& counters, std::span<const Distribution> scales);

 private:
  int64_t distributions_at_ = -1;  // batch index of the newest
  std::unique_ptr<JsonLines> lines_;
};

}  // namespace normformer
