#include "normformer/model/parts.h"

#include <algorithm>
#include <numeric>

namespace normformer {

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

std::vector<int64_t> balanced_split(const ModelConfig& model, int64_t parts) {
  NF_CHECK(parts >= 1 && parts <= model.layers, "{} layers for {} parts", model.layers, parts);
  const int64_t of_layer = model.width * (4 * model.width + 2 * model.ffn + model.length);
  const int64_t of_logits = model.width * model.vocab;
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

std::vector<StagePart> parts_of_stage(const RunConfig& config, int64_t stages, int64_t stage) {
  const Schedule schedule = make_schedule(config.parallel, stages, 0);
  const int64_t last = schedule.num_parts() - 1;
  const std::vector<int64_t> split = config.parallel.split.empty()
                                         ? balanced_split(config.model, schedule.num_parts())
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
