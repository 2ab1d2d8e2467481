#include <cstdlib>
#include <numeric>

#include "mpi_group.h"

namespace normformer {

namespace {

using detail::check_mpi;
using detail::Communicator;
using detail::own_communicator;

// Threads take turns at MPI; more than that no transport here needs.
void initialise(int* argc, char*** argv) {
  int already = 0;
  check_mpi(MPI_Initialized(&already), "MPI_Initialized");
  NF_CHECK(already == 0, "a second MpiSession in one process");
  int provided = 0;
  check_mpi(MPI_Init_thread(argc, argv, MPI_THREAD_SERIALIZED, &provided), "MPI_Init_thread");
  check_mpi(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  if (provided < MPI_THREAD_SERIALIZED) {
    throw CommError(
        fmt::format("this MPI offers thread level {} only, but MPI_THREAD_SERIALIZED is needed: use one "
                    "built with threads",
                    provided));
  }
}

Group make_world() {
  MPI_Comm copy = MPI_COMM_NULL;
  check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &copy), "MPI_Comm_dup");
  auto impl = std::make_unique<detail::MpiGroup>(own_communicator(copy));
  std::vector<int> everyone(static_cast<size_t>(impl->size()));
  std::iota(everyone.begin(), everyone.end(), 0);
  return Group(std::move(impl), {"world", std::move(everyone)}, std::make_shared<TrafficLedger>());
}

}  // namespace

MpiSession::MpiSession(int* argc, char*** argv) {
  initialise(argc, argv);
  world_ = make_world();
  set_rank_label(world_.rank(), host_name());

  MPI_Comm made = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, world_.rank(), MPI_INFO_NULL, &made),
            "MPI_Comm_split_type");
  const Communicator host = own_communicator(made);
  check_mpi(MPI_Comm_rank(host.get(), &local_rank_), "MPI_Comm_rank");
  check_mpi(MPI_Comm_size(host.get(), &local_size_), "MPI_Comm_size");
}

MpiSession::~MpiSession() {
  if (std::uncaught_exceptions() > 0) return;
  world_ = Group();
  MPI_Finalize();
}

void MpiSession::abort(int exit_code) noexcept {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  if (initialized != 0 && finalized == 0) MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace normformer
