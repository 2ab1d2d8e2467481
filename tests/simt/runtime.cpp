#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "block.h"
#include "launches.h"
#include "memory.h"
#include "simt/control.h"
#include "simt/runtime_api.h"
#include "streams.h"

namespace {

constexpr int kMultiprocessors = 132;
constexpr int kMajor = 9;
constexpr int kMinor = 0;
constexpr int kVersion = 13000;
constexpr int kShared = 48 << 10;
constexpr int kSharedOptin = 227 << 10;
constexpr int kSharedOfMultiprocessor = 228 << 10;
constexpr const char* kBus = "0000:00:00.0";

thread_local constinit cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// While another exception is on its way, a second one would end the program.
template <class Wait>
cudaError_t waiting(const Wait& wait) {
  if (std::uncaught_exceptions() == 0) {
    wait();
    return cudaSuccess;
  }
  try {
    wait();
    return cudaSuccess;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "simt: %s\n", e.what());
    return remember(cudaErrorLaunchFailure);
  }
}

using Clock = std::chrono::steady_clock;

struct Event {
  bool timed = true;
  std::optional<simt::Mark> mark;         ///< where it was recorded last
  std::shared_ptr<Clock::time_point> at;  ///< written when the mark is reached
};

struct Events {
  std::mutex mutex;
  std::map<uint64_t, Event> by_handle;
  uint64_t next_handle = 1;
};

Events& events() {
  static Events all;
  return all;
}

uint64_t number_of(cudaEvent_t event) { return reinterpret_cast<uint64_t>(event); }

std::optional<Event> find_event(cudaEvent_t event) {
  Events& all = events();
  const std::lock_guard lock(all.mutex);
  const auto found = all.by_handle.find(number_of(event));
  return found == all.by_handle.end() ? std::nullopt : std::optional(found->second);
}

bool done(const Event& event) { return !event.mark || simt::reached(*event.mark); }

// Whether a range can be the end of a copy that the caller says lies on that side.
bool fits(const simt::Location& location, bool on_device) {
  return location.whole && (location.place == simt::Place::device) == on_device;
}

cudaError_t check_copy(const simt::Location& to, const simt::Location& from, cudaMemcpyKind kind) {
  if (!to.whole || !from.whole) return cudaErrorInvalidValue;
  switch (kind) {
    case cudaMemcpyDefault:
      return cudaSuccess;
    case cudaMemcpyHostToHost:
      return fits(to, false) && fits(from, false) ? cudaSuccess : cudaErrorInvalidValue;
    case cudaMemcpyHostToDevice:
      return fits(to, true) && fits(from, false) ? cudaSuccess : cudaErrorInvalidValue;
    case cudaMemcpyDeviceToHost:
      return fits(to, false) && fits(from, true) ? cudaSuccess : cudaErrorInvalidValue;
    case cudaMemcpyDeviceToDevice:
      return fits(to, true) && fits(from, true) ? cudaSuccess : cudaErrorInvalidValue;
  }
  return cudaErrorInvalidMemcpyDirection;
}

