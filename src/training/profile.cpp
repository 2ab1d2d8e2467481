#include "normformer/training/profile.h"

#include <charconv>
#include <fstream>

#include <nlohmann/json.hpp>

#include "normformer/core/error.h"
#include "normformer/training/agreement.h"

namespace normformer {

namespace {

using Json = nlohmann::ordered_json;

constexpr int kMostRanks = 64;

// Names a process or thread of the viewer and gives it its place.
void add_place(std::string& events, const char* of, int rank, int lane, const std::string& name) {
  const auto add = [&](const std::string& key, const Json& arguments) {
    const Json event{{"ph", "M"}, {"name", key}, {"pid", rank}, {"tid", lane}, {"args", arguments}};
    events += event.dump() + ",\n";
  };
  add(fmt::format("{}_name", of), {{"name", name}});
  add(fmt::format("{}_sort_index", of), {{"sort_index", lane}});
}

// On a GPU the host's spans are what it took to enqueue: no time that says how fast anything was.
Json arguments_of(const TraceSpan& span, bool is_measured) {
  Json arguments = Json::object();
  const TraceDetails& d = span.details;
  const double seconds = 1e-6 * span.duration_us;
  if (d.micro_batch >= 0) arguments["micro-batch"] = d.micro_batch;
  if (d.chunk > 0) arguments["chunk"] = d.chunk;
  if (!span.group.empty()) arguments["group"] = span.group;
  if (d.bytes >= 0) arguments["bytes"] = d.bytes;
  if (d.flops > 0) arguments["FLOPs"] = d.flops;
  if (is_measured && span.kind == TraceKind::operation && seconds > 0) {
    arguments["GB/s"] = 1e-9 * static_cast<double>(d.bytes) / seconds;
    arguments["GFLOP/s"] = 1e-9 * static_cast<double>(d.flops) / seconds;
  }
  return arguments;
}

int64_t parse_update(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  return whole && value > 0 ? value : 0;
}

}  // namespace

ProfiledUpdates parse_profiled_updates(std::string_view text) {
  const size_t dash = text.find('-');
  ProfiledUpdates updates;
  updates.first = parse_update(text.substr(0, dash));
  updates.last = dash == std::string_view::npos ? updates.first : parse_update(text.substr(dash + 1));
  if (updates.first == 0 || updates.last < updates.first) {
    throw ConfigError(
        fmt::format("--profile {}: write which updates to trace, the first being 1, as in --profile 12 or "
                    "--profile 10-12",
                    text));
  }
  return updates;
}

std::string trace_events(int rank, const std::string& host, const std::vector<TraceSpan>& spans) {
  std::string events;
  add_place(events, "process", rank, rank, fmt::format("rank {} ({})", rank, host));
  const bool on_gpu = !spans.empty() && spans.back().lane != TraceLane::host;
  const TraceSpan* before = nullptr;
  for (const TraceSpan& span : spans) {
    const auto lane = static_cast<int>(span.lane);
    if (before == nullptr || before->lane != span.lane)
      add_place(events, "thread", rank, lane, std::string(name_of(span.lane)));
    before = &span;
    const Json event{{"ph", "X"},
                     {"name", span.name},
                     {"cat", name_of(span.kind)},
                     {"pid", rank},
                     {"tid", lane},
                     {"ts", span.begin_us},
                     {"dur", span.duration_us},
                     {"args", arguments_of(span, (span.lane != TraceLane::host) == on_gpu)}};
    events += event.dump() + ",\n";
  }
  return events;
}

Profiler::Profiler(Context& context, Group world, ProfiledUpdates updates, std::filesystem::path file)
    : context_(context), world_(std::move(world)), updates_(updates), file_(std::move(file)) {}

void Profiler::before_update(int64_t update) {
  const bool wanted = update >= updates_.first && update <= updates_.last;
  if (wanted && world_.rank() < kMostRanks && !context_.trace().is_on()) context_.trace().start(context_);
}

bool Profiler::after_update(int64_t update) {
  if (update != updates_.last) return false;
  std::string mine;
  if (context_.trace().is_on()) {
    spans_ = context_.trace().finish(context_);
    mine = trace_events(world_.rank(), host_name(), spans_);
  }
  const std::vector<std::string> all = world_.all_gather_text(mine);
  run_agreed(world_, [&] {
    if (world_.rank() != 0) return;
    std::ofstream file(file_);
    file << "{\"displayTimeUnit\": \"ms\", \"traceEvents\": [\n";
    for (const std::string& events : all) file << events;
    file << "{\"ph\": \"M\", \"name\": \"ranks\", \"pid\": 0, \"args\": {\"count\": " << world_.size()
         << "}}\n]}\n";
    if (!file.flush()) throw IoError(fmt::format("cannot write {}: {}", file_.string(), system_reason()));
  });
  return true;
}

}  // namespace normformer
