#pragma once

#include <optional>
#include <string>

#include "normformer/comm/group.h"

namespace normformer {

/// How a process finds the other ranks of its job.
struct Rendezvous {
  int rank = 0;
  int size = 1;
  int local_rank = -1;  ///< among the ranks of its host; -1 where nobody says
  int local_size = 0;   ///< ranks of its host; 0 where nobody says
  /// Where rank 0 is met: "tcp://host:port" where it listens (an IPv6 address in brackets), or
  /// "file:///shared/folder/name", a file that all ranks see, in which it leaves its address. Unused for one
  /// rank.
  std::string address;
  std::string job;  ///< a name of the job, so that no other is mistaken for it; may be empty
};

/// What a launcher other than MPI's says in the environment; nothing where it says nothing. The rank is in
/// RANK and WORLD_SIZE, and perhaps LOCAL_RANK and LOCAL_WORLD_SIZE (torchrun's names), or else in
/// SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID; the address in NORMFORMER_RENDEZVOUS, or else in MASTER_ADDR
/// and MASTER_PORT; the job in NORMFORMER_JOB_ID or SLURM_JOB_ID. Slurm's names alone are no launch: a batch
/// script has them too. ConfigError for settings that are incomplete or contradict each other.
std::optional<Rendezvous> rendezvous_from_environment();

/// All ranks of a job, over one TCP connection for each two. A thread of each process moves bytes while
/// others compute: messages that nobody waits for yet lie in host memory, uncounted. Rank 0 listens at the
/// address, every other rank connects again and again until rank 0 of the same job and size answers.
/// Strangers are turned away by a check of the protocol, but nothing is encrypted: for networks that are
/// trusted.
///
/// A rank whose process ends, or whose world is destroyed by an exception, fails the worlds of all others
/// with a CommError that names it, and so does a host that is silent for a minute. A rank that has destroyed
/// its world in good order fails only who still waits for it. CommError where not all have come within
/// `timeout_seconds`. Labels the calling thread with its rank and host. Collective over the job.
Group make_tcp_world(const Rendezvous& rendezvous, double timeout_seconds = 120.0);

}  // namespace normformer
