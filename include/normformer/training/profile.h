#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "normformer/comm/group.h"
#include "normformer/tensor/context.h"

namespace normformer {

/// Updates first ... last of a run, counted from 1 as the log does; none where last is 0.
struct ProfiledUpdates {
  int64_t first = 0;
  int64_t last = 0;
  bool operator==(const ProfiledUpdates&) const = default;
};

/// "12" or "10-12". ConfigError for anything else.
ProfiledUpdates parse_profiled_updates(std::string_view text);

/// One rank's spans as events of the Trace Event Format, which chrome://tracing and ui.perfetto.dev show: a
/// JSON object a line, a comma behind each. A rank is a process there, a lane a thread.
std::string trace_events(int rank, const std::string& host, const std::vector<TraceSpan>& spans);

/// Traces some updates of a run into one file for all ranks (of more than 64, the first 64).
class Profiler {
 public:
  /// `world` is asked for its rank and size, `updates` is when.
  Profiler(Context& context, Group world, ProfiledUpdates updates, std::filesystem::path file);

  /// To be called before update number `update`.
  void before_update(int64_t update);

  /// To be called after it; writes the file after the last one. True where it has. AgreedError where the file
  /// cannot be written. Collective over the world.
  bool after_update(int64_t update);

  /// This rank's spans of the updates traced last.
  const std::vector<TraceSpan>& spans() const { return spans_; }

 private:
  Context& context_;
  Group world_;
  ProfiledUpdates updates_;
  std::filesystem::path file_;
  std::vector<TraceSpan> spans_;
};

}  // namespace normformer
