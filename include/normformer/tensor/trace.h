#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace normformer {

class Context;

/// What a stretch of a rank's time goes to, from the outermost to the innermost.
enum class TraceKind { step, pipeline, module, operation, communication };

/// "step", "pipeline", "module", ...
std::string_view name_of(TraceKind kind);

/// Where the time passes: on the host (on a CPU the work itself, for a GPU its enqueueing), in a GPU's queue
/// of computing and of collectives that it waits for, in that of collectives beside it, or in one of those
/// that carry messages.
enum class TraceLane { host, gpu_compute, gpu_collectives, gpu_messages_up, gpu_messages_down };

/// "host", "GPU: compute", ...
std::string_view name_of(TraceLane lane);

/// What is known of a span besides its name; -1 and empty where it says nothing.
struct TraceDetails {
  int64_t flops = -1;
  int64_t bytes = -1;  ///< that move through memory, or between ranks
  int64_t micro_batch = -1;
  int64_t chunk = -1;
  std::string_view group = {};  ///< of communication
};

/// One stretch of time.
struct TraceSpan {
  std::string name;
  TraceKind kind = TraceKind::operation;
  TraceLane lane = TraceLane::host;
  double begin_us = 0;  ///< microseconds of the system's clock since 1970
  double duration_us = 0;
  TraceDetails details;
  std::string group;  ///< what details.group refers to
};

/// What one rank does when, recorded between start() and finish(). Belongs to a Context and is used by the
/// rank's own thread. Off, it costs a comparison a span.
class Trace {
 public:
  Trace();
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  bool is_on() const { return recording_ != nullptr; }

  /// Begins anew; waits for the context's GPU, if it has one.
  void start(Context& context);

  /// Ends and returns all spans that are closed, sorted by lane and beginning; what lies inside another span
  /// comes after it. Waits for the context's GPU.
  std::vector<TraceSpan> finish(Context& context);

 private:
  friend class TraceScope;
  struct Recording;
  std::unique_ptr<Recording> recording_;
};

/// A span from construction to destruction; its strings must outlive it. On a GPU it is also a range of
/// NVIDIA's tools (NVTX), traced or not, and, where traced, a second span on the lane of the queue that it
/// enqueues to.
class TraceScope {
 public:
  /// "name" or "name suffix". `lane` and `stream` (a cudaStream_t) say to which of a GPU's queues the work
  /// between goes; the context's own, unless said otherwise.
  TraceScope(Context& context, TraceKind kind, std::string_view name, std::string_view suffix = {},
             const TraceDetails& details = {}, TraceLane lane = TraceLane::gpu_compute,
             void* stream = nullptr);
  ~TraceScope();
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

 private:
  Context* context_;
  size_t span_ = 0;  // in the recording, while that is `recording_`
  const void* recording_ = nullptr;
  bool has_range_ = false;

  friend size_t name_innermost_span(std::span<char> text) noexcept;
  std::string_view name_;
  std::string_view suffix_;
  const TraceScope* around_ =
      nullptr;  // in the chain of this thread's open spans that name_innermost_span reads
  bool names_place_ = false;
};

/// Where this thread is, traced or not: the name of its innermost open span of a module, a pipeline's action
/// or a step, cut to what fits into `text`. Returns how many characters that were; 0 outside of any.
size_t name_innermost_span(std::span<char> text) noexcept;

/// The span of an operation that has just entered its cost (Context::costs).
TraceScope trace_operation(Context& context, std::string_view name);

}  // namespace normformer
