#pragma once

#include <memory>
#include <string>

#include "simt/runtime_api.h"
#include "simt/vector_types.h"

namespace simt {

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kMostThreads = 1024;

/// A kernel with its arguments and on what it runs.
struct Launch {
  const void* kernel = nullptr;
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  bool backwards = false;  ///< whether blocks run from the last to the first
  std::unique_ptr<detail::Call> call;
};

/// Runs the launch on this host thread. std::logic_error that names kernel, block and threads where a thread
/// throws or waits for ever; the thread's own exception is nested in it.
void run(const Launch& launch);

/// Whether a kernel is running on this host thread.
bool in_kernel();

/// "kernel f<float>(float*), block (1, 0, 0), thread (5, 0, 0)": what is running on this host thread.
std::string describe_running();

/// ": behind its 1000 bytes of dynamic shared memory" and the like; empty for an address of nothing here.
std::string describe_address_of_block(const void* address);

}  // namespace simt
