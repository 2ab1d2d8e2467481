#include "normformer/model/parts.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace normformer {

namespace {

// Of width elements each, in the matrices that make logits of a token.
int64_t output_rows(const ModelConfig& model) {
  switch (model.head) {
    case OutputHead::language:
      return model.vocab;
    case OutputHead::masked_language:
      return model.width + model.vocab;
    case OutputHead::classification:
      return model.width + model.classes;
  }
  return model.vocab;
}

}  // namespace

Schedule make_schedule(const ParallelConfig& parallel, int64_t stages, int64_t micro_batches) {
  switch (parallel.schedule) {
    case PipelineSchedule::gpipe:
      return gpipe_schedule(stages, micro_batches);
    case PipelineSchedule::one_f_one_b:
      return one_f_one_b_schedule(stages, micro_batches);
    case PipelineSchedule::interleaved:
      return interleaved_schedule(stages, micro_batches, parallel.virtual_stages,
                                  std::max(parallel.interleave_group, stages));
    case PipelineSchedule::zb_h1:
      return zb_h1_schedule(stages, micro_batches);
    case PipelineSchedule::zb_h2:
      return zb_h2_schedule(stages, micro_batches);
    case PipelineSchedule::zb_v:
      return zb_v_schedule(stages, micro_batches);
  }
  return one_f_one_b_schedule(stages, micro_batches);
}

double predicted_share(const RunConfig& config) {
  switch (config.model.head) {
    case OutputHead::language:
      return 1.0;
    case OutputHead::masked_language:
      return config.data.mask_probability;
    case OutputHead::classification:
      return 1.0 / static_cast<double>(config.model.length);
  }
  return 1.0;
}

std::vector<int64_t> balanced_split(const ModelConfig& model, int64_t parts, double predicted) {
  NF_CHECK(parts >= 1 && parts <= model.layers, "{} layers for {} parts", model.layers, parts);
  const int64_t seen = model.attention == AttentionMask::causal ? model.length : 2 * model.length;
  const int64_t of_layer = model.width * (4 * model.width + 2 * model.ffn + seen);
  const int64_t of_logits = std::llround(predicted * static_cast<double>(model.width * output_rows(model)));
  std::vector<int64_t> split(static_cast<size_t>(parts), 1);
  const auto cost_with_one_more = [&](size_t part) {
    return (split[part] + 1) * of_layer + (part + 1 == split.size() ? of_logits : 0);
  };
  for (int64_t left = model.layers - parts; left > 0; --left) {
    size_t cheapest = 0;
    for (size_t part = 1; part < split.size(); ++part) {
      if (cost_with_one_more(part) < cost_with_one_more(cheapest)) cheapest = part;
    }
    ++split[cheapest];
  }
  return split;
}

double training_flops_per_token(const RunConfig& config) {
  const ModelConfig& model = config.model;
  const auto d = static_cast<double>(model.width);
  const auto f = static_cast<double>(model.ffn);
  const auto layers = static_cast<double>(model.layers);
  const double output = predicted_share(config) * static_cast<double>(output_rows(model)) * d;
  const double attention = (model.attention == AttentionMask::causal ? 6.0 : 12.0) * layers * d *
                           static_cast<double>(model.length);
  return 6.0 * (layers * (4.0 * d * d + 2.0 * d * f) + output) + attention;
}

std::vector<StagePart> parts_of_stage(const RunConfig& config, int64_t stages, int64_t stage) {
  const Schedule schedule = make_schedule(config.parallel, stages, 0);
  const int64_t last = schedule.num_parts() - 1;
  const std::vector<int64_t> split =
      config.parallel.split.empty()
          ? balanced_split(config.model, schedule.num_parts(), predicted_share(config))
          : config.parallel.split;
  NF_CHECK(static_cast<int64_t>(split.size()) == schedule.num_parts(), "{} parts of {} are given layers",
           split.size(), schedule.num_parts());
  std::vector<StagePart> parts;
  for (int64_t chunk = 0; chunk < schedule.chunks; ++chunk) {
    const int64_t part = schedule.part(stage, chunk);
    const int64_t begin = std::accumulate(split.begin(), split.begin() + part, int64_t{0});
    parts.push_back({.layers = {begin, begin + split[static_cast<size_t>(part)]},
                     .first = part == 0,
                     .last = part == last,
                     .holds_both_ends = schedule.stage_of(0) == schedule.stage_of(last)});
  }
  return parts;
}

}  // namespace normformer
