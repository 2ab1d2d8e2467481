#include "normformer/training/statistics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "json_lines.h"

namespace normformer {

namespace {

constexpr size_t kBins = 30;

double percentile(const std::vector<double>& sorted, double share) {
  const double place = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return std::lerp(sorted[below], sorted[above], place - static_cast<double>(below));
}

// Of equal values the one bin is as wide as nothing.
void fill_bins(Distribution& d, const std::vector<double>& sorted) {
  const size_t bins = d.min < d.max ? kBins : 1;
  const double width = (d.max - d.min) / static_cast<double>(bins);
  d.counts.assign(bins, 0);
  for (size_t b = 0; b < bins; ++b) d.edges.push_back(d.min + static_cast<double>(b) * width);
  d.edges.push_back(d.max);
  auto begin = sorted.begin();
  for (size_t b = 0; b < bins; ++b) {
    const auto end = b + 1 == bins ? sorted.end() : std::lower_bound(begin, sorted.end(), d.edges[b + 1]);
    d.counts[b] = end - begin;
    begin = end;
  }
}

}  // namespace

Distribution distribution_of(std::string name, std::span<const double> values) {
  NF_CHECK(!values.empty(), "the distribution of nothing");
  std::vector<double> sorted(values.begin(), values.end());
  std::sort(sorted.begin(), sorted.end());
  Distribution d;
  d.name = std::move(name);
  d.count = static_cast<int64_t>(sorted.size());
  d.min = sorted.front();
  d.max = sorted.back();
  const auto count = static_cast<double>(d.count);
  d.mean = std::accumulate(sorted.begin(), sorted.end(), 0.0) / count;
  double squares = 0.0;
  for (const double value : sorted) squares += (value - d.mean) * (value - d.mean);
  d.std = std::sqrt(squares / count);
  d.p5 = percentile(sorted, 0.05);
  d.p25 = percentile(sorted, 0.25);
  d.p50 = percentile(sorted, 0.5);
  d.p75 = percentile(sorted, 0.75);
  d.p95 = percentile(sorted, 0.95);
  fill_bins(d, sorted);
  return d;
}

bool is_scale(std::string_view parameter) {
  constexpr std::array<std::string_view, 8> kEndings = {
      ".c_attn",      ".w_resid",     "layer_norm.weight", ".attn_ln.weight", ".ffn_layernorm.weight",
      ".q_ln.weight", ".k_ln.weight", ".v_ln.weight"};
  return std::any_of(kEndings.begin(), kEndings.end(),
                     [&](std::string_view ending) { return parameter.ends_with(ending); });
}

std::vector<Distribution> scale_distributions(Trainer& trainer, DType masters) {
  ModelInstance& model = trainer.model();
  std::vector<ParameterPiece> pieces;
  for (const StatePiece& state : trainer.optimizer().state()) {
    const Parameter& parameter = *state.piece.parameter;
    if (state.role == StateRole::master && is_scale(parameter.spec.name) &&
        trainer.optimizer().owns(parameter))
      pieces.push_back(state.piece);
  }
  std::vector<Distribution> found;
  gather_logical(model.context(), model.mesh().world(), pieces, masters, 0,
                 [&](const std::string& name, const Tensor& whole) {
                   const std::vector<double> values = to_host(whole);
                   if (std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); }))
                     found.push_back(distribution_of(name, values));
                 });
  return found;
}

StatisticsFile::StatisticsFile(const std::filesystem::path& path, const TrainingCounters& counters)
    : lines_(std::make_unique<JsonLines>(path, counters.batch_index, [this](const nlohmann::json& line) {
        if (line.value("kind", nlohmann::json()) == "distributions") distributions_at_ = line["batch"];
      })) {}

StatisticsFile::~StatisticsFile() = default;

namespace {

nlohmann::ordered_json record(std::string_view kind, const TrainingCounters& counters) {
  nlohmann::ordered_json line;
  line["kind"] = kind;
  line["batch"] = counters.batch_index;
  line["update"] = counters.updates;
  line["tokens"] = counters.tokens;
  line["parameters"] = nlohmann::ordered_json::object();
  return line;
}

}  // namespace

void StatisticsFile::write_gradients(const TrainingCounters& counters, std::span<const std::string> names,
                                     std::span<const ParameterNorms> norms) {
  nlohmann::ordered_json line = record("gradients", counters);
  for (size_t i = 0; i < norms.size(); ++i)
    line["parameters"][names[i]] = {{"l1", json_number(norms[i].l1)}, {"l2", json_number(norms[i].l2)}};
  lines_->write(line);
}

bool StatisticsFile::write_distributions(const TrainingCounters& counters,
                                         std::span<const Distribution> scales) {
  if (counters.batch_index == distributions_at_) return false;
  distributions_at_ = counters.batch_index;
  nlohmann::ordered_json line = record("distributions", counters);
  for (const Distribution& d : scales) {
    line["parameters"][d.name] = {{"count", d.count}, {"min", d.min},    {"p5", d.p5},
                                  {"p25", d.p25},     {"p50", d.p50},    {"p75", d.p75},
                                  {"p95", d.p95},     {"max", d.max},    {"mean", d.mean},
                                  {"std", d.std},     {"bins", d.edges}, {"counts", d.counts}};
  }
  lines_->write(line);
  return true;
}

}  // namespace normformer
