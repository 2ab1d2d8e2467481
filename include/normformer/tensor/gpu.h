#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <typeindex>
#include <utility>
#include <vector>

namespace normformer {

/// What the driver says of one GPU.
struct GpuDescription {
  int index = 0;       ///< as this process numbers them
  std::string name;    ///< "NVIDIA H200"
  int64_t memory = 0;  ///< bytes
  int multiprocessors = 0;
  int compute_major = 0;  ///< compute capability: 9 and 0 for Hopper
  int compute_minor = 0;
  std::string bus;     ///< PCI address, "0000:17:00.0"
  int numa_node = -1;  ///< of the PCI slot; -1 where the system does not say
};

/// The GPUs that this process sees; none where there is no driver or this build has no CUDA.
std::vector<GpuDescription> list_gpus();

/// "CUDA 13.0, driver 13.1", or why there is none: "this build has no CUDA (-DNORMFORMER_CUDA=ON)".
std::string describe_cuda();

/// A place in a GPU's queue of work, reached when all that was enqueued before it is done. Copies are the
/// same place.
class GpuMoment {
 public:
  GpuMoment() = default;

 private:
  friend class Gpu;
  explicit GpuMoment(std::shared_ptr<void> event) : event_(std::move(event)) {}
  std::shared_ptr<void> event_;  // a cudaEvent_t
};

/// Work that a GPU is given as one piece (a CUDA graph); see Gpu::run_as_graph. Copies are the same graph.
class GpuGraph {
 public:
  GpuGraph() = default;

 private:
  friend class Gpu;
  std::shared_ptr<void> executable_;  // a cudaGraphExec_t
};

/// One GPU as one rank uses it: its memory and a queue of work for computing. Work is done in the order in
/// which it was enqueued, later than the call; only what is said to wait waits. Used by one thread at a time,
/// save allocate() and free(). Functions throw Error with the driver's words where a call fails, which may
/// also be the failure of work enqueued earlier.
class Gpu {
 public:
  /// ConfigError where this process has no such GPU.
  explicit Gpu(int index);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  const GpuDescription& description() const { return description_; }

  /// Memory from the driver, aligned to 256 bytes; null where it has not so much left.
  void* allocate(int64_t bytes);

  /// Gives a block of allocate() back once all work enqueued so far is done.
  void free(void* block) noexcept;

  /// Free and total bytes of the GPU, other processes' included.
  struct Memory {
    int64_t free = 0;
    int64_t total = 0;
  };
  Memory memory() const;

  /// Enqueues a copy to the GPU by way of pinned memory; `from` may change once this returns.
  void copy_in(void* to, const void* from, int64_t bytes);

  /// Copies to the host by way of pinned memory; waits until the bytes are there.
  void copy_out(void* to, const void* from, int64_t bytes);

  /// Enqueues a copy within the GPU; the areas must not overlap.
  void copy(void* to, const void* from, int64_t bytes);

  /// Enqueues setting every byte to zero.
  void fill_zero(void* block, int64_t bytes);

  /// Waits until all work enqueued so far is done.
  void synchronize();

  /// The queue itself, a cudaStream_t.
  void* stream() const { return stream_; }

  /// Enqueues a place to take the time at; in another queue of this GPU where `stream` (a cudaStream_t) is
  /// one.
  GpuMoment mark(void* stream = nullptr);

  /// Waits until both are reached, and returns the time from one to the other.
  double seconds_between(const GpuMoment& from, const GpuMoment& to) const;

  /// Calls `enqueue` and gives the GPU all that it enqueues in one piece, which costs the host less than
  /// kernel by kernel and leaves no gaps between them. `graph` is what earlier work of the same form stood
  /// in: only what has changed is put into it, or it is made anew where the form is another. `enqueue` must
  /// enqueue to this queue alone and neither wait for the GPU nor copy between it and the host; memory that
  /// it frees goes back to the allocator, not to the driver.
  void run_as_graph(GpuGraph& graph, const std::function<void()>& enqueue);

  /// Whether what is enqueued now goes into a graph.
  bool is_capturing() const { return capturing_; }

  /// Begins and ends a range of this host thread's time, which NVIDIA's tools (Nsight) show under its name.
  /// Ranges nest. Next to nothing where no tool is attached.
  static void begin_range(const char* name);
  static void end_range();

  /// An object of type T for this GPU, made from it on first use and kept as long as it: a library's handle,
  /// say.
  template <class T>
  T& attached() {
    std::shared_ptr<void>& slot = attached_[typeid(T)];
    if (slot == nullptr) slot = std::make_shared<T>(*this);
    return *static_cast<T*>(slot.get());
  }

  /// Whether products of fp32 may round their factors to 11 bits (TF32). Off unless set before the first
  /// product.
  bool uses_tf32() const { return tf32_; }
  void use_tf32(bool use) { tf32_ = use; }

  /// Whether the fastest of cuBLASLt's algorithms is sought, once for each product and machine, and kept in
  /// the user's cache (core/kept_choices.h). Off unless set before the first product: then the library's
  /// heuristic chooses.
  bool tunes_products() const { return tunes_products_; }
  void tune_products(bool tune) { tunes_products_ = tune; }

 private:
  class Staging;

  GpuDescription description_;
  void* stream_ = nullptr;
  std::unique_ptr<Staging> staging_;
  std::map<std::type_index, std::shared_ptr<void>> attached_;
  bool tf32_ = false;
  bool tunes_products_ = false;
  bool capturing_ = false;
};

}  // namespace normformer
