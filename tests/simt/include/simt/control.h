#pragma once

// What a test can ask of the emulated GPU besides what CUDA offers.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>

#include "simt/runtime_api.h"
#include "simt/vector_types.h"

namespace simt {

/// In a dry run launches are checked and recorded but nothing is computed or copied: what is copied to the
/// host is zeros. Memory allocated meanwhile takes no room until it is touched and has no limit.
void set_dry_run(bool dry);
bool dry_run();

/// How large the emulated GPU's memory is; 64 GiB unless a test says otherwise.
void set_device_memory(size_t bytes);

/// The launches of one kernel.
struct KernelLaunches {
  int64_t count = 0;
  int64_t most_blocks = 0;
  int most_threads = 0;          ///< of a block
  size_t most_shared_bytes = 0;  ///< dynamic, of a block
};

/// What was launched since reset_launches(), from all host threads.
struct Launches {
  KernelLaunches all;
  std::map<std::string, KernelLaunches> kernels;  ///< by the kernel's name with its parameters' types
};
Launches launches();
void reset_launches();

/// Puts work of the host into a stream's order.
void enqueue_host_work(cudaStream_t stream, std::function<void()> work);

/// What has been done with graphs so far.
struct GraphCounts {
  int64_t instantiated = 0;
  int64_t updated = 0;
  int64_t launched = 0;
};
GraphCounts graph_counts();

/// The names of all ranges (NVTX) so far, from all host threads, and how many of this thread's are open.
std::set<std::string> range_names();
int open_ranges();

}  // namespace simt
