#pragma once

#include <functional>
#include <memory>

#include "normformer/comm/group.h"
#include "normformer/config/run_config.h"
#include "normformer/tensor/context.h"

namespace normformer {

/// One process among the ranks of a job.
struct RankProcess {
  Group world;
  int local_rank = 0;
  int local_size = 1;
  void (*end_job)(int exit_code) = nullptr;  ///< ends this process, and so the job

  /// Threads of this rank: as configured, or this host's cores shared by its ranks.
  int threads(const DeviceConfig& device) const;
};

/// What a rank computes with: its context, and the world in which its tensors travel.
struct RankDevice {
  std::unique_ptr<Context> context;
  Group world;
};

/// Makes what the configuration asks for. GPUs are given out by a rank's number on its host, round about
/// where there are fewer than ranks; then tensors go by way of the hosts. A rank's threads are bound to the
/// NUMA node of its GPU, and rank 0 logs who has which. ConfigError where no rank can have what was asked
/// for; the same on every rank. Collective over process.world.
RankDevice make_rank_device(const RunConfig& config, const RankProcess& process);

/// Runs `work`, which uses what make_rank_device made, and returns what it returns. Where it fails on this
/// rank alone, prints why and ends the job at once, as run_on_ranks would, but before the device is given up:
/// that waits for all that was enqueued, and so for what other ranks may never send. AgreedError passes
/// through.
int run_on_device(const RankProcess& process, const std::function<int()>& work);

/// Joins the job's other ranks, labels this one and runs `body` on it. Ranks talk over TCP where the
/// environment says how they meet (rendezvous_from_environment) and no launcher of MPI's started them, else
/// over MPI. A failure that all ranks know of (AgreedError) is printed once and ends all of them in good
/// order; any other is printed by its rank and ends the whole job. Returns the exit code.
int run_on_ranks(int* argc, char*** argv, const std::function<int(const RankProcess&)>& body);

/// Ends with a sentence where this process was started as one of several ranks: for commands that work alone.
void require_single_process(const char* command);

}  // namespace normformer
