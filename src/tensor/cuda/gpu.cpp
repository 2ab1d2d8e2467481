#include "normformer/tensor/gpu.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <fstream>
#include <type_traits>

#include <nvtx3/nvToolsExt.h>

#include "normformer/core/error.h"

#include "tensor/cuda/check.h"

namespace normformer {

namespace cuda {

void check(cudaError_t result, const std::source_location& where) {
  if (result == cudaSuccess) return;
  throw Error(ExitCode::internal, fmt::format("{}:{}: CUDA: {} ({})", where.file_name(), where.line(),
                                              cudaGetErrorString(result), cudaGetErrorName(result)));
}

}  // namespace cuda

namespace {

using cuda::check;

cudaStream_t stream_of(const Gpu& gpu) { return static_cast<cudaStream_t>(gpu.stream()); }

int count_gpus() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int read_numa_node(const std::string& bus) {
  std::ifstream file("/sys/bus/pci/devices/" + bus + "/numa_node");
  int node = -1;
  file >> node;
  return file ? node : -1;
}

GpuDescription describe(int index) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, index));
  std::array<char, 32> bus{};
  check(cudaDeviceGetPCIBusId(bus.data(), bus.size(), index));
  GpuDescription made{.index = index,
                      .name = properties.name,
                      .memory = static_cast<int64_t>(properties.totalGlobalMem),
                      .multiprocessors = properties.multiProcessorCount,
                      .compute_major = properties.major,
                      .compute_minor = properties.minor,
                      .bus = bus.data(),
                      .numa_node = -1};
  std::transform(made.bus.begin(), made.bus.end(), made.bus.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  made.numa_node = read_numa_node(made.bus);
  return made;
}

std::string version_text(int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); }

}  // namespace

std::vector<GpuDescription> list_gpus() {
  std::vector<GpuDescription> all;
  for (int i = 0; i < count_gpus(); ++i) all.push_back(describe(i));
  return all;
}

std::string describe_cuda() {
  int driver = 0;
  int runtime = 0;
  check(cudaRuntimeGetVersion(&runtime));
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return fmt::format("CUDA {}, but no driver is loaded", version_text(runtime));
  }
  return fmt::format("CUDA {}, driver {}", version_text(runtime), version_text(driver));
}

/// Two pinned buffers: while one is copied by the GPU the other is filled or emptied by the host.
class Gpu::Staging {
 public:
  static constexpr int64_t kBytes = 8 << 20;

  Staging() {
    for (Buffer& b : buffers_) {
      check(cudaHostAlloc(&b.data, kBytes, cudaHostAllocDefault));
      check(cudaEventCreateWithFlags(&b.done, cudaEventDisableTiming));
    }
  }

  ~Staging() {
    for (Buffer& b : buffers_) {
      cudaEventDestroy(b.done);
      cudaFreeHost(b.data);
    }
  }

  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  void copy_in(cudaStream_t stream, std::byte* to, const std::byte* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += kBytes) {
      const auto part = static_cast<size_t>(std::min(kBytes, bytes - at));
      Buffer& buffer = next();
      std::memcpy(buffer.data, from + at, part);
      check(cudaMemcpyAsync(to + at, buffer.data, part, cudaMemcpyHostToDevice, stream));
      check(cudaEventRecord(buffer.done, stream));
    }
  }

  void copy_out(cudaStream_t stream, std::byte* to, const std::byte* from, int64_t bytes) {
    struct Arriving {
      Buffer* buffer = nullptr;
      int64_t at = 0;
      size_t bytes = 0;
    };
    const auto take = [&](const Arriving& a) {
      if (a.buffer == nullptr) return;
      check(cudaEventSynchronize(a.buffer->done));
      std::memcpy(to + a.at, a.buffer->data, a.bytes);
    };
    Arriving earlier;
    for (int64_t at = 0; at < bytes; at += kBytes) {
      const Arriving now{&next(), at, static_cast<size_t>(std::min(kBytes, bytes - at))};
      check(cudaMemcpyAsync(now.buffer->data, from + at, now.bytes, cudaMemcpyDeviceToHost, stream));
      check(cudaEventRecord(now.buffer->done, stream));
      take(earlier);
      earlier = now;
    }
    take(earlier);
  }

 private:
  struct Buffer {
    void* data = nullptr;
    cudaEvent_t done = nullptr;
  };

  // The buffer used longest ago, free again.
  Buffer& next() {
    Buffer& buffer = buffers_[turn_];
    turn_ = 1 - turn_;
    check(cudaEventSynchronize(buffer.done));
    return buffer;
  }

  std::array<Buffer, 2> buffers_;
  size_t turn_ = 0;
};