// In a dry run the device's memory has no contents; what comes from there is zeros.
void copy_now(void* to, const void* from, size_t bytes, bool to_device, bool from_device) {
  if (!simt::dry_run()) {
    std::memmove(to, from, bytes);
  } else if (from_device && !to_device) {
    std::memset(to, 0, bytes);
  }
}

}  // namespace

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidMemcpyDirection:
      return "cudaErrorInvalidMemcpyDirection";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorGraphExecUpdateFailure:
      return "cudaErrorGraphExecUpdateFailure";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidMemcpyDirection:
      return "invalid copy direction for memcpy";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorGraphExecUpdateFailure:
      return "the graph update was not performed because it included changes which violated constraints";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof(properties->name), "emulated GPU");
  properties->totalGlobalMem = simt::total_memory();
  properties->sharedMemPerBlock = kShared;
  properties->sharedMemPerBlockOptin = kSharedOptin;
  properties->sharedMemPerMultiprocessor = kSharedOfMultiprocessor;
  properties->regsPerBlock = 65536;
  properties->warpSize = static_cast<int>(simt::kWarp);
  properties->maxThreadsPerBlock = static_cast<int>(simt::kMostThreads);
  properties->major = kMajor;
  properties->minor = kMinor;
  properties->multiProcessorCount = kMultiprocessors;
  properties->l2CacheSize = 50 << 20;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = static_cast<int>(simt::kMostThreads);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kShared;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = static_cast<int>(simt::kWarp);
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = kMajor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = kMinor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kSharedOfMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kSharedOptin;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetPCIBusId(char* address, int size, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  if (size < 13) return remember(cudaErrorInvalidValue);
  std::snprintf(address, static_cast<size_t>(size), "%s", kBus);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return waiting(simt::run_all); }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** block, size_t bytes) {
  *block = nullptr;
  if (bytes == 0) return cudaSuccess;
  *block = simt::allocate(bytes, simt::Place::device);
  return remember(*block != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void* block) {
  if (block == nullptr) return cudaSuccess;
  const cudaError_t result = waiting(simt::run_all);
  if (!simt::deallocate(block, simt::Place::device)) return remember(cudaErrorInvalidValue);
  return result;
}

cudaError_t cudaHostAlloc(void** block, size_t bytes, unsigned) {
  *block = nullptr;
  if (bytes == 0) return cudaSuccess;
  *block = simt::allocate(bytes, simt::Place::pinned);
  return remember(*block != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeHost(void* block) {
  if (block == nullptr) return cudaSuccess;
  const cudaError_t result = waiting(simt::run_all);
  if (!simt::deallocate(block, simt::Place::pinned)) return remember(cudaErrorInvalidValue);
  return result;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = simt::free_memory();
  *total = simt::total_memory();
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t result = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return result == cudaSuccess ? cudaStreamSynchronize(nullptr) : result;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const auto queue = simt::find_queue(stream);
  if (queue == nullptr) return remember(cudaErrorInvalidResourceHandle);
  if (bytes == 0) return cudaSuccess;
  const simt::Location target = simt::locate(to, bytes);
  const simt::Location source = simt::locate(from, bytes);
  const cudaError_t result = check_copy(target, source, kind);
  if (result != cudaSuccess) return remember(result);
  // The driver would copy whenever the graph runs; nothing here keeps the host's memory for that.
  if (simt::captures(queue) && kind != cudaMemcpyDeviceToDevice)
    return remember(cudaErrorStreamCaptureUnsupported);
  const bool to_device = target.place == simt::Place::device;
  const bool from_device = source.place == simt::Place::device;
  if (source.place == simt::Place::pageable && to_device && !simt::dry_run()) {
    // The driver takes the bytes away before it returns.
    const auto* bytes_now = static_cast<const std::byte*>(from);
    auto taken = std::make_shared<const std::vector<std::byte>>(bytes_now, bytes_now + bytes);
    simt::enqueue(queue, [=] { copy_now(to, taken->data(), bytes, true, false); });
    return cudaSuccess;
  }
  simt::enqueue(queue, [=] { copy_now(to, from, bytes, to_device, from_device); });
  // The driver waits where the host's memory is not pinned.
  if (target.place == simt::Place::pageable) return cudaStreamSynchronize(stream);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* block, int value, size_t bytes) {
  return cudaMemsetAsync(block, value, bytes, nullptr);
}

cudaError_t cudaMemsetAsync(void* block, int value, size_t bytes, cudaStream_t stream) {
  const auto queue = simt::find_queue(stream);
  if (queue == nullptr) return remember(cudaErrorInvalidResourceHandle);
  if (bytes == 0) return cudaSuccess;
  if (!fits(simt::locate(block, bytes), true)) return remember(cudaErrorInvalidValue);
  simt::enqueue(queue, [=] {
    if (!simt::dry_run()) std::memset(block, value, bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (flags > cudaStreamNonBlocking) return remember(cudaErrorInvalidValue);
  *stream = simt::add_queue(flags == cudaStreamDefault);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  bool found = false;
  const cudaError_t result = waiting([&] { found = simt::remove_queue(stream); });
  if (result != cudaSuccess) return result;
  return remember(found ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const auto queue = simt::find_queue(stream);
  if (queue == nullptr) return remember(cudaErrorInvalidResourceHandle);
  if (simt::captures(queue)) return remember(cudaErrorStreamCaptureUnsupported);
  return waiting([&] { simt::run_until(simt::mark_end(queue)); });
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const auto queue = simt::find_queue(stream);
  if (queue == nullptr) return remember(cudaErrorInvalidResourceHandle);
  if (simt::captures(queue)) return remember(cudaErrorStreamCaptureUnsupported);
  const simt::Mark end = simt::mark_end(queue);
  if (simt::reached(end)) return cudaSuccess;
  const cudaError_t result = waiting([&] { simt::run_until(end); });
  return remember(result == cudaSuccess ? cudaErrorNotReady : result);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const auto queue = simt::find_queue(stream);
  const auto found = find_event(event);
  if (queue == nullptr || !found) return remember(cudaErrorInvalidResourceHandle);
  if (simt::captures(queue)) return remember(cudaErrorStreamCaptureUnsupported);
  if (found->mark && found->mark->queue != queue) simt::enqueue_wait(queue, *found->mark);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  Events& all = events();
  const std::lock_guard lock(all.mutex);
  const uint64_t handle = all.next_handle++;
  all.by_handle[handle].timed = (flags & cudaEventDisableTiming) == 0;
  *event = reinterpret_cast<cudaEvent_t>(handle);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Events& all = events();
  const std::lock_guard lock(all.mutex);
  return remember(all.by_handle.erase(number_of(event)) == 1 ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const auto queue = simt::find_queue(stream);
  if (queue == nullptr || !find_event(event)) return remember(cudaErrorInvalidResourceHandle);
  // The driver can; here a captured event would have to be an end of work that has no end yet.
  if (simt::captures(queue)) return remember(cudaErrorStreamCaptureUnsupported);
  auto at = std::make_shared<Clock::time_point>();
  simt::enqueue(queue, [at] { *at = Clock::now(); });
  Events& all = events();
  const std::lock_guard lock(all.mutex);
  Event& recorded = all.by_handle[number_of(event)];
  recorded.mark = simt::mark_end(queue);
  recorded.at = std::move(at);
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const auto found = find_event(event);
  if (!found) return remember(cudaErrorInvalidResourceHandle);
  if (done(*found)) return cudaSuccess;
  // Not done when it was asked; who asks again finds it done.
  const cudaError_t result = waiting([&] { simt::run_until(*found->mark); });
  return remember(result == cudaSuccess ? cudaErrorNotReady : result);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const auto found = find_event(event);
  if (!found) return remember(cudaErrorInvalidResourceHandle);
  if (done(*found)) return cudaSuccess;
  return waiting([&] { simt::run_until(*found->mark); });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const auto first = find_event(start);
  const auto last = find_event(end);
  if (!first || !last || !first->timed || !last->timed || !first->mark || !last->mark) {
    return remember(cudaErrorInvalidResourceHandle);
  }
  if (!done(*first) || !done(*last)) return remember(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(*last->at - *first->at).count();
  return cudaSuccess;
}

namespace simt::detail {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::unique_ptr<Call> call) {
  const auto queue = find_queue(config.stream);
  if (queue == nullptr) return remember(cudaErrorInvalidResourceHandle);
  const cudaError_t result = check_launch(config, kernel);
  if (result != cudaSuccess) return remember(result);
  record_launch(config, kernel);
  if (dry_run()) return cudaSuccess;
  const bool backwards = count_launch(queue) % 2 != 0;
  auto made = std::make_shared<Launch>(
      Launch{kernel, config.gridDim, config.blockDim, config.dynamicSmemBytes, backwards, std::move(call)});
  enqueue(queue, [made] { run(*made); });
  return cudaSuccess;
}

}  // namespace simt::detail
