#include "ranks.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "normformer/core/error.h"
#include "normformer/training/agreement.h"

namespace normformer {

int RankProcess::threads(const DeviceConfig& device) const {
  if (device.threads > 0) return static_cast<int>(device.threads);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / local_size);
}

int run_on_ranks(int* argc, char*** argv, const std::function<int(const RankProcess&)>& body) {
  MpiSession mpi(argc, argv);
  const RankProcess process{mpi.world(), mpi.local_rank(), mpi.local_size()};
  if (process.world.size() > 1) set_rank_label(process.world.rank(), host_name());
  try {
    return body(process);
  } catch (const AgreedError& e) {
    if (process.world.rank() == 0) std::fprintf(stderr, "normformer: %s\n", e.what());
    return static_cast<int>(e.exit_code());
  } catch (...) {
    std::fprintf(stderr, "%s\n", describe_current_exception().c_str());
    const auto code = static_cast<int>(current_exception_exit_code());
    if (process.world.size() > 1) {
      // mpirun drops what a rank has written and it has not read when the job is aborted.
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      MpiSession::abort(code);
    }
    return code;
  }
}

void require_single_process(const char* command) {
  const char* size = std::getenv("OMPI_COMM_WORLD_SIZE");
  if (size != nullptr && std::string(size) != "1") {
    throw ConfigError(std::string("`normformer ") + command +
                      "` works in one process: start it without mpirun");
  }
}

}  // namespace normformer