Gpu::Gpu(int index) {
  const int count = count_gpus();
  if (index < 0 || index >= count) {
    throw ConfigError(
        fmt::format("GPU {} was asked for, but this process sees {} ({}): start fewer ranks a "
                    "host, or set device.kind = \"cpu\"",
                    index, count, describe_cuda()));
  }
  description_ = describe(index);
  check(cudaSetDevice(index));
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  stream_ = stream;
  staging_ = std::make_unique<Staging>();
}

Gpu::~Gpu() {
  cudaSetDevice(description_.index);
  cudaStreamSynchronize(stream_of(*this));
  attached_.clear();
  staging_.reset();
  cudaStreamDestroy(stream_of(*this));
}

void* Gpu::allocate(int64_t bytes) {
  check(cudaSetDevice(description_.index));
  void* block = nullptr;
  const cudaError_t result = cudaMalloc(&block, static_cast<size_t>(bytes));
  if (result == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // or the next check of a launch would report it again
    return nullptr;
  }
  check(result);
  return block;
}

void Gpu::free(void* block) noexcept { cudaFree(block); }

Gpu::Memory Gpu::memory() const {
  size_t free = 0;
  size_t total = 0;
  check(cudaMemGetInfo(&free, &total));
  return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
}

void Gpu::copy_in(void* to, const void* from, int64_t bytes) {
  staging_->copy_in(stream_of(*this), static_cast<std::byte*>(to), static_cast<const std::byte*>(from),
                    bytes);
}

void Gpu::copy_out(void* to, const void* from, int64_t bytes) {
  staging_->copy_out(stream_of(*this), static_cast<std::byte*>(to), static_cast<const std::byte*>(from),
                     bytes);
}

void Gpu::copy(void* to, const void* from, int64_t bytes) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_of(*this)));
}

void Gpu::fill_zero(void* block, int64_t bytes) {
  check(cudaMemsetAsync(block, 0, static_cast<size_t>(bytes), stream_of(*this)));
}

GpuMoment Gpu::mark(void* stream) {
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event));
  GpuMoment made(
      std::shared_ptr<void>(event, [](void* e) { cudaEventDestroy(static_cast<cudaEvent_t>(e)); }));
  check(cudaEventRecord(event, stream != nullptr ? static_cast<cudaStream_t>(stream) : stream_of(*this)));
  return made;
}

double Gpu::seconds_between(const GpuMoment& from, const GpuMoment& to) const {
  auto* begin = static_cast<cudaEvent_t>(from.event_.get());
  auto* end = static_cast<cudaEvent_t>(to.event_.get());
  check(cudaEventSynchronize(begin));
  check(cudaEventSynchronize(end));
  float milliseconds = 0.0F;
  check(cudaEventElapsedTime(&milliseconds, begin, end));
  return 1e-3 * static_cast<double>(milliseconds);
}

namespace {

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;

// What `enqueue` gives the stream, as a graph.
Graph capture(cudaStream_t stream, const std::function<void()>& enqueue) {
  // Relaxed: memory may be taken from the driver meanwhile.
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  cudaGraph_t captured = nullptr;
  try {
    enqueue();
  } catch (...) {
    cudaStreamEndCapture(stream, &captured);
    const Graph unwanted(captured);
    throw;
  }
  check(cudaStreamEndCapture(stream, &captured));
  return Graph(captured);
}

bool brought_up_to_date(cudaGraphExec_t executable, cudaGraph_t graph) {
  if (executable == nullptr) return false;
  cudaGraphExecUpdateResultInfo info{};
  if (cudaGraphExecUpdate(executable, graph, &info) == cudaSuccess) return true;
  cudaGetLastError();  // or the next check of a launch would report it again
  return false;
}

}  // namespace

void Gpu::run_as_graph(GpuGraph& graph, const std::function<void()>& enqueue) {
  NF_CHECK(!capturing_, "a graph within a graph");
  capturing_ = true;
  Graph captured;
  try {
    captured = capture(stream_of(*this), enqueue);
  } catch (...) {
    capturing_ = false;
    throw;
  }
  capturing_ = false;
  auto* executable = static_cast<cudaGraphExec_t>(graph.executable_.get());
  if (!brought_up_to_date(executable, captured.get())) {
    executable = nullptr;
    check(cudaGraphInstantiate(&executable, captured.get(), 0));
    graph.executable_ = std::shared_ptr<void>(
        executable, [](void* e) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(e)); });
  }
  check(cudaGraphLaunch(executable, stream_of(*this)));
}

void Gpu::begin_range(const char* name) { nvtxRangePushA(name); }
void Gpu::end_range() { nvtxRangePop(); }

void Gpu::synchronize() { check(cudaStreamSynchronize(stream_of(*this))); }

}  // namespace normformer
