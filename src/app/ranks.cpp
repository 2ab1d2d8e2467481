#include "ranks.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <sched.h>

#include "normformer/comm/nccl.h"
#include "normformer/core/error.h"
#include "normformer/core/log.h"
#include "normformer/training/agreement.h"

namespace normformer {

int RankProcess::threads(const DeviceConfig& device) const {
  if (device.threads > 0) return static_cast<int>(device.threads);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / local_size);
}

namespace {

// The processors of a NUMA node, read off the system's list ("0-15,32-47"); empty where it does not say.
std::vector<int> processors_of_node(int node) {
  std::vector<int> processors;
  std::ifstream file(fmt::format("/sys/devices/system/node/node{}/cpulist", node));
  for (std::string part; std::getline(file, part, ',');) {
    int first = 0;
    int last = 0;
    const int read = std::sscanf(part.c_str(), "%d-%d", &first, &last);
    if (read < 1) return {};
    for (int p = first; p <= (read == 2 ? last : first); ++p) processors.push_back(p);
  }
  return processors;
}

// Whether this thread, and those that it starts, now run beside the GPU. A launcher's tighter binding stays.
bool bind_to_node(int node) {
  if (node < 0) return false;
  cpu_set_t allowed;
  cpu_set_t wanted;
  CPU_ZERO(&wanted);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return false;
  for (const int p : processors_of_node(node)) {
    if (p < CPU_SETSIZE && CPU_ISSET(p, &allowed)) CPU_SET(p, &wanted);
  }
  return CPU_COUNT(&wanted) > 0 && sched_setaffinity(0, sizeof(wanted), &wanted) == 0;
}

std::string describe_binding(const Context& context, bool bound) {
  const GpuDescription& gpu = context.gpu().description();
  return fmt::format("{}: GPU {} {} at {}{}", host_name(), gpu.index, gpu.name, gpu.bus,
                     bound ? fmt::format(", NUMA node {}", gpu.numa_node) : "");
}

// NCCL joins ranks only where each has a GPU of its own.
bool uses_nccl(const DeviceConfig& device, const RankProcess& process, int gpus) {
  if (device.transport == GpuTransport::mpi || process.world.size() == 1) return false;
  const bool shared = process.world.all_reduce(process.local_size > gpus ? 1.0 : 0.0, ReduceOp::max) > 0.0;
  if (device.transport == GpuTransport::nccl) {
    run_agreed(process.world, [&] {
      if (!has_nccl())
        throw ConfigError("device.transport = \"nccl\" cannot be had: " + describe_nccl() +
                          "; write \"mpi\"");
      if (shared)
        throw ConfigError(
            "device.transport = \"nccl\" needs a GPU for every rank: start fewer ranks a host, or write "
            "\"mpi\"");
    });
  }
  return has_nccl() && !shared;
}

}  // namespace

RankDevice make_rank_device(const RunConfig& config, const RankProcess& process) {
  const DeviceConfig& device = config.device;
  const int threads = process.threads(device);
  if (device.kind == DeviceChoice::cpu) {
    return {std::make_unique<Context>(DeviceKind::cpu, threads), process.world};
  }
  RankDevice made;
  const auto gpus = static_cast<int>(list_gpus().size());
  bool bound = false;
  run_agreed(process.world, [&] {
    if (gpus == 0) {
      throw ConfigError(fmt::format("device.kind = \"cuda\", but {} has no GPU to use ({}): write \"cpu\"",
                                    host_name(), describe_cuda()));
    }
    const int index = process.local_rank % gpus;
    bound = bind_to_node(list_gpus()[static_cast<size_t>(index)].numa_node);
    made.context = std::make_unique<Context>(DeviceKind::cuda, threads, index);
    made.context->gpu().use_tf32(device.tf32);
  });
  const bool nccl = uses_nccl(device, process, gpus);
  made.world = nccl ? make_nccl_world(*made.context, process.world) : process.world;
  const auto bindings = process.world.all_gather_text(describe_binding(*made.context, bound));
  log_root(LogLevel::info, "{}; tensors travel by {}", describe_cuda(),
           nccl ? describe_nccl() : "way of the hosts");
  for (size_t r = 0; r < bindings.size(); ++r) log_root(LogLevel::info, "rank {} on {}", r, bindings[r]);
  return made;
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
