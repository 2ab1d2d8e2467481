#include "normformer/training/metrics.h"

#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include <nlohmann/json.hpp>
#include <unistd.h>

#include "normformer/core/log.h"

#include "json_lines.h"

namespace normformer {

namespace {

constexpr double kForget = 0.95;  // of what earlier steps count, after each step

std::string skipped_text(const TrainingCounters& counters, SkipReason reason) {
  if (reason == SkipReason::spike) return "  SKIPPED: spike";
  if (reason == SkipReason::nonfinite) return "  SKIPPED: gradient not finite";
  return fmt::format("  SKIPPED: overflow, the loss scale is {} now", counters.loss_scale.value);
}

// Under mpirun a rank's output may be a pseudo-terminal whose other end is a file: only the launcher knows.
bool writes_to_terminal() {
  if (const char* said = std::getenv("NORMFORMER_TERMINAL")) return std::string_view(said) == "1";
  return std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr && isatty(STDOUT_FILENO) == 1;
}

}  // namespace

double unix_seconds() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return 1e-3 * static_cast<double>(std::chrono::duration_cast<std::chrono::milliseconds>(now).count());
}

Speedometer::Speedometer(double flops_per_token) : flops_per_token_(flops_per_token), last_(Clock::now()) {}

void Speedometer::resume() { last_ = Clock::now(); }

Speed Speedometer::enter_step(int64_t tokens, int64_t updates_left) {
  const auto now = Clock::now();
  seconds_ = kForget * seconds_ + std::chrono::duration<double>(now - last_).count();
  tokens_ = kForget * tokens_ + static_cast<double>(tokens);
  steps_ = kForget * steps_ + 1.0;
  last_ = now;
  const double rate = tokens_ / std::max(seconds_, 1e-9);
  return {rate, rate * flops_per_token_, seconds_ / steps_ * static_cast<double>(updates_left)};
}

MetricsFile::MetricsFile(const std::filesystem::path& path, const TrainingCounters& counters)
    : lines_(std::make_unique<JsonLines>(path, counters.batch_index,
                                         [this](const nlohmann::json& line) { keep(line); })) {}

// Takes notice of a line of an earlier start.
void MetricsFile::keep(const nlohmann::json& line) {
  const nlohmann::json kind = line.value("kind", nlohmann::json());
  if (kind == "validation") validated_at_ = line["batch"];
  if (kind == "run") says_run_ = true;
  if (line.contains("elapsed") && line["elapsed"].is_number()) elapsed_before_ = line["elapsed"];
}

MetricsFile::~MetricsFile() = default;

double MetricsFile::elapsed() const {
  const double seconds = elapsed_before_ + std::chrono::duration<double>(Clock::now() - start_).count();
  return 1e-3 * std::round(1e3 * seconds);
}

void MetricsFile::write_run(const TrainingCounters& counters, int64_t parameters, double flops_per_token) {
  if (says_run_) return;
  says_run_ = true;
  nlohmann::ordered_json line;
  line["kind"] = "run";
  line["time"] = unix_seconds();
  line["batch"] = counters.batch_index;
  line["update"] = counters.updates;
  line["tokens"] = counters.tokens;
  line["parameters"] = parameters;
  line["flops_per_token"] = flops_per_token;
  lines_->write(line);
}

void MetricsFile::write_step(const FinishedStep& step, const Speed& speed) {
  const TrainingCounters& counters = step.counters;
  const StepReport& report = step.report;
  nlohmann::ordered_json line;
  line["kind"] = "step";
  line["time"] = unix_seconds();
  line["elapsed"] = elapsed();
  line["batch"] = counters.batch_index;
  line["update"] = counters.updates;
  line["tokens"] = counters.tokens;
  line["loss"] = json_number(report.loss);
  if (report.accuracy) line["accuracy"] = *report.accuracy;
  line["gradient_norm"] = json_number(report.gradient_norm);
  line["lr"] = report.lr;
  line["skipped"] = report.skipped;
  if (report.skipped) line["reason"] = name_of(report.reason);
  if (report.spike) line["spike"] = true;
  if (report.redone) line["redone"] = true;
  if (counters.loss_scale.value > 0.0) {
    line["loss_scale"] = report.loss_scale;
    line["overflows"] = counters.loss_scale.overflows;
  }
  line["tokens_per_second"] = speed.tokens_per_second;
  line["flops_per_second"] = speed.flops_per_second;
  if (step.compute_seconds.size() > 1) {
    const ComputeSummary compute = summarise_compute(step.compute_seconds);
    line["compute_median"] = compute.median;
    line["compute_max"] = compute.largest;
    line["slowest_rank"] = compute.slowest_rank;
  }
  lines_->write(line);
}

