#include "normformer/tensor/trace.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include <fmt/format.h>

#include "normformer/core/activity.h"
#include "normformer/core/error.h"
#include "normformer/tensor/context.h"

namespace normformer {

std::string_view name_of(TraceKind kind) {
  switch (kind) {
    case TraceKind::step:
      return "step";
    case TraceKind::pipeline:
      return "pipeline";
    case TraceKind::module:
      return "module";
    case TraceKind::operation:
      return "operation";
    case TraceKind::communication:
      return "communication";
  }
  return "?";
}

std::string_view name_of(TraceLane lane) {
  switch (lane) {
    case TraceLane::host:
      return "host";
    case TraceLane::gpu_compute:
      return "GPU: compute";
    case TraceLane::gpu_collectives:
      return "GPU: collectives";
    case TraceLane::gpu_messages_up:
      return "GPU: messages up";
    case TraceLane::gpu_messages_down:
      return "GPU: messages down";
  }
  return "?";
}

namespace {

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace

namespace {
thread_local const TraceScope* innermost_span = nullptr;
}  // namespace

struct Trace::Recording {
  struct Open {
    TraceSpan span;
    TraceLane queue = TraceLane::host;  // of the second span; host where there is none
    void* stream = nullptr;
    GpuMoment begin;
    GpuMoment end;
    bool closed = false;
  };

  std::vector<Open> spans;
  double start_us = 0;
  GpuMoment start;
};

Trace::Trace() = default;
Trace::~Trace() = default;

void Trace::start(Context& context) {
  recording_ = std::make_unique<Recording>();
  if (context.is_cuda()) {
    recording_->start = context.gpu().mark();
    context.gpu().synchronize();  // so that it is now that the GPU gets there
  }
  recording_->start_us = now_us();
}

std::vector<TraceSpan> Trace::finish(Context& context) {
  NF_CHECK(is_on(), "a trace ends that has not begun");
  const auto recording = std::move(recording_);
  std::vector<TraceSpan> spans;
  for (Recording::Open& open : recording->spans) {
    if (!open.closed) continue;
    spans.push_back(open.span);
    if (open.queue == TraceLane::host) continue;
    TraceSpan& second = spans.emplace_back(std::move(open.span));
    second.lane = open.queue;
    const double begin = context.gpu().seconds_between(recording->start, open.begin);
    second.begin_us = recording->start_us + 1e6 * begin;
    second.duration_us = 1e6 * context.gpu().seconds_between(open.begin, open.end);
  }
  // Spans begin in the order in which they were made, in each queue too; times are too coarse to tell.
  std::stable_sort(spans.begin(), spans.end(),
                   [](const TraceSpan& a, const TraceSpan& b) { return a.lane < b.lane; });
  return spans;
}

TraceScope::TraceScope(Context& context, TraceKind kind, std::string_view name, std::string_view suffix,
                       const TraceDetails& details, TraceLane lane, void* stream)
    : context_(&context), name_(name), suffix_(suffix), names_place_(kind <= TraceKind::module) {
  note_activity();
  if (names_place_) around_ = std::exchange(innermost_span, this);
  Trace::Recording* recording = context.trace().recording_.get();
  has_range_ = context.is_cuda();
  if (recording == nullptr && !has_range_) return;
  std::string whole = suffix.empty() ? std::string(name) : fmt::format("{} {}", name, suffix);
  if (has_range_) Gpu::begin_range(whole.c_str());
  if (recording == nullptr) return;
  recording_ = recording;
  span_ = recording->spans.size();
  Trace::Recording::Open& open = recording->spans.emplace_back();
  open.span = {.name = std::move(whole),
               .kind = kind,
               .lane = TraceLane::host,
               .begin_us = now_us(),
               .duration_us = 0,
               .details = details,
               .group = std::string(details.group)};
  if (!context.is_cuda()) return;
  open.queue = lane;
  open.stream = stream;
  open.begin = context.gpu().mark(stream);
}

TraceScope::~TraceScope() {
  if (names_place_) innermost_span = around_;
  if (has_range_) Gpu::end_range();
  Trace::Recording* recording = context_->trace().recording_.get();
  if (recording_ == nullptr || recording != recording_) return;
  Trace::Recording::Open& open = recording->spans[span_];
  open.span.duration_us = now_us() - open.span.begin_us;
  // While an exception is on its way the GPU may have failed: the span stays open and is left out.
  if (std::uncaught_exceptions() > 0) return;
  if (open.queue != TraceLane::host) open.end = context_->gpu().mark(open.stream);
  open.closed = true;
}

size_t name_innermost_span(std::span<char> text) noexcept {
  if (innermost_span == nullptr) return 0;
  size_t written = 0;
  const auto append = [&](std::string_view part) {
    written += part.copy(text.data() + written, text.size() - written);
  };
  append(innermost_span->name_);
  if (!innermost_span->suffix_.empty()) append(" ");
  append(innermost_span->suffix_);
  return written;
}

TraceScope trace_operation(Context& context, std::string_view name) {
  const OperationCost& cost = context.costs().latest();
  return {context, TraceKind::operation, name, {}, {.flops = cost.flops, .bytes = cost.bytes}};
}

}  // namespace normformer
