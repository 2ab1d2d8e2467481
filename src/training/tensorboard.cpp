#include "normformer/training/tensorboard.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include <boost/crc.hpp>
#include <unistd.h>

#include "normformer/core/log.h"

#include "tensorboard.pb.h"

namespace normformer {

namespace {

constexpr std::string_view kPrefix = "events.out.tfevents.";
constexpr int32_t kString = 7;  // TensorFlow's DT_STRING

uint32_t masked_crc(std::string_view bytes) {
  boost::crc_optimal<32, 0x1EDC6F41, 0xFFFFFFFF, 0xFFFFFFFF, true, true> crc;
  crc.process_bytes(bytes.data(), bytes.size());
  const uint32_t sum = crc.checksum();
  return ((sum >> 15) | (sum << 17)) + 0xA282EAD8u;
}

void append_little_endian(std::string& to, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) to.push_back(static_cast<char>(value >> (8 * i)));
}

// Readers take a folder's files in the order of their names, so that a new one must come last even where the
// clock was set back or a run is started twice in a second.
int64_t next_stamp(const std::filesystem::path& folder) {
  auto stamp = static_cast<int64_t>(unix_seconds());
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(kPrefix)) continue;
    stamp = std::max<int64_t>(stamp, std::atoll(name.c_str() + kPrefix.size()) + 1);
  }
  return stamp;
}

std::string new_file_name(const std::filesystem::path& folder) {
  return fmt::format("{}{:010}.{}.{}.0", kPrefix, next_stamp(folder), host_name(), getpid());
}

events::Event event_at(int64_t update) {
  events::Event event;
  event.set_wall_time(unix_seconds());
  event.set_step(update);
  return event;
}

void add_scalar(events::Event& event, const char* tag, double value) {
  events::Summary::Value* scalar = event.mutable_summary()->add_value();
  scalar->set_tag(tag);
  scalar->set_simple_value(static_cast<float>(value));
}

// Purges everything at or after its own step.
events::Event start_behind(int64_t update) {
  events::Event event = event_at(update + 1);
  event.mutable_session_log()->set_status(events::SessionLog::START);
  return event;
}

}  // namespace

std::string tfrecord(std::string_view data) {
  std::string record;
  append_little_endian(record, data.size(), 8);
  append_little_endian(record, masked_crc(record), 4);
  record += data;
  append_little_endian(record, masked_crc(data), 4);
  return record;
}

TensorBoardFile::TensorBoardFile(const std::filesystem::path& folder, const TrainingCounters& counters) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw IoError(fmt::format("cannot make {}: {}", folder.string(), error.message()));
  path_ = folder / new_file_name(folder);
  file_.open(path_, std::ios::binary | std::ios::trunc);
  if (!file_) throw IoError(fmt::format("cannot open {}: {}", path_.string(), system_reason()));
  events::Event version;
  version.set_wall_time(unix_seconds());
  version.set_file_version("brain.Event:2");
  version.mutable_source_metadata()->set_writer("normformer");
  write_record(version.SerializeAsString());
  write_record(start_behind(counters.updates).SerializeAsString());
}

void TensorBoardFile::write_record(const std::string& event) {
  const std::string record = tfrecord(event);
  file_ << record << std::flush;
  if (file_) {
    bytes_ += record.size();
    return;
  }
  log_root(LogLevel::warning, "cannot write {}: {}", path_.string(), system_reason());
  cut_torn_record();
}

// Readers stop at a torn record, so that none may stand before others.
void TensorBoardFile::cut_torn_record() {
  std::error_code error;
  file_.close();
  std::filesystem::resize_file(path_, bytes_, error);
  file_.clear();
  file_.open(path_, std::ios::binary | std::ios::app);
}

void TensorBoardFile::write_step(const FinishedStep& step, const Speed& speed) {
  const StepReport& report = step.report;
  if (report.skipped) return;
  events::Event event = event_at(step.counters.updates);
  add_scalar(event, "training/loss", report.loss);
  if (report.accuracy)
    add_scalar(event, "training/accuracy", *report.accuracy);
  else
    add_scalar(event, "training/perplexity", std::exp(report.loss));
  add_scalar(event, "training/gradient_norm", report.gradient_norm);
  add_scalar(event, "training/lr", report.lr);
  if (step.counters.loss_scale.value > 0.0) add_scalar(event, "training/loss_scale", report.loss_scale);
  add_scalar(event, "speed/tokens_per_second", speed.tokens_per_second);
  add_scalar(event, "speed/flops_per_second", speed.flops_per_second);
  write_record(event.SerializeAsString());
}

void TensorBoardFile::write_validation(const TrainingCounters& counters, const EvaluationResult& result) {
  events::Event event = event_at(counters.updates);
  add_scalar(event, "validation/loss", result.mean());
  if (result.correct)
    add_scalar(event, "validation/accuracy", result.accuracy());
  else
    add_scalar(event, "validation/perplexity", std::exp(result.mean()));
  write_record(event.SerializeAsString());
}

void TensorBoardFile::write_distribution(const TrainingCounters& counters, const Distribution& distribution) {
  events::Event event = event_at(counters.updates);
  events::Summary::Value* value = event.mutable_summary()->add_value();
  value->set_tag("distributions/" + distribution.name);
  events::HistogramProto* histogram = value->mutable_histo();
  const auto count = static_cast<double>(distribution.count);
  const double mean = distribution.mean;
  histogram->set_min(distribution.min);
  histogram->set_max(distribution.max);
  histogram->set_num(count);
  histogram->set_sum(count * mean);
  histogram->set_sum_squares(count * (mean * mean + distribution.std * distribution.std));
  for (size_t i = 0; i < distribution.counts.size(); ++i) {
    histogram->add_bucket_limit(distribution.edges[i + 1]);
    histogram->add_bucket(static_cast<double>(distribution.counts[i]));
  }
  write_record(event.SerializeAsString());
}

void TensorBoardFile::write_config(const TrainingCounters& counters, const std::string& toml) {
  events::Event event = event_at(counters.updates);
  events::Summary::Value* value = event.mutable_summary()->add_value();
  value->set_tag("config");
  value->mutable_metadata()->mutable_plugin_data()->set_plugin_name("text");
  events::TensorProto* text = value->mutable_tensor();
  text->set_dtype(kString);
  text->mutable_tensor_shape();
  text->add_string_val("```toml\n" + toml + "\n```");
  write_record(event.SerializeAsString());
}

void TensorBoardFile::write_rollback(const TrainingCounters& to) {
  write_record(start_behind(to.updates).SerializeAsString());
}

}  // namespace normformer