void MetricsFile::write_rollback(const FinishedStep& from, const TrainingCounters& to,
                                 int64_t first_left_out) {
  nlohmann::ordered_json line;
  line["kind"] = "rollback";
  line["batch"] = to.batch_index;
  line["update"] = to.updates;
  line["tokens"] = to.tokens;
  line["reason"] = name_of(from.report.reason);
  line["from_update"] = from.counters.updates;
  line["first_left_out"] = first_left_out;
  lines_->write(line);
}

void MetricsFile::write_explosion(const FinishedStep& step, ExplosionReason reason) {
  nlohmann::ordered_json line;
  line["kind"] = "explosion";
  line["time"] = unix_seconds();
  line["batch"] = step.counters.batch_index;
  line["update"] = step.counters.updates;
  line["tokens"] = step.counters.tokens;
  line["lr"] = step.report.lr;
  line["loss"] = json_number(step.report.loss);
  line["reason"] = name_of(reason);
  lines_->write(line);
}

bool MetricsFile::write_validation(const TrainingCounters& counters, const EvaluationResult& result,
                                   int64_t peak_memory) {
  if (counters.batch_index == validated_at_) return false;
  validated_at_ = counters.batch_index;
  nlohmann::ordered_json line;
  line["kind"] = "validation";
  line["time"] = unix_seconds();
  line["elapsed"] = elapsed();
  line["batch"] = counters.batch_index;
  line["update"] = counters.updates;
  line["tokens"] = counters.tokens;
  line["loss"] = json_number(result.mean());
  if (result.correct)
    line["accuracy"] = result.accuracy();
  else
    line["perplexity"] = json_number(std::exp(result.mean()));
  line["targets"] = result.tokens;
  line["peak_memory"] = peak_memory;
  lines_->write(line);
  return true;
}

StatusLine::StatusLine(int64_t updates, int64_t every)
    : updates_(updates), every_(every), is_terminal_(writes_to_terminal()) {}

StatusLine::~StatusLine() {
  if (!live_) return;
  std::fputs("\n", stdout);
  std::fflush(stdout);
}

void StatusLine::clear_live_line() {
  if (live_) std::fputs("\r\033[K", stdout);
  live_ = false;
}

void StatusLine::show_step(const TrainingCounters& counters, const StepReport& report, const Speed& speed) {
  const std::string text = fmt::format(
      "update {}/{}  loss {:.4f}{}  grad norm {:.3f}  lr {:.3g}  {}  {}  {} left{}", counters.updates,
      updates_, report.loss, report.accuracy ? fmt::format("  accuracy {:.3f}", *report.accuracy) : "",
      report.gradient_norm, report.lr, with_prefix(speed.tokens_per_second, "tok/s"),
      with_prefix(speed.flops_per_second, "FLOP/s"), duration_text(speed.seconds_left),
      report.skipped ? skipped_text(counters, report.reason) : "");
  const bool is_last = counters.updates >= updates_;
  const bool is_plain_line = counters.updates % every_ == 0 || is_last || report.skipped;
  if (is_plain_line) log_to_file(text);
  if (!is_terminal_) {
    if (is_plain_line) std::puts(text.c_str());
    std::fflush(stdout);
    return;
  }
  const auto now = std::chrono::steady_clock::now();
  if (live_ && !is_last && !report.skipped && now - last_drawn_ < std::chrono::milliseconds(100)) return;
  last_drawn_ = now;
  std::fputs(("\r" + text + "\033[K").c_str(), stdout);
  live_ = true;
  if (report.skipped) {
    std::fputs("\n", stdout);
    live_ = false;
  }
  std::fflush(stdout);
}

void StatusLine::show_message(const std::string& message) {
  log_to_file(message);
  clear_live_line();
  std::puts(message.c_str());
  std::fflush(stdout);
}

std::string with_prefix(double value, std::string_view unit) {
  constexpr std::array<const char*, 6> kPrefixes = {"", "k", "M", "G", "T", "P"};
  size_t i = 0;
  while (std::abs(value) >= 999.5 && i + 1 < kPrefixes.size()) {
    value /= 1000.0;
    ++i;
  }
  const std::string suffix = std::string(kPrefixes[i]) + std::string(unit);
  return fmt::format("{:.3g}{}{}", value, suffix.empty() ? "" : " ", suffix);
}

std::string duration_text(double seconds) {
  const auto total = static_cast<int64_t>(std::llround(std::max(0.0, seconds)));
  if (total >= 3600) return fmt::format("{} h {} min", total / 3600, total % 3600 / 60);
  if (total >= 60) return fmt::format("{} min {} s", total / 60, total % 60);
  return fmt::format("{} s", total);
}

}  // namespace normformer
