#include "ranks.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <sched.h>

#include "normformer/comm/nccl.h"
#include "normformer/comm/tcp.h"
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

// The run's watchdog (0: never) knows more of a hang than NCCL's watch does, and so has the first word.
double nccl_patience(double watchdog_seconds) {
  return watchdog_seconds > 0.0 ? 1.5 * watchdog_seconds : std::numeric_limits<double>::infinity();
}

// NCCL joins ranks where each has a GPU of its own; ranks that share one only if they are told that they run
// on different hosts (NCCL_HOSTID), which is for tests.
bool uses_nccl(const DeviceConfig& device, const RankProcess& process, int gpus) {
  if (device.transport == GpuTransport::host || process.world.size() == 1) return false;
  const bool shared = process.world.all_reduce(process.local_size > gpus ? 1.0 : 0.0, ReduceOp::max) > 0.0;
  if (device.transport == GpuTransport::nccl) {
    run_agreed(process.world, [&] {
      if (!has_nccl())
        throw ConfigError("device.transport = \"nccl\" cannot be had: " + describe_nccl() +
                          "; write \"host\"");
    });
    if (shared) {
      log_root(
          LogLevel::warning,
          "ranks share a GPU, which NCCL refuses unless each has its own NCCL_HOSTID: start fewer ranks a "
          "host, or write device.transport = \"host\"");
    }
    return true;
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
  // Streams that share one of the driver's queues, 8 unless told otherwise, wait for each other, and each
  // kind of traffic has a stream of its own.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
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
    made.context->gpu().tune_products(device.tune_products);
  });
  const bool nccl = uses_nccl(device, process, gpus);
  made.world =
      nccl ? make_nccl_world(*made.context, process.world, nccl_patience(config.health.watchdog_seconds))
           : process.world;
  const auto bindings = process.world.all_gather_text(describe_binding(*made.context, bound));
  log_root(LogLevel::info, "{}; tensors travel by {}", describe_cuda(),
           nccl ? describe_nccl() : "way of the hosts");
  for (size_t r = 0; r < bindings.size(); ++r) log_root(LogLevel::info, "rank {} on {}", r, bindings[r]);
  return made;
}

namespace {

// Whether an MPI launcher started this process: it knows the ranks then, whatever else the environment says.
bool has_mpi_launcher() {
  const auto is_set = [](const char* name) { return std::getenv(name) != nullptr; };
  return is_set("OMPI_COMM_WORLD_SIZE") || is_set("PMI_RANK") || is_set("PMIX_RANK");
}

// mpirun drops what a rank has written and it has not read when the job is aborted; and over TCP all others
// should hear of the rank that failed first before they hear of this one.
constexpr auto kLastWords = std::chrono::milliseconds(200);

void abort_mpi_job(int exit_code) {
  std::this_thread::sleep_for(kLastWords);
  MpiSession::abort(exit_code);
}

// The system closes the connections without a goodbye, so that all other ranks fail too.
void abort_tcp_job(int exit_code) {
  std::this_thread::sleep_for(kLastWords);
  std::_Exit(exit_code);
}

// Where the launcher does not say who shares a host, the hosts' names do.
RankProcess join_over_tcp(const Rendezvous& rendezvous) {
  RankProcess process{make_tcp_world(rendezvous), rendezvous.local_rank, rendezvous.local_size,
                      abort_tcp_job};
  if (process.local_rank >= 0 && process.local_size > 0) return process;
  const auto hosts = process.world.all_gather_text(host_name());
  process.world.ledger().clear();
  const auto mine = hosts.begin() + process.world.rank();
  process.local_size = static_cast<int>(std::count(hosts.begin(), hosts.end(), *mine));
  if (process.local_rank < 0) process.local_rank = static_cast<int>(std::count(hosts.begin(), mine, *mine));
  return process;
}

// Prints the current exception, ends the job where there are other ranks, and returns the exit code.
int fail_alone(const RankProcess& process) {
  std::fprintf(stderr, "%s\n", describe_current_exception().c_str());
  const auto code = static_cast<int>(current_exception_exit_code());
  if (process.world.size() > 1) process.end_job(code);
  return code;
}

int run_rank(const RankProcess& process, const std::function<int(const RankProcess&)>& body) {
  if (process.world.size() > 1) set_rank_label(process.world.rank(), host_name());
  try {
    return body(process);
  } catch (const AgreedError& e) {
    if (process.world.rank() == 0) std::fprintf(stderr, "normformer: %s\n", e.what());
    return static_cast<int>(e.exit_code());
  } catch (...) {
    return fail_alone(process);
  }
}

}  // namespace

int run_on_device(const RankProcess& process, const std::function<int()>& work) {
  try {
    return work();
  } catch (const AgreedError&) {
    throw;
  } catch (...) {
    return fail_alone(process);
  }
}

int run_on_ranks(int* argc, char*** argv, const std::function<int(const RankProcess&)>& body) {
  const auto rendezvous = has_mpi_launcher() ? std::nullopt : rendezvous_from_environment();
  if (rendezvous) return run_rank(join_over_tcp(*rendezvous), body);
  MpiSession mpi(argc, argv);
  return run_rank({mpi.world(), mpi.local_rank(), mpi.local_size(), abort_mpi_job}, body);
}

void require_single_process(const char* command) {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"}) {
    const char* value = std::getenv(name);
    const std::string size = value == nullptr ? "" : value;
    if (!size.empty() && size != "1") {
      throw ConfigError(
          fmt::format("`normformer {}` works in one process: start it without mpirun or another launcher "
                      "({} is {})",
                      command, name, size));
    }
  }
}

}  // namespace normformer
