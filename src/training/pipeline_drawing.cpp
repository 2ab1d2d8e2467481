#include "normformer/training/pipeline_drawing.h"

#include <algorithm>
#include <array>
#include <sstream>

#include <fmt/format.h>

#include "normformer/core/error.h"
#include "normformer/pipeline/timeline.h"

namespace normformer {

namespace {

constexpr std::array kKinds{ActionKind::forward, ActionKind::backward, ActionKind::backward_input,
                            ActionKind::backward_weight};

ActionKind kind_of(std::string_view name) {
  const auto found =
      std::find_if(kKinds.begin(), kKinds.end(), [&](ActionKind k) { return name_of(k) == name; });
  NF_CHECK(found != kKinds.end(), "{} is no action of a pipeline", name);
  return *found;
}

// One stage's actions as text, for the rank that draws.
std::string to_text(int64_t stage, const std::vector<TimedAction>& actions) {
  std::string text;
  for (const TimedAction& a : actions) {
    text += fmt::format("{} {} {} {} {} {}\n", stage, name_of(a.action.kind), a.action.micro_batch,
                        a.action.chunk, a.start, a.end);
  }
  return text;
}

std::vector<std::vector<TimedAction>> from_texts(const std::vector<std::string>& texts, int64_t stages) {
  std::vector<std::vector<TimedAction>> rows(static_cast<size_t>(stages));
  for (const std::string& text : texts) {
    std::istringstream lines(text);
    size_t stage = 0;
    std::string kind;
    TimedAction a;
    while (lines >> stage >> kind >> a.action.micro_batch >> a.action.chunk >> a.start >> a.end) {
      a.action.kind = kind_of(kind);
      rows.at(stage).push_back(a);
    }
  }
  return rows;
}

// Times from the first action of all, in milliseconds.
void begin_at_zero(std::vector<std::vector<TimedAction>>& rows) {
  double first = 0;
  bool any = false;
  for (const auto& row : rows) {
    if (row.empty()) continue;
    first = any ? std::min(first, row.front().start) : row.front().start;
    any = true;
  }
  for (auto& row : rows) {
    for (TimedAction& a : row) {
      a.start = 1e-3 * (a.start - first);
      a.end = 1e-3 * (a.end - first);
    }
  }
}

}  // namespace

std::vector<TimedAction> actions_of_last_step(const std::vector<TraceSpan>& spans) {
  const bool on_gpu = std::any_of(spans.begin(), spans.end(),
                                  [](const TraceSpan& s) { return s.lane == TraceLane::gpu_compute; });
  const TraceLane lane = on_gpu ? TraceLane::gpu_compute : TraceLane::host;
  double step_begin = 0;
  for (const TraceSpan& s : spans) {
    if (s.lane == lane && s.kind == TraceKind::step && s.name == "step")
      step_begin = std::max(step_begin, s.begin_us);
  }
  std::vector<TimedAction> actions;
  for (const TraceSpan& s : spans) {
    if (s.lane != lane || s.kind != TraceKind::pipeline || s.begin_us < step_begin) continue;
    // What is read off a clock since 1970 may be off by a quarter of a microsecond.
    const double start = std::max(s.begin_us, actions.empty() ? s.begin_us : actions.back().end);
    actions.push_back({{kind_of(s.name), s.details.micro_batch, s.details.chunk},
                       start,
                       std::max(start, s.begin_us + s.duration_us)});
  }
  return actions;
}

StageTimes mean_times(const Schedule& schedule, const std::vector<std::vector<TimedAction>>& rows) {
  const auto parts = static_cast<size_t>(schedule.num_parts());
  std::vector<std::array<double, kKinds.size()>> sums(parts);
  std::vector<std::array<int, kKinds.size()>> counts(parts);
  for (size_t stage = 0; stage < rows.size(); ++stage) {
    for (const TimedAction& a : rows[stage]) {
      const auto part = static_cast<size_t>(schedule.part(static_cast<int64_t>(stage), a.action.chunk));
      const auto kind =
          static_cast<size_t>(std::find(kKinds.begin(), kKinds.end(), a.action.kind) - kKinds.begin());
      sums[part][kind] += a.end - a.start;
      counts[part][kind] += 1;
    }
  }
  const auto mean = [&](size_t part, size_t kind) {
    return counts[part][kind] == 0 ? 0.0 : sums[part][kind] / counts[part][kind];
  };
  StageTimes times;
  for (size_t part = 0; part < parts; ++part) {
    const double half = 0.5 * mean(part, 1);
    times.forward.push_back(mean(part, 0));
    times.backward_input.push_back(mean(part, 2) + half);
    times.backward_weight.push_back(mean(part, 3) + half);
  }
  return times;
}

std::optional<PipelineDrawing> draw_pipeline(const Mesh& mesh, const Schedule& schedule,
                                             const std::vector<TraceSpan>& spans) {
  const MeshCoordinates& at = mesh.coordinates();
  const bool is_drawn = at.tensor == 0 && at.context == 0 && at.data == 0;
  const std::string mine = is_drawn ? to_text(at.pipeline, actions_of_last_step(spans)) : "";
  const std::vector<std::string> texts = mesh.world().all_gather_text(mine);
  if (mesh.world().rank() != 0) return std::nullopt;
  std::vector<std::vector<TimedAction>> rows = from_texts(texts, schedule.num_stages());
  begin_at_zero(rows);
  const Simulation simulation = simulate(schedule, mean_times(schedule, rows));
  return PipelineDrawing{
      .measured = draw_svg(rows, "One update, measured", "ms"),
      .simulated =
          draw_svg(simulation.stages, "One update, simulated with mean times and free transfers", "ms")};
}

}  // namespace normformer
