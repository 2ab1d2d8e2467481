#pragma once

#include <exception>
#include <mutex>
#include <thread>

#include <mpi.h>

#include "normformer/core/error.h"
#include "normformer/core/unique_handle.h"

namespace normformer::detail {

/// CommError with MPI's text where an MPI call did not succeed.
inline void check_mpi(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) length = 0;
  throw CommError(fmt::format("{} failed with code {}: {}", call, code,
                              std::string_view(text, static_cast<size_t>(length))));
}

/// A turn at MPI, which one thread at a time may call (MPI_THREAD_SERIALIZED).
inline std::unique_lock<std::mutex> take_turn() {
  static std::mutex turn;
  return std::unique_lock(turn);
}

/// Calls `done` again and again, each time in a turn at MPI, until it says so: a call of MPI's that waits
/// would keep other threads from theirs. Looks often at first, then lets others have the processor between
/// two looks.
template <class Done>
void poll_mpi(Done&& done) {
  constexpr int kEagerLooks = 64;
  for (int look = 0;; ++look) {
    {
      const auto turn = take_turn();
      if (done()) return;
    }
    if (look > kEagerLooks) std::this_thread::yield();
  }
}

/// MPI_Comm_free is collective: an owner that dies of an exception leaves it to the end of the process.
struct CommunicatorTraits {
  using Handle = MPI_Comm;
  static Handle none() noexcept { return MPI_COMM_NULL; }
  static void close(Handle communicator) noexcept {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (finalized != 0 || std::uncaught_exceptions() != 0) return;
    const auto turn = take_turn();
    MPI_Comm_free(&communicator);
  }
};
using Communicator = UniqueHandle<CommunicatorTraits>;

/// Owns a communicator and makes it return its errors.
inline Communicator own_communicator(MPI_Comm made) {
  Communicator owner(made);
  if (owner) check_mpi(MPI_Comm_set_errhandler(made, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  return owner;
}

}  // namespace normformer::detail
